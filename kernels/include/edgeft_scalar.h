/* Sixteen accumulators in an array: the portable version of edgeft_vector.h, which says what everything is. */
#ifndef EDGEFT_SCALAR_H
#define EDGEFT_SCALAR_H

#ifndef EDGEFT_ISA
#define EDGEFT_ISA "portable"
#endif

#define EDGEFT_TILE_PIXELS 2
#define EDGEFT_TILE_BLOCKS 1

typedef struct {
    int32_t lane[16];
} edgeft_v16;
typedef const int8_t *edgeft_weights;
typedef const uint8_t *edgeft_quad;

typedef struct {
    const int8_t *shift;
} edgeft_rounds;

typedef struct {
    int32_t low, high, offset;
} edgeft_limits;

static inline edgeft_limits edgeft_make_limits(int32_t low, int32_t high)
{
    const edgeft_limits limits = {low, high, low < 0 ? 128 : 0};
    return limits;
}

static inline edgeft_v16 edgeft_load(const int32_t *values)
{
    edgeft_v16 acc;
    for (int i = 0; i < 16; i++) {
        acc.lane[i] = values[i];
    }
    return acc;
}

static inline edgeft_weights edgeft_load_weights(const int8_t *weight)
{
    return weight;
}

static inline edgeft_quad edgeft_load_quad(const uint8_t *codes)
{
    return codes;
}

static inline edgeft_v16 edgeft_dot4(edgeft_v16 acc, edgeft_quad codes, edgeft_weights weight)
{
    for (int i = 0; i < 16; i++) {
        acc.lane[i] += codes[0] * weight[4 * i] + codes[1] * weight[4 * i + 1] + codes[2] * weight[4 * i + 2] + codes[3] * weight[4 * i + 3];
    }
    return acc;
}

static inline edgeft_v16 edgeft_settle(edgeft_v16 acc)
{
    return acc;
}

static inline edgeft_rounds edgeft_make_rounds(const int8_t *shift)
{
    const edgeft_rounds rounds = {shift};
    return rounds;
}

/* For shift 0 the bias has no half step in it, and nothing is rounded. */
static inline edgeft_v16 edgeft_round16(edgeft_v16 acc, const edgeft_rounds *rounds)
{
    for (int i = 0; i < 16; i++) {
        const int32_t shift = rounds->shift[i];
        const uint32_t below = (uint32_t)acc.lane[i] & ((UINT32_C(1) << shift) - 1u);
        const int32_t shifted = edgeft_floor_shift(acc.lane[i], shift);
        acc.lane[i] = shifted - (shift > 0 && below == 0 ? shifted & 1 : 0);
    }
    return acc;
}

static inline edgeft_v16 edgeft_shift_left16(edgeft_v16 acc, const int8_t *shift)
{
    for (int i = 0; i < 16; i++) {
        acc.lane[i] = edgeft_shift_left(acc.lane[i], -shift[i]);
    }
    return acc;
}

static inline void edgeft_store_words(int32_t *y, int32_t n, edgeft_v16 words)
{
    for (int i = 0; i < 16 && i < n; i++) {
        y[i] = words.lane[i];
    }
}

static inline void edgeft_store_codes(uint8_t *y, int32_t n, const edgeft_v16 *codes, int blocks, const edgeft_limits *limits)
{
    for (int32_t i = 0; i < n && i < 16 * blocks; i++) {
        y[i] = edgeft_byte(edgeft_saturate(codes[i / 16].lane[i % 16] - limits->offset, limits->low, limits->high));
    }
}

typedef struct {
    uint8_t code[64];
} edgeft_codes;
typedef edgeft_codes edgeft_quads;

static inline edgeft_codes edgeft_load_codes(const uint8_t *x, int32_t n, int32_t flip)
{
    edgeft_codes codes;
    for (int32_t i = 0; i < 64; i++) {
        codes.code[i] = i < n ? (uint8_t)(x[i] ^ flip) : 0;
    }
    return codes;
}

static inline void edgeft_interleave(edgeft_codes a, edgeft_codes b, edgeft_codes c, edgeft_codes d, edgeft_quads *quads)
{
    for (int i = 0; i < 64; i++) {
        uint8_t *quad = quads[i % 16 / 4].code + 4 * (i / 16 * 4 + i % 4);
        quad[0] = a.code[i];
        quad[1] = b.code[i];
        quad[2] = c.code[i];
        quad[3] = d.code[i];
    }
}

static inline edgeft_v16 edgeft_dot4_each(edgeft_v16 acc, edgeft_quads quads, edgeft_weights weight)
{
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 4; j++) {
            acc.lane[i] += quads.code[4 * i + j] * weight[4 * i + j];
        }
    }
    return acc;
}

static inline void edgeft_store_depth(uint8_t *y, int32_t n, const edgeft_v16 *codes, const edgeft_limits *limits)
{
    for (int32_t i = 0; i < n && i < 64; i++) {
        const int32_t code = codes[i % 16 / 4].lane[i / 16 * 4 + i % 4] - limits->offset;
        y[i] = edgeft_byte(edgeft_saturate(code, limits->low, limits->high));
    }
}

#endif

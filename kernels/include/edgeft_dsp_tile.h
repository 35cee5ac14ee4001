/* Tiles of edgeft_packed.h for the DSP extension, from products to what is stored. */
#ifndef EDGEFT_DSP_TILE_H
#define EDGEFT_DSP_TILE_H

/* Two pixels, a and b, by two output channels, 0 and 1. */
typedef struct {
    int32_t a0, a1, b0, b1;
} edgeft_two_by_two;

#if defined(__ARM_FEATURE_DSP)

/* In assembly, as gcc 12 otherwise keeps some of this in memory. 13 registers: 4 sums, 3 pointers, 4 for codes, 2 for weights. */
#define EDGEFT_QUAD_OF_TWO_BY_TWO \
    "ldr %[odd_a], [%[a]], #4\n\t" \
    "ldr %[odd_b], [%[b]], #4\n\t" \
    "ldr %[odd], [%[weight], #4]\n\t" \
    "uxtb16 %[even_a], %[odd_a]\n\t" \
    "uxtb16 %[even_b], %[odd_b]\n\t" \
    "sxtb16 %[even], %[odd]\n\t" \
    "uxtb16 %[odd_a], %[odd_a], ror #8\n\t" \
    "smlad %[a1], %[even_a], %[even], %[a1]\n\t" \
    "smlad %[b1], %[even_b], %[even], %[b1]\n\t" \
    "ldr %[even], [%[weight]], #64\n\t" \
    "sxtb16 %[odd], %[odd], ror #8\n\t" \
    "uxtb16 %[odd_b], %[odd_b], ror #8\n\t" \
    "smlad %[a1], %[odd_a], %[odd], %[a1]\n\t" \
    "smlad %[b1], %[odd_b], %[odd], %[b1]\n\t" \
    "sxtb16 %[odd], %[even], ror #8\n\t" \
    "sxtb16 %[even], %[even]\n\t" \
    "smlad %[a0], %[odd_a], %[odd], %[a0]\n\t" \
    "smlad %[b0], %[odd_b], %[odd], %[b0]\n\t" \
    "smlad %[a0], %[even_a], %[even], %[a0]\n\t" \
    "smlad %[b0], %[even_b], %[even], %[b0]\n\t"

#define EDGEFT_SUM_QUADS(text)                                                                                                          \
    __asm__(text                                                                                                                        \
            : [a0] "+r"(s.a0), [a1] "+r"(s.a1), [b0] "+r"(s.b0), [b1] "+r"(s.b1), [a] "+r"(a), [b] "+r"(b), [weight] "+r"(weight),      \
              [even_a] "=&r"(even_a), [odd_a] "=&r"(odd_a), [even_b] "=&r"(even_b), [odd_b] "=&r"(odd_b), [even] "=&r"(even),           \
              [odd] "=&r"(odd)                                                                                                          \
            :                                                                                                                           \
            : "memory")

/* A run of `quads` times four codes. */
static inline edgeft_two_by_two edgeft_add_run(edgeft_two_by_two s, const uint8_t *a, const uint8_t *b, const int8_t *weight, int32_t quads)
{
    uint32_t even_a, odd_a, even_b, odd_b, even, odd;
    if (quads & 1) {
        EDGEFT_SUM_QUADS(EDGEFT_QUAD_OF_TWO_BY_TWO);
    }
    for (int32_t pairs = quads >> 1; pairs > 0; pairs--) {
        EDGEFT_SUM_QUADS(EDGEFT_QUAD_OF_TWO_BY_TWO EDGEFT_QUAD_OF_TWO_BY_TWO);
    }
    return s;
}

#else

/* A run of `quads` times four codes. */
static inline edgeft_two_by_two edgeft_add_run(edgeft_two_by_two s, const uint8_t *a, const uint8_t *b, const int8_t *weight, int32_t quads)
{
    for (int32_t quad = 0; quad < quads; quad++) {
        const uint32_t codes_a = edgeft_word(a + 4 * quad), even_a = edgeft_even_codes(codes_a), odd_a = edgeft_odd_codes(codes_a);
        const uint32_t codes_b = edgeft_word(b + 4 * quad), even_b = edgeft_even_codes(codes_b), odd_b = edgeft_odd_codes(codes_b);
        const uint32_t w0 = edgeft_word(weight + 64 * quad), even0 = edgeft_even_weights(w0), odd0 = edgeft_odd_weights(w0);
        const uint32_t w1 = edgeft_word(weight + 64 * quad + 4), even1 = edgeft_even_weights(w1), odd1 = edgeft_odd_weights(w1);
        s.a0 = edgeft_add_both(edgeft_add_both(s.a0, even_a, even0), odd_a, odd0);
        s.a1 = edgeft_add_both(edgeft_add_both(s.a1, even_a, even1), odd_a, odd1);
        s.b0 = edgeft_add_both(edgeft_add_both(s.b0, even_b, even0), odd_b, odd0);
        s.b1 = edgeft_add_both(edgeft_add_both(s.b1, even_b, even1), odd_b, odd1);
    }
    return s;
}

#endif

static inline edgeft_two_by_two edgeft_sum_two_by_two(const edgeft_tiles *t, int32_t first, int32_t weight_at, const int32_t *bias)
{
    edgeft_two_by_two s = {bias[0], bias[1], bias[0], bias[1]};
    for (int32_t run = 0; run < t->n_runs; run++) {
        const uint8_t *a = t->x[run] + first;
        s = edgeft_add_run(s, a, a + t->x_step, t->weight[run] + weight_at, t->quads);
    }
    return s;
}

/* One pixel by four output channels. */
typedef struct {
    int32_t sum[4];
} edgeft_one_by_four;

static inline edgeft_one_by_four edgeft_sum_one_by_four(const edgeft_tiles *t, int32_t first, int32_t weight_at, const int32_t *bias)
{
    edgeft_one_by_four s = {{bias[0], bias[1], bias[2], bias[3]}};
    for (int32_t run = 0; run < t->n_runs; run++) {
        const uint8_t *a = t->x[run] + first;
        const int8_t *weight = t->weight[run] + weight_at, *const end = weight + 64 * t->quads;
        do {
            const uint32_t codes = edgeft_word(a), even = edgeft_even_codes(codes), odd = edgeft_odd_codes(codes);
            const uint32_t w[4] = {edgeft_word(weight), edgeft_word(weight + 4), edgeft_word(weight + 8), edgeft_word(weight + 12)};
            s.sum[0] = edgeft_add_both(edgeft_add_both(s.sum[0], even, edgeft_even_weights(w[0])), odd, edgeft_odd_weights(w[0]));
            s.sum[1] = edgeft_add_both(edgeft_add_both(s.sum[1], even, edgeft_even_weights(w[1])), odd, edgeft_odd_weights(w[1]));
            s.sum[2] = edgeft_add_both(edgeft_add_both(s.sum[2], even, edgeft_even_weights(w[2])), odd, edgeft_odd_weights(w[2]));
            s.sum[3] = edgeft_add_both(edgeft_add_both(s.sum[3], even, edgeft_even_weights(w[3])), odd, edgeft_odd_weights(w[3]));
            a += 4;
            weight += 64;
        } while (weight != end);
    }
    return s;
}

/* n of 2 bytes. */
static inline void edgeft_store_two(uint8_t *y, int32_t n, uint32_t bytes)
{
    if (n >= 2) {
        *(edgeft_two_anywhere *)(void *)y = (uint16_t)bytes;
    } else {
        y[0] = (uint8_t)(bytes & 255u);
    }
}


static inline void edgeft_tile_of_two(const edgeft_tiles *t, int blocks, int wide, int32_t first, edgeft_outputs y)
{
    const int32_t n_all = edgeft_smaller(16 * blocks, t->n);
    const edgeft_dsp_limits limits = edgeft_make_dsp_limits(&t->limits);
    const int32_t at = first * t->y_step, x_first = first * t->x_step;
    for (int32_t o = 0; o < n_all; o += 2) {
        const edgeft_two_by_two s = edgeft_sum_two_by_two(t, x_first, o / 16 * t->block_bytes + o % 16 * 4, t->bias + o);
        const int32_t shift0 = t->shift[o], shift1 = t->shift[o + 1];
        if (wide) {
            int32_t *to = y.words + at + o;
            to[0] = edgeft_shift_left(s.a0, -shift0);
            to[t->y_step] = edgeft_shift_left(s.b0, -shift0);
            if (o + 1 < n_all) {
                to[1] = edgeft_shift_left(s.a1, -shift1);
                to[t->y_step + 1] = edgeft_shift_left(s.b1, -shift1);
            }
            continue;
        }
        const int32_t odd0 = edgeft_is_rounded(shift0), odd1 = edgeft_is_rounded(shift1);
        const uint32_t a = edgeft_dsp_round(s.a0, shift0, odd0) | edgeft_dsp_round(s.a1, shift1, odd1) << 8;
        const uint32_t b = edgeft_dsp_round(s.b0, shift0, odd0) | edgeft_dsp_round(s.b1, shift1, odd1) << 8;
        edgeft_store_two(y.codes + at + o, n_all - o, edgeft_dsp_limit(a, &limits));
        edgeft_store_two(y.codes + at + t->y_step + o, n_all - o, edgeft_dsp_limit(b, &limits));
    }
}

static inline void edgeft_tile_of_one(const edgeft_tiles *t, int blocks, int wide, int32_t first, edgeft_outputs y)
{
    const int32_t n_all = edgeft_smaller(16 * blocks, t->n);
    const edgeft_dsp_limits limits = edgeft_make_dsp_limits(&t->limits);
    const int32_t at = first * t->y_step, x_first = first * t->x_step;
    for (int32_t o = 0; o < n_all; o += 4) {
        const edgeft_one_by_four s = edgeft_sum_one_by_four(t, x_first, o / 16 * t->block_bytes + o % 16 * 4, t->bias + o);
        uint32_t codes = 0;
        for (int i = 0; i < 4; i++) {
            const int32_t shift = t->shift[o + i];
            if (!wide) {
                codes |= edgeft_dsp_round(s.sum[i], shift, edgeft_is_rounded(shift)) << 8 * i;
            } else if (o + i < n_all) {
                y.words[at + o + i] = edgeft_shift_left(s.sum[i], -shift);
            }
        }
        codes = edgeft_dsp_limit(codes, &limits);
        for (int i = 0; i < 4 && o + i < n_all && !wide; i++) {
            y.codes[at + o + i] = (uint8_t)(codes >> 8 * i & 255u);
        }
    }
}

static inline void edgeft_tile(const edgeft_tiles *t, int pixels, int blocks, int wide, int32_t first, edgeft_outputs y)
{
    if (pixels == 2) {
        edgeft_tile_of_two(t, blocks, wide, first, y);
    } else {
        edgeft_tile_of_one(t, blocks, wide, first, y);
    }
}

#endif

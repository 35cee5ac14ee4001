/* Sixteen accumulators in four registers of NEON (AArch64), with the dot products of Armv8.2 and i8mm where there are.
 * edgeft_vector.h says what everything is.
 */
#ifndef EDGEFT_NEON_H
#define EDGEFT_NEON_H

#include <arm_neon.h>

/* 24 accumulators, four registers of weights, one of codes: 29 of 32. */
#define EDGEFT_TILE_PIXELS 6
#define EDGEFT_TILE_BLOCKS 1

typedef int32x4x4_t edgeft_v16;
typedef int8x16x4_t edgeft_weights;
typedef uint8x16_t edgeft_quad;

typedef struct {
    int32x4x4_t right, below, odd; /* shifts to the right are negative numbers for vshlq */
} edgeft_rounds;

typedef struct {
    uint8x16_t low, high, flip;
} edgeft_limits;

static EDGEFT_INLINE edgeft_limits edgeft_make_limits(int32_t low, int32_t high)
{
    const int32_t offset = low < 0 ? 128 : 0;
    const edgeft_limits limits = {vdupq_n_u8((uint8_t)(low + offset)), vdupq_n_u8((uint8_t)(high + offset)), vdupq_n_u8((uint8_t)offset)};
    return limits;
}

static EDGEFT_INLINE edgeft_v16 edgeft_load(const int32_t *values)
{
    return vld1q_s32_x4(values);
}

static EDGEFT_INLINE edgeft_weights edgeft_load_weights(const int8_t *weight)
{
    return vld1q_s8_x4(weight);
}

static EDGEFT_INLINE edgeft_quad edgeft_load_quad(const uint8_t *codes)
{
    return vreinterpretq_u8_s32(vdupq_n_s32(*(const edgeft_anywhere *)(const void *)codes));
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define EDGEFT_ISA "NEON i8mm"

static EDGEFT_INLINE int32x4_t edgeft_dot_four(int32x4_t acc, uint8x16_t codes, int8x16_t weight)
{
    return vusdotq_s32(acc, codes, weight);
}

#elif defined(__ARM_FEATURE_DOTPROD)
#define EDGEFT_ISA "NEON dotprod"

/* There is no product of unsigned and signed bytes: code - 128, and 128 times the weights on top. */
static EDGEFT_INLINE int32x4_t edgeft_dot_four(int32x4_t acc, uint8x16_t codes, int8x16_t weight)
{
    const int8x16_t shifted = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
    const int32x4_t half = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(64), weight);
    return vaddq_s32(vdotq_s32(acc, shifted, weight), vaddq_s32(half, half));
}

#else
#define EDGEFT_ISA "NEON"

/* Products of 16 bits: four for each of four channels, then their sums. */
static EDGEFT_INLINE int32x4_t edgeft_dot_four(int32x4_t acc, uint8x16_t codes, int8x16_t weight)
{
    const int16x8_t c_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))), w_low = vmovl_s8(vget_low_s8(weight));
    const int16x8_t c_high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(codes))), w_high = vmovl_s8(vget_high_s8(weight));
    const int32x4_t p0 = vmull_s16(vget_low_s16(c_low), vget_low_s16(w_low)), p1 = vmull_high_s16(c_low, w_low);
    const int32x4_t p2 = vmull_s16(vget_low_s16(c_high), vget_low_s16(w_high)), p3 = vmull_high_s16(c_high, w_high);
    return vaddq_s32(acc, vpaddq_s32(vpaddq_s32(p0, p1), vpaddq_s32(p2, p3)));
}

#endif

static EDGEFT_INLINE edgeft_v16 edgeft_dot4(edgeft_v16 acc, edgeft_quad codes, edgeft_weights weight)
{
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        acc.val[i] = edgeft_dot_four(acc.val[i], codes, weight.val[i]);
    }
    return acc;
}

static EDGEFT_INLINE edgeft_v16 edgeft_settle(edgeft_v16 acc)
{
    return acc;
}

static EDGEFT_INLINE edgeft_v16 edgeft_load_shifts(const int8_t *shift)
{
    const int8x16_t bytes = vld1q_s8(shift);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    const edgeft_v16 v = {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
    return v;
}

static EDGEFT_INLINE edgeft_rounds edgeft_make_rounds(const int8_t *shift)
{
    const edgeft_v16 shifts = edgeft_load_shifts(shift);
    const int32x4_t one = vdupq_n_s32(1);
    edgeft_rounds r;
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        r.right.val[i] = vnegq_s32(shifts.val[i]);
        r.below.val[i] = vsubq_s32(vshlq_s32(one, shifts.val[i]), one);
        r.odd.val[i] = vminq_s32(shifts.val[i], one);
    }
    return r;
}

static EDGEFT_INLINE edgeft_v16 edgeft_round16(edgeft_v16 acc, const edgeft_rounds *r)
{
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        const int32x4_t tie = vreinterpretq_s32_u32(vceqzq_s32(vandq_s32(acc.val[i], r->below.val[i])));
        acc.val[i] = vbicq_s32(vshlq_s32(acc.val[i], r->right.val[i]), vandq_s32(tie, r->odd.val[i]));
    }
    return acc;
}

static EDGEFT_INLINE edgeft_v16 edgeft_shift_left16(edgeft_v16 acc, const int8_t *shift)
{
    const edgeft_v16 right = edgeft_load_shifts(shift);
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        acc.val[i] = vshlq_s32(acc.val[i], vnegq_s32(right.val[i]));
    }
    return acc;
}

static EDGEFT_INLINE void edgeft_store_words(int32_t *y, int32_t n, edgeft_v16 words)
{
    if (n >= 16) {
        vst1q_s32_x4(y, words);
        return;
    }
    int32_t all[16];
    vst1q_s32_x4(all, words);
    for (int32_t i = 0; i < n; i++) {
        y[i] = all[i];
    }
}

static EDGEFT_INLINE void edgeft_store_bytes(uint8_t *y, int32_t n, uint8x16_t bytes, const edgeft_limits *limits)
{
    const uint8x16_t limited = veorq_u8(vmaxq_u8(vminq_u8(bytes, limits->high), limits->low), limits->flip);
    if (n >= 16) {
        vst1q_u8(y, limited);
        return;
    }
    uint8_t all[16];
    vst1q_u8(all, limited);
    for (int32_t i = 0; i < n; i++) {
        y[i] = all[i];
    }
}

/* Saturates to 16 bits, then to the byte. */
static EDGEFT_INLINE uint8x16_t edgeft_narrow(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d)
{
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(a), b), high = vqmovn_high_s32(vqmovn_s32(c), d);
    return vqmovun_high_s16(vqmovun_s16(low), high);
}

static EDGEFT_INLINE void edgeft_store_codes(uint8_t *y, int32_t n, const edgeft_v16 *codes, int blocks, const edgeft_limits *limits)
{
    EDGEFT_UNROLLED
    for (int v = 0; v < blocks; v++) {
        const int32x4_t *c = codes[v].val;
        edgeft_store_bytes(y + 16 * v, n - 16 * v, edgeft_narrow(c[0], c[1], c[2], c[3]), limits);
    }
}

typedef uint8x16x4_t edgeft_codes;
typedef uint8x16x4_t edgeft_quads;

static EDGEFT_INLINE edgeft_codes edgeft_load_codes(const uint8_t *x, int32_t n, int32_t flip)
{
    uint8_t all[64];
    for (int32_t i = 0; i < 64 && n < 64; i++) {
        all[i] = i < n ? x[i] : 0;
    }
    edgeft_codes codes = vld1q_u8_x4(n >= 64 ? x : all);
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        codes.val[i] = veorq_u8(codes.val[i], vdupq_n_u8((uint8_t)flip));
    }
    return codes;
}

static EDGEFT_INLINE void edgeft_interleave(edgeft_codes a, edgeft_codes b, edgeft_codes c, edgeft_codes d, edgeft_quads *quads)
{
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        const uint16x8_t ab_low = vreinterpretq_u16_u8(vzip1q_u8(a.val[i], b.val[i]));
        const uint16x8_t ab_high = vreinterpretq_u16_u8(vzip2q_u8(a.val[i], b.val[i]));
        const uint16x8_t cd_low = vreinterpretq_u16_u8(vzip1q_u8(c.val[i], d.val[i]));
        const uint16x8_t cd_high = vreinterpretq_u16_u8(vzip2q_u8(c.val[i], d.val[i]));
        quads[0].val[i] = vreinterpretq_u8_u16(vzip1q_u16(ab_low, cd_low));
        quads[1].val[i] = vreinterpretq_u8_u16(vzip2q_u16(ab_low, cd_low));
        quads[2].val[i] = vreinterpretq_u8_u16(vzip1q_u16(ab_high, cd_high));
        quads[3].val[i] = vreinterpretq_u8_u16(vzip2q_u16(ab_high, cd_high));
    }
}

static EDGEFT_INLINE edgeft_v16 edgeft_dot4_each(edgeft_v16 acc, edgeft_quads quads, edgeft_weights weight)
{
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        acc.val[i] = edgeft_dot_four(acc.val[i], quads.val[i], weight.val[i]);
    }
    return acc;
}

static EDGEFT_INLINE void edgeft_store_depth(uint8_t *y, int32_t n, const edgeft_v16 *codes, const edgeft_limits *limits)
{
    EDGEFT_UNROLLED
    for (int l = 0; l < 4; l++) {
        if (n > 16 * l) {
            const uint8x16_t bytes = edgeft_narrow(codes[0].val[l], codes[1].val[l], codes[2].val[l], codes[3].val[l]);
            edgeft_store_bytes(y + 16 * l, n - 16 * l, bytes, limits);
        }
    }
}

#endif

/* Sixteen accumulators in one register of AVX-512, products by VNNI. edgeft_vector.h says what everything is. */
#ifndef EDGEFT_AVX512_H
#define EDGEFT_AVX512_H

#include <immintrin.h>

#define EDGEFT_ISA "AVX-512 VNNI"

/* 28 accumulators, two registers of weights, one of codes: 31 of 32. */
#define EDGEFT_TILE_PIXELS 14
#define EDGEFT_TILE_BLOCKS 2
#define EDGEFT_SHORT_PIXELS 6

typedef __m512i edgeft_v16;
typedef __m512i edgeft_weights;
typedef __m512i edgeft_quad;

typedef struct {
    __m512i shift, below, even;
} edgeft_rounds;

typedef struct {
    __m256i low, high, flip;
    int within; /* of less than all that a byte holds, or signed */
} edgeft_limits;

static EDGEFT_INLINE edgeft_limits edgeft_make_limits(int32_t low, int32_t high)
{
    const int32_t offset = low < 0 ? 128 : 0;
    edgeft_limits limits;
    limits.low = _mm256_set1_epi8((char)(low + offset));
    limits.high = _mm256_set1_epi8((char)(high + offset));
    limits.flip = _mm256_set1_epi8((char)offset);
    limits.within = low != 0 || high != 255;
    return limits;
}

static EDGEFT_INLINE edgeft_v16 edgeft_load(const int32_t *values)
{
    return _mm512_loadu_si512(values);
}

static EDGEFT_INLINE edgeft_weights edgeft_load_weights(const int8_t *weight)
{
    return _mm512_loadu_si512(weight);
}

static EDGEFT_INLINE edgeft_quad edgeft_load_quad(const uint8_t *codes)
{
    return _mm512_set1_epi32(*(const edgeft_anywhere *)(const void *)codes);
}

/* In assembly for gcc, which otherwise keeps accumulators in memory within the loop (gcc 12). */
static EDGEFT_INLINE edgeft_v16 edgeft_dot4(edgeft_v16 acc, edgeft_quad codes, edgeft_weights weight)
{
#if defined(__clang__)
    return _mm512_dpbusd_epi32(acc, codes, weight);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(weight));
    return acc;
#endif
}

/* Nothing that comes later is moved before this: it would take registers from the loop over products. */
static EDGEFT_INLINE edgeft_v16 edgeft_settle(edgeft_v16 acc)
{
    __asm__ volatile("" : "+v"(acc));
    return acc;
}

static EDGEFT_INLINE edgeft_rounds edgeft_make_rounds(const int8_t *shift)
{
    edgeft_rounds rounds;
    rounds.shift = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)shift));
    rounds.below = _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), rounds.shift), _mm512_set1_epi32(1));
    rounds.even = _mm512_mask_set1_epi32(_mm512_set1_epi32(-1), _mm512_test_epi32_mask(rounds.shift, rounds.shift), -2);
    return rounds;
}

static EDGEFT_INLINE edgeft_v16 edgeft_round16(edgeft_v16 acc, const edgeft_rounds *rounds)
{
    const __m512i shifted = _mm512_srav_epi32(acc, rounds->shift);
    return _mm512_mask_and_epi32(shifted, _mm512_testn_epi32_mask(acc, rounds->below), shifted, rounds->even);
}

static EDGEFT_INLINE edgeft_v16 edgeft_shift_left16(edgeft_v16 acc, const int8_t *shift)
{
    const __m512i right = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)shift));
    return _mm512_sllv_epi32(acc, _mm512_sub_epi32(_mm512_setzero_si512(), right));
}

static EDGEFT_INLINE void edgeft_store_words(int32_t *y, int32_t n, edgeft_v16 words)
{
    _mm512_mask_storeu_epi32(y, (__mmask16)(n >= 16 ? 0xFFFFu : (1u << n) - 1u), words);
}

/* Packing saturates to 16 bits, then to the byte, within lanes of 128 bits; then the dwords are put into order. */
static EDGEFT_INLINE void edgeft_store_codes(uint8_t *y, int32_t n, const edgeft_v16 *codes, int blocks, const edgeft_limits *limits)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
    const __m512i words = _mm512_packs_epi32(codes[0], codes[blocks - 1]);
    __m256i bytes = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, words)));
    bytes = _mm256_max_epu8(_mm256_min_epu8(bytes, limits->high), limits->low);
    bytes = _mm256_xor_si256(bytes, limits->flip);
    if (n >= 32) {
        _mm256_storeu_si256((__m256i *)(void *)y, bytes);
    } else {
        _mm256_mask_storeu_epi8(y, (1u << n) - 1u, bytes);
    }
}

/* 64 bytes within their limits. */
static EDGEFT_INLINE __m512i edgeft_limited(__m512i bytes, const edgeft_limits *limits)
{
    if (limits->within) {
        bytes = _mm512_min_epu8(bytes, _mm512_broadcast_i64x4(limits->high));
        bytes = _mm512_max_epu8(bytes, _mm512_broadcast_i64x4(limits->low));
        bytes = _mm512_xor_si512(bytes, _mm512_broadcast_i64x4(limits->flip));
    }
    return bytes;
}

/* n <= 32 bytes of each half. */
static EDGEFT_INLINE void edgeft_store_two(uint8_t *low, uint8_t *high, int32_t n, __m512i bytes)
{
    if (n >= 32) {
        _mm256_storeu_si256((__m256i *)(void *)low, _mm512_castsi512_si256(bytes));
        _mm256_storeu_si256((__m256i *)(void *)high, _mm512_extracti64x4_epi64(bytes, 1));
    } else {
        const __mmask32 mask = (1u << n) - 1u;
        _mm256_mask_storeu_epi8(low, mask, _mm512_castsi512_si256(bytes));
        _mm256_mask_storeu_epi8(high, mask, _mm512_extracti64x4_epi64(bytes, 1));
    }
}

/* Two pixels of one or two blocks each: as edgeft_store_codes, with half as many instructions for both. */
#define EDGEFT_PAIRS
static EDGEFT_INLINE void edgeft_store_pair(uint8_t *y, uint8_t *next, int32_t n, const edgeft_v16 *codes, int blocks,
                                            const edgeft_limits *limits)
{
    const __m512i first = _mm512_packs_epi32(codes[0], codes[blocks - 1]), second = _mm512_packs_epi32(codes[blocks], codes[2 * blocks - 1]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, second));
    edgeft_store_two(y, next, n, edgeft_limited(bytes, limits));
}

typedef __m512i edgeft_codes;
typedef __m512i edgeft_quads;

/* Channels of two rows, n <= 32 of each: in the lower and the upper half. */
#define EDGEFT_HALVES
static EDGEFT_INLINE edgeft_codes edgeft_load_halves(const uint8_t *low, const uint8_t *high, int32_t n, int32_t flip)
{
    __m512i codes;
    if (n == 32) {
        codes = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)low)),
                                   _mm256_loadu_si256((const __m256i *)(const void *)high), 1);
    } else {
        const __mmask32 mask = (1u << n) - 1u;
        codes = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, low)), _mm256_maskz_loadu_epi8(mask, high), 1);
    }
    return flip ? _mm512_xor_si512(codes, _mm512_set1_epi8((char)flip)) : codes;
}

static EDGEFT_INLINE edgeft_codes edgeft_load_codes(const uint8_t *x, int32_t n, int32_t flip)
{
    const __mmask64 mask = n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1u;
    const __m512i codes = _mm512_maskz_loadu_epi8(mask, x);
    return flip ? _mm512_xor_si512(codes, _mm512_set1_epi8((char)flip)) : codes;
}

static EDGEFT_INLINE void edgeft_interleave(edgeft_codes a, edgeft_codes b, edgeft_codes c, edgeft_codes d, edgeft_quads *quads)
{
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    quads[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    quads[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    quads[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    quads[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

static EDGEFT_INLINE edgeft_v16 edgeft_dot4_each(edgeft_v16 acc, edgeft_quads quads, edgeft_weights weight)
{
    return edgeft_dot4(acc, quads, weight);
}

/* The bytes of 4 x 16 codes, in the order of their channels. */
static EDGEFT_INLINE __m512i edgeft_depth_bytes(const edgeft_v16 *codes, const edgeft_limits *limits)
{
    const __m512i low = _mm512_packs_epi32(codes[0], codes[1]), high = _mm512_packs_epi32(codes[2], codes[3]);
    return edgeft_limited(_mm512_packus_epi16(low, high), limits);
}

static EDGEFT_INLINE void edgeft_store_depth(uint8_t *y, int32_t n, const edgeft_v16 *codes, const edgeft_limits *limits)
{
    const __m512i bytes = edgeft_depth_bytes(codes, limits);
    if (n >= 64) {
        _mm512_storeu_si512(y, bytes);
    } else {
        _mm512_mask_storeu_epi8(y, ((__mmask64)1 << n) - 1u, bytes);
    }
}

static EDGEFT_INLINE void edgeft_store_halves(uint8_t *low, uint8_t *high, int32_t n, const edgeft_v16 *codes, const edgeft_limits *limits)
{
    edgeft_store_two(low, high, n, edgeft_depth_bytes(codes, limits));
}

/* Additions as add_narrow.c describes them, 64 codes at a time. */
#define EDGEFT_ADDED 64

typedef struct {
    __m512i flips, times, start, parity, least, range, low;
    int32_t shift;
} edgeft_addition;

static EDGEFT_INLINE edgeft_addition edgeft_make_addition(const edgeft_add_narrow_params *p)
{
    edgeft_addition sum;
    sum.flips = _mm512_set1_epi16((short)(p->left_flip | p->right_flip << 8));
    sum.times = _mm512_set1_epi16((short)(p->left_times | p->right_times << 8));
    sum.start = _mm512_set1_epi16((short)(p->start + p->below));
    sum.parity = _mm512_set1_epi16(p->shift > 0);
    sum.least = _mm512_set1_epi16((short)p->low);
    sum.range = _mm512_set1_epi16((short)(p->high - p->low));
    sum.low = _mm512_set1_epi8((char)(p->low - p->base));
    sum.shift = p->shift;
    return sum;
}

/* `pairs` of a left and a right code each, to steps above the least code: halves are even or odd alike before and after `below` is added. */
static EDGEFT_INLINE __m512i edgeft_add_pairs(const edgeft_addition *sum, __m512i pairs)
{
    const __m128i shift = _mm_cvtsi32_si128(sum->shift);
    const __m512i a = _mm512_add_epi16(_mm512_maddubs_epi16(_mm512_xor_si512(pairs, sum->flips), sum->times), sum->start);
    const __m512i odd = _mm512_and_si512(_mm512_srl_epi16(a, shift), sum->parity);
    const __m512i steps = _mm512_srl_epi16(_mm512_add_epi16(a, odd), shift);
    return _mm512_min_epu16(_mm512_subs_epu16(steps, sum->least), sum->range);
}

static EDGEFT_INLINE void edgeft_add_codes(const edgeft_addition *sum, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    const __m512i a = _mm512_loadu_si512((const __m512i *)(const void *)left), b = _mm512_loadu_si512((const __m512i *)(const void *)right);
    const __m512i first = edgeft_add_pairs(sum, _mm512_unpacklo_epi8(a, b)), second = edgeft_add_pairs(sum, _mm512_unpackhi_epi8(a, b));
    _mm512_storeu_si512((__m512i *)(void *)y, _mm512_add_epi8(_mm512_packus_epi16(first, second), sum->low));
}

#endif

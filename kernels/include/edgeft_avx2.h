/* Sixteen accumulators in two registers of AVX2, with AVX-VNNI where there is. edgeft_vector.h says what everything is. */
#ifndef EDGEFT_AVX2_H
#define EDGEFT_AVX2_H

#include <immintrin.h>

typedef struct {
    __m256i a, b; /* entries 0 ... 7 and 8 ... 15 */
} edgeft_v16;

static EDGEFT_INLINE __m256i edgeft_load32(const void *bytes)
{
    return _mm256_loadu_si256((const __m256i *)bytes);
}

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))

#define EDGEFT_ISA "AVX2 VNNI"

/* 12 accumulators, two registers of weights, one of codes: 15 of 16. */
#define EDGEFT_TILE_PIXELS 6
#define EDGEFT_TILE_BLOCKS 1

typedef edgeft_v16 edgeft_weights;
typedef __m256i edgeft_quad;

static EDGEFT_INLINE edgeft_weights edgeft_load_weights(const int8_t *weight)
{
    const edgeft_weights w = {edgeft_load32(weight), edgeft_load32(weight + 32)};
    return w;
}

static EDGEFT_INLINE edgeft_quad edgeft_make_quad(__m256i codes)
{
    return codes;
}

static EDGEFT_INLINE __m256i edgeft_dot8(__m256i acc, __m256i codes, __m256i weight)
{
#if defined(__AVXVNNI__)
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(weight));
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(weight));
#endif
    return acc;
}

static EDGEFT_INLINE edgeft_v16 edgeft_dot4(edgeft_v16 acc, edgeft_quad codes, edgeft_weights weight)
{
    const edgeft_v16 sum = {edgeft_dot8(acc.a, codes, weight.a), edgeft_dot8(acc.b, codes, weight.b)};
    return sum;
}

#else

#define EDGEFT_ISA "AVX2"

/* 8 accumulators, four registers of weights, two of codes, one of products: 15 of 16. */
#define EDGEFT_TILE_PIXELS 4
#define EDGEFT_TILE_BLOCKS 1

/* Sums of two products of bytes do not fit into 16 bits (255 * 127 * 2), so bytes become 16 bits first: even ones and odd ones. */
typedef struct {
    __m256i even, odd;
} edgeft_quad;
typedef struct {
    edgeft_quad a, b;
} edgeft_weights;

static EDGEFT_INLINE edgeft_quad edgeft_make_quad(__m256i codes)
{
    const edgeft_quad quad = {_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16(codes, 8)};
    return quad;
}

static EDGEFT_INLINE edgeft_quad edgeft_signed_quad(__m256i weight)
{
    const edgeft_quad quad = {_mm256_srai_epi16(_mm256_slli_epi16(weight, 8), 8), _mm256_srai_epi16(weight, 8)};
    return quad;
}

static EDGEFT_INLINE edgeft_weights edgeft_load_weights(const int8_t *weight)
{
    const edgeft_weights w = {edgeft_signed_quad(edgeft_load32(weight)), edgeft_signed_quad(edgeft_load32(weight + 32))};
    return w;
}

static EDGEFT_INLINE __m256i edgeft_dot8(__m256i acc, edgeft_quad codes, edgeft_quad weight)
{
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(codes.even, weight.even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(codes.odd, weight.odd));
}

static EDGEFT_INLINE edgeft_v16 edgeft_dot4(edgeft_v16 acc, edgeft_quad codes, edgeft_weights weight)
{
    const edgeft_v16 sum = {edgeft_dot8(acc.a, codes, weight.a), edgeft_dot8(acc.b, codes, weight.b)};
    return sum;
}

#endif

typedef struct {
    edgeft_v16 shift, below, odd;
} edgeft_rounds;

typedef struct {
    __m256i low, high, flip;
} edgeft_limits;

static EDGEFT_INLINE edgeft_limits edgeft_make_limits(int32_t low, int32_t high)
{
    const int32_t offset = low < 0 ? 128 : 0;
    const edgeft_limits limits = {_mm256_set1_epi8((char)(low + offset)), _mm256_set1_epi8((char)(high + offset)),
                                  _mm256_set1_epi8((char)offset)};
    return limits;
}

static EDGEFT_INLINE edgeft_v16 edgeft_load(const int32_t *values)
{
    const edgeft_v16 v = {edgeft_load32(values), edgeft_load32(values + 8)};
    return v;
}

static EDGEFT_INLINE edgeft_quad edgeft_load_quad(const uint8_t *codes)
{
    return edgeft_make_quad(_mm256_set1_epi32(*(const edgeft_anywhere *)(const void *)codes));
}

static EDGEFT_INLINE edgeft_v16 edgeft_settle(edgeft_v16 acc)
{
    __asm__ volatile("" : "+x"(acc.a), "+x"(acc.b));
    return acc;
}

static EDGEFT_INLINE edgeft_v16 edgeft_load_shifts(const int8_t *shift)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)shift);
    const edgeft_v16 v = {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
    return v;
}

static EDGEFT_INLINE __m256i edgeft_below8(__m256i shift)
{
    const __m256i one = _mm256_set1_epi32(1);
    return _mm256_sub_epi32(_mm256_sllv_epi32(one, shift), one);
}

static EDGEFT_INLINE edgeft_rounds edgeft_make_rounds(const int8_t *shift)
{
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1);
    edgeft_rounds r;
    r.shift = edgeft_load_shifts(shift);
    r.below.a = edgeft_below8(r.shift.a);
    r.below.b = edgeft_below8(r.shift.b);
    r.odd.a = _mm256_and_si256(_mm256_cmpgt_epi32(r.shift.a, zero), one);
    r.odd.b = _mm256_and_si256(_mm256_cmpgt_epi32(r.shift.b, zero), one);
    return r;
}

static EDGEFT_INLINE __m256i edgeft_round8(__m256i acc, __m256i shift, __m256i below, __m256i odd)
{
    const __m256i tie = _mm256_cmpeq_epi32(_mm256_and_si256(acc, below), _mm256_setzero_si256());
    return _mm256_andnot_si256(_mm256_and_si256(tie, odd), _mm256_srav_epi32(acc, shift));
}

static EDGEFT_INLINE edgeft_v16 edgeft_round16(edgeft_v16 acc, const edgeft_rounds *r)
{
    const edgeft_v16 v = {edgeft_round8(acc.a, r->shift.a, r->below.a, r->odd.a), edgeft_round8(acc.b, r->shift.b, r->below.b, r->odd.b)};
    return v;
}

static EDGEFT_INLINE edgeft_v16 edgeft_shift_left16(edgeft_v16 acc, const int8_t *shift)
{
    const edgeft_v16 right = edgeft_load_shifts(shift);
    const __m256i zero = _mm256_setzero_si256();
    const edgeft_v16 v = {_mm256_sllv_epi32(acc.a, _mm256_sub_epi32(zero, right.a)), _mm256_sllv_epi32(acc.b, _mm256_sub_epi32(zero, right.b))};
    return v;
}

static EDGEFT_INLINE void edgeft_store32(void *y, __m256i bytes)
{
    _mm256_storeu_si256((__m256i *)y, bytes);
}

static EDGEFT_INLINE void edgeft_store_words(int32_t *y, int32_t n, edgeft_v16 words)
{
    if (n >= 16) {
        edgeft_store32(y, words.a);
        edgeft_store32(y + 8, words.b);
        return;
    }
    int32_t all[16];
    edgeft_store32(all, words.a);
    edgeft_store32(all + 8, words.b);
    for (int32_t i = 0; i < n; i++) {
        y[i] = all[i];
    }
}

static EDGEFT_INLINE void edgeft_store_some(uint8_t *y, int32_t n, __m256i bytes)
{
    uint8_t all[32];
    edgeft_store32(all, bytes);
    for (int32_t i = 0; i < n && i < 32; i++) {
        y[i] = all[i];
    }
}

static EDGEFT_INLINE __m256i edgeft_limit(__m256i bytes, const edgeft_limits *limits)
{
    return _mm256_xor_si256(_mm256_max_epu8(_mm256_min_epu8(bytes, limits->high), limits->low), limits->flip);
}

static EDGEFT_INLINE void edgeft_store_codes(uint8_t *y, int32_t n, const edgeft_v16 *codes, int blocks, const edgeft_limits *limits)
{
    const edgeft_v16 last = codes[blocks - 1];
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(codes[0].a, codes[0].b), _mm256_packs_epi32(last.a, last.b));
    const __m256i limited = edgeft_limit(_mm256_permutevar8x32_epi32(bytes, order), limits);
    if (blocks == 1 && n >= 16) {
        _mm_storeu_si128((__m128i *)(void *)y, _mm256_castsi256_si128(limited));
    } else if (n >= 32) {
        edgeft_store32(y, limited);
    } else {
        edgeft_store_some(y, n < 16 * blocks ? n : 16 * blocks, limited);
    }
}

/* Lanes of channels 0 ... 31 and of 32 ... 63. */
typedef edgeft_v16 edgeft_codes;
typedef edgeft_v16 edgeft_quads;

static EDGEFT_INLINE edgeft_codes edgeft_load_codes(const uint8_t *x, int32_t n, int32_t flip)
{
    const __m256i mask = _mm256_set1_epi8((char)flip);
    if (n >= 64) {
        const edgeft_codes codes = {_mm256_xor_si256(edgeft_load32(x), mask), _mm256_xor_si256(edgeft_load32(x + 32), mask)};
        return codes;
    }
    uint8_t all[64];
    for (int32_t i = 0; i < 64; i++) {
        all[i] = i < n ? x[i] : 0;
    }
    const edgeft_codes some = {_mm256_xor_si256(edgeft_load32(all), mask), _mm256_xor_si256(edgeft_load32(all + 32), mask)};
    return some;
}

static EDGEFT_INLINE void edgeft_interleave(edgeft_codes a, edgeft_codes b, edgeft_codes c, edgeft_codes d, edgeft_quads *quads)
{
    const edgeft_codes ab_low = {_mm256_unpacklo_epi8(a.a, b.a), _mm256_unpacklo_epi8(a.b, b.b)};
    const edgeft_codes ab_high = {_mm256_unpackhi_epi8(a.a, b.a), _mm256_unpackhi_epi8(a.b, b.b)};
    const edgeft_codes cd_low = {_mm256_unpacklo_epi8(c.a, d.a), _mm256_unpacklo_epi8(c.b, d.b)};
    const edgeft_codes cd_high = {_mm256_unpackhi_epi8(c.a, d.a), _mm256_unpackhi_epi8(c.b, d.b)};
    quads[0].a = _mm256_unpacklo_epi16(ab_low.a, cd_low.a);
    quads[0].b = _mm256_unpacklo_epi16(ab_low.b, cd_low.b);
    quads[1].a = _mm256_unpackhi_epi16(ab_low.a, cd_low.a);
    quads[1].b = _mm256_unpackhi_epi16(ab_low.b, cd_low.b);
    quads[2].a = _mm256_unpacklo_epi16(ab_high.a, cd_high.a);
    quads[2].b = _mm256_unpacklo_epi16(ab_high.b, cd_high.b);
    quads[3].a = _mm256_unpackhi_epi16(ab_high.a, cd_high.a);
    quads[3].b = _mm256_unpackhi_epi16(ab_high.b, cd_high.b);
}

static EDGEFT_INLINE edgeft_v16 edgeft_dot4_each(edgeft_v16 acc, edgeft_quads quads, edgeft_weights weight)
{
    const edgeft_v16 sum = {edgeft_dot8(acc.a, edgeft_make_quad(quads.a), weight.a), edgeft_dot8(acc.b, edgeft_make_quad(quads.b), weight.b)};
    return sum;
}

static EDGEFT_INLINE void edgeft_store_depth(uint8_t *y, int32_t n, const edgeft_v16 *codes, const edgeft_limits *limits)
{
    const __m256i a = _mm256_packus_epi16(_mm256_packs_epi32(codes[0].a, codes[1].a), _mm256_packs_epi32(codes[2].a, codes[3].a));
    const __m256i b = _mm256_packus_epi16(_mm256_packs_epi32(codes[0].b, codes[1].b), _mm256_packs_epi32(codes[2].b, codes[3].b));
    if (n >= 32) {
        edgeft_store32(y, edgeft_limit(a, limits));
    } else {
        edgeft_store_some(y, n, edgeft_limit(a, limits));
    }
    if (n >= 64) {
        edgeft_store32(y + 32, edgeft_limit(b, limits));
    } else if (n > 32) {
        edgeft_store_some(y + 32, n - 32, edgeft_limit(b, limits));
    }
}

/* Additions as add_narrow.c describes them, 32 codes at a time. */
#define EDGEFT_ADDED 32

typedef struct {
    __m256i flips, times, start, parity, least, range, low;
    int32_t shift;
} edgeft_addition;

static EDGEFT_INLINE edgeft_addition edgeft_make_addition(const edgeft_add_narrow_params *p)
{
    edgeft_addition sum;
    sum.flips = _mm256_set1_epi16((short)(p->left_flip | p->right_flip << 8));
    sum.times = _mm256_set1_epi16((short)(p->left_times | p->right_times << 8));
    sum.start = _mm256_set1_epi16((short)(p->start + p->below));
    sum.parity = _mm256_set1_epi16(p->shift > 0);
    sum.least = _mm256_set1_epi16((short)p->low);
    sum.range = _mm256_set1_epi16((short)(p->high - p->low));
    sum.low = _mm256_set1_epi8((char)(p->low - p->base));
    sum.shift = p->shift;
    return sum;
}

/* `pairs` of a left and a right code each, to steps above the least code: halves are even or odd alike before and after `below` is added. */
static EDGEFT_INLINE __m256i edgeft_add_pairs(const edgeft_addition *sum, __m256i pairs)
{
    const __m128i shift = _mm_cvtsi32_si128(sum->shift);
    const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_xor_si256(pairs, sum->flips), sum->times), sum->start);
    const __m256i odd = _mm256_and_si256(_mm256_srl_epi16(a, shift), sum->parity);
    const __m256i steps = _mm256_srl_epi16(_mm256_add_epi16(a, odd), shift);
    return _mm256_min_epu16(_mm256_subs_epu16(steps, sum->least), sum->range);
}

static EDGEFT_INLINE void edgeft_add_codes(const edgeft_addition *sum, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)left), b = _mm256_loadu_si256((const __m256i *)(const void *)right);
    const __m256i first = edgeft_add_pairs(sum, _mm256_unpacklo_epi8(a, b)), second = edgeft_add_pairs(sum, _mm256_unpackhi_epi8(a, b));
    _mm256_storeu_si256((__m256i *)(void *)y, _mm256_add_epi8(_mm256_packus_epi16(first, second), sum->low));
}

#endif

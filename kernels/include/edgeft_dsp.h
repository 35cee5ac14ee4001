/* The DSP extension of Cortex-M4, M7, M33, M35P, M55 and M85: two products of 16 bits and their sum in one instruction.
 *
 * Sixteen accumulators do not fit into 13 registers, so a tile is not kept as edgeft_v16: two pixels by two output channels, or one pixel by
 * four, go from bias to stored codes in registers, one after the other. The rest is edgeft_scalar.h. Codes 0 ... 255 and weights become
 * 16 bits by an instruction that takes every other byte of a word: first bytes 0 and 2, then 1 and 3, for both alike.
 *
 * Nothing overflows: a product is below 2^15 and sums are proven to stay below 2^31 in any order. The flag that SMLAD sets otherwise is not
 * read. On any other machine, for tests, the instructions are what their comments say (EDGEFT_DSP).
 */
#ifndef EDGEFT_DSP_H
#define EDGEFT_DSP_H

#define EDGEFT_ISA "Arm DSP"

#include "edgeft_scalar.h"

#define EDGEFT_OWN_TILE "edgeft_dsp_tile.h"
#define EDGEFT_OWN_DEPTH "edgeft_dsp_depth.h"

#if defined(__ARM_FEATURE_DSP)

#define EDGEFT_DSP_1(name, instruction)                             \
    static inline uint32_t name(uint32_t x)                         \
    {                                                               \
        uint32_t y;                                                 \
        __asm__(instruction : "=r"(y) : "r"(x));                    \
        return y;                                                   \
    }
#define EDGEFT_DSP_2(name, instruction)                             \
    static inline uint32_t name(uint32_t x, uint32_t z)             \
    {                                                               \
        uint32_t y;                                                 \
        __asm__(instruction : "=r"(y) : "r"(x), "r"(z));            \
        return y;                                                   \
    }
#define EDGEFT_DSP_3(name, instruction)                                          \
    static inline int32_t name(int32_t acc, uint32_t x, uint32_t z)              \
    {                                                                            \
        __asm__(instruction : "=r"(acc) : "r"(x), "r"(z), "0"(acc));             \
        return acc;                                                              \
    }

EDGEFT_DSP_1(edgeft_even_codes, "uxtb16 %0, %1")
EDGEFT_DSP_1(edgeft_odd_codes, "uxtb16 %0, %1, ror #8")
EDGEFT_DSP_1(edgeft_even_weights, "sxtb16 %0, %1")
EDGEFT_DSP_1(edgeft_odd_weights, "sxtb16 %0, %1, ror #8")
EDGEFT_DSP_3(edgeft_add_both, "smlad %0, %1, %2, %0")
EDGEFT_DSP_3(edgeft_add_low, "smlabb %0, %1, %2, %0")
EDGEFT_DSP_3(edgeft_add_high, "smlatb %0, %1, %2, %0")
EDGEFT_DSP_2(edgeft_add_bytes, "uqadd8 %0, %1, %2")
EDGEFT_DSP_2(edgeft_subtract_bytes, "uqsub8 %0, %1, %2")

static inline uint32_t edgeft_to_byte(int32_t x)
{
    uint32_t y;
    __asm__("usat %0, #8, %1" : "=r"(y) : "r"(x));
    return y;
}

#else

/* Bytes 0 and 2 as 16 bits each. */
static inline uint32_t edgeft_even_codes(uint32_t x)
{
    return x & UINT32_C(0x00FF00FF);
}

/* Bytes 1 and 3. */
static inline uint32_t edgeft_odd_codes(uint32_t x)
{
    return x >> 8 & UINT32_C(0x00FF00FF);
}

/* The same for bytes with a sign: bit 7 in bits 8 ... 15. */
static inline uint32_t edgeft_even_weights(uint32_t x)
{
    return (x & UINT32_C(0x00FF00FF)) | (x >> 7 & UINT32_C(0x00010001)) * 0xFF00u;
}

static inline uint32_t edgeft_odd_weights(uint32_t x)
{
    return edgeft_even_weights(x >> 8);
}

static inline int32_t edgeft_low_half(uint32_t x)
{
    return (int32_t)((x & 0xFFFFu) ^ 0x8000u) - 0x8000;
}

/* acc + x[0] * y[0], of 16 bits with a sign. */
static inline int32_t edgeft_add_low(int32_t acc, uint32_t x, uint32_t y)
{
    return acc + edgeft_low_half(x) * edgeft_low_half(y);
}

/* acc + x[1] * y[0] */
static inline int32_t edgeft_add_high(int32_t acc, uint32_t x, uint32_t y)
{
    return acc + edgeft_low_half(x >> 16) * edgeft_low_half(y);
}

/* acc + x[0] * y[0] + x[1] * y[1] */
static inline int32_t edgeft_add_both(int32_t acc, uint32_t x, uint32_t y)
{
    return edgeft_add_low(edgeft_add_low(acc, x, y), x >> 16, y >> 16);
}

/* Four bytes, each at most 255. */
static inline uint32_t edgeft_add_bytes(uint32_t x, uint32_t y)
{
    uint32_t sum = 0;
    for (int i = 0; i < 32; i += 8) {
        const uint32_t byte = (x >> i & 255u) + (y >> i & 255u);
        sum |= (byte > 255 ? 255 : byte) << i;
    }
    return sum;
}

/* Four bytes, each at least 0. */
static inline uint32_t edgeft_subtract_bytes(uint32_t x, uint32_t y)
{
    uint32_t rest = 0;
    for (int i = 0; i < 32; i += 8) {
        const uint32_t a = x >> i & 255u, b = y >> i & 255u;
        rest |= (a > b ? a - b : 0) << i;
    }
    return rest;
}

/* Limited to 0 ... 255. */
static inline uint32_t edgeft_to_byte(int32_t x)
{
    return (uint32_t)edgeft_saturate(x, 0, 255);
}

#endif

/* Two and four bytes at any address, which may be bytes of something else. */
typedef uint16_t __attribute__((may_alias, aligned(1))) edgeft_two_anywhere;
typedef uint32_t __attribute__((may_alias, aligned(1))) edgeft_four_anywhere;

/* Four bytes at any address, the first one lowest. */
static inline uint32_t edgeft_word(const void *bytes)
{
    return *(const edgeft_four_anywhere *)bytes;
}

/* The byte of an accumulator with half a step in it (eq. 3), before its limits; `odd` is 0 where the shift is 0, else 1.
 *
 * 1 is taken from what lies on or above an odd quotient: that changes the quotient only where nothing lies above it, a half.
 */
static inline uint32_t edgeft_dsp_round(int32_t acc, int32_t shift, int32_t odd)
{
    return edgeft_to_byte(edgeft_floor_shift(acc - (edgeft_floor_shift(acc, shift) & odd), shift));
}

/* 0 for 0, 1 for 1 ... 31 */
static inline int32_t edgeft_is_rounded(int32_t shift)
{
    return (shift + 31) >> 5;
}

/* The limits of four bytes side by side. */
typedef struct {
    uint32_t above, outside, low, flip;
} edgeft_dsp_limits;

static inline edgeft_dsp_limits edgeft_make_dsp_limits(const edgeft_limits *limits)
{
    const uint32_t low = (uint32_t)(limits->low + limits->offset), above = 255u - (uint32_t)(limits->high + limits->offset);
    const uint32_t each = UINT32_C(0x01010101);
    const edgeft_dsp_limits words = {above * each, (above + low) * each, low * each, (uint32_t)limits->offset * each};
    return words;
}

/* Bytes above the largest code saturate where 255 is added to it; those below the least one where all but the rest is subtracted. */
static inline uint32_t edgeft_dsp_limit(uint32_t bytes, const edgeft_dsp_limits *limits)
{
    const uint32_t above = edgeft_subtract_bytes(edgeft_add_bytes(bytes, limits->above), limits->outside);
    return (above + limits->low) ^ limits->flip;
}

#endif

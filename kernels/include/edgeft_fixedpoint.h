/* Rounding shift and saturation: the arithmetic every kernel ends with.
 *
 * Equation numbers refer to edgeft/fixedpoint.md. C99, freestanding: integers only, no libc, no allocation, no undefined and no
 * implementation-defined behaviour. int32_t holds every accumulator, which is proven when the network is lowered (eq. 13).
 */
#ifndef EDGEFT_FIXEDPOINT_H
#define EDGEFT_FIXEDPOINT_H

#include <stdint.h>

/* floor(value / 2^shift)
 *
 * Range:  shift 0 ... 31, any value.
 * The only place where a negative number is shifted right. C99 leaves `negative >> n` to the compiler; the complement of a
 * negative number is not negative, and compilers turn this into one arithmetic shift.
 */
static inline int32_t edgeft_floor_shift(int32_t value, int32_t shift)
{
    return value >= 0 ? value >> shift : ~(~value >> shift);
}

/* value / 2^shift, rounded to nearest, halves to even (eq. 3)
 *
 * Range:     shift 0 ... 31, any value.
 * Rounding:  up when the discarded bits are more than half a step, or exactly half and the quotient is odd.
 *            shift 1: -3 -> -2, -1 -> 0, 1 -> 0, 3 -> 2, 5 -> 2.
 * No overflow: the discarded bits are compared, nothing is added to `value`; for shift >= 1 the quotient is at most 2^30.
 */
static inline int32_t edgeft_round_shift(int32_t value, int32_t shift)
{
    if (shift == 0) {
        return value;
    }
    const int32_t quotient = edgeft_floor_shift(value, shift);
    const uint32_t half = UINT32_C(1) << (shift - 1);
    const uint32_t discarded = (uint32_t)value & ((half << 1) - 1u);
    const int round_up = discarded > half || (discarded == half && (quotient & 1) != 0);
    return quotient + round_up;
}

/* value, limited to low ... high */
static inline int32_t edgeft_saturate(int32_t value, int32_t low, int32_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* Accumulator to output code: one rounding shift, then saturation (eq. 4)
 *
 * Range:       shift -30 ... 31; a negative one multiplies by 2^-shift. low <= 0 <= high.
 * Saturation:  to low ... high: -128 ... 127 signed, 0 ... 255 unsigned, 0 ... high after a ReLU, 32 bits for accumulators.
 * No overflow: a left shift saturates before it multiplies; acc * 2^n > high exactly when acc > floor(high / 2^n), and acc * 2^n < low
 *              exactly when acc < -floor(-low / 2^n), where -low may be 2^31 and therefore is unsigned.
 */
static inline int32_t edgeft_requantize(int32_t acc, int32_t shift, int32_t low, int32_t high)
{
    if (shift >= 0) {
        return edgeft_saturate(edgeft_round_shift(acc, shift), low, high);
    }
    if (acc > (high >> -shift)) {
        return high;
    }
    if (acc < -(int32_t)((UINT32_C(0) - (uint32_t)low) >> -shift)) {
        return low;
    }
    return acc * (int32_t)(UINT32_C(1) << -shift);
}

#endif

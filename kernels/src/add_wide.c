#include "edgeft_sums.h"

/* a = left * 2^left_shift + right * 2^right_shift        y = requantize(a, shift)   (eq. 21)
 *
 * Range:       left: accumulators, right: codes -128 ... 255; left shifts 0 ... 30, the sum is below 2^31 (eq. 13); shift -30 ... 31.
 * Rounding:    one rounding shift of the sum, half to even (eq. 3).
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 * In place on `left`, byte i lies in an accumulator that was read before.
 */
int edgeft_add_wide(const edgeft_add_params *p, const int32_t *left, const uint8_t *right, uint8_t *y)
{
    for (int32_t i = 0; i < p->n; i++) {
        const int32_t acc = edgeft_shift_left(left[i], p->left_shift) +
                            edgeft_shift_left(edgeft_code(right[i], p->right), p->right_shift);
        y[i] = edgeft_byte(edgeft_requantize(acc, p->shift, p->low, p->high));
    }
    return EDGEFT_OK;
}

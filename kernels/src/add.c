#include "edgeft_sums.h"

/* a = left * 2^left_shift + right * 2^right_shift        y = requantize(a, shift)   (eq. 8)
 *
 * Range:       codes -128 ... 255; left shifts 0 ... 30, the sum is below 2^31 (eq. 13); shift -30 ... 31.
 * Rounding:    one rounding shift of the sum, half to even (eq. 3).
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 */
int edgeft_add(const edgeft_add_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    for (int32_t i = 0; i < p->n; i++) {
        const int32_t acc = edgeft_shift_left(edgeft_code(left[i], p->left), p->left_shift) +
                            edgeft_shift_left(edgeft_code(right[i], p->right), p->right_shift);
        y[i] = edgeft_byte(edgeft_requantize(acc, p->shift, p->low, p->high));
    }
    return EDGEFT_OK;
}

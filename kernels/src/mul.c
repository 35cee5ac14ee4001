#include "edgeft_sums.h"

/* a = left * right        y = requantize(a, shift)   (eq. 17)
 *
 * Range:       codes -128 ... 255, so the product is below 2^16; shift -30 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3).
 * Saturation:  to low ... high.
 */
int edgeft_mul(const edgeft_mul_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    for (int32_t pixel = 0; pixel < p->pixels; pixel++) {
        for (int32_t c = 0; c < p->channels; c++) {
            const int32_t i = pixel * p->channels + c;
            const int32_t acc = edgeft_code(left[i], p->left) * edgeft_code(right[i], p->right);
            y[i] = edgeft_byte(edgeft_requantize(acc, p->shift, p->low, p->high));
        }
    }
    return EDGEFT_OK;
}

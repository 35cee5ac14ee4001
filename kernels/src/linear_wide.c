#include "edgeft_sums.h"

/* a[o] = bias[o] + sum over i of weight[o][i] * code[i]        y = a[o] * 2^-shift[o]   (eq. 5, 15)
 *
 * Range:       codes -128 ... 255, weights -127 ... 127, accumulators below 2^31 (eq. 13), shifts -30 ... 31.
 * Rounding:    half to even (eq. 3) where a shift is positive; accumulators that are handed out have none.
 * Saturation:  to low ... high, the ends of 32 bits.
 */
int edgeft_linear_wide(const edgeft_linear_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                       int32_t *y)
{
    if (p->in_channels <= 0 || p->out_channels <= 0) {
        return EDGEFT_BAD_SHAPE;
    }
    for (int32_t o = 0; o < p->out_channels; o++) {
        const int32_t acc = bias[o] + edgeft_dot(x, weight + o * p->in_channels, p->in_channels, p->in);
        y[o] = edgeft_round(acc, &p->rounding, shift, o);
    }
    return EDGEFT_OK;
}

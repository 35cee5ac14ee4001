#include "edgeft_sums.h"

/* a[o] = bias[o] + sum over i of weight[o][i] * code[i]        y = requantize(a[o], shift[o])   (eq. 5, 7)
 *
 * Range:       codes -128 ... 255, weights -127 ... 127, accumulators below 2^31 (eq. 13), shifts -30 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3).
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 */
int edgeft_linear(const edgeft_linear_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                  uint8_t *y)
{
    if (p->in_channels <= 0 || p->out_channels <= 0) {
        return EDGEFT_BAD_SHAPE;
    }
    for (int32_t o = 0; o < p->out_channels; o++) {
        const int32_t acc = bias[o] + edgeft_dot(x, weight + o * p->in_channels, p->in_channels, p->in);
        y[o] = edgeft_byte(edgeft_round(acc, &p->rounding, shift, o));
    }
    return EDGEFT_OK;
}

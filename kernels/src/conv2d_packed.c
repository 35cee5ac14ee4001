#include "edgeft_packed.h"

/* a[o] = bias[o] + sum over taps and channels of weight * byte        y = requantize(a[o], shift[o])   (eq. 5, 7)
 *
 * Range:       bytes 0 ... 255 after staging, weights -127 ... 127, accumulators with all that is in the bias below 2^31, shifts 0 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3); half a step is in the bias.
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 */
int edgeft_conv2d_packed(const edgeft_conv2d_packed_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias,
                         const int8_t *shift, uint8_t *scratch, uint8_t *y)
{
    const edgeft_outputs outputs = {y, 0};
    return edgeft_packed(p, x, weight, bias, shift, scratch, outputs, 0);
}

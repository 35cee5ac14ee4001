#include "edgeft_packed.h"

/* a[o] = bias[o] + sum over taps and channels of weight * byte        y = a[o] * 2^-shift[o]   (eq. 5, 21)
 *
 * Range:  bytes 0 ... 255 after staging, weights -127 ... 127, accumulators with all that is in the bias below 2^31 before and after the
 *         shift, -30 ... 0. Nothing is rounded.
 */
int edgeft_conv2d_packed_wide(const edgeft_conv2d_packed_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias,
                              const int8_t *shift, uint8_t *scratch, int32_t *y)
{
    const edgeft_outputs outputs = {0, y};
    return edgeft_packed(p, x, weight, bias, shift, scratch, outputs, 1);
}

#include "edgeft_sums.h"

/* a[o] = bias[o] + sum over taps and channels of weight * code        y = requantize(a[o], shift[o])   (eq. 5, 7)
 *
 * Range:       codes -128 ... 255, weights -127 ... 127, accumulators below 2^31 (eq. 13), shifts -30 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3).
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 */
int edgeft_conv2d(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                  uint8_t *y)
{
    if (!edgeft_conv2d_fits(p)) {
        return EDGEFT_BAD_SHAPE;
    }
    const int32_t in_group = p->in_channels / p->groups, out_group = p->out_channels / p->groups;
    const int32_t window = p->kernel_rows * p->kernel_columns * in_group;
    for (int32_t row = 0; row < p->out_rows; row++) {
        const edgeft_taps rows = edgeft_clip(row * p->stride_rows - p->pad_top, p->dilation_rows, p->kernel_rows, p->in_rows);
        for (int32_t column = 0; column < p->out_columns; column++) {
            const edgeft_taps columns =
                edgeft_clip(column * p->stride_columns - p->pad_left, p->dilation_columns, p->kernel_columns, p->in_columns);
            for (int32_t o = 0; o < p->out_channels; o++) {
                const int32_t sum = edgeft_window(p, x + o / out_group * in_group, weight + o * window, rows, columns);
                *y++ = edgeft_byte(edgeft_round(bias[o] + sum, &p->rounding, shift, o));
            }
        }
    }
    return EDGEFT_OK;
}

#include "edgeft_sums.h"

/* a[c] = bias[c] + sum over taps of weight * code        y = requantize(a[c], shift[c])   (eq. 5, 7)
 *
 * Range:       codes -128 ... 255, weights -127 ... 127, accumulators below 2^31 (eq. 13), shifts -30 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3).
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 * Channels are neighbours in memory, so they are summed side by side, tap by tap.
 */
int edgeft_dwconv2d(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                    uint8_t *y)
{
    const int32_t channels = p->in_channels;
    if (!edgeft_conv2d_fits(p) || p->groups != channels || p->out_channels != channels) {
        return EDGEFT_BAD_SHAPE;
    }
    for (int32_t row = 0; row < p->out_rows; row++) {
        const edgeft_taps rows = edgeft_clip(row * p->stride_rows - p->pad_top, p->dilation_rows, p->kernel_rows, p->in_rows);
        for (int32_t column = 0; column < p->out_columns; column++) {
            const edgeft_taps columns =
                edgeft_clip(column * p->stride_columns - p->pad_left, p->dilation_columns, p->kernel_columns, p->in_columns);
            for (int32_t first = 0; first < channels; first += EDGEFT_LANES) {
                const int32_t n = edgeft_smaller(EDGEFT_LANES, channels - first);
                int32_t acc[EDGEFT_LANES];
                for (int32_t c = 0; c < n; c++) {
                    acc[c] = bias[first + c];
                }
                for (int32_t i = rows.first; i < rows.end; i++) {
                    for (int32_t j = columns.first; j < columns.end; j++) {
                        const int32_t pixel =
                            (rows.start + i * p->dilation_rows) * p->in_columns + columns.start + j * p->dilation_columns;
                        const uint8_t *code = x + pixel * channels + first;
                        const int8_t *w = weight + (i * p->kernel_columns + j) * channels + first;
                        for (int32_t c = 0; c < n; c++) {
                            acc[c] += w[c] * edgeft_code(code[c], p->in);
                        }
                    }
                }
                for (int32_t c = 0; c < n; c++) {
                    *y++ = edgeft_byte(edgeft_round(acc[c], &p->rounding, shift, first + c));
                }
            }
        }
    }
    return EDGEFT_OK;
}

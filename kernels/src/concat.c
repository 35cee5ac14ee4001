#include "edgeft_sums.h"

/* y[pixel][first + c] = x[pixel][c]   (eq. 19)
 *
 * Range:  every byte. Nothing is rounded.
 */
int edgeft_concat(const edgeft_channels_params *p, const uint8_t *x, uint8_t *y)
{
    if (p->first < 0 || p->first + p->in_channels > p->out_channels) {
        return EDGEFT_BAD_SHAPE;
    }
    for (int32_t pixel = 0; pixel < p->pixels; pixel++) {
        for (int32_t c = 0; c < p->in_channels; c++) {
            y[pixel * p->out_channels + p->first + c] = x[pixel * p->in_channels + c];
        }
    }
    return EDGEFT_OK;
}

#include "edgeft_sums.h"

/* y[pixel][c] = x[pixel][index[c]]   (eq. 19)
 *
 * Range:  every byte; index 0 ... in_channels - 1. Nothing is rounded.
 */
int edgeft_select(const edgeft_channels_params *p, const uint8_t *x, const uint16_t *index, uint8_t *y)
{
    for (int32_t pixel = 0; pixel < p->pixels; pixel++) {
        for (int32_t c = 0; c < p->out_channels; c++) {
            y[pixel * p->out_channels + c] = x[pixel * p->in_channels + index[c]];
        }
    }
    return EDGEFT_OK;
}

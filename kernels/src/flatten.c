#include "edgeft_sums.h"

/* y[c][pixel] = x[pixel][c]
 *
 * Range:  every code. Nothing is rounded.
 */
int edgeft_flatten(const edgeft_flatten_params *p, const uint8_t *x, uint8_t *y)
{
    for (int32_t c = 0; c < p->channels; c++) {
        for (int32_t pixel = 0; pixel < p->pixels; pixel++) {
            *y++ = x[pixel * p->channels + c];
        }
    }
    return EDGEFT_OK;
}

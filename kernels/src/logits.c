#include "edgeft_sums.h"

/* y[c][pixel] = code of x[pixel][c]
 *
 * Range:  every code. Nothing is rounded.
 */
int edgeft_logits(const edgeft_flatten_params *p, const uint8_t *x, int32_t *y)
{
    for (int32_t c = 0; c < p->channels; c++) {
        for (int32_t pixel = 0; pixel < p->pixels; pixel++) {
            *y++ = edgeft_code(x[pixel * p->channels + c], p->in);
        }
    }
    return EDGEFT_OK;
}

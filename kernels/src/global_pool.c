#include "edgeft_sums.h"

/* a[c] = sum over pixels of code        y = requantize(a[c], shift)   (eq. 10)
 *
 * Range:       codes -128 ... 255, the sum is below 2^31; shift -30 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3).
 * Saturation:  to low ... high.
 */
int edgeft_global_pool(const edgeft_global_pool_params *p, const uint8_t *x, uint8_t *y)
{
    for (int32_t first = 0; first < p->channels; first += EDGEFT_LANES) {
        const int32_t n = edgeft_smaller(EDGEFT_LANES, p->channels - first);
        int32_t acc[EDGEFT_LANES];
        for (int32_t c = 0; c < n; c++) {
            acc[c] = 0;
        }
        for (int32_t pixel = 0; pixel < p->pixels; pixel++) {
            for (int32_t c = 0; c < n; c++) {
                acc[c] += edgeft_code(x[pixel * p->channels + first + c], p->in);
            }
        }
        for (int32_t c = 0; c < n; c++) {
            y[first + c] = edgeft_byte(edgeft_requantize(acc[c], p->shift, p->low, p->high));
        }
    }
    return EDGEFT_OK;
}

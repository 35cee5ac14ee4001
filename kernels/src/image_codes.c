#include "edgeft_sums.h"

/* y = x - 128 in two's complement   (eq. 12)
 *
 * Range:  every byte. From EDGEFT_OFFSET to EDGEFT_S8, which differ in the top bit.
 */
int edgeft_image_codes(const edgeft_bytes_params *p, const uint8_t *x, uint8_t *y)
{
    for (int32_t i = 0; i < p->n; i++) {
        y[i] = x[i] ^ 128u;
    }
    return EDGEFT_OK;
}

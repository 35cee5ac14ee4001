#include "edgeft_sums.h"

/* y = table[x]   (eq. 18)
 *
 * Range:  every byte. Nothing is rounded here; the table was put into the order of the input's bytes when it was exported.
 */
int edgeft_lookup(const edgeft_bytes_params *p, const uint8_t *x, const uint8_t *table, uint8_t *y)
{
    for (int32_t i = 0; i < p->n; i++) {
        y[i] = table[x[i]];
    }
    return EDGEFT_OK;
}

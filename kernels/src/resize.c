#include "edgeft_sums.h"

/* y[row][column][c] = x[floor(row / factor_rows)][floor(column / factor_columns)][c]   (eq. 19)
 *
 * Range:  every byte. Nothing is rounded.
 */
int edgeft_resize(const edgeft_resize_params *p, const uint8_t *x, uint8_t *y)
{
    if (p->factor_rows <= 0 || p->factor_columns <= 0) {
        return EDGEFT_BAD_SHAPE;
    }
    for (int32_t row = 0; row < p->in_rows * p->factor_rows; row++) {
        for (int32_t column = 0; column < p->in_columns * p->factor_columns; column++) {
            const int32_t pixel = row / p->factor_rows * p->in_columns + column / p->factor_columns;
            for (int32_t c = 0; c < p->channels; c++) {
                *y++ = x[pixel * p->channels + c];
            }
        }
    }
    return EDGEFT_OK;
}

#include "edgeft_sums.h"

static inline void edgeft_keep_larger(int32_t n, const uint8_t *code, uint8_t flip, uint8_t *best)
{
    for (int32_t c = 0; c < n; c++) {
        const uint8_t byte = code[c] ^ flip;
        best[c] = byte > best[c] ? byte : best[c];
    }
}

/* y = the largest code of the window
 *
 * Range:  every code. Nothing is rounded. Taps beyond the edge are left out, so they never win.
 * Bytes are compared with the top bit of signed codes flipped: then they are in the order of the codes.
 */
int edgeft_max_pool(const edgeft_max_pool_params *p, const uint8_t *x, uint8_t *y)
{
    if (p->channels <= 0 || p->stride_rows <= 0 || p->stride_columns <= 0 || p->kernel_rows <= 0 || p->kernel_columns <= 0) {
        return EDGEFT_BAD_SHAPE;
    }
    const uint8_t flip = p->in == EDGEFT_S8 ? 128 : 0;
    for (int32_t row = 0; row < p->out_rows; row++) {
        const edgeft_taps rows = edgeft_clip(row * p->stride_rows - p->pad_top, 1, p->kernel_rows, p->in_rows);
        for (int32_t column = 0; column < p->out_columns; column++) {
            const edgeft_taps columns = edgeft_clip(column * p->stride_columns - p->pad_left, 1, p->kernel_columns, p->in_columns);
            for (int32_t first = 0; first < p->channels; first += EDGEFT_LANES) {
                const int32_t n = edgeft_smaller(EDGEFT_LANES, p->channels - first);
                uint8_t best[EDGEFT_LANES];
                for (int32_t c = 0; c < n; c++) {
                    best[c] = 0;
                }
                for (int32_t i = rows.first; i < rows.end; i++) {
                    const int32_t at = edgeft_ring_place(rows.start + i, p->ring_first, p->ring_rows) * p->in_columns;
                    for (int32_t j = columns.first; j < columns.end; j++) {
                        const uint8_t *code = x + (at + columns.start + j) * p->channels + first;
                        if (n == EDGEFT_LANES) {
                            edgeft_keep_larger(EDGEFT_LANES, code, flip, best);
                        } else {
                            edgeft_keep_larger(n, code, flip, best);
                        }
                    }
                }
                for (int32_t c = 0; c < n; c++) {
                    *y++ = best[c] ^ flip;
                }
            }
        }
    }
    return EDGEFT_OK;
}

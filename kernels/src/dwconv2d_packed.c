#include "edgeft_vector.h"

#ifdef EDGEFT_OWN_DEPTH
#include EDGEFT_OWN_DEPTH
#else

/* Bytes of weights that are repeated for two rows at a time. */
#define EDGEFT_TWICE 4096

/* 64 channels of one output row, or `halves`: up to 32 of two output rows, one in each half of a register. */
typedef struct {
    const uint8_t *rows[2][EDGEFT_MOST_ROWS]; /* pixel 0 of each row of taps */
    int32_t inside[2][EDGEFT_MOST_ROWS];      /* all ones, or 0 for a row beyond the map: each of its pixels is `zeros` */
    const uint8_t *zeros;                     /* 64 codes of value 0 */
    const int8_t *weight;
    const int32_t *bias;
    edgeft_rounds rounds[4];
    edgeft_limits limits;
    int32_t n, flip, sets;
    uint8_t *y[2];
} edgeft_depth;

/* The taps of one column of the map, which may lie beyond it, as four quads for set number `set`; the last of `taps` fills up. */
static EDGEFT_INLINE void edgeft_column(const edgeft_conv2d_params *p, const edgeft_depth *d, int halves, int taps, int32_t column, int32_t set,
                                        edgeft_quads *quads)
{
    (void)halves;
    edgeft_codes codes[4];
    if (column < 0 || column >= p->in_columns) {
        codes[0] = edgeft_load_codes(d->zeros, 64, d->flip);
        edgeft_interleave(codes[0], codes[0], codes[0], codes[0], quads);
        return;
    }
    const int32_t at = column * p->in_channels;
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        const int row = 4 * set + i;
        const uint8_t *codes_at = d->rows[0][row] + (at & d->inside[0][row]);
        if (i >= taps) {
            codes[i] = codes[taps - 1];
#ifdef EDGEFT_HALVES
        } else if (halves) {
            codes[i] = edgeft_load_halves(codes_at, d->rows[1][row] + (at & d->inside[1][row]), d->n, d->flip);
#endif
        } else {
            codes[i] = edgeft_load_codes(codes_at, d->n, d->flip);
        }
    }
    edgeft_interleave(codes[0], codes[1], codes[2], codes[3], quads);
}

static EDGEFT_INLINE void edgeft_multiply(edgeft_v16 *acc, const edgeft_quads *quads, const edgeft_weights *weights)
{
    EDGEFT_UNROLLED
    for (int j = 0; j < 4; j++) {
        acc[j] = edgeft_dot4_each(acc[j], quads[j], weights[j]);
    }
}

static EDGEFT_INLINE void edgeft_start(const edgeft_depth *d, edgeft_v16 *acc)
{
    EDGEFT_UNROLLED
    for (int j = 0; j < 4; j++) {
        acc[j] = edgeft_load(d->bias + 16 * j);
    }
}

static EDGEFT_INLINE void edgeft_finish(const edgeft_depth *d, int halves, edgeft_v16 *acc, int32_t at)
{
    (void)halves;
    EDGEFT_UNROLLED
    for (int j = 0; j < 4; j++) {
        acc[j] = edgeft_round16(acc[j], &d->rounds[j]);
    }
#ifdef EDGEFT_HALVES
    if (halves) {
        edgeft_store_halves(d->y[0] + at, d->y[1] + at, d->n, acc, &d->limits);
        return;
    }
#endif
    edgeft_store_depth(d->y[0] + at, d->n, acc, &d->limits);
}

/* Three columns of up to 4 taps side by side, a `stride` of 1 or 2 (constant): columns that two windows share are interleaved once. */
static EDGEFT_INLINE void edgeft_row_of_3(const edgeft_conv2d_params *p, const edgeft_depth *d, int halves, int taps, int stride)
{
    edgeft_weights weights[12];
    EDGEFT_UNROLLED
    for (int j = 0; j < 12; j++) {
        weights[j] = edgeft_load_weights(d->weight + 64 * j);
    }
    edgeft_quads a[4], b[4], c[4];
    edgeft_column(p, d, halves, taps, -p->pad_left, 0, a);
    if (stride == 1) {
        edgeft_column(p, d, halves, taps, 1 - p->pad_left, 0, b);
    }
    for (int32_t column = 0; column < p->out_columns; column++) {
        const int32_t first = column * stride - p->pad_left;
        if (stride == 2) {
            edgeft_column(p, d, halves, taps, first + 1, 0, b);
        }
        edgeft_column(p, d, halves, taps, first + 2, 0, c);
        edgeft_v16 acc[4];
        edgeft_start(d, acc);
        edgeft_multiply(acc, a, weights);
        edgeft_multiply(acc, b, weights + 4);
        edgeft_multiply(acc, c, weights + 8);
        edgeft_finish(d, halves, acc, column * p->out_channels);
        EDGEFT_UNROLLED
        for (int j = 0; j < 4; j++) {
            a[j] = stride == 1 ? b[j] : c[j];
            b[j] = c[j];
        }
    }
}

/* Any window. */
static EDGEFT_INLINE void edgeft_row_of_any(const edgeft_conv2d_params *p, const edgeft_depth *d, int halves)
{
    for (int32_t column = 0; column < p->out_columns; column++) {
        edgeft_v16 acc[4];
        edgeft_start(d, acc);
        const int8_t *weight = d->weight;
        for (int32_t j = 0; j < p->kernel_columns; j++) {
            for (int32_t set = 0; set < d->sets; set++) {
                edgeft_quads quads[4];
                edgeft_weights weights[4];
                EDGEFT_UNROLLED
                for (int i = 0; i < 4; i++) {
                    weights[i] = edgeft_load_weights(weight + 64 * i);
                }
                edgeft_column(p, d, halves, 4, column * p->stride_columns - p->pad_left + j * p->dilation_columns, set, quads);
                edgeft_multiply(acc, quads, weights);
                weight += 256;
            }
        }
        edgeft_finish(d, halves, acc, column * p->out_channels);
    }
}

/* The rows of taps of an output row; those beyond the map and those that fill the last set up are read as zeros. */
static inline void edgeft_find_rows(const edgeft_conv2d_params *p, const uint8_t *x, int32_t row, edgeft_depth *d, int half)
{
    for (int32_t i = 0; i < 4 * d->sets; i++) {
        const int32_t from = row * p->stride_rows - p->pad_top + i * p->dilation_rows;
        const int inside = i < p->kernel_rows && from >= 0 && from < p->in_rows;
        d->rows[half][i] = inside ? x + edgeft_ring_place(from, p->ring_first, p->ring_rows) * p->in_columns * p->in_channels : d->zeros;
        d->inside[half][i] = inside ? -1 : 0;
    }
}

/* The output rows of up to 64 channels, two at a time for `halves` (constant). */
static EDGEFT_INLINE void edgeft_rows(const edgeft_conv2d_params *p, const uint8_t *x, edgeft_depth *d, int halves, uint8_t *y)
{
    const int32_t row_bytes = p->out_columns * p->out_channels, last = p->out_rows - 1;
    const int of_3 = p->kernel_columns == 3 && d->sets == 1 && p->dilation_columns == 1;
    for (int32_t row = 0; row <= last; row += 1 + halves) {
        for (int half = 0; half <= halves; half++) {
            /* Where the number of rows is odd, both halves compute the last one. */
            const int32_t of = edgeft_smaller(row + half, last);
            edgeft_find_rows(p, x, of, d, half);
            d->y[half] = y + of * row_bytes;
        }
        if (of_3 && p->stride_columns == 1 && p->kernel_rows == 3) {
            edgeft_row_of_3(p, d, halves, 3, 1);
        } else if (of_3 && p->stride_columns == 2 && p->kernel_rows == 3) {
            edgeft_row_of_3(p, d, halves, 3, 2);
        } else {
            edgeft_row_of_any(p, d, halves);
        }
    }
}

#ifdef EDGEFT_HALVES
/* Rows of few channels in pairs, with the first 8 of every 16 weights, biases and shifts for both halves. 0 where the window is too large. */
static int edgeft_rows_in_pairs(const edgeft_conv2d_params *p, const uint8_t *x, const edgeft_depth *d, const int8_t *shift, uint8_t *y)
{
    const int32_t n_bytes = p->kernel_columns * d->sets * 256;
    int8_t weight[EDGEFT_TWICE], shifts[64];
    int32_t bias[64];
    if (d->n > 32 || n_bytes > EDGEFT_TWICE) {
        return 0;
    }
    for (int32_t i = 0; i < n_bytes; i += 64) {
        for (int32_t j = 0; j < 32; j++) {
            weight[i + j] = weight[i + j + 32] = d->weight[i + j];
        }
    }
    for (int32_t i = 0; i < 64; i += 16) {
        for (int32_t j = 0; j < 8; j++) {
            bias[i + j] = bias[i + j + 8] = d->bias[i + j];
            shifts[i + j] = shifts[i + j + 8] = shift[i + j];
        }
    }
    edgeft_depth twice; /* field by field: compilers copy a whole struct by memcpy */
    twice.zeros = d->zeros;
    twice.limits = d->limits;
    twice.n = d->n;
    twice.flip = d->flip;
    twice.sets = d->sets;
    twice.weight = weight;
    twice.bias = bias;
    for (int j = 0; j < 4; j++) {
        twice.rounds[j] = edgeft_make_rounds(shifts + 16 * j);
    }
    edgeft_rows(p, x, &twice, 1, y);
    return 1;
}
#endif

#endif

/* a[c] = bias[c] + sum over taps of weight * byte        y = requantize(a[c], shift[c])   (eq. 5, 7)
 *
 * Range:       bytes 0 ... 255, of signed codes code + 128; weights -127 ... 127; accumulators with all that is in the bias below 2^31;
 *              shifts 0 ... 31.
 * Rounding:    one rounding shift, half to even (eq. 3); half a step is in the bias.
 * Saturation:  to low ... high, which is the ReLU (eq. 4).
 */
int edgeft_dwconv2d_packed(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                           uint8_t *y)
{
    const int32_t channels = p->in_channels;
    if (!edgeft_conv2d_fits(p) || p->groups != channels || p->out_channels != channels || p->kernel_rows > EDGEFT_MOST_ROWS) {
        return EDGEFT_BAD_SHAPE;
    }
#ifdef EDGEFT_OWN_DEPTH
    edgeft_own_depth(p, x, weight, bias, shift, y);
#else
    uint8_t zeros[64];
    for (int i = 0; i < 64; i++) {
        zeros[i] = p->in == EDGEFT_OFFSET ? 128 : 0;
    }
    edgeft_depth d;
    d.zeros = zeros;
    d.flip = p->in == EDGEFT_S8 ? 128 : 0;
    d.sets = (p->kernel_rows + 3) / 4;
    d.limits = edgeft_make_limits(p->rounding.low, p->rounding.high);
    for (int32_t first = 0; first < channels; first += 64) {
        d.n = channels - first;
        d.weight = weight + first / 64 * p->kernel_columns * d.sets * 256;
        d.bias = bias + first;
        for (int j = 0; j < 4; j++) {
            d.rounds[j] = edgeft_make_rounds(shift + first + 16 * j);
        }
#ifdef EDGEFT_HALVES
        if (edgeft_rows_in_pairs(p, x + first, &d, shift + first, y + first)) {
            continue;
        }
#endif
        edgeft_rows(p, x + first, &d, 0, y + first);
    }
#endif
    return EDGEFT_OK;
}

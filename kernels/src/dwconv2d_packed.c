#include "edgeft_vector.h"

/* 64 channels of one output row. */
typedef struct {
    const uint8_t *rows[EDGEFT_MOST_ROWS]; /* pixel 0 of each row of taps */
    int32_t steps[EDGEFT_MOST_ROWS];       /* bytes to the next pixel: 0 in a row beyond the map */
    const uint8_t *zeros;                  /* 64 codes of value 0 */
    const int8_t *weight;
    const int32_t *bias;
    edgeft_rounds rounds[4];
    edgeft_limits limits;
    int32_t n, flip, sets;
} edgeft_depth;

/* The taps of one column of the map, which may lie beyond it, as four quads for set number `set`. */
static EDGEFT_INLINE void edgeft_column(const edgeft_conv2d_params *p, const edgeft_depth *d, int32_t column, int32_t set, edgeft_quads *quads)
{
    const int inside = column >= 0 && column < p->in_columns;
    const uint8_t *const *rows = d->rows + 4 * set;
    const int32_t *steps = d->steps + 4 * set;
    edgeft_codes codes[4];
    EDGEFT_UNROLLED
    for (int i = 0; i < 4; i++) {
        codes[i] = edgeft_load_codes(inside ? rows[i] + column * steps[i] : d->zeros, d->n, d->flip);
    }
    edgeft_interleave(codes[0], codes[1], codes[2], codes[3], quads);
}

static EDGEFT_INLINE void edgeft_multiply(edgeft_v16 *acc, const edgeft_quads *quads, const int8_t *weight)
{
    EDGEFT_UNROLLED
    for (int j = 0; j < 4; j++) {
        acc[j] = edgeft_dot4_each(acc[j], quads[j], edgeft_load_weights(weight + 64 * j));
    }
}

static EDGEFT_INLINE void edgeft_start(const edgeft_depth *d, edgeft_v16 *acc)
{
    EDGEFT_UNROLLED
    for (int j = 0; j < 4; j++) {
        acc[j] = edgeft_load(d->bias + 16 * j);
    }
}

static EDGEFT_INLINE void edgeft_finish(const edgeft_depth *d, edgeft_v16 *acc, uint8_t *y)
{
    EDGEFT_UNROLLED
    for (int j = 0; j < 4; j++) {
        acc[j] = edgeft_round16(acc[j], &d->rounds[j]);
    }
    edgeft_store_depth(y, d->n, acc, &d->limits);
}

/* Three columns of taps side by side, a `stride` of 1 or 2 (constant): columns that two windows share are interleaved once. */
static EDGEFT_INLINE void edgeft_row_of_3(const edgeft_conv2d_params *p, const edgeft_depth *d, int stride, uint8_t *y)
{
    edgeft_quads a[4], b[4], c[4];
    edgeft_column(p, d, -p->pad_left, 0, a);
    if (stride == 1) {
        edgeft_column(p, d, 1 - p->pad_left, 0, b);
    }
    for (int32_t column = 0; column < p->out_columns; column++) {
        const int32_t first = column * stride - p->pad_left;
        if (stride == 2) {
            edgeft_column(p, d, first + 1, 0, b);
        }
        edgeft_column(p, d, first + 2, 0, c);
        edgeft_v16 acc[4];
        edgeft_start(d, acc);
        edgeft_multiply(acc, a, d->weight);
        edgeft_multiply(acc, b, d->weight + 256);
        edgeft_multiply(acc, c, d->weight + 512);
        edgeft_finish(d, acc, y + column * p->out_channels);
        EDGEFT_UNROLLED
        for (int j = 0; j < 4; j++) {
            a[j] = stride == 1 ? b[j] : c[j];
            b[j] = c[j];
        }
    }
}

/* Any window. */
static EDGEFT_INLINE void edgeft_row_of_any(const edgeft_conv2d_params *p, const edgeft_depth *d, uint8_t *y)
{
    for (int32_t column = 0; column < p->out_columns; column++) {
        edgeft_v16 acc[4];
        edgeft_start(d, acc);
        const int8_t *weight = d->weight;
        for (int32_t j = 0; j < p->kernel_columns; j++) {
            for (int32_t set = 0; set < d->sets; set++) {
                edgeft_quads quads[4];
                edgeft_column(p, d, column * p->stride_columns - p->pad_left + j * p->dilation_columns, set, quads);
                edgeft_multiply(acc, quads, weight);
                weight += 256;
            }
        }
        edgeft_finish(d, acc, y + column * p->out_channels);
    }
}

/* The rows of taps of an output row; those beyond the map and those that fill the last set up are read as zeros. */
static inline void edgeft_find_rows(const edgeft_conv2d_params *p, const uint8_t *x, int32_t row, edgeft_depth *d)
{
    for (int32_t i = 0; i < 4 * d->sets; i++) {
        const int32_t from = row * p->stride_rows - p->pad_top + i * p->dilation_rows;
        const int inside = i < p->kernel_rows && from >= 0 && from < p->in_rows;
        d->rows[i] = inside ? x + from * p->in_columns * p->in_channels : d->zeros;
        d->steps[i] = inside ? p->in_channels : 0;
    }
}

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
        const int of_3 = p->kernel_columns == 3 && d.sets == 1 && p->dilation_columns == 1;
        for (int32_t row = 0; row < p->out_rows; row++) {
            edgeft_find_rows(p, x + first, row, &d);
            uint8_t *to = y + row * p->out_columns * channels + first;
            if (of_3 && p->stride_columns == 1) {
                edgeft_row_of_3(p, &d, 1, to);
            } else if (of_3 && p->stride_columns == 2) {
                edgeft_row_of_3(p, &d, 2, to);
            } else {
                edgeft_row_of_any(p, &d, to);
            }
        }
    }
    return EDGEFT_OK;
}

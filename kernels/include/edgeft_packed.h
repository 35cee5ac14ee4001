/* Convolution with packed weights, in tiles of pixels x blocks of 16 output channels (eq. 5, 7). Not part of the contract.
 *
 * A window is a list of runs: codes that are neighbours in memory, one run for each row of taps, or one for each tap where other codes
 * lie between them (dilated windows, groups). All pixels of a tile lie in one output row, so that their runs start at a fixed distance of each other. Where
 * taps lie beyond the left or right edge, or codes are not stored as 0 ... 255, the rows are first copied with their padding ("staged"),
 * for a band of output rows at a time. Rows of taps above or below the map are left out where padding is stored as 0.
 */
#ifndef EDGEFT_PACKED_H
#define EDGEFT_PACKED_H

#include "edgeft_vector.h"
#ifndef EDGEFT_SHORT_PIXELS
#define EDGEFT_SHORT_PIXELS EDGEFT_TILE_PIXELS
#endif
/* Windows of so few quads take tiles of EDGEFT_SHORT_PIXELS: while a tile is stored, which takes as long as its products, those of the next
 * begin, if it is small enough for the processor to see both. */
#define EDGEFT_SHORT_QUADS 40


/* Runs of a window. Longer windows are not packed. */
#define EDGEFT_RUNS 64
/* Blocks side by side where there is one pixel only, as in matrix products. */
#define EDGEFT_VECTOR_BLOCKS 8
#define EDGEFT_TILE_SIZE \
    (EDGEFT_TILE_PIXELS * EDGEFT_TILE_BLOCKS > EDGEFT_VECTOR_BLOCKS ? EDGEFT_TILE_PIXELS * EDGEFT_TILE_BLOCKS : EDGEFT_VECTOR_BLOCKS)

/* What the tiles of one output row and some blocks of output channels have in common. */
typedef struct {
    const uint8_t *x[EDGEFT_RUNS];
    const int8_t *weight[EDGEFT_RUNS];
    int32_t n_runs, quads;
    int32_t block_bytes; /* from the weights of a block to those of the next */
    int32_t x_step;      /* bytes from the codes of a pixel to those of the next */
    int32_t y_step;      /* entries from the outputs of a pixel to those of the next */
    const int32_t *bias;
    const int8_t *shift;
    edgeft_rounds rounds[EDGEFT_VECTOR_BLOCKS];
    edgeft_limits limits;
    int32_t n; /* output channels that are left */
} edgeft_tiles;

/* Where the outputs of a row go: codes, or accumulators. */
typedef struct {
    uint8_t *codes;
    int32_t *words;
} edgeft_outputs;

#ifdef EDGEFT_OWN_TILE
#include EDGEFT_OWN_TILE
#else

/* acc[m * blocks + v] of pixel first + m and block v. `pixels` and `blocks` are constants wherever this is used. */
static EDGEFT_INLINE void edgeft_accumulate(const edgeft_tiles *t, int pixels, int blocks, int32_t first, edgeft_v16 *acc)
{
    EDGEFT_UNROLLED
    for (int m = 0; m < pixels; m++) {
        EDGEFT_UNROLLED
        for (int v = 0; v < blocks; v++) {
            acc[m * blocks + v] = edgeft_load(t->bias + 16 * v);
        }
    }
    const int32_t step = t->x_step, block_bytes = t->block_bytes, quads = t->quads;
    for (int32_t run = 0; run < t->n_runs; run++) {
        const uint8_t *x[(EDGEFT_TILE_PIXELS + 2) / 3];
        EDGEFT_UNROLLED
        for (int i = 0; i < (pixels + 2) / 3; i++) {
            x[i] = t->x[run] + (first + 3 * i) * step;
        }
        const int8_t *weight = t->weight[run];
        EDGEFT_ROLLED
        for (int32_t quad = 0; quad < quads; quad++) {
            edgeft_weights w[EDGEFT_VECTOR_BLOCKS];
            EDGEFT_UNROLLED
            for (int v = 0; v < blocks; v++) {
                w[v] = edgeft_load_weights(weight + v * block_bytes);
            }
            EDGEFT_UNROLLED
            for (int m = 0; m < pixels; m++) {
                const edgeft_quad codes = edgeft_load_quad(x[m / 3] + m % 3 * step);
                EDGEFT_UNROLLED
                for (int v = 0; v < blocks; v++) {
                    acc[m * blocks + v] = edgeft_dot4(acc[m * blocks + v], codes, w[v]);
                }
            }
            EDGEFT_UNROLLED
            for (int i = 0; i < (pixels + 2) / 3; i++) {
                x[i] += 4;
            }
            weight += 64;
        }
    }
}

/* What a tile reads while it stores codes: copies, because a byte that is stored might, for the compiler, be part of edgeft_tiles. */
typedef struct {
    edgeft_rounds rounds[EDGEFT_VECTOR_BLOCKS];
    edgeft_limits limits;
    int32_t step, n;
} edgeft_store;

/* `pixels`, 1 or 2, neighbours and one or two blocks, from sums to codes; `v` is the first block. */
static EDGEFT_INLINE void edgeft_store_tile(const edgeft_store *s, int pixels, int blocks, int v, const edgeft_v16 *acc, int next, uint8_t *y)
{
    edgeft_v16 codes[4];
    EDGEFT_UNROLLED
    for (int i = 0; i < pixels * blocks; i++) {
        codes[i] = edgeft_round16(acc[i / blocks * next + i % blocks], &s->rounds[v + i % blocks]);
    }
#ifdef EDGEFT_PAIRS
    if (pixels == 2) {
        edgeft_store_pair(y, y + s->step, s->n - 16 * v, codes, blocks, &s->limits);
        return;
    }
#endif
    EDGEFT_UNROLLED
    for (int i = 0; i < pixels; i++) {
        edgeft_store_codes(y + i * s->step, s->n - 16 * v, codes + i * blocks, blocks, &s->limits);
    }
}

/* A tile from its products to what is stored. */
static EDGEFT_INLINE void edgeft_tile(const edgeft_tiles *t, int pixels, int blocks, int wide, int32_t first, edgeft_outputs y)
{
    edgeft_v16 acc[EDGEFT_TILE_SIZE];
    edgeft_accumulate(t, pixels, blocks, first, acc);
    EDGEFT_UNROLLED
    for (int m = 0; m < pixels; m++) {
        EDGEFT_UNROLLED
        for (int v = 0; v < blocks; v++) {
            acc[m * blocks + v] = edgeft_settle(acc[m * blocks + v]);
        }
    }
    edgeft_store s;
    s.step = t->y_step;
    s.n = t->n;
    if (wide) {
        EDGEFT_UNROLLED
        for (int m = 0; m < pixels; m++) {
            int32_t *to = y.words + (first + m) * s.step;
            EDGEFT_UNROLLED
            for (int v = 0; v < blocks; v++) {
                if (v == 0 || s.n > 16 * v) {
                    edgeft_store_words(to + 16 * v, s.n - 16 * v, edgeft_shift_left16(acc[m * blocks + v], t->shift + 16 * v));
                }
            }
        }
        return;
    }
    s.limits = t->limits;
    EDGEFT_UNROLLED
    for (int v = 0; v < blocks; v++) {
        s.rounds[v] = t->rounds[v];
    }
    uint8_t *to = y.codes + first * s.step;
    EDGEFT_UNROLLED
    for (int m = 0; m < pixels; m += 2) {
        EDGEFT_UNROLLED
        for (int v = 0; v < blocks; v += 2) {
            if (v == 0 || s.n > 16 * v) {
                edgeft_store_tile(&s, m + 1 < pixels ? 2 : 1, v + 1 < blocks ? 2 : 1, v, acc + m * blocks + v, blocks, to + 16 * v);
            }
        }
        to += 2 * s.step;
    }
}

#endif

/* One case per number of pixels, so that each is a constant for the compiler. */
#define EDGEFT_TILE_CASE(N, BLOCKS)                              \
    case N:                                                      \
        edgeft_tile(t, N, BLOCKS, wide, first, y); \
        break;

static EDGEFT_INLINE void edgeft_tile_row(const edgeft_tiles *t, int blocks, int wide, int32_t columns, edgeft_outputs y)
{
    const int32_t most = blocks > 1 && t->quads * t->n_runs <= EDGEFT_SHORT_QUADS ? EDGEFT_SHORT_PIXELS : EDGEFT_TILE_PIXELS;
    const int32_t n_tiles = (columns + most - 1) / most;
    for (int32_t tile = 0; tile < n_tiles; tile++) {
        const int32_t first = columns * tile / n_tiles, end = columns * (tile + 1) / n_tiles;
        switch (end - first) {
            EDGEFT_TILE_CASE(1, blocks)
            EDGEFT_TILE_CASE(2, blocks)
#if EDGEFT_TILE_PIXELS > 2
            EDGEFT_TILE_CASE(3, blocks)
            EDGEFT_TILE_CASE(4, blocks)
#endif
#if EDGEFT_TILE_PIXELS > 4
            EDGEFT_TILE_CASE(5, blocks)
            EDGEFT_TILE_CASE(6, blocks)
#endif
#if EDGEFT_TILE_PIXELS > 6
            EDGEFT_TILE_CASE(7, blocks)
            EDGEFT_TILE_CASE(8, blocks)
            EDGEFT_TILE_CASE(9, blocks)
            EDGEFT_TILE_CASE(10, blocks)
            EDGEFT_TILE_CASE(11, blocks)
            EDGEFT_TILE_CASE(12, blocks)
            EDGEFT_TILE_CASE(13, blocks)
            EDGEFT_TILE_CASE(14, blocks)
#endif
        default:
            break;
        }
    }
}

/* Rows first ... first + n - 1 of the map, which may lie outside of it, as `columns` pixels from -pad_left on: codes 0 ... 255 */
static inline void edgeft_stage(const edgeft_conv2d_params *p, const uint8_t *x, int32_t first, int32_t n, int32_t columns, uint8_t *y)
{
    const int32_t channels = p->in_channels, flip = p->in == EDGEFT_S8 ? 128 : 0, zero = p->in == EDGEFT_U8 ? 0 : 128;
    const int32_t end = edgeft_smaller(columns, p->pad_left + p->in_columns);
    for (int32_t row = first; row < first + n; row++) {
        const int inside = row >= 0 && row < p->in_rows;
        const int32_t left = inside ? p->pad_left * channels : columns * channels;
        const int32_t copied = inside ? (end - p->pad_left) * channels : 0, right = columns * channels - left - copied;
        for (int32_t i = 0; i < left; i++) {
            y[i] = (uint8_t)zero;
        }
        const uint8_t *from = x + (inside ? edgeft_ring_place(row, p->ring_first, p->ring_rows) * p->in_columns * channels : 0);
        for (int32_t i = 0; i < copied; i++) {
            y[left + i] = (uint8_t)(from[i] ^ flip);
        }
        for (int32_t i = 0; i < right; i++) {
            y[left + copied + i] = (uint8_t)zero;
        }
        y += columns * channels;
    }
}

/* Taps of a row are neighbours in memory, unless something lies between them. */
static inline int32_t edgeft_runs_per_row(const edgeft_conv2d_params *p)
{
    return p->dilation_columns == 1 && p->groups == 1 ? 1 : p->kernel_columns;
}

/* The runs of one output row. `x` is the first pixel of row `x_row`, a row has `columns` pixels; `weight` those of the first block. */
static inline void edgeft_find_runs(const edgeft_conv2d_packed_params *q, const uint8_t *x, int32_t x_row, int32_t columns, int32_t row,
                                    const int8_t *weight, edgeft_tiles *t)
{
    const edgeft_conv2d_params *p = &q->conv;
    const int32_t per_row = edgeft_runs_per_row(p);
    t->n_runs = 0;
    for (int32_t i = 0; i < p->kernel_rows; i++) {
        const int32_t from = row * p->stride_rows - p->pad_top + i * p->dilation_rows;
        if (p->in == EDGEFT_U8 && (from < 0 || from >= p->in_rows)) {
            continue;
        }
        const int32_t at = q->staged_columns > 0 ? from - x_row : edgeft_ring_place(from, p->ring_first, p->ring_rows);
        for (int32_t j = 0; j < per_row; j++) {
            t->x[t->n_runs] = x + (at * columns + j * p->dilation_columns) * p->in_channels;
            t->weight[t->n_runs++] = weight + (i * per_row + j) * t->quads * 64;
        }
    }
}

/* Some blocks of output channels for a band of output rows. */
static EDGEFT_INLINE void edgeft_band(const edgeft_conv2d_packed_params *q, edgeft_tiles *t, int blocks, int wide, const uint8_t *x,
                                      int32_t x_row, int32_t columns, int32_t row, int32_t end, const int8_t *weight, edgeft_outputs y)
{
    for (int v = 0; v < blocks; v++) {
        if (!wide) {
            t->rounds[v] = edgeft_make_rounds(t->shift + 16 * v);
        }
    }
    for (; row < end; row++) {
        edgeft_find_runs(q, x, x_row, columns, row, weight, t);
        const int32_t at = row * q->conv.out_columns * q->conv.out_channels;
        const edgeft_outputs to = {wide ? 0 : y.codes + at, wide ? y.words + at : 0};
        if (blocks > EDGEFT_TILE_BLOCKS) {
            edgeft_tile(t, 1, blocks, wide, 0, to);
        } else {
            edgeft_tile_row(t, blocks, wide, q->conv.out_columns, to);
        }
    }
}

/* All of a convolution; `wide` is a constant. */
static EDGEFT_INLINE int edgeft_packed(const edgeft_conv2d_packed_params *q, const uint8_t *x, const int8_t *weight, const int32_t *bias,
                                       const int8_t *shift, uint8_t *scratch, edgeft_outputs y, int wide)
{
    const edgeft_conv2d_params *p = &q->conv;
    const int32_t in_group = p->in_channels / p->groups, out_group = p->out_channels / p->groups, n_blocks = (out_group + 15) / 16;
    const int32_t per_row = edgeft_runs_per_row(p);
    if (!edgeft_conv2d_fits(p) || p->kernel_rows * per_row > EDGEFT_RUNS || q->band_rows < 1) {
        return EDGEFT_BAD_SHAPE;
    }
    edgeft_tiles t;
    t.quads = ((per_row == 1 ? p->kernel_columns : 1) * in_group + 3) / 4;
    t.block_bytes = p->kernel_rows * per_row * t.quads * 64;
    t.x_step = p->stride_columns * p->in_channels;
    t.y_step = p->out_channels;
    t.limits = edgeft_make_limits(wide ? 0 : p->rounding.low, wide ? 0 : p->rounding.high);
    for (int32_t row = 0; row < p->out_rows; row += q->band_rows) {
        const int32_t end = edgeft_smaller(row + q->band_rows, p->out_rows), first = row * p->stride_rows - p->pad_top;
        const int32_t n_rows = (end - 1 - row) * p->stride_rows + (p->kernel_rows - 1) * p->dilation_rows + 1;
        if (q->staged_columns > 0) {
            edgeft_stage(p, x, first, n_rows, q->staged_columns, scratch);
        }
        const uint8_t *from = q->staged_columns > 0 ? scratch : x;
        const int32_t from_row = q->staged_columns > 0 ? first : 0, columns = q->staged_columns > 0 ? q->staged_columns : p->in_columns;
        for (int32_t group = 0; group < p->groups; group++) {
            for (int32_t block = 0; block < n_blocks;) {
                const int32_t packed = group * n_blocks + block, channel = group * out_group + 16 * block, left = n_blocks - block;
                const int8_t *w = weight + packed * t.block_bytes;
                const edgeft_outputs to = {wide ? 0 : y.codes + channel, wide ? y.words + channel : 0};
                t.bias = bias + 16 * packed;
                t.shift = shift + 16 * packed;
                t.n = out_group - 16 * block;
                const uint8_t *codes = from + group * in_group;
                if (p->out_columns == 1 && left >= EDGEFT_VECTOR_BLOCKS) {
                    edgeft_band(q, &t, EDGEFT_VECTOR_BLOCKS, wide, codes, from_row, columns, row, end, w, to);
                    block += EDGEFT_VECTOR_BLOCKS;
                } else if (left >= EDGEFT_TILE_BLOCKS) {
                    edgeft_band(q, &t, EDGEFT_TILE_BLOCKS, wide, codes, from_row, columns, row, end, w, to);
                    block += EDGEFT_TILE_BLOCKS;
                } else {
                    edgeft_band(q, &t, 1, wide, codes, from_row, columns, row, end, w, to);
                    block += 1;
                }
            }
        }
    }
    return EDGEFT_OK;
}

#endif

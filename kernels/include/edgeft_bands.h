/* Layers in bands of output rows: what a band of a layer is given, and several layers that pass rows to each other.
 *
 * Kernels take all sizes as parameters, so a band is a call with other sizes and pointers. Windows keep the numbers of the rows of the
 * whole map: output row `first` becomes row 0 by less padding at the top. Rows of a pixel-wise layer are as many pixels. Nothing is
 * computed twice and no integer changes.
 *
 * In a fused block each layer ("stage") reads maps outside of the block or rows of earlier stages, and writes its next rows: into its whole
 * map if something outside of the block reads it, else into a ring, where they take the place of rows that nothing reads any more. The
 * order of the calls is a table (export/c_bands.py), which makes the memory that they need a constant.
 */
#ifndef EDGEFT_BANDS_H
#define EDGEFT_BANDS_H

#include "edgeft_kernels.h"

/* A map in memory, or the rows of it that there are: row r is at place (r + start) % room of a ring, or at place r if `room` is 0. */
typedef struct {
    const uint8_t *codes;
    int32_t room, start;
} edgeft_rows;

/* Stages in a block. */
#define EDGEFT_MOST_STAGES 64

/* What a stage reads: the rows of a stage of its block, or a whole map elsewhere, at `offset` in the arena or the caller's image. */
typedef enum { EDGEFT_OF_STAGE, EDGEFT_OF_ARENA, EDGEFT_OF_IMAGE } edgeft_source;

typedef struct {
    edgeft_source source;
    uint32_t at; /* the number of the stage, or the offset */
} edgeft_operand;

/* A layer of a block, and the map that it writes: at `offset` in the arena, whole or in a ring as edgeft_rows has it. */
typedef struct edgeft_stage {
    /* Rows first ... first + n - 1 to `y`. */
    int (*run)(const struct edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch, uint8_t *y);
    const void *params; /* of the whole map, for the kernel that `run` calls */
    const int8_t *weight;
    const int32_t *bias;
    const int8_t *shift;
    const uint8_t *table;
    int32_t n_operands;
    edgeft_operand operands[2];
    int32_t rows, row_bytes;
    int32_t room, start;
    uint32_t offset;
} edgeft_stage;

/* A call: the next `n` rows of a stage. They, and the rows that layers without windows read for them, do not go beyond the end of a ring. */
typedef struct {
    uint16_t stage, n;
} edgeft_call;

typedef struct {
    const edgeft_stage *stages;
    const edgeft_call *calls;
    int32_t n_stages, n_calls;
    uint32_t scratch; /* offset in the arena of what kernels write besides */
} edgeft_fused_params;

/* All calls of a block. */
int edgeft_fused(const edgeft_fused_params *p, const uint8_t *image, uint8_t *arena);

/* Byte by byte: compilers make calls of memcpy of assignments of large structures. */
static inline void edgeft_copy(void *to, const void *from, int32_t n)
{
    uint8_t *y = to;
    const uint8_t *x = from;
    for (int32_t i = 0; i < n; i++) {
        y[i] = x[i];
    }
}

static inline int32_t edgeft_place(const edgeft_rows *x, int32_t row)
{
    return x->room > 0 ? (row + x->start) % x->room : row;
}

/* The number of a row that would be at place 0 of the ring, for windows that read from row `start` on, which may be above the map. */
static inline int32_t edgeft_ring_first(const edgeft_rows *x, int32_t start, int32_t in_rows)
{
    const int32_t low = start < 0 ? 0 : start > in_rows ? in_rows : start;
    return low - edgeft_place(x, low);
}

/* Whether each output pixel is made of the input pixel at its place: how the map is cut into rows then does not matter. */
static inline int edgeft_is_pixelwise(const edgeft_conv2d_params *p)
{
    return p->kernel_rows == 1 && p->kernel_columns == 1 && p->stride_rows == 1 && p->stride_columns == 1 && p->pad_top == 0 &&
           p->pad_left == 0 && p->in_rows == p->out_rows && p->in_columns == p->out_columns;
}

/* Sizes of a convolution over `rows` output rows become those of n of them; where their input starts. */
static inline const uint8_t *edgeft_part_of_conv2d(edgeft_conv2d_params *p, int32_t rows, const edgeft_rows *x, int32_t first, int32_t n)
{
    if (edgeft_is_pixelwise(p)) { /* the exporter may have cut it into other rows, or taken several pixels for one of more channels */
        const int32_t pixels = p->in_rows * p->in_columns;
        p->in_rows = p->out_rows = 1;
        p->in_columns = p->out_columns = n * pixels / rows;
        return x->codes + edgeft_place(x, first) * pixels / rows * p->in_channels;
    }
    p->pad_top -= first * p->stride_rows;
    p->out_rows = n;
    p->ring_first = edgeft_ring_first(x, -p->pad_top, p->in_rows);
    p->ring_rows = x->room;
    return x->codes;
}

static inline int edgeft_rows_of_conv2d_packed(const edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch,
                                               uint8_t *y)
{
    edgeft_conv2d_packed_params p;
    edgeft_copy(&p, s->params, (int32_t)sizeof p);
    if (edgeft_is_pixelwise(&p.conv)) { /* one row; scratch holds all of it */
        const int is_staged = p.staged_columns > 0;
        const uint8_t *codes = edgeft_part_of_conv2d(&p.conv, s->rows, x, first, n);
        p.staged_columns = is_staged ? p.conv.in_columns : 0;
        p.band_rows = 1;
        return edgeft_conv2d_packed(&p, codes, s->weight, s->bias, s->shift, scratch, y);
    }
    const uint8_t *codes = edgeft_part_of_conv2d(&p.conv, s->rows, x, first, n);
    return edgeft_conv2d_packed(&p, codes, s->weight, s->bias, s->shift, scratch, y);
}

static inline int edgeft_rows_of_dwconv2d_packed(const edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch,
                                                 uint8_t *y)
{
    edgeft_conv2d_params p;
    (void)scratch;
    edgeft_copy(&p, s->params, (int32_t)sizeof p);
    const uint8_t *codes = edgeft_part_of_conv2d(&p, s->rows, x, first, n);
    return edgeft_dwconv2d_packed(&p, codes, s->weight, s->bias, s->shift, y);
}

static inline int edgeft_rows_of_max_pool(const edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch, uint8_t *y)
{
    edgeft_max_pool_params p;
    (void)scratch;
    edgeft_copy(&p, s->params, (int32_t)sizeof p);
    p.pad_top -= first * p.stride_rows;
    p.out_rows = n;
    p.ring_first = edgeft_ring_first(x, -p.pad_top, p.in_rows);
    p.ring_rows = x->room;
    return edgeft_max_pool(&p, x->codes, y);
}

/* A row of a map of the same size as the stage's. */
static inline const uint8_t *edgeft_row(const edgeft_stage *s, const edgeft_rows *x, int32_t row)
{
    return x->codes + edgeft_place(x, row) * s->row_bytes;
}

static inline int edgeft_rows_of_add(const edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch, uint8_t *y)
{
    edgeft_add_params p;
    (void)scratch;
    edgeft_copy(&p, s->params, (int32_t)sizeof p);
    p.n = n * s->row_bytes;
    return edgeft_add(&p, edgeft_row(s, &x[0], first), edgeft_row(s, &x[1], first), y);
}

static inline int edgeft_rows_of_add_narrow(const edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch,
                                            uint8_t *y)
{
    edgeft_add_narrow_params p;
    (void)scratch;
    edgeft_copy(&p, s->params, (int32_t)sizeof p);
    p.n = n * s->row_bytes;
    return edgeft_add_narrow(&p, edgeft_row(s, &x[0], first), edgeft_row(s, &x[1], first), y);
}

static inline int edgeft_rows_of_lookup(const edgeft_stage *s, const edgeft_rows *x, int32_t first, int32_t n, uint8_t *scratch, uint8_t *y)
{
    const edgeft_bytes_params p = {n * s->row_bytes};
    (void)scratch;
    return edgeft_lookup(&p, edgeft_row(s, x, first), s->table, y);
}

#endif

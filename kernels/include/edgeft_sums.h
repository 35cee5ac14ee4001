/* What the portable kernels share: codes of bytes, sums of products, windows that leave out taps beyond the edge. Not part of the contract.
 */
#ifndef EDGEFT_SUMS_H
#define EDGEFT_SUMS_H

#include "edgeft_kernels.h"

/* Channels that are accumulated side by side: few enough for registers, enough for every vector unit. */
#define EDGEFT_LANES 32

/* The code in a byte, -128 ... 255.
 *
 * Two's complement without a conversion that C99 leaves to the compiler: code + 128 has the top bit flipped.
 */
static inline int32_t edgeft_code(uint8_t byte, edgeft_storage storage)
{
    const int32_t flip = storage == EDGEFT_S8 ? 128 : 0;
    const int32_t offset = storage == EDGEFT_U8 ? 0 : 128;
    return ((int32_t)byte ^ flip) - offset;
}

/* sum of weight[i] * code(x[i]) over i < n
 *
 * One loop for each storage, so that compilers find their instruction for a sum of products. For code + 128 it is written as two products:
 * gcc 12 makes (x[i] - 128) * weight[i] into an instruction that takes x[i] - 128 for unsigned (-mavx512vnni, 16 and more terms).
 */
static inline int32_t edgeft_dot(const uint8_t *x, const int8_t *weight, int32_t n, edgeft_storage storage)
{
    int32_t sum = 0;
    if (storage == EDGEFT_U8) {
        for (int32_t i = 0; i < n; i++) {
            sum += (int32_t)x[i] * weight[i];
        }
    } else if (storage == EDGEFT_S8) {
        const int8_t *codes = (const int8_t *)x;
        for (int32_t i = 0; i < n; i++) {
            sum += (int32_t)codes[i] * weight[i];
        }
    } else {
        for (int32_t i = 0; i < n; i++) {
            sum += (int32_t)x[i] * weight[i] - 128 * weight[i];
        }
    }
    return sum;
}

/* The low 8 bits of a code: how a rounded code is stored, signed or not. */
static inline uint8_t edgeft_byte(int32_t code)
{
    return (uint8_t)((uint32_t)code & 0xFFu);
}

/* The code of output channel `channel` (eq. 7). */
static inline int32_t edgeft_round(int32_t acc, const edgeft_rounding *rounding, const int8_t *shift, int32_t channel)
{
    return edgeft_requantize(acc, shift[channel * rounding->shift_step], rounding->low, rounding->high);
}

/* value * 2^shift for 0 ... 30; what is shifted is proven to stay below 2^31. */
static inline int32_t edgeft_shift_left(int32_t value, int32_t shift)
{
    return value * (int32_t)(UINT32_C(1) << shift);
}

/* The taps first ... end - 1 of a window that meet the map along one axis; `start` is where tap 0 is, and may be outside of it. */
typedef struct {
    int32_t start, first, end;
} edgeft_taps;

/* Taps i with 0 <= start + i * dilation < size. None where the window misses the map. */
static inline edgeft_taps edgeft_clip(int32_t start, int32_t dilation, int32_t kernel, int32_t size)
{
    const int32_t first = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
    const int32_t end = size > start ? (size - start + dilation - 1) / dilation : 0;
    const edgeft_taps taps = {start, first, end < kernel ? end : kernel};
    return taps;
}

/* sum over the taps of a window and the channels of a group of weight * code (eq. 5, without the bias)
 *
 * `x` points to the group's first channel in pixel (0, 0), `weight` to the output channel's [kernel_rows][kernel_columns][in / groups].
 * Taps that are neighbours in memory are summed in one go.
 */
static inline int32_t edgeft_window(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, edgeft_taps rows,
                                    edgeft_taps columns)
{
    const int32_t depth = p->in_channels / p->groups;
    const int32_t at_once = p->groups == 1 && p->dilation_columns == 1 ? columns.end - columns.first : 1;
    int32_t sum = 0;
    for (int32_t i = rows.first; i < rows.end; i++) {
        const int32_t row = (rows.start + i * p->dilation_rows) * p->in_columns;
        for (int32_t j = columns.first; j < columns.end; j += at_once) {
            const int32_t pixel = row + columns.start + j * p->dilation_columns;
            const int32_t tap = i * p->kernel_columns + j;
            sum += edgeft_dot(x + pixel * p->in_channels, weight + tap * depth, at_once * depth, p->in);
        }
    }
    return sum;
}

/* The place in memory of a row of a map, which may be a ring of ring_rows rows from row ring_first on. */
static inline int32_t edgeft_ring_place(int32_t row, int32_t ring_first, int32_t ring_rows)
{
    const int32_t place = row - ring_first;
    return place >= ring_rows ? place - ring_rows : place;
}

/* Whether the sizes of a convolution fit each other. */
static inline int edgeft_conv2d_fits(const edgeft_conv2d_params *p)
{
    return p->in_channels > 0 && p->out_channels > 0 && p->groups > 0 && p->in_channels % p->groups == 0 &&
           p->out_channels % p->groups == 0 && p->stride_rows > 0 && p->stride_columns > 0 && p->dilation_rows > 0 &&
           p->dilation_columns > 0 && p->kernel_rows > 0 && p->kernel_columns > 0 && p->out_rows > 0 && p->out_columns > 0;
}

static inline int32_t edgeft_smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static inline int32_t edgeft_larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

#endif

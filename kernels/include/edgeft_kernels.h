/* The contract of the kernels: how tensors are stored, what every kernel computes, and what it is given.
 *
 * Equation numbers refer to edgeft/fixedpoint.md. C99, freestanding: integers only, no libc, no allocation, no globals that change.
 *
 * A map of an image is stored row by row, pixel by pixel, all channels of a pixel side by side (NHWC):
 *
 *     byte of (row, column, channel) = (row * columns + column) * channels + channel
 *
 * A vector is stored entry by entry. Tensors are never padded in memory: a window leaves out the taps beyond the edge, whose code is 0.
 *
 * Every kernel takes its sizes first, then the tensors it reads, then constants, then the tensor it writes. It returns EDGEFT_OK, or
 * EDGEFT_BAD_SHAPE when the sizes do not fit each other, and then it has written nothing. Kernels that say "in place" may write over a
 * tensor they read; of all others, the tensors must not overlap.
 * Accumulators are proven to stay below 2^31 when the network is lowered (eq. 13), at any point of the sum and in any order.
 */
#ifndef EDGEFT_KERNELS_H
#define EDGEFT_KERNELS_H

#include <stdint.h>

#include "edgeft_fixedpoint.h"
#include "edgeft_status.h"

/* How the code of an 8-bit tensor is stored in a byte. */
typedef enum {
    EDGEFT_U8,    /* byte = code, 0 ... 255 */
    EDGEFT_S8,    /* byte = code in two's complement, -128 ... 127 */
    EDGEFT_OFFSET /* byte = code + 128: a signed image (eq. 12), and what instructions that multiply u8 by s8 want to read */
} edgeft_storage;

/* From accumulators to the codes of a layer (eq. 7).
 *
 * The right shifts, -30 ... 31, are an array of one entry (shift_step 0) or of one per output channel (shift_step 1); codes saturate
 * to low ... high. Codes that are rounded are stored as EDGEFT_U8 where low >= 0, else as EDGEFT_S8: both are the low 8 bits.
 */
typedef struct {
    int32_t shift_step;
    int32_t low, high;
} edgeft_rounding;

/* A convolution (eq. 5). Padding at the bottom and on the right follows from the sizes.
 *
 * Kernels with packed weights may read a map of which only some rows are in memory, in a ring of ring_rows rows: the first place holds row
 * ring_first, or ring_first + ring_rows where the row is as far. Both are 0 where the map is whole (edgeft_bands.h).
 */
typedef struct {
    int32_t in_rows, in_columns, in_channels;
    int32_t out_rows, out_columns, out_channels;
    int32_t kernel_rows, kernel_columns;
    int32_t stride_rows, stride_columns;
    int32_t pad_top, pad_left;
    int32_t dilation_rows, dilation_columns;
    int32_t groups;
    edgeft_storage in;
    edgeft_rounding rounding;
    int32_t ring_first, ring_rows;
} edgeft_conv2d_params;

/* Convolution. weight [out][kernel_rows][kernel_columns][in / groups], -127 ... 127; bias and shift by output channel. */
int edgeft_conv2d(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                  uint8_t *y);

/* Convolution that hands out its accumulators, each shifted left to the step of the tensor (eq. 21). */
int edgeft_conv2d_wide(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                       int32_t *y);

/* A convolution with packed weights: what fast kernels read.
 *
 * Output channels come in blocks of 16, the last one of a group filled up with zeros: weight [groups][blocks][runs][quads][16][4], where
 * a run is a row of taps, or one tap if dilation_columns or groups > 1, and its taps and channels, filled up with zeros, are taken four at a time.
 * bias and shift [groups][blocks][16]. What is constant is part of the bias: -128 * (sum of weights) where the input is not stored
 * as EDGEFT_U8, as it is multiplied as code + 128; and of codes half a step, 2^(shift - 1) where shift > 0, and 128 * 2^shift where low < 0.
 *
 * staged_columns > 0: rows are copied into `scratch` with their padding, as so many pixels each, for band_rows output rows at a time:
 * ((band_rows - 1) * stride_rows + (kernel_rows - 1) * dilation_rows + 1) * staged_columns * in_channels + EDGEFT_SLACK bytes. It is needed
 * where taps lie beyond the left or right edge, where the input is padded and not stored as EDGEFT_U8, where it is stored as EDGEFT_S8, and
 * where the bytes of a run are not a multiple of 4. Otherwise it is 0, and band_rows is out_rows.
 */
typedef struct {
    edgeft_conv2d_params conv;
    int32_t staged_columns, band_rows;
} edgeft_conv2d_packed_params;

/* Bytes behind the last row of `scratch` that may be read: they are multiplied by zeros. */
#define EDGEFT_SLACK 64

/* Convolution with packed weights; shifts 0 ... 31. */
int edgeft_conv2d_packed(const edgeft_conv2d_packed_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias,
                         const int8_t *shift, uint8_t *scratch, uint8_t *y);

/* Convolution with packed weights that hands out its accumulators; shifts -30 ... 0, no half steps. */
int edgeft_conv2d_packed_wide(const edgeft_conv2d_packed_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias,
                              const int8_t *shift, uint8_t *scratch, int32_t *y);

/* Convolution with as many groups as input and output channels. weight [kernel_rows][kernel_columns][channels]. */
int edgeft_dwconv2d(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                    uint8_t *y);

/* Depthwise convolution with packed weights [blocks][kernel_columns][sets][4][16][4], blocks of 64 channels: a set is 4 rows of taps, in the
 * order of edgeft_vector.h. bias and shift [blocks][4][16] in the same order; constant parts of the bias, and shifts, as in
 * edgeft_conv2d_packed. At most EDGEFT_MOST_ROWS rows of taps.
 */
int edgeft_dwconv2d_packed(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                           uint8_t *y);

#define EDGEFT_MOST_ROWS 16

/* A matrix product. */
typedef struct {
    int32_t in_channels, out_channels;
    edgeft_storage in;
    edgeft_rounding rounding;
} edgeft_linear_params;

/* Matrix product (eq. 5). weight [out][in], -127 ... 127; bias and shift by output. */
int edgeft_linear(const edgeft_linear_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                  uint8_t *y);

/* Matrix product that hands out its accumulators: the logits (eq. 15). */
int edgeft_linear_wide(const edgeft_linear_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias, const int8_t *shift,
                       int32_t *y);

/* An addition of n codes: left shifts, 0 ... 30, to the finer step, then one right shift, -30 ... 31. */
typedef struct {
    int32_t n;
    edgeft_storage left, right;
    int32_t left_shift, right_shift;
    int32_t shift, low, high;
} edgeft_add_params;

/* Residual addition of codes, mode `branch` (eq. 8). In place on either operand. */
int edgeft_add(const edgeft_add_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y);

/* Residual addition of accumulators and codes, mode `wide` (eq. 21); `left` of the parameters is not used. In place on either operand. */
int edgeft_add_wide(const edgeft_add_params *p, const int32_t *left, const uint8_t *right, uint8_t *y);

/* An addition in 16 bits: n codes, and the numbers in add_narrow.c, where what each is for is written. */
typedef struct {
    int32_t n;
    uint8_t left_flip, right_flip;
    uint16_t left_times, right_times, start, below, low, high, base;
    int32_t shift;
} edgeft_add_narrow_params;

/* Residual addition of codes whose sum fits into 16 bits (eq. 8). In place on either operand. */
int edgeft_add_narrow(const edgeft_add_narrow_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y);

/* A product of maps of `pixels` pixels; a gate has one pixel for all of them. */
typedef struct {
    int32_t pixels, channels;
    edgeft_storage left, right;
    int32_t shift, low, high;
} edgeft_mul_params;

/* Product of two tensors, code by code (eq. 17). In place on either operand. */
int edgeft_mul(const edgeft_mul_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y);

/* Product with a gate of one code per channel (eq. 17). In place on `left`. */
int edgeft_mul_gate(const edgeft_mul_params *p, const uint8_t *left, const uint8_t *gate, uint8_t *y);

/* n bytes. */
typedef struct {
    int32_t n;
} edgeft_bytes_params;

/* Table (eq. 18). `table` has 256 entries in the order of the bytes of the input, not of its codes. In place. */
int edgeft_lookup(const edgeft_bytes_params *p, const uint8_t *x, const uint8_t *table, uint8_t *y);

/* Bytes of an image to signed codes (eq. 12), for ops that move the image. In place. */
int edgeft_image_codes(const edgeft_bytes_params *p, const uint8_t *x, uint8_t *y);

/* Max-pooling. Padding at the bottom and on the right follows from the sizes; the ring is that of edgeft_conv2d_params. */
typedef struct {
    int32_t in_rows, in_columns, channels;
    int32_t out_rows, out_columns;
    int32_t kernel_rows, kernel_columns;
    int32_t stride_rows, stride_columns;
    int32_t pad_top, pad_left;
    edgeft_storage in;
    int32_t ring_first, ring_rows;
} edgeft_max_pool_params;

/* Largest code of each window; padded positions never win. Every window must meet the map. The output is stored as the input is. */
int edgeft_max_pool(const edgeft_max_pool_params *p, const uint8_t *x, uint8_t *y);

/* A sum over all pixels. */
typedef struct {
    int32_t pixels, channels;
    edgeft_storage in;
    int32_t shift, low, high;
} edgeft_global_pool_params;

/* Sum over all pixels of each channel, one rounding shift (eq. 10). */
int edgeft_global_pool(const edgeft_global_pool_params *p, const uint8_t *x, uint8_t *y);

/* Channels of maps of `pixels` pixels. */
typedef struct {
    int32_t pixels, in_channels, out_channels, first;
} edgeft_channels_params;

/* One input of a concatenation (eq. 19): its channels become channels `first`, first + 1, ... of the output. */
int edgeft_concat(const edgeft_channels_params *p, const uint8_t *x, uint8_t *y);

/* Channels by number (eq. 19): output channel c is input channel index[c]; `first` is not used. */
int edgeft_select(const edgeft_channels_params *p, const uint8_t *x, const uint16_t *index, uint8_t *y);

/* An enlargement. */
typedef struct {
    int32_t in_rows, in_columns, channels;
    int32_t factor_rows, factor_columns;
} edgeft_resize_params;

/* Every pixel repeated (eq. 19). */
int edgeft_resize(const edgeft_resize_params *p, const uint8_t *x, uint8_t *y);

/* A map that becomes a vector. */
typedef struct {
    int32_t pixels, channels;
    edgeft_storage in;
} edgeft_flatten_params;

/* A map as a vector in the order (channel, row, column). Where a linear layer reads the vector, its weights are permuted instead. */
int edgeft_flatten(const edgeft_flatten_params *p, const uint8_t *x, uint8_t *y);

/* 8-bit codes that leave the network: as int32, in the order (channel, row, column). */
int edgeft_logits(const edgeft_flatten_params *p, const uint8_t *x, int32_t *y);

#endif

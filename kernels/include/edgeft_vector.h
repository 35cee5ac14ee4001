/* Sixteen accumulators side by side: the instruction set of the kernels with packed weights, chosen by what the compiler compiles for.
 *
 * The header of an instruction set defines these, so that every kernel is written once:
 *
 *     EDGEFT_ISA           its name in reports
 *     EDGEFT_TILE_PIXELS   pixels, at most 14, and
 *     EDGEFT_TILE_BLOCKS   blocks of 16 output channels, 1 or 2, whose accumulators fit into registers together
 *     edgeft_v16           16 x int32: edgeft_load, edgeft_store_words (n of them), edgeft_shift_left16
 *     edgeft_quad          4 codes of neighbouring channels, to be multiplied with the weights of every output channel
 *     edgeft_weights       64 weights, 4 for each of 16 output channels
 *     edgeft_dot4          acc[i] + sum over j < 4 of codes[j] * weight[i][j]; codes 0 ... 255, weights -127 ... 127, exact
 *     edgeft_rounds        the rounding shifts of 16 channels, 0 ... 31
 *     edgeft_round16       eq. 3 for accumulators that already have half a step in them, 2^(shift - 1)
 *     edgeft_limits        the least and the largest code
 *     edgeft_store_codes   the low bytes of `blocks` x 16 codes within their limits; n bytes are written
 *
 * And for depthwise convolutions, 64 channels at a time, in four edgeft_v16: entry 4 * l + i of number j is channel 16 * l + 4 * j + i.
 *
 *     edgeft_codes         one code of each channel: edgeft_load_codes; those beyond n are 0
 *     edgeft_quads         4 codes of each of 16 channels; edgeft_interleave makes four of them from four edgeft_codes
 *     edgeft_dot4_each     acc[i] + sum over j < 4 of quads[i][j] * weight[i][j]
 *     edgeft_store_depth   as edgeft_store_codes, n of 64 channels
 *
 * Two things are added to the bias when the weights are packed. Half a step, 2^(shift - 1): floor(acc / 2^shift) then rounds halves up;
 * what was a half has only zeros below the shift, and its lowest bit is cleared: half to even. And, where codes may be negative, 128 steps,
 * so that saturation to 0 ... 255 is that to -128 ... 127; the top bit is flipped at the end. 128 is even and leaves ties as they are.
 *
 * Where sixteen accumulators do not fit into registers, a header may name others that go from bias to stored codes in smaller steps:
 *
 *     EDGEFT_OWN_TILE      defines edgeft_tile of edgeft_packed.h, from the types before it
 *     EDGEFT_OWN_DEPTH     defines edgeft_own_depth, all rows of 64 channels in dwconv2d_packed.c
 *
 * EDGEFT_PORTABLE takes the header that reads like the equations, on any machine. With EDGEFT_DSP as well it is that of the DSP extension of
 * 32-bit Arm, whose instructions are then written in C where there are none.
 */
#ifndef EDGEFT_VECTOR_H
#define EDGEFT_VECTOR_H

#include "edgeft_sums.h"

#if !defined(EDGEFT_PORTABLE) && defined(__GNUC__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define EDGEFT_HEADER "edgeft_avx512.h"
#elif !defined(EDGEFT_PORTABLE) && defined(__AVX2__) && defined(__GNUC__)
#define EDGEFT_HEADER "edgeft_avx2.h"
#elif !defined(EDGEFT_PORTABLE) && defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
#define EDGEFT_HEADER "edgeft_neon.h"
#endif

/* Loops over registers must vanish; where there are none, small code is worth more. */
#if defined(EDGEFT_HEADER) && defined(__clang__)
#define EDGEFT_INLINE inline __attribute__((always_inline))
#define EDGEFT_UNROLLED _Pragma("clang loop unroll(full)")
#define EDGEFT_ROLLED _Pragma("clang loop unroll(disable)")
#elif defined(EDGEFT_HEADER)
#define EDGEFT_INLINE inline __attribute__((always_inline))
#define EDGEFT_UNROLLED _Pragma("GCC unroll 16")
#define EDGEFT_ROLLED _Pragma("GCC unroll 1")
#else
#if defined(EDGEFT_PORTABLE) && defined(EDGEFT_DSP)
#define EDGEFT_HEADER "edgeft_dsp.h"
#elif !defined(EDGEFT_PORTABLE) && defined(__ARM_FEATURE_DSP) && defined(__ARM_FEATURE_UNALIGNED) && !defined(__ARM_BIG_ENDIAN) && defined(__GNUC__)
#define EDGEFT_HEADER "edgeft_dsp.h"
#define EDGEFT_HEADER "edgeft_dsp.h"
#else
#define EDGEFT_HEADER "edgeft_scalar.h"
#endif
#define EDGEFT_INLINE inline
#define EDGEFT_UNROLLED
#define EDGEFT_ROLLED
#endif

#if defined(__GNUC__)
/* An int32 at any address, which may be bytes of something else. */
typedef int32_t __attribute__((may_alias, aligned(1))) edgeft_anywhere;
#endif

#include EDGEFT_HEADER

#endif

#include "edgeft_vector.h"

/* a = start + left_times * (left ^ left_flip) + right_times * (right ^ right_flip)
 * y = saturate(floor((a + below + odd) / 2^shift)) - base,  odd = lowest bit of floor(a / 2^shift)   (eq. 8)
 *
 * Range:       all of it stays within 0 ... 65535, which the parameters are made for; shift 0 ... 14.
 * Rounding:    below = 2^(shift - 1) - 1, or 0 for shift 0, where `odd` is not added: to nearest, half to even (eq. 3). `start` is a multiple
 *              of 2^(shift + 1) above what is to be rounded, which changes neither ties nor parity.
 * Saturation:  to low ... high, in steps above `base`.
 * 16 bits without a sign: compilers find twice as many additions in a vector as with 32, on any machine. A part of the tensor is read
 * before any of it is written, as they only do so where what is written cannot be what is read next.
 */
#define PART 64

static void add_part(const edgeft_add_narrow_params *p, int32_t n, const uint8_t *left, const uint8_t *right, uint16_t *sum)
{
    const uint32_t left_flip = p->left_flip, right_flip = p->right_flip, left_times = p->left_times, right_times = p->right_times;
    const uint32_t start = p->start, below = p->below, parity = p->shift > 0, base = p->base;
    const uint16_t low = p->low, high = p->high;
    const int32_t shift = p->shift;
    for (int32_t i = 0; i < n; i++) {
        const uint16_t a = (uint16_t)((left[i] ^ left_flip) * left_times + (right[i] ^ right_flip) * right_times + start);
        const uint16_t odd = (uint16_t)((a >> shift) & parity);
        uint16_t q = (uint16_t)((uint16_t)(a + below + odd) >> shift);
        q = q < low ? low : q;
        q = q > high ? high : q;
        sum[i] = (uint16_t)(q - base);
    }
}

#ifdef EDGEFT_ADDED
/* Whole vectors, and how many codes these were. Products of codes and factors are added in pairs, as signed numbers of 16 bits. */
static int32_t add_vectors(const edgeft_add_narrow_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    int32_t i = 0;
    if (p->left_times + p->right_times <= 128) {
        const edgeft_addition sum = edgeft_make_addition(p);
        for (; i + EDGEFT_ADDED <= p->n; i += EDGEFT_ADDED) {
            edgeft_add_codes(&sum, left + i, right + i, y + i);
        }
    }
    return i;
}
#else
static int32_t add_vectors(const edgeft_add_narrow_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    (void)p, (void)left, (void)right, (void)y;
    return 0;
}
#endif

int edgeft_add_narrow(const edgeft_add_narrow_params *p, const uint8_t *left, const uint8_t *right, uint8_t *y)
{
    for (int32_t first = add_vectors(p, left, right, y); first < p->n; first += PART) {
        const int32_t n = edgeft_smaller(PART, p->n - first);
        uint16_t sum[PART];
        if (n == PART) {
            add_part(p, PART, left + first, right + first, sum);
        } else {
            add_part(p, n, left + first, right + first, sum);
        }
        for (int32_t i = 0; i < n; i++) {
            y[first + i] = (uint8_t)(sum[i] & 255u);
        }
    }
    return EDGEFT_OK;
}

/* Depthwise convolution for the DSP extension: 4 channels at a time, in pairs that an instruction takes from a word (0 and 2, 1 and 3).
 *
 * Windows of 3 x 3 are summed for three outputs side by side at stride 1, for two at stride 2: both read five columns. Their weights are
 * first put side by side as the codes are, for all rows of the map. What lies beyond the map, or has fewer than 4 channels left, is
 * gathered into such five columns. Codes with a sign stay as they are; 128 times the weights, which the bias lacks for them, is added.
 */
#ifndef EDGEFT_DSP_DEPTH_H
#define EDGEFT_DSP_DEPTH_H

/* Up to 64 channels of one output row. */
typedef struct {
    const uint8_t *rows[EDGEFT_MOST_ROWS]; /* channel 0 of pixel 0 of each row of taps */
    int32_t inside[EDGEFT_MOST_ROWS];      /* 0 for a row beyond the map */
    const int8_t *weight;
    const int32_t *bias;
    const int8_t *shift;
    edgeft_dsp_limits limits;
    uint32_t zeros, flip; /* four codes of value 0 as they are stored, and what makes them 0 ... 255 */
    int32_t n, sets;
} edgeft_depth;

/* 64 channels of windows of 3 x 3: [16 groups of 4 channels][3 rows][2 pairs][3 columns], and the bias by group. */
typedef struct {
    uint32_t weight[16][3][2][3];
    int32_t bias[16][4];
} edgeft_three_by_three;

/* A pair of channels, low and high half, of outputs a, b and c. */
typedef struct {
    int32_t a0, a1, b0, b1, c0, c1;
} edgeft_three_pairs;

#if defined(__ARM_FEATURE_DSP)

#define EDGEFT_CODES(extract, address) "ldr %[codes], " address "\n\t" extract "\n\t"
#define EDGEFT_ADD_PAIR(sum, weight) \
    "smlabb %[" sum "0], %[codes], %[" weight "], %[" sum "0]\n\tsmlatt %[" sum "1], %[codes], %[" weight "], %[" sum "1]\n\t"
#define EDGEFT_ROW_OF_5(extract, second, third, fourth)                                                                     \
    __asm__(EDGEFT_CODES(extract, "[%[x]]") EDGEFT_ADD_PAIR("a", "w0") EDGEFT_CODES(extract, "[%[x], %[step]]")             \
                EDGEFT_ADD_PAIR("a", "w1") second "add %[x], %[x], %[step], lsl #1\n\t" EDGEFT_CODES(extract, "[%[x]]")     \
                    EDGEFT_ADD_PAIR("a", "w2") third EDGEFT_CODES(extract, "[%[x], %[step]]") fourth                        \
            : [a0] "+r"(s.a0), [a1] "+r"(s.a1), [b0] "+r"(s.b0), [b1] "+r"(s.b1), [c0] "+r"(s.c0), [c1] "+r"(s.c1),         \
              [x] "+r"(x), [codes] "=&r"(codes)                                                                             \
            : [step] "r"(step), [w0] "r"(w[0]), [w1] "r"(w[1]), [w2] "r"(w[2])                                              \
            : "memory")
#define EDGEFT_ROW_AT_1(extract)                                                                                            \
    EDGEFT_ROW_OF_5(extract, EDGEFT_ADD_PAIR("b", "w0"), EDGEFT_ADD_PAIR("b", "w1") EDGEFT_ADD_PAIR("c", "w0"),             \
                    EDGEFT_ADD_PAIR("b", "w2") EDGEFT_ADD_PAIR("c", "w1") EDGEFT_CODES(extract, "[%[x], %[step], lsl #1]")  \
                        EDGEFT_ADD_PAIR("c", "w2"))
#define EDGEFT_ROW_AT_2(extract)                                                                                            \
    EDGEFT_ROW_OF_5(extract, "", EDGEFT_ADD_PAIR("b", "w0"),                                                                \
                    EDGEFT_ADD_PAIR("b", "w1") EDGEFT_CODES(extract, "[%[x], %[step], lsl #1]") EDGEFT_ADD_PAIR("b", "w2"))
#define EDGEFT_ROW(extract)       \
    if (stride == 1) {            \
        EDGEFT_ROW_AT_1(extract); \
    } else {                      \
        EDGEFT_ROW_AT_2(extract); \
    }

/* Adds a row of taps. Constants: stride 1 or 2, pair 0 (channels 0 and 2) or 1, whether codes have a sign. */
static inline edgeft_three_pairs edgeft_add_row(edgeft_three_pairs s, const uint8_t *x, int32_t step, const uint32_t *w, int stride,
                                                int pair, int is_signed)
{
    uint32_t codes;
    if (is_signed && pair) {
        EDGEFT_ROW("sxtb16 %[codes], %[codes], ror #8")
    } else if (is_signed) {
        EDGEFT_ROW("sxtb16 %[codes], %[codes]")
    } else if (pair) {
        EDGEFT_ROW("uxtb16 %[codes], %[codes], ror #8")
    } else {
        EDGEFT_ROW("uxtb16 %[codes], %[codes]")
    }
    return s;
}

#else

/* Adds a row of taps: stride 1 or 2, pair 0 (channels 0 and 2) or 1, whether codes have a sign. */
static inline edgeft_three_pairs edgeft_add_row(edgeft_three_pairs s, const uint8_t *x, int32_t step, const uint32_t *w, int stride,
                                                int pair, int is_signed)
{
    for (int tap = 0; tap < 3; tap++) {
        uint32_t codes[3] = {0, 0, 0};
        for (int i = 0; i < (stride == 1 ? 3 : 2); i++) {
            const uint32_t word = edgeft_word(x + (tap + i * stride) * step) >> 8 * pair;
            codes[i] = is_signed ? edgeft_even_weights(word) : edgeft_even_codes(word);
        }
        s.a0 = edgeft_add_low(s.a0, codes[0], w[tap]);
        s.a1 = edgeft_add_low(s.a1, codes[0] >> 16, w[tap] >> 16);
        s.b0 = edgeft_add_low(s.b0, codes[1], w[tap]);
        s.b1 = edgeft_add_low(s.b1, codes[1] >> 16, w[tap] >> 16);
        s.c0 = edgeft_add_low(s.c0, codes[2], w[tap]);
        s.c1 = edgeft_add_low(s.c1, codes[2] >> 16, w[tap] >> 16);
    }
    return s;
}

#endif

/* Where the weights, bias and shift of a group of 4 channels begin, in entries of a set: [4][4 groups][4 channels], see edgeft_vector.h. */
static inline int32_t edgeft_group_at(int32_t group)
{
    return group % 4 * 16 + group / 4 * 4;
}

/* Weights of 3 x 3 in pairs. */
static inline void edgeft_put_side_by_side(const edgeft_depth *d, int32_t groups, edgeft_three_by_three *to)
{
    for (int32_t group = 0; group < groups; group++) {
        const int32_t at = edgeft_group_at(group);
        for (int channel = 0; channel < 4; channel++) {
            int32_t sum = 0;
            for (int row = 0; row < 3; row++) {
                for (int column = 0; column < 3; column++) {
                    const int32_t w = d->weight[column * 256 + (at + channel) * 4 + row];
                    uint32_t *pair = &to->weight[group][row][channel % 2][column];
                    *pair = channel < 2 ? (uint32_t)w & 0xFFFFu : *pair | (uint32_t)w << 16;
                    sum += w;
                }
            }
            to->bias[group][channel] = d->bias[at + channel] + (d->flip ? 128 * sum : 0);
        }
    }
}

/* Five columns of three rows of 4 channels. */
typedef struct {
    const uint8_t *x[3];
    int32_t step[3];
    uint32_t gathered[3][5];
} edgeft_columns;

/* A word of n < 4 bytes. */
static inline uint32_t edgeft_part_of_word(const uint8_t *bytes, int32_t n)
{
    uint32_t word = 0;
    for (int i = 0; i < n; i++) {
        word |= (uint32_t)bytes[i] << 8 * i;
    }
    return word;
}

/* The columns from `column` on, where they are, or gathered: those beyond the map are zeros. `n` channels are left from channel `at` on. */
static inline void edgeft_find_columns(const edgeft_conv2d_params *p, const edgeft_depth *d, int32_t column, int32_t at, int32_t n,
                                       edgeft_columns *c)
{
    const int32_t step = p->in_channels;
    const int inside = column >= 0 && column + 5 <= p->in_columns && n >= 4;
    for (int row = 0; row < 3; row++) {
        const uint8_t *from = d->rows[row] + column * step + at;
        if (inside && d->inside[row]) {
            c->step[row] = step;
            c->x[row] = from;
            continue;
        }
        c->step[row] = 4;
        c->x[row] = (const uint8_t *)c->gathered[row];
        for (int i = 0; i < 5; i++) {
            const int of_map = d->inside[row] && column + i >= 0 && column + i < p->in_columns;
            c->gathered[row][i] = !of_map ? d->zeros : n >= 4 ? edgeft_word(from + i * step) : edgeft_part_of_word(from + i * step, n);
        }
    }
}

static inline uint32_t edgeft_round_one(int32_t acc, int32_t shift)
{
    return edgeft_dsp_round(acc, shift, edgeft_is_rounded(shift));
}

/* Four accumulators as codes, of which n are written. */
static inline void edgeft_store_group(uint8_t *y, int32_t n, int32_t a, int32_t b, int32_t c, int32_t d, const int8_t *shift,
                                      const edgeft_dsp_limits *limits)
{
    const uint32_t ab = edgeft_round_one(a, shift[0]) | edgeft_round_one(b, shift[1]) << 8;
    const uint32_t cd = edgeft_round_one(c, shift[2]) | edgeft_round_one(d, shift[3]) << 8;
    const uint32_t codes = edgeft_dsp_limit(ab | cd << 16, limits);
    if (n >= 4) {
        *(edgeft_four_anywhere *)(void *)y = codes;
        return;
    }
    for (int i = 0; i < n; i++) {
        y[i] = (uint8_t)(codes >> 8 * i & 255u);
    }
}

/* The sums of one pair of channels of a group; stride, pair and sign are constants. */
static inline edgeft_three_pairs edgeft_sum_rows(const edgeft_three_by_three *t, int32_t group, const edgeft_columns *c, int stride, int pair,
                                                 int is_signed)
{
    const int32_t low = t->bias[group][pair], high = t->bias[group][2 + pair];
    edgeft_three_pairs s = {low, high, low, high, low, high};
    for (int row = 0; row < 3; row++) {
        s = edgeft_add_row(s, c->x[row], c->step[row], t->weight[group][row][pair], stride, pair, is_signed);
    }
    return s;
}

/* The same for any stride and sign. */
static inline edgeft_three_pairs edgeft_sum_pair(const edgeft_three_by_three *t, int32_t group, const edgeft_columns *c, int stride, int pair,
                                                 int is_signed)
{
    if (is_signed) {
        return stride == 1 ? edgeft_sum_rows(t, group, c, 1, pair, 1) : edgeft_sum_rows(t, group, c, 2, pair, 1);
    }
    return stride == 1 ? edgeft_sum_rows(t, group, c, 1, pair, 0) : edgeft_sum_rows(t, group, c, 2, pair, 0);
}

/* One output row of a group of 4 channels. */
static inline void edgeft_row_of_3(const edgeft_conv2d_params *p, const edgeft_depth *d, const edgeft_three_by_three *t, int32_t group,
                                   uint8_t *y)
{
    const int stride = p->stride_columns, per_block = stride == 1 ? 3 : 2, is_signed = d->flip != 0;
    const int32_t n = d->n - 4 * group, y_step = p->out_channels;
    const int8_t *shift = d->shift + edgeft_group_at(group);
    edgeft_columns columns;
    for (int32_t first = 0; first < p->out_columns; first += per_block) {
        const int32_t outputs = edgeft_smaller(per_block, p->out_columns - first);
        uint8_t *to = y + first * y_step + 4 * group;
        edgeft_find_columns(p, d, first * stride - p->pad_left, 4 * group, n, &columns);
        const edgeft_three_pairs even = edgeft_sum_pair(t, group, &columns, stride, 0, is_signed);
        const edgeft_three_pairs odd = edgeft_sum_pair(t, group, &columns, stride, 1, is_signed);
        edgeft_store_group(to, n, even.a0, odd.a0, even.a1, odd.a1, shift, &d->limits);
        if (outputs > 1) {
            edgeft_store_group(to + y_step, n, even.b0, odd.b0, even.b1, odd.b1, shift, &d->limits);
        }
        if (outputs > 2) {
            edgeft_store_group(to + 2 * y_step, n, even.c0, odd.c0, even.c1, odd.c1, shift, &d->limits);
        }
    }
}

/* The same for any window. */
static inline void edgeft_row_of_any(const edgeft_conv2d_params *p, const edgeft_depth *d, int32_t group, uint8_t *y)
{
    const int32_t at = edgeft_group_at(group), n = d->n - 4 * group;
    for (int32_t column = 0; column < p->out_columns; column++) {
        int32_t acc[4] = {d->bias[at], d->bias[at + 1], d->bias[at + 2], d->bias[at + 3]};
        for (int32_t j = 0; j < p->kernel_columns; j++) {
            const int32_t from = column * p->stride_columns - p->pad_left + j * p->dilation_columns;
            for (int32_t i = 0; i < p->kernel_rows; i++) {
                const uint8_t *x = d->rows[i] + from * p->in_channels + 4 * group;
                const int of_map = d->inside[i] && from >= 0 && from < p->in_columns;
                const uint32_t codes = (!of_map ? d->zeros : n >= 4 ? edgeft_word(x) : edgeft_part_of_word(x, n)) ^ d->flip;
                const uint32_t even = edgeft_even_codes(codes), odd = edgeft_odd_codes(codes);
                const int8_t *w = d->weight + ((j * d->sets + i / 4) * 64 + at) * 4 + i % 4;
                acc[0] = edgeft_add_low(acc[0], even, (uint32_t)w[0]);
                acc[1] = edgeft_add_low(acc[1], odd, (uint32_t)w[4]);
                acc[2] = edgeft_add_high(acc[2], even, (uint32_t)w[8]);
                acc[3] = edgeft_add_high(acc[3], odd, (uint32_t)w[12]);
            }
        }
        edgeft_store_group(y + column * p->out_channels + 4 * group, n, acc[0], acc[1], acc[2], acc[3], d->shift + at, &d->limits);
    }
}

/* The rows of taps of an output row. */
static inline void edgeft_find_rows(const edgeft_conv2d_params *p, const uint8_t *x, int32_t row, edgeft_depth *d)
{
    for (int32_t i = 0; i < p->kernel_rows; i++) {
        const int32_t from = row * p->stride_rows - p->pad_top + i * p->dilation_rows;
        d->inside[i] = from >= 0 && from < p->in_rows;
        d->rows[i] = x + (d->inside[i] ? edgeft_ring_place(from, p->ring_first, p->ring_rows) * p->in_columns * p->in_channels : 0);
    }
}

/* All of edgeft_dwconv2d_packed, 64 channels after the other. */
static inline void edgeft_own_depth(const edgeft_conv2d_params *p, const uint8_t *x, const int8_t *weight, const int32_t *bias,
                                    const int8_t *shift, uint8_t *y)
{
    const int of_3 = p->kernel_columns == 3 && p->kernel_rows == 3 && p->dilation_columns == 1 && p->stride_columns <= 2;
    const edgeft_limits limits = edgeft_make_limits(p->rounding.low, p->rounding.high);
    const uint32_t each = UINT32_C(0x01010101);
    edgeft_depth d;
    edgeft_three_by_three t;
    d.limits = edgeft_make_dsp_limits(&limits);
    d.zeros = p->in == EDGEFT_OFFSET ? 128 * each : 0;
    d.flip = p->in == EDGEFT_S8 ? 128 * each : 0;
    d.sets = (p->kernel_rows + 3) / 4;
    for (int32_t first = 0; first < p->in_channels; first += 64) {
        d.n = edgeft_smaller(p->in_channels - first, 64);
        d.weight = weight + first * p->kernel_columns * d.sets * 4;
        d.bias = bias + first;
        d.shift = shift + first;
        const int32_t groups = (d.n + 3) / 4;
        if (of_3) {
            edgeft_put_side_by_side(&d, groups, &t);
        }
        for (int32_t row = 0; row < p->out_rows; row++) {
            uint8_t *to = y + row * p->out_columns * p->out_channels + first;
            edgeft_find_rows(p, x + first, row, &d);
            for (int32_t group = 0; group < groups; group++) {
                if (of_3) {
                    edgeft_row_of_3(p, &d, &t, group, to);
                } else {
                    edgeft_row_of_any(p, &d, group, to);
                }
            }
        }
    }
}

#endif

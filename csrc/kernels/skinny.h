/* Skinny products: so few rows or columns that packing an operand would cost more than multiplying it. Every weight is
 * read once, where it lies, and converted on the way.
 *
 * Few rows of A against a B with contiguous k (the weights of a linear layer in a step of decoding), and many rows of A
 * against few columns (a low-rank factor), are dot products. Few rows against contiguous columns are sums of rows of B.
 */
#ifndef EN_SKINNY_H
#define EN_SKINNY_H

#include "tile.h"
#include "unpack.h"

#ifdef EN_BF16_DOT
enum { BF16_DOT = 1 };
#else
enum { BF16_DOT = 0 };
#endif

enum { SKINNY_ROWS = 8, SKINNY_COLUMNS = 16, SKINNY_PAIRS = 8 };

/* Fewest multiply-adds worth a thread of their own (waking one costs some microseconds). */
enum { GEMM_GRAIN = 1 << 18 };

/* One term: c[i * c_few + j * c_many] = or += the sum over k of x (few,k) and w (many,k). */
struct skinny {
    int pairs;
    int64_t few, many, k, steps;
    const float *x; /* words of x, (few,steps), zero beyond k */
    int64_t x_row;
    struct operand w;
    float *c;
    int64_t c_few, c_many;
    int accumulate;
    _Atomic int *status;
};

/* DOTS: DOT_N of w at a time, each read once, against DOT_M of x. */
enum { DOT_M = 4, DOT_N = VL == 16 ? 4 : 2 };

WORD void dot_tile(const int pairs, const int m, const int n, enum en_dtype type, const struct skinny *q, int64_t i0,
                   int64_t j0) {
    vf acc[DOT_M][DOT_N];
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) acc[i][j] = v_zero();
    for (int64_t s = 0; s < q->steps; s += VL) {
        vf x[DOT_M];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) x[i] = load_as(EN_F32, q->x, (i0 + i) * q->x_row + s, q->steps - s);
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            vf w = load_words(pairs, type, &q->w, j0 + j, s, q->k);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) acc[i][j] = word_fma(pairs, x[i], w, acc[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            float *at = q->c + (i0 + i) * q->c_few + (j0 + j) * q->c_many, sum = v_hsum(acc[i][j]);
            *at = q->accumulate ? *at + sum : sum;
        }
}

/* m <= DOT_M vectors x from i on, against w [begin, end) */
WORD void dot_band(const int pairs, const int m, enum en_dtype type, const struct skinny *q, int64_t i, int64_t begin,
                   int64_t end) {
    int64_t j = begin;
    for (; j + DOT_N <= end; j += DOT_N) dot_tile(pairs, m, DOT_N, type, q, i, j);
    for (; j < end; j++) dot_tile(pairs, m, 1, type, q, i, j);
}

WORD void dots_as(const int pairs, enum en_dtype type, const struct skinny *q, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += 16) /* 16 of w stay in cache for the next DOT_M of x */
        for (int64_t i = 0; i < q->few; i += DOT_M) {
            const int64_t stop = min64(end, j + 16);
            switch (min64(DOT_M, q->few - i)) {
            case 1: dot_band(pairs, 1, type, q, i, j, stop); break;
            case 2: dot_band(pairs, 2, type, q, i, j, stop); break;
            case 3: dot_band(pairs, 3, type, q, i, j, stop); break;
            default: dot_band(pairs, 4, type, q, i, j, stop); break;
            }
        }
}

/* ROWS: sums of rows of B, ROW_K of them at a time, over pieces of at most ROW_N columns whose sums stay in L1. In
 * blocks of KC, each from zero, as tiles sum. */
enum { ROW_K = 8, ROW_N = 512 };

WORD vf weight_as(const int pairs, enum en_dtype type, const void *p, int64_t offset, int64_t n) {
    vf w = load_as(type, p, offset, n);
#ifdef EN_BF16_DOT
    if (pairs && type != EN_BF16) return v_round_bf16(w);
#endif
    (void)pairs;
    return w;
}

/* sums (m, ROW_N) += x (m,kc) · rows k0.. of w, columns [j, j + n) */
WORD void row_tile(const int pairs, const int m, const int kc, enum en_dtype type, const struct skinny *q, int64_t i,
                   int64_t k0, int64_t j, int64_t n, float *sums) {
    for (int64_t v = 0; v < n; v += VL) {
        vf acc[DOT_M];
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) acc[r] = v_load(sums + r * ROW_N + v);
#pragma GCC unroll 8
        for (int k = 0; k < kc; k++) {
            const int64_t at = (k0 + k) * q->w.k + j + v;
            vf w = weight_as(pairs, type, q->w.data, at, n - v);
            __builtin_prefetch((const char *)element(type, q->w.data, at + ROW_K * q->w.k));
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) acc[r] = v_fma(v_set(q->x[(i + r) * q->x_row + k0 + k]), w, acc[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) v_store(sums + r * ROW_N + v, acc[r]);
    }
}

WORD void row_band(const int pairs, const int m, enum en_dtype type, const struct skinny *q, int64_t i, int64_t k0,
                   int64_t k1, int64_t j, int64_t n, float *sums) {
    int64_t k = k0;
    for (; k + ROW_K <= k1; k += ROW_K) row_tile(pairs, m, ROW_K, type, q, i, k, j, n, sums);
    for (; k < k1; k++) row_tile(pairs, m, 1, type, q, i, k, j, n, sums);
}

WORD void rows_as(const int pairs, enum en_dtype type, const struct skinny *q, int64_t begin, int64_t end) {
    float sums[SKINNY_ROWS * ROW_N];
    const int64_t blocks = max64(ceil_div(q->k, KC), 1);
    for (int64_t j = begin; j < end; j += ROW_N) {
        const int64_t n = min64(ROW_N, end - j);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t k0 = cut(q->k, blocks, b), k1 = cut(q->k, blocks, b + 1);
            for (int64_t i = 0; i < SKINNY_ROWS * ROW_N; i += VL) v_store(sums + i, v_zero());
            for (int64_t i = 0; i < q->few; i += DOT_M)
                switch (min64(DOT_M, q->few - i)) {
                case 1: row_band(pairs, 1, type, q, i, k0, k1, j, n, sums + i * ROW_N); break;
                case 2: row_band(pairs, 2, type, q, i, k0, k1, j, n, sums + i * ROW_N); break;
                case 3: row_band(pairs, 3, type, q, i, k0, k1, j, n, sums + i * ROW_N); break;
                default: row_band(pairs, 4, type, q, i, k0, k1, j, n, sums + i * ROW_N); break;
                }
            for (int64_t i = 0; i < q->few; i++)
                for (int64_t v = 0; v < n; v += VL) {
                    float *at = q->c + i * q->c_few + j + v;
                    vf sum = v_load(sums + i * ROW_N + v);
                    if (b || q->accumulate) sum = v_add(v_load_n(at, n - v), sum);
                    v_store_n(at, sum, n - v);
                }
        }
    }
}

/* Runs one of the two over w [begin, end), with its type and kind of word as constants. */
#define SKINNY(name)                                                                   \
    static void name##_range(void *context, int64_t begin, int64_t end) {              \
        const struct skinny *q = context;                                              \
        if (BF16_DOT && q->pairs)                                                      \
            switch (q->w.type) {                                                       \
            case EN_BF16: name##_as(BF16_DOT, EN_BF16, q, begin, end); break;          \
            case EN_F16: name##_as(BF16_DOT, EN_F16, q, begin, end); break;            \
            default: name##_as(BF16_DOT, EN_F32, q, begin, end); break;                \
            }                                                                          \
        else                                                                           \
            switch (q->w.type) {                                                       \
            case EN_BF16: name##_as(0, EN_BF16, q, begin, end); break;                 \
            case EN_F16: name##_as(0, EN_F16, q, begin, end); break;                   \
            default: name##_as(0, EN_F32, q, begin, end); break;                       \
            }                                                                          \
    }
SKINNY(dots)
SKINNY(rows)
#undef SKINNY

/* The same where w is packed: DOT_N rows of it at a time are decoded, for all of x. */
static void unpacked_dots_range(void *context, int64_t begin, int64_t end) {
    const struct skinny *all = context;
    const int pairs = BF16_DOT && all->pairs;
    const int64_t row = round_up(all->k, 2 * VL), size = pairs ? 2 : 4;
    char *dense = en_scratch(EN_SCRATCH_B, (size_t)(DOT_N * row * size));
    if (!dense) {
        *all->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t j = begin; j < end; j += DOT_N) {
        struct skinny q = *all;
        const int64_t n = min64(DOT_N, end - j);
        for (int64_t i = 0; i < n; i++)
            decode_run(pairs, q.w.packed, q.w.at + (j + i) * q.w.row, q.k, dense + i * row * size);
        q.w = (struct operand){.type = pairs ? EN_BF16 : EN_F32, .data = dense, .row = row, .k = 1};
        q.c += j * q.c_many;
        dots_range(&q, 0, n);
    }
}

/* Words of x (few,k), one row after the other: packed as a panel and turned, unless they lie so already. */
static int skinny_x(struct skinny *q, const struct operand *x, int pairs) {
    q->steps = pairs ? (q->k + 1) / 2 : q->k;
    q->x = x->data;
    q->x_row = x->row;
    if (!q->pairs && x->type == EN_F32 && x->k == 1) return 1;
    q->x_row = round_up(q->steps, VL);
    const int64_t width = q->few <= VL ? q->few : round_up(q->few, VL);
    float *words = en_scratch(EN_SCRATCH_A, (size_t)(q->few * q->x_row + q->steps * width + 2 * VL) * sizeof(float));
    if (!words) return 0;
    float *panel = words + q->few * q->x_row + VL;
    const struct operand turned = {.type = EN_F32, .data = panel, .row = width, .k = 1};
    pack(pairs, panel, width, x, q->few, q->k, q->steps);
    pack(0, words, q->x_row, &turned, q->steps, q->few, q->few);
#ifdef EN_BF16_DOT
    if (q->pairs && !pairs && x->type != EN_BF16)
        for (int64_t i = 0; i < q->few * q->x_row; i += VL) v_store(words + i, v_round_bf16(v_load(words + i)));
#endif
    q->x = words;
    return 1;
}

static inline int few_rows(int64_t m, const struct en_term *t) {
    return m <= SKINNY_ROWS && (t->b_row == 1 || (t->b_col == 1 && !t->packed));
}
static inline int few_columns(int64_t m, const struct en_term *t, int pairs) {
    return m > SKINNY_ROWS && !t->packed && t->n <= (pairs ? SKINNY_PAIRS : SKINNY_COLUMNS) && t->a_col == 1 && t->k >= 4 * VL;
}

/* c (m, c_row) = or += the term, which has few_rows or few_columns */
static en_status skinny_term(const struct en_term *t, int64_t m, int pairs, float *c, int64_t c_row, int accumulate) {
    const struct operand a = a_of(t), b = b_of(t);
    _Atomic int status = EN_OK;
    struct skinny q = {.pairs = pairs, .k = t->k, .c = c + t->n0, .accumulate = accumulate, .status = &status};
    if (few_columns(m, t, pairs)) {
        q.few = t->n, q.c_few = 1, q.many = m, q.c_many = c_row, q.w = a;
        if (!skinny_x(&q, &b, pairs)) return EN_NO_MEMORY;
    } else {
        q.few = m, q.c_few = c_row, q.many = t->n, q.c_many = 1, q.w = b;
        if (!skinny_x(&q, &a, pairs && b.k == 1)) return EN_NO_MEMORY;
    }
    const int64_t grain = GEMM_GRAIN / max64(q.few * q.k, 1) + 1;
    if (q.w.packed)
        en_parallel_for(q.many, grain, unpacked_dots_range, &q);
    else if (q.w.k == 1)
        en_parallel_for(q.many, grain, dots_range, &q);
    else
        en_parallel_for(q.many, round_up(grain, NR), rows_range, &q);
    return (en_status)status;
}

#endif

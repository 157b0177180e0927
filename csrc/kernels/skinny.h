/* Skinny products: so few rows or columns that packing the large operand would cost more than multiplying it. It is
 * read once, where it lies, and converted on the way.
 *
 * DOTS: few rows of A against a B with contiguous k (the weights of a linear layer in a step of decoding), and many
 * rows of A against few columns (a low-rank factor). ROWS: the large operand's k is not contiguous but the other side
 * is, so the result is made of sums of its rows (the gradients of low-rank factors).
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

enum { SKINNY_ROWS = 8, SKINNY_COLUMNS = 16, SKINNY_PAIRS = 8, SKINNY_SUMS = 64, FAR = 1 << 19 };

/* Fewest multiply-adds worth a thread of their own (waking one costs some microseconds). */
enum { GEMM_GRAIN = 1 << 18 };

/* One term: c[i * c_few + j * c_many] = or += the sum over k of x (few,k) and w (many,k). */
struct skinny {
    int pairs;
    int64_t few, many, k, steps;
    const float *x; /* words of x, zero beyond k: (few,steps), or for ROWS (steps,x_row) */
    int64_t x_row;
    struct operand w;
    float *c;
    int64_t c_few, c_many;
    int accumulate;
    _Atomic int *status;
};

/* DOTS: DOT_N of w at a time, each read once, against DOT_M of x. */
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

/* ROWS: for pieces of so many columns that their sums, ROW_SUMS, stay near, and ROW_STEPS steps of k at a time, every
 * VL columns' words are read against all of x, VL rows of it or fewer at once. In blocks of KC steps, each from zero,
 * as tiles sum. */
enum { ROW_SUMS = 8192, ROW_STEPS = 32, ROW_AHEAD = 128 };

/* sums (h, row) += x's rows from i on · w's columns [j, j + n), steps [s0, s1) */
WORD void row_tile(const int pairs, const int h, enum en_dtype type, const struct skinny *q, int64_t i, int64_t s0,
                   int64_t s1, int64_t j, int64_t n, float *sums, int64_t row) {
    const int each = pairs ? 2 : 1;
    const float *x = q->x + s0 * q->x_row + i;
    vf acc[VL];
#pragma GCC unroll 16
    for (int r = 0; r < h; r++) acc[r] = v_load(sums + r * row);
    for (int64_t s = s0; s < s1; s++, x += q->x_row) {
        for (int e = 0; e < each; e++)
            __builtin_prefetch((const char *)element(type, q->w.data, j + (each * s + e) * q->w.k) + ROW_AHEAD);
        const vf w = gather_words(pairs, type, &q->w, j, n, s, q->k);
#pragma GCC unroll 16
        for (int r = 0; r < h; r++) acc[r] = word_fma(pairs, v_set(x[r]), w, acc[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < h; r++) v_store(sums + r * row, acc[r]);
}

/* The sums of columns [j, j + n) to c, of which one of the strides is 1. */
WORD void store_sums_of_rows(const struct skinny *q, int64_t j, int64_t n, const float *sums, int64_t row, int add) {
    for (int64_t i = 0; i < q->few; i += VL)
        for (int64_t v = 0; v < n; v += VL) {
            const int across = q->c_many == 1;
            const int64_t rows = min64(q->few - i, VL), columns = min64(n - v, VL);
            vf r[VL];
            for (int64_t x = 0; x < VL; x++) r[x] = v_load(sums + (i + x) * row + v);
            if (!across) v_transpose(r);
            for (int64_t x = 0; x < (across ? rows : columns); x++) {
                float *at = q->c + (i + (across ? x : 0)) * q->c_few + (j + v + (across ? 0 : x)) * q->c_many;
                const int64_t some = across ? columns : rows;
                v_store_n(at, add ? v_add(v_load_n(at, some), r[x]) : r[x], some);
            }
        }
}

WORD void row_band(const int pairs, enum en_dtype type, const struct skinny *q, int64_t i, int64_t s0, int64_t s1,
                   int64_t j, int64_t n, float *sums, int64_t row) {
    switch (min64(VL, q->few - i)) {
    case 1: row_tile(pairs, 1, type, q, i, s0, s1, j, n, sums, row); break;
    case 2: row_tile(pairs, 2, type, q, i, s0, s1, j, n, sums, row); break;
    case 3:
    case 4: row_tile(pairs, 4, type, q, i, s0, s1, j, n, sums, row); break;
    case 5:
    case 6:
    case 7:
    case 8: row_tile(pairs, 8, type, q, i, s0, s1, j, n, sums, row); break;
    case 9:
    case 10:
    case 11:
    case 12: row_tile(pairs, VL < 12 ? VL : 12, type, q, i, s0, s1, j, n, sums, row); break;
    default: row_tile(pairs, VL, type, q, i, s0, s1, j, n, sums, row); break;
    }
}

WORD void rows_as(const int pairs, enum en_dtype type, const struct skinny *q, int64_t begin, int64_t end) {
    const int64_t blocks = max64(ceil_div(q->steps, KC), 1), rows = round_up(q->few, VL);
    const int64_t row = max64(ROW_SUMS / rows / NR, 1) * NR;
    float *sums = en_scratch(EN_SCRATCH_C, (size_t)(rows * row) * sizeof(float));
    if (!sums) {
        *q->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t j = begin; j < end; j += row) {
        const int64_t n = min64(row, end - j);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = cut(q->steps, blocks, b), last = cut(q->steps, blocks, b + 1);
            for (int64_t i = 0; i < rows * row; i += VL) v_store(sums + i, v_zero());
            for (int64_t s = first; s < last; s += ROW_STEPS)
                for (int64_t v = 0; v < n; v += VL)
                    for (int64_t i = 0; i < q->few; i += VL) {
                        float *at = sums + i * row + v;
                        const int64_t stop = min64(s + ROW_STEPS, last);
                        if (n - v >= VL)
                            row_band(pairs, type, q, i, s, stop, j + v, VL, at, row);
                        else
                            row_band(pairs, type, q, i, s, stop, j + v, n - v, at, row);
                    }
            store_sums_of_rows(q, j, n, sums, row, b || q->accumulate);
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

/* DOTS where w is packed and its rows are whole blocks of a type that is decoded in registers: DOT_N at a time from
 * `begin` on; returns where it stopped. */
static int64_t dots_in_registers(const struct skinny *q, int64_t begin, int64_t end) {
    int64_t j = begin;
#ifdef EN_BF16_DOT
    const struct en_blocks *w = q->w.packed;
    const struct decoder *decoder = &decoders[w->type];
    if (!q->pairs || !decoder->dots || q->k % max64(w->values, PARTS) || q->w.row % w->values || q->w.at % w->values)
        return j;
    for (; j + DOT_N <= end; j += DOT_N) {
        const struct decoding d = {w, (q->w.at + j * q->w.row) / w->values, q->k / w->values, DOT_N,
                                   q->w.row / w->values};
        for (int64_t i = 0; i < q->few; i += DOT_M) {
            float sums[DOT_M * DOT_N];
            const int64_t m = min64(DOT_M, q->few - i);
            decoder->dots(m, &d, q->x + i * q->x_row, q->x_row, sums);
            for (int64_t r = 0; r < m; r++)
                for (int64_t line = 0; line < DOT_N; line++) {
                    float *at = q->c + (i + r) * q->c_few + (j + line) * q->c_many, sum = sums[r * DOT_N + line];
                    *at = q->accumulate ? *at + sum : sum;
                }
        }
    }
#endif
    (void)q, (void)end;
    return j;
}

/* DOTS of any packed w: DOT_N rows of it at a time are decoded into L1, for all of x. */
static void unpacked_dots_range(void *context, int64_t begin, int64_t end) {
    const struct skinny *all = context;
    const int pairs = BF16_DOT && all->pairs;
    const int64_t row = round_up(all->k, 2 * VL), size = pairs ? 2 : 4;
    char *dense = en_scratch(EN_SCRATCH_B, (size_t)(DOT_N * row * size));
    if (!dense) {
        *all->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t j = dots_in_registers(all, begin, end); j < end; j += DOT_N) {
        struct skinny q = *all;
        const int64_t n = min64(DOT_N, end - j);
        for (int64_t i = 0; i < n; i++)
            decode_run(pairs, q.w.packed, q.w.at + (j + i) * q.w.row, q.k, dense + i * row * size);
        q.w = (struct operand){.type = pairs ? EN_BF16 : EN_F32, .data = dense, .row = row, .k = 1};
        q.c += j * q.c_many;
        dots_range(&q, 0, n);
    }
}

/* Words of x (few,k) as the dots want them, one row after the other: packed as a panel and turned, unless they lie so
 * already. */
static int dots_x(struct skinny *q, const struct operand *x) {
    q->x = x->data;
    q->x_row = x->row;
    if (!q->pairs && x->type == EN_F32 && x->k == 1) return 1;
    q->x_row = round_up(q->steps, VL);
    const int64_t width = q->few <= VL ? q->few : round_up(q->few, VL);
    float *words = en_scratch(EN_SCRATCH_A, (size_t)(q->few * q->x_row + q->steps * width + 2 * VL) * sizeof(float));
    if (!words) return 0;
    float *panel = words + q->few * q->x_row + VL;
    const struct operand turned = {.type = EN_F32, .data = panel, .row = width, .k = 1};
    pack(q->pairs, panel, width, x, q->few, q->k, q->steps);
    pack(0, words, q->x_row, &turned, q->steps, q->few, q->few);
    q->x = words;
    return 1;
}

/* The same as the rows want them: a panel, with words of 0 up to a whole number of vectors. */
static int rows_x(struct skinny *q, const struct operand *x) {
    q->x_row = round_up(q->few, VL);
    float *panel = en_scratch(EN_SCRATCH_A, (size_t)(q->steps * q->x_row + VL) * sizeof(float));
    if (!panel) return 0;
    pack(q->pairs, panel, q->x_row, x, q->few, q->k, q->steps);
    q->x = panel;
    return 1;
}

/* FAR: elements of an operand that hardly lies in L2. From there on reading it in order, once, is worth more than tiles
 * of C that fill the registers. */
static inline int few_rows(int64_t m, const struct en_term *t) {
    if (t->b_row == 1) return m <= SKINNY_ROWS;
    return t->b_col == 1 && !t->packed && m <= (t->k * t->n >= FAR ? SKINNY_SUMS : SKINNY_ROWS);
}
static inline int few_columns(int64_t m, const struct en_term *t, int pairs) {
    if (m <= SKINNY_ROWS || t->packed || t->k < 4 * VL) return 0;
    if (t->a_col == 1) return t->n <= (pairs ? SKINNY_PAIRS : SKINNY_COLUMNS);
    return t->a_row == 1 && t->n <= SKINNY_SUMS;
}

/* c (m, c_row) = or += the term, which has few_rows or few_columns */
static en_status skinny_term(const struct en_term *t, int64_t m, int pairs, float *c, int64_t c_row, int accumulate) {
    const struct operand a = a_of(t), b = b_of(t);
    _Atomic int status = EN_OK;
    struct skinny q = {.pairs = pairs, .k = t->k, .c = c + t->n0, .accumulate = accumulate, .status = &status};
    const int turned = few_columns(m, t, pairs); /* the few are columns */
    const struct operand *x = turned ? &b : &a;
    q.w = turned ? a : b;
    q.few = turned ? t->n : m, q.c_few = turned ? 1 : c_row;
    q.many = turned ? m : t->n, q.c_many = turned ? c_row : 1;
    q.steps = pairs ? (q.k + 1) / 2 : q.k;
    if (q.few == 0) return EN_OK; /* a term of no columns */
    if (!(q.w.k == 1 || q.w.packed ? dots_x(&q, x) : rows_x(&q, x))) return EN_NO_MEMORY;
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

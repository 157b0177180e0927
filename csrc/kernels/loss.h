/* Cross-entropy of logits (n,vocab) against labels (n,), and its gradient.
 *
 * One pass over a row keeps the largest logit so far and the sum of exponentials below it (online log-sum-exp). The
 * loss is log(sum) + (max - logit[label]) in double, so that a confident row's tiny loss keeps its digits.
 * A label is in [0, vocab) or is ignore_index; an ignored row has loss 0, lse 0 and no gradient. */
#ifndef EN_LOSS_H
#define EN_LOSS_H

#include <math.h>

#include "softmax.h"

enum { LOSS_BLOCK = 1024 };

struct cross_entropy {
    int64_t vocab;
    enum en_dtype type; /* of logits and dlogits */
    const void *logits;
    const float *g; /* of each row's loss */
    const int64_t *labels;
    int64_t ignore_index;
    float *losses, *lse; /* backward: lse is read */
    void *dlogits;
};

static en_status check_labels(int64_t n, int64_t vocab, const int64_t *labels, int64_t ignore_index) {
    for (int64_t i = 0; i < n; i++)
        if ((labels[i] < 0 || labels[i] >= vocab) && labels[i] != ignore_index) {
            en_set_bad_id(labels[i]);
            return EN_BAD_ID;
        }
    return EN_OK;
}

/* exp(x - shift) of k vectors from x + i on. */
WORD void exp_below(enum en_dtype type, const int k, const void *x, int64_t i, vf shift, vf *e) {
#pragma GCC unroll 8
    for (int v = 0; v < k; v++) e[v] = v_sub(load_as(type, x, i + v * VL, VL), shift);
    v_exp_each(k, e);
}

/* sum of exp(x - shift) over n */
WORD double sum_exp(enum en_dtype type, int64_t n, const void *x, float shift) {
    vf m = v_set(shift), e[EXP_GROUP];
    vd acc = vd_zero();
    int64_t i = 0;
    for (; i + EXP_GROUP * VL <= n; i += EXP_GROUP * VL) {
        exp_below(type, EXP_GROUP, x, i, m, e);
#pragma GCC unroll 8
        for (int v = 0; v < EXP_GROUP; v++) acc = vd_add(acc, e[v]);
    }
    for (; i + VL <= n; i += VL) {
        exp_below(type, 1, x, i, m, e);
        acc = vd_add(acc, e[0]);
    }
    if (i < n) acc = vd_add(acc, v_exp(v_sub(v_fill(load_as(type, x, i, n - i), n - i, -INFINITY), m)));
    return vd_sum(acc);
}

static inline double one_of(enum en_dtype type, const void *x, int64_t i) {
    float value;
    return *as_floats(type, element(type, x, i), type_size(type), 1, &value);
}

/* A row's largest logit, and the sum of exp(x - max). */
struct row_total {
    float max;
    double sum;
};

WORD struct row_total total_of_row(enum en_dtype type, int64_t vocab, const void *x) {
    struct row_total t = {-INFINITY, 0};
    for (int64_t at = 0; at < vocab; at += LOSS_BLOCK) {
        int64_t n = least(LOSS_BLOCK, vocab - at);
        const void *block = element(type, x, at);
        float m = row_max_as(type, n, block);
        if (m > t.max) {
            t.sum *= exp((double)t.max - m);
            t.max = m;
        }
        t.sum += sum_exp(type, n, block, t.max == -INFINITY ? 0 : t.max); /* nothing but -Inf so far: no Inf - Inf */
    }
    return t;
}

/* -log softmax at the label */
static inline float loss_of(struct row_total t, double logit) { return (float)(log(t.sum) + ((double)t.max - logit)); }

WORD void cross_entropy_rows(enum en_dtype type, const struct cross_entropy *p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const void *x = element(type, p->logits, row * p->vocab);
        if (p->labels[row] == p->ignore_index) {
            p->losses[row] = p->lse[row] = 0;
            continue;
        }
        struct row_total t = total_of_row(type, p->vocab, x);
        p->lse[row] = (float)(log(t.sum) + t.max);
        p->losses[row] = loss_of(t, one_of(type, x, p->labels[row]));
    }
}

static void cross_entropy_range(void *context, int64_t begin, int64_t end) {
    const struct cross_entropy *p = context;
    WITH_TYPE(p->type, cross_entropy_rows, p, begin, end);
}

static en_status cross_entropy(enum en_dtype type, int64_t n, int64_t vocab, const void *logits, const int64_t *labels,
                               int64_t ignore_index, float *losses, float *lse) {
    en_status status = check_labels(n, vocab, labels, ignore_index);
    if (status) return status;
    struct cross_entropy p = {.vocab = vocab, .type = type, .logits = logits, .labels = labels,
                              .ignore_index = ignore_index, .losses = losses, .lse = lse};
    en_parallel_for(n, row_grain(GRAIN_EXP, vocab), cross_entropy_range, &p);
    return EN_OK;
}

/* dx = g·exp(x - shift) */
WORD void scaled_exp(enum en_dtype type, int64_t n, const void *x, float shift, float g, void *dx) {
    vf scale = v_set(g), m = v_set(shift), e[EXP_GROUP];
    int64_t i = 0;
    for (; i + EXP_GROUP * VL <= n; i += EXP_GROUP * VL) {
        exp_below(type, EXP_GROUP, x, i, m, e);
#pragma GCC unroll 8
        for (int v = 0; v < EXP_GROUP; v++) store_as(type, dx, i + v * VL, v_mul(scale, e[v]), VL);
    }
    for (; i + VL <= n; i += VL) {
        exp_below(type, 1, x, i, m, e);
        store_as(type, dx, i, v_mul(scale, e[0]), VL);
    }
    if (i < n) store_as(type, dx, i, v_mul(scale, v_exp(v_sub(load_as(type, x, i, n - i), m))), n - i);
}

WORD void store_one(enum en_dtype type, void *x, int64_t i, double value) {
    store_as(type, x, i, v_set((float)value), 1);
}

/* dlogits = g·(exp(x - lse) - [label]) */
WORD void cross_entropy_backward_rows(enum en_dtype type, const struct cross_entropy *p, int64_t begin, int64_t end) {
    int64_t d = p->vocab;
    for (int64_t row = begin; row < end; row++) {
        const void *x = element(type, p->logits, row * d);
        void *dx = element(type, p->dlogits, row * d);
        int64_t label = p->labels[row];
        if (label == p->ignore_index) {
            memset(dx, 0, (size_t)(d * type_size(type)));
            continue;
        }
        scaled_exp(type, d, x, p->lse[row], p->g[row], dx);
        store_one(type, dx, label, p->g[row] * expm1(one_of(type, x, label) - p->lse[row]));
    }
}

static void cross_entropy_backward_range(void *context, int64_t begin, int64_t end) {
    const struct cross_entropy *p = context;
    WITH_TYPE(p->type, cross_entropy_backward_rows, p, begin, end);
}

static en_status cross_entropy_backward(enum en_dtype type, int64_t n, int64_t vocab, const float *g,
                                        const void *logits, const int64_t *labels, const float *lse,
                                        int64_t ignore_index, void *dlogits) {
    en_status status = check_labels(n, vocab, labels, ignore_index);
    if (status) return status;
    struct cross_entropy p = {.vocab = vocab, .type = type, .logits = logits, .g = g, .labels = labels,
                              .ignore_index = ignore_index, .lse = (float *)lse, .dlogits = dlogits};
    en_parallel_for(n, row_grain(GRAIN_EXP, vocab), cross_entropy_backward_range, &p);
    return EN_OK;
}

/* ---- losses, and the gradient in place of the logits ----
 *
 * The label's logit is taken out of its row first. What is left is summed in f32 lanes, LOSS_BLOCK elements at a time
 * and then in double, and still a tiny loss, log(1 + sum / exp(label)), keeps its digits; the label's own gradient is
 * -factor·sum / (sum + exp(label)), without cancellation. The row is read twice, the second time from L2. */

/* A piece is what a thread takes of a row where rows are few. */
enum { LOSS_PIECE = 16 * LOSS_BLOCK, LOSS_FEW_ROWS = 4 /* a thread */ };

/* A row on its way: its label's logit, and what turns the others x into scale·exp(x - shift). */
struct loss_row {
    int kept; /* the label is not ignored */
    double logit;
    float shift, scale;
};

struct loss_gradient {
    int64_t n, vocab, pieces;
    enum en_dtype type;
    void *logits;
    const int64_t *labels;
    int64_t ignore_index;
    double factor;
    float *losses;
    int64_t rows_a_task;
    struct loss_row *row;     /* (n,), of rows cut into pieces, as is the next */
    struct row_total *totals; /* (n,pieces) */
};

WORD float sum_exp_f32(enum en_dtype type, int64_t n, const void *x, float shift) {
    vf m = v_set(shift), e[EXP_GROUP], acc[EXP_GROUP];
#pragma GCC unroll 8
    for (int v = 0; v < EXP_GROUP; v++) acc[v] = v_zero();
    int64_t i = 0;
    for (; i + EXP_GROUP * VL <= n; i += EXP_GROUP * VL) {
        exp_below(type, EXP_GROUP, x, i, m, e);
#pragma GCC unroll 8
        for (int v = 0; v < EXP_GROUP; v++) acc[v] = v_add(acc[v], e[v]);
    }
    for (; i < n; i += VL)
        acc[0] = v_add(acc[0], v_exp(v_sub(v_fill(load_as(type, x, i, n - i), n - i, -INFINITY), m)));
    return v_hsum(v_add(v_add(acc[0], acc[1]), v_add(acc[2], acc[3])));
}

/* t and u of two parts of a row, together. */
static inline struct row_total join_totals(struct row_total t, struct row_total u) {
    if (u.max > t.max) return (struct row_total){u.max, t.sum * exp((double)t.max - u.max) + u.sum};
    if (u.max < t.max) u.sum *= exp((double)u.max - t.max);
    return (struct row_total){t.max, t.sum + u.sum};
}

WORD struct row_total total_of_piece(enum en_dtype type, int64_t n, const void *x) {
    struct row_total t = {-INFINITY, 0};
    for (int64_t at = 0; at < n; at += LOSS_BLOCK) {
        int64_t size = least(LOSS_BLOCK, n - at);
        const void *block = element(type, x, at);
        float m = row_max_as(type, size, block), shift = m > t.max ? m : t.max;
        /* nothing but -Inf so far: no Inf - Inf */
        struct row_total u = {shift, sum_exp_f32(type, size, block, shift == -INFINITY ? 0 : shift)};
        t = join_totals(t, u);
    }
    return t;
}

static inline void *logits_of(const struct loss_gradient *p, int64_t row, int64_t piece) {
    return element(p->type, p->logits, row * p->vocab + piece * LOSS_PIECE);
}
static inline int64_t size_of_piece(const struct loss_gradient *p, int64_t piece) {
    return least(LOSS_PIECE, p->vocab - piece * LOSS_PIECE);
}

/* Takes the label's logit out; an ignored row is done. */
WORD struct loss_row open_row(enum en_dtype type, const struct loss_gradient *p, int64_t at) {
    struct loss_row row = {.kept = p->labels[at] != p->ignore_index};
    void *x = logits_of(p, at, 0);
    if (row.kept) {
        row.logit = one_of(type, x, p->labels[at]);
        store_one(type, x, p->labels[at], -INFINITY);
    } else {
        memset(x, 0, (size_t)(p->vocab * type_size(type)));
        p->losses[at] = 0;
    }
    return row;
}

/* The loss, from the others' total; returns the label's gradient. own is 1 where the label's logit is the largest. */
static double settle_row(const struct loss_gradient *p, int64_t at, struct row_total t, struct loss_row *row) {
    double m = row->logit > t.max ? row->logit : t.max, own = exp(row->logit - m);
    double others = t.sum == 0 ? 0 : t.sum * exp(t.max - m), sum = others + own;
    p->losses[at] = (float)(own == 1 ? log1p(others) : log(sum) + (m - row->logit));
    row->shift = (float)m;
    row->scale = (float)(p->factor / sum);
    return -p->factor * (others / sum);
}

/* Index: rows_a_task rows. */
WORD void loss_gradient_rows(enum en_dtype type, const struct loss_gradient *p, int64_t begin, int64_t end) {
    for (int64_t at = begin * p->rows_a_task; at < least(end * p->rows_a_task, p->n); at++) {
        struct loss_row row = open_row(type, p, at);
        if (!row.kept) continue;
        struct row_total t = {-INFINITY, 0};
        for (int64_t k = 0; k < p->pieces; k++)
            t = join_totals(t, total_of_piece(type, size_of_piece(p, k), logits_of(p, at, k)));
        double own = settle_row(p, at, t, &row);
        scaled_exp(type, p->vocab, logits_of(p, at, 0), row.shift, row.scale, logits_of(p, at, 0));
        store_one(type, logits_of(p, at, 0), p->labels[at], own);
    }
}

/* Index: row · pieces + piece. */
WORD void loss_gradient_totals(enum en_dtype type, const struct loss_gradient *p, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
        int64_t at = task / p->pieces, k = task % p->pieces;
        if (p->row[at].kept)
            p->totals[task] = total_of_piece(type, size_of_piece(p, k), logits_of(p, at, k));
    }
}
WORD void loss_gradient_scaled(enum en_dtype type, const struct loss_gradient *p, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
        int64_t k = task % p->pieces;
        const struct loss_row *row = &p->row[task / p->pieces];
        void *x = logits_of(p, task / p->pieces, k);
        if (row->kept) scaled_exp(type, size_of_piece(p, k), x, row->shift, row->scale, x);
    }
}

static void loss_gradient_rows_range(void *context, int64_t begin, int64_t end) {
    const struct loss_gradient *p = context;
    WITH_TYPE(p->type, loss_gradient_rows, p, begin, end);
}
static void loss_gradient_totals_range(void *context, int64_t begin, int64_t end) {
    const struct loss_gradient *p = context;
    WITH_TYPE(p->type, loss_gradient_totals, p, begin, end);
}
static void loss_gradient_scaled_range(void *context, int64_t begin, int64_t end) {
    const struct loss_gradient *p = context;
    WITH_TYPE(p->type, loss_gradient_scaled, p, begin, end);
}

/* Few long rows: all threads at the pieces of all, with the bits that whole rows give. */
static en_status loss_gradient_by_pieces(struct loss_gradient *p) {
    size_t totals = (size_t)(p->n * p->pieces) * sizeof *p->totals;
    p->totals = en_scratch(EN_SCRATCH_A, totals + (size_t)p->n * sizeof *p->row);
    if (!p->totals) return EN_NO_MEMORY;
    p->row = (struct loss_row *)((char *)p->totals + totals);
    for (int64_t at = 0; at < p->n; at++) p->row[at] = WITH_TYPE(p->type, open_row, p, at);
    en_parallel_for(p->n * p->pieces, 1, loss_gradient_totals_range, p);
    double own[LOSS_FEW_ROWS * EN_MAX_THREADS];
    for (int64_t at = 0; at < p->n; at++) {
        struct row_total t = {-INFINITY, 0};
        for (int64_t k = 0; k < p->pieces; k++) t = join_totals(t, p->totals[at * p->pieces + k]);
        if (p->row[at].kept) own[at] = settle_row(p, at, t, &p->row[at]);
    }
    en_parallel_for(p->n * p->pieces, 1, loss_gradient_scaled_range, p);
    for (int64_t at = 0; at < p->n; at++)
        if (p->row[at].kept) WITH_TYPE(p->type, store_one, logits_of(p, at, 0), p->labels[at], own[at]);
    return EN_OK;
}

/* Rows are claimed, not dealt out: ignored ones cost little. */
static en_status cross_entropy_gradient(enum en_dtype type, int64_t n, int64_t vocab, void *logits,
                                        const int64_t *labels, float factor, int64_t ignore_index, float *losses) {
    en_status status = check_labels(n, vocab, labels, ignore_index);
    if (status) return status;
    struct loss_gradient p = {.n = n, .vocab = vocab, .type = type, .logits = logits, .labels = labels,
                              .ignore_index = ignore_index, .factor = factor, .losses = losses};
    p.pieces = (vocab + LOSS_PIECE - 1) / LOSS_PIECE;
    p.rows_a_task = row_grain(GRAIN_EXP, vocab);
    if (p.pieces > 1 && n < LOSS_FEW_ROWS * en_get_threads()) return loss_gradient_by_pieces(&p);
    int64_t tasks = (n + p.rows_a_task - 1) / p.rows_a_task;
    en_parallel_tasks(tasks, tasks, loss_gradient_rows_range, &p);
    return EN_OK;
}

#endif

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
    float factor;
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

/* sum of exp(x - shift) over n */
WORD double sum_exp(enum en_dtype type, int64_t n, const void *x, float shift) {
    vf m = v_set(shift);
    vd acc = vd_zero();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) acc = vd_add(acc, v_exp(v_sub(load_as(type, x, i, VL), m)));
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
    vf scale = v_set(g), m = v_set(shift);
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        store_as(type, dx, i, v_mul(scale, v_exp(v_sub(load_as(type, x, i, VL), m))), VL);
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

/* Losses, and factor·(softmax - [label]) in place of the logits. */
WORD void cross_entropy_gradient_rows(enum en_dtype type, const struct cross_entropy *p, int64_t begin, int64_t end) {
    int64_t d = p->vocab;
    for (int64_t row = begin; row < end; row++) {
        void *x = element(type, p->dlogits, row * d);
        int64_t label = p->labels[row];
        p->losses[row] = 0;
        if (label == p->ignore_index) {
            memset(x, 0, (size_t)(d * type_size(type)));
            continue;
        }
        struct row_total t = total_of_row(type, d, x);
        double logit = one_of(type, x, label);
        p->losses[row] = loss_of(t, logit);
        scaled_exp(type, d, x, t.max, (float)(p->factor / t.sum), x);
        store_one(type, x, label, p->factor * expm1((logit - t.max) - log(t.sum)));
    }
}

static void cross_entropy_gradient_range(void *context, int64_t begin, int64_t end) {
    const struct cross_entropy *p = context;
    WITH_TYPE(p->type, cross_entropy_gradient_rows, p, begin, end);
}

static en_status cross_entropy_gradient(enum en_dtype type, int64_t n, int64_t vocab, void *logits,
                                        const int64_t *labels, float factor, int64_t ignore_index, float *losses) {
    en_status status = check_labels(n, vocab, labels, ignore_index);
    if (status) return status;
    struct cross_entropy p = {.vocab = vocab, .type = type, .factor = factor, .labels = labels,
                              .ignore_index = ignore_index, .losses = losses, .dlogits = logits};
    en_parallel_for(n, row_grain(GRAIN_EXP, vocab), cross_entropy_gradient_range, &p);
    return EN_OK;
}

#endif

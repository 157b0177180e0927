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
    const float *logits, *g;
    const int64_t *labels;
    int64_t ignore_index;
    float *losses, *lse; /* backward: lse is read */
    float *dlogits;
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
static double sum_exp(int64_t n, const float *x, float shift) {
    vf m = v_set(shift);
    vd acc = vd_zero();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) acc = vd_add(acc, v_exp(v_sub(v_load(x + i), m)));
    if (i < n) acc = vd_add(acc, v_exp(v_sub(v_load_fill(x + i, n - i, -INFINITY), m)));
    return vd_sum(acc);
}

static void cross_entropy_range(void *context, int64_t begin, int64_t end) {
    const struct cross_entropy *p = context;
    for (int64_t row = begin; row < end; row++) {
        const float *x = p->logits + row * p->vocab;
        if (p->labels[row] == p->ignore_index) {
            p->losses[row] = p->lse[row] = 0;
            continue;
        }
        float max = -INFINITY;
        double total = 0;
        for (int64_t at = 0; at < p->vocab; at += LOSS_BLOCK) {
            int64_t n = least(LOSS_BLOCK, p->vocab - at);
            float m = row_max(n, x + at);
            if (m > max) {
                total *= exp((double)max - m);
                max = m;
            }
            total += sum_exp(n, x + at, max == -INFINITY ? 0 : max); /* nothing but -Inf so far: no Inf - Inf */
        }
        p->lse[row] = (float)(log(total) + max);
        p->losses[row] = (float)(log(total) + ((double)max - x[p->labels[row]]));
    }
}

static en_status cross_entropy(int64_t n, int64_t vocab, const float *logits, const int64_t *labels,
                               int64_t ignore_index, float *losses, float *lse) {
    en_status status = check_labels(n, vocab, labels, ignore_index);
    if (status) return status;
    struct cross_entropy p = {vocab, logits, NULL, labels, ignore_index, losses, lse, NULL};
    en_parallel_for(n, row_grain(GRAIN_EXP, vocab), cross_entropy_range, &p);
    return EN_OK;
}

/* dlogits = g·(exp(x - lse) - [label]) */
static void cross_entropy_backward_range(void *context, int64_t begin, int64_t end) {
    const struct cross_entropy *p = context;
    int64_t d = p->vocab;
    for (int64_t row = begin; row < end; row++) {
        const float *x = p->logits + row * d;
        float *dx = p->dlogits + row * d;
        int64_t label = p->labels[row], i = 0;
        if (label == p->ignore_index) {
            memset(dx, 0, (size_t)d * sizeof *dx);
            continue;
        }
        vf g = v_set(p->g[row]), lse = v_set(p->lse[row]);
        for (; i + VL <= d; i += VL) v_store(dx + i, v_mul(g, v_exp(v_sub(v_load(x + i), lse))));
        if (i < d) v_store_n(dx + i, v_mul(g, v_exp(v_sub(v_load_n(x + i, d - i), lse))), d - i);
        dx[label] = (float)(p->g[row] * expm1((double)x[label] - p->lse[row]));
    }
}

static en_status cross_entropy_backward(int64_t n, int64_t vocab, const float *g, const float *logits,
                                        const int64_t *labels, const float *lse, int64_t ignore_index,
                                        float *dlogits) {
    en_status status = check_labels(n, vocab, labels, ignore_index);
    if (status) return status;
    struct cross_entropy p = {vocab, logits, g, labels, ignore_index, NULL, (float *)lse, dlogits};
    en_parallel_for(n, row_grain(GRAIN_EXP, vocab), cross_entropy_backward_range, &p);
    return EN_OK;
}

#endif

/* Optimizer steps over flat arrays, in place, one pass. */
#ifndef EN_ADAMW_H
#define EN_ADAMW_H

#include <math.h>

#include "strided.h"

/* ---- Adam (Kingma & Ba 2015), AdamW with decoupled decay (Loshchilov & Hutter 2019) ---- */

struct adam {
    float *p, *m, *v;
    const float *g;
    float keep;          /* p is scaled by it first: 1 - lr·decay where decoupled */
    float decay;         /* of the gradient, where not decoupled */
    float beta1, rest1;  /* rest = 1 - beta */
    float beta2, rest2;
    float rate;          /* lr / (1 - beta1^step) */
    float correction;    /* 1 / √(1 - beta2^step) */
    float eps;
};

/* m = β1·m + (1-β1)·g, v = β2·v + (1-β2)·g², p -= rate·m / (√v·correction + eps) */
static void adam_range(void *context, int64_t begin, int64_t end) {
    const struct adam *a = context;
    vf keep = v_set(a->keep), decay = v_set(a->decay), beta1 = v_set(a->beta1), rest1 = v_set(a->rest1);
    vf beta2 = v_set(a->beta2), rest2 = v_set(a->rest2), rate = v_set(a->rate), correction = v_set(a->correction);
    vf eps = v_set(a->eps);
    for (int64_t i = begin; i < end; i += VL) {
        int64_t n = end - i;
        vf p = v_load_n(a->p + i, n), g = v_fma(decay, p, v_load_n(a->g + i, n));
        vf m = v_fma(beta1, v_load_n(a->m + i, n), v_mul(rest1, g));
        vf v = v_fma(beta2, v_load_n(a->v + i, n), v_mul(v_mul(rest2, g), g));
        vf step = v_div(v_mul(rate, m), v_fma(v_sqrt(v), correction, eps));
        v_store_n(a->p + i, v_sub(v_mul(keep, p), step), n);
        v_store_n(a->m + i, m, n);
        v_store_n(a->v + i, v, n);
    }
}

static en_status adam_step(int64_t n, float *p, const float *g, float *m, float *v, double lr, double beta1,
                           double beta2, double eps, double weight_decay, int64_t step, int decoupled) {
    struct adam a = {
        .p = p,
        .m = m,
        .v = v,
        .g = g,
        .keep = decoupled ? (float)(1 - lr * weight_decay) : 1,
        .decay = decoupled ? 0 : (float)weight_decay,
        .beta1 = (float)beta1,
        .rest1 = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .rest2 = (float)(1 - beta2),
        .rate = (float)(lr / (1 - pow(beta1, (double)step))),
        .correction = (float)(1 / sqrt(1 - pow(beta2, (double)step))),
        .eps = (float)eps,
    };
    en_parallel_for(n, GRAIN_EXP, adam_range, &a);
    return EN_OK;
}

/* ---- SGD: g += decay·p; buf = momentum·buf + g; p -= lr·(nesterov ? g + momentum·buf : buf) ---- */

struct sgd {
    float *p, *buf;
    const float *g;
    float lr, momentum, decay;
    int nesterov;
};

static void sgd_range(void *context, int64_t begin, int64_t end) {
    const struct sgd *s = context;
    vf lr = v_set(s->lr), momentum = v_set(s->momentum), decay = v_set(s->decay);
    for (int64_t i = begin; i < end; i += VL) {
        int64_t n = end - i;
        vf p = v_load_n(s->p + i, n), g = v_fma(decay, p, v_load_n(s->g + i, n));
        if (s->buf) {
            vf buf = v_fma(momentum, v_load_n(s->buf + i, n), g);
            v_store_n(s->buf + i, buf, n);
            g = s->nesterov ? v_fma(momentum, buf, g) : buf;
        }
        v_store_n(s->p + i, v_fnma(lr, g, p), n);
    }
}

static en_status sgd_step(int64_t n, float *p, const float *g, float *buf, double lr, double momentum,
                          double weight_decay, int nesterov) {
    struct sgd s = {p, buf, g, (float)lr, (float)momentum, (float)weight_decay, nesterov};
    en_parallel_for(n, GRAIN, sgd_range, &s);
    return EN_OK;
}

#endif

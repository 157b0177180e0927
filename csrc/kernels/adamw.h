/* Optimizer steps over all parameters, in place: one pass, which also scales the gradients as clipping asks, so that
 * nobody rewrites them. */
#ifndef EN_ADAMW_H
#define EN_ADAMW_H

#include <math.h>

#include "stochastic.h"

/* ---- Adam (Kingma & Ba 2015), AdamW with decoupled decay (Loshchilov & Hutter 2019) ---- */

struct adam {
    vf scale;        /* of the gradient */
    vf keep;         /* p is scaled by it first: 1 - lr·decay where decoupled */
    vf decay;        /* of the gradient, where not decoupled */
    vf beta1, rest1; /* rest = 1 - beta */
    vf beta2, rest2;
    vf rate;         /* lr / (1 - beta1^step) */
    vf correction;   /* 1 / √(1 - beta2^step) */
    vf eps;
};

WORD struct adam adam_at(const struct en_adam *o, int64_t step) {
    return (struct adam){
        .scale = v_set((float)o->scale),
        .keep = v_set(o->decoupled ? (float)(1 - o->lr * o->weight_decay) : 1),
        .decay = v_set(o->decoupled ? 0 : (float)o->weight_decay),
        .beta1 = v_set((float)o->beta1),
        .rest1 = v_set((float)(1 - o->beta1)),
        .beta2 = v_set((float)o->beta2),
        .rest2 = v_set((float)(1 - o->beta2)),
        .rate = v_set((float)(o->lr / (1 - pow(o->beta1, (double)step)))),
        .correction = v_set((float)(1 / sqrt(1 - pow(o->beta2, (double)step)))),
        .eps = v_set((float)o->eps),
    };
}

/* m = β1·m + (1-β1)·g, v = β2·v + (1-β2)·g²; the new p = p - rate·m / (√v·correction + eps) */
WORD vf adam_lanes(const struct adam *a, vf p, vf g, vf *m, vf *v) {
    g = v_fma(a->decay, p, v_mul(a->scale, g));
    *m = v_fma(a->beta1, *m, v_mul(a->rest1, g));
    *v = v_fma(a->beta2, *v, v_mul(v_mul(a->rest2, g), g));
    vf step = v_div(v_mul(a->rate, *m), v_fma(v_sqrt(*v), a->correction, a->eps));
    return v_sub(v_mul(a->keep, p), step);
}

static void adam_f32(const struct adam *settings, const struct en_param *param, int64_t begin, int64_t end) {
    struct adam a = *settings;
    float *p = param->p, *ms = param->m, *vs = param->v;
    const float *g = param->g;
    int64_t i = begin;
    for (; i + VL <= end; i += VL) {
        vf m = v_load(ms + i), v = v_load(vs + i);
        v_store(p + i, adam_lanes(&a, v_load(p + i), v_load(g + i), &m, &v));
        v_store(ms + i, m);
        v_store(vs + i, v);
    }
    if (i == end) return;
    vf m = v_load_n(ms + i, end - i), v = v_load_n(vs + i, end - i);
    v_store_n(p + i, adam_lanes(&a, v_load_n(p + i, end - i), v_load_n(g + i, end - i), &m, &v), end - i);
    v_store_n(ms + i, m, end - i);
    v_store_n(vs + i, v, end - i);
}

/* ---- SGD: g += decay·p; buf = momentum·buf + g; p -= lr·(nesterov ? g + momentum·buf : buf) ---- */

static void sgd_f32(const void *settings, const struct en_param *param, int64_t begin, int64_t end) {
    const struct en_sgd *s = settings;
    float *ps = param->p, *bufs = param->m;
    vf lr = v_set((float)s->lr), momentum = v_set((float)s->momentum), decay = v_set((float)s->weight_decay);
    vf scale = v_set((float)s->scale);
    for (int64_t i = begin; i < end; i += VL) {
        int64_t n = end - i;
        vf p = v_load_n(ps + i, n), g = v_fma(decay, p, v_mul(scale, v_load_n(param->g + i, n)));
        if (bufs) {
            vf buf = v_fma(momentum, v_load_n(bufs + i, n), g);
            v_store_n(bufs + i, buf, n);
            g = s->nesterov ? v_fma(momentum, buf, g) : buf;
        }
        v_store_n(ps + i, v_fnma(lr, g, p), n);
    }
}

static void sgd_piece(const struct multi *multi, int64_t piece, const struct en_param *param, int64_t begin,
                      int64_t end) {
    (void)piece;
    if (param->p_type == EN_BF16)
        step_bf16(multi->context, param, begin, end, sgd_f32);
    else
        sgd_f32(multi->context, param, begin, end);
}

static en_status sgd_step(int64_t count, const struct en_param *params, const struct en_sgd *settings) {
    struct multi m = {.count = count, .params = params, .work = sgd_piece, .context = settings};
    return multi_run(&m);
}

#endif

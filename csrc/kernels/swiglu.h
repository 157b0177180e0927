/* SwiGLU: silu(gate)·up. */
#ifndef EN_SWIGLU_H
#define EN_SWIGLU_H

#include "elementwise.h"

WORD vf v_swiglu(vf gate, vf up) { return v_mul(v_silu(gate), up); }

static void swiglu_row(int64_t n, const float *gate, const float *up, float *y) { map2(n, gate, up, y, v_swiglu); }

static en_status swiglu(int64_t n, const float *gate, const float *up, float *y) {
    struct en_view gates = flat_view(n, gate), ups = flat_view(n, up);
    return elementwise(&gates, &ups, swiglu_row, GRAIN_EXP, y);
}

struct swiglu_backward {
    const float *g, *gate, *up;
    float *dgate, *dup;
};

/* dgate = g·up·silu'(gate), dup = g·silu(gate): one exponential for both. n lanes of VL at most. */
WORD void swiglu_backward_lanes(const struct swiglu_backward *p, int64_t i, int64_t n) {
    vf g = v_load_n(p->g + i, n), gate = v_load_n(p->gate + i, n), up = v_load_n(p->up + i, n);
    vf e = v_exp(v_neg(v_abs(gate))), s = v_sigmoid_of(gate, e);
    vf slope = v_mul(s, v_fma(gate, v_sigmoid_of(v_neg(gate), e), v_set(1.0f)));
    v_store_n(p->dgate + i, v_mul(v_mul(g, up), slope), n);
    v_store_n(p->dup + i, v_mul(g, v_mul(gate, s)), n);
}

static void swiglu_backward_range(void *context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += VL) swiglu_backward_lanes(context, i, end - i);
}

static en_status swiglu_backward(int64_t n, const float *g, const float *gate, const float *up, float *dgate,
                                 float *dup) {
    struct swiglu_backward p = {g, gate, up, dgate, dup};
    en_parallel_for(n, GRAIN_EXP, swiglu_backward_range, &p);
    return EN_OK;
}

#endif

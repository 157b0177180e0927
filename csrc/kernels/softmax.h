/* Softmax over rows of d. A row with NaN, with +Inf or of nothing but -Inf is NaN throughout, as its formula says. */
#ifndef EN_SOFTMAX_H
#define EN_SOFTMAX_H

#include <math.h>

#include "reduce.h"

struct softmax_rows {
    int64_t d;
    const float *x, *g; /* backward: x holds y */
    float *out;
};

WORD float row_max_as(enum en_dtype type, int64_t d, const void *x) {
    vf m = v_set(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= d; i += VL) m = v_max(load_as(type, x, i, VL), m);
    if (i < d) m = v_max(v_fill(load_as(type, x, i, d - i), d - i, -INFINITY), m);
    return v_hmax(m);
}

WORD float row_max(int64_t d, const float *x) { return row_max_as(EN_F32, d, x); }

static void softmax_range(void *context, int64_t begin, int64_t end) {
    const struct softmax_rows *s = context;
    int64_t d = s->d;
    for (int64_t row = begin; row < end; row++) {
        const float *x = s->x + row * d;
        float *y = s->out + row * d;
        vf m = v_set(row_max(d, x));
        vd total = vd_zero();
        int64_t i = 0;
        for (; i + VL <= d; i += VL) {
            vf e = v_exp(v_sub(v_load(x + i), m));
            total = vd_add(total, e);
            v_store(y + i, e);
        }
        if (i < d) {
            vf e = v_exp(v_sub(v_fill(v_load_n(x + i, d - i), d - i, -INFINITY), m));
            total = vd_add(total, e);
            v_store_n(y + i, e, d - i);
        }
        vf scale = v_set((float)(1 / vd_sum(total)));
        for (i = 0; i + VL <= d; i += VL) v_store(y + i, v_mul(v_load(y + i), scale));
        if (i < d) v_store_n(y + i, v_mul(v_load_n(y + i, d - i), scale), d - i);
    }
}

static en_status softmax(int64_t rows, int64_t d, const float *x, float *y) {
    struct softmax_rows s = {d, x, NULL, y};
    en_parallel_for(rows, row_grain(GRAIN_EXP, d), softmax_range, &s);
    return EN_OK;
}

/* dx = y·(g - sum(g·y)) */
static void softmax_backward_range(void *context, int64_t begin, int64_t end) {
    const struct softmax_rows *s = context;
    int64_t d = s->d;
    for (int64_t row = begin; row < end; row++) {
        const float *y = s->x + row * d, *g = s->g + row * d;
        float *dx = s->out + row * d;
        vf dot = v_set((float)vd_sum(add_product_to(vd_zero(), d, y, g)));
        int64_t i = 0;
        for (; i + VL <= d; i += VL) v_store(dx + i, v_mul(v_load(y + i), v_sub(v_load(g + i), dot)));
        if (i < d) v_store_n(dx + i, v_mul(v_load_n(y + i, d - i), v_sub(v_load_n(g + i, d - i), dot)), d - i);
    }
}

static en_status softmax_backward(int64_t rows, int64_t d, const float *y, const float *g, float *dx) {
    struct softmax_rows s = {d, y, g, dx};
    en_parallel_for(rows, row_grain(GRAIN, d), softmax_backward_range, &s);
    return EN_OK;
}

#endif

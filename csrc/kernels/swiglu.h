/* SwiGLU: h = silu(gate)·up over rows, and its gradient. */
#ifndef EN_SWIGLU_H
#define EN_SWIGLU_H

#include "activation.h"
#include "strided.h"

/* Columns that a task takes of a row: long rows are cut, so that few of them still busy all threads. */
enum { SWIGLU_COLUMNS = 1024 };

/* Elements [column, column + n) of a row: each operand's address. */
struct swiglu_piece {
    const void *gate, *up, *g;
    void *h, *dgate, *dup;
};

WORD struct swiglu_piece swiglu_at(enum en_dtype type, const struct en_swiglu *p, int64_t row, int64_t column) {
    int64_t dense = row * p->n + column;
    return (struct swiglu_piece){
        .gate = element(type, p->gate, row * p->gate_row + column),
        .up = element(type, p->up, row * p->up_row + column),
        .g = p->g ? element(type, p->g, dense) : NULL,
        .h = p->h ? element(type, p->h, dense) : NULL,
        .dgate = p->dgate ? element(type, p->dgate, row * p->dgate_row + column) : NULL,
        .dup = p->dup ? element(type, p->dup, row * p->dup_row + column) : NULL,
    };
}

/* The kernels below take k vectors from lane i on, the last one's first n lanes. */

WORD void swiglu_lanes(enum en_dtype type, const int k, const struct swiglu_piece *p, int64_t i, int64_t n) {
    vf gate[EXP_GROUP], e[EXP_GROUP];
#pragma GCC unroll 8
    for (int v = 0; v < k; v++) e[v] = v_neg(v_abs(gate[v] = load_as(type, p->gate, i + v * VL, n)));
    v_exp_each(k, e);
#pragma GCC unroll 8
    for (int v = 0; v < k; v++) {
        vf silu = v_mul(gate[v], v_sigmoid_of(gate[v], e[v]));
        store_as(type, p->h, i + v * VL, v_mul(silu, load_as(type, p->up, i + v * VL, n)), n);
    }
}

/* dgate = g·up·silu'(gate), dup = g·silu(gate), h again where it is wanted: one exponential for all. */
WORD void swiglu_backward_lanes(enum en_dtype type, const int k, const int with_h, const struct swiglu_piece *p,
                                int64_t i, int64_t n) {
    vf e[EXP_GROUP];
#pragma GCC unroll 8
    for (int v = 0; v < k; v++) e[v] = v_neg(v_abs(load_as(type, p->gate, i + v * VL, n)));
    v_exp_each(k, e);
#pragma GCC unroll 8
    for (int v = 0; v < k; v++) {
        int64_t at = i + v * VL;
        vf g = load_as(type, p->g, at, n), gate = load_as(type, p->gate, at, n), up = load_as(type, p->up, at, n);
        vf s = v_sigmoid_of(gate, e[v]), silu = v_mul(gate, s);
        vf slope = v_mul(s, v_fma(gate, v_sigmoid_of(v_neg(gate), e[v]), v_set(1.0f)));
        if (with_h) store_as(type, p->h, at, v_mul(silu, up), n);
        store_as(type, p->dgate, at, v_mul(v_mul(g, up), slope), n);
        store_as(type, p->dup, at, v_mul(g, silu), n);
    }
}

/* Index: row · pieces + piece of SWIGLU_COLUMNS columns. */
WORD void swiglu_pieces(enum en_dtype type, const struct en_swiglu *p, int64_t begin, int64_t end) {
    int64_t pieces = (p->n + SWIGLU_COLUMNS - 1) / SWIGLU_COLUMNS;
    for (int64_t task = begin; task < end; task++) {
        int64_t column = task % pieces * SWIGLU_COLUMNS, n = least(SWIGLU_COLUMNS, p->n - column), i = 0;
        struct swiglu_piece at = swiglu_at(type, p, task / pieces, column);
        for (; i + EXP_GROUP * VL <= n; i += EXP_GROUP * VL) swiglu_lanes(type, EXP_GROUP, &at, i, VL);
        for (; i < n; i += VL) swiglu_lanes(type, 1, &at, i, n - i);
    }
}

WORD void swiglu_backward_pieces(enum en_dtype type, const int with_h, const struct en_swiglu *p, int64_t begin,
                                 int64_t end) {
    int64_t pieces = (p->n + SWIGLU_COLUMNS - 1) / SWIGLU_COLUMNS;
    for (int64_t task = begin; task < end; task++) {
        int64_t column = task % pieces * SWIGLU_COLUMNS, n = least(SWIGLU_COLUMNS, p->n - column), i = 0;
        struct swiglu_piece at = swiglu_at(type, p, task / pieces, column);
        for (; i + EXP_GROUP * VL <= n; i += EXP_GROUP * VL) swiglu_backward_lanes(type, EXP_GROUP, with_h, &at, i, VL);
        for (; i < n; i += VL) swiglu_backward_lanes(type, 1, with_h, &at, i, n - i);
    }
}

static void swiglu_range(void *context, int64_t begin, int64_t end) {
    const struct en_swiglu *p = context;
    WITH_TYPE(p->type, swiglu_pieces, p, begin, end);
}

static void swiglu_backward_range(void *context, int64_t begin, int64_t end) {
    const struct en_swiglu *p = context;
    if (p->h)
        WITH_TYPE(p->type, swiglu_backward_pieces, 1, p, begin, end);
    else
        WITH_TYPE(p->type, swiglu_backward_pieces, 0, p, begin, end);
}

static en_status swiglu_over(const struct en_swiglu *p, en_range range) {
    int64_t pieces = (p->n + SWIGLU_COLUMNS - 1) / SWIGLU_COLUMNS;
    en_parallel_for(p->rows * pieces, row_grain(GRAIN_EXP, least(p->n, SWIGLU_COLUMNS)), range, (void *)p);
    return EN_OK;
}

static en_status swiglu(const struct en_swiglu *p) { return swiglu_over(p, swiglu_range); }
static en_status swiglu_backward(const struct en_swiglu *p) { return swiglu_over(p, swiglu_backward_range); }

#endif

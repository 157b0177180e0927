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

WORD void swiglu_lanes(enum en_dtype type, const struct swiglu_piece *p, int64_t i, int64_t n) {
    vf gate = load_as(type, p->gate, i, n), up = load_as(type, p->up, i, n);
    store_as(type, p->h, i, v_mul(v_silu(gate), up), n);
}

/* dgate = g·up·silu'(gate), dup = g·silu(gate), h again where it is wanted: one exponential for all. */
WORD void swiglu_backward_lanes(enum en_dtype type, const int with_h, const struct swiglu_piece *p, int64_t i,
                                int64_t n) {
    vf g = load_as(type, p->g, i, n), gate = load_as(type, p->gate, i, n), up = load_as(type, p->up, i, n);
    vf e = v_exp(v_neg(v_abs(gate))), s = v_sigmoid_of(gate, e), silu = v_mul(gate, s);
    vf slope = v_mul(s, v_fma(gate, v_sigmoid_of(v_neg(gate), e), v_set(1.0f)));
    if (with_h) store_as(type, p->h, i, v_mul(silu, up), n);
    store_as(type, p->dgate, i, v_mul(v_mul(g, up), slope), n);
    store_as(type, p->dup, i, v_mul(g, silu), n);
}

/* Index: row · pieces + piece of SWIGLU_COLUMNS columns. */
WORD void swiglu_pieces(enum en_dtype type, const struct en_swiglu *p, int64_t begin, int64_t end) {
    int64_t pieces = (p->n + SWIGLU_COLUMNS - 1) / SWIGLU_COLUMNS;
    for (int64_t task = begin; task < end; task++) {
        int64_t column = task % pieces * SWIGLU_COLUMNS, n = least(SWIGLU_COLUMNS, p->n - column), i = 0;
        struct swiglu_piece at = swiglu_at(type, p, task / pieces, column);
        for (; i + VL <= n; i += VL) swiglu_lanes(type, &at, i, VL);
        if (i < n) swiglu_lanes(type, &at, i, n - i);
    }
}

WORD void swiglu_backward_pieces(enum en_dtype type, const int with_h, const struct en_swiglu *p, int64_t begin,
                                 int64_t end) {
    int64_t pieces = (p->n + SWIGLU_COLUMNS - 1) / SWIGLU_COLUMNS;
    for (int64_t task = begin; task < end; task++) {
        int64_t column = task % pieces * SWIGLU_COLUMNS, n = least(SWIGLU_COLUMNS, p->n - column), i = 0;
        struct swiglu_piece at = swiglu_at(type, p, task / pieces, column);
        for (; i + VL <= n; i += VL) swiglu_backward_lanes(type, with_h, &at, i, VL);
        if (i < n) swiglu_backward_lanes(type, with_h, &at, i, n - i);
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

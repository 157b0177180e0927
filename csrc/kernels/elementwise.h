/* Copy, unary and binary operations: strided inputs of one shape, a contiguous output.
 *
 * Every operation is one function of contiguous rows; what is not contiguous is brought there a tile at a time. */
#ifndef EN_ELEMENTWISE_H
#define EN_ELEMENTWISE_H

#include <math.h>
#include <string.h>

#include "activation.h"
#include "strided.h"

/* y (n,) of a (n,) and, where the operation has two inputs, b (n,); y may be a or b. */
typedef void (*row_operation)(int64_t n, const float *a, const float *b, float *y);

struct elementwise {
    struct walk walk;
    row_operation row;
    float *y;
};

static void elementwise_range(void *context, int64_t begin, int64_t end) {
    const struct elementwise *e = context;
    const struct walk *w = &e->walk;
    int64_t stride_a = w->stride[0][w->ndim - 1], stride_b = w->stride[1][w->ndim - 1];
    float tile_a[TILE], tile_b[TILE];
    struct cursor c = walk_seek(w, begin);
    for (int64_t n; begin < end; begin += n) {
        n = walk_run(w, &c, least(TILE, end - begin));
        const float *a = contiguous(c.at[0], stride_a, n, tile_a);
        const float *b = w->inputs == 1 ? a : contiguous(c.at[1], stride_b, n, tile_b);
        e->row(n, a, b, e->y + begin);
        walk_advance(w, &c, n);
    }
}

static en_status elementwise(const struct en_view *a, const struct en_view *b, row_operation row, int64_t grain,
                             float *y) {
    struct elementwise e = {walk_of(a->data, b ? b->data : NULL), row, y};
    for (int i = 0; i < a->ndim; i++) walk_add(&e.walk, a->shape[i], a->stride[i], b ? b->stride[i] : 0);
    en_parallel_for(e.walk.size, grain, elementwise_range, &e);
    return EN_OK;
}

static inline struct en_view flat_view(int64_t n, const float *x) {
    return (struct en_view){.data = (float *)x, .ndim = 1, .shape = {n}, .stride = {1}};
}

/* ---- copy ---- */

static void copy_row(int64_t n, const float *x, const float *unused, float *y) {
    (void)unused;
    memcpy(y, x, (size_t)n * sizeof *y);
}

static en_status copy(const struct en_view *x, float *y) { return elementwise(x, NULL, copy_row, GRAIN, y); }

/* ---- unary ---- */

#define UNARY_ROW(name, f)                                                                \
    static void name##_row(int64_t n, const float *x, const float *unused, float *y) {    \
        (void)unused;                                                                     \
        map1(n, x, y, f);                                                                 \
    }                                                                                     \
    static void name##_backward_row(int64_t n, const float *x, const float *g, float *y) { \
        map2(n, x, g, y, f##_backward);                                                   \
    }
UNARY_ROW(neg, v_neg)
UNARY_ROW(exp, v_exp)
UNARY_ROW(log, v_log)
UNARY_ROW(relu, v_relu)
UNARY_ROW(gelu, v_gelu)
UNARY_ROW(gelu_tanh, v_gelu_tanh)
UNARY_ROW(silu, v_silu)

static const struct {
    row_operation forward, backward; /* backward: x, g -> dx */
    int64_t grain;
} unary_operations[EN_UNARY_COUNT] = {
    [EN_NEG] = {neg_row, neg_backward_row, GRAIN},
    [EN_EXP] = {exp_row, exp_backward_row, GRAIN_EXP},
    [EN_LOG] = {log_row, log_backward_row, GRAIN_EXP},
    [EN_RELU] = {relu_row, relu_backward_row, GRAIN},
    [EN_GELU] = {gelu_row, gelu_backward_row, GRAIN_EXP},
    [EN_GELU_TANH] = {gelu_tanh_row, gelu_tanh_backward_row, GRAIN_EXP},
    [EN_SILU] = {silu_row, silu_backward_row, GRAIN_EXP},
};

static en_status unary(enum en_unary op, const struct en_view *x, float *y) {
    return elementwise(x, NULL, unary_operations[op].forward, unary_operations[op].grain, y);
}

static en_status unary_backward(enum en_unary op, int64_t n, const float *x, const float *g, float *dx) {
    struct en_view xs = flat_view(n, x), gs = flat_view(n, g);
    return elementwise(&xs, &gs, unary_operations[op].backward, unary_operations[op].grain, dx);
}

/* ---- binary ---- */

static void add_row(int64_t n, const float *a, const float *b, float *y) { map2(n, a, b, y, v_add); }
static void sub_row(int64_t n, const float *a, const float *b, float *y) { map2(n, a, b, y, v_sub); }
static void mul_row(int64_t n, const float *a, const float *b, float *y) { map2(n, a, b, y, v_mul); }
static void div_row(int64_t n, const float *a, const float *b, float *y) { map2(n, a, b, y, v_div); }
static void pow_row(int64_t n, const float *a, const float *b, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] = powf(a[i], b[i]); /* the C library's: right within 1 ulp at every corner */
}

static const struct {
    row_operation row;
    int64_t grain;
} binary_operations[EN_BINARY_COUNT] = {
    [EN_ADD] = {add_row, GRAIN}, [EN_SUB] = {sub_row, GRAIN},     [EN_MUL] = {mul_row, GRAIN},
    [EN_DIV] = {div_row, GRAIN}, [EN_POW] = {pow_row, GRAIN_EXP},
};

static en_status binary(enum en_binary op, const struct en_view *a, const struct en_view *b, float *y) {
    return elementwise(a, b, binary_operations[op].row, binary_operations[op].grain, y);
}

static en_status add_inplace(int64_t n, float *x, const float *y) {
    struct en_view xs = flat_view(n, x), ys = flat_view(n, y);
    return elementwise(&xs, &ys, add_row, GRAIN, x);
}

static en_status scale_inplace(int64_t n, float *x, float s) {
    struct en_view xs = flat_view(n, x), factor = {.data = &s, .ndim = 1, .shape = {n}, .stride = {0}};
    return elementwise(&xs, &factor, mul_row, GRAIN, x);
}

#endif

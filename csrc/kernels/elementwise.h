/* Copy and cast, unary and binary operations: strided inputs of one shape, a contiguous output.
 *
 * Every operation is one function of contiguous rows of f32; what is strided or narrow is brought there a tile at a
 * time, and rounded once on its way out. */
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
    enum en_dtype type[2], y_type;
    row_operation row;
    void *y;
};

static void elementwise_range(void *context, int64_t begin, int64_t end) {
    const struct elementwise *e = context;
    const struct walk *w = &e->walk;
    int64_t stride_a = w->stride[0][w->ndim - 1], stride_b = w->stride[1][w->ndim - 1];
    float tile_a[TILE], tile_b[TILE];
    struct cursor c = walk_seek(w, begin);
    for (int64_t n; begin < end; begin += n) {
        n = walk_run(w, &c, least(TILE, end - begin));
        void *y = element(e->y_type, e->y, begin);
        const float *a = as_floats(e->type[0], c.at[0], stride_a, n, tile_a);
        const float *b = w->inputs == 1 ? a : as_floats(e->type[1], c.at[1], stride_b, n, tile_b);
        if (e->y_type == EN_F32) {
            e->row(n, a, b, y);
        } else {
            e->row(n, a, b, tile_a);
            narrow_row(e->y_type, n, tile_a, y);
        }
        walk_advance(w, &c, n);
    }
}

static struct elementwise elementwise_of(const struct en_view *a, const struct en_view *b, row_operation row,
                                         enum en_dtype y_type, void *y) {
    struct elementwise e = {walk_of(a->data, b ? b->data : NULL), {a->type, b ? b->type : a->type}, y_type, row, y};
    for (int i = 0; i < a->ndim; i++)
        walk_add(&e.walk, a->shape[i], a->stride[i] * type_size(a->type), b ? b->stride[i] * type_size(b->type) : 0);
    return e;
}

/* y has a's type */
static en_status elementwise(const struct en_view *a, const struct en_view *b, row_operation row, int64_t grain,
                             void *y) {
    struct elementwise e = elementwise_of(a, b, row, a->type, y);
    en_parallel_for(e.walk.size, grain, elementwise_range, &e);
    return EN_OK;
}

static inline struct en_view flat_view(enum en_dtype type, int64_t n, const void *x) {
    return (struct en_view){.data = (void *)x, .type = type, .ndim = 1, .shape = {n}, .stride = {1}};
}

/* ---- copy and cast ---- */

/* n elements, a stride in bytes apart, to contiguous ones of y_type; through f32 where the types differ. */
static void copy_row(enum en_dtype type, const char *x, int64_t stride, int64_t n, enum en_dtype y_type, void *y) {
    float tile[TILE];
    if (type == y_type && stride == type_size(type)) {
        memcpy(y, x, (size_t)(n * stride));
    } else if (y_type != EN_F32 && type == y_type) {
        for (int64_t i = 0; i < n; i++) ((uint16_t *)y)[i] = *(const uint16_t *)(x + i * stride);
    } else if (y_type == EN_F32) {
        as_floats(type, x, stride, n, y);
    } else {
        narrow_row(y_type, n, as_floats(type, x, stride, n, tile), y);
    }
}

static void copy_range(void *context, int64_t begin, int64_t end) {
    const struct elementwise *e = context;
    const struct walk *w = &e->walk;
    struct cursor c = walk_seek(w, begin);
    for (int64_t n; begin < end; begin += n) {
        n = walk_run(w, &c, least(TILE, end - begin));
        copy_row(e->type[0], c.at[0], w->stride[0][w->ndim - 1], n, e->y_type, element(e->y_type, e->y, begin));
        walk_advance(w, &c, n);
    }
}

static en_status copy(const struct en_view *x, enum en_dtype type, void *y) {
    struct elementwise e = elementwise_of(x, NULL, NULL, type, y);
    en_parallel_for(e.walk.size, GRAIN, copy_range, &e);
    return EN_OK;
}

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

static en_status unary(enum en_unary op, const struct en_view *x, void *y) {
    return elementwise(x, NULL, unary_operations[op].forward, unary_operations[op].grain, y);
}

static en_status unary_backward(enum en_unary op, enum en_dtype type, int64_t n, const void *x, const void *g,
                                void *dx) {
    struct en_view xs = flat_view(type, n, x), gs = flat_view(type, n, g);
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

static en_status binary(enum en_binary op, const struct en_view *a, const struct en_view *b, void *y) {
    return elementwise(a, b, binary_operations[op].row, binary_operations[op].grain, y);
}

static en_status add_inplace(enum en_dtype type, int64_t n, void *x, const void *y) {
    struct en_view xs = flat_view(type, n, x), ys = flat_view(type, n, y);
    return elementwise(&xs, &ys, add_row, GRAIN, x);
}

static en_status scale_inplace(enum en_dtype type, int64_t n, void *x, float s) {
    struct en_view xs = flat_view(type, n, x);
    struct en_view factor = {.data = &s, .type = EN_F32, .ndim = 1, .shape = {n}, .stride = {0}};
    return elementwise(&xs, &factor, mul_row, GRAIN, x);
}

#endif

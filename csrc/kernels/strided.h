/* Walking strided arrays in the order of a contiguous output, and rows of vectors.
 *
 * A walk holds up to two inputs of one shape, its dimensions merged where that is possible, so that a contiguous array
 * is one row. A cursor stands at one element of it. */
#ifndef EN_STRIDED_H
#define EN_STRIDED_H

#include "convert.h"

/* Elements that make a second thread worth waking: for plain arithmetic, and where each takes an exponential. */
enum { GRAIN = 32768, GRAIN_EXP = 8192 };

/* Longest run copied from a strided row into a contiguous tile (two tiles stay in L1). */
enum { TILE = 1024 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Rows of d elements for which en_parallel_for should wake a thread. */
static inline int64_t row_grain(int64_t grain, int64_t d) { return d >= grain ? 1 : grain / (d > 0 ? d : 1); }

struct walk {
    int inputs;
    const char *data[2]; /* of one input, twice the same */
    int ndim;
    int64_t size;
    int64_t shape[EN_MAX_DIMS];
    int64_t stride[2][EN_MAX_DIMS]; /* in bytes, so that the inputs may be of two types */
};

/* No dimension yet: one element. b may be NULL. */
static inline struct walk walk_of(const void *a, const void *b) {
    return (struct walk){.inputs = b ? 2 : 1, .data = {a, b ? b : a}, .ndim = 1, .size = 1, .shape = {1}};
}

/* Appends a dimension, inside the earlier ones; strides in bytes. */
static inline void walk_add(struct walk *w, int64_t shape, int64_t stride_a, int64_t stride_b) {
    int last = w->ndim - 1;
    w->size *= shape;
    if (shape == 1) return;
    int joins = w->stride[0][last] == stride_a * shape && w->stride[1][last] == stride_b * shape;
    if (w->shape[last] == 1)
        w->shape[last] = shape;
    else if (joins)
        w->shape[last] *= shape;
    else
        w->shape[last = w->ndim++] = shape;
    w->stride[0][last] = stride_a;
    w->stride[1][last] = stride_b;
}

struct cursor {
    const char *at[2];
    int64_t index[EN_MAX_DIMS];
};

static inline struct cursor walk_seek(const struct walk *w, int64_t flat) {
    struct cursor c = {.at = {w->data[0], w->data[1]}};
    for (int i = w->ndim - 1; i >= 0; i--) {
        int64_t q = flat / w->shape[i], k = flat - q * w->shape[i];
        c.index[i] = k;
        c.at[0] += k * w->stride[0][i];
        c.at[1] += k * w->stride[1][i];
        flat = q;
    }
    return c;
}

/* Elements from the cursor to the end of its row, at most `limit`. */
static inline int64_t walk_run(const struct walk *w, const struct cursor *c, int64_t limit) {
    return least(limit, w->shape[w->ndim - 1] - c->index[w->ndim - 1]);
}

/* Moves on by n elements, n within walk_run. */
static inline void walk_advance(const struct walk *w, struct cursor *c, int64_t n) {
    for (int i = w->ndim - 1;; i--, n = 1) {
        c->index[i] += n;
        c->at[0] += n * w->stride[0][i];
        c->at[1] += n * w->stride[1][i];
        if (i == 0 || c->index[i] < w->shape[i]) return;
        c->at[0] -= w->shape[i] * w->stride[0][i];
        c->at[1] -= w->shape[i] * w->stride[1][i];
        c->index[i] = 0;
    }
}

/* n elements, a stride in bytes apart, as contiguous floats: the row itself, or a copy in `tile`. */
static inline const float *as_floats(enum en_dtype type, const void *x, int64_t stride, int64_t n, float *tile) {
    if (stride == type_size(type)) {
        if (type == EN_F32) return x;
        widen_row(type, n, x, tile);
        return tile;
    }
    const char *p = x;
    if (type == EN_F32)
        for (int64_t i = 0; i < n; i++) tile[i] = *(const float *)(p + i * stride);
    else
        for (int64_t i = 0; i < n; i++) widen_row(type, 1, (const uint16_t *)(p + i * stride), tile + i);
    return tile;
}

/* The first n lanes of a, `fill` in the others. */
WORD vf v_fill(vf a, int64_t n, float fill) {
    float lanes[VL];
    v_store(lanes, a);
    for (int64_t i = n; i < VL; i++) lanes[i] = fill;
    return v_load(lanes);
}

/* y[i] = f(x[i]); y may be x. */
WORD void map1(int64_t n, const float *x, float *y, vf (*f)(vf)) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(y + i, f(v_load(x + i)));
    if (i < n) v_store_n(y + i, f(v_load_n(x + i, n - i)), n - i);
}

/* y[i] = f(a[i], b[i]); y may be a or b. */
WORD void map2(int64_t n, const float *a, const float *b, float *y, vf (*f)(vf, vf)) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(y + i, f(v_load(a + i), v_load(b + i)));
    if (i < n) v_store_n(y + i, f(v_load_n(a + i, n - i), v_load_n(b + i, n - i)), n - i);
}

#endif

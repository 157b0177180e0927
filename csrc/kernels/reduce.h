/* Sums over any set of dimensions, accumulated in double, and whether an array is finite throughout.
 *
 * What is added to what, in which order, depends on the shape alone: a long reduction is cut into pieces of
 * REDUCE_PIECE elements, whatever the number of threads. */
#ifndef EN_REDUCE_H
#define EN_REDUCE_H

#include "strided.h"

enum { REDUCE_PIECE = 65536, REDUCE_COLUMNS = 128 };

/* acc += x (n,) */
WORD vd add_row_to(vd acc, int64_t n, const float *x) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) acc = vd_add(acc, v_load(x + i));
    return i < n ? vd_add(acc, v_load_n(x + i, n - i)) : acc;
}

/* acc += a·b, elementwise (n,) */
WORD vd add_product_to(vd acc, int64_t n, const float *a, const float *b) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) acc = vd_fma(acc, v_load(a + i), v_load(b + i));
    return i < n ? vd_fma(acc, v_load_n(a + i, n - i), v_load_n(b + i, n - i)) : acc;
}

/* ---- sum ---- */

struct reduction {
    enum en_dtype type;
    struct walk kept, reduced; /* of one array: the data pointer of `reduced` is replaced by each output's own */
    int64_t pieces;            /* of every output */
    double *partial;           /* (outputs, pieces) where pieces > 1 */
    float *y;
};

/* Index: output · pieces + piece. */
static void sum_by_rows(void *context, int64_t begin, int64_t end) {
    const struct reduction *r = context;
    struct walk w = r->reduced;
    int64_t stride = w.stride[0][w.ndim - 1];
    float tile[TILE];
    for (int64_t i = begin; i < end; i++) {
        int64_t output = i / r->pieces, at = i % r->pieces * REDUCE_PIECE, stop = least(at + REDUCE_PIECE, w.size);
        w.data[0] = w.data[1] = walk_seek(&r->kept, output).at[0];
        struct cursor c = walk_seek(&w, at);
        vd acc = vd_zero();
        for (int64_t n; at < stop; at += n) {
            n = walk_run(&w, &c, least(TILE, stop - at));
            acc = add_row_to(acc, n, as_floats(r->type, c.at[0], stride, n, tile));
            walk_advance(&w, &c, n);
        }
        if (r->pieces == 1)
            r->y[i] = (float)vd_sum(acc);
        else
            r->partial[i] = vd_sum(acc);
    }
}

/* Outputs that lie side by side in memory: a block of columns at a time. Index: block of REDUCE_COLUMNS outputs. */
static void sum_by_columns(void *context, int64_t begin, int64_t end) {
    const struct reduction *r = context;
    struct walk w = r->reduced;
    int64_t stride = w.stride[0][w.ndim - 1], at = begin * REDUCE_COLUMNS;
    int64_t stop = least(end * REDUCE_COLUMNS, r->kept.size);
    struct cursor out = walk_seek(&r->kept, at);
    for (int64_t columns; at < stop; at += columns) {
        columns = walk_run(&r->kept, &out, least(REDUCE_COLUMNS, stop - at));
        double acc[REDUCE_COLUMNS] = {0};
        float tile[REDUCE_COLUMNS];
        w.data[0] = w.data[1] = out.at[0];
        struct cursor c = walk_seek(&w, 0);
        for (int64_t done = 0, n; done < w.size; done += n) {
            n = walk_run(&w, &c, w.size);
            for (int64_t i = 0; i < n; i++) {
                const float *x = as_floats(r->type, c.at[0] + i * stride, type_size(r->type), columns, tile);
                for (int64_t j = 0; j < columns; j++) acc[j] += x[j];
            }
            walk_advance(&w, &c, n);
        }
        for (int64_t j = 0; j < columns; j++) r->y[at + j] = (float)acc[j];
        walk_advance(&r->kept, &out, columns);
    }
}

/* y: contiguous over the dimensions whose bit in `axes` is clear. The sum of nothing is 0. */
static en_status sum(const struct en_view *x, uint32_t axes, float *y) {
    struct reduction r = {x->type, walk_of(x->data, NULL), walk_of(x->data, NULL), 1, NULL, y};
    int64_t size = type_size(x->type);
    for (int i = 0; i < x->ndim; i++)
        walk_add(axes >> i & 1 ? &r.reduced : &r.kept, x->shape[i], x->stride[i] * size, x->stride[i] * size);
    if (r.reduced.size == 0) {
        for (int64_t i = 0; i < r.kept.size; i++) y[i] = 0;
        return EN_OK;
    }
    int64_t kept_stride = r.kept.stride[0][r.kept.ndim - 1], reduced_stride = r.reduced.stride[0][r.reduced.ndim - 1];
    if (kept_stride == size && reduced_stride != size && r.reduced.size > 1) {
        int64_t blocks = (r.kept.size + REDUCE_COLUMNS - 1) / REDUCE_COLUMNS;
        en_parallel_for(blocks, row_grain(GRAIN, r.reduced.size * REDUCE_COLUMNS), sum_by_columns, &r);
        return EN_OK;
    }
    r.pieces = (r.reduced.size + REDUCE_PIECE - 1) / REDUCE_PIECE;
    if (r.pieces > 1) {
        r.partial = en_scratch(EN_SCRATCH_A, (size_t)(r.kept.size * r.pieces) * sizeof *r.partial);
        if (!r.partial) return EN_NO_MEMORY;
    }
    int64_t piece = least(r.reduced.size, REDUCE_PIECE);
    en_parallel_for(r.kept.size * r.pieces, row_grain(GRAIN, piece), sum_by_rows, &r);
    for (int64_t i = 0; r.pieces > 1 && i < r.kept.size; i++) {
        double total = 0;
        for (int64_t k = 0; k < r.pieces; k++) total += r.partial[i * r.pieces + k];
        y[i] = (float)total;
    }
    return EN_OK;
}

/* ---- is a whole contiguous array finite? ---- */

struct pieces {
    int64_t n;
    const float *x;
    char *odd; /* of each piece */
};

/* 0 in every lane that met only finite numbers: x - x is NaN for the others. */
static void finite_pieces(void *context, int64_t begin, int64_t end) {
    const struct pieces *p = context;
    for (int64_t i = begin; i < end; i++) {
        const float *x = p->x + i * REDUCE_PIECE;
        int64_t n = least(REDUCE_PIECE, p->n - i * REDUCE_PIECE), k = 0;
        vf odd = v_zero();
        for (; k + VL <= n; k += VL) odd = v_add(odd, v_sub(v_load(x + k), v_load(x + k)));
        if (k < n) odd = v_add(odd, v_sub(v_load_n(x + k, n - k), v_load_n(x + k, n - k)));
        p->odd[i] = v_any(v_nan(odd)) != 0;
    }
}

static en_status all_finite(int64_t n, const float *x, int *result) {
    int64_t count = (n + REDUCE_PIECE - 1) / REDUCE_PIECE;
    struct pieces p = {n, x, en_scratch(EN_SCRATCH_A, (size_t)count + 1)};
    if (!p.odd) return EN_NO_MEMORY;
    en_parallel_for(count, 1, finite_pieces, &p);
    *result = 1;
    for (int64_t i = 0; i < count; i++) *result &= !p.odd[i];
    return EN_OK;
}

#endif

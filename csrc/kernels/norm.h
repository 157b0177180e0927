/* RMSNorm and LayerNorm over rows of d. Means and sums are taken in double; weight gradients add up a column's rows in
 * their order, a block of columns at a time. */
#ifndef EN_NORM_H
#define EN_NORM_H

#include <math.h>

#include "reduce.h"

enum { NORM_COLUMNS = 64 };

struct norm {
    int64_t rows, d;
    enum en_dtype type; /* of x, g and y; LayerNorm's are f32 */
    double eps;
    const void *x, *g;
    const float *w, *b;
    void *y; /* backward: dx */
    float *mean, *rstd;
    float *dw, *db;
    void *normed; /* RMSNorm's backward: the forward's y again, or NULL */
};

static void norm_rows(const struct norm *p, int64_t grain, en_range rows) {
    en_parallel_for(p->rows, row_grain(grain, p->d), rows, (void *)p);
}

static void norm_columns(const struct norm *p, en_range columns) {
    int64_t blocks = (p->d + NORM_COLUMNS - 1) / NORM_COLUMNS;
    en_parallel_for(blocks, row_grain(GRAIN, p->rows * NORM_COLUMNS), columns, (void *)p);
}

/* ---- RMSNorm: y = x·rstd·w, rstd = 1 / √(mean(x²) + eps) ---- */

WORD vf rms_normed(vf x, vf rstd, vf w) { return v_mul(v_mul(x, rstd), w); }

WORD double row_square(enum en_dtype type, int64_t d, const void *x) {
    vd acc = vd_zero();
    int64_t i = 0;
    for (; i + VL <= d; i += VL) {
        vf a = load_as(type, x, i, VL);
        acc = vd_fma(acc, a, a);
    }
    if (i < d) {
        vf a = load_as(type, x, i, d - i);
        acc = vd_fma(acc, a, a);
    }
    return vd_sum(acc);
}

WORD void rms_norm_rows(enum en_dtype type, const struct norm *p, int64_t begin, int64_t end) {
    int64_t d = p->d;
    for (int64_t row = begin; row < end; row++) {
        const void *x = element(type, p->x, row * d);
        void *y = element(type, p->y, row * d);
        double square = row_square(type, d, x) / (double)d;
        p->rstd[row] = (float)(1 / sqrt(square + p->eps));
        vf rstd = v_set(p->rstd[row]);
        int64_t i = 0;
        for (; i + VL <= d; i += VL)
            store_as(type, y, i, rms_normed(load_as(type, x, i, VL), rstd, v_load(p->w + i)), VL);
        if (i < d)
            store_as(type, y, i, rms_normed(load_as(type, x, i, d - i), rstd, v_load_n(p->w + i, d - i)), d - i);
    }
}

static void rms_norm_range(void *context, int64_t begin, int64_t end) {
    const struct norm *p = context;
    WITH_TYPE(p->type, rms_norm_rows, p, begin, end);
}

static en_status rms_norm(enum en_dtype type, int64_t rows, int64_t d, const void *x, const float *w, double eps,
                          void *y, float *rstd) {
    struct norm p = {.rows = rows, .d = d, .type = type, .eps = eps, .x = x, .w = w, .y = y, .rstd = rstd};
    norm_rows(&p, GRAIN, rms_norm_range);
    return EN_OK;
}

struct rms_norm_row {
    const void *x, *g;
    const float *w;
    void *dx, *normed;
    vf rstd, pull;
};

/* g·w and n at lanes [i, i + n) */
WORD vf rms_norm_gw(enum en_dtype type, const struct rms_norm_row *r, int64_t i, int64_t n) {
    return v_mul(load_as(type, r->g, i, n), load_as(EN_F32, r->w, i, n));
}
WORD vf rms_norm_n(enum en_dtype type, const struct rms_norm_row *r, int64_t i, int64_t n) {
    return v_mul(load_as(type, r->x, i, n), r->rstd);
}

WORD void rms_norm_dx_lanes(enum en_dtype type, const int normed, const struct rms_norm_row *r, int64_t i, int64_t n) {
    vf gw = rms_norm_gw(type, r, i, n), along = rms_norm_n(type, r, i, n);
    store_as(type, r->dx, i, v_mul(r->rstd, v_fnma(along, r->pull, gw)), n);
    if (normed) store_as(type, r->normed, i, v_mul(along, load_as(EN_F32, r->w, i, n)), n);
}

/* dx = rstd·(g·w - n·mean(g·w·n)), n = x·rstd; normed = n·w */
WORD void rms_norm_dx_rows(enum en_dtype type, const int normed, const struct norm *p, int64_t begin, int64_t end) {
    int64_t d = p->d;
    for (int64_t row = begin; row < end; row++) {
        struct rms_norm_row r = {.x = element(type, p->x, row * d), .g = element(type, p->g, row * d), .w = p->w};
        r.dx = element(type, p->y, row * d);
        r.normed = normed ? element(type, p->normed, row * d) : NULL;
        r.rstd = v_set(p->rstd[row]);
        vd along = vd_zero();
        int64_t i = 0;
        for (; i + VL <= d; i += VL) along = vd_fma(along, rms_norm_gw(type, &r, i, VL), rms_norm_n(type, &r, i, VL));
        if (i < d) along = vd_fma(along, rms_norm_gw(type, &r, i, d - i), rms_norm_n(type, &r, i, d - i));
        r.pull = v_set((float)(vd_sum(along) / (double)d));
        for (i = 0; i + VL <= d; i += VL) rms_norm_dx_lanes(type, normed, &r, i, VL);
        if (i < d) rms_norm_dx_lanes(type, normed, &r, i, d - i);
    }
}

static void rms_norm_dx(void *context, int64_t begin, int64_t end) {
    const struct norm *p = context;
    if (p->normed)
        WITH_TYPE(p->type, rms_norm_dx_rows, 1, p, begin, end);
    else
        WITH_TYPE(p->type, rms_norm_dx_rows, 0, p, begin, end);
}

/* dw = sum over rows of g·x·rstd. Index: block of NORM_COLUMNS columns. */
static void rms_norm_dw(void *context, int64_t begin, int64_t end) {
    const struct norm *p = context;
    int64_t size = type_size(p->type);
    float tile_x[NORM_COLUMNS], tile_g[NORM_COLUMNS];
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * NORM_COLUMNS, n = least(NORM_COLUMNS, p->d - first);
        double acc[NORM_COLUMNS] = {0};
        for (int64_t row = 0; row < p->rows; row++) {
            int64_t at = row * p->d + first;
            const float *x = as_floats(p->type, element(p->type, p->x, at), size, n, tile_x);
            const float *g = as_floats(p->type, element(p->type, p->g, at), size, n, tile_g);
            double r = p->rstd[row];
            for (int64_t j = 0; j < n; j++) acc[j] += (double)g[j] * x[j] * r;
        }
        for (int64_t j = 0; j < n; j++) p->dw[first + j] = (float)acc[j];
    }
}

static en_status rms_norm_backward(enum en_dtype type, int64_t rows, int64_t d, const void *g, const void *x,
                                   const float *w, const float *rstd, void *dx, float *dw, void *normed) {
    struct norm p = {.rows = rows, .d = d, .type = type, .x = x, .w = w, .g = g, .y = dx, .rstd = (float *)rstd,
                     .dw = dw, .normed = normed};
    norm_rows(&p, GRAIN, rms_norm_dx);
    if (dw) norm_columns(&p, rms_norm_dw);
    return EN_OK;
}

/* ---- LayerNorm: y = n·w + b, n = (x - mean)·rstd ---- */

/* The mean is carried in two floats: x - mean is then right even where the mean is large against the deviation. */
static void layer_norm_range(void *context, int64_t begin, int64_t end) {
    const struct norm *p = context;
    int64_t d = p->d;
    for (int64_t row = begin; row < end; row++) {
        const float *x = (const float *)p->x + row * d;
        float *y = (float *)p->y + row * d;
        double mean = vd_sum(add_row_to(vd_zero(), d, x)) / (double)d;
        p->mean[row] = (float)mean;
        vf high = v_set(p->mean[row]), low = v_set((float)(mean - p->mean[row]));
        vd acc = vd_zero();
        int64_t i = 0;
        for (; i + VL <= d; i += VL) {
            vf c = v_sub(v_sub(v_load(x + i), high), low);
            v_store(y + i, c);
            acc = vd_fma(acc, c, c);
        }
        if (i < d) {
            vf c = v_sub(v_sub(v_fill(v_load_n(x + i, d - i), d - i, p->mean[row]), high), low);
            v_store_n(y + i, c, d - i);
            c = v_load_n(y + i, d - i);
            acc = vd_fma(acc, c, c);
        }
        p->rstd[row] = (float)(1 / sqrt(vd_sum(acc) / (double)d + p->eps));
        vf rstd = v_set(p->rstd[row]);
        for (i = 0; i + VL <= d; i += VL)
            v_store(y + i, v_fma(v_mul(v_load(y + i), rstd), v_load(p->w + i), v_load(p->b + i)));
        if (i < d) {
            vf n = v_mul(v_load_n(y + i, d - i), rstd);
            v_store_n(y + i, v_fma(n, v_load_n(p->w + i, d - i), v_load_n(p->b + i, d - i)), d - i);
        }
    }
}

static en_status layer_norm(int64_t rows, int64_t d, const float *x, const float *w, const float *b, double eps,
                            float *y, float *mean, float *rstd) {
    struct norm p = {.rows = rows, .d = d, .eps = eps, .x = x, .w = w, .b = b, .y = y, .mean = mean, .rstd = rstd};
    norm_rows(&p, GRAIN, layer_norm_range);
    return EN_OK;
}

/* dx = rstd·(g·w - mean(g·w) - n·mean(g·w·n)) */
static void layer_norm_dx(void *context, int64_t begin, int64_t end) {
    const struct norm *p = context;
    int64_t d = p->d;
    for (int64_t row = begin; row < end; row++) {
        const float *x = (const float *)p->x + row * d, *g = (const float *)p->g + row * d;
        float *dx = (float *)p->y + row * d;
        vf mean = v_set(p->mean[row]), rstd = v_set(p->rstd[row]);
        vd plain = vd_zero(), along = vd_zero();
        int64_t i = 0;
        for (; i + VL <= d; i += VL) {
            vf gw = v_mul(v_load(g + i), v_load(p->w + i));
            plain = vd_add(plain, gw);
            along = vd_fma(along, gw, v_mul(v_sub(v_load(x + i), mean), rstd));
        }
        if (i < d) {
            vf gw = v_mul(v_load_n(g + i, d - i), v_load_n(p->w + i, d - i));
            plain = vd_add(plain, gw);
            along = vd_fma(along, gw, v_mul(v_sub(v_fill(v_load_n(x + i, d - i), d - i, p->mean[row]), mean), rstd));
        }
        vf shift = v_set((float)(vd_sum(plain) / (double)d)), pull = v_set((float)(vd_sum(along) / (double)d));
        for (i = 0; i + VL <= d; i += VL) {
            vf gw = v_mul(v_load(g + i), v_load(p->w + i)), n = v_mul(v_sub(v_load(x + i), mean), rstd);
            v_store(dx + i, v_mul(rstd, v_fnma(n, pull, v_sub(gw, shift))));
        }
        if (i < d) {
            vf gw = v_mul(v_load_n(g + i, d - i), v_load_n(p->w + i, d - i));
            vf n = v_mul(v_sub(v_load_n(x + i, d - i), mean), rstd);
            v_store_n(dx + i, v_mul(rstd, v_fnma(n, pull, v_sub(gw, shift))), d - i);
        }
    }
}

/* dw = sum over rows of g·n, db of g. Index: block of NORM_COLUMNS columns. */
static void layer_norm_dw(void *context, int64_t begin, int64_t end) {
    const struct norm *p = context;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * NORM_COLUMNS, n = least(NORM_COLUMNS, p->d - first);
        double dw[NORM_COLUMNS] = {0}, db[NORM_COLUMNS] = {0};
        for (int64_t row = 0; row < p->rows; row++) {
            const float *x = (const float *)p->x + row * p->d + first, *g = (const float *)p->g + row * p->d + first;
            double mean = p->mean[row], rstd = p->rstd[row];
            for (int64_t j = 0; j < n; j++) {
                dw[j] += g[j] * ((x[j] - mean) * rstd);
                db[j] += g[j];
            }
        }
        for (int64_t j = 0; j < n; j++) {
            p->dw[first + j] = (float)dw[j];
            p->db[first + j] = (float)db[j];
        }
    }
}

static en_status layer_norm_backward(int64_t rows, int64_t d, const float *g, const float *x, const float *w,
                                     const float *mean, const float *rstd, float *dx, float *dw, float *db) {
    struct norm p = {.rows = rows, .d = d, .x = x, .w = w, .g = g, .y = dx, .dw = dw, .db = db};
    p.mean = (float *)mean;
    p.rstd = (float *)rstd;
    norm_rows(&p, GRAIN, layer_norm_dx);
    norm_columns(&p, layer_norm_dw);
    return EN_OK;
}

#endif

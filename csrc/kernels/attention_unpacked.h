/* Attention in f32 as gemm.h's products of whole blocks, with K and V read where they lie: the bits of AVX2, which the
 * quickstart's base was made with.
 */
#ifndef EN_ATTENTION_UNPACKED_H
#define EN_ATTENTION_UNPACKED_H

#include <math.h>
#include <string.h>

#include "gemm.h"
#include "reduce.h"
#include "softmax.h"

enum {
    UNPACKED_ROWS = 128,  /* rows of a block of queries, about */
    UNPACKED_KEYS = 256,  /* keys of a block */
    UNPACKED_PIECE = 512, /* one query: keys of a piece that a thread sums alone */
};

static inline int64_t unpacked_attention_group(const struct en_attention *p) { return p->h / p->hkv; }

static inline int64_t unpacked_attention_queries(const struct en_attention *p) {
    return max64(1, min64(p->t, UNPACKED_ROWS / unpacked_attention_group(p)));
}

/* Keys [lo, hi) that query t of batch b sees. */
static inline void unpacked_attention_range(const struct en_attention *p, int64_t b, int64_t t, int64_t *lo, int64_t *hi) {
    const int64_t position = t + p->s - p->t;
    *hi = p->causal ? position + 1 : p->s;
    *lo = p->window > 0 ? max64(0, position - p->window + 1) : 0;
    if (p->starts) *lo = max64(*lo, p->starts[b * p->t + t]);
}

/* Keys that any query of [t0, t1) sees. */
static void unpacked_attention_span(const struct en_attention *p, int64_t b, int64_t t0, int64_t t1, int64_t *s0, int64_t *s1) {
    unpacked_attention_range(p, b, t0, s0, s1);
    for (int64_t t = t0 + 1; t < t1; t++) {
        int64_t lo, hi;
        unpacked_attention_range(p, b, t, &lo, &hi);
        *s0 = min64(*s0, lo);
        *s1 = max64(*s1, hi);
    }
}

/* Rows (t, head of the group) of x (b,t,h,d) times factor, to y (rows,d) contiguous. */
static void gather_rows(const struct en_attention *p, struct en_heads x, int64_t b, int64_t kv, int64_t t0, int64_t t1,
                        float factor, float *y) {
    const int64_t width = unpacked_attention_group(p) * p->d;
    for (int64_t t = t0; t < t1; t++, y += width) {
        const float *from = (const float *)x.data + b * x.batch + t * x.token + kv * width;
        for (int64_t i = 0; i < width; i++) y[i] = from[i] * factor;
    }
}

/* The inverse: rows y to x. */
static void scatter_rows(const struct en_attention *p, const float *y, int64_t b, int64_t kv, int64_t t0, int64_t t1,
                         float factor, struct en_heads x) {
    const int64_t width = unpacked_attention_group(p) * p->d;
    for (int64_t t = t0; t < t1; t++, y += width) {
        float *to = (float *)x.data + b * x.batch + t * x.token + kv * width;
        for (int64_t i = 0; i < width; i++) to[i] = y[i] * factor;
    }
}

/* c (m,n) = or += a (m,k) · b (k,n), with strides (row, column) of a and b */
static en_status product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                         int64_t b_row, int64_t b_col, float *c, int64_t c_row, int accumulate) {
    const struct en_gemm p = {.m = m, .n = n, .terms = 1, .c = c, .c_row = c_row, .accumulate = accumulate,
                              .term = {{.k = k, .n = n, .a = a, .a_row = a_row, .a_col = a_col, .b = b,
                                        .b_row = b_row, .b_col = b_col}}};
    return gemm_one(&p);
}

/* Of one float, by the vector's way: a level's scalars and vectors round alike, and no libm has a say. */
static float exp_of(float x) {
    float lanes[VL];
    v_store(lanes, v_exp(v_set(x)));
    return lanes[0];
}
static float log_of(float x) {
    float lanes[VL];
    v_store(lanes, v_log(v_set(x)));
    return lanes[0];
}

/* x = e^(x - shift); returns the sum */
static float row_exp(int64_t n, float *x, float shift) {
    const vf s = v_set(shift);
    vd total = vd_zero();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf e = v_exp(v_sub(v_load(x + i), s));
        v_store(x + i, e);
        total = vd_add(total, e);
    }
    if (i < n) {
        v_store_n(x + i, v_exp(v_sub(v_load_n(x + i, n - i), s)), n - i);
        total = vd_add(total, v_load_n(x + i, n - i));
    }
    return (float)vd_sum(total);
}

/* What a block of rows has summed so far, over the keys it has seen. */
struct unpacked_attention_sums {
    float *o;    /* (rows, d): sum of e^(score - most) · v */
    float *most; /* (rows,): largest score */
    float *sum;  /* (rows,): sum of e^(score - most) */
};

/* Queries [t0, t1) of a kv head against keys [s0, s1). work: (rows, d) and (rows, UNPACKED_KEYS) */
static en_status unpacked_attend(const struct en_attention *p, int64_t b, int64_t kv, int64_t t0, int64_t t1, int64_t s0,
                        int64_t s1, struct unpacked_attention_sums to, float *work) {
    const int64_t group = unpacked_attention_group(p), d = p->d, rows = (t1 - t0) * group;
    const float *k = (const float *)p->k.data + b * p->k.batch + kv * d;
    const float *v = (const float *)p->v.data + b * p->v.batch + kv * d;
    float *q = work, *scores = work + rows * d;
    gather_rows(p, p->q, b, kv, t0, t1, p->scale, q);
    memset(to.o, 0, (size_t)(rows * d) * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        to.most[r] = -INFINITY;
        to.sum[r] = 0;
    }
    for (int64_t j = s0; j < s1; j += UNPACKED_KEYS) {
        const int64_t n = min64(UNPACKED_KEYS, s1 - j);
        en_status status = product(rows, n, d, q, d, 1, k + j * p->k.token, 1, p->k.token, scores, n, 0);
        if (status != EN_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * n;
            int64_t lo, hi;
            unpacked_attention_range(p, b, t0 + r / group, &lo, &hi);
            lo = min64(max64(lo - j, 0), n);
            hi = max64(min64(hi - j, n), lo);
            memset(row, 0, (size_t)lo * sizeof(float));
            memset(row + hi, 0, (size_t)(n - hi) * sizeof(float));
            if (lo == hi) continue;
            const float here = row_max(hi - lo, row + lo), most = here > to.most[r] ? here : to.most[r];
            const float sum = row_exp(hi - lo, row + lo, most == -INFINITY ? 0 : most);
            if (most != to.most[r]) {
                const float shrink = to.sum[r] == 0 ? 0 : exp_of(to.most[r] - most);
                float *o = to.o + r * d;
                for (int64_t i = 0; i < d; i++) o[i] *= shrink;
                to.sum[r] *= shrink;
                to.most[r] = most;
            }
            to.sum[r] += sum;
        }
        status = product(rows, d, n, scores, n, 1, v + j * p->v.token, p->v.token, 1, to.o, d, 1);
        if (status != EN_OK) return status;
    }
    return EN_OK;
}

/* Normalise and write o and lse. */
static void unpacked_finish_rows(const struct en_attention *p, int64_t b, int64_t kv, int64_t t0, int64_t t1,
                        struct unpacked_attention_sums from) {
    const int64_t group = unpacked_attention_group(p);
    for (int64_t r = 0; r < (t1 - t0) * group; r++) {
        const int64_t t = t0 + r / group, head = kv * group + r % group;
        float *o = (float *)p->o.data + b * p->o.batch + t * p->o.token + head * p->d;
        for (int64_t i = 0; i < p->d; i++) o[i] = from.o[r * p->d + i] / from.sum[r];
        p->lse[(b * p->h + head) * p->t + t] = from.most[r] + log_of(from.sum[r]);
    }
}

struct unpacked_attention_job {
    const struct en_attention *p;
    int64_t queries, blocks; /* of queries a block; blocks (or pieces of the keys) a kv head */
    float *partial;          /* one query: (b, hkv, pieces) sums, each group·(d + 2) */
    _Atomic int status;
};

static struct unpacked_attention_sums unpacked_sums_at(float *at, int64_t rows, int64_t d) {
    return (struct unpacked_attention_sums){.o = at, .most = at + rows * d, .sum = at + rows * d + rows};
}

static void unpacked_attention_task(void *context, int64_t begin, int64_t end) {
    struct unpacked_attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t rows = job->queries * unpacked_attention_group(p), d = p->d;
    float *work = en_scratch(EN_SCRATCH_C, (size_t)(rows * (2 * d + 2 + UNPACKED_KEYS)) * sizeof(float));
    if (!work) {
        job->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task / job->blocks, b = head / p->hkv, kv = head % p->hkv, block = task % job->blocks;
        const int64_t t0 = block * job->queries, t1 = min64(p->t, t0 + job->queries);
        int64_t s0, s1;
        unpacked_attention_span(p, b, t0, t1, &s0, &s1);
        struct unpacked_attention_sums sums = unpacked_sums_at(work, rows, d);
        en_status status = unpacked_attend(p, b, kv, t0, t1, s0, s1, sums, work + rows * (d + 2));
        if (status != EN_OK)
            job->status = status;
        else
            unpacked_finish_rows(p, b, kv, t0, t1, sums);
    }
}

/* One query, many keys: pieces of the keys, then their sums together, in order. */
static void unpacked_attention_piece(void *context, int64_t begin, int64_t end) {
    struct unpacked_attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t rows = unpacked_attention_group(p), d = p->d;
    float *work = en_scratch(EN_SCRATCH_C, (size_t)(rows * (d + UNPACKED_KEYS)) * sizeof(float));
    if (!work) {
        job->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task / job->blocks, b = head / p->hkv, kv = head % p->hkv, piece = task % job->blocks;
        int64_t s0, s1;
        unpacked_attention_range(p, b, 0, &s0, &s1);
        s0 = max64(s0, piece * UNPACKED_PIECE);
        s1 = min64(s1, (piece + 1) * UNPACKED_PIECE);
        en_status status = unpacked_attend(p, b, kv, 0, 1, s0, s1, unpacked_sums_at(job->partial + task * rows * (d + 2), rows, d), work);
        if (status != EN_OK) job->status = status;
    }
}

static void unpacked_merge_pieces(const struct unpacked_attention_job *job, int64_t head) {
    const struct en_attention *p = job->p;
    const int64_t rows = unpacked_attention_group(p), d = p->d, size = rows * (d + 2);
    float *at = job->partial + head * job->blocks * size;
    struct unpacked_attention_sums to = unpacked_sums_at(at, rows, d);
    for (int64_t piece = 1; piece < job->blocks; piece++) {
        const struct unpacked_attention_sums from = unpacked_sums_at(at + piece * size, rows, d);
        for (int64_t r = 0; r < rows; r++) {
            if (from.sum[r] == 0) continue; /* saw no key */
            const float most = to.most[r] > from.most[r] ? to.most[r] : from.most[r];
            const float x = to.sum[r] == 0 ? 0 : exp_of(to.most[r] - most), y = exp_of(from.most[r] - most);
            for (int64_t i = 0; i < d; i++) to.o[r * d + i] = to.o[r * d + i] * x + from.o[r * d + i] * y;
            to.sum[r] = to.sum[r] * x + from.sum[r] * y;
            to.most[r] = most;
        }
    }
    unpacked_finish_rows(p, head / p->hkv, head % p->hkv, 0, 1, to);
}

static int64_t unpacked_attention_threads(const struct en_attention *p) {
    return gemm_threads(2.0 * (double)p->b * (double)p->h * (double)p->t * (double)p->s * (double)p->d);
}

static en_status unpacked_attention(const struct en_attention *p) {
    struct unpacked_attention_job job = {.p = p, .status = EN_OK};
    const int64_t heads = p->b * p->hkv, rows = unpacked_attention_group(p);
    if (heads == 0 || p->t == 0) return EN_OK;
    if (p->t > 1 || p->s <= UNPACKED_PIECE) {
        job.queries = unpacked_attention_queries(p);
        job.blocks = ceil_div(p->t, job.queries);
        en_parallel_tasks(heads * job.blocks, unpacked_attention_threads(p), unpacked_attention_task, &job);
        return (en_status)job.status;
    }
    job.blocks = ceil_div(p->s, UNPACKED_PIECE);
    job.partial = en_alloc((size_t)(heads * job.blocks * rows * (p->d + 2)) * sizeof(float));
    if (!job.partial) return EN_NO_MEMORY;
    en_parallel_tasks(heads * job.blocks, unpacked_attention_threads(p), unpacked_attention_piece, &job);
    if (job.status == EN_OK)
        for (int64_t head = 0; head < heads; head++) unpacked_merge_pieces(&job, head);
    en_free(job.partial);
    return (en_status)job.status;
}

/* ---- backward ----
 *
 * With P = e^(S - lse) and D = rowsum(g ∘ o):  dV = Pᵀ·g,  dS = P ∘ (g·Vᵀ - D),  dQ = scale · dS·K,  dK = dSᵀ·(scale · Q).
 * One task owns a kv head of one batch, so that dK and dV have one writer and one order.
 */

/* Block of queries [t0, t1), rows of them in work: q, g, dq (rows,d), s, ds (rows,keys), shift, dot (rows,). */
static en_status unpacked_attention_backward_block(const struct en_attention *p, int64_t b, int64_t kv, int64_t t0, int64_t t1,
                                          float *work) {
    const int64_t group = unpacked_attention_group(p), d = p->d, rows = (t1 - t0) * group;
    const float *k = (const float *)p->k.data + b * p->k.batch + kv * d;
    const float *v = (const float *)p->v.data + b * p->v.batch + kv * d;
    float *dk = (float *)p->dk.data + b * p->dk.batch + kv * d;
    float *dv = (float *)p->dv.data + b * p->dv.batch + kv * d;
    float *q = work, *g = q + rows * d, *dq = g + rows * d, *dot = dq + rows * d, *shift = dot + rows;
    float *weights = shift + rows, *ds = weights + rows * UNPACKED_KEYS;
    int64_t s0, s1;
    unpacked_attention_span(p, b, t0, t1, &s0, &s1);
    gather_rows(p, p->o, b, kv, t0, t1, 1.0f, q); /* o, until D is known */
    gather_rows(p, p->g, b, kv, t0, t1, 1.0f, g);
    for (int64_t r = 0; r < rows; r++) {
        dot[r] = (float)vd_sum(add_product_to(vd_zero(), d, q + r * d, g + r * d));
        shift[r] = p->lse[(b * p->h + kv * group + r % group) * p->t + t0 + r / group];
    }
    gather_rows(p, p->q, b, kv, t0, t1, p->scale, q);
    memset(dq, 0, (size_t)(rows * d) * sizeof(float));
    for (int64_t j = s0; j < s1; j += UNPACKED_KEYS) {
        const int64_t n = min64(UNPACKED_KEYS, s1 - j);
        const float *kj = k + j * p->k.token, *vj = v + j * p->v.token;
        en_status status = product(rows, n, d, q, d, 1, kj, 1, p->k.token, weights, n, 0);
        if (status == EN_OK) status = product(rows, n, d, g, d, 1, vj, 1, p->v.token, ds, n, 0);
        if (status != EN_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            float *w = weights + r * n, *x = ds + r * n;
            int64_t lo, hi;
            unpacked_attention_range(p, b, t0 + r / group, &lo, &hi);
            lo = min64(max64(lo - j, 0), n);
            hi = max64(min64(hi - j, n), lo);
            row_exp(hi - lo, w + lo, shift[r]);
            for (int64_t i = lo; i < hi; i++) x[i] = w[i] * (x[i] - dot[r]);
            for (float *row = w; row; row = row == w ? x : NULL) {
                memset(row, 0, (size_t)lo * sizeof(float));
                memset(row + hi, 0, (size_t)(n - hi) * sizeof(float));
            }
        }
        status = product(n, d, rows, weights, 1, n, g, d, 1, dv + j * p->dv.token, p->dv.token, 1);
        if (status == EN_OK) status = product(n, d, rows, ds, 1, n, q, d, 1, dk + j * p->dk.token, p->dk.token, 1);
        if (status == EN_OK) status = product(rows, d, n, ds, n, 1, kj, p->k.token, 1, dq, d, 1);
        if (status != EN_OK) return status;
    }
    scatter_rows(p, dq, b, kv, t0, t1, p->scale, p->dq);
    return EN_OK;
}

static void unpacked_attention_backward_task(void *context, int64_t begin, int64_t end) {
    struct unpacked_attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t rows = job->queries * unpacked_attention_group(p);
    float *work = en_scratch(EN_SCRATCH_C, (size_t)(rows * (3 * p->d + 2 + 2 * UNPACKED_KEYS)) * sizeof(float));
    if (!work) {
        job->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t head = begin; head < end; head++) {
        const int64_t b = head / p->hkv, kv = head % p->hkv;
        for (int64_t j = 0; j < p->s; j++) {
            memset((float *)p->dk.data + b * p->dk.batch + j * p->dk.token + kv * p->d, 0, (size_t)p->d * sizeof(float));
            memset((float *)p->dv.data + b * p->dv.batch + j * p->dv.token + kv * p->d, 0, (size_t)p->d * sizeof(float));
        }
        for (int64_t t0 = 0; t0 < p->t; t0 += job->queries) {
            en_status status = unpacked_attention_backward_block(p, b, kv, t0, min64(p->t, t0 + job->queries), work);
            if (status != EN_OK) job->status = status;
        }
    }
}

static en_status unpacked_attention_backward(const struct en_attention *p) {
    struct unpacked_attention_job job = {.p = p, .status = EN_OK};
    job.queries = unpacked_attention_queries(p);
    en_parallel_tasks(p->b * p->hkv, unpacked_attention_threads(p), unpacked_attention_backward_task, &job);
    return (en_status)job.status;
}

#endif

/* Attention, forward and backward: causal, grouped queries, a sliding window, packed sequences.
 *
 * A task is one block of queries of one head; it passes over the keys in blocks, keeps a running maximum and sum of each
 * row (online softmax, arXiv 1805.02867) and never holds more than a block of scores. Key blocks that no query of the
 * block sees are skipped, and within a block each row is worked on between its first and last visible key only. Products
 * of blocks go through gemm.h. Backward makes the probabilities again from the saved log-sum-exp; one task owns a key
 * head, so that its dK and dV are summed in a fixed order, and bits don't depend on the number of threads.
 *
 * This is not the last word in speed: every product packs its operands anew.
 */
#ifndef EN_ATTENTION_H
#define EN_ATTENTION_H

#include <math.h>
#include <string.h>

#include "reduce.h"

enum { ATTENTION_QUERIES = 128, ATTENTION_KEYS = 256 };

struct attention_job {
    const struct en_attention *p;
    int64_t query_blocks;
    _Atomic int status;
};

/* c (m,n) = or += a (m,k) · b (k,n), by the calling thread alone. */
static en_status block_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                               const float *b, int64_t b_row, int64_t b_col, float *c, int64_t c_row, int accumulate) {
    struct en_gemm p = {.m = m, .n = n, .k = k, .a_row = a_row, .a_col = a_col, .b_type = EN_F32, .b_row = b_row,
                        .b_col = b_col, .c_row = c_row, .accumulate = accumulate};
    if (m <= DOT_ROWS && b_row == 1 && b_col != 1) return gemm_dot(&p, a, b, c, 0, n);
    return gemm_block(&p, a, b, c, 0, m, 0, n);
}

/* The keys [first, last) that query t of sequence b sees. */
static void visible(const struct en_attention *p, int64_t b, int64_t t, int64_t *first, int64_t *last) {
    int64_t position = t + p->s - p->t;
    *first = p->starts ? p->starts[b * p->t + t] : 0;
    if (p->window > 0) *first = max64(*first, position - p->window + 1);
    *last = p->causal ? position + 1 : p->s;
}

/* The same for queries [t0, t1) together. */
static void visible_block(const struct en_attention *p, int64_t b, int64_t t0, int64_t t1, int64_t *first,
                          int64_t *last) {
    *first = p->s;
    *last = 0;
    for (int64_t t = t0; t < t1; t++) {
        int64_t one_first, one_last;
        visible(p, b, t, &one_first, &one_last);
        *first = min64(*first, one_first);
        *last = max64(*last, one_last);
    }
}

/* Lane 0 of f(x): the vector functions, so that every level's scalars round as its vectors do. */
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

/* x[0,n) = e^(scale·x - shift); returns the sum. */
static double probabilities(int64_t n, float *x, float scale, float shift) {
    vf s = v_set(scale), m = v_set(shift);
    vd total = vd_zero();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf e = v_exp(v_sub(v_mul(v_load(x + i), s), m));
        total = vd_add(total, e);
        v_store(x + i, e);
    }
    if (i < n) {
        float tail[VL] = {0};
        v_store_n(tail, v_exp(v_sub(v_mul(v_load_n(x + i, n - i), s), m)), n - i);
        total = vd_add(total, v_load(tail));
        v_store_n(x + i, v_load(tail), n - i);
    }
    return vd_sum(total);
}

static void shrink_row(int64_t n, float *x, float factor) {
    vf f = v_set(factor);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(x + i, v_mul(v_load(x + i), f));
    if (i < n) v_store_n(x + i, v_mul(v_load_n(x + i, n - i), f), n - i);
}

static float max_of_row(int64_t n, const float *x) {
    vf m = v_set(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) m = v_max(v_load(x + i), m);
    float best = v_hmax(m);
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

/* One block of queries of one head. */
static en_status attend(const struct en_attention *p, int64_t b, int64_t head, int64_t t0, int64_t t1) {
    const int64_t rows = t1 - t0, d = p->d, q_row = p->h * d, k_row = p->hkv * d, kv = head / (p->h / p->hkv);
    const float *q = p->q + (b * p->t + t0) * q_row + head * d;
    const float *k = p->k + b * p->k_batch + kv * d, *v = p->v + b * p->v_batch + kv * d;
    float *o = p->o + (b * p->t + t0) * q_row + head * d;
    float *scores = en_scratch(EN_SCRATCH_C, (size_t)ATTENTION_QUERIES * (ATTENTION_KEYS + 2) * sizeof(float) +
                                                 (size_t)ATTENTION_QUERIES * sizeof(double));
    if (!scores) return EN_NO_MEMORY;
    double *sum = (double *)(scores + ATTENTION_QUERIES * ATTENTION_KEYS);
    float *top = (float *)(sum + ATTENTION_QUERIES);
    for (int64_t r = 0; r < rows; r++) {
        memset(o + r * q_row, 0, (size_t)d * sizeof(float));
        top[r] = -INFINITY;
        sum[r] = 0;
    }
    int64_t first, last;
    visible_block(p, b, t0, t1, &first, &last);
    for (int64_t j0 = first / ATTENTION_KEYS * ATTENTION_KEYS; j0 < last; j0 += ATTENTION_KEYS) {
        const int64_t j1 = min64(j0 + ATTENTION_KEYS, last), keys = j1 - j0;
        en_status status =
            block_product(rows, keys, d, q, q_row, 1, k + j0 * k_row, 1, k_row, scores, ATTENTION_KEYS, 0);
        if (status != EN_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * ATTENTION_KEYS;
            int64_t from, to;
            visible(p, b, t0 + r, &from, &to);
            from = min64(max64(from - j0, 0), keys);
            to = min64(to - j0, keys);
            if (from >= to) { /* this row sees nothing here */
                memset(row, 0, (size_t)keys * sizeof(float));
                continue;
            }
            memset(row, 0, (size_t)from * sizeof(float));
            memset(row + to, 0, (size_t)(keys - to) * sizeof(float));
            const float highest = max_of_row(to - from, row + from) * p->scale;
            if (highest > top[r] || top[r] == -INFINITY) {
                const float shrink = exp_of(top[r] - highest);
                if (sum[r] != 0) shrink_row(d, o + r * q_row, shrink);
                sum[r] *= shrink;
                top[r] = highest;
            }
            sum[r] += probabilities(to - from, row + from, p->scale, top[r]);
        }
        status = block_product(rows, d, keys, scores, ATTENTION_KEYS, 1, v + j0 * k_row, k_row, 1, o, q_row, 1);
        if (status != EN_OK) return status;
    }
    for (int64_t r = 0; r < rows; r++) {
        shrink_row(d, o + r * q_row, (float)(1 / sum[r]));
        p->lse[(b * p->h + head) * p->t + t0 + r] = top[r] + log_of((float)sum[r]);
    }
    return EN_OK;
}

static void attention_range(void *context, int64_t begin, int64_t end) {
    struct attention_job *job = context;
    const struct en_attention *p = job->p;
    for (int64_t task = begin; task < end; task++) {
        const int64_t block = task % job->query_blocks, head = task / job->query_blocks;
        const int64_t t0 = block * ATTENTION_QUERIES, t1 = min64(t0 + ATTENTION_QUERIES, p->t);
        en_status status = attend(p, head / p->h, head % p->h, t0, t1);
        if (status != EN_OK) job->status = status;
    }
}

static int64_t attention_grain(const struct en_attention *p, int64_t rows) {
    return max64(1, GEMM_GRAIN / max64(1, rows * p->s * p->d));
}

static en_status attention(const struct en_attention *p) {
    struct attention_job job = {.p = p, .query_blocks = ceil_div(p->t, ATTENTION_QUERIES), .status = EN_OK};
    en_parallel_for(p->b * p->h * job.query_blocks, attention_grain(p, min64(p->t, ATTENTION_QUERIES)), attention_range,
                    &job);
    return (en_status)job.status;
}

/* dS = P∘(dP - D)·scale over one row's visible keys; D = rowsum(dO∘O). */
static void score_gradient(int64_t n, const float *probability, float *dp, float dot, float scale) {
    vf c = v_set(dot), s = v_set(scale);
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        v_store(dp + i, v_mul(v_mul(v_load(probability + i), v_sub(v_load(dp + i), c)), s));
    if (i < n)
        v_store_n(dp + i, v_mul(v_mul(v_load_n(probability + i, n - i), v_sub(v_load_n(dp + i, n - i), c)), s), n - i);
}

/* One block of queries of one head: adds to dq of these queries and to dk, dv of the key head. */
static en_status attend_backward(const struct en_attention *p, int64_t b, int64_t head, int64_t t0, int64_t t1) {
    const int64_t rows = t1 - t0, d = p->d, q_row = p->h * d, k_row = p->hkv * d, kv = head / (p->h / p->hkv);
    const int64_t at = (b * p->t + t0) * q_row + head * d;
    const float *q = p->q + at, *o = p->o + at, *g = p->g + at, *lse = p->lse + (b * p->h + head) * p->t + t0;
    const float *k = p->k + b * p->k_batch + kv * d, *v = p->v + b * p->v_batch + kv * d;
    float *dq = p->dq + at, *dk = p->dk + b * p->s * k_row + kv * d, *dv = p->dv + b * p->s * k_row + kv * d;
    float *probability = en_scratch(EN_SCRATCH_C, (size_t)ATTENTION_QUERIES * (2 * ATTENTION_KEYS + 1) * sizeof(float));
    if (!probability) return EN_NO_MEMORY;
    float *ds = probability + ATTENTION_QUERIES * ATTENTION_KEYS, *dot = ds + ATTENTION_QUERIES * ATTENTION_KEYS;
    for (int64_t r = 0; r < rows; r++) {
        memset(dq + r * q_row, 0, (size_t)d * sizeof(float));
        dot[r] = (float)vd_sum(add_product_to(vd_zero(), d, g + r * q_row, o + r * q_row));
    }
    int64_t first, last;
    visible_block(p, b, t0, t1, &first, &last);
    for (int64_t j0 = first / ATTENTION_KEYS * ATTENTION_KEYS; j0 < last; j0 += ATTENTION_KEYS) {
        const int64_t keys = min64(j0 + ATTENTION_KEYS, last) - j0, ld = ATTENTION_KEYS;
        const float *kj = k + j0 * k_row, *vj = v + j0 * k_row;
        en_status status = block_product(rows, keys, d, q, q_row, 1, kj, 1, k_row, probability, ld, 0);
        if (status == EN_OK) status = block_product(rows, keys, d, g, q_row, 1, vj, 1, k_row, ds, ld, 0);
        if (status != EN_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            float *pr = probability + r * ld, *dr = ds + r * ld;
            int64_t from, to;
            visible(p, b, t0 + r, &from, &to);
            from = min64(max64(from - j0, 0), keys);
            to = max64(min64(to - j0, keys), from);
            memset(pr, 0, (size_t)from * sizeof(float));
            memset(dr, 0, (size_t)from * sizeof(float));
            memset(pr + to, 0, (size_t)(keys - to) * sizeof(float));
            memset(dr + to, 0, (size_t)(keys - to) * sizeof(float));
            probabilities(to - from, pr + from, p->scale, lse[r]);
            score_gradient(to - from, pr + from, dr + from, dot[r], p->scale);
        }
        status = block_product(keys, d, rows, probability, 1, ld, g, q_row, 1, dv + j0 * k_row, k_row, 1);
        if (status == EN_OK) status = block_product(keys, d, rows, ds, 1, ld, q, q_row, 1, dk + j0 * k_row, k_row, 1);
        if (status == EN_OK) status = block_product(rows, d, keys, ds, ld, 1, kj, k_row, 1, dq, q_row, 1);
        if (status != EN_OK) return status;
    }
    return EN_OK;
}

static void attention_backward_range(void *context, int64_t begin, int64_t end) {
    struct attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t group = p->h / p->hkv;
    for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / p->hkv, kv = task % p->hkv;
        for (int64_t j = 0; j < p->s; j++) {
            const int64_t at = ((b * p->s + j) * p->hkv + kv) * p->d;
            memset(p->dk + at, 0, (size_t)p->d * sizeof(float));
            memset(p->dv + at, 0, (size_t)p->d * sizeof(float));
        }
        for (int64_t head = kv * group; head < (kv + 1) * group; head++)
            for (int64_t t0 = 0; t0 < p->t; t0 += ATTENTION_QUERIES) {
                en_status status = attend_backward(p, b, head, t0, min64(t0 + ATTENTION_QUERIES, p->t));
                if (status != EN_OK) job->status = status;
            }
    }
}

static en_status attention_backward(const struct en_attention *p) {
    struct attention_job job = {.p = p, .status = EN_OK};
    en_parallel_for(p->b * p->hkv, attention_grain(p, p->t * (p->h / p->hkv)), attention_backward_range, &job);
    return (en_status)job.status;
}

#endif

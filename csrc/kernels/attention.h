/* Causal grouped-query attention with an online softmax: forward, and queries against a cache.
 *
 * A block of rows (attention_mask.h) lies across lanes, so that everything the softmax knows of a row is a lane: scores
 * are transposed, S^T = K·Q^T, exponentials sum down a lane, and O^T = V^T·P^T. Scores exist for one block of keys at a
 * time. A task packs each block of K and V of its kv head once, when it first meets it, for all of its rows. Few rows
 * against many keys are cut into pieces of the keys instead, summed apart and merged in order.
 *
 * bf16 arrays: where the level multiplies bf16, weights are rounded to it (their sum is not); elsewhere packing widens.
 * Keys that a query can't see get weight zero, and 0 · NaN is NaN: a NaN in V reaches the rows of its block.
 */
#ifndef EN_ATTENTION_H
#define EN_ATTENTION_H

#include <math.h>
#include <string.h>

#include "attention_mask.h"
#include "attention_pack.h"

enum {
    ATTENTION_TASK_ROWS = 64, /* no more than one task for so many rows, because each packs all of its keys; */
    ATTENTION_PIECE = 512,    /* where there are no more rows, tasks are pieces of so many keys */
};

static const float log2_e = 0x1.715476p+0f, log_2 = 0x1.62e43p-1f;

/* Keys and values of one kv head, packed a block at a time; a task keeps those it will meet again. */
struct attention_keys {
    int64_t first, slots; /* block i, counted from key `first`, goes to slot i % slots */
    int64_t width;        /* of a packed value, in words */
    float *k, *v;         /* (keys, words of d); a block's (words of keys, width), whichever way (`along`) */
    int64_t *held;        /* the block in each slot, or -1 */
};

static size_t keys_bytes(const struct en_attention *p, int64_t slots) {
    const int64_t floats = ATTENTION_KEYS * words(p->type, p->d) + along_words(p->type, whole_vectors(p->d));
    return (size_t)slots * ((size_t)floats * sizeof(float) + sizeof(int64_t));
}

static struct attention_keys no_keys(const struct en_attention *p, int64_t first, int64_t slots, void *space) {
    struct attention_keys x = {.first = first, .slots = slots, .width = whole_vectors(p->d), .k = space};
    x.v = x.k + slots * ATTENTION_KEYS * words(p->type, p->d);
    x.held = (int64_t *)(x.v + slots * along_words(p->type, x.width));
    for (int64_t i = 0; i < slots; i++) x.held[i] = -1;
    return x;
}

/* Where key j and its value are, packed now if they weren't. */
WORD void find_keys(enum en_dtype type, const struct en_attention *p, struct attention_keys *x, int64_t b, int64_t kv,
                    int64_t j, const float **k, const float **v) {
    const int64_t block = (j - x->first) / ATTENTION_KEYS, at = x->first + block * ATTENTION_KEYS;
    const int64_t slot = block % x->slots, du = words(type, p->d), n = min64(ATTENTION_KEYS, p->s - at);
    float *keys = x->k + slot * ATTENTION_KEYS * du, *values = x->v + slot * along_words(type, x->width);
    *k = keys + (j - at) * du;
    *v = values + words(type, j - at) * along(type, x->width).step;
    if (x->held[slot] == block) return;
    x->held[slot] = block;
    void *row[ATTENTION_KEYS];
    key_rows(p, &p->k, b, kv, at, n, row);
    pack_rows(type, p->d, n, (const void *const *)row, keys, du);
    key_rows(p, &p->v, b, kv, at, n, row);
    pack_keys_along(type, p->d, n, (const void *const *)row, values, x->width);
}

/* What a block of rows has summed over the keys it has seen, a row a lane. */
struct attention_sums {
    float *o;   /* (d in whole vectors, w): sum of 2^(score - top) · v; scores count in powers of two */
    float *top; /* (w,): largest score */
    float *sum; /* (w,): sum of 2^(score - top) */
};

static int64_t sums_floats(const struct en_attention *p, int64_t w) { return (whole_vectors(p->d) + 2) * w; }

static struct attention_sums sums_at(const struct en_attention *p, float *at, int64_t w) {
    float *top = at + whole_vectors(p->d) * w;
    return (struct attention_sums){.o = at, .top = top, .sum = top + w};
}

/* Scores s (m,w), m even, become weights, an operand b, in place; keep: what sums so far count. n vectors of lanes. */
WORD void weigh_lanes(enum en_dtype type, const int n, int64_t m, int64_t w, vf factor, float *s, float *top,
                      float *sum, float *keep) {
    vf most[TILE_WIDTH], shift[TILE_WIDTH], total[TILE_WIDTH][2];
#pragma GCC unroll 4
    for (int v = 0; v < n; v++) most[v] = v_set(-INFINITY);
    for (int64_t j = 0; j < m; j++)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) most[v] = v_max(v_load(s + j * w + v * VL), most[v]);
#pragma GCC unroll 4
    for (int v = 0; v < n; v++) {
        const vf before = v_load(top + v * VL), now = v_max(v_mul(most[v], factor), before);
        shift[v] = v_select(v_eq(now, v_set(-INFINITY)), v_zero(), now); /* not -Inf less -Inf */
        v_store(top + v * VL, now);
        v_store(keep + v * VL, v_exp2(v_sub(before, shift[v])));
        shift[v] = v_neg(shift[v]);
        total[v][0] = total[v][1] = v_zero();
    }
    for (int64_t j = 0; j < m; j += 2)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) {
            float *at = s + j * w + v * VL;
            const vf x = v_exp2(v_fma(v_load(at), factor, shift[v]));
            const vf y = v_exp2(v_fma(v_load(at + w), factor, shift[v]));
            total[v][0] = v_add(total[v][0], x);
            total[v][1] = v_add(total[v][1], y);
            store_along(type, s + v * VL, j, w, x, y);
        }
#pragma GCC unroll 4
    for (int v = 0; v < n; v++)
        v_store(sum + v * VL, v_fma(v_load(sum + v * VL), v_load(keep + v * VL), v_add(total[v][0], total[v][1])));
}

WORD void weigh(enum en_dtype type, int64_t m, int64_t w, float scale, float *s, const struct attention_sums *to,
                float *keep) {
    const vf factor = v_set(scale * log2_e);
    int64_t v = 0;
    for (; v + TILE_WIDTH * VL <= w; v += TILE_WIDTH * VL)
        weigh_lanes(type, TILE_WIDTH, m, w, factor, s + v, to->top + v, to->sum + v, keep + v);
    for (; v < w; v += VL) weigh_lanes(type, 1, m, w, factor, s + v, to->top + v, to->sum + v, keep + v);
}

/* Floats of attend's work. */
static int64_t attend_floats(const struct en_attention *p, int64_t w) {
    return (words(p->type, p->d) + 1 + ATTENTION_KEYS) * w;
}

/* Rows [r, r + n) of (b, kv) against those of keys [c0, c1) that they see. w: whole_vectors(n) */
WORD void attend_as(enum en_dtype type, const struct en_attention *p, int64_t b, int64_t kv, int64_t r, int64_t n,
                    int64_t c0, int64_t c1, struct attention_keys *x, struct attention_sums to, float *work) {
    const int pairs = in_pairs(type);
    const int64_t d = p->d, du = words(type, d), w = whole_vectors(n), unit = key_unit(type);
    const struct along step = along(type, x->width);
    float *q = work, *keep = q + du * w, *s = keep + w;
    void *row[ATTENTION_ROWS];
    query_rows(p, &p->q, b, kv, r, n, row);
    pack_columns(type, d, n, (const void *const *)row, q, w);
    struct sight see;
    look(p, b, r, n, w, &see);
    const int64_t s0 = max64(see.lo, c0) / unit * unit, s1 = round_up(min64(see.hi, c1), unit);
    memset(to.o, 0, (size_t)(x->width * w) * sizeof(float));
    for (int64_t i = 0; i < w; i++) {
        to.top[i] = -INFINITY;
        to.sum[i] = 0;
    }
    for (int64_t j = s0, e; j < s1; j = e) {
        e = min64(s1, (j / ATTENTION_KEYS + 1) * ATTENTION_KEYS);
        const int64_t m = e - j;
        const struct block scores = {
            .depth = du, .a_row = du, .a_step = 1, .a_strip = strip_of(du), .b_row = w, .c_row = w};
        const struct block values = {.depth = words(type, m), .a_row = step.row, .a_step = step.step,
                                     .a_strip = step.strip, .b_row = w, .c_row = w};
        const float *keys, *along;
        find_keys(type, p, x, b, kv, j, &keys, &along);
        block_product(pairs, m, w, scores, keys, q, s, NULL);
        if (j < see.all_lo || e > see.all_hi) hide(&see, j, m, w, -INFINITY, s);
        weigh(type, m, w, p->scale, s, &to, keep);
        block_product(pairs, d, w, values, along, s, to.o, keep);
    }
}

static void attend(const struct en_attention *p, int64_t b, int64_t kv, int64_t r, int64_t n, int64_t c0, int64_t c1,
                   struct attention_keys *x, struct attention_sums to, float *work) {
    if (p->type == EN_BF16)
        attend_as(EN_BF16, p, b, kv, r, n, c0, c1, x, to, work);
    else
        attend_as(EN_F32, p, b, kv, r, n, c0, c1, x, to, work);
}

/* Normalise and write o and lse of rows [r, r + n). */
static void finish_rows(const struct en_attention *p, int64_t b, int64_t kv, int64_t r, int64_t n,
                        struct attention_sums from) {
    const int64_t group = attention_group(p), w = whole_vectors(n);
    void *row[ATTENTION_ROWS];
    for (int64_t v = 0; v < w; v += VL) {
        const vf sum = v_load(from.sum + v);
        v_store(from.top + v, v_fma(v_load(from.top + v), v_set(log_2), v_log(sum)));
        v_store(from.sum + v, v_div(v_set(1.0f), sum));
    }
    query_rows(p, &p->o, b, kv, r, n, row);
    if (p->type == EN_BF16)
        unpack_columns(EN_BF16, p->d, n, row, from.o, w, from.sum);
    else
        unpack_columns(EN_F32, p->d, n, row, from.o, w, from.sum);
    for (int64_t i = 0, token = r / group, head = r % group; i < n; i++, next_row(group, &token, &head))
        p->lse[(b * p->h + kv * group + head) * p->t + token] = from.top[i];
}

/* Blocks of rows of a kv head, the last first: the latest have the most keys. */
static void attention_task(void *context, int64_t begin, int64_t end) {
    struct attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t rows = attention_rows(p), most = min64(ATTENTION_ROWS, whole_vectors(rows));
    float *work = en_scratch(EN_SCRATCH_C, (size_t)(attend_floats(p, most) + sums_floats(p, most)) * sizeof(float));
    if (!work) {
        job->status = EN_NO_MEMORY;
        return;
    }
    begin_blocks(p);
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task % job->heads, b = head / p->hkv, kv = head % p->hkv;
        const int64_t chunk = job->chunks - 1 - task / job->heads;
        const int64_t begin_block = cut(job->blocks, job->chunks, chunk);
        const int64_t end_block = cut(job->blocks, job->chunks, chunk + 1);
        int64_t s0, s1;
        span_of(p, b, begin_block * ATTENTION_ROWS, min64(rows, end_block * ATTENTION_ROWS), &s0, &s1);
        const int64_t first = s0 / ATTENTION_KEYS * ATTENTION_KEYS, slots = ceil_div(s1 - first, ATTENTION_KEYS);
        void *space = en_scratch(EN_SCRATCH_A, keys_bytes(p, slots));
        if (!space) {
            job->status = EN_NO_MEMORY;
            break;
        }
        struct attention_keys keys = no_keys(p, first, slots, space);
        for (int64_t block = end_block - 1; block >= begin_block; block--) {
            const int64_t r = block * ATTENTION_ROWS, n = min64(ATTENTION_ROWS, rows - r);
            struct attention_sums sums = sums_at(p, work + attend_floats(p, most), whole_vectors(n));
            attend(p, b, kv, r, n, 0, p->s, &keys, sums, work);
            finish_rows(p, b, kv, r, n, sums);
        }
    }
    end_blocks(p);
}

/* What a piece of the keys has summed of a block of rows. */
static int64_t piece_floats(const struct en_attention *p) {
    return sums_floats(p, min64(ATTENTION_ROWS, whole_vectors(attention_rows(p))));
}
static struct attention_sums piece_sums(const struct attention_job *job, int64_t head, int64_t block, int64_t piece) {
    const struct en_attention *p = job->p;
    const int64_t w = whole_vectors(min64(ATTENTION_ROWS, attention_rows(p) - block * ATTENTION_ROWS));
    const int64_t index = (head * job->blocks + block) * job->chunks + piece;
    return sums_at(p, job->partial + index * piece_floats(p), w);
}

/* Few rows, many keys: a piece of the keys, of all heads in turn, because these lie side by side. */
static void attention_piece(void *context, int64_t begin, int64_t end) {
    struct attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t rows = attention_rows(p), most = min64(ATTENTION_ROWS, whole_vectors(rows));
    const int64_t slots = job->blocks > 1 ? ATTENTION_PIECE / ATTENTION_KEYS : 1;
    float *work = en_scratch(EN_SCRATCH_C, (size_t)attend_floats(p, most) * sizeof(float));
    void *space = en_scratch(EN_SCRATCH_A, keys_bytes(p, slots));
    if (!work || !space) {
        job->status = EN_NO_MEMORY;
        return;
    }
    begin_blocks(p);
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task % job->heads, piece = task / job->heads, s0 = piece * ATTENTION_PIECE;
        struct attention_keys keys = no_keys(p, s0, slots, space);
        for (int64_t block = 0; block < job->blocks; block++) {
            const int64_t r = block * ATTENTION_ROWS, n = min64(ATTENTION_ROWS, rows - r);
            attend(p, head / p->hkv, head % p->hkv, r, n, s0, s0 + ATTENTION_PIECE, &keys,
                   piece_sums(job, head, block, piece), work);
        }
    }
    end_blocks(p);
}

static void merge_pieces(const struct attention_job *job, int64_t head, int64_t block) {
    const struct en_attention *p = job->p;
    const int64_t r = block * ATTENTION_ROWS, n = min64(ATTENTION_ROWS, attention_rows(p) - r), w = whole_vectors(n);
    const struct attention_sums to = piece_sums(job, head, block, 0);
    for (int64_t piece = 1; piece < job->chunks; piece++) {
        const struct attention_sums from = piece_sums(job, head, block, piece);
        for (int64_t v = 0; v < w; v += VL) {
            const vf a = v_load(to.top + v), b = v_load(from.top + v), top = v_max(a, b);
            const vf shift = v_select(v_eq(top, v_set(-INFINITY)), v_zero(), top);
            const vf x = v_exp2(v_sub(a, shift)), y = v_exp2(v_sub(b, shift));
            for (int64_t i = v; i < p->d * w; i += w)
                v_store(to.o + i, v_fma(v_load(to.o + i), x, v_mul(v_load(from.o + i), y)));
            v_store(to.sum + v, v_fma(v_load(to.sum + v), x, v_mul(v_load(from.sum + v), y)));
            v_store(to.top + v, top);
        }
    }
    finish_rows(p, head / p->hkv, head % p->hkv, r, n, to);
}

static en_status attention(const struct en_attention *p) {
    struct attention_job job = {.p = p, .heads = p->b * p->hkv, .status = EN_OK};
    const int64_t rows = attention_rows(p), threads = min64(attention_threads(p), en_get_threads());
    if (job.heads == 0 || p->t == 0) return EN_OK;
    job.blocks = ceil_div(rows, ATTENTION_ROWS);
    if (rows > ATTENTION_TASK_ROWS || p->s <= ATTENTION_PIECE) {
        job.chunks = threads == 1 ? 1 : min64(ceil_div(rows, ATTENTION_TASK_ROWS), ceil_div(4 * threads, job.heads));
        en_parallel_tasks(job.heads * job.chunks, threads, attention_task, &job);
        return (en_status)job.status;
    }
    job.chunks = ceil_div(p->s, ATTENTION_PIECE);
    const int64_t floats = job.heads * job.blocks * job.chunks * piece_floats(p);
    job.partial = en_alloc((size_t)floats * sizeof(float));
    if (!job.partial) return EN_NO_MEMORY;
    en_parallel_tasks(job.heads * job.chunks, threads, attention_piece, &job);
    for (int64_t i = 0; i < job.heads * job.blocks && job.status == EN_OK; i++)
        merge_pieces(&job, i / job.blocks, i % job.blocks);
    en_free(job.partial);
    return (en_status)job.status;
}

#endif

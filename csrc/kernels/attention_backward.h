/* Attention's gradients. With P = softmax(scale · Q·K^T) and D = rowsum(g ∘ o):
 *
 *     dV = P^T·g,  dS = P ∘ (g·V^T - D),  dQ = scale · dS·K,  dK = scale · dS^T·Q.
 *
 * All of it is computed transposed, rows of queries across lanes, as in the forward: S^T = K·Q^T and dP^T = V·g^T. Then
 * lse and D are a lane each, P^T and dS^T as they come are operands a of dV and dK, and dQ^T = K^T·dS^T.
 *
 * A task owns a chunk of the blocks of rows of one kv head: it sums their dQ, and dK and dV over its rows. Chunks share
 * a kv head where there are few of them; they hold about equal work, and their number depends on shapes alone. Sums of
 * dK and dV then add up in the order of the chunks.
 *
 * A NaN in a row of g or o reaches the keys of its block, for the reason that one in V does in the forward.
 *
 * bf16 arrays: where the level multiplies bf16, P and dS are rounded to it; sums are f32 and rounded once, at the end.
 */
#ifndef EN_ATTENTION_BACKWARD_H
#define EN_ATTENTION_BACKWARD_H

#include "attention.h"

enum {
    GRADIENT_KEYS = 64,        /* of a block; divides ATTENTION_KEYS */
    GRADIENT_TASKS = 16,       /* wanted, where a chunk keeps */
    GRADIENT_CHUNK_ROWS = 256, /* this many rows */
    APART = STRIPS ? VL : 0,   /* words between rows of q and g along, as powers of two share few lines of a cache */
};
_Static_assert(ATTENTION_KEYS % GRADIENT_KEYS == 0 && GRADIENT_KEYS % TILE_K == 0 && GRADIENT_ROWS % TILE_K == 0 &&
                   (!STRIPS || GRADIENT_KEYS % TILE_ROWS == 0),
               "a packed block holds whole ones, and they whole tiles and strips");

/* A task's operands and sums over the keys of its kv head; those of a block begin when it first meets it. */
struct gradient_keys {
    float *k, *v;   /* (keys, words of d) */
    float *k_along; /* a block's (words of keys, width), whichever way (`along`) */
    float *dk, *dv; /* (keys, width) */
    char *met;      /* a block of ATTENTION_KEYS each */
};

static int64_t key_blocks(const struct en_attention *p) { return ceil_div(p->s, ATTENTION_KEYS); }

/* Floats of its operands; of its dk or dv. */
static int64_t operand_floats(const struct en_attention *p) {
    return key_blocks(p) * (ATTENTION_KEYS * 2 * words(p->type, p->d) + along_words(p->type, whole_vectors(p->d)));
}
static int64_t sum_floats(const struct en_attention *p) {
    return key_blocks(p) * ATTENTION_KEYS * whole_vectors(p->d);
}

WORD void meet_keys(enum en_dtype type, const struct en_attention *p, struct gradient_keys *x, int64_t b, int64_t kv,
                    int64_t block) {
    const int64_t j = block * ATTENTION_KEYS, n = min64(ATTENTION_KEYS, p->s - j);
    const int64_t du = words(type, p->d), width = whole_vectors(p->d), sums = round_up(n, key_unit(type)) * width;
    void *row[ATTENTION_KEYS];
    if (x->met[block]) return;
    x->met[block] = 1;
    key_rows(p, &p->k, b, kv, j, n, row);
    pack_rows(type, p->d, n, (const void *const *)row, x->k + j * du, du);
    pack_keys_along(type, p->d, n, (const void *const *)row, x->k_along + block * along_words(type, width), width);
    key_rows(p, &p->v, b, kv, j, n, row);
    pack_rows(type, p->d, n, (const void *const *)row, x->v + j * du, du);
    memset(x->dk + j * width, 0, (size_t)sums * sizeof(float));
    memset(x->dv + j * width, 0, (size_t)sums * sizeof(float));
}

/* Lanes of n rows: their words, as k of dk and dv, are whole too. */
WORD int64_t gradient_lanes(enum en_dtype type, int64_t n) { return round_up(n, in_tiles(type) ? TILE_K : VL); }

/* What a task has of a block of rows; w: lanes, width: elements of a row in whole vectors. */
struct gradient_rows {
    float *q, *g;             /* (words of d, w): operands b of the scores */
    float *q_along, *g_along; /* (words of rows, width): operands b of dk and dv */
    float *dq;                /* (width, w) */
    float *shift, *dot;       /* (w,): -lse in powers of two, D */
    float *s, *ds;            /* (GRADIENT_KEYS, w): scores, weights; their gradients */
    float *ds_along;          /* (words of GRADIENT_KEYS, w) */
};

static int64_t rows_floats(const struct en_attention *p) {
    const int64_t w = GRADIENT_ROWS, width = whole_vectors(p->d);
    return (2 * words(p->type, p->d) + width + 2 + 3 * GRADIENT_KEYS) * w + 2 * words(p->type, w) * (width + APART);
}

static struct gradient_rows rows_at(const struct en_attention *p, float *at) {
    const int64_t w = GRADIENT_ROWS, width = whole_vectors(p->d), du = words(p->type, p->d);
    const int64_t along = words(p->type, w) * (width + APART), keys = GRADIENT_KEYS * w;
    struct gradient_rows x = {.q = at};
    x.g = x.q + du * w;
    x.q_along = x.g + du * w;
    x.g_along = x.q_along + along;
    x.dq = x.g_along + along;
    x.shift = x.dq + width * w;
    x.dot = x.shift + w;
    x.s = x.dot + w;
    x.ds = x.s + keys;
    x.ds_along = x.ds + keys;
    return x;
}

/* Scores s and gradients of weights ds, (m,w), m even, become weights and gradients of scores: operands a in place, the
 * latter also an operand b. */
WORD void weigh_gradients(enum en_dtype type, int64_t m, int64_t w, float scale, const struct gradient_rows *x) {
    const vf factor = v_set(scale * log2_e);
    for (int64_t j = 0; j < m; j += 2)
        for (int64_t v = 0; v < w; v += VL) {
            float *s = x->s + j * w, *ds = x->ds + j * w;
            const vf shift = v_load(x->shift + v), dot = v_load(x->dot + v);
            const vf a = v_exp2(v_fma(v_load(s + v), factor, shift));
            const vf b = v_exp2(v_fma(v_load(s + w + v), factor, shift));
            const vf c = v_mul(a, v_sub(v_load(ds + v), dot));
            const vf e = v_mul(b, v_sub(v_load(ds + w + v), dot));
            store_rows(type, s, s + w, v, a, b);
            store_rows(type, ds, ds + w, v, c, e);
            if (in_pairs(type)) store_along(type, x->ds_along + v, j, w, c, e);
        }
}

/* D and lse of rows [r, r + n); their heads at row (o) and g. */
WORD void gradient_statistics(enum en_dtype type, const struct en_attention *p, int64_t b, int64_t kv, int64_t r,
                              int64_t n, int64_t w, const void *const *o, const void *const *g,
                              const struct gradient_rows *x) {
    const int64_t group = attention_group(p);
    int64_t token = r / group, head = r % group;
    for (int64_t i = 0; i < w; i++) {
        x->shift[i] = x->dot[i] = 0;
        if (i >= n) continue;
        vf sum = v_zero();
        if (i + ROWS_AHEAD < n) fetch_row(type, p->d, o[i + ROWS_AHEAD]), fetch_row(type, p->d, g[i + ROWS_AHEAD]);
        for (int64_t l = 0; l < p->d; l += VL)
            sum = v_fma(load_as(type, o[i], l, p->d - l), load_as(type, g[i], l, p->d - l), sum);
        x->dot[i] = v_hsum(sum);
        x->shift[i] = -log2_e * p->lse[(b * p->h + kv * group + head) * p->t + token];
        next_row(group, &token, &head);
    }
}

/* Rows [r, r + n) of (b, kv). */
WORD void gradients_as(enum en_dtype type, const struct en_attention *p, int64_t b, int64_t kv, int64_t r, int64_t n,
                       struct gradient_keys *keys, const struct gradient_rows *x) {
    const int pairs = in_pairs(type);
    const int64_t d = p->d, du = words(type, d), w = gradient_lanes(type, n), width = whole_vectors(d);
    const int64_t unit = key_unit(type);
    const struct along step = along(type, width);
    void *q_row[GRADIENT_ROWS], *g_row[GRADIENT_ROWS], *row[GRADIENT_ROWS];
    const void *const *const q = (const void *const *)q_row, *const *const g = (const void *const *)g_row;
    query_rows(p, &p->q, b, kv, r, n, q_row);
    query_rows(p, &p->g, b, kv, r, n, g_row);
    query_rows(p, &p->o, b, kv, r, n, row);
    gradient_statistics(type, p, b, kv, r, n, w, (const void *const *)row, g, x);
    pack_columns(type, d, n, q, x->q, w);
    pack_columns(type, d, n, g, x->g, w);
    pack_along(type, d, n, q, x->q_along, width + APART);
    pack_along(type, d, n, g, x->g_along, width + APART);
    memset(x->dq, 0, (size_t)(width * w) * sizeof(float));
    struct sight see;
    look(p, b, r, n, w, &see);
    for (int64_t i = n; i < w; i++) see.to[i] = see.all_hi = 0; /* lanes beyond the rows weigh nothing */
    for (int64_t j = see.lo / unit * unit, e; j < see.hi; j = e) {
        e = min64(round_up(see.hi, unit), (j / GRADIENT_KEYS + 1) * GRADIENT_KEYS);
        const int64_t m = e - j, block = j / ATTENTION_KEYS;
        const float *keys_along = keys->k_along + block * along_words(type, width) +
                                  words(type, j - block * ATTENTION_KEYS) * step.step;
        const struct block scores = {
            .depth = du, .a_row = du, .a_step = 1, .a_strip = strip_of(du), .b_row = w, .c_row = w};
        const struct block over_rows = {
            .depth = words(type, n), .a_row = w, .a_step = 1, .b_row = width + APART, .c_row = width, .add = 1};
        const struct block over_keys = {.depth = words(type, m), .a_row = step.row, .a_step = step.step,
                                        .a_strip = step.strip, .b_row = w, .c_row = w, .add = 1};
        meet_keys(type, p, keys, b, kv, block);
        block_product(pairs, m, w, scores, keys->k + j * du, x->q, x->s, NULL);
        block_product(pairs, m, w, scores, keys->v + j * du, x->g, x->ds, NULL);
        if (j < see.all_lo || e > see.all_hi) {
            hide(&see, j, m, w, -INFINITY, x->s);
            hide(&see, j, m, w, 0, x->ds);
        }
        weigh_gradients(type, m, w, p->scale, x);
        block_product(pairs, m, width, over_rows, x->s, x->g_along, keys->dv + j * width, NULL);
        block_product(pairs, m, width, over_rows, x->ds, x->q_along, keys->dk + j * width, NULL);
        block_product(pairs, d, w, over_keys, keys_along, pairs ? x->ds_along : x->ds, x->dq, NULL);
    }
    query_rows(p, &p->dq, b, kv, r, n, row);
    for (int64_t i = 0; i < w; i++) x->dot[i] = p->scale;
    unpack_columns(type, d, n, row, x->dq, w, x->dot);
}

/* The sums of n chunks for keys [j, j + m), each dk and dv at `from` and from + sum_floats, to dk and dv. */
WORD void write_keys_as(enum en_dtype type, const struct en_attention *p, int64_t head, int64_t j, int64_t m,
                        const float *const *from, int64_t n) {
    const int64_t width = whole_vectors(p->d), b = head / p->hkv, kv = head % p->hkv;
    void *row[2][ATTENTION_KEYS];
    key_rows(p, &p->dk, b, kv, j, m, row[0]);
    key_rows(p, &p->dv, b, kv, j, m, row[1]);
    for (int which = 0; which < 2; which++) {
        const int64_t at = which * sum_floats(p);
        const vf scale = v_set(which ? 1 : p->scale);
        for (int64_t i = 0; i < m; i++)
            for (int64_t l = 0; l < p->d; l += VL) {
                vf sum = v_zero();
                for (int64_t c = 0; c < n; c++) sum = v_add(sum, v_load(from[c] + at + i * width + l));
                store_as(type, row[which][i], l, v_mul(sum, scale), p->d - l);
            }
    }
}

static void write_keys(const struct en_attention *p, int64_t head, int64_t block, const float *const *from, int64_t n) {
    const int64_t j = block * ATTENTION_KEYS, m = min64(ATTENTION_KEYS, p->s - j);
    if (p->type == EN_BF16)
        write_keys_as(EN_BF16, p, head, j, m, from, n);
    else
        write_keys_as(EN_F32, p, head, j, m, from, n);
}

/* Which blocks of keys a chunk has met. */
static char *chunk_met(const struct attention_job *job, int64_t head, int64_t chunk) {
    return job->met + (head * job->chunks + chunk) * key_blocks(job->p);
}

/* Adds up the chunks' sums for blocks of keys. */
static void add_chunks_task(void *context, int64_t begin, int64_t end) {
    const struct attention_job *job = context;
    const struct en_attention *p = job->p;
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task / key_blocks(p), block = task % key_blocks(p);
        const int64_t at = block * ATTENTION_KEYS * whole_vectors(p->d);
        const float *from[GRADIENT_TASKS];
        int64_t n = 0;
        for (int64_t chunk = 0; chunk < job->chunks; chunk++)
            if (chunk_met(job, head, chunk)[block])
                from[n++] = job->partial + (head * job->chunks + chunk) * 2 * sum_floats(p) + at;
        write_keys(p, head, block, from, n);
    }
}

/* First block of rows of a chunk: each has about the same number of scores, as masks of positions have it. */
static int64_t chunk_begin(const struct attention_job *job, int64_t chunk) {
    const struct en_attention *p = job->p;
    const int64_t group = attention_group(p);
    double total = 0, before = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t block = 0; block < job->blocks; block++) {
            const int64_t last = min64(p->t - 1, ((block + 1) * GRADIENT_ROWS - 1) / group) + p->s - p->t;
            const int64_t seen = p->causal ? last + 1 : p->s;
            const double work = (double)(p->window > 0 ? min64(seen, p->window + GRADIENT_ROWS) : seen);
            if (pass == 0)
                total += work;
            else if (before * (double)job->chunks >= total * (double)chunk)
                return block;
            before += pass ? work : 0;
        }
    }
    return job->blocks;
}

static void chunk_task(void *context, int64_t begin, int64_t end) {
    struct attention_job *job = context;
    const struct en_attention *p = job->p;
    const int64_t rows = attention_rows(p), packed = key_blocks(p) * ATTENTION_KEYS * words(p->type, p->d);
    float *work = en_scratch(EN_SCRATCH_C, (size_t)rows_floats(p) * sizeof(float));
    float *operands = en_scratch(EN_SCRATCH_A, (size_t)operand_floats(p) * sizeof(float));
    float *sums = job->partial ? job->partial : en_scratch(EN_SCRATCH_B, (size_t)(2 * sum_floats(p)) * sizeof(float));
    if (!work || !operands || !sums) {
        job->status = EN_NO_MEMORY;
        return;
    }
    const struct gradient_rows x = rows_at(p, work);
    begin_blocks(p);
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task / job->chunks, chunk = task % job->chunks, b = head / p->hkv, kv = head % p->hkv;
        struct gradient_keys keys = {.k = operands, .met = chunk_met(job, head, chunk)};
        keys.v = keys.k + packed;
        keys.k_along = keys.v + packed;
        keys.dk = job->partial ? sums + task * 2 * sum_floats(p) : sums;
        keys.dv = keys.dk + sum_floats(p);
        const int64_t last = chunk_begin(job, chunk + 1);
        for (int64_t block = chunk_begin(job, chunk); block < last; block++) {
            const int64_t r = block * GRADIENT_ROWS, n = min64(GRADIENT_ROWS, rows - r);
            if (p->type == EN_BF16)
                gradients_as(EN_BF16, p, b, kv, r, n, &keys, &x);
            else
                gradients_as(EN_F32, p, b, kv, r, n, &keys, &x);
        }
        for (int64_t block = 0; block < key_blocks(p) && !job->partial; block++) {
            const float *from = keys.dk + block * ATTENTION_KEYS * whole_vectors(p->d);
            write_keys(p, head, block, &from, keys.met[block]);
        }
    }
    end_blocks(p);
}

static en_status attention_backward(const struct en_attention *p) {
    struct attention_job job = {.p = p, .heads = p->b * p->hkv, .status = EN_OK};
    const int64_t rows = attention_rows(p), threads = min64(attention_threads(p), en_get_threads());
    if (job.heads == 0 || p->s == 0) return EN_OK;
    job.blocks = ceil_div(rows, GRADIENT_ROWS);
    job.chunks = max64(1, min64(rows / GRADIENT_CHUNK_ROWS, ceil_div(GRADIENT_TASKS, job.heads)));
    const size_t met = (size_t)(job.heads * job.chunks * key_blocks(p));
    job.met = en_alloc(met);
    if (job.chunks > 1)
        job.partial = en_alloc((size_t)(job.heads * job.chunks * 2 * sum_floats(p)) * sizeof(float));
    if (!job.met || (job.chunks > 1 && !job.partial)) {
        job.status = EN_NO_MEMORY;
    } else {
        memset(job.met, 0, met);
        en_parallel_tasks(job.heads * job.chunks, threads, chunk_task, &job);
        if (job.partial && job.status == EN_OK)
            en_parallel_tasks(job.heads * key_blocks(p), threads, add_chunks_task, &job);
    }
    en_free(job.partial);
    en_free(job.met);
    return (en_status)job.status;
}

#endif

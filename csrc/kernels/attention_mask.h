/* Which keys a query sees, and where its heads lie. Every mask we serve leaves a query one contiguous range of keys.
 *
 * The rows of (batch, kv head) are the queries of its whole group in order (token, head of the group), so that keys and
 * values are packed once for all of them; a block of rows lies across lanes.
 */
#ifndef EN_ATTENTION_MASK_H
#define EN_ATTENTION_MASK_H

#include "attention_tile.h"

/* Of a block. With strips, forward takes what a tile is wide: scores stay in the first cache, and few of them are
 * computed to be hidden. Backward, rows are k of dK and dV as well. */
enum { ATTENTION_ROWS = STRIPS ? TILE_WIDTH * VL : 64, GRADIENT_ROWS = 64 };

static inline int64_t attention_group(const struct en_attention *p) { return p->h / p->hkv; }
static inline int64_t attention_rows(const struct en_attention *p) { return p->t * attention_group(p); }

/* Head `head` of `heads` at (b, token). */
static inline void *head_at(const struct en_attention *p, const struct en_heads *x, int64_t b, int64_t token,
                            int64_t head) {
    return element(p->type, x->data, b * x->batch + token * x->token + head * p->d);
}

/* Moves on to the next row: the next head of the group, or the next token. */
static inline void next_row(int64_t group, int64_t *token, int64_t *head) {
    if (++*head == group) *head = 0, ++*token;
}

/* Rows [r, r + n) of queries, or of keys. */
static void query_rows(const struct en_attention *p, const struct en_heads *x, int64_t b, int64_t kv, int64_t r,
                       int64_t n, void **row) {
    const int64_t group = attention_group(p);
    for (int64_t i = 0, token = r / group, head = r % group; i < n; i++, next_row(group, &token, &head))
        row[i] = head_at(p, x, b, token, kv * group + head);
}
static void key_rows(const struct en_attention *p, const struct en_heads *x, int64_t b, int64_t kv, int64_t j,
                     int64_t n, void **row) {
    for (int64_t i = 0; i < n; i++) row[i] = head_at(p, x, b, j + i, kv);
}

/* Keys [lo, hi) that query t of batch b sees. */
static inline void attention_range(const struct en_attention *p, int64_t b, int64_t t, int64_t *lo, int64_t *hi) {
    const int64_t position = t + p->s - p->t;
    *hi = p->causal ? position + 1 : p->s;
    *lo = p->window > 0 ? max64(0, position - p->window + 1) : 0;
    if (p->starts) *lo = max64(*lo, p->starts[b * p->t + t]);
}

/* Keys that any of rows [r, end) sees. */
static void span_of(const struct en_attention *p, int64_t b, int64_t r, int64_t end, int64_t *s0, int64_t *s1) {
    const int64_t group = attention_group(p);
    *s0 = p->s, *s1 = 0;
    for (int64_t t = r / group; t <= (end - 1) / group; t++) {
        int64_t lo, hi;
        attention_range(p, b, t, &lo, &hi);
        *s0 = min64(*s0, lo);
        *s1 = max64(*s1, hi);
    }
}

struct sight {
    int64_t lo, hi;         /* keys that any row of the block sees */
    int64_t all_lo, all_hi; /* and that all do */
    int64_t from[GRADIENT_ROWS], to[GRADIENT_ROWS];
};

/* Of rows [r, r + n); lanes beyond, up to w, see what the last row does. */
static void look(const struct en_attention *p, int64_t b, int64_t r, int64_t n, int64_t w, struct sight *see) {
    const int64_t group = attention_group(p);
    *see = (struct sight){.lo = p->s, .all_hi = p->s};
    int64_t token = r / group, end = 0; /* end: of the token's rows */
    for (int64_t i = 0; i < w; i++) {
        if (i == end && i < n)
            attention_range(p, b, token++, &see->from[i], &see->to[i]), end = token * group - r;
        else
            see->from[i] = see->from[i - 1], see->to[i] = see->to[i - 1];
        see->lo = min64(see->lo, see->from[i]);
        see->hi = max64(see->hi, see->to[i]);
        see->all_lo = max64(see->all_lo, see->from[i]);
        see->all_hi = min64(see->all_hi, see->to[i]);
    }
}

/* x (m,w), keys from j on: `fill` where the row of a lane doesn't see the key. */
static void hide(const struct sight *see, int64_t j, int64_t m, int64_t w, float fill, float *x) {
    float from[GRADIENT_ROWS], to[GRADIENT_ROWS]; /* small whole numbers, exact */
    for (int64_t i = 0; i < w; i++) {
        from[i] = (float)max64(min64(see->from[i] - j, m), 0);
        to[i] = (float)max64(min64(see->to[i] - j, m), 0);
    }
    const vf hidden = v_set(fill);
    for (int64_t i = 0; i < m; i++) {
        const vf key = v_set((float)i);
        for (int64_t v = 0; v < w; v += VL) {
            const vf seen = v_select(v_lt(key, v_load(to + v)), v_load(x + i * w + v), hidden);
            v_store(x + i * w + v, v_select(v_le(v_load(from + v), key), seen, hidden));
        }
    }
}

/* Threads that attention deserves. */
static int64_t attention_threads(const struct en_attention *p) {
    return gemm_threads(2.0 * (double)p->b * (double)p->h * (double)p->t * (double)p->s * (double)p->d);
}

/* Around a task's products of blocks, which may need their engine's means. */
static void begin_blocks(const struct en_attention *p) {
    const struct engine *e = p->type == EN_BF16 ? EN_BF16_ENGINE : NULL;
    if (e && e->begin) e->begin();
}
static void end_blocks(const struct en_attention *p) {
    const struct engine *e = p->type == EN_BF16 ? EN_BF16_ENGINE : NULL;
    if (e && e->end) e->end();
}

/* A call: tasks, what they share, and whether one failed. */
struct attention_job {
    const struct en_attention *p;
    int64_t heads;  /* b · hkv */
    int64_t blocks; /* of rows, a head */
    int64_t chunks; /* of those, or pieces of the keys: tasks a head */
    float *partial; /* what tasks that share a head have summed */
    char *met;      /* backward: the blocks of keys that each chunk has sums for */
    _Atomic int status;
};

#endif

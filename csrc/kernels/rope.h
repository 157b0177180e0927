/* Rotary position embedding: pairs of x turn by the position's angles; the inverse turns back, and is the backward.
 *
 * x, y (b,t,h,d); y may be x. cos, sin (t,rot/2), or (b,t,rot/2) where table_batch is their batch stride. The pairs are
 * (2i, 2i+1) (interleaved) or (i, i + rot/2) (split halves); elements from rot on pass through. No sum is fused: every
 * level gives the same bits. */
#ifndef EN_ROPE_H
#define EN_ROPE_H

#include <string.h>

#include "strided.h"

enum { ROPE_PAIRS = 128 }; /* adjacent pairs turned at a time */

/* Pairs [i, i + n) of the halves. */
WORD void turn_halves_lanes(enum en_dtype type, const struct en_rope *p, const void *x, const float *cos,
                            const float *sin, void *y, int64_t i, int64_t n) {
    int64_t half = p->rot / 2;
    vf a = load_as(type, x, i, n), b = load_as(type, x, half + i, n);
    vf c = load_as(EN_F32, cos, i, n), s = load_as(EN_F32, sin, i, n);
    if (p->inverse) s = v_neg(s);
    store_as(type, y, i, v_sub(v_mul(a, c), v_mul(b, s)), n);
    store_as(type, y, half + i, v_add(v_mul(b, c), v_mul(a, s)), n);
}

WORD void turn_halves(enum en_dtype type, const struct en_rope *p, const void *x, const float *cos, const float *sin,
                      void *y) {
    int64_t half = p->rot / 2, i = 0;
    for (; i + VL <= half; i += VL) turn_halves_lanes(type, p, x, cos, sin, y, i, VL);
    if (i < half) turn_halves_lanes(type, p, x, cos, sin, y, i, half - i);
}

/* Adjacent pairs, through f32 in L1: plain C, of which the compiler makes shuffles. */
static void turn_adjacent(enum en_dtype type, const struct en_rope *p, const void *x, const float *cos,
                          const float *sin, void *y) {
    float in[2 * ROPE_PAIRS], out[2 * ROPE_PAIRS], direction = p->inverse ? -1.0f : 1.0f;
    for (int64_t first = 0; first < p->rot / 2; first += ROPE_PAIRS) {
        int64_t n = least(ROPE_PAIRS, p->rot / 2 - first);
        for (int64_t i = 0; i < 2 * n; i += VL)
            v_store_n(in + i, load_as(type, x, 2 * first + i, 2 * n - i), 2 * n - i);
        for (int64_t i = 0; i < n; i++) {
            float a = in[2 * i], b = in[2 * i + 1], c = cos[first + i], s = direction * sin[first + i];
            out[2 * i] = a * c - b * s;
            out[2 * i + 1] = b * c + a * s;
        }
        for (int64_t i = 0; i < 2 * n; i += VL)
            store_as(type, y, 2 * first + i, v_load_n(out + i, 2 * n - i), 2 * n - i);
    }
}

/* Index: position in (b,t). */
WORD void rope_positions(enum en_dtype type, const struct en_rope *p, int64_t begin, int64_t end) {
    int64_t rest = p->d - p->rot;
    for (int64_t i = begin; i < end; i++) {
        int64_t batch = i / p->t, position = i % p->t;
        const float *cos = p->cos + batch * p->table_batch + position * (p->rot / 2);
        const float *sin = p->sin + batch * p->table_batch + position * (p->rot / 2);
        for (int64_t head = 0; head < p->h; head++) {
            const void *x = element(type, p->x.data, batch * p->x.batch + position * p->x.token + head * p->d);
            void *y = element(type, p->y.data, batch * p->y.batch + position * p->y.token + head * p->d);
            if (p->interleaved)
                turn_adjacent(type, p, x, cos, sin, y);
            else
                turn_halves(type, p, x, cos, sin, y);
            if (y != x) memcpy(element(type, y, p->rot), element(type, x, p->rot), (size_t)(rest * type_size(type)));
        }
    }
}

static void rope_range(void *context, int64_t begin, int64_t end) {
    const struct en_rope *p = context;
    WITH_TYPE(p->type, rope_positions, p, begin, end);
}

static en_status rope(const struct en_rope *p) {
    en_parallel_for(p->b * p->t, row_grain(GRAIN, p->h * p->d), rope_range, (void *)p);
    return EN_OK;
}

#endif

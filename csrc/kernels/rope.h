/* Rotary position embedding: pairs of x turn by the position's angles; the inverse turns back, and is the backward.
 *
 * x, y (b,t,h,d); cos, sin (t,rot/2), or (b,t,rot/2) where table_batch is their batch stride. The pairs are (2i, 2i+1)
 * (interleaved) or (i, i + rot/2) (split halves); elements from rot on pass through. Plain C: the compiler's vectors of
 * these loops give the same bits at every level. */
#ifndef EN_ROPE_H
#define EN_ROPE_H

#include <string.h>

#include "strided.h"

struct rope {
    int64_t t, h, d, half;
    const float *x, *cos, *sin;
    int64_t table_batch;
    int interleaved;
    float direction; /* 1, or -1 for the inverse */
    float *y;
};

static inline void turn_adjacent(int64_t half, const float *restrict x, const float *restrict cos,
                                 const float *restrict sin, float direction, float *restrict y) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[2 * i], b = x[2 * i + 1], c = cos[i], s = direction * sin[i];
        y[2 * i] = a * c - b * s;
        y[2 * i + 1] = b * c + a * s;
    }
}

static inline void turn_halves(int64_t half, const float *restrict x, const float *restrict cos,
                               const float *restrict sin, float direction, float *restrict y) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], c = cos[i], s = direction * sin[i];
        y[i] = a * c - b * s;
        y[i + half] = b * c + a * s;
    }
}

/* Index: position in (b,t). */
static void rope_range(void *context, int64_t begin, int64_t end) {
    const struct rope *p = context;
    int64_t rot = 2 * p->half;
    for (int64_t i = begin; i < end; i++) {
        int64_t table = i / p->t * p->table_batch + i % p->t * p->half;
        for (int64_t head = 0; head < p->h; head++) {
            const float *x = p->x + (i * p->h + head) * p->d;
            float *y = p->y + (i * p->h + head) * p->d;
            (p->interleaved ? turn_adjacent : turn_halves)(p->half, x, p->cos + table, p->sin + table, p->direction, y);
            memcpy(y + rot, x + rot, (size_t)(p->d - rot) * sizeof *y);
        }
    }
}

static en_status rope(int64_t b, int64_t t, int64_t h, int64_t d, int64_t rot, const float *x, const float *cos,
                      const float *sin, int64_t table_batch, int interleaved, int inverse, float *y) {
    struct rope p = {t, h, d, rot / 2, x, cos, sin, table_batch, interleaved, inverse ? -1.0f : 1.0f, y};
    en_parallel_for(b * t, row_grain(GRAIN, h * d), rope_range, &p);
    return EN_OK;
}

#endif

/* Rows of a table by id, and the gradient of the table. Ids are checked before anything is read. */
#ifndef EN_EMBEDDING_H
#define EN_EMBEDDING_H

#include <string.h>

#include "convert.h"

enum { EMBEDDING_COLUMNS = 64 };

struct embedding {
    int64_t n, d;
    enum en_dtype type;
    const void *weight;
    const int64_t *ids, *order; /* order: positions sorted by id, equal ids in their order */
    const float *g;
    float *y;
};

static en_status check_ids(int64_t n, int64_t vocab, const int64_t *ids) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab) {
            en_set_bad_id(ids[i]);
            return EN_BAD_ID;
        }
    return EN_OK;
}

static void embedding_range(void *context, int64_t begin, int64_t end) {
    const struct embedding *p = context;
    for (int64_t i = begin; i < end; i++) {
        int64_t at = p->ids[i] * p->d;
        float *y = p->y + i * p->d;
        if (p->type == EN_F32)
            memcpy(y, (const float *)p->weight + at, (size_t)p->d * sizeof *y);
        else
            widen_row(p->type, p->d, (const uint16_t *)p->weight + at, y);
    }
}

static en_status embedding(int64_t n, int64_t vocab, int64_t d, enum en_dtype type, const void *weight,
                           const int64_t *ids, float *y) {
    en_status status = check_ids(n, vocab, ids);
    if (status) return status;
    struct embedding p = {.n = n, .d = d, .type = type, .weight = weight, .ids = ids, .y = y};
    en_parallel_for(n, row_grain(GRAIN, d), embedding_range, &p);
    return EN_OK;
}

/* A row of the gradient is the sum, in double, of g over the positions that hold its id. Index: block of columns. */
static void embedding_backward_range(void *context, int64_t begin, int64_t end) {
    const struct embedding *p = context;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * EMBEDDING_COLUMNS, columns = least(EMBEDDING_COLUMNS, p->d - first);
        for (int64_t i = 0; i < p->n;) {
            int64_t id = p->ids[p->order[i]];
            double acc[EMBEDDING_COLUMNS] = {0};
            for (; i < p->n && p->ids[p->order[i]] == id; i++) {
                const float *g = p->g + p->order[i] * p->d + first;
                for (int64_t j = 0; j < columns; j++) acc[j] += g[j];
            }
            float *y = p->y + id * p->d + first;
            for (int64_t j = 0; j < columns; j++) y[j] = (float)acc[j];
        }
    }
}

/* dweight (vocab,d) comes zeroed. */
static en_status embedding_backward(int64_t n, int64_t vocab, int64_t d, const float *g, const int64_t *ids,
                                    const int64_t *order, float *dweight) {
    en_status status = check_ids(n, vocab, ids);
    if (status) return status;
    struct embedding p = {.n = n, .d = d, .ids = ids, .order = order, .g = g, .y = dweight};
    int64_t blocks = (d + EMBEDDING_COLUMNS - 1) / EMBEDDING_COLUMNS;
    en_parallel_for(blocks, row_grain(GRAIN, n * EMBEDDING_COLUMNS), embedding_backward_range, &p);
    return EN_OK;
}

#endif

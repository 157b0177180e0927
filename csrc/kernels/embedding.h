/* Rows of a table by id, and the gradient of the table. Ids are checked before anything is read. */
#ifndef EN_EMBEDDING_H
#define EN_EMBEDDING_H

#include "elementwise.h"

enum { EMBEDDING_COLUMNS = 64 };

struct embedding {
    int64_t n, d;
    enum en_dtype type, y_type; /* of weight or g; of y */
    const void *weight, *g;
    const int64_t *ids, *order; /* order: positions sorted by id, equal ids in their order */
    void *y;
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
    int64_t size = type_size(p->type);
    for (int64_t i = begin; i < end; i++)
        for (int64_t column = 0; column < p->d; column += TILE)
            copy_row(p->type, element(p->type, p->weight, p->ids[i] * p->d + column), size, least(TILE, p->d - column),
                     p->y_type, element(p->y_type, p->y, i * p->d + column));
}

static en_status embedding(int64_t n, int64_t vocab, int64_t d, enum en_dtype type, const void *weight,
                           const int64_t *ids, enum en_dtype y_type, void *y) {
    en_status status = check_ids(n, vocab, ids);
    if (status) return status;
    struct embedding p = {.n = n, .d = d, .type = type, .y_type = y_type, .weight = weight, .ids = ids, .y = y};
    en_parallel_for(n, row_grain(GRAIN, d), embedding_range, &p);
    return EN_OK;
}

/* To a row of the gradient comes the sum, in double, of g over the positions that hold its id. Index: block of
 * columns. */
static void embedding_backward_range(void *context, int64_t begin, int64_t end) {
    const struct embedding *p = context;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * EMBEDDING_COLUMNS, columns = least(EMBEDDING_COLUMNS, p->d - first);
        for (int64_t i = 0; i < p->n;) {
            int64_t id = p->ids[p->order[i]];
            double acc[EMBEDDING_COLUMNS] = {0};
            float tile[EMBEDDING_COLUMNS];
            for (; i < p->n && p->ids[p->order[i]] == id; i++) {
                const void *row = element(p->type, p->g, p->order[i] * p->d + first);
                const float *g = as_floats(p->type, row, type_size(p->type), columns, tile);
                for (int64_t j = 0; j < columns; j++) acc[j] += g[j];
            }
            float *y = (float *)p->y + id * p->d + first;
            for (int64_t j = 0; j < columns; j++) y[j] += (float)acc[j];
        }
    }
}

/* dweight (vocab,d) is added to. */
static en_status embedding_backward(int64_t n, int64_t vocab, int64_t d, enum en_dtype type, const void *g,
                                    const int64_t *ids, const int64_t *order, float *dweight) {
    en_status status = check_ids(n, vocab, ids);
    if (status) return status;
    struct embedding p = {.n = n, .d = d, .type = type, .g = g, .ids = ids, .order = order, .y = dweight};
    int64_t blocks = (d + EMBEDDING_COLUMNS - 1) / EMBEDDING_COLUMNS;
    en_parallel_for(blocks, row_grain(GRAIN, n * EMBEDDING_COLUMNS), embedding_backward_range, &p);
    return EN_OK;
}

#endif

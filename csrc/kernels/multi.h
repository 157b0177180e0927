/* Work on all parameters in one call: each is cut into pieces of REDUCE_PIECE elements, which the threads claim one by
 * one. What a piece is depends on the shapes alone. */
#ifndef EN_MULTI_H
#define EN_MULTI_H

#include "reduce.h"

struct multi {
    int64_t count;
    const struct en_param *params;
    int64_t *first; /* (count + 1,): pieces before each parameter */
    void (*work)(const struct multi *m, int64_t piece, const struct en_param *param, int64_t begin, int64_t end);
    const void *context;
};

/* Index: piece. */
static void multi_pieces(void *context, int64_t begin, int64_t end) {
    const struct multi *m = context;
    int64_t low = 0, high = m->count; /* the parameter of piece `begin`: first[low] <= begin < first[low + 1] */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (m->first[middle] <= begin)
            low = middle;
        else
            high = middle;
    }
    for (int64_t i = begin; i < end; i++) {
        while (i >= m->first[low + 1]) low++;
        int64_t at = (i - m->first[low]) * REDUCE_PIECE;
        m->work(m, i, m->params + low, at, least(at + REDUCE_PIECE, m->params[low].n));
    }
}

/* Fills m->first. Elements of all parameters together, or -1: no memory. */
static int64_t multi_cut(struct multi *m) {
    int64_t total = 0;
    m->first = en_scratch(EN_SCRATCH_A, (size_t)(m->count + 1) * sizeof *m->first);
    if (!m->first) return -1;
    m->first[0] = 0;
    for (int64_t i = 0; i < m->count; i++) {
        m->first[i + 1] = m->first[i] + (m->params[i].n + REDUCE_PIECE - 1) / REDUCE_PIECE;
        total += m->params[i].n;
    }
    return total;
}

static en_status multi_run(struct multi *m) {
    int64_t total = multi_cut(m);
    if (total < 0) return EN_NO_MEMORY;
    en_parallel_tasks(m->first[m->count], total / GRAIN_EXP + 1, multi_pieces, m);
    return EN_OK;
}

/* ---- sums of squares, one a gradient ---- */

static void square_piece(const struct multi *m, int64_t piece, const struct en_param *param, int64_t begin,
                         int64_t end) {
    const float *x = param->g + begin;
    ((double *)m->context)[piece] = vd_sum(add_product_to(vd_zero(), end - begin, x, x));
}

static en_status square_sums(int64_t count, const struct en_param *params, double *sums) {
    struct multi m = {.count = count, .params = params, .work = square_piece};
    if (multi_cut(&m) < 0) return EN_NO_MEMORY;
    double *partial = en_scratch(EN_SCRATCH_B, (size_t)(m.first[count] + 1) * sizeof *partial); /* not NULL for none */
    if (!partial) return EN_NO_MEMORY;
    m.context = partial;
    en_status status = multi_run(&m);
    for (int64_t i = 0; status == EN_OK && i < count; i++) {
        sums[i] = 0;
        for (int64_t k = m.first[i]; k < m.first[i + 1]; k++) sums[i] += partial[k];
    }
    return status;
}

#endif

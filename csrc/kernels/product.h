/* A whole product: the way it goes, and the parts in which it is taken.
 *
 * With few rows or columns it is skinny; else it goes along a plan (gemm.h), or where what tasks share would not stay in
 * the last cache, along several: of some rows or columns, or of a part of k, whose sums meet in f32. All of that depends
 * on the shape alone.
 */
#ifndef EN_PRODUCT_H
#define EN_PRODUCT_H

#include "gemm.h"

/* Words of the sums of a deep product, where C isn't f32 and can't hold them. */
enum { SUM_WORDS = 2 << 20 };

/* Blocks of k, counted term after term, the first of a term together with the last of the term before, which it may join.
 * Columns that have all terms, or short ones besides, are summed in the blocks of the whole product. */
struct depth {
    int64_t blocks, longest;                          /* longest: in steps */
    int64_t cuts[EN_MAX_TERMS], first[EN_MAX_TERMS]; /* blocks of each term, and the first of them */
};

static struct depth depth_of(const struct en_gemm *p, const struct engine *e) {
    struct depth d = {.blocks = 1};
    for (int64_t t = 0, last = 0; t < p->terms; t++) {
        const int64_t steps = steps_of(e, p->term[t].k), cuts = k_cuts(e, steps), each = ceil_div(steps, cuts);
        d.longest = max64(d.longest, last + each);
        last = cuts > 1 ? each : last + each;
        d.cuts[t] = cuts, d.first[t] = d.blocks - 1;
        d.blocks += cuts - 1;
    }
    return d;
}

/* A whole product's sums in f32, rows at a multiple of VL, before they are finished. */
struct sums {
    const struct en_gemm *p;
    float *sums;
};

static void finish_sums(void *context, int64_t begin, int64_t end) {
    const struct sums *s = context;
    const int64_t row = round_up(s->p->n, VL);
    finish(s->p, s->sums + begin * row, row, begin, 0, end - begin, s->p->n, s->p->accumulate, 1);
}

/* `parts` products over parts of k, each of whole blocks, summed in f32. */
static en_status gemm_deep(const struct en_gemm *p, const struct engine *e, const struct depth *d, int64_t parts) {
    struct en_gemm part = *p;
    struct sums s = {p, NULL};
    if (p->c_type != EN_F32) {
        part.c_row = round_up(p->n, VL);
        part.c = s.sums = en_alloc((size_t)(p->m * part.c_row) * sizeof(float));
        if (!s.sums) return EN_NO_MEMORY;
        part.c_type = EN_F32;
        part.bias = NULL, part.residual = NULL, part.accumulate = 0;
    }
    en_status status = EN_OK;
    for (int64_t i = 0; i < parts && status == EN_OK; i++) {
        const int64_t from = cut(d->blocks, parts, i), to = cut(d->blocks, parts, i + 1);
        for (int t = 0; t < p->terms; t++) {
            const struct en_term *all = &p->term[t];
            struct en_term *x = &part.term[t];
            const int64_t cuts = d->cuts[t], before = d->first[t];
            const int64_t k0 = k_cut(e, all->k, cuts, min64(cuts, max64(0, from - before)));
            const int64_t k1 = k_cut(e, all->k, cuts, min64(cuts, max64(0, to - before)));
            x->k = k1 - k0;
            x->a = element(all->a_type, all->a, k0 * all->a_col);
            if (x->packed)
                x->b_at = all->b_at + k0 * all->b_row;
            else
                x->b = element(all->b_type, all->b, k0 * all->b_row);
        }
        struct plan q = make_plan(&part, e);
        status = gemm_planned(&q);
        part.bias = NULL, part.residual = NULL, part.accumulate = 1;
    }
    if (s.sums && status == EN_OK) en_parallel_for(p->m, GEMM_GRAIN / 8 / p->n + 1, finish_sums, &s);
    en_free(s.sums);
    return status;
}

/* Parts of k of a product with few columns, so that tasks can share the packed B of each; or 0. */
static int64_t parts_by_rows(const struct plan *q, const struct depth *d) {
    if (!DEEP_BY_ROWS || q->groups > 1 || !q->a_words || q->b_words > q->p->m * q->steps) return 0;
    const int64_t fit = B_WORDS / max64(padded_columns(q->p->n) * d->longest, 1);
    return fit ? ceil_div(d->blocks, fit) : 0;
}

/* Parts of k so that the packed A of each stays in the last cache: about A_WORDS, or a block of k. */
static int64_t parts_by_columns(const struct plan *q, const struct depth *d) {
    const int64_t fit = A_WORDS * d->blocks / max64(q->panels * q->a_words, 1);
    return ceil_div(d->blocks, max64(fit, 1));
}

/* Rows [i, i + m) and columns [j, j + n) of a product. */
static struct en_gemm block_of(const struct en_gemm *p, int64_t i, int64_t m, int64_t j, int64_t n) {
    struct en_gemm x = *p;
    x.m = m, x.n = n;
    x.c = element(p->c_type, p->c, i * p->c_row + j);
    if (p->bias) x.bias = p->bias + j;
    if (p->residual) x.residual = element(p->c_type, p->residual, i * p->residual_row + j);
    for (int t = 0; t < p->terms; t++) {
        const struct en_term *all = &p->term[t];
        const int64_t j0 = max64(j, all->n0), j1 = max64(min64(j + n, all->n0 + all->n), j0);
        struct en_term *y = &x.term[t];
        y->a = element(all->a_type, all->a, i * all->a_row);
        y->n0 = min64(j0 - j, n), y->n = j1 - j0;
        if (y->n == 0) y->k = 0;
        if (all->packed)
            y->b_at += (j0 - all->n0) * all->b_col;
        else if (y->n)
            y->b = element(all->b_type, all->b, (j0 - all->n0) * all->b_col);
    }
    return x;
}

static en_status gemm_blocks(const struct en_gemm *p, const struct engine *e);

/* Some rows after others, and some columns, at multiples of COLUMNS. */
enum { COLUMNS = 256 };
static en_status gemm_pieces(const struct en_gemm *p, const struct engine *e, int64_t rows, int64_t columns) {
    const int64_t units = ceil_div(p->n, COLUMNS);
    en_status status = EN_OK;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns && status == EN_OK; c++) {
            const int64_t i = cut(p->m, rows, r), j = cut(units, columns, c) * COLUMNS;
            const int64_t end = min64(cut(units, columns, c + 1) * COLUMNS, p->n);
            const struct en_gemm x = block_of(p, i, cut(p->m, rows, r + 1) - i, j, end - j);
            status = gemm_blocks(&x, e);
        }
    return status;
}

static en_status gemm_blocks(const struct en_gemm *p, const struct engine *e) {
    struct plan q = make_plan(p, e);
    const struct depth d = depth_of(p, e);
    if (q.by_rows) return gemm_planned(&q);
    int64_t parts = parts_by_rows(&q, &d);
    if (!parts) {
        const int64_t panels = max64(A_WORDS / max64(q.a_words, 1), ceil_div(A_ROWS, e->mr));
        if (q.panels > panels) return gemm_pieces(p, e, ceil_div(q.panels, panels), 1);
        parts = parts_by_columns(&q, &d);
    }
    if (parts == 1) return gemm_planned(&q);
    const int64_t pieces = p->c_type == EN_F32 ? 1 : ceil_div(p->m * p->n, SUM_WORDS);
    if (pieces > 1) return p->m >= p->n ? gemm_pieces(p, e, pieces, 1) : gemm_pieces(p, e, 1, pieces);
    return gemm_deep(p, e, &d, parts);
}

/* All terms skinny: each is added to C, or where that isn't plain f32, to a sum of its own. */
static en_status gemm_skinny(const struct en_gemm *p, int pairs) {
    const int covered = p->terms == 1 && p->term[0].n == p->n;
    if (p->c_type == EN_F32 && covered && !p->bias && !p->residual)
        return skinny_term(&p->term[0], p->m, pairs, p->c, p->c_row, p->accumulate);
    const int64_t row = round_up(p->n, VL);
    float *sums = en_scratch(EN_SCRATCH_SUMS, (size_t)(p->m * row) * sizeof(float));
    if (!sums) return EN_NO_MEMORY;
    for (int64_t i = 0; i < p->m * row; i += VL) v_store(sums + i, v_zero());
    for (int t = 0; t < p->terms; t++) {
        en_status status = skinny_term(&p->term[t], p->m, pairs, sums, row, 1);
        if (status != EN_OK) return status;
    }
    finish(p, sums, row, 0, 0, p->m, p->n, p->accumulate, 1);
    return EN_OK;
}

/* One product of a sum of terms. */
static en_status gemm_one(const struct en_gemm *p) {
    if (p->m == 0 || p->n == 0) return EN_OK;
    const struct engine *bf16 = p->term[0].a_type == EN_BF16 ? EN_BF16_ENGINE : NULL;
    int skinny = 1;
    for (int t = 0; t < p->terms; t++)
        skinny = skinny && (few_rows(p->m, &p->term[t]) || few_columns(p->m, &p->term[t], bf16 != NULL));
    return skinny ? gemm_skinny(p, bf16 != NULL) : gemm_blocks(p, bf16 ? bf16 : &f32_engine);
}

struct gemm_grid {
    const struct en_gemm *p;
    const struct en_batch *batch;
    _Atomic int status;
};

static void gemm_products(void *context, int64_t begin, int64_t end) {
    struct gemm_grid *grid = context;
    const struct en_batch *batch = grid->batch;
    for (int64_t product = begin; product < end; product++) {
        struct en_gemm p = *grid->p;
        int64_t a = 0, b = 0, c = 0, index = product;
        for (int d = batch->ndim - 1; d >= 0; d--) {
            const int64_t x = index % batch->shape[d];
            index /= batch->shape[d];
            a += x * batch->a[d];
            b += x * batch->b[d];
            c += x * batch->c[d];
        }
        p.term[0].a = element(p.term[0].a_type, p.term[0].a, a);
        p.term[0].b = element(p.term[0].b_type, p.term[0].b, b);
        p.c = element(p.c_type, p.c, c);
        en_status status = gemm_one(&p);
        if (status != EN_OK) grid->status = status;
    }
}

/* A batch of many products goes to threads whole; few products are each shared by all threads. */
static en_status gemm(const struct en_gemm *p, const struct en_batch *batch) {
    struct gemm_grid grid = {.p = p, .batch = batch, .status = EN_OK};
    int64_t products = 1;
    if (!batch) return gemm_one(p);
    for (int d = 0; d < batch->ndim; d++) products *= batch->shape[d];
    const int64_t threads = min64(gemm_threads((double)products * gemm_work(p)), en_get_threads());
    if (products >= 2 * threads)
        en_parallel_tasks(products, threads, gemm_products, &grid);
    else
        gemm_products(&grid, 0, products);
    return (en_status)grid.status;
}

#endif

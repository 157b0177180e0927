/* Products: C = the sum of up to eight A·B + bias + residual, any strides and float types, summed in f32, rounded once.
 *
 * The block algorithm of BLIS over an engine (kernels/tile.h). Rows of A are packed once, by all threads together, in
 * panels of at most mr. Then a task takes a block of columns: it packs its part of B, small enough to stay in L2, and
 * multiplies all rows with it, a tile of C in registers at a time. Transposes and other types cost nothing extra: packing
 * reads any strides and converts. Where there are few columns, B is packed beforehand too and tasks share it, each a part
 * of the rows.
 *
 * Terms are more steps of k: a tile's sums stay in registers from the end of one term to the beginning of the next.
 * Blocks of columns end where a term's columns do, so that every tile of a block has the same terms; a matrix that is A
 * of several terms is packed once.
 *
 * Every element of C is summed by one task, in an order that the shape alone decides: blocks of k in order, each from
 * zero. So bits don't depend on the number of threads. Tasks are claimed, not dealt out: a thread that the system keeps
 * waiting is left behind.
 */
#ifndef EN_GEMM_H
#define EN_GEMM_H

#include "skinny.h"

#ifndef EN_BF16_ENGINE
#ifdef EN_BF16_DOT
#define EN_BF16_ENGINE (&dot_engine)
#else
#define EN_BF16_ENGINE NULL
#endif
#endif

/* Words of memory that packed operands may take: A with all its k; a block of B with kc steps, in L2; B that is shared. */
enum { A_WORDS = 6 << 20, BLOCK_WORDS = 1 << 17, SHARED_WORDS = 1 << 20 };

/* Rows below which packing B is not worth it where it is f32 and its columns are contiguous. */
enum { FEW_ROWS = 2 * MR };

/* Columns [j0, j1) of C, which have the same terms, and how they are cut into blocks. */
struct group {
    int64_t j0, j1;
    int terms, term[EN_MAX_TERMS];
    int64_t steps; /* of all its terms */
    int64_t k_blocks;
    int64_t blocks, first_block;
    int64_t b_offset; /* of its shared B */
};

struct plan {
    const struct en_gemm *p;
    const struct engine *e;
    int64_t m0, m1, panels; /* rows at hand, and their panels */
    int64_t parts;          /* of those panels: tasks of one block of columns */
    int groups;
    struct group group[2 * EN_MAX_TERMS + 1];
    int64_t blocks;
    int shared;                                 /* B is packed before the tasks start */
    float *a[EN_MAX_TERMS];                     /* packed rows of every term's A; equal where the operands are */
    int owner[EN_MAX_TERMS];                    /* the first term with the same A */
    int64_t a_steps[EN_MAX_TERMS];
    float *b;
    int64_t row_tasks;
    _Atomic int status;
};

static inline int64_t steps_of(const struct engine *e, int64_t k) {
    return round_up(e->pairs ? (k + 1) / 2 : k, e->align);
}

static inline struct operand a_of(const struct en_term *t) { return (struct operand){t->a_type, t->a, t->a_row, t->a_col}; }
static inline struct operand b_of(const struct en_term *t) { return (struct operand){t->b_type, t->b, t->b_col, t->b_row}; }

/* A block of k: pieces of terms that are summed in registers together. */
struct piece {
    int term;
    int64_t step, steps, k0, k;
};
struct k_block {
    int pieces, last;
    struct piece piece[EN_MAX_TERMS];
    int64_t steps;
    int64_t before; /* steps of the blocks before */
    /* where the next one begins */
    int next_term;
    int64_t next_cut;
};

/* Moves on to the group's next block, zeroed before the first; false at the end. A term is cut as even as can be into
 * blocks of at most kc steps; short ones join the block before them. */
static int next_k_block(const struct plan *q, const struct group *g, struct k_block *b) {
    if (b->last) return 0;
    b->before += b->steps;
    b->pieces = 0;
    b->steps = 0;
    while (b->next_term < g->terms) {
        const int term = g->term[b->next_term], align = q->e->align;
        const int64_t units = q->a_steps[term] / align, cuts = max64(ceil_div(q->a_steps[term], q->e->kc), 1);
        const int64_t from = cut(units, cuts, b->next_cut) * align, to = cut(units, cuts, b->next_cut + 1) * align;
        if (b->pieces && b->steps + to - from > q->e->kc + q->e->kc / 4) return 1;
        const int64_t each = q->e->pairs ? 2 : 1;
        b->piece[b->pieces++] =
            (struct piece){term, from, to - from, from * each, min64(q->p->term[term].k, to * each) - from * each};
        b->steps += to - from;
        if (++b->next_cut == cuts) b->next_cut = 0, b->next_term++;
        if (b->next_cut) return 1;
    }
    b->last = 1;
    return 1;
}

/* Panels of A: all but the last rows of each are cut as even as can be. */
static inline int64_t panel_start(const struct plan *q, int64_t panel) { return cut(q->m1 - q->m0, q->panels, panel); }

/* Words of a panel of A; packing one may write VL words beyond its rows. */
static inline int64_t panel_words(const struct engine *e, int64_t steps) { return round_up(e->mr, e->pad) * steps + VL; }

static inline float *packed_a(const struct plan *q, int term, int64_t panel, int64_t h, int64_t step) {
    return q->a[term] + panel * panel_words(q->e, q->a_steps[term]) + step * round_up(h, q->e->pad);
}

/* Elements of k packed at a time where rows are contiguous: the panels beside read the same lines. */
enum { PACK_K = 64, PACK_PANELS = 8 };

static void pack_a_panels(const struct plan *q, int64_t task) {
    const int64_t first = task * PACK_PANELS, last = min64(q->panels, first + PACK_PANELS);
    for (int t = 0; t < q->p->terms; t++) {
        const struct operand a = a_of(&q->p->term[t]);
        const int64_t k = q->p->term[t].k, each = q->e->pairs ? 2 : 1, piece = a.k == 1 ? k : PACK_K;
        if (q->owner[t] != t) continue;
        for (int64_t k0 = 0; k0 < k; k0 += piece)
            for (int64_t r = first; r < last; r++) {
                const int64_t i = panel_start(q, r), h = panel_start(q, r + 1) - i;
                const int64_t some = min64(piece, k - k0), steps = k0 + some == k ? q->a_steps[t] - k0 / each : some / each;
                const struct operand at = operand_at(&a, q->m0 + i, k0);
                q->e->pack_a(q->e->pairs, packed_a(q, t, r, h, k0 / each), h, &at, h, some, steps);
            }
    }
}

static inline int64_t panel_width(int64_t n) { return n <= VL ? VL : NR; }
static inline int64_t padded_columns(int64_t n) { return n / NR * NR + (n % NR ? panel_width(n % NR) : 0); }

/* Columns of block `block` of a group: the panels are cut as even as can be. */
static inline int64_t block_start(const struct group *g, int64_t block) {
    return min64(g->j1, g->j0 + cut(ceil_div(g->j1 - g->j0, NR), g->blocks, block) * NR);
}

/* Does the tile read B where it lies, columns [j, j + n)? */
static inline int in_place(const struct plan *q, const struct en_term *t, int64_t n) {
    return !q->e->pairs && t->b_type == EN_F32 && t->b_col == 1 && q->p->m <= FEW_ROWS && n == panel_width(n);
}

/* B of columns [j0, j1) and one block of k: piece by piece, panel by panel. */
static void pack_b_block(const struct plan *q, const struct k_block *kb, int64_t j0, int64_t j1, float *dst) {
    const int64_t each = q->e->pairs ? 2 : 1;
    for (int i = 0; i < kb->pieces; i++) {
        const struct piece *piece = &kb->piece[i];
        const struct en_term *t = &q->p->term[piece->term];
        const struct operand b = b_of(t);
        const int64_t some_k = b.k == 1 ? piece->k : PACK_K;
        for (int64_t k0 = 0; k0 < piece->k; k0 += some_k)
            for (int64_t j = j0; j < j1; j += NR) {
                const int64_t n = min64(NR, j1 - j), width = panel_width(n), some = min64(some_k, piece->k - k0);
                if (in_place(q, t, n)) continue;
                const int64_t step = k0 / each, steps = k0 + some == piece->k ? piece->steps - step : some / each;
                const struct operand at = operand_at(&b, j - t->n0, piece->k0 + k0);
                pack(q->e->pairs, dst + (j - j0) * piece->steps + step * width, width, &at, n, some, steps);
            }
        dst += padded_columns(j1 - j0) * piece->steps;
    }
}

static const struct group *group_of_block(const struct plan *q, int64_t block) {
    const struct group *g = q->group;
    while (block >= g->first_block + g->blocks) g++;
    return g;
}

static inline float *shared_b(const struct plan *q, const struct group *g, int64_t j0, int64_t steps_before, int64_t j1) {
    return q->b + g->b_offset + (j0 - g->j0) * g->steps + padded_columns(j1 - j0) * steps_before;
}

static void pack_shared(void *context, int64_t begin, int64_t end) {
    const struct plan *q = context;
    for (int64_t task = begin; task < end; task++) {
        if (task < q->row_tasks) {
            pack_a_panels(q, task);
            continue;
        }
        const int64_t block = task - q->row_tasks;
        const struct group *g = group_of_block(q, block);
        const int64_t j0 = block_start(g, block - g->first_block), j1 = block_start(g, block - g->first_block + 1);
        for (struct k_block kb = {0}; next_k_block(q, g, &kb);)
            pack_b_block(q, &kb, j0, j1, shared_b(q, g, j0, kb.before, j1));
    }
}

/* FINISH: C (h,n) at (i,j) = sums, + C with old, + bias and residual with extras. The residual may be C itself. */
WORD void finish_as(enum en_dtype type, const struct en_gemm *p, const float *sums, int64_t row, int64_t i, int64_t j,
                    int64_t h, int64_t n, int old, int extras) {
    for (int64_t r = 0; r < h; r++)
        for (int64_t v = 0; v < n; v += VL) {
            const int64_t at = (i + r) * p->c_row + j + v;
            vf x = v_load(sums + r * row + v);
            if (old) x = v_add(load_as(type, p->c, at, n - v), x);
            if (extras && p->bias) x = v_add(x, v_load_n(p->bias + j + v, n - v));
            if (extras && p->residual)
                x = v_add(x, load_as(type, p->residual, (i + r) * p->residual_row + j + v, n - v));
            store_as(type, p->c, at, x, n - v);
        }
}
static void finish(const struct en_gemm *p, const float *sums, int64_t row, int64_t i, int64_t j, int64_t h, int64_t n,
                   int old, int extras) {
    if (p->c_type == EN_BF16)
        finish_as(EN_BF16, p, sums, row, i, j, h, n, old, extras);
    else
        finish_as(EN_F32, p, sums, row, i, j, h, n, old, extras);
}

/* One tile of C, from one block of k. f32 sums of several blocks meet in C itself, where the first brings the extras
 * along; those of bf16 meet in `sums`, and C is written with the last. */
static void one_tile(const struct plan *q, const struct k_block *kb, const struct segment *s, int64_t i, int64_t j,
                     int64_t h, int64_t n, float *sums) {
    const struct en_gemm *p = q->p;
    const int64_t width = panel_width(n);
    const int later = kb->before > 0;
    if (p->c_type == EN_F32) {
        const int plain = later || (!p->bias && !p->residual);
        if (plain && n == width) {
            q->e->tile(h, width, s, kb->pieces, (float *)p->c + i * p->c_row + j, p->c_row, later || p->accumulate);
            return;
        }
        q->e->tile(h, width, s, kb->pieces, sums, width, 0);
        finish(p, sums, width, i, j, h, n, later || p->accumulate, !later);
        return;
    }
    q->e->tile(h, width, s, kb->pieces, sums, width, later);
    if (kb->last) finish(p, sums, width, i, j, h, n, p->accumulate, 1);
}

static void multiply_block(void *context, int64_t begin, int64_t end) {
    struct plan *q = context;
    const struct en_gemm *p = q->p;
    const int64_t tile_words = round_up(q->e->mr, q->e->pad) * NR;
    for (int64_t task = begin; task < end; task++) {
        const int64_t block = task / q->parts, part = task % q->parts;
        const struct group *g = group_of_block(q, block);
        const int64_t j0 = block_start(g, block - g->first_block), j1 = block_start(g, block - g->first_block + 1);
        const int64_t r0 = cut(q->panels, q->parts, part), r1 = cut(q->panels, q->parts, part + 1);
        const int64_t columns = ceil_div(j1 - j0, NR);
        const int64_t most = min64(g->steps, q->e->kc + q->e->kc / 4);
        const int keeps = p->c_type != EN_F32 && g->k_blocks > 1;
        float *own = q->shared ? NULL : en_scratch(EN_SCRATCH_B, (size_t)(padded_columns(j1 - j0) * most + VL) * sizeof(float));
        float *sums = en_scratch(EN_SCRATCH_SUMS,
                                 (size_t)(tile_words * (keeps ? columns * (r1 - r0) : 1)) * sizeof(float));
        if (!sums || (!own && !q->shared)) {
            q->status = EN_NO_MEMORY;
            return;
        }
        for (struct k_block kb = {0}; next_k_block(q, g, &kb);) {
            const float *b = q->shared ? shared_b(q, g, j0, kb.before, j1) : own;
            if (!q->shared) pack_b_block(q, &kb, j0, j1, own);
            for (int64_t r = r0; r < r1; r++) {
                const int64_t i = panel_start(q, r), h = panel_start(q, r + 1) - i;
                for (int64_t c = 0; c < columns; c++) {
                    const int64_t j = j0 + c * NR, n = min64(NR, j1 - j), width = panel_width(n);
                    struct segment s[EN_MAX_TERMS];
                    const float *panel = b;
                    for (int x = 0; x < kb.pieces; x++) {
                        const struct piece *piece = &kb.piece[x];
                        const struct en_term *t = &p->term[piece->term];
                        s[x] = (struct segment){piece->steps, packed_a(q, piece->term, r, h, piece->step),
                                                panel + c * NR * piece->steps, width};
                        if (in_place(q, t, n)) {
                            s[x].b = (const float *)t->b + piece->k0 * t->b_row + j - t->n0;
                            s[x].b_row = t->b_row;
                        }
                        panel += padded_columns(j1 - j0) * piece->steps;
                    }
                    one_tile(q, &kb, s, q->m0 + i, j, h, n, sums + (keeps ? ((r - r0) * columns + c) * tile_words : 0));
                }
            }
        }
    }
}

/* Threads that this much work deserves. */
static inline int64_t gemm_threads(double multiply_adds) {
    return multiply_adds < 1e15 ? 1 + (int64_t)(multiply_adds / GEMM_GRAIN) : EN_MAX_THREADS;
}

static inline double gemm_work(const struct en_gemm *p) {
    double work = 0;
    for (int t = 0; t < p->terms; t++) work += (double)p->m * (double)p->term[t].n * (double)p->term[t].k;
    return work;
}

/* Cuts the columns where a term begins or ends. */
static void make_groups(struct plan *q) {
    const struct en_gemm *p = q->p;
    for (int64_t j = 0; j < p->n;) {
        struct group *g = &q->group[q->groups++];
        *g = (struct group){.j0 = j, .j1 = p->n};
        for (int t = 0; t < p->terms; t++) {
            const struct en_term *term = &p->term[t];
            const int64_t end = term->n0 + term->n;
            if (term->k == 0) continue;
            if (term->n0 > j) g->j1 = min64(g->j1, term->n0);
            if (end > j) g->j1 = min64(g->j1, end);
            if (term->n0 <= j && j < end) g->term[g->terms++] = t, g->steps += q->a_steps[t];
        }
        for (struct k_block kb = {0}; next_k_block(q, g, &kb);) g->k_blocks++;
        j = g->j1;
    }
}

static en_status gemm_blocks(const struct en_gemm *p, const struct engine *e) {
    struct plan q = {.p = p, .e = e, .status = EN_OK};
    const int64_t threads = min64(gemm_threads(gemm_work(p)), en_get_threads());
    int64_t a_words = 0; /* of a panel of all A */
    for (int t = 0; t < p->terms; t++) {
        const struct en_term *x = &p->term[t];
        q.a_steps[t] = steps_of(e, x->k);
        for (q.owner[t] = 0; q.owner[t] < t; q.owner[t]++) {
            const struct en_term *y = &p->term[q.owner[t]];
            if (x->a == y->a && x->a_type == y->a_type && x->a_row == y->a_row && x->a_col == y->a_col && x->k == y->k)
                break;
        }
        if (q.owner[t] == t) a_words += panel_words(e, q.a_steps[t]);
    }
    make_groups(&q);
    /* rows at a time, as many as A's memory holds */
    const int64_t most = max64(A_WORDS / a_words, 4) * e->mr, chunks = ceil_div(p->m, most), chunk = ceil_div(p->m, chunks);
    float *a = en_scratch(EN_SCRATCH_A, (size_t)(ceil_div(chunk, e->mr) * a_words) * sizeof(float));
    if (!a) return EN_NO_MEMORY;
    int64_t b_words = 0;
    for (int i = 0; i < q.groups; i++) {
        struct group *g = &q.group[i];
        g->b_offset = b_words;
        b_words += padded_columns(g->j1 - g->j0) * g->steps;
    }
    q.shared = b_words <= SHARED_WORDS;
    for (int i = 0; i < q.groups; i++) {
        struct group *g = &q.group[i];
        const int64_t panels = ceil_div(g->j1 - g->j0, NR);
        const int64_t each = max64(1, BLOCK_WORDS / NR / max64(min64(g->steps, e->kc), 1));
        g->blocks = ceil_div(panels, each);
        if (threads > 1 && !q.shared) g->blocks = min64(panels, round_up(g->blocks, threads));
        g->first_block = q.blocks;
        q.blocks += g->blocks;
    }
    if (q.shared && !(q.b = en_scratch(EN_SCRATCH_B, (size_t)(b_words + VL) * sizeof(float)))) return EN_NO_MEMORY;
    for (int64_t c = 0; c < chunks && q.status == EN_OK; c++) {
        q.m0 = cut(p->m, chunks, c), q.m1 = cut(p->m, chunks, c + 1);
        q.panels = ceil_div(q.m1 - q.m0, e->mr);
        float *at = a;
        for (int t = 0; t < p->terms; t++) {
            q.a[t] = q.owner[t] == t ? at : q.a[q.owner[t]];
            if (q.owner[t] == t) at += q.panels * panel_words(e, q.a_steps[t]);
        }
        q.parts = q.shared && threads > 1 ? max64(1, min64(q.panels / 2, ceil_div(4 * threads, q.blocks))) : 1;
        q.row_tasks = ceil_div(q.panels, PACK_PANELS);
        en_parallel_tasks(q.row_tasks + (q.shared && c == 0 ? q.blocks : 0), threads, pack_shared, &q);
        en_parallel_tasks(q.blocks * q.parts, threads, multiply_block, &q);
    }
    return (en_status)q.status;
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
        skinny = skinny && (few_rows(p->m, &p->term[t]) || few_columns(p->m, &p->term[t]));
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

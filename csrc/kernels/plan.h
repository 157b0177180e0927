/* How a product is cut: which columns have which terms, blocks of k, panels of rows, blocks of columns, tasks.
 *
 * Nothing here touches data. What decides the order in which an element's terms are summed, the blocks of k, depends on
 * the shape alone; the cuts of rows and columns may look at the number of threads.
 */
#ifndef EN_PLAN_H
#define EN_PLAN_H

#include "skinny.h"

#ifndef EN_BF16_ENGINE
#ifdef EN_BF16_DOT
#define EN_BF16_ENGINE (&dot_engine)
#else
#define EN_BF16_ENGINE NULL
#endif
#endif

/* Rows that packed A has at least, where tasks share it (A_WORDS is its size); and words of a packed B that they share,
 * in the last cache, at most and anyway. */
enum { A_ROWS = 1024, B_WORDS = 1 << 20, FEW_B_WORDS = 1 << 18 };

/* Rows below which packing B is not worth it where it is f32 and its columns are contiguous. */
enum { FEW_ROWS = 2 * MR };

/* Blocks of columns a thread, so that one which is kept waiting isn't waited for, and how many units they keep. */
enum { TASKS = 4, TASK_UNITS = 4 };

/* Columns [j0, j1) of C, which have the same terms, and how they are cut into blocks. */
struct group {
    int64_t j0, j1;
    int64_t unit; /* columns that blocks are cut at multiples of */
    int terms, term[EN_MAX_TERMS];
    int64_t steps; /* of all its terms */
    int64_t k_blocks;
    int64_t blocks, first_block;
    int64_t b_offset; /* of its shared B */
};

struct plan {
    const struct en_gemm *p;
    const struct engine *e;
    int64_t threads;
    int64_t panels;               /* of rows, cut as even as can be: so many each, */
    int64_t panel_rows, taller;   /* and one more in the first `taller` */
    int64_t row_tasks;            /* that pack panels of A */
    int groups;
    struct group group[2 * EN_MAX_TERMS + 1];
    int64_t blocks;               /* of columns */
    int by_rows;                  /* tasks share B and pack their rows of A; else they share A and pack their columns */
    int owner[EN_MAX_TERMS];      /* the first term with the same A */
    int64_t a_steps[EN_MAX_TERMS];
    int64_t a_offset[EN_MAX_TERMS]; /* of its words among those of a panel; or -1: its A is read in place */
    int64_t a_words;              /* of a panel of A, of all terms */
    int64_t steps;                /* of all A, packed or not */
    int64_t b_words;
    float *a, *b;
    _Atomic int64_t next_task; /* not claimed yet */
    _Atomic int status;
};

static inline int64_t steps_of(const struct engine *e, int64_t k) {
    return round_up(e->pairs ? (k + 1) / 2 : k, e->align);
}

/* Blocks of k of a term, cut as even as can be, and where block i begins. */
static inline int64_t k_cuts(const struct engine *e, int64_t steps) { return max64(ceil_div(steps, e->kc), 1); }
static inline int64_t step_cut(const struct engine *e, int64_t steps, int64_t cuts, int64_t i) {
    return cut(steps / e->align, cuts, i) * e->align;
}
static inline int64_t k_cut(const struct engine *e, int64_t k, int64_t cuts, int64_t i) {
    return min64(k, step_cut(e, steps_of(e, k), cuts, i) * (e->pairs ? 2 : 1));
}

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
        const int term = g->term[b->next_term];
        const int64_t steps = q->a_steps[term], cuts = k_cuts(q->e, steps), k = q->p->term[term].k;
        const int64_t from = step_cut(q->e, steps, cuts, b->next_cut);
        const int64_t to = step_cut(q->e, steps, cuts, b->next_cut + 1);
        if (b->pieces && b->steps + to - from > q->e->kc + q->e->kc / 4) return 1;
        const int64_t k0 = k_cut(q->e, k, cuts, b->next_cut), k1 = k_cut(q->e, k, cuts, b->next_cut + 1);
        b->piece[b->pieces++] = (struct piece){term, from, to - from, k0, k1 - k0};
        b->steps += to - from;
        if (++b->next_cut == cuts) b->next_cut = 0, b->next_term++;
        if (b->next_cut) return 1;
    }
    b->last = 1;
    return 1;
}

/* First row of a panel of A. Every tile asks: no division. */
static inline int64_t panel_start(const struct plan *q, int64_t panel) {
    return panel * q->panel_rows + min64(panel, q->taller);
}

/* Where a step of a term begins in a packed panel of h rows. Packing may write VL words beyond its rows. */
static inline float *packed_a(const struct plan *q, float *panel, int term, int64_t h, int64_t step) {
    return panel + q->a_offset[term] + step * round_up(h, q->e->pad);
}

static inline int64_t panel_width(int64_t n) { return n <= VL ? VL : NR; }
static inline int64_t padded_columns(int64_t n) { return n / NR * NR + (n % NR ? panel_width(n % NR) : 0); }

/* Columns [j0, j1) of a group, all of one task. */
struct columns {
    const struct group *g;
    int64_t j0, j1;
};

/* The units of a group are cut as even as can be. */
static struct columns columns_of_block(const struct plan *q, int64_t block) {
    const struct group *g = q->group;
    while (block >= g->first_block + g->blocks) g++;
    const int64_t units = ceil_div(g->j1 - g->j0, g->unit), i = block - g->first_block;
    return (struct columns){g, min64(g->j1, g->j0 + cut(units, g->blocks, i) * g->unit),
                            min64(g->j1, g->j0 + cut(units, g->blocks, i + 1) * g->unit)};
}

/* Where shared B begins, for some columns and a block of k. */
static inline float *shared_b(const struct plan *q, struct columns c, int64_t steps_before) {
    return q->b + c.g->b_offset + (c.j0 - c.g->j0) * c.g->steps + padded_columns(c.j1 - c.j0) * steps_before;
}

/* Does the tile read A where it lies: rows of whole words? */
static inline int rows_in_place(const struct engine *e, int64_t n, const struct en_term *t) {
    if (n > e->in_place || t->a_col != 1 || t->a_row == 0) return 0;
    if (!e->pairs) return t->a_type == EN_F32;
    return t->a_type == EN_BF16 && t->a_row % 2 == 0 && t->k % 2 == 0 && (uintptr_t)t->a % 4 == 0;
}

/* Does the tile read B where it lies, n columns of it? */
static inline int in_place(const struct plan *q, const struct en_term *t, int64_t n) {
    return !q->e->pairs && !t->packed && t->b_type == EN_F32 && t->b_col == 1 && q->p->m <= FEW_ROWS && n == panel_width(n);
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
        *g = (struct group){.j0 = j, .j1 = p->n, .unit = NR};
        for (int t = 0; t < p->terms; t++) {
            const struct en_term *term = &p->term[t];
            const int64_t end = term->n0 + term->n;
            if (term->k == 0) continue;
            if (term->n0 > j) g->j1 = min64(g->j1, term->n0);
            if (end > j) g->j1 = min64(g->j1, end);
            if (term->n0 > j || j >= end) continue;
            g->term[g->terms++] = t, g->steps += q->a_steps[t];
            if (term->packed && term->b_col == 1) g->unit = max64(g->unit, round_up(term->packed->values, NR));
        }
        if (ceil_div(g->j1 - g->j0, g->unit) < 2 * q->threads) g->unit = NR; /* rather decode some twice */
        for (struct k_block kb = {0}; next_k_block(q, g, &kb);) g->k_blocks++;
        j = g->j1;
    }
}

static int same_a(const struct en_term *x, const struct en_term *y) {
    return x->a == y->a && x->a_type == y->a_type && x->a_row == y->a_row && x->a_col == y->a_col && x->k == y->k;
}

static struct plan make_plan(const struct en_gemm *p, const struct engine *e) {
    struct plan q = {.p = p, .e = e, .status = EN_OK};
    q.threads = min64(gemm_threads(gemm_work(p)), en_get_threads());
    for (int t = 0; t < p->terms; t++) {
        q.a_steps[t] = steps_of(e, p->term[t].k);
        while (!same_a(&p->term[q.owner[t]], &p->term[t])) q.owner[t]++;
        q.a_offset[t] = q.owner[t] < t ? q.a_offset[q.owner[t]] : rows_in_place(e, p->n, &p->term[t]) ? -1 : q.a_words;
        if (q.owner[t] < t) continue;
        q.steps += q.a_steps[t];
        if (q.a_offset[t] >= 0) q.a_words += round_up(e->mr, e->pad) * q.a_steps[t] + VL;
    }
    make_groups(&q);
    for (int i = 0; i < q.groups; i++) {
        q.group[i].b_offset = q.b_words;
        q.b_words += padded_columns(q.group[i].j1 - q.group[i].j0) * q.group[i].steps;
    }
    q.panels = ceil_div(p->m, e->mr);
    q.panel_rows = p->m / q.panels, q.taller = p->m % q.panels;
    q.by_rows = q.b_words <= FEW_B_WORDS || q.b_words <= min64(B_WORDS, p->m * q.steps);
    for (int i = 0; i < q.groups; i++) {
        struct group *g = &q.group[i];
        const int64_t units = ceil_div(g->j1 - g->j0, g->unit);
        const int64_t most = max64(1, e->block / g->unit / max64(min64(g->steps, e->kc), 1));
        g->blocks = ceil_div(units, most);
        if (q.threads > 1 && !q.by_rows) {
            g->blocks = max64(g->blocks, min64(TASKS * q.threads, units / TASK_UNITS));
            g->blocks = min64(units, round_up(g->blocks, q.threads));
        }
        g->first_block = q.blocks;
        q.blocks += g->blocks;
    }
    q.row_tasks = ceil_div(q.panels, max64(1, min64(PACK_PANELS, q.panels / (4 * q.threads))));
    q.row_tasks = min64(q.panels, round_up(q.row_tasks, q.threads));
    return q;
}

#endif

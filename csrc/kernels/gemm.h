/* A product along a plan: C = the sum of up to eight A·B + bias + residual, any strides and float types, summed in f32,
 * rounded once.
 *
 * The block algorithm of BLIS over an engine (kernels/tile.h). Rows of A whose words lie side by side are read where
 * they are, up to as many columns as the level says; others are packed once, by all threads together, in panels of at
 * most mr. Then a task takes a block of columns: it packs its part of B and multiplies all rows with it, a tile of C in
 * registers at a time, while the memory of the block after it is fetched. Transposes and other types need no passes of
 * their own: packing reads any strides and converts. Where B is the smaller operand it is what all pack and share, and a
 * task takes rows. Packed operands that would not stay in the last cache are product.h's concern.
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

#include "plan.h"

/* Panels [first, last) of A, every operand once, to a. */
static void pack_a_rows(const struct plan *q, int64_t first, int64_t last, float *a) {
    const int pairs = q->e->pairs, each = pairs ? 2 : 1;
    for (int t = 0; t < q->p->terms; t++) {
        const struct operand o = a_of(&q->p->term[t]);
        const int64_t k = q->p->term[t].k, most = o.k == 1 ? k : PACK_K;
        if (q->owner[t] != t || q->a_offset[t] < 0) continue;
        for (int64_t k0 = 0; k0 < k; k0 += most)
            for (int64_t r = first; r < last; r++) {
                const int64_t i = panel_start(q, r), h = panel_start(q, r + 1) - i, some = min64(most, k - k0);
                const int64_t steps = k0 + some == k ? q->a_steps[t] - k0 / each : some / each;
                const struct operand at = operand_at(&o, i, k0);
                q->e->pack_a(pairs, packed_a(q, a + (r - first) * q->a_words, t, h, k0 / each), h, &at, h, some, steps);
            }
    }
}

/* Columns of a packed B and a piece of k, in patches that are decoded and then laid out: along k the columns of a panel,
 * along columns several panels. Every element is decoded once, but for blocks that a patch's edge cuts in two. */
static void pack_unpacked(const struct plan *q, const struct piece *piece, struct columns c, float *dst) {
    _Alignas(64) float patch[PATCH_LINES * PATCH_ROW];
    const int pairs = q->e->pairs, each = pairs ? 2 : 1;
    const struct en_term *t = &q->p->term[piece->term];
    const struct operand all = b_of(t), b = operand_at(&all, c.j0 - t->n0, piece->k0);
    const int64_t columns = c.j1 - c.j0, lines = pairs ? PATCH_LINES : PATCH_LINES / 2;
    for (int64_t k0 = 0, some; k0 < piece->k; k0 += some) {
        some = b.k == 1 ? patch_run(&b, k0) / each * each : lines;
        some = min64(some, piece->k - k0);
        const int64_t step = k0 / each, steps = k0 + some == piece->k ? piece->steps - step : some / each;
        for (int64_t j0 = 0, wide; j0 < columns; j0 += wide) {
            wide = min64(b.k == 1 ? NR : round_up(patch_run(&b, j0), NR), columns - j0);
            const struct operand from = operand_at(&b, j0, k0);
            if (unpack_panels(pairs, &from, wide, some, steps, dst + j0 * piece->steps + step * NR, NR * piece->steps))
                continue;
            const struct operand dense = unpack(pairs, &from, wide, some, patch);
            for (int64_t j = j0; j < j0 + wide; j += NR) {
                const int64_t n = min64(NR, columns - j), width = panel_width(n);
                const struct operand at = operand_at(&dense, j - j0, 0);
                pack(pairs, dst + j * piece->steps + step * width, width, &at, n, some, steps);
            }
        }
    }
}

/* Columns of B and one block of k: piece by piece, panel by panel. */
static void pack_b_columns(const struct plan *q, const struct k_block *kb, struct columns c, float *dst) {
    const int pairs = q->e->pairs, each = pairs ? 2 : 1;
    for (int i = 0; i < kb->pieces; i++) {
        const struct piece *piece = &kb->piece[i];
        const struct en_term *t = &q->p->term[piece->term];
        const struct operand b = b_of(t);
        const int64_t most = b.k == 1 ? piece->k : PACK_K;
        if (b.packed) pack_unpacked(q, piece, c, dst);
        for (int64_t k0 = 0; k0 < piece->k && !b.packed; k0 += most)
            for (int64_t j = c.j0; j < c.j1; j += NR) {
                const int64_t n = min64(NR, c.j1 - j), width = panel_width(n), some = min64(most, piece->k - k0);
                const int64_t step = k0 / each, steps = k0 + some == piece->k ? piece->steps - step : some / each;
                const struct operand at = operand_at(&b, j - t->n0, piece->k0 + k0);
                if (in_place(q, t, n)) continue;
                pack(pairs, dst + (j - c.j0) * piece->steps + step * width, width, &at, n, some, steps);
            }
        dst += padded_columns(c.j1 - c.j0) * piece->steps;
    }
}

/* What tasks share: columns of B, or rows of A. */
static void pack_shared(void *context, int64_t begin, int64_t end) {
    const struct plan *q = context;
    for (int64_t task = begin; task < end; task++) {
        if (!q->by_rows) {
            const int64_t first = cut(q->panels, q->row_tasks, task), last = cut(q->panels, q->row_tasks, task + 1);
            pack_a_rows(q, first, last, q->a + first * q->a_words);
            continue;
        }
        const struct columns c = columns_of_block(q, task);
        for (struct k_block kb = {0}; next_k_block(q, c.g, &kb);)
            pack_b_columns(q, &kb, c, shared_b(q, c, kb.before));
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

/* One tile of C (h, n), from one block of k. f32 sums of several blocks meet in C itself, where the first brings the
 * extras along; those of bf16 meet in `sums`, and C is written with the last. */
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

/* LOOK AHEAD: while one block of B is multiplied, the memory of the next comes into cache, some lines with every tile.
 * The part of that memory which is left: rows of contiguous bytes. */
struct ahead {
    const char *row;
    int64_t rows, stride, bytes, at;
    int64_t lines; /* a tile */
};

static struct ahead look_ahead(const struct plan *q, const struct k_block *kb, struct columns c, int64_t tiles) {
    struct ahead x = {0};
    const struct piece *most = kb->piece;
    if (!kb->pieces) return x;
    for (int i = 1; i < kb->pieces; i++)
        if (kb->piece[i].k > most->k) most = &kb->piece[i];
    const struct operand all = b_of(&q->p->term[most->term]);
    const struct operand b = operand_at(&all, c.j0 - q->p->term[most->term].n0, most->k0);
    const int64_t n = c.j1 - c.j0;
    x.row = b.packed ? stored_at(b.packed, b.at) : b.data;
    if (b.k == 1)
        x.rows = n, x.stride = bytes_of(&b, b.row), x.bytes = bytes_of(&b, most->k);
    else if (b.row == 1)
        x.rows = most->k, x.stride = bytes_of(&b, b.k), x.bytes = bytes_of(&b, n);
    x.lines = ceil_div(x.rows * (x.bytes / 64 + 1), tiles);
    return x;
}

static inline void fetch_ahead(struct ahead *x) {
    for (int64_t i = 0; i < x->lines && x->rows; i++) {
        __builtin_prefetch(x->row + x->at, 0, 2);
        x->at += 64;
        if (x->at >= x->bytes) x->at = 0, x->row += x->stride, x->rows--;
    }
}

/* Panel r of A, packed at a, times panel v of some columns, packed at b: all pieces of a block of k. */
static void one_pair(const struct plan *q, const struct k_block *kb, struct columns c, int64_t r, float *a, int64_t v,
                     const float *b, float *sums) {
    const int64_t i = panel_start(q, r), h = panel_start(q, r + 1) - i;
    const int64_t j = c.j0 + v * NR, n = min64(NR, c.j1 - j), width = padded_columns(c.j1 - c.j0);
    struct segment s[EN_MAX_TERMS];
    for (int x = 0; x < kb->pieces; x++) {
        const struct piece *piece = &kb->piece[x];
        const struct en_term *t = &q->p->term[piece->term];
        s[x] = (struct segment){.steps = piece->steps, .b = b + v * NR * piece->steps, .b_row = panel_width(n)};
        if (q->a_offset[piece->term] < 0) {
            s[x].a = element(t->a_type, t->a, i * t->a_row + piece->k0);
            s[x].a_row = q->e->pairs ? t->a_row / 2 : t->a_row;
        } else {
            s[x].a = packed_a(q, a, piece->term, h, piece->step);
        }
        if (in_place(q, t, n)) {
            s[x].b = (const float *)t->b + piece->k0 * t->b_row + j - t->n0;
            s[x].b_row = t->b_row;
        }
        b += width * piece->steps;
    }
    one_tile(q, kb, s, i, j, h, n, sums);
}

/* Panels [r0, r1) of A, packed at a, times some columns; the columns that this thread will turn to next, or NULL.
 * False: no memory. */
static int multiply(const struct plan *q, struct columns c, int64_t r0, int64_t r1, float *a,
                    const struct columns *next) {
    const struct en_gemm *p = q->p;
    const int64_t tile_words = round_up(q->e->mr, q->e->pad) * NR, width = padded_columns(c.j1 - c.j0);
    const int64_t panels = ceil_div(c.j1 - c.j0, NR);
    const int keeps = p->c_type != EN_F32 && c.g->k_blocks > 1;
    float *sums = en_scratch(EN_SCRATCH_SUMS, (size_t)(tile_words * (keeps ? panels * (r1 - r0) : 1)) * sizeof(float));
    float *own = NULL;
    if (!q->by_rows) {
        const int64_t steps = min64(c.g->steps, q->e->kc + q->e->kc / 4);
        own = en_scratch(EN_SCRATCH_B, (size_t)(width * steps) * sizeof(float));
    }
    if (!sums || (!q->by_rows && !own)) return 0;
    if (q->e->begin) q->e->begin();
    for (struct k_block kb = {0}; next_k_block(q, c.g, &kb);) {
        float *b = q->by_rows ? shared_b(q, c, kb.before) : own;
        struct ahead ahead = {0};
        if (!q->by_rows) {
            pack_b_columns(q, &kb, c, own);
            struct k_block after = kb, first = {0};
            const int64_t tiles = (r1 - r0) * panels;
            if (next_k_block(q, c.g, &after))
                ahead = look_ahead(q, &after, c, tiles);
            else if (next && next_k_block(q, next->g, &first))
                ahead = look_ahead(q, &first, *next, tiles);
        }
        for (int64_t v0 = 0; v0 < panels; v0 += ABREAST)
            for (int64_t r = r0; r < r1; r++)
                for (int64_t v = v0; v < min64(panels, v0 + ABREAST); v++) {
                    fetch_ahead(&ahead);
                    one_pair(q, &kb, c, r, a + (r - r0) * q->a_words, v, b,
                             sums + (keeps ? ((r - r0) * panels + v) * tile_words : 0));
                }
    }
    if (q->e->end) q->e->end();
    return 1;
}

/* Tasks: all rows times a block of columns, which are packed here. A thread claims its next task before it starts on
 * one, so that it knows where to look ahead. */
static void multiply_columns(void *context, int64_t begin, int64_t end) {
    struct plan *q = context;
    (void)begin, (void)end;
    for (int64_t next, task = q->next_task++; task < q->blocks; task = next) {
        next = q->next_task++;
        const struct columns c = columns_of_block(q, task), after = columns_of_block(q, min64(next, q->blocks - 1));
        if (!multiply(q, c, 0, q->panels, q->a, next < q->blocks ? &after : NULL)) q->status = EN_NO_MEMORY;
    }
}

/* Tasks: some panels of rows, which are packed here, times all columns. */
static void multiply_rows(void *context, int64_t begin, int64_t end) {
    struct plan *q = context;
    float *a = en_scratch(EN_SCRATCH_A, (size_t)(ceil_div(q->panels, q->row_tasks) * q->a_words + VL) * sizeof(float));
    if (!a) q->status = EN_NO_MEMORY;
    for (int64_t task = begin; task < end && a; task++) {
        const int64_t first = cut(q->panels, q->row_tasks, task), last = cut(q->panels, q->row_tasks, task + 1);
        pack_a_rows(q, first, last, a);
        for (int64_t block = 0; block < q->blocks; block++)
            if (!multiply(q, columns_of_block(q, block), first, last, a, NULL)) q->status = EN_NO_MEMORY;
    }
}

static en_status gemm_planned(struct plan *q) {
    if (q->by_rows) {
        if (!(q->b = en_scratch(EN_SCRATCH_B, (size_t)(q->b_words + 1) * sizeof(float)))) return EN_NO_MEMORY;
        en_parallel_tasks(q->blocks, q->threads, pack_shared, q);
        en_parallel_tasks(q->row_tasks, q->threads, multiply_rows, q);
    } else {
        q->a = en_scratch(EN_SCRATCH_A, (size_t)(q->panels * q->a_words + VL) * sizeof(float));
        if (!q->a) return EN_NO_MEMORY;
        if (q->a_words) en_parallel_tasks(q->row_tasks, q->threads, pack_shared, q);
        en_parallel_for(min64(q->threads, q->blocks), 1, multiply_columns, q);
    }
    return (en_status)q->status;
}

#endif

/* Engines: what multiplies packed panels (kernels/pack.h) into a tile of C.
 *
 * The f32 engine does a fused multiply-add a word, the bf16 engine a dot product of two pairs; both keep a tile of
 * (MR, NR) sums in registers over all its segments, written over the words, no assembly. A level with another unit
 * (tiles of AMX) writes an engine of its own and names it EN_BF16_ENGINE; kernels/gemm.h is the same for all.
 */
#ifndef EN_TILE_H
#define EN_TILE_H

#include "pack.h"

/* What a level says of its products:
 *   MR, NV         rows and vectors of a register tile
 *   KC             most steps of a block of k
 *   BLOCK          words of a block of B, which one task packs
 *   ABREAST        panels of a block of B that a panel of A meets before the next panel of A does
 *   UNROLL         steps that a tile's loop over packed operands is written out for
 *   PACK_K         elements of k packed at a time where it is the other side that is contiguous: so many rows are read
 *                  side by side
 *   PACK_PANELS    panels of A packed together: where columns are contiguous, they read the same lines
 *   FETCH          elements that packing fetches ahead in a row; or 0, nor does it fetch the next rows
 *   ROWS_IN_PLACE  columns of a product up to which rows of A are read where they lie; packing pays beyond
 *   A_WORDS        words of packed A that tasks share, in the last cache
 *   DEEP_BY_ROWS   is a deep product of few columns taken in parts of k, so that tasks can share B (product.h) */
enum { NR = NV * VL };

/* Dot products made at once (skinny.h): of so many vectors of x with so many of w. */
enum { DOT_M = 4, DOT_N = VL == 16 ? 4 : 2 };

/* Steps of k: of a packed panel of A, or where a_row isn't 0, of rows that lie in place, their words a_row apart; and
 * of a panel of B, b_row words from a step to the next. */
struct segment {
    int64_t steps;
    const float *a, *b;
    int64_t a_row, b_row;
};

/* c (h, width) = or += the sum over the segments of a·b. width is that of b's panels, NR or VL; all is written. */
typedef void (*tile_fn)(int64_t h, int64_t width, const struct segment *s, int count, float *c, int64_t c_row,
                        int accumulate);

struct engine {
    int pairs;    /* a step is two k, in bf16; else one, in f32 */
    int align;    /* steps of a segment are a multiple of it; the packed ones beyond k are zero */
    int in_place; /* columns of a product up to which tiles are given rows of A that aren't packed */
    int mr;       /* most rows of a tile, and of a panel of A */
    int pad;      /* words a step of a packed panel of A: its rows, rounded up to a multiple of this */
    int kc;       /* most steps that are summed before C is visited */
    int block;    /* words of a block of B */
    void (*pack_a)(int pairs, float *dst, int64_t h, const struct operand *a, int64_t rows, int64_t k, int64_t steps);
    tile_fn tile;
    void (*begin)(void), (*end)(void); /* around a thread's calls of tile; or NULL */
};

/* A product of blocks that lie in rows, as attention has them (kernels/attention_tile.h), in words. A level with tiles
 * for pairs writes a block_fn and names it EN_BF16_BLOCKS: n and depth are then multiples of 16, a_step is 1, and rows
 * of a and c exist, whatever they hold, up to a multiple of 16. */
struct block {
    int64_t depth;         /* along k */
    int64_t a_row, a_step; /* from a row of a to the next, from a k to the next */
    int64_t a_strip;       /* where rows of a come in strips: from one to the next; else 0 */
    int64_t b_row, c_row;
    int add; /* to what c holds */
};

/* c (m,n) = a·b, or added to c; keep: NULL, or a factor for each column of c, which is then multiplied and added to. */
typedef void (*block_fn)(int64_t m, int64_t n, const struct block *q, const float *a, const float *b, float *c,
                         const float *keep);

/* A word of A, which may be a pair of bf16 where it lies. */
typedef float word __attribute__((may_alias));

/* Sums += h words of A times nv vectors of B. */
WORD void sum_step(const int pairs, const int h, const int nv, const float *a, const float *b, vf acc[MR][NV]) {
    vf row[NV];
#pragma GCC unroll 16
    for (int v = 0; v < nv; v++) row[v] = v_load(b + v * VL);
#pragma GCC unroll 16
    for (int i = 0; i < h; i++)
#pragma GCC unroll 16
        for (int v = 0; v < nv; v++) acc[i][v] = word_fma(pairs, v_set(a[i]), row[v], acc[i][v]);
}

/* Sums += a packed panel of A times a panel of B, which is packed as well but for few rows (plan.h). */
WORD void sum_panel(const int pairs, const int h, const int nv, const struct segment *s, vf acc[MR][NV]) {
    const float *a = s->a, *b = s->b;
    const int64_t b_row = s->b_row;
    if (b_row == nv * VL) {
#pragma GCC unroll UNROLL
        for (int64_t j = 0; j < s->steps; j++) sum_step(pairs, h, nv, a + j * h, b + j * nv * VL, acc);
    } else {
        for (int64_t j = 0; j < s->steps; j++, a += h, b += b_row) sum_step(pairs, h, nv, a, b, acc);
    }
}

/* Sums += rows of A in place times a panel of B. A pointer serves three rows, as far as addresses of x86 reach. */
WORD void sum_rows(const int pairs, const int h, const int nv, const struct segment *s, vf acc[MR][NV]) {
    const word *a[(MR + 2) / 3];
    const float *b = s->b;
    const int64_t a_row = s->a_row, b_row = s->b_row;
#pragma GCC unroll 16
    for (int g = 0; g < (h + 2) / 3; g++) a[g] = s->a + 3 * g * a_row;
    for (int64_t j = 0; j < s->steps; j++, b += b_row) {
        vf row[NV];
#pragma GCC unroll 16
        for (int v = 0; v < nv; v++) row[v] = v_load(b + v * VL);
#pragma GCC unroll 16
        for (int i = 0; i < h; i++)
#pragma GCC unroll 16
            for (int v = 0; v < nv; v++) acc[i][v] = word_fma(pairs, v_set(a[i / 3][i % 3 * a_row]), row[v], acc[i][v]);
#pragma GCC unroll 16
        for (int g = 0; g < (h + 2) / 3; g++) a[g]++;
    }
}

WORD void tile_of(const int pairs, const int h, const int nv, const struct segment *s, int count, float *c,
                  int64_t c_row, int accumulate) {
    vf acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < h; i++)
#pragma GCC unroll 16
        for (int v = 0; v < nv; v++) {
            __builtin_prefetch(c + i * c_row + v * VL, 1);
            acc[i][v] = v_zero();
        }
    for (; count > 0; count--, s++) {
        if (s->a_row)
            sum_rows(pairs, h, nv, s, acc);
        else
            sum_panel(pairs, h, nv, s, acc);
    }
#pragma GCC unroll 16
    for (int i = 0; i < h; i++)
#pragma GCC unroll 16
        for (int v = 0; v < nv; v++) {
            float *at = c + i * c_row + v * VL;
            v_store(at, accumulate ? v_add(v_load(at), acc[i][v]) : acc[i][v]);
        }
}

/* One function a height and width, so that no row of a tile is wasted. */
#define TILE(name, pairs, h)                                                                                          \
    static void name##_##h(int64_t nv, const struct segment *s, int count, float *c, int64_t c_row, int accumulate) { \
        if (nv == NV)                                                                                                 \
            tile_of(pairs, h <= MR ? h : MR, NV, s, count, c, c_row, accumulate);                                     \
        else                                                                                                          \
            tile_of(pairs, h <= MR ? h : MR, 1, s, count, c, c_row, accumulate);                                      \
    }
#define TILES(name, pairs)                                                                                            \
    TILE(name, pairs, 1) TILE(name, pairs, 2) TILE(name, pairs, 3) TILE(name, pairs, 4) TILE(name, pairs, 5)          \
    TILE(name, pairs, 6) TILE(name, pairs, 7) TILE(name, pairs, 8) TILE(name, pairs, 9) TILE(name, pairs, 10)         \
    TILE(name, pairs, 11) TILE(name, pairs, 12) TILE(name, pairs, 13) TILE(name, pairs, 14)                           \
    static void name(int64_t h, int64_t width, const struct segment *s, int count, float *c, int64_t c_row,           \
                     int accumulate) {                                                                                \
        static void (*const of_height[])(int64_t, const struct segment *, int, float *, int64_t, int) = {             \
            NULL,     name##_1, name##_2, name##_3,  name##_4,  name##_5,  name##_6, name##_7,                        \
            name##_8, name##_9, name##_10, name##_11, name##_12, name##_13, name##_14};                               \
        of_height[h](width / VL, s, count, c, c_row, accumulate);                                                     \
    }
_Static_assert(MR <= 14, "a tile function for every height");

TILES(tile_f32, 0)
static const struct engine f32_engine = {
    .align = 1, .in_place = ROWS_IN_PLACE, .mr = MR, .pad = 1, .kc = KC, .block = BLOCK, .pack_a = pack,
    .tile = tile_f32};

#ifdef EN_BF16_DOT
TILES(tile_dot, 1)
static const struct engine dot_engine = {
    .pairs = 1, .align = 1, .in_place = ROWS_IN_PLACE, .mr = MR, .pad = 1, .kc = 640, .block = 640 * 4 * NR,
    .pack_a = pack, .tile = tile_dot};
#endif
#undef TILE
#undef TILES

#endif

/* Products of blocks for attention: c (m,n) = a (m,k) · b (k,n), or c times a factor a column plus that.
 *
 * Operands are packed into words of 32 bits. A word is a float or, where arrays are bf16 and the level multiplies
 * those, a pair of neighbours along k, so that one tile serves both: words of a are broadcast, those of b lie across
 * lanes. n is a multiple of VL.
 *
 * A level with tiles (EN_BF16_BLOCKS) gives them its pairs. Tiles come whole: k is filled up with zeros (`words`), in
 * both operands, since 0 · NaN is NaN; c has room for whole ones; words of a row of a lie side by side.
 */
#ifndef EN_ATTENTION_TILE_H
#define EN_ATTENTION_TILE_H

#include "gemm.h"

#ifdef EN_BF16_BLOCKS
enum { TILED = 1, PAIRED = 1 };
#elif defined EN_FAST_BF16_DOT
enum { TILED = 0, PAIRED = 1 };
#else
enum { TILED = 0, PAIRED = 0 };
#endif

enum {
    ATTENTION_KEYS = 128, /* of a block */
    TILE_K = 32,          /* elements of a tile along k */
};

/* Are words of arrays of this type pairs, and multiplied by tiles? */
WORD int in_pairs(enum en_dtype type) { return PAIRED && type == EN_BF16; }
WORD int in_tiles(enum en_dtype type) { return TILED && type == EN_BF16; }

/* Words that hold n elements of k. */
WORD int64_t words(enum en_dtype type, int64_t n) {
    return in_tiles(type) ? round_up(n, TILE_K) / 2 : in_pairs(type) ? (n + 1) / 2 : n;
}

/* Keys come in multiples of this; those beyond the last are zero, and hidden. */
WORD int64_t key_unit(enum en_dtype type) { return in_tiles(type) ? TILE_K : 2; }

WORD int64_t whole_vectors(int64_t n) { return round_up(n, VL); }

/* A tile of c: vectors across; rows, of tiles as wide as that and of narrower ones. Sums fill the registers. */
enum { TILE_WIDTH = VL == 8 ? 2 : 4, TILE_ROWS = 6, NARROW_ROWS = 8 };

WORD void block_tile(const int pairs, const int w, const int h, const struct block *q, const float *a, const float *b,
                     float *c, const float *keep) {
    const int64_t a_row = q->a_row, a_step = q->a_step, b_row = q->b_row, c_row = q->c_row;
    const int add = q->add;
    vf acc[NARROW_ROWS][TILE_WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < h; i++)
#pragma GCC unroll 4
        for (int v = 0; v < w; v++) acc[i][v] = v_zero();
    for (int64_t left = q->depth; left > 0; left--, a += a_step, b += b_row) {
        vf row[TILE_WIDTH];
#pragma GCC unroll 4
        for (int v = 0; v < w; v++) row[v] = v_load(b + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < h; i++) {
            const vf x = v_set(a[i * a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < w; v++) acc[i][v] = word_fma(pairs, x, row[v], acc[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < h; i++)
#pragma GCC unroll 4
        for (int v = 0; v < w; v++) {
            float *at = c + i * c_row + v * VL;
            if (keep)
                acc[i][v] = v_fma(v_load(at), v_load(keep + v * VL), acc[i][v]);
            else if (add)
                acc[i][v] = v_add(v_load(at), acc[i][v]);
            v_store(at, acc[i][v]);
        }
}

typedef void (*block_tile_fn)(const struct block *, const float *, const float *, float *, const float *);

/* One function a width and height, so that nothing of a tile is wasted. */
#define BLOCK_TILE(pairs, w, h)                                                                                      \
    static void block_tile_##pairs##_##w##_##h(const struct block *q, const float *a, const float *b, float *c,      \
                                               const float *keep) {                                                  \
        block_tile(pairs, w < TILE_WIDTH ? w : TILE_WIDTH, w >= TILE_WIDTH && h > TILE_ROWS ? TILE_ROWS : h, q, a, b, \
                   c, keep);                                                                                         \
    }
#define BLOCK_TILES(pairs, w)                                                                                        \
    BLOCK_TILE(pairs, w, 1) BLOCK_TILE(pairs, w, 2) BLOCK_TILE(pairs, w, 3) BLOCK_TILE(pairs, w, 4)                  \
    BLOCK_TILE(pairs, w, 5) BLOCK_TILE(pairs, w, 6) BLOCK_TILE(pairs, w, 7) BLOCK_TILE(pairs, w, 8)                  \
    static const block_tile_fn block_tiles_##pairs##_##w[NARROW_ROWS + 1] = {                                        \
        NULL, block_tile_##pairs##_##w##_1, block_tile_##pairs##_##w##_2, block_tile_##pairs##_##w##_3,              \
        block_tile_##pairs##_##w##_4, block_tile_##pairs##_##w##_5, block_tile_##pairs##_##w##_6,                    \
        block_tile_##pairs##_##w##_7, block_tile_##pairs##_##w##_8};
BLOCK_TILES(0, 1)
BLOCK_TILES(0, 2)
BLOCK_TILES(0, 3)
BLOCK_TILES(0, 4)
#ifdef EN_FAST_BF16_DOT
BLOCK_TILES(1, 1)
BLOCK_TILES(1, 2)
BLOCK_TILES(1, 3)
BLOCK_TILES(1, 4)
#endif
#undef BLOCK_TILE
#undef BLOCK_TILES

static const block_tile_fn *const block_tiles[2][5] = {
    {NULL, block_tiles_0_1, block_tiles_0_2, block_tiles_0_3, block_tiles_0_4},
#ifdef EN_FAST_BF16_DOT
    {NULL, block_tiles_1_1, block_tiles_1_2, block_tiles_1_3, block_tiles_1_4},
#endif
};

/* A panel of b stays in the first cache while the rows of a pass by. Strips of both are as even as can be. */
static void block_product(int pairs, int64_t m, int64_t n, struct block q, const float *a, const float *b, float *c,
                          const float *keep) {
#ifdef EN_BF16_BLOCKS
    if (pairs) {
        EN_BF16_BLOCKS(m, n, &q, a, b, c, keep);
        return;
    }
#endif
    int64_t panels = ceil_div(n / VL, TILE_WIDTH);
    for (int64_t j = 0, w; j < n; j += w * VL, panels--) {
        w = ceil_div((n - j) / VL, panels);
        const block_tile_fn *const tile = block_tiles[pairs][w];
        int64_t strips = ceil_div(m, w == TILE_WIDTH ? TILE_ROWS : NARROW_ROWS);
        for (int64_t i = 0, h; i < m; i += h, strips--) {
            h = ceil_div(m - i, strips);
            tile[h](&q, a + i * q.a_row, b + j, c + i * q.c_row + j, keep ? keep + j : NULL);
        }
    }
}

#endif

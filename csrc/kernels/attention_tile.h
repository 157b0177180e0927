/* Products of blocks for attention: c (m,n) = a (m,k) · b (k,n), or c times a factor a column plus that.
 *
 * Operands are packed into words of 32 bits. A word is a float or, where arrays are bf16 and the level multiplies
 * those, a pair of neighbours along k, so that one tile serves both: words of a are broadcast, those of b lie across
 * lanes. n is a multiple of VL.
 *
 * Where a level says EN_STRIPS, keys and values are packed as a tile reads them: a strip is TILE_ROWS rows, a word of
 * each side by side, one k after the other.
 *
 * A level with tiles (EN_BF16_BLOCKS) gives them its pairs. Tiles come whole: k is filled up with zeros (`words`), in
 * both operands, since 0 · NaN is NaN; c has room for whole ones; words of a row of a lie side by side.
 */
#ifndef EN_ATTENTION_TILE_H
#define EN_ATTENTION_TILE_H

#include "gemm.h"

#ifdef EN_STRIPS
enum { STRIPS = 1 };
#else
enum { STRIPS = 0 };
#endif
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

/* Words that hold n elements of k; strips are written two words at a time. */
WORD int64_t words(enum en_dtype type, int64_t n) {
    return in_tiles(type) ? round_up(n, TILE_K) / 2 : in_pairs(type) ? (n + 1) / 2 : STRIPS ? round_up(n, 2) : n;
}

WORD int64_t whole_vectors(int64_t n) { return round_up(n, VL); }

/* A tile of c: vectors across; rows, of tiles as wide as that, whose sums fill the registers, and of narrower ones. */
enum { TILE_WIDTH = VL == 8 ? 3 : 4, TILE_ROWS = VL == 8 ? 4 : 6, NARROW_ROWS = 8 };
_Static_assert(!STRIPS || (!PAIRED && ATTENTION_KEYS % TILE_ROWS == 0 && NARROW_ROWS % TILE_ROWS == 0),
               "strips are of words, and blocks and tiles hold whole ones");

/* Keys come in multiples of this; those beyond the last are zero, and hidden. */
WORD int64_t key_unit(enum en_dtype type) { return in_tiles(type) ? TILE_K : STRIPS ? TILE_ROWS : 2; }

WORD void block_tile(const int pairs, const int strips, const int w, const int h, const struct block *q, const float *a,
                     const float *b, const int64_t b_row, float *c, const float *keep) {
    const int64_t a_step = strips ? TILE_ROWS : q->a_step, c_row = q->c_row;
    const int add = q->add;
    vf acc[NARROW_ROWS][TILE_WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < h; i++)
#pragma GCC unroll 4
        for (int v = 0; v < w; v++) acc[i][v] = v_zero();
#pragma GCC unroll UNROLL
    for (int64_t left = q->depth; left > 0; left--, a += a_step, b += b_row) {
        vf row[TILE_WIDTH];
#pragma GCC unroll 4
        for (int v = 0; v < w; v++) row[v] = v_load(b + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < h; i++) {
            const vf x = v_set(a[strips ? i / TILE_ROWS * q->a_strip + i % TILE_ROWS : i * q->a_row]);
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

/* From a strip of rows of `row` words to the next, as block.a_strip has it. */
WORD int64_t strip_of(int64_t row) { return STRIPS ? TILE_ROWS * row : 0; }

typedef void (*block_tile_fn)(const struct block *, const float *, const float *, float *, const float *);

/* One function a width and height, so that nothing of a tile is wasted. kind: of a, rows of words, of pairs, strips. */
enum { ROWS_OF_WORDS, ROWS_OF_PAIRS, STRIPS_OF_WORDS, KINDS };

WORD int most_rows(const int w) { return w == TILE_WIDTH || (VL == 8 && w > 1) ? TILE_ROWS : NARROW_ROWS; }

#define BLOCK_TILE(kind, w, h)                                                                                      \
    static void block_tile_##kind##_##w##_##h(const struct block *q, const float *a, const float *b, float *c,      \
                                              const float *keep) {                                                  \
        const int width = w < TILE_WIDTH ? w : TILE_WIDTH, most = most_rows(width), rows = h < most ? h : most;     \
        if (kind == STRIPS_OF_WORDS && q->b_row == width * VL)                                                      \
            block_tile(0, 1, width, rows, q, a, b, width * VL, c, keep);                                            \
        else                                                                                                        \
            block_tile(kind == ROWS_OF_PAIRS, kind == STRIPS_OF_WORDS, width, rows, q, a, b, q->b_row, c, keep);    \
    }
#define BLOCK_TILES(kind, w)                                                                                         \
    BLOCK_TILE(kind, w, 1) BLOCK_TILE(kind, w, 2) BLOCK_TILE(kind, w, 3) BLOCK_TILE(kind, w, 4)                      \
    BLOCK_TILE(kind, w, 5) BLOCK_TILE(kind, w, 6) BLOCK_TILE(kind, w, 7) BLOCK_TILE(kind, w, 8)                      \
    static const block_tile_fn block_tiles_##kind##_##w[NARROW_ROWS + 1] = {                                         \
        NULL, block_tile_##kind##_##w##_1, block_tile_##kind##_##w##_2, block_tile_##kind##_##w##_3,                 \
        block_tile_##kind##_##w##_4, block_tile_##kind##_##w##_5, block_tile_##kind##_##w##_6,                       \
        block_tile_##kind##_##w##_7, block_tile_##kind##_##w##_8};
#define BLOCK_WIDTHS(kind)                                                                                           \
    BLOCK_TILES(kind, 1) BLOCK_TILES(kind, 2) BLOCK_TILES(kind, 3) BLOCK_TILES(kind, 4)                              \
    static const block_tile_fn *const block_tiles_##kind[] = {NULL, block_tiles_##kind##_1, block_tiles_##kind##_2,  \
                                                              block_tiles_##kind##_3, block_tiles_##kind##_4};
BLOCK_WIDTHS(ROWS_OF_WORDS)
#ifdef EN_FAST_BF16_DOT
BLOCK_WIDTHS(ROWS_OF_PAIRS)
#endif
#ifdef EN_STRIPS
BLOCK_WIDTHS(STRIPS_OF_WORDS)
#endif
#undef BLOCK_TILE
#undef BLOCK_TILES
#undef BLOCK_WIDTHS

static const block_tile_fn *const *const block_tiles[KINDS] = {
    [ROWS_OF_WORDS] = block_tiles_ROWS_OF_WORDS,
#ifdef EN_FAST_BF16_DOT
    [ROWS_OF_PAIRS] = block_tiles_ROWS_OF_PAIRS,
#endif
#ifdef EN_STRIPS
    [STRIPS_OF_WORDS] = block_tiles_STRIPS_OF_WORDS,
#endif
};

/* A panel of b stays in the first cache while the rows of a pass by. Both are cut as even as can be, but for strips. */
static void block_product(int pairs, int64_t m, int64_t n, struct block q, const float *a, const float *b, float *c,
                          const float *keep) {
#ifdef EN_BF16_BLOCKS
    if (pairs) {
        EN_BF16_BLOCKS(m, n, &q, a, b, c, keep);
        return;
    }
#endif
    const int kind = pairs ? ROWS_OF_PAIRS : q.a_strip ? STRIPS_OF_WORDS : ROWS_OF_WORDS;
    int64_t panels = ceil_div(n / VL, TILE_WIDTH);
    for (int64_t j = 0, w; j < n; j += w * VL, panels--) {
        w = ceil_div((n - j) / VL, panels);
        const block_tile_fn *const tile = block_tiles[kind][w];
        const int64_t most = most_rows((int)w);
        int64_t left = ceil_div(m, most);
        for (int64_t i = 0, h; i < m; i += h, left--) {
            h = q.a_strip ? min64(m - i, most) : ceil_div(m - i, left);
            const float *rows = a + (q.a_strip ? i / TILE_ROWS * q.a_strip : i * q.a_row);
            tile[h](&q, rows, b + j, c + i * q.c_row + j, keep ? keep + j : NULL);
        }
    }
}

#endif

/* Rows of heads to and from the layouts of attention_tile.h's operands. Rows come as pointers, because those of a block
 * of queries are the heads of a group, token after token, wherever these lie. */
#ifndef EN_ATTENTION_PACK_H
#define EN_ATTENTION_PACK_H

#include "attention_tile.h"

#if defined EN_FAST_BF16_DOT || defined EN_BF16_BLOCKS
/* VL words of a row of d elements, from word u; 0 beyond the row */
WORD vf load_row_words(enum en_dtype type, const void *row, int64_t u, int64_t d) {
    if (in_pairs(type)) return v_from_bits(vi_load_u16_n((const uint16_t *)row + 2 * u, d - 2 * u));
    return load_as(type, row, u, d - u);
}
/* Rows j (even) and j + 1 of an operand b whose k is rows of w words. In place: rows of pairs lie no later. */
WORD void store_along(enum en_dtype type, float *to, int64_t j, int64_t w, vf x, vf y) {
    if (in_pairs(type)) {
        v_store(to + j / 2 * w, v_from_bits(v_zip_halves(v_pack_bf16(x, y))));
    } else {
        v_store(to + j * w, x);
        v_store(to + (j + 1) * w, y);
    }
}
/* VL elements of each of two rows of an operand a, from element i */
WORD void store_rows(enum en_dtype type, float *row, float *next, int64_t i, vf x, vf y) {
    if (in_pairs(type)) {
        v_store_halves((uint16_t *)row + i, (uint16_t *)next + i, v_pack_bf16(x, y));
    } else {
        v_store(row + i, x);
        v_store(next + i, y);
    }
}
#else
WORD vf load_row_words(enum en_dtype type, const void *row, int64_t u, int64_t d) {
    return load_as(type, row, u, d - u);
}
WORD void store_along(enum en_dtype type, float *to, int64_t j, int64_t w, vf x, vf y) {
    (void)type;
    v_store(to + j * w, x);
    v_store(to + (j + 1) * w, y);
}
WORD void store_rows(enum en_dtype type, float *row, float *next, int64_t i, vf x, vf y) {
    (void)type;
    v_store(row + i, x);
    v_store(next + i, y);
}
#endif

/* Fetches a row of d elements; those of different tokens are too far apart for the core to foresee. */
WORD void fetch_row(enum en_dtype type, int64_t d, const void *row) {
    for (int64_t at = 0; at < d * type_size(type); at += 64) __builtin_prefetch((const char *)row + at);
}
enum { ROWS_AHEAD = 16 };

/* Of VL rows or n, VL words from word u on or `steps`, which are `left` elements: rows become lanes. */
WORD void turn_rows(enum en_dtype type, const void *const *row, const int64_t n, int64_t u, const int64_t left,
                    const int64_t steps, float *to, int64_t w) {
    const int64_t d = (in_pairs(type) ? 2 * u : u) + left;
    vf r[VL];
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++) r[v] = v < n ? load_row_words(type, row[v], u, d) : v_zero();
    v_transpose(r);
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++)
        if (v < steps) v_store(to + (u + v) * w, r[v]);
}

/* to[u * w + j] = word u of row j, 0 for n <= j < w: an operand b whose k is the head's size */
WORD void pack_columns(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t w) {
    const int64_t du = words(type, d), each = in_pairs(type) ? 2 : 1;
    for (int64_t j = 0; j < w; j += VL) {
        for (int64_t i = j + VL; i < min64(n, j + 2 * VL); i++) fetch_row(type, d, row[i]);
        for (int64_t u = 0; u < du; u += VL)
            if (j + VL <= n && (u + VL) * each <= d)
                turn_rows(type, row + j, VL, u, VL * each, VL, to + j, w);
            else
                turn_rows(type, row + j, n - j, u, d - u * each, du - u, to + j, w);
    }
}

/* Word k of VL columns from i on, where k is the rows; 0 beyond row n and element d */
WORD vf load_along(enum en_dtype type, int64_t d, int64_t n, const void *const *row, int64_t k, int64_t i) {
    const int64_t at = in_pairs(type) ? 2 * k : k;
    const vf low = at < n ? load_as(type, row[at], i, d - i) : v_zero();
    if (!in_pairs(type)) return low;
    const vf high = at + 1 < n ? load_as(type, row[at + 1], i, d - i) : v_zero();
    return v_from_bits(vi_or(vi_shr(v_bits(low), 16), v_bits(high)));
}

/* to[k * width + i] = word k of column i, 0 up to whole units and vectors: an operand b whose k is the rows */
WORD void pack_along(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    for (int64_t k = 0; k < words(type, round_up(n, key_unit(type))); k++)
        for (int64_t i = 0; i < d; i += VL) v_store(to + k * width + i, load_along(type, d, n, row, k, i));
}

/* Where word k of column i of a block of keys lies, an operand a: at k * step + i * row, or in strips. */
struct along {
    int64_t step, row, strip;
};
WORD struct along along(enum en_dtype type, int64_t width) {
    if (in_tiles(type)) return (struct along){.step = 1, .row = words(type, ATTENTION_KEYS)};
    if (STRIPS) return (struct along){.step = TILE_ROWS, .strip = TILE_ROWS * ATTENTION_KEYS + 16}; /* 16: see APART */
    return (struct along){.step = width, .row = 1};
}
/* Words of a block */
WORD int64_t along_words(enum en_dtype type, int64_t width) {
    return STRIPS ? width / TILE_ROWS * along(type, width).strip : words(type, ATTENTION_KEYS) * width;
}

#ifdef EN_STRIPS
/* Of a strip of rows, words [u, u + VL) or as many as are left: a word of all rows, then the next. */
WORD void turn_strip(enum en_dtype type, const void *const *row, const int64_t rows, int64_t u, const int64_t left,
                     float *to) {
    vf r[VL];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        r[i] = i < rows ? load_row_words(type, row[i], u, u + left) : v_zero();
        r[TILE_ROWS + i] = i < rows ? load_row_words(type, row[i], u + 1, u + left) : v_zero();
    }
    v_transpose(r); /* two words of all rows in every other vector */
#pragma GCC unroll 8
    for (int v = 0; v < VL; v += 2)
        if (v < left) v_store(to + (u + v) * TILE_ROWS, r[v]);
}
_Static_assert(VL == 2 * TILE_ROWS, "two words of a strip are a vector");

/* An operand a whose k is the head's size; the strip of rows from j on at to + j * width. Zeros fill the last one up. */
WORD void pack_rows(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    for (int64_t j = 0; j < n; j += TILE_ROWS) {
        const int64_t rows = min64(TILE_ROWS, n - j);
        int64_t u = 0;
        for (int64_t i = j; i < j + rows; i++)
            if (i + ROWS_AHEAD < n) fetch_row(type, d, row[i + ROWS_AHEAD]);
        for (; rows == TILE_ROWS && u + VL < d; u += VL) turn_strip(type, row + j, TILE_ROWS, u, VL + 1, to + j * width);
        for (; u < d; u += VL) turn_strip(type, row + j, rows, u, d - u, to + j * width);
    }
}

/* As pack_along, an operand a. A strip's last word is written with the next, for which there is room. */
WORD void pack_keys_along(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    const int64_t strip = along(type, width).strip;
    for (int64_t k = 0; k < round_up(n, TILE_ROWS); k++, to += TILE_ROWS) {
        int64_t i = 0;
        if (k + ROWS_AHEAD < n) fetch_row(type, d, row[k + ROWS_AHEAD]);
        for (; k < n && i + VL <= d; i += TILE_ROWS) v_store(to + i / TILE_ROWS * strip, load_as(type, row[k], i, VL));
        for (; i < d; i += TILE_ROWS)
            v_store(to + i / TILE_ROWS * strip, k < n ? load_as(type, row[k], i, d - i) : v_zero());
    }
}
#else
/* to[j * width + u] = word u of row j, 0 from row n to whole units: an operand a whose k is the head's size */
WORD void pack_rows(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    const int64_t du = words(type, d);
    for (int64_t j = 0; j < round_up(n, key_unit(type)); j++) {
        if (j + ROWS_AHEAD < n) fetch_row(type, d, row[j + ROWS_AHEAD]);
        for (int64_t u = 0; u < du; u += VL)
            v_store_n(to + j * width + u, j < n ? load_row_words(type, row[j], u, d) : v_zero(), du - u);
    }
}

/* As pack_along, an operand a: tiles want its k side by side. */
WORD void pack_keys_along(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    if (!in_tiles(type)) {
        pack_along(type, d, n, row, to, width);
        return;
    }
    const int64_t to_row = along(type, width).row;
    for (int64_t k = 0; k < words(type, n); k += VL)
        for (int64_t i = 0; i < d; i += VL) {
            vf r[VL];
            for (int64_t v = 0; v < VL; v++) r[v] = load_along(type, d, n, row, k + v, i);
            v_transpose(r);
            for (int64_t v = 0; v < VL; v++) v_store(to + (i + v) * to_row + k, r[v]);
        }
}
#endif

/* Rows of VL lanes or n, elements [i, i + VL) or as many as are left, times f. */
WORD void turn_back(enum en_dtype type, void *const *row, const int64_t n, int64_t i, const int64_t left,
                    const float *from, int64_t w, vf f) {
    vf r[VL];
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++) r[v] = v < left ? v_mul(v_load(from + (i + v) * w), f) : v_zero();
    v_transpose(r);
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++)
        if (v < n) store_as(type, row[v], i, r[v], left);
}

/* row j element i = from[i * w + j] * factor[j], j < n */
WORD void unpack_columns(enum en_dtype type, int64_t d, int64_t n, void *const *row, const float *from, int64_t w,
                         const float *factor) {
    for (int64_t j = 0; j < n; j += VL) {
        const vf f = v_load(factor + j);
        for (int64_t i = 0; i < d; i += VL)
            if (j + VL <= n && i + VL <= d)
                turn_back(type, row + j, VL, i, VL, from + j, w, f);
            else
                turn_back(type, row + j, n - j, i, d - i, from + j, w, f);
    }
}

#endif

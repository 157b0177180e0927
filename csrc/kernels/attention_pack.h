/* Rows of heads to and from the layouts of attention_tile.h's operands. Rows come as pointers, because those of a block
 * of queries are the heads of a group, token after token, wherever these lie. */
#ifndef EN_ATTENTION_PACK_H
#define EN_ATTENTION_PACK_H

#include "attention_tile.h"

#ifdef EN_FAST_BF16_DOT
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

/* to[j * width + u] = word u of row j: an operand a whose k is the head's size */
WORD void pack_rows(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    const int64_t du = words(type, d);
    for (int64_t j = 0; j < n; j++)
        for (int64_t u = 0; u < du; u += VL) v_store_n(to + j * width + u, load_row_words(type, row[j], u, d), du - u);
}

/* to[u * w + j] = word u of row j, 0 for n <= j < w: an operand b whose k is the head's size */
WORD void pack_columns(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t w) {
    const int64_t du = words(type, d);
    for (int64_t j = 0; j < w; j += VL)
        for (int64_t u = 0; u < du; u += VL) {
            vf r[VL];
            for (int64_t v = 0; v < VL; v++) r[v] = j + v < n ? load_row_words(type, row[j + v], u, d) : v_zero();
            v_transpose(r);
            for (int64_t v = 0; v < VL && u + v < du; v++) v_store(to + (u + v) * w + j, r[v]);
        }
}

/* Element i of each of rows [0, words of n) as k: to[k * width + i], 0 beyond row n and element d up to whole vectors:
 * either operand where k is the rows */
WORD void pack_along(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    for (int64_t k = 0; k < words(type, n); k++)
        for (int64_t i = 0; i < d; i += VL) {
            vf x;
            if (in_pairs(type)) {
                const vf low = load_as(type, row[2 * k], i, d - i);
                const vf high = 2 * k + 1 < n ? load_as(type, row[2 * k + 1], i, d - i) : v_zero();
                x = v_from_bits(vi_or(vi_shr(v_bits(low), 16), v_bits(high)));
            } else {
                x = load_as(type, row[k], i, d - i);
            }
            v_store(to + k * width + i, x);
        }
}

/* row j element i = from[i * w + j] * factor[j], j < n */
WORD void unpack_columns(enum en_dtype type, int64_t d, int64_t n, void *const *row, const float *from, int64_t w,
                         const float *factor) {
    for (int64_t j = 0; j < n; j += VL) {
        const vf f = v_load(factor + j);
        for (int64_t i = 0; i < d; i += VL) {
            vf r[VL];
            for (int64_t v = 0; v < VL; v++) r[v] = i + v < d ? v_mul(v_load(from + (i + v) * w + j), f) : v_zero();
            v_transpose(r);
            for (int64_t v = 0; v < VL && j + v < n; v++) store_as(type, row[j + v], i, r[v], d - i);
        }
    }
}

#endif

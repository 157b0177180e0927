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

/* to[j * width + u] = word u of row j, 0 from row n to whole units: an operand a whose k is the head's size */
WORD void pack_rows(enum en_dtype type, int64_t d, int64_t n, const void *const *row, float *to, int64_t width) {
    const int64_t du = words(type, d);
    for (int64_t j = 0; j < round_up(n, key_unit(type)); j++)
        for (int64_t u = 0; u < du; u += VL)
            v_store_n(to + j * width + u, j < n ? load_row_words(type, row[j], u, d) : v_zero(), du - u);
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

/* Where word k of column i of a block of keys lies, an operand a: at k * step + i * row. */
struct along {
    int64_t step, row;
};
WORD struct along along(enum en_dtype type, int64_t width) {
    return in_tiles(type) ? (struct along){1, words(type, ATTENTION_KEYS)} : (struct along){width, 1};
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

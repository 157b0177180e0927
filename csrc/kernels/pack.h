/* Packing: a panel of an operand, laid out as a tile reads it.
 *
 * A panel is `width` rows of A, or columns of B, by steps of k; of every step it has `width` words of 32 bits, one a
 * row. A word is one f32, or a pair of bf16 (k even in the low half), so a tile of either kind walks the same layout. Any
 * strides and types are read; what is missing is 0: rows up to the width, the odd half of a pair, steps up to `steps`.
 */
#ifndef EN_PACK_H
#define EN_PACK_H

#include "types.h"

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

/* First index of piece i of n things cut into `pieces` as even as can be. */
static inline int64_t cut(int64_t n, int64_t pieces, int64_t i) {
    return n / pieces * i + min64(i, n % pieces);
}

/* Rows of A or columns of B, and k: element (row, k) lies at row * row_stride + k * k_stride. */
struct operand {
    enum en_dtype type;
    const void *data;
    int64_t row, k; /* strides */
    const struct en_blocks *packed; /* where its numbers are quantized, and data is not used: kernels/unpack.h */
    int64_t at;                     /* the first of them */
};

static inline struct operand a_of(const struct en_term *t) {
    return (struct operand){.type = t->a_type, .data = t->a, .row = t->a_row, .k = t->a_col};
}
static inline struct operand b_of(const struct en_term *t) {
    return (struct operand){
        .type = t->b_type, .data = t->b, .row = t->b_col, .k = t->b_row, .packed = t->packed, .at = t->b_at};
}

/* sum + a·b of a word each: a float, or the dot product of a pair of bf16 */
WORD vf word_fma(const int pairs, vf a, vf b, vf sum) {
#ifdef EN_BF16_DOT
    if (pairs) return v_dot_bf16(v_bits(a), v_bits(b), sum);
#endif
    (void)pairs;
    return v_fma(a, b, sum);
}

#ifdef EN_BF16_DOT
/* VL pairs of consecutive elements, rounded to bf16 where they aren't; 0 from the nth element on. */
WORD vf load_pairs(enum en_dtype type, const void *p, int64_t offset, int64_t n) {
    if (type == EN_BF16) return v_from_bits(vi_load_u16_n((const uint16_t *)p + offset, n));
    const int64_t rest = max64(n - VL, 0);
    return v_from_bits(v_pack_bf16(load_as(type, p, offset, n), load_as(type, p, offset + (rest ? VL : 0), rest)));
}

/* Pairs of a and b, lane by lane: a in the low halves. */
WORD vf zip_pairs(enum en_dtype type, vf a, vf b) {
    if (type != EN_BF16) a = v_round_bf16(a), b = v_round_bf16(b);
    return v_from_bits(vi_or(vi_shr(v_bits(a), 16), v_bits(b)));
}
#endif

/* VL words of row `row`, from step s on, of k elements */
WORD vf load_words(const int pairs, enum en_dtype type, const struct operand *o, int64_t row, int64_t s, int64_t k) {
#ifdef EN_BF16_DOT
    if (pairs) return load_pairs(type, o->data, row * o->row + 2 * s, k - 2 * s);
#endif
    (void)pairs;
    return load_as(type, o->data, row * o->row + s, k - s);
}

/* The words of step s of n rows from `row` on; k_stride and row_stride are passed for the compiler to see. */
WORD vf gather_words(const int pairs, enum en_dtype type, const struct operand *o, int64_t row, int64_t n, int64_t s,
                     int64_t k) {
    const int64_t at = row * o->row;
#ifdef EN_BF16_DOT
    if (pairs) {
        vf even = load_as(type, o->data, at + 2 * s * o->k, n);
        vf odd = 2 * s + 1 < k ? load_as(type, o->data, at + (2 * s + 1) * o->k, n) : v_zero();
        return zip_pairs(type, even, odd);
    }
#endif
    (void)pairs, (void)k;
    return load_as(type, o->data, at + s * o->k, n);
}

#ifdef EN_BF16_DOT
/* Rows of bf16 that lie side by side, 2·VL at a time: whole pairs of k, and a whole number of these rows. */
WORD void pack_across(float *dst, int64_t width, const struct operand *o, int64_t k) {
    for (int64_t s = 0; s < k / 2; s++) {
        const uint16_t *even = (const uint16_t *)o->data + 2 * s * o->k, *odd = even + o->k;
        for (int64_t i = 0; i < width; i += 2 * VL) {
            const vi a = vi_load_u16_n(even + i, 2 * VL), b = vi_load_u16_n(odd + i, 2 * VL);
            v_store(dst + s * width + i, v_from_bits(v_zip_low(a, b)));
            v_store(dst + s * width + i + VL, v_from_bits(v_zip_high(a, b)));
        }
    }
}
#endif

/* Fetches memory at (row, k) where `along`, elements along it, are whole lines. Beyond the operand it does so in vain. */
WORD void fetch_line(enum en_dtype type, const struct operand *o, int64_t row, int64_t k, int64_t along) {
    if (FETCH && along % (64 / type_size(type)) == 0)
        __builtin_prefetch(element(type, o->data, row * o->row + k * o->k));
}

/* Of VL rows from row i on, `steps` <= VL steps from step s on, turned: a step's words side by side. */
WORD void turn(const int pairs, enum en_dtype type, float *dst, int64_t width, const struct operand *o, int64_t i,
               int64_t rows, int64_t s, const int64_t steps, int64_t k) {
    const int64_t at = pairs ? 2 * s : s;
    vf r[VL];
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++) fetch_line(type, o, i + v, at + FETCH, at);
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++) r[v] = i + v < rows ? load_words(pairs, type, o, i + v, s, k) : v_zero();
    v_transpose(r);
#pragma GCC unroll 16
    for (int v = 0; v < VL; v++)
        if (v < steps) v_store(dst + (s + v) * width + i, r[v]);
}

WORD void pack_as(const int pairs, enum en_dtype type, float *dst, int64_t width, const struct operand *o, int64_t rows,
                  int64_t k, int64_t steps) {
    const int64_t full = pairs ? (k + 1) / 2 : k;
    if (o->row == 1) {
        int64_t s = 0;
#ifdef EN_BF16_DOT
        if (pairs && type == EN_BF16 && rows == width && width % (2 * VL) == 0) {
            pack_across(dst, width, o, k);
            s = k / 2;
        }
#endif
        for (; s < full; s++)
            for (int64_t i = 0; i < width; i += VL) {
                fetch_line(type, o, i, s + PACK_K, i);
                v_store(dst + s * width + i, gather_words(pairs, type, o, i, max64(rows - i, 0), s, k));
            }
    } else if (o->k == 1) {
        const int64_t each = pairs ? 2 : 1;
        for (int64_t s = 0; s < full; s += VL)
            for (int64_t i = 0; i < width; i += VL)
                if ((s + VL) * each <= k)
                    turn(pairs, type, dst, width, o, i, rows, s, VL, (s + VL) * each); /* whole vectors */
                else
                    turn(pairs, type, dst, width, o, i, rows, s, full - s, k);
    } else {
        for (int64_t s = 0; s < full; s++)
            for (int64_t i = 0; i < width; i++)
                v_store_n(dst + s * width + i,
                          i < rows ? gather_words(pairs, type, o, i, 1, s, k) : v_zero(), 1);
    }
    for (int64_t s = full; s < steps; s++)
        for (int64_t i = 0; i < width; i += VL) v_store(dst + s * width + i, v_zero());
}

/* PACK: the panel at dst, of `rows` <= width rows and k elements. width is at most VL or a multiple of it. Writes up to
 * VL words beyond the panel's end. */
static void pack(const int pairs, float *dst, int64_t width, const struct operand *o, int64_t rows, int64_t k,
                 int64_t steps) {
#ifdef EN_BF16_DOT
    if (pairs) {
        switch (o->type) {
        case EN_BF16: pack_as(1, EN_BF16, dst, width, o, rows, k, steps); return;
        case EN_F16: pack_as(1, EN_F16, dst, width, o, rows, k, steps); return;
        default: pack_as(1, EN_F32, dst, width, o, rows, k, steps); return;
        }
    }
#endif
    (void)pairs;
    switch (o->type) {
    case EN_BF16: pack_as(0, EN_BF16, dst, width, o, rows, k, steps); return;
    case EN_F16: pack_as(0, EN_F16, dst, width, o, rows, k, steps); return;
    default: pack_as(0, EN_F32, dst, width, o, rows, k, steps); return;
    }
}

/* o from (row, k) on */
static inline struct operand operand_at(const struct operand *o, int64_t row, int64_t k) {
    const int64_t by = row * o->row + k * o->k;
    if (o->packed) return (struct operand){.row = o->row, .k = o->k, .packed = o->packed, .at = o->at + by};
    return (struct operand){.type = o->type, .data = element(o->type, o->data, by), .row = o->row, .k = o->k};
}

#endif

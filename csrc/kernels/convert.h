/* Rows of 32-bit floats from and to bf16 and f16 bit patterns; narrowing rounds to nearest even, NaN stays NaN,
 * denormals count, with the same bits at every level. */
#ifndef EN_CONVERT_H
#define EN_CONVERT_H

#include "types.h"

WORD void widen_row_as(enum en_dtype type, int64_t n, const uint16_t *x, float *y) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(y + i, load_as(type, x, i, VL));
    if (i < n) v_store_n(y + i, load_as(type, x, i, n - i), n - i);
}

WORD void narrow_row_as(enum en_dtype type, int64_t n, const float *x, uint16_t *y) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store_as(type, y, i, v_load(x + i), VL);
    if (i < n) store_as(type, y, i, v_load_n(x + i, n - i), n - i);
}

static void widen_row(enum en_dtype type, int64_t n, const uint16_t *x, float *y) {
    type == EN_BF16 ? widen_row_as(EN_BF16, n, x, y) : widen_row_as(EN_F16, n, x, y);
}

static void narrow_row(enum en_dtype type, int64_t n, const float *x, uint16_t *y) {
    type == EN_BF16 ? narrow_row_as(EN_BF16, n, x, y) : narrow_row_as(EN_F16, n, x, y);
}

#endif

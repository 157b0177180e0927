/* 32-bit floats from and to bf16 and f16 bit patterns; narrowing rounds to nearest even, NaN stays NaN. */
#ifndef EN_CONVERT_H
#define EN_CONVERT_H

#include <string.h>

#include "strided.h"

WORD void widen_row(enum en_dtype type, int64_t n, const uint16_t *x, float *y) {
    if (type == EN_BF16)
        for (int64_t i = 0; i < n; i += VL) v_store_n(y + i, v_load_bf16_n(x + i, n - i), n - i);
    else
        for (int64_t i = 0; i < n; i += VL) v_store_n(y + i, v_load_f16_n(x + i, n - i), n - i);
}

WORD void narrow_row(enum en_dtype type, int64_t n, const float *x, uint16_t *y) {
    if (type == EN_BF16)
        for (int64_t i = 0; i < n; i += VL) v_store_bf16_n(y + i, v_load_n(x + i, n - i), n - i);
    else
        for (int64_t i = 0; i < n; i += VL) v_store_f16_n(y + i, v_load_n(x + i, n - i), n - i);
}

struct conversion {
    enum en_dtype type;
    const void *x;
    void *y;
};

static void widen_range(void *context, int64_t begin, int64_t end) {
    const struct conversion *c = context;
    widen_row(c->type, end - begin, (const uint16_t *)c->x + begin, (float *)c->y + begin);
}

static void narrow_range(void *context, int64_t begin, int64_t end) {
    const struct conversion *c = context;
    narrow_row(c->type, end - begin, (const float *)c->x + begin, (uint16_t *)c->y + begin);
}

static en_status widen(enum en_dtype type, int64_t n, const uint16_t *x, float *y) {
    struct conversion c = {type, x, y};
    en_parallel_for(n, GRAIN, widen_range, &c);
    return EN_OK;
}

static en_status narrow(enum en_dtype type, int64_t n, const float *x, uint16_t *y) {
    struct conversion c = {type, x, y};
    en_parallel_for(n, GRAIN, narrow_range, &c);
    return EN_OK;
}

#endif

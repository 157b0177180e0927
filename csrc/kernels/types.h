/* Vectors of f32 from and to arrays of any float type. `type` is a constant wherever a loop calls these (a kernel is
 * written over it, and a switch outside chooses), so that the compiler keeps one branch. */
#ifndef EN_TYPES_H
#define EN_TYPES_H

#include "../entrenar.h"

static inline int64_t type_size(enum en_dtype type) { return type == EN_F32 ? 4 : 2; }

/* n elements at p + offset, widened; other lanes are 0. */
WORD vf load_as(enum en_dtype type, const void *p, int64_t offset, int64_t n) {
    switch (type) {
    case EN_BF16: return v_load_bf16_n((const uint16_t *)p + offset, n);
    case EN_F16: return v_load_f16_n((const uint16_t *)p + offset, n);
    default: return n >= VL ? v_load((const float *)p + offset) : v_load_n((const float *)p + offset, n);
    }
}

/* The first n lanes to p + offset, rounded to nearest even; NaN stays NaN. */
WORD void store_as(enum en_dtype type, void *p, int64_t offset, vf a, int64_t n) {
    switch (type) {
    case EN_BF16: v_store_bf16_n((uint16_t *)p + offset, a, n); return;
    case EN_F16: v_store_f16_n((uint16_t *)p + offset, a, n); return;
    default:
        if (n >= VL)
            v_store((float *)p + offset, a);
        else
            v_store_n((float *)p + offset, a, n);
    }
}

/* Where element `offset` of an array lies. */
WORD void *element(enum en_dtype type, const void *p, int64_t offset) {
    return (char *)p + offset * type_size(type);
}

/* call(type, ...) with the type as a constant, where it is f32 or bf16. */
#define WITH_TYPE(type, call, ...) ((type) == EN_BF16 ? call(EN_BF16, __VA_ARGS__) : call(EN_F32, __VA_ARGS__))

#endif

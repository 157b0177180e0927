/* What the codecs share: 16-bit floats, rounding as ggml rounds, and the functions of the table in codecs.c.
 *
 * Portable C, compiled once for every level and without contraction: encoding searches for scales by comparing sums of
 * floats, so one operation done otherwise gives other bytes than ggml's. decode_X(raw, y) and encode_X(x, raw) treat
 * one block; raw may be unaligned. Layouts are little-endian; `half` is an IEEE binary16. */
#ifndef EN_QUANT_CODEC_H
#define EN_QUANT_CODEC_H

#include <math.h>
#include <string.h>

#include "../entrenar.h"

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline uint16_t u16_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t u32_at(const uint8_t *p) { return u16_at(p) | (uint32_t)u16_at(p + 2) << 16; }

static inline float f32_at(const uint8_t *p) {
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* Exact. A subnormal half is its mantissa times 2^-24. */
static inline float float_of_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 0) {
        float x = (float)mantissa * 0x1p-24f;
        return sign ? -x : x;
    }
    return float_of_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
}

/* To nearest, ties to even. */
static inline uint16_t half_of_float(float x) {
    uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* from 65520 on */
    if (rest < 0x38800000) /* below 2^-14: adding 1/2 leaves the subnormal's mantissa in the last bits of the sum */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f)));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

static inline uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float half_at(const uint8_t *p) { return float_of_half(u16_at(p)); }

static inline void put_half(uint8_t *p, float x) {
    uint16_t h = half_of_float(x);
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}

/* To nearest, ties to even, for |x| < 2^22: ggml's nearest_int; beyond, the same bits of the same sum. */
static inline int nearest(float x) { return (int)(bits_of_float(x + 12582912.0f) & 0x7fffff) - 0x400000; }

/* Toward zero and to the low byte, as x86 does it for every input: what does not fit into an int gives 0. */
static inline int truncated(float x) { return fabsf(x) < 2147483648.0f ? (int)x & 255 : 0; }

static inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

#define EN_READ(name) void en_decode_##name(const uint8_t *raw, float *y);
#define EN_BOTH(name) EN_READ(name) void en_encode_##name(const float *x, uint8_t *raw);

EN_BOTH(q4_0) EN_BOTH(q4_1) EN_BOTH(q5_0) EN_BOTH(q5_1) EN_BOTH(q8_0)           /* simple.c */
EN_BOTH(q2_k) EN_BOTH(q3_k) EN_BOTH(q4_k) EN_BOTH(q5_k) EN_BOTH(q6_k)           /* kquants.c */
EN_BOTH(iq4_nl) EN_BOTH(iq4_xs) EN_READ(mxfp4)                                  /* iq4.c */
EN_READ(iq1_s) EN_READ(iq1_m) EN_READ(iq2_xxs) EN_READ(iq2_xs) EN_READ(iq2_s) EN_READ(iq3_xxs) EN_READ(iq3_s)
EN_READ(tq1_0) EN_READ(tq2_0)                                                   /* iquants.c, ternary.c */

#endif

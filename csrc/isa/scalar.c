/* One lane of plain C: the reference, and every machine's last resort. The words are described in isa/README.md. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { VL = 1 };
typedef float vf;
typedef int32_t vi;
typedef int vm;

#define WORD static inline __attribute__((always_inline))

WORD vi v_bits(vf a) {
    vi u;
    memcpy(&u, &a, 4);
    return u;
}
WORD vf v_from_bits(vi u) {
    vf a;
    memcpy(&a, &u, 4);
    return a;
}

WORD vf v_zero(void) { return 0; }
WORD vf v_set(float x) { return x; }
WORD vf v_load(const float *p) { return *p; }
WORD vf v_load_n(const float *p, int64_t n) { return n > 0 ? *p : 0; }
WORD void v_store(float *p, vf a) { *p = a; }
WORD void v_store_n(float *p, vf a, int64_t n) {
    if (n > 0) *p = a;
}

WORD vf v_add(vf a, vf b) { return a + b; }
WORD vf v_sub(vf a, vf b) { return a - b; }
WORD vf v_mul(vf a, vf b) { return a * b; }
WORD vf v_div(vf a, vf b) { return a / b; }
WORD vf v_min(vf a, vf b) { return a < b ? a : b; }
WORD vf v_max(vf a, vf b) { return a > b ? a : b; }
WORD vf v_fma(vf a, vf b, vf c) { return a * b + c; }
WORD vf v_fnma(vf a, vf b, vf c) { return c - a * b; }
WORD vf v_mul_error(vf a, vf b, vf product) { return (vf)((double)a * b - product); }
WORD vf v_sqrt(vf a) { return sqrtf(a); }
WORD vf v_abs(vf a) { return fabsf(a); }
WORD vf v_neg(vf a) { return v_from_bits(v_bits(a) ^ INT32_MIN); }
WORD vf v_round(vf a) { return rintf(a); }
WORD float v_hsum(vf a) { return a; }
WORD float v_hmax(vf a) { return a; }

WORD vm v_lt(vf a, vf b) { return a < b; }
WORD vm v_le(vf a, vf b) { return a <= b; }
WORD vm v_eq(vf a, vf b) { return a == b; }
WORD vm v_nan(vf a) { return a != a; }
WORD vf v_select(vm m, vf a, vf b) { return m ? a : b; }
WORD int v_any(vm m) { return m; }

/* 32-bit integers wrap around, as in every vector unit */
WORD vi vi_set(int32_t x) { return x; }
WORD vi vi_add(vi a, vi b) { return (vi)((uint32_t)a + (uint32_t)b); }
WORD vi vi_sub(vi a, vi b) { return (vi)((uint32_t)a - (uint32_t)b); }
WORD vi vi_and(vi a, vi b) { return a & b; }
WORD vi vi_or(vi a, vi b) { return a | b; }
WORD vi vi_xor(vi a, vi b) { return a ^ b; }
WORD vi vi_shl(vi a, int n) { return (vi)((uint32_t)a << n); }
WORD vi vi_shr(vi a, int n) { return (vi)((uint32_t)a >> n); }
/* out of range and NaN: INT32_MIN, as x86 gives */
WORD vi v_to_int(vf a) { return a >= -0x1p31f && a < 0x1p31f ? (vi)rintf(a) : INT32_MIN; }
WORD vf v_from_int(vi a) { return (vf)a; }

WORD vf v_ldexp(vf a, vf n) {
    vi k = v_to_int(n), half = k >= 0 ? k / 2 : -(-k / 2); /* two normal powers of two; |n| <= 252 */
    if (k == INT32_MIN) return a * n;
    return a * v_from_bits(vi_shl(half + 127, 23)) * v_from_bits(vi_shl(k - half + 127, 23));
}

WORD vi vi_load_u8(const uint8_t *p) { return *p; }
WORD vf v_load_u8(const uint8_t *p) { return *p; }
WORD vi vi_load_nibbles(const uint8_t *p, int64_t i) { return p[i / 2] >> (i % 2 ? 0 : 4); }
WORD void v_store_u8(uint8_t *p, vf a) { *p = a > 0 ? a < 255 ? (uint8_t)rintf(a) : 255 : 0; }
WORD vf v_lookup(const float table[16], vi index) { return table[index & 15]; }

WORD vf v_load_bf16_n(const uint16_t *p, int64_t n) { return n > 0 ? v_from_bits((vi)((uint32_t)*p << 16)) : 0; }
WORD float f16_value(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude < 0x400) { /* zero or denormal: its mantissa counts 2^-24 */
        vf a = (vf)magnitude * 0x1p-24f;
        return sign ? -a : a;
    }
    uint32_t u = (magnitude << 13) + ((uint32_t)(127 - 15) << 23);
    if (magnitude >= 0x7c00) u += (uint32_t)(255 - 31 - (127 - 15)) << 23; /* infinity, NaN */
    if (magnitude > 0x7c00) u |= 0x400000;                                 /* quiet */
    return v_from_bits((vi)(u | sign));
}
WORD vf v_load_f16_n(const uint16_t *p, int64_t n) { return n > 0 ? f16_value(*p) : 0; }
WORD void v_store_bf16_n(uint16_t *p, vf a, int64_t n) {
    uint32_t u = (uint32_t)v_bits(a);
    u = a != a ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1);
    if (n > 0) *p = (uint16_t)(u >> 16);
}
WORD void v_store_f16_n(uint16_t *p, vf a, int64_t n) {
    uint32_t u = (uint32_t)v_bits(a), sign = u >> 16 & 0x8000, r;
    vf magnitude = v_from_bits((vi)(u & 0x7fffffff));
    if (a != a)
        r = 0x7e00 | (u >> 13 & 0x3ff);
    else if (magnitude >= 65520.0f)
        r = 0x7c00;
    else if (magnitude < 0x1p-14f) /* denormal: the addition rounds to a multiple of 2^-24 */
        r = (uint32_t)v_bits(magnitude + 0.5f) - 0x3f000000;
    else {
        uint32_t m = u & 0x7fffffff;
        r = (m + 0xfff + (m >> 13 & 1) - ((uint32_t)(127 - 15) << 23)) >> 13;
    }
    if (n > 0) *p = (uint16_t)(sign | r);
}

typedef double vd;
WORD vd vd_zero(void) { return 0; }
WORD vd vd_add(vd acc, vf a) { return acc + a; }
WORD vd vd_fma(vd acc, vf a, vf b) { return acc + (double)a * b; }
WORD double vd_sum(vd acc) { return acc; }

WORD void v_transpose(vf r[VL]) { (void)r; }

/* Of products: kernels/tile.h. */
enum { MR = 4, NV = 8, KC = 256, BLOCK = 1 << 16, ABREAST = INT32_MAX, UNROLL = 1 };
enum { PACK_K = 64, PACK_PANELS = 8, FETCH = 0, ROWS_IN_PLACE = INT32_MAX, A_WORDS = 2 << 20, DEEP_BY_ROWS = 0 };

#include "../kernels/all.h"

const struct en_kernels en_scalar_kernels = {EN_KERNELS};

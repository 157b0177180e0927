/* AVX2, FMA, F16C (x86-64-v3): eight lanes; tails go through maskload or a small buffer. The words are described in
 * isa/README.md. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { VL = 8 };
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm; /* all bits of a lane, or none */

#define WORD static inline __attribute__((always_inline))

WORD vi first_lanes(int64_t n) {
    vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n >= VL ? VL : (int)n), lane);
}

WORD vf v_zero(void) { return _mm256_setzero_ps(); }
WORD vf v_set(float x) { return _mm256_set1_ps(x); }
WORD vf v_load(const float *p) { return _mm256_loadu_ps(p); }
WORD vf v_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
WORD void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
WORD void v_store_n(float *p, vf a, int64_t n) {
    if (n >= VL)
        v_store(p, a); /* AMD's masked stores are some twenty times as slow */
    else
        _mm256_maskstore_ps(p, first_lanes(n), a);
}

WORD vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
WORD vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
WORD vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
WORD vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
WORD vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
WORD vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
WORD vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
WORD vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
WORD vf v_mul_error(vf a, vf b, vf product) { return _mm256_fmsub_ps(a, b, product); }
WORD vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
WORD vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
WORD vf v_neg(vf a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
WORD vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WORD float v_hsum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
WORD float v_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

WORD vm v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
WORD vm v_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
WORD vm v_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
WORD vm v_nan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
WORD vf v_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
WORD int v_any(vm m) { return _mm256_movemask_ps(m) != 0; }

WORD vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
WORD vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
WORD vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
WORD vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
WORD vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
WORD vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
#define vi_shl(a, n) _mm256_slli_epi32(a, n)
#define vi_shr(a, n) _mm256_srli_epi32(a, n)
WORD vi v_bits(vf a) { return _mm256_castps_si256(a); }
WORD vf v_from_bits(vi a) { return _mm256_castsi256_ps(a); }
WORD vi v_to_int(vf a) { return _mm256_cvtps_epi32(a); }
WORD vf v_from_int(vi a) { return _mm256_cvtepi32_ps(a); }

/* Two factors, each a normal power of two, so that a result below 2^-126 is rounded once. |n| <= 252 */
WORD vf v_ldexp(vf a, vf n) {
    vi k = v_to_int(n), half = _mm256_srai_epi32(k, 1), bias = vi_set(127);
    vf first = v_from_bits(vi_shl(vi_add(half, bias), 23));
    vf second = v_from_bits(vi_shl(vi_add(vi_sub(k, half), bias), 23));
    return v_mul(v_mul(a, first), second);
}

WORD vi vi_load_u8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
WORD vf v_load_u8(const uint8_t *p) { return v_from_int(vi_load_u8(p)); }
WORD vi vi_load_nibbles(const uint8_t *p, int64_t i) {
    int32_t four;
    memcpy(&four, p + i / 2, 4);
    const vi low = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), both = vi_or(low, _mm256_slli_epi64(low, 32));
    return _mm256_srlv_epi32(both, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0));
}
WORD void v_store_u8(uint8_t *p, vf a) {
    vi k = v_to_int(a);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(k), _mm256_extracti128_si256(k, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
WORD vf v_lookup(const float table[16], vi index) {
    vf low = _mm256_permutevar8x32_ps(v_load(table), index), high = _mm256_permutevar8x32_ps(v_load(table + 8), index);
    return v_select(v_from_bits(vi_shl(index, 28)), high, low); /* by bit 3 */
}

WORD __m128i load_u16_n(const uint16_t *p, int64_t n) {
    if (n >= VL) return _mm_loadu_si128((const __m128i *)p);
    uint16_t lanes[VL] = {0};
    memcpy(lanes, p, (size_t)n * 2);
    return _mm_loadu_si128((const __m128i *)lanes);
}
WORD void store_u16_n(uint16_t *p, __m128i a, int64_t n) {
    if (n >= VL) {
        _mm_storeu_si128((__m128i *)p, a);
        return;
    }
    uint16_t lanes[VL];
    _mm_storeu_si128((__m128i *)lanes, a);
    memcpy(p, lanes, (size_t)n * 2);
}
WORD vf v_load_bf16_n(const uint16_t *p, int64_t n) {
    return v_from_bits(vi_shl(_mm256_cvtepu16_epi32(load_u16_n(p, n)), 16));
}
WORD float f16_value(uint16_t bits) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }
WORD vf v_load_f16_n(const uint16_t *p, int64_t n) { return _mm256_cvtph_ps(load_u16_n(p, n)); }
WORD void v_store_bf16_n(uint16_t *p, vf a, int64_t n) {
    vi u = v_bits(a);
    vi even = vi_add(vi_add(u, vi_set(0x7fff)), vi_and(vi_shr(u, 16), vi_set(1)));
    vi r = vi_shr(v_bits(v_select(v_nan(a), v_from_bits(vi_or(u, vi_set(0x400000))), v_from_bits(even))), 16);
    store_u16_n(p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)), n);
}
WORD void v_store_f16_n(uint16_t *p, vf a, int64_t n) {
    store_u16_n(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}

typedef struct {
    __m256d low, high;
} vd;
WORD __m256d low_half(vf a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
WORD __m256d high_half(vf a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
WORD vd vd_zero(void) { return (vd){_mm256_setzero_pd(), _mm256_setzero_pd()}; }
WORD vd vd_add(vd acc, vf a) {
    return (vd){_mm256_add_pd(acc.low, low_half(a)), _mm256_add_pd(acc.high, high_half(a))};
}
WORD vd vd_fma(vd acc, vf a, vf b) {
    return (vd){_mm256_fmadd_pd(low_half(a), low_half(b), acc.low),
                _mm256_fmadd_pd(high_half(a), high_half(b), acc.high)};
}
WORD double vd_sum(vd acc) {
    __m256d s = _mm256_add_pd(acc.low, acc.high);
    __m128d h = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
}

/* r[i] lane j <-> r[j] lane i */
WORD void v_transpose(vf r[VL]) {
    vf t[VL];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) /* r[i + c]: rows i..i+3 of columns c and c+4 */
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
            r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
        }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        vf lo = r[c], hi = r[c + 4];
        r[c] = _mm256_permute2f128_ps(lo, hi, 0x20);
        r[c + 4] = _mm256_permute2f128_ps(lo, hi, 0x31);
    }
}

/* Of products: kernels/tile.h. Where a core's other thread is busy, a part of its decoder and caches is left: so the
 * tile's loop is written out, its words of A lie side by side, and one panel of B at a time stays near. */
enum { MR = 6, NV = 2, KC = 1024, BLOCK = 3 << 15, ABREAST = 1, UNROLL = 4 };
enum { PACK_K = 8, PACK_PANELS = 4, FETCH = 64, ROWS_IN_PLACE = 192, A_WORDS = 5 << 18, DEEP_BY_ROWS = 1 };

#define EN_STRIPS

#include "../kernels/all.h"

const struct en_kernels en_avx2_kernels = {EN_KERNELS};

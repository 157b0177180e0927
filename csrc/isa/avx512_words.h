/* The words of AVX-512 F, BW, DQ, VL (x86-64-v4): sixteen lanes and a mask register for every tail. They are described
 * in isa/README.md; the levels that have them include this. */
#include <immintrin.h>
#include <stdint.h>

enum { VL = 16 };
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

#define WORD static inline __attribute__((always_inline))

WORD vm first_lanes(int64_t n) { return n >= VL ? 0xffff : (vm)((1u << n) - 1); }

WORD vf v_zero(void) { return _mm512_setzero_ps(); }
WORD vf v_set(float x) { return _mm512_set1_ps(x); }
WORD vf v_load(const float *p) { return _mm512_loadu_ps(p); }
WORD vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
WORD void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
WORD void v_store_n(float *p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }

WORD vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
WORD vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
WORD vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
WORD vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
WORD vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
WORD vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
WORD vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
WORD vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
WORD vf v_mul_error(vf a, vf b, vf product) { return _mm512_fmsub_ps(a, b, product); }
WORD vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
WORD vf v_abs(vf a) { return _mm512_abs_ps(a); }
WORD vf v_neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
WORD vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WORD vf v_ldexp(vf a, vf n) { return _mm512_scalef_ps(a, n); }
WORD float v_hsum(vf a) { return _mm512_reduce_add_ps(a); }
WORD float v_hmax(vf a) { return _mm512_reduce_max_ps(a); }

WORD vm v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
WORD vm v_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
WORD vm v_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
WORD vm v_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
WORD vf v_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
WORD int v_any(vm m) { return m != 0; }

WORD vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
WORD vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
WORD vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
WORD vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
WORD vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
WORD vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
#define vi_shl(a, n) _mm512_slli_epi32(a, n)
#define vi_shr(a, n) _mm512_srli_epi32(a, n)
WORD vi v_bits(vf a) { return _mm512_castps_si512(a); }
WORD vf v_from_bits(vi a) { return _mm512_castsi512_ps(a); }
WORD vi v_to_int(vf a) { return _mm512_cvtps_epi32(a); }
WORD vf v_from_int(vi a) { return _mm512_cvtepi32_ps(a); }

WORD vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
WORD vf v_load_u8(const uint8_t *p) { return v_from_int(vi_load_u8(p)); }
WORD vi vi_load_nibbles(const uint8_t *p, int64_t i) {
    const vi low = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(p + i / 2)));
    const vi both = vi_or(low, _mm512_slli_epi64(low, 32));
    return _mm512_srlv_epi32(both, _mm512_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0));
}
WORD void v_store_u8(uint8_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtusepi32_epi8(_mm512_max_epi32(v_to_int(a), vi_set(0))));
}
WORD vf v_lookup(const float table[16], vi index) { return _mm512_permutexvar_ps(index, v_load(table)); }

WORD vf v_load_bf16_n(const uint16_t *p, int64_t n) {
    return v_from_bits(vi_shl(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
WORD float f16_value(uint16_t bits) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }
WORD vf v_load_f16_n(const uint16_t *p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
WORD __m256i round_to_bf16(vf a) {
    vi u = v_bits(a);
    vi even = vi_add(vi_add(u, vi_set(0x7fff)), vi_and(vi_shr(u, 16), vi_set(1)));
    vi r = _mm512_mask_mov_epi32(even, v_nan(a), vi_or(u, vi_set(0x400000))); /* a NaN stays one */
    return _mm512_cvtepi32_epi16(vi_shr(r, 16));
}
#ifdef EN_BF16_DOT
/* The instruction for it gives the same bits, but takes denormals for zero: a vector with one goes the long way. */
WORD void v_store_bf16_n(uint16_t *p, vf a, int64_t n) {
    __m256i r = (__m256i)_mm512_cvtneps_pbh(a);
    if (__builtin_expect(_mm512_fpclass_ps_mask(a, 0x20) != 0, 0)) r = round_to_bf16(a);
    _mm256_mask_storeu_epi16(p, first_lanes(n), r);
}
#else
WORD void v_store_bf16_n(uint16_t *p, vf a, int64_t n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), round_to_bf16(a));
}
#endif
WORD void v_store_f16_n(uint16_t *p, vf a, int64_t n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

typedef struct {
    __m512d low, high;
} vd;
WORD __m512d low_half(vf a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
WORD __m512d high_half(vf a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
WORD vd vd_zero(void) { return (vd){_mm512_setzero_pd(), _mm512_setzero_pd()}; }
WORD vd vd_add(vd acc, vf a) {
    return (vd){_mm512_add_pd(acc.low, low_half(a)), _mm512_add_pd(acc.high, high_half(a))};
}
WORD vd vd_fma(vd acc, vf a, vf b) {
    return (vd){_mm512_fmadd_pd(low_half(a), low_half(b), acc.low),
                _mm512_fmadd_pd(high_half(a), high_half(b), acc.high)};
}
WORD double vd_sum(vd acc) { return _mm512_reduce_add_pd(_mm512_add_pd(acc.low, acc.high)); }

/* r[i] lane j <-> r[j] lane i */
WORD void v_transpose(vf r[VL]) {
    vf t[VL];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) /* r[i + c]: rows i..i+3 of columns c, c+4, c+8, c+12 */
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __m512d lo = _mm512_castps_pd(t[i + h]), hi = _mm512_castps_pd(t[i + 2 + h]);
            r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x88);
        t[c + 4] = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xdd);
        t[c + 8] = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x88);
        t[c + 12] = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        r[c] = _mm512_shuffle_f32x4(t[c], t[c + 8], 0x88);
        r[c + 8] = _mm512_shuffle_f32x4(t[c], t[c + 8], 0xdd);
        r[c + 4] = _mm512_shuffle_f32x4(t[c + 4], t[c + 12], 0x88);
        r[c + 12] = _mm512_shuffle_f32x4(t[c + 4], t[c + 12], 0xdd);
    }
}

/* Of products: kernels/tile.h. */
enum { MR = 14, NV = 2, KC = 512, BLOCK = 1 << 16, ABREAST = INT32_MAX, UNROLL = 1 };
enum { PACK_K = 64, PACK_PANELS = 8, FETCH = 0, ROWS_IN_PLACE = INT32_MAX, A_WORDS = 2 << 20, DEEP_BY_ROWS = 0 };

/* The words of AVX-512 with its conversions to bf16 and its dot product of bf16 pairs. */
#define EN_BF16_DOT 1
#include "avx512_words.h"

/* c + the products of a's and b's pairs of bf16, a pair a lane. Denormal inputs and results count as 0, whatever MXCSR
 * says, and the sum is rounded to nearest even after each product: not IEEE, but as good where bf16 is. */
WORD vf v_dot_bf16(vi a, vi b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

/* VL pairs of 16 bits, 0 from the nth element on */
WORD vi vi_load_u16_n(const uint16_t *p, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 2 * VL ? 0xffffffff : (1u << n) - 1, p);
}
/* Rounded to bf16, denormals to 0: the lanes of lo, then those of hi, two a lane. */
WORD vi v_pack_bf16(vf lo, vf hi) { return (vi)_mm512_cvtne2ps_pbh(hi, lo); }
/* The same as an f32 whose low half is zero. */
WORD vf v_round_bf16(vf a) { return v_from_bits(vi_shl(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a)), 16)); }
/* The first VL 16-bit lanes to p, and the others to q. */
WORD void v_store_halves(uint16_t *p, uint16_t *q, vi a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_castsi512_si256(a));
    _mm256_storeu_si256((__m256i *)q, _mm512_extracti64x4_epi64(a, 1));
}
/* Pairs of a's and b's first VL 16-bit lanes, and of the others. */
WORD vi v_zip_low(vi a, vi b) {
    const vi order = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                       0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    return _mm512_permutex2var_epi16(a, order, b);
}
WORD vi v_zip_high(vi a, vi b) {
    const vi order = _mm512_setr_epi32(0x300010, 0x310011, 0x320012, 0x330013, 0x340014, 0x350015, 0x360016, 0x370017,
                                       0x380018, 0x390019, 0x3a001a, 0x3b001b, 0x3c001c, 0x3d001d, 0x3e001e, 0x3f001f);
    return _mm512_permutex2var_epi16(a, order, b);
}
/* Pairs of the first VL 16-bit lanes and the others, in this order. */
WORD vi v_zip_halves(vi a) {
    const vi order = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                       0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    return _mm512_permutexvar_epi16(order, a);
}

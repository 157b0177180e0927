/* AVX-512 with its bf16 dot product: every kernel as avx512 has it, and products of bf16 by vdpbf16ps, which on AMD's
 * cores does twice the arithmetic of f32 in the same time. */
#define EN_BF16_DOT 1
#include "avx512_words.h"

/* c + the products of a's and b's pairs of bf16, a pair a lane. Denormal inputs and results count as 0, whatever MXCSR
 * says, and the sum is rounded to nearest even after each product: not IEEE, but as good where bf16 is. */
WORD vf v_dot_bf16(vi a, vi b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

#include "../kernels/all.h"

const struct en_kernels en_avx512_bf16_kernels = {EN_KERNELS, .fast_bf16 = 1};

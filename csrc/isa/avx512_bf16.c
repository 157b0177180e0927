/* AVX-512 with its bf16 dot product: every kernel as avx512 has it, and products of bf16 by vdpbf16ps, which on AMD's
 * cores does twice the arithmetic of f32 in the same time. */
#define EN_FAST_BF16_DOT 1
#include "avx512_bf16_words.h"

#include "../kernels/all.h"

const struct en_kernels en_avx512_bf16_kernels = {EN_KERNELS, .fast_bf16 = 1};

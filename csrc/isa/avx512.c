/* AVX-512 F, BW, DQ, VL (x86-64-v4), f32 throughout. */
#include "avx512_words.h"

#include "../kernels/all.h"

const struct en_kernels en_avx512_kernels = {EN_KERNELS};

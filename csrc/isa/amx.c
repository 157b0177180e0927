/* AMX: every kernel as avx512 has it, and products of bf16, attention's too, by tiles. The few rows or columns of a
 * skinny product, bound by memory, are left to vdpbf16ps; nothing else is, since it has half the rate of f32 on Intel's
 * cores. */
#include "avx512_bf16_words.h"

#ifdef EN_SOFTWARE_TILES
#include "software_tiles.h"
#endif

#include "../kernels/tile_amx.h"

#include "../kernels/all.h"

const struct en_kernels en_amx_kernels = {EN_KERNELS, .fast_bf16 = 1};

/* Steps of parameters that are kept in bf16: a block at a time is widened, stepped in f32 and rounded stochastically,
 * up or down with probabilities that make the expected value right. Rounding to nearest would lose every step that is
 * smaller than half of the 1/256 between two bf16 numbers.
 *
 * Random bits are those of dropout.h: block b of 256 elements takes the counters offset + 32·b and the 31 behind it, element
 * i < 128 the low 16 bits of word i, element 128 + i the upper ones (word i: word[i / 32] of counter i % 32). */
#ifndef EN_STOCHASTIC_H
#define EN_STOCHASTIC_H

#include <string.h>

#include "convert.h"
#include "dropout.h"
#include "multi.h"

enum { RANDOM_BLOCK = 8 * PHILOX_BLOCKS };

/* y (n,): x rounded; `random` has 16 bits for each, in the low half. NaN stays NaN. */
static void round_stochastic(int64_t n, const float *x, const float *random, uint16_t *y) {
    for (int64_t i = 0; i < n; i += VL) {
        vf a = v_load_n(x + i, n - i);
        vi up = vi_add(v_bits(a), v_bits(v_load_n(random + i, n - i)));
        vf kept = v_from_bits(vi_and(up, vi_set((int32_t)0xffff0000)));
        v_store_bf16_n(y + i, v_select(v_nan(a), a, kept), n - i); /* exact but for NaN */
    }
}

static void random_halves(uint64_t seed, uint64_t first, float halves[RANDOM_BLOCK]) {
    uint32_t word[4][PHILOX_BLOCKS], low[RANDOM_BLOCK / 2], high[RANDOM_BLOCK / 2];
    philox(seed, first, word);
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < PHILOX_BLOCKS; j++) {
            low[k * PHILOX_BLOCKS + j] = word[k][j] & 0xffff;
            high[k * PHILOX_BLOCKS + j] = word[k][j] >> 16;
        }
    memcpy(halves, low, sizeof low);
    memcpy(halves + RANDOM_BLOCK / 2, high, sizeof high);
}

/* step(context, param, 0, n) on f32 parameters does the work of a block. */
static void step_bf16(const void *context, const struct en_param *param, int64_t begin, int64_t end,
                      void (*step)(const void *context, const struct en_param *param, int64_t begin, int64_t end)) {
    float p[RANDOM_BLOCK], halves[RANDOM_BLOCK];
    size_t size = param->m_absmax ? 1 : sizeof(float);
    for (int64_t i = begin; i < end; i += RANDOM_BLOCK) {
        struct en_param block = *param;
        int64_t n = least(RANDOM_BLOCK, end - i), scale = i / EN_MOMENT_BLOCK;
        uint16_t *stored = (uint16_t *)param->p + i;
        block.p = p;
        block.g += i;
        if (param->m) block.m = (uint8_t *)param->m + (size_t)i * size;
        if (param->v) block.v = (uint8_t *)param->v + (size_t)i * size;
        if (param->m_absmax) block.m_absmax += scale, block.v_absmax += scale;
        widen_row(EN_BF16, n, stored, p);
        step(context, &block, 0, n);
        random_halves(param->seed, param->offset + (uint64_t)(i / RANDOM_BLOCK) * PHILOX_BLOCKS, halves);
        round_stochastic(n, p, halves, stored);
    }
}

#endif

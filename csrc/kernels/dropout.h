/* Dropout with a counter-based generator: the mask is a function of seed, offset and the element's index alone, so the
 * backward pass (the same call on the gradient) and any number of threads draw the same one.
 *
 * Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). Key: the seed's low
 * and high word. Counter: the 64 bits of offset + i / 4, then zeros. Element i takes word i % 4. */
#ifndef EN_DROPOUT_H
#define EN_DROPOUT_H

#include "strided.h"

enum { PHILOX_BLOCKS = 32 }; /* counters worked on side by side */

/* word[k][j]: word k of counter `first` + j */
static void philox(uint64_t seed, uint64_t first, uint32_t word[4][PHILOX_BLOCKS]) {
    for (int j = 0; j < PHILOX_BLOCKS; j++) {
        word[0][j] = (uint32_t)(first + (uint64_t)j);
        word[1][j] = (uint32_t)((first + (uint64_t)j) >> 32);
        word[2][j] = word[3][j] = 0;
    }
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++, key0 += 0x9e3779b9u, key1 += 0xbb67ae85u)
        for (int j = 0; j < PHILOX_BLOCKS; j++) {
            uint64_t a = (uint64_t)word[0][j] * 0xd2511f53u, b = (uint64_t)word[2][j] * 0xcd9e8d57u;
            word[0][j] = (uint32_t)(b >> 32) ^ word[1][j] ^ key0;
            word[2][j] = (uint32_t)(a >> 32) ^ word[3][j] ^ key1;
            word[1][j] = (uint32_t)b;
            word[3][j] = (uint32_t)a;
        }
}

struct dropout {
    int64_t n;
    enum en_dtype type;
    const void *x;
    uint64_t seed, offset, drop_below; /* an element goes where its word is below p·2^32 */
    float scale;
    void *y;
};

WORD void scale_row(enum en_dtype type, int64_t n, const void *x, const float *factor, void *y) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store_as(type, y, i, v_mul(load_as(type, x, i, VL), v_load(factor + i)), VL);
    if (i < n) store_as(type, y, i, v_mul(load_as(type, x, i, n - i), v_load_n(factor + i, n - i)), n - i);
}

/* Index: group of 4·PHILOX_BLOCKS elements. */
static void dropout_range(void *context, int64_t begin, int64_t end) {
    const struct dropout p = *(const struct dropout *)context;
    uint32_t word[4][PHILOX_BLOCKS];
    float factor[4 * PHILOX_BLOCKS];
    for (int64_t group = begin; group < end; group++) {
        philox(p.seed, p.offset + (uint64_t)group * PHILOX_BLOCKS, word);
        for (int j = 0; j < PHILOX_BLOCKS; j++)
            for (int k = 0; k < 4; k++) factor[4 * j + k] = word[k][j] < p.drop_below ? 0 : p.scale;
        int64_t first = group * 4 * PHILOX_BLOCKS, n = least(4 * PHILOX_BLOCKS, p.n - first);
        WITH_TYPE(p.type, scale_row, n, element(p.type, p.x, first), factor, element(p.type, p.y, first));
    }
}

static en_status dropout(enum en_dtype type, int64_t n, const void *x, double p, uint64_t seed, uint64_t offset,
                         void *y) {
    struct dropout d = {n, type, x, seed, offset, (uint64_t)(p * 0x1p32), p < 1 ? (float)(1 / (1 - p)) : 0, y};
    int64_t group = 4 * PHILOX_BLOCKS;
    en_parallel_for((n + group - 1) / group, row_grain(GRAIN_EXP, group), dropout_range, &d);
    return EN_OK;
}

#endif

/* What the calling thread can do at most: a register tile of products fed from L1, with random non-zero operands (a
 * core that multiplies zeros clocks higher and flatters itself).
 *
 * The loop is the inner loop of a product without its memory: PEAK_ROWS words of A, each spread over a vector, times
 * PEAK_VECTORS vectors of B, added to as many sums as keep the multipliers busy and still fit into the registers.
 */
#ifndef EN_PROBE_H
#define EN_PROBE_H

enum { PEAK_ROWS = VL == 16 ? 8 : 4, PEAK_VECTORS = 3, PEAK_DEPTH = 64, PEAK_PASSES = 64 };

/* Operands of one tile, 32-bit words: floats, or pairs of bf16. 14 KB at most, so they stay in L1. */
struct peak_operands {
    _Alignas(64) float a[PEAK_DEPTH][PEAK_ROWS];
    _Alignas(64) float b[PEAK_DEPTH][PEAK_VECTORS * VL];
};

/* Random floats in [1/2, 1) of either sign; with `pairs`, two bf16 such numbers a word. */
static void fill_operands(struct peak_operands *x, int pairs) {
    uint32_t *word = (uint32_t *)x, state = 1;
    for (size_t i = 0; i < sizeof *x / sizeof *word; i++) {
        state ^= state << 13, state ^= state >> 17, state ^= state << 5; /* xorshift32 */
        word[i] = pairs ? (state & 0x807f807fu) | 0x3f003f00u : (state & 0x807fffffu) | 0x3f000000u;
    }
}

/* FLOP/s of `step`, which adds flops_per_lane FLOPs' worth of products to every lane of its first argument. */
WORD double peak_of(vf (*step)(vf sum, vf a, vf b), int flops_per_lane, int pairs, double seconds) {
    struct peak_operands x;
    volatile float sink;
    int64_t passes = 0, start, elapsed;
    fill_operands(&x, pairs);
    start = en_now();
    do {
        vf sum[PEAK_ROWS][PEAK_VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < PEAK_ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < PEAK_VECTORS; v++) sum[i][v] = v_zero();
        for (int pass = 0; pass < PEAK_PASSES; pass++) {
            const struct peak_operands *p = &x;
            __asm__ volatile("" : "+r"(p)::"memory"); /* the operands are read anew */
            for (int k = 0; k < PEAK_DEPTH; k++) {
                vf b[PEAK_VECTORS];
#pragma GCC unroll 3
                for (int v = 0; v < PEAK_VECTORS; v++) b[v] = v_load(p->b[k] + v * VL);
#pragma GCC unroll 8
                for (int i = 0; i < PEAK_ROWS; i++)
#pragma GCC unroll 3
                    for (int v = 0; v < PEAK_VECTORS; v++) sum[i][v] = step(sum[i][v], v_set(p->a[k][i]), b[v]);
            }
        }
        vf all = v_zero();
#pragma GCC unroll 8
        for (int i = 0; i < PEAK_ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < PEAK_VECTORS; v++) all = v_add(all, sum[i][v]);
        sink = v_hsum(all);
        passes += PEAK_PASSES;
        elapsed = en_now() - start;
    } while ((double)elapsed < seconds * 1e9);
    (void)sink;
    return (double)passes * PEAK_DEPTH * PEAK_ROWS * PEAK_VECTORS * VL * flops_per_lane / ((double)elapsed * 1e-9);
}

WORD vf f32_step(vf sum, vf a, vf b) { return v_fma(a, b, sum); }
#ifdef EN_BF16_DOT
WORD vf bf16_step(vf sum, vf a, vf b) { return v_dot_bf16(v_bits(a), v_bits(b), sum); }
#endif

/* FLOP/s of one thread in products of `type`, measured for `seconds`; 0 where the level has no product of that type
 * and computes it as f32. */
static double peak(enum en_dtype type, double seconds) {
    if (type == EN_F32) return peak_of(f32_step, 2, 0, seconds);
#ifdef EN_BF16_PEAK
    if (type == EN_BF16) return EN_BF16_PEAK(seconds);
#elif defined EN_BF16_DOT
    if (type == EN_BF16) return peak_of(bf16_step, 4, 1, seconds);
#endif
    return 0;
}

#endif

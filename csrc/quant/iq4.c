/* ggml's types of 16 uneven levels, and MXFP4:
 *
 *   iq4_nl   32 values, 18 bytes: half d; 16 bytes, value i in the low and i + 16 in the high nibble       d·level[q]
 *   iq4_xs  256 values, 136 bytes: half d; 8 upper pairs of bits of the scales; 8 low nibbles; 8 × 16 bytes as above
 *                                                                                         d·(scale - 32)·level[q]
 *   mxfp4    32 values, 17 bytes: exponent e; nibbles of E2M1 (twice its values, hence e - 128)     2^(e-128)·level[q]
 *
 * Levels: kvalues_iq4nl and kvalues_mxfp4 of ggml-common.h (llama.cpp, MIT). */
#include "codec.h"
#include "fit.h"

enum { N = 32, HALF = N / 2, GROUPS = 8 };

const int8_t en_iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static void decode_nibbles(const uint8_t *raw, const int8_t *level, float d, float *y) {
    for (int i = 0; i < HALF; i++) {
        y[i] = d * (float)level[raw[i] & 15];
        y[i + HALF] = d * (float)level[raw[i] >> 4];
    }
}

/* The number of the level nearest to each x·inverse; halfway, the upper one. Sums over levels run side by side. */
static void nearest_levels(const float *x, float inverse, int32_t *q) {
    float scaled[N];
    for (int i = 0; i < N; i++) scaled[i] = inverse * x[i];
    memset(q, 0, N * sizeof *q);
    for (int k = 0; k < 15; k++) {
        float bound = (float)(en_iq4_levels[k] + en_iq4_levels[k + 1]) / 2;
        for (int i = 0; i < N; i++) q[i] += scaled[i] >= bound;
    }
}

/* Sums for the scale of least squares, weighted by x², where x·inverse is rounded to levels. */
static void try_scale(const float *x, float inverse, float *sum_xq, float *sum_qq) {
    int32_t codes[N];
    nearest_levels(x, inverse, codes);
    *sum_xq = *sum_qq = 0;
    for (int i = 0; i < N; i++) {
        float q = (float)en_iq4_levels[codes[i]], w = x[i] * x[i];
        *sum_xq += w * q * x[i];
        *sum_qq += w * q * q;
    }
}

/* The best of 16 scales: the extreme value at the lowest level, then near it. */
static float fit(const float *x) {
    enum { AROUND = 7 };
    float extreme = farthest(N, x), sum_xq, sum_qq;
    if (fabsf(extreme) < 1e-15f) return 0;
    try_scale(x, 1 / (-extreme / (float)en_iq4_levels[0]), &sum_xq, &sum_qq);
    float scale = sum_xq / sum_qq, best = scale * sum_xq;
    for (int step = -AROUND; step <= AROUND; step++) {
        try_scale(x, (float)(step + en_iq4_levels[0]) / extreme, &sum_xq, &sum_qq);
        if (!(sum_qq > 0 && sum_xq * sum_xq > best * sum_qq)) continue;
        scale = sum_xq / sum_qq;
        best = scale * sum_xq;
    }
    return scale;
}

static void encode_nibbles(const float *x, float scale, uint8_t *raw) {
    int32_t q[N];
    nearest_levels(x, scale != 0 ? 1 / scale : 0, q);
    for (int i = 0; i < HALF; i++) raw[i] = (uint8_t)(q[i] | q[i + HALF] << 4);
}

void en_decode_iq4_nl(const uint8_t *raw, float *y) { decode_nibbles(raw + 2, en_iq4_levels, half_at(raw), y); }

void en_encode_iq4_nl(const float *x, uint8_t *raw) {
    float scale = fit(x);
    put_half(raw, scale);
    encode_nibbles(x, scale, raw + 2);
}

void en_decode_iq4_xs(const uint8_t *raw, float *y) {
    int upper = u16_at(raw + 2);
    for (int g = 0; g < GROUPS; g++) {
        int scale = (raw[4 + g / 2] >> g % 2 * 4 & 15) | (upper >> 2 * g & 3) << 4;
        decode_nibbles(raw + 8 + g * HALF, en_iq4_levels, half_at(raw) * (float)(scale - 32), y + g * N);
    }
}

void en_encode_iq4_xs(const float *x, uint8_t *raw) {
    float scale[GROUPS];
    for (int g = 0; g < GROUPS; g++) scale[g] = fit(x + g * N);
    float d = -farthest(GROUPS, scale) / 32, inverse = d != 0 ? 1 / d : 0;
    memset(raw, 0, 8);
    put_half(raw, d);
    for (int g = 0; g < GROUPS; g++) {
        int code = clamp(nearest(inverse * scale[g]), -32, 31);
        encode_nibbles(x + g * N, d * (float)code, raw + 8 + g * HALF);
        code += 32;
        raw[4 + g / 2] |= (uint8_t)((code & 15) << g % 2 * 4);
        raw[2 + g / 4] |= (uint8_t)(code >> 4 << g % 4 * 2);
    }
}

void en_decode_mxfp4(const uint8_t *raw, float *y) {
    float d = float_of_bits(raw[0] < 2 ? 0x200000u << raw[0] : (uint32_t)(raw[0] - 1) << 23);
    decode_nibbles(raw + 1, mxfp4_levels, d, y);
}

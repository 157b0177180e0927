/* ggml's K-quants: blocks of 256 values in groups of 16 or 32, each with a scale of few bits and, but for q3_k and
 * q6_k, a minimum; half scales of these scales.
 *
 *   q2_k   84 bytes: 16 × (scale in the low, min in the high nibble); 64 of bit pairs; half d, dmin
 *                                                                           (d·scale)·q - dmin·min
 *   q3_k  110 bytes: 32 of upper bits; 64 of bit pairs; 12 of 6-bit scales; half d               d·(scale - 32)·(q - 4)
 *   q4_k  144 bytes: half d, dmin; 12 of 6-bit (scale, min) for groups of 32; 128 of nibbles     (d·scale)·q - dmin·min
 *   q5_k  176 bytes: half d, dmin; 12; 32 of upper bits; 128 of nibbles                          as q4_k
 *   q6_k  210 bytes: 128 of nibbles; 64 of upper bit pairs; 16 int8 scales; half d               (d·scale)·(q - 32)
 *
 * Encoding fits a scale (and a minimum) to each group (fit.c), rounds these to their few bits, then the values. */
#include "codec.h"
#include "fit.h"

enum { N = 256 };

/* Where value i lies: bit pairs of 128 values in 32 bytes, nibbles of 64 values in 32 bytes, upper bits in 32 bytes. */
static int pair(const uint8_t *raw, int i) { return raw[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3; }
static int nibble(const uint8_t *raw, int i) { return raw[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15; }
static int bit(const uint8_t *raw, int i) { return raw[i % 32] >> i / 32 & 1; }

static void put_pairs(uint8_t *raw, const uint8_t *q) {
    memset(raw, 0, N / 4);
    for (int i = 0; i < N; i++) raw[i / 128 * 32 + i % 32] |= (uint8_t)((q[i] & 3) << i / 32 % 4 * 2);
}

static void put_nibbles(uint8_t *raw, const uint8_t *q) {
    memset(raw, 0, N / 2);
    for (int i = 0; i < N; i++) raw[i / 64 * 32 + i % 32] |= (uint8_t)((q[i] & 15) << i / 32 % 2 * 4);
}

/* Bit `from` of each code. */
static void put_bits(uint8_t *raw, const uint8_t *q, int from) {
    memset(raw, 0, N / 8);
    for (int i = 0; i < N; i++) raw[i % 32] |= (uint8_t)((q[i] >> from & 1) << i / 32);
}

/* ---- q2_k ---- */

void en_decode_q2_k(const uint8_t *raw, float *y) {
    float d = half_at(raw + 80), dmin = half_at(raw + 82);
    for (int g = 0; g < 16; g++) {
        float slope = d * (float)(raw[g] & 15), base = dmin * (float)(raw[g] >> 4);
        for (int i = g * 16; i < g * 16 + 16; i++) y[i] = slope * (float)pair(raw + 16, i) - base;
    }
}

void en_encode_q2_k(const float *x, uint8_t *raw) {
    struct fit_affine how = {.levels = 3, .first = -0.5f, .step = 0.1f, .steps = 15, .absolute = 1};
    uint8_t q[N];
    float scale[16], min[16];
    for (int first = 0; first < 16; first += LANES) {
        struct groups groups = {.n = 16};
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 16; i++) {
                groups.x[i][lane] = x[(first + lane) * 16 + i];
                groups.weight[i][lane] = fabsf(groups.x[i][lane]);
            }
        fit_affine(&how, &groups, q + first * 16, scale + first, min + first);
    }
    float most_scale = largest(16, scale), most_min = largest(16, min);
    float to_scale = most_scale > 0 ? 15 / most_scale : 0, to_min = most_min > 0 ? 15 / most_min : 0;
    for (int g = 0; g < 16; g++) /* of bytes: a tiny scale has no inverse, and what `nearest` then gives no range */
        raw[g] = (uint8_t)(nearest(to_scale * scale[g]) | (unsigned)nearest(to_min * min[g]) << 4);
    put_half(raw + 80, most_scale > 0 ? most_scale / 15 : 0);
    put_half(raw + 82, most_min > 0 ? most_min / 15 : 0);
    for (int g = 0; g < 16; g++)
        round_affine(16, x + g * 16, half_at(raw + 80) * (float)(raw[g] & 15), half_at(raw + 82) * (float)(raw[g] >> 4),
                     3, q + g * 16);
    put_pairs(raw + 16, q);
}

/* ---- q3_k: scale g has its low nibble in byte g % 8 and the upper pair of bits in byte 8 + g % 4 ---- */

static int scale_of_q3(const uint8_t *raw, int g) {
    return ((raw[g % 8] >> g / 8 * 4 & 15) | (raw[8 + g % 4] >> g / 4 * 2 & 3) << 4) - 32;
}

void en_decode_q3_k(const uint8_t *raw, float *y) {
    float d = half_at(raw + 108);
    for (int g = 0; g < 16; g++) {
        float slope = d * (float)scale_of_q3(raw + 96, g);
        for (int i = g * 16; i < g * 16 + 16; i++)
            y[i] = slope * (float)((pair(raw + 32, i) | bit(raw, i) << 2) - 4);
    }
}

void en_encode_q3_k(const float *x, uint8_t *raw) {
    uint8_t q[N], *packed = raw + 96;
    float scale[16];
    for (int g = 0; g < 16; g++) scale[g] = fit_in_turn(16, 4, x + g * 16, q + g * 16);
    float most = farthest(16, scale), to_scale = most != 0 ? -32 / most : 0;
    memset(packed, 0, 12);
    for (int g = 0; g < 16 && most != 0; g++) {
        int code = clamp((int8_t)nearest(to_scale * scale[g]), -32, 31) + 32;
        packed[g % 8] |= (uint8_t)((code & 15) << g / 8 * 4);
        packed[8 + g % 4] |= (uint8_t)(code >> 4 << g / 4 * 2);
    }
    put_half(raw + 108, most != 0 ? 1 / to_scale : 0);
    for (int g = 0; g < 16; g++)
        round_symmetric(16, x + g * 16, half_at(raw + 108) * (float)scale_of_q3(packed, g), 4, q + g * 16);
    put_bits(raw, q, 2);
    put_pairs(raw + 32, q);
}

/* ---- q4_k, q5_k. Groups 0 to 3 keep their scale in the low 6 bits of byte g and their min in those of byte g + 4; the
 * upper pairs of these bytes complete the nibbles that groups 4 to 7 have in bytes 8 to 11. ---- */

static int scale_of(const uint8_t *raw, int g) {
    return g < 4 ? raw[g] & 63 : (raw[g + 4] & 15) | (raw[g - 4] >> 6) << 4;
}
static int min_of(const uint8_t *raw, int g) {
    return g < 4 ? raw[g + 4] & 63 : raw[g + 4] >> 4 | (raw[g] >> 6) << 4;
}

static void put_scales(uint8_t *raw, const float *scale, const float *min, float to_scale, float to_min) {
    for (int g = 0; g < 8; g++) {
        int s = (uint8_t)nearest(to_scale * scale[g]), m = (uint8_t)nearest(to_min * min[g]);
        s = s < 63 ? s : 63, m = m < 63 ? m : 63;
        if (g < 4) {
            raw[g] = (uint8_t)s, raw[g + 4] = (uint8_t)m;
        } else {
            raw[g + 4] = (uint8_t)((s & 15) | (m & 15) << 4);
            raw[g - 4] |= (uint8_t)(s >> 4 << 6);
            raw[g] |= (uint8_t)(m >> 4 << 6);
        }
    }
}

/* Scales and mins into the 16 bytes that both types begin with, and the codes. */
static void encode_groups(const struct fit_affine *how, const float *x, uint8_t *raw, uint8_t *q) {
    float scale[8], min[8];
    for (int first = 0; first < 8; first += LANES) {
        struct groups groups = {.n = 32};
        for (int lane = 0; lane < LANES; lane++) {
            const float *group = x + (first + lane) * 32;
            float squares = 0;
            for (int i = 0; i < 32; i++) squares += group[i] * group[i];
            float typical = sqrtf(squares / 32);
            for (int i = 0; i < 32; i++) {
                groups.x[i][lane] = group[i];
                groups.weight[i][lane] = typical + fabsf(group[i]);
            }
        }
        fit_affine(how, &groups, q + first * 32, scale + first, min + first);
    }
    float most_scale = largest(8, scale), most_min = largest(8, min);
    put_scales(raw + 4, scale, min, most_scale > 0 ? 63 / most_scale : 0, most_min > 0 ? 63 / most_min : 0);
    put_half(raw, most_scale / 63);
    put_half(raw + 2, most_min / 63);
    for (int g = 0; g < 8; g++)
        round_affine(32, x + g * 32, half_at(raw) * (float)scale_of(raw + 4, g),
                     half_at(raw + 2) * (float)min_of(raw + 4, g), how->levels, q + g * 32);
}

void en_decode_q4_k(const uint8_t *raw, float *y) {
    float d = half_at(raw), dmin = half_at(raw + 2);
    for (int g = 0; g < 8; g++) {
        float slope = d * (float)scale_of(raw + 4, g), base = dmin * (float)min_of(raw + 4, g);
        for (int i = g * 32; i < g * 32 + 32; i++) y[i] = slope * (float)nibble(raw + 16, i) - base;
    }
}

void en_encode_q4_k(const float *x, uint8_t *raw) {
    uint8_t q[N];
    struct fit_affine how = {.levels = 15, .first = -1.0f, .step = 0.1f, .steps = 20, .absolute = 0};
    encode_groups(&how, x, raw, q);
    put_nibbles(raw + 16, q);
}

void en_decode_q5_k(const uint8_t *raw, float *y) {
    float d = half_at(raw), dmin = half_at(raw + 2);
    for (int g = 0; g < 8; g++) {
        float slope = d * (float)scale_of(raw + 4, g), base = dmin * (float)min_of(raw + 4, g);
        for (int i = g * 32; i < g * 32 + 32; i++)
            y[i] = slope * (float)(nibble(raw + 48, i) + bit(raw + 16, i) * 16) - base;
    }
}

void en_encode_q5_k(const float *x, uint8_t *raw) {
    uint8_t q[N];
    struct fit_affine how = {.levels = 31, .first = -0.5f, .step = 0.1f, .steps = 15, .absolute = 0};
    encode_groups(&how, x, raw, q);
    put_bits(raw + 16, q, 4);
    put_nibbles(raw + 48, q);
}

/* ---- q6_k: of each half of 128 values, low nibbles of two rows of 32 and two rows more in 64 bytes ---- */

static int low_of_q6(int i) { return i / 128 * 64 + i % 64; }

void en_decode_q6_k(const uint8_t *raw, float *y) {
    float d = half_at(raw + 208);
    for (int g = 0; g < 16; g++) {
        float slope = d * (float)(int8_t)raw[192 + g];
        for (int i = g * 16; i < g * 16 + 16; i++) {
            int q = (raw[low_of_q6(i)] >> i / 64 % 2 * 4 & 15) | pair(raw + 128, i) << 4;
            y[i] = slope * (float)(q - 32);
        }
    }
}

void en_encode_q6_k(const float *x, uint8_t *raw) {
    uint8_t q[N];
    float scale[16];
    for (int g = 0; g < 16; g++) scale[g] = fit_symmetric(16, 32, x + g * 16, q + g * 16);
    float most = farthest(16, scale);
    memset(raw, 0, 210);
    if (fabsf(most) < 1e-15f) return;
    float to_scale = -128 / most;
    put_half(raw + 208, 1 / to_scale);
    for (int g = 0; g < 16; g++) {
        int code = nearest(to_scale * scale[g]);
        raw[192 + g] = (uint8_t)(code < 127 ? code : 127);
        round_symmetric(16, x + g * 16, half_at(raw + 208) * (float)(int8_t)raw[192 + g], 32, q + g * 16);
    }
    for (int i = 0; i < N; i++) raw[low_of_q6(i)] |= (uint8_t)((q[i] & 15) << i / 64 % 2 * 4);
    for (int i = 0; i < N; i++) q[i] >>= 4;
    put_pairs(raw + 128, q);
}

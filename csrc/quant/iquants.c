/* ggml's IQ types of one to three bits, which are only read: 256 values in groups of 32, cut into vectors of 8 (iq3: of
 * 4) whose values a code takes from a grid (grids.h), with signs apart and scales of few bits.
 *
 *   iq2_xxs  66 bytes: half d; a group: 4 codes, then 4 × 7 bits of signs and 4 bits of scale  d·(scale + ½)/4·grid
 *   iq2_xs   74: half d; 32 words of 9 bits of code, 7 of signs; a nibble of scale for 16 values        the same
 *   iq2_s    82: half d; 32 low bytes of codes; 32 of signs; 8 of upper code bits; nibbles of scale     the same
 *   iq3_xxs  98: half d; 64 codes; a group: 4 × 7 bits of signs and 4 of scale                 d·(scale + ½)/2·grid
 *   iq3_s   110: half d; 64 low bytes of codes; 8 of upper bits; 32 of signs; a nibble of scale a group
 *                                                                                            d·(2·scale + 1)·grid
 *   iq1_s    50: half d; 32 low bytes of codes; a word a group: 4 × 3 upper bits, 3 of scale, sign of the shift
 *                                                                                d·(2·scale + 1)·(grid ± 1/8)
 *   iq1_m    56: 32 low bytes of codes; 16 of (3 upper bits, sign of the shift) twice; 4 words of 4 × 3 bits of scale
 *            for 16 values, whose top nibbles are the half d                                                the same
 *
 * Seven bits of signs have an eighth that makes the number of minuses even. */
#include "codec.h"
#include "grids.h"

static const float levels_of_2[4] = {8, 25, 43, 0};
static const float levels_of_3xxs[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const float levels_of_3s[8] = {1, 3, 5, 7, 9, 11, 13, 15};

static int with_parity(unsigned signs) { return (int)(signs | (unsigned)__builtin_parity(signs) << 7); }

static void put_of_8(float scale, uint16_t point, int signs, float *y) {
    for (int i = 0; i < 8; i++) y[i] = scale * levels_of_2[point >> 2 * i & 3] * (signs >> i & 1 ? -1.0f : 1.0f);
}

static void put_of_4(float scale, const float *levels, uint16_t point, int signs, float *y) {
    for (int i = 0; i < 4; i++) y[i] = scale * levels[point >> 3 * i & 7] * (signs >> i & 1 ? -1.0f : 1.0f);
}

static float quarter(float d, int scale) { return d * (0.5f + (float)scale) * 0.25f; }

void en_decode_iq2_xxs(const uint8_t *raw, float *y) {
    for (int g = 0; g < 8; g++) {
        const uint8_t *code = raw + 2 + g * 8;
        uint32_t word = u32_at(code + 4);
        float scale = quarter(half_at(raw), (int)(word >> 28));
        for (int v = 0; v < 4; v++)
            put_of_8(scale, iq2_xxs_grid[code[v]], with_parity(word >> 7 * v & 127), y + g * 32 + v * 8);
    }
}

void en_decode_iq2_xs(const uint8_t *raw, float *y) {
    for (int v = 0; v < 32; v++) {
        int word = u16_at(raw + 2 + v * 2), scale = raw[66 + v / 4] >> v / 2 % 2 * 4 & 15;
        put_of_8(quarter(half_at(raw), scale), iq2_xs_grid[word & 511], with_parity((unsigned)word >> 9), y + v * 8);
    }
}

void en_decode_iq2_s(const uint8_t *raw, float *y) {
    for (int v = 0; v < 32; v++) {
        int code = raw[2 + v] | (raw[66 + v / 4] >> v % 4 * 2 & 3) << 8, scale = raw[74 + v / 4] >> v / 2 % 2 * 4 & 15;
        put_of_8(quarter(half_at(raw), scale), iq2_s_grid[code], raw[34 + v], y + v * 8);
    }
}

void en_decode_iq3_xxs(const uint8_t *raw, float *y) {
    for (int v = 0; v < 64; v++) {
        uint32_t word = u32_at(raw + 66 + v / 8 * 4);
        float scale = half_at(raw) * (0.5f + (float)(word >> 28)) * 0.5f;
        int signs = with_parity(word >> 7 * (v / 2 % 4) & 127) >> v % 2 * 4;
        put_of_4(scale, levels_of_3xxs, iq3_xxs_grid[raw[2 + v]], signs, y + v * 4);
    }
}

void en_decode_iq3_s(const uint8_t *raw, float *y) {
    for (int v = 0; v < 64; v++) {
        int code = raw[2 + v] | (raw[66 + v / 8] >> v % 8 & 1) << 8, scale = raw[106 + v / 16] >> v / 8 % 2 * 4 & 15;
        put_of_4(half_at(raw) * (float)(1 + 2 * scale), levels_of_3s, iq3_s_grid[code], raw[74 + v / 2] >> v % 2 * 4,
                 y + v * 4);
    }
}

static void put_shifted(float d, int scale, uint16_t point, int minus, float *y) {
    for (int i = 0; i < 8; i++)
        y[i] = d * (float)(2 * scale + 1) * ((float)((point >> 2 * i & 3) - 1) + (minus ? -0.125f : 0.125f));
}

void en_decode_iq1_s(const uint8_t *raw, float *y) {
    for (int v = 0; v < 32; v++) {
        int word = u16_at(raw + 34 + v / 4 * 2), code = raw[2 + v] | (word >> v % 4 * 3 & 7) << 8;
        put_shifted(half_at(raw), word >> 12 & 7, iq1_grid[code], word >> 15, y + v * 8);
    }
}

void en_decode_iq1_m(const uint8_t *raw, float *y) {
    int half = 0;
    for (int i = 0; i < 4; i++) half |= u16_at(raw + 48 + i * 2) >> 12 << i * 4;
    for (int v = 0; v < 32; v++) {
        int upper = raw[32 + v / 2] >> v % 2 * 4, code = raw[v] | (upper & 7) << 8;
        int scale = u16_at(raw + 48 + v / 8 * 2) >> v / 2 % 4 * 3 & 7;
        put_shifted(float_of_half((uint16_t)half), scale, iq1_grid[code], upper & 8, y + v * 8);
    }
}

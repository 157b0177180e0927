/* ggml's ternary types, which are only read: 256 values d·(q - 1), q in {0, 1, 2}.
 *
 *   tq1_0  54 bytes: 48 of five digits, 4 of four; half d. A byte holds digits base 3 as a fraction, b / 256, the first
 *          digit first: multiplied by 3 (modulo 256, n times before), its whole part is digit n
 *   tq2_0  66 bytes: 64 of bit pairs; half d */
#include "codec.h"

static int digit(uint8_t byte, int n) {
    static const uint8_t power[5] = {1, 3, 9, 27, 81};
    return (uint8_t)(byte * power[n]) * 3 >> 8;
}

/* Digit n of all bytes before digit n + 1 of any. */
static float *decode_digits(const uint8_t *raw, int bytes, int digits, float d, float *y) {
    for (int n = 0; n < digits; n++)
        for (int i = 0; i < bytes; i++) *y++ = (float)(digit(raw[i], n) - 1) * d;
    return y;
}

void en_decode_tq1_0(const uint8_t *raw, float *y) {
    float d = half_at(raw + 52);
    y = decode_digits(raw, 32, 5, d, y);
    y = decode_digits(raw + 32, 16, 5, d, y);
    decode_digits(raw + 48, 4, 4, d, y);
}

void en_decode_tq2_0(const uint8_t *raw, float *y) {
    float d = half_at(raw + 64);
    for (int i = 0; i < 256; i++) y[i] = (float)((raw[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3) - 1) * d;
}

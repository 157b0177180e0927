/* ggml's blocks of 32 values with one or two half scales:
 *
 *   q4_0  18 bytes: half d; 16 bytes, value i in the low and i + 16 in the high nibble               d·(q - 8)
 *   q4_1  20 bytes: half d, m; nibbles                                                               d·q + m
 *   q5_0  22 bytes: half d; 32 bits, the fifth of each value; nibbles                                d·(q - 16)
 *   q5_1  24 bytes: half d, m; 32 bits; nibbles                                                      d·q + m
 *   q8_0  34 bytes: half d; 32 int8                                                                  d·q
 *
 * d of q4_0 and q5_0 is chosen so that the value of largest magnitude becomes the lowest code. */
#include "codec.h"

enum { N = 32, HALF = N / 2 };

/* The value of largest magnitude, the first of several. */
static float extreme(const float *x) {
    float magnitude = 0, found = 0;
    for (int i = 0; i < N; i++)
        if (magnitude < fabsf(x[i])) {
            magnitude = fabsf(x[i]);
            found = x[i];
        }
    return found;
}

static float inverse(float d) { return d != 0 ? 1 / d : 0; }

static void put_nibbles(uint8_t *raw, const uint8_t *q) {
    for (int i = 0; i < HALF; i++) raw[i] = (uint8_t)((q[i] & 15) | (q[i + HALF] & 15) << 4);
}

static void put_fifth_bits(uint8_t *raw, const uint8_t *q) {
    memset(raw, 0, N / 8);
    for (int i = 0; i < N; i++) raw[i / 8] |= (uint8_t)((q[i] >> 4 & 1) << i % 8);
}

static int nibble(const uint8_t *raw, int i) { return i < HALF ? raw[i] & 15 : raw[i - HALF] >> 4; }
static int fifth_bit(const uint8_t *raw, int i) { return (raw[i / 8] >> i % 8 & 1) << 4; }

void en_decode_q4_0(const uint8_t *raw, float *y) {
    float d = half_at(raw);
    for (int i = 0; i < N; i++) y[i] = (float)(nibble(raw + 2, i) - 8) * d;
}

void en_decode_q4_1(const uint8_t *raw, float *y) {
    float d = half_at(raw), m = half_at(raw + 2);
    for (int i = 0; i < N; i++) y[i] = (float)nibble(raw + 4, i) * d + m;
}

void en_decode_q5_0(const uint8_t *raw, float *y) {
    float d = half_at(raw);
    for (int i = 0; i < N; i++) y[i] = (float)((nibble(raw + 6, i) | fifth_bit(raw + 2, i)) - 16) * d;
}

void en_decode_q5_1(const uint8_t *raw, float *y) {
    float d = half_at(raw), m = half_at(raw + 2);
    for (int i = 0; i < N; i++) y[i] = (float)(nibble(raw + 8, i) | fifth_bit(raw + 4, i)) * d + m;
}

void en_decode_q8_0(const uint8_t *raw, float *y) {
    float d = half_at(raw);
    for (int i = 0; i < N; i++) y[i] = (float)(int8_t)raw[2 + i] * d;
}

/* Codes from 0 on with the zero in the middle; d is stored. The sum is taken to a signed byte before it is bounded. */
static void symmetric(const float *x, int levels, uint8_t *raw, uint8_t *q) {
    float d = extreme(x) / (float)(-levels / 2), id = inverse(d);
    put_half(raw, d);
    for (int i = 0; i < N; i++) {
        int code = (int8_t)truncated(x[i] * id + ((float)(levels / 2) + 0.5f));
        q[i] = (uint8_t)(code < levels ? code : levels - 1);
    }
}

/* Codes of the steps above the least value; d and m are stored. */
static void affine(const float *x, int levels, uint8_t *raw, uint8_t *q) {
    float low = x[0], high = x[0];
    for (int i = 1; i < N; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
    }
    float d = (high - low) / (float)(levels - 1), id = inverse(d);
    put_half(raw, d);
    put_half(raw + 2, low);
    for (int i = 0; i < N; i++) q[i] = (uint8_t)truncated((x[i] - low) * id + 0.5f);
}

void en_encode_q4_0(const float *x, uint8_t *raw) {
    uint8_t q[N];
    symmetric(x, 16, raw, q);
    put_nibbles(raw + 2, q);
}

void en_encode_q4_1(const float *x, uint8_t *raw) {
    uint8_t q[N];
    affine(x, 16, raw, q);
    for (int i = 0; i < N; i++) q[i] = (uint8_t)((int8_t)q[i] < 15 ? q[i] : 15);
    put_nibbles(raw + 4, q);
}

void en_encode_q5_0(const float *x, uint8_t *raw) {
    uint8_t q[N];
    symmetric(x, 32, raw, q);
    put_fifth_bits(raw + 2, q);
    put_nibbles(raw + 6, q);
}

void en_encode_q5_1(const float *x, uint8_t *raw) {
    uint8_t q[N];
    affine(x, 32, raw, q);
    put_fifth_bits(raw + 4, q);
    put_nibbles(raw + 8, q);
}

void en_encode_q8_0(const float *x, uint8_t *raw) {
    float d = fabsf(extreme(x)) / 127, id = inverse(d);
    put_half(raw, d);
    for (int i = 0; i < N; i++) raw[2 + i] = (uint8_t)truncated(roundf(x[i] * id));
}

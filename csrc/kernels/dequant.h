/* ggml's block encodings to floats, bit for bit as ggml decodes them. Layouts (little-endian, half = IEEE binary16):
 *
 *   q4_0   32 values, 18 bytes: half d; 16 bytes, value i in the low and i + 16 in the high nibble;  d·(q - 8)
 *   q8_0   32 values, 34 bytes: half d; 32 int8;                                                     d·q
 *   q4_k  256 values, 144 bytes: half d, dmin; 12 bytes of 6-bit (scale, min) for eight groups of 32; 128 bytes of
 *         nibbles, 64 values to 32 bytes as in q4_0;                                        (d·scale)·q - dmin·min
 *   q6_k  256 values, 210 bytes: 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales for groups of 16,
 *         half d;                                                                           d·scale·(q - 32) */
#ifndef EN_DEQUANT_H
#define EN_DEQUANT_H

#include <string.h>

#include "convert.h"
#include "strided.h"

static inline float half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    float lanes[VL];
    v_store(lanes, v_load_f16_n(&bits, 1));
    return lanes[0];
}

static void decode_q4_0(const uint8_t *restrict raw, float *restrict y) {
    float d = half_at(raw);
    for (int i = 0; i < 16; i++) {
        y[i] = (float)((raw[2 + i] & 15) - 8) * d;
        y[i + 16] = (float)((raw[2 + i] >> 4) - 8) * d;
    }
}

static void decode_q8_0(const uint8_t *restrict raw, float *restrict y) {
    float d = half_at(raw);
    const int8_t *q = (const int8_t *)(raw + 2);
    for (int i = 0; i < 32; i++) y[i] = (float)q[i] * d;
}

/* Groups 0 to 3 keep their scale in the low 6 bits of byte g and their min in those of byte g + 4; the upper pairs of
 * these bytes complete the nibbles that groups 4 to 7 have in bytes 8 to 11. */
static void decode_q4_k(const uint8_t *raw, float *y) {
    float d = half_at(raw), dmin = half_at(raw + 2);
    const uint8_t *packed = raw + 4, *q = raw + 16;
    for (int g = 0; g < 8; g++) {
        int scale = packed[g] & 63, min = packed[g + 4] & 63;
        if (g >= 4) {
            scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
            min = packed[g + 4] >> 4 | (packed[g] >> 6) << 4;
        }
        float slope = d * (float)scale, base = dmin * (float)min;
        for (int i = 0; i < 32; i++)
            y[g * 32 + i] = slope * (float)(q[g / 2 * 32 + i] >> g % 2 * 4 & 15) - base;
    }
}

static void decode_q6_k(const uint8_t *restrict raw, float *restrict y) {
    float d = half_at(raw + 208);
    const int8_t *scales = (const int8_t *)(raw + 192);
    for (int part = 0; part < 8; part++) { /* 32 values: of each half of 128, low nibbles of two rows, then the high */
        const uint8_t *low = raw + part / 4 * 64 + part % 2 * 32, *high = raw + 128 + part / 4 * 32;
        int nibble = part / 2 % 2 * 4, pair = part % 4 * 2;
        for (int group = 0; group < 2; group++) {
            float slope = d * (float)scales[part * 2 + group];
            for (int i = group * 16; i < group * 16 + 16; i++) {
                int q = (low[i] >> nibble & 15) | (high[i] >> pair & 3) << 4;
                y[part * 32 + i] = slope * (float)(q - 32);
            }
        }
    }
}

/* The types that are decoded here; the others the plain way, by csrc/quant. */
static void (*const decoders[EN_QTYPE_COUNT])(const uint8_t *raw, float *y) = {
    [EN_Q4_0] = decode_q4_0, [EN_Q8_0] = decode_q8_0, [EN_Q4_K] = decode_q4_k, [EN_Q6_K] = decode_q6_k,
};

struct dequantization {
    enum en_qtype qtype;
    enum en_dtype type;
    const uint8_t *raw;
    void *y;
};

static void dequantize_range(void *context, int64_t begin, int64_t end) {
    const struct dequantization *p = context;
    const struct en_codec *codec = &en_codecs[p->qtype];
    int64_t values = codec->values, bytes = codec->bytes;
    for (int64_t i = begin; i < end; i++) {
        float block[EN_MAX_BLOCK];
        float *y = p->type == EN_F32 ? (float *)p->y + i * values : block;
        (decoders[p->qtype] ? decoders[p->qtype] : codec->decode)(p->raw + i * bytes, y);
        if (p->type != EN_F32) narrow_row(p->type, values, block, (uint16_t *)p->y + i * values);
    }
}

static en_status dequantize(enum en_qtype qtype, int64_t blocks, const uint8_t *raw, enum en_dtype type, void *y) {
    struct dequantization p = {qtype, type, raw, y};
    en_parallel_for(blocks, row_grain(GRAIN, en_codecs[qtype].values), dequantize_range, &p);
    return EN_OK;
}

#endif

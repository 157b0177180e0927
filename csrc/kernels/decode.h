/* Blocks of quantized numbers to f32 and bf16, with the same f32 multiplications and subtractions as the programs whose
 * types they are, so the bits are theirs; bf16 is that rounded to nearest even, denormals to 0. Types without a decoder
 * here are read the plain way, by csrc/quant. Layouts (little-endian, half = IEEE binary16):
 *
 *   q4_0   32 values, 18 bytes: half d; 16 bytes, value i in the low and i + 16 in the high nibble;  d·(q - 8)
 *   q8_0   32 values, 34 bytes: half d; 32 int8;                                                     d·q
 *   q4_k  256 values, 144 bytes: half d, dmin; 12 bytes of 6-bit (scale, min) for eight groups of 32; 128 bytes of
 *         nibbles, 64 values to 32 bytes as in q4_0;                                        (d·scale)·q - dmin·min
 *   q5_k  256 values, 176 bytes: as q4_k, and before the nibbles 32 bytes of fifth bits
 *   q6_k  256 values, 210 bytes: 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales for groups of 16,
 *         half d;                                                                           d·scale·(q - 32)
 *   nf4, fp4  64 codes of 4 bits, high nibble first; scales lie apart;                        table[code]·absmax */
#ifndef EN_DECODE_H
#define EN_DECODE_H

#include <string.h>

#include "types.h"

static inline float half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return f16_value(bits);
}

static inline float absmax_of(const struct en_blocks *w, int64_t block) {
    if (w->absmax) return w->absmax[block];
    const float scaled = w->map[w->codes[block]] * w->nested[block / 256];
    return scaled + w->offset;
}

WORD void decode_codes(const float table[16], const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    for (int64_t b = first; b < first + n; b++, y += 64) {
        const vf scale = v_set(absmax_of(w, b));
        for (int64_t i = 0; i < 64; i += VL)
            v_store(y + i, v_mul(v_lookup(table, vi_load_nibbles(w->raw + b * 32, i)), scale));
    }
}
static void decode_nf4(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    decode_codes(en_nf4_levels, w, first, n, y);
}
static void decode_fp4(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    decode_codes(en_fp4_levels, w, first, n, y);
}

static void decode_q4_0_blocks(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    const uint8_t *raw = w->raw + first * 18;
    for (; n > 0; n--, raw += 18, y += 32) {
        const vf d = v_set(half_at(raw));
        for (int64_t i = 0; i < 16; i += VL) {
            const vi q = vi_load_u8(raw + 2 + i);
            v_store(y + i, v_mul(v_from_int(vi_sub(vi_and(q, vi_set(15)), vi_set(8))), d));
            v_store(y + 16 + i, v_mul(v_from_int(vi_sub(vi_shr(q, 4), vi_set(8))), d));
        }
    }
}

static void decode_q8_0_blocks(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    const uint8_t *raw = w->raw + first * 34;
    for (; n > 0; n--, raw += 34, y += 32) {
        const vf d = v_set(half_at(raw));
        for (int64_t i = 0; i < 32; i += VL) {
            const vi q = vi_sub(vi_xor(vi_load_u8(raw + 2 + i), vi_set(128)), vi_set(128));
            v_store(y + i, v_mul(v_from_int(q), d));
        }
    }
}

/* The slopes and bases of the eight groups of a block of q4_k or q5_k. */
static inline void group_lines(const uint8_t *raw, float slope[8], float base[8]) {
    const float d = half_at(raw), dmin = half_at(raw + 2);
    uint32_t word[3], scale[2], min[2];
    memcpy(word, raw + 4, sizeof word);
    scale[0] = word[0] & 0x3f3f3f3f;
    min[0] = word[1] & 0x3f3f3f3f;
    scale[1] = (word[2] & 0x0f0f0f0f) | (word[0] >> 6 & 0x03030303) << 4;
    min[1] = (word[2] >> 4 & 0x0f0f0f0f) | (word[1] >> 6 & 0x03030303) << 4;
    uint8_t scales[16], mins[16]; /* vectors may be longer than eight */
    memcpy(scales, scale, 8);
    memcpy(mins, min, 8);
    for (int g = 0; g < 8; g++) slope[g] = d * (float)scales[g], base[g] = dmin * (float)mins[g];
}

static void decode_q4_k_blocks(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    const uint8_t *raw = w->raw + first * 144;
    for (; n > 0; n--, raw += 144, y += 256) {
        float slope[8], base[8];
        group_lines(raw, slope, base);
        for (int g = 0; g < 8; g += 2)
            for (int64_t i = 0; i < 32; i += VL) {
                const vi q = vi_load_u8(raw + 16 + g * 16 + i);
                const vf low = v_from_int(vi_and(q, vi_set(15))), high = v_from_int(vi_shr(q, 4));
                v_store(y + g * 32 + i, v_sub(v_mul(v_set(slope[g]), low), v_set(base[g])));
                v_store(y + g * 32 + 32 + i, v_sub(v_mul(v_set(slope[g + 1]), high), v_set(base[g + 1])));
            }
    }
}

/* The fifth bits of group g are bits g of 32 bytes. */
static void decode_q5_k_blocks(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    const uint8_t *raw = w->raw + first * 176;
    for (; n > 0; n--, raw += 176, y += 256) {
        float slope[8], base[8];
        group_lines(raw, slope, base);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++)
            for (int64_t i = 0; i < 32; i += VL) {
                const vi q = vi_load_u8(raw + 48 + g / 2 * 32 + i), fifth = vi_load_u8(raw + 16 + i);
                const vi nibble = vi_and(g % 2 ? vi_shr(q, 4) : q, vi_set(15));
                const vi code = vi_or(nibble, vi_and(vi_shr(vi_shl(fifth, 4), g), vi_set(16)));
                v_store(y + g * 32 + i, v_sub(v_mul(v_set(slope[g]), v_from_int(code)), v_set(base[g])));
            }
    }
}

static void decode_q6_k_blocks(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    const uint8_t *raw = w->raw + first * 210;
    for (; n > 0; n--, raw += 210, y += 256) {
        const float d = half_at(raw + 208);
        const int8_t *scales = (const int8_t *)(raw + 192);
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++)
            for (int64_t i = 0; i < 32; i += VL) {
                const vi low = vi_load_u8(raw + part / 4 * 64 + part % 2 * 32 + i);
                const vi high = vi_load_u8(raw + 128 + part / 4 * 32 + i);
                const vi nibble = vi_and(part / 2 % 2 ? vi_shr(low, 4) : low, vi_set(15));
                const vi code = vi_or(nibble, vi_and(vi_shr(vi_shl(high, 4), part % 4 * 2), vi_set(48)));
                const vf slope = v_set(d * (float)scales[part * 2 + i / 16]);
                v_store(y + part * 32 + i, v_mul(slope, v_from_int(vi_sub(code, vi_set(32)))));
            }
    }
}

typedef void (*decode_fn)(const struct en_blocks *w, int64_t first, int64_t n, float *y);
static const decode_fn decode_f32[EN_QTYPE_COUNT] = {
    [EN_Q4_0] = decode_q4_0_blocks, [EN_Q8_0] = decode_q8_0_blocks, [EN_Q4_K] = decode_q4_k_blocks,
    [EN_Q5_K] = decode_q5_k_blocks, [EN_Q6_K] = decode_q6_k_blocks, [EN_NF4] = decode_nf4,
    [EN_NF4_F32] = decode_nf4,      [EN_FP4] = decode_fp4,          [EN_FP4_F32] = decode_fp4,
};

/* n blocks from `first` on as f32. */
static void decode_floats(const struct en_blocks *w, int64_t first, int64_t n, float *y) {
    if (decode_f32[w->type]) {
        decode_f32[w->type](w, first, n, y);
        return;
    }
    for (int64_t b = 0; b < n; b++) en_codecs[w->type].decode(w->raw + (first + b) * w->bytes, y + b * w->values);
}

#ifdef EN_BF16_DOT
#include "decode_bf16.h"
#endif

/* n blocks from `first` on as f32, or as bf16. */
static void decode_blocks(const int pairs, const struct en_blocks *w, int64_t first, int64_t n, void *y) {
#ifdef EN_BF16_DOT
    if (pairs) {
        decode_halves(w, first, n, y);
        return;
    }
#endif
    (void)pairs;
    decode_floats(w, first, n, y);
}

#endif

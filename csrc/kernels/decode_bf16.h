/* Blocks of quantized numbers to bf16, where there are AVX-512's words of 16 bits: kernels/decode.h says what.
 *
 * Types of 4 or 5 bits take a table of a block's or group's 16 or 32 values in bf16 and look codes up in it, 32 with one
 * instruction (vpermw); where scales change every 16 values a table isn't worth it. Rounding takes denormals to 0. */
#ifndef EN_DECODE_BF16_H
#define EN_DECODE_BF16_H

typedef __m512i vh; /* 32 numbers of 16 bits */

WORD void store_halves(uint16_t *y, vh a) { _mm512_storeu_si512(y, a); }

WORD float half_of(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

/* 16 values as a table of bf16, twice: bit 4 of an index doesn't count. */
WORD vh table_of(vf values) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(values);
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}
WORD vf counting(void) { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

/* Codes of 16 bytes, two each, the high half before the low one; bits above the low four mean nothing, but bit 4. */
WORD vh codes_in_order(const uint8_t *p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
}

WORD void decode_codes_bf16(const float levels[16], const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const vf level = v_load(levels);
    for (int64_t b = first; b < first + n; b++, y += 64) {
        const vh table = table_of(v_mul(level, v_set(absmax_of(w, b))));
        const uint8_t *codes = w->raw + b * 32;
        store_halves(y, _mm512_permutexvar_epi16(codes_in_order(codes), table));
        store_halves(y + 32, _mm512_permutexvar_epi16(codes_in_order(codes + 16), table));
    }
}
static void decode_nf4_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    decode_codes_bf16(en_nf4_levels, w, first, n, y);
}
static void decode_fp4_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    decode_codes_bf16(en_fp4_levels, w, first, n, y);
}

static void decode_q4_0_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const uint8_t *raw = w->raw + first * 18;
    const vf level = v_sub(counting(), v_set(8));
    for (; n > 0; n--, raw += 18, y += 32) {
        const vh table = table_of(v_mul(level, v_set(half_of(raw))));
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(raw + 2)));
        const vh codes = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
        store_halves(y, _mm512_permutexvar_epi16(codes, table));
    }
}

static void decode_q8_0_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const uint8_t *raw = w->raw + first * 34;
    for (; n > 0; n--, raw += 34, y += 32) {
        const vf d = v_set(half_of(raw));
        const vf low = v_from_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(raw + 2))));
        const vf high = v_from_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(raw + 18))));
        store_halves(y, v_pack_bf16(v_mul(low, d), v_mul(high, d)));
    }
}

WORD void store_lines(float y[8], float d, uint64_t bytes) {
    const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes)));
    _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_set1_ps(d), values));
}

/* The slopes and bases of the eight groups of a block of q4_k or q5_k, as group_lines has them. */
WORD void quick_lines(const uint8_t *raw, float slope[8], float base[8]) {
    const uint64_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
    uint32_t word[3];
    memcpy(word, raw + 4, sizeof word);
    store_lines(slope, half_of(raw), (word[0] & six) | ((word[2] & four) | (word[0] >> 6 & two) << 4) << 32);
    store_lines(base, half_of(raw + 2), (word[1] & six) | ((word[2] >> 4 & four) | (word[1] >> 6 & two) << 4) << 32);
}

static void decode_q4_k_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const uint8_t *raw = w->raw + first * 144;
    for (; n > 0; n--, raw += 144, y += 256) {
        float slope[8], base[8];
        quick_lines(raw, slope, base);
#pragma GCC unroll 4
        for (int g = 0; g < 8; g += 2) {
            const vh bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(raw + 16 + g * 16)));
            const vh low = table_of(v_sub(v_mul(v_set(slope[g]), counting()), v_set(base[g])));
            const vh high = table_of(v_sub(v_mul(v_set(slope[g + 1]), counting()), v_set(base[g + 1])));
            store_halves(y + g * 32, _mm512_permutexvar_epi16(bytes, low));
            store_halves(y + g * 32 + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), high));
        }
    }
}

/* 32 values of a group fill the table. */
static void decode_q5_k_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const uint8_t *raw = w->raw + first * 176;
    const vf upper = v_add(counting(), v_set(16));
    for (; n > 0; n--, raw += 176, y += 256) {
        float slope[8], base[8];
        quick_lines(raw, slope, base);
        const vh fifth = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(raw + 16))), 4);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
            const vf s = v_set(slope[g]), b = v_set(base[g]);
            const vh table = v_pack_bf16(v_sub(v_mul(s, counting()), b), v_sub(v_mul(s, upper), b));
            const vh bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(raw + 48 + g / 2 * 32)));
            const vh low = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi16(15));
            const vh high = _mm512_and_si512(_mm512_srli_epi16(fifth, g), _mm512_set1_epi16(16));
            store_halves(y + g * 32, _mm512_permutexvar_epi16(_mm512_or_si512(low, high), table));
        }
    }
}

static void decode_q6_k_bf16(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const uint8_t *raw = w->raw + first * 210;
    for (; n > 0; n--, raw += 210, y += 256) {
        const vf d = v_set(half_of(raw + 208));
        float slope[16];
        v_store(slope, v_mul(d, v_from_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(raw + 192))))));
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {
            const __m256i low = _mm256_loadu_si256((const __m256i *)(raw + part / 4 * 64 + part % 2 * 32));
            const __m256i high = _mm256_loadu_si256((const __m256i *)(raw + 128 + part / 4 * 32));
            const __m256i nibble = _mm256_and_si256(part / 2 % 2 ? _mm256_srli_epi16(low, 4) : low,
                                                    _mm256_set1_epi8(15));
            const int by = part % 4 * 2; /* to bits 4 and 5 of each byte */
            const __m256i moved = by < 4 ? _mm256_slli_epi16(high, 4 - by) : _mm256_srli_epi16(high, by - 4);
            const __m256i code = _mm256_sub_epi8(
                _mm256_or_si256(nibble, _mm256_and_si256(moved, _mm256_set1_epi8(48))), _mm256_set1_epi8(32));
            const vf first16 = v_from_int(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(code)));
            const vf last16 = v_from_int(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(code, 1)));
            store_halves(y + part * 32, v_pack_bf16(v_mul(v_set(slope[part * 2]), first16),
                                                    v_mul(v_set(slope[part * 2 + 1]), last16)));
        }
    }
}

static void (*const decode_bf16[EN_QTYPE_COUNT])(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) = {
    [EN_Q4_0] = decode_q4_0_bf16, [EN_Q8_0] = decode_q8_0_bf16, [EN_Q4_K] = decode_q4_k_bf16,
    [EN_Q5_K] = decode_q5_k_bf16, [EN_Q6_K] = decode_q6_k_bf16, [EN_NF4] = decode_nf4_bf16,
    [EN_NF4_F32] = decode_nf4_bf16, [EN_FP4] = decode_fp4_bf16, [EN_FP4_F32] = decode_fp4_bf16,
};

/* n blocks from `first` on as bf16. */
static void decode_halves(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    if (decode_bf16[w->type]) {
        decode_bf16[w->type](w, first, n, y);
        return;
    }
    for (int64_t b = first; b < first + n; b++, y += w->values) {
        _Alignas(64) float block[EN_MAX_BLOCK];
        decode_floats(w, b, 1, block);
        for (int64_t i = 0; i < w->values; i += 2 * VL)
            store_halves(y + i, v_pack_bf16(v_load(block + i), v_load(block + i + VL)));
    }
}

#endif

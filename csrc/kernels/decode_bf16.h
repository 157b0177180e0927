/* Blocks of quantized numbers to bf16, where there are AVX-512's words of 16 bits: kernels/decode.h says what.
 *
 * A type is two functions: what its blocks have in common, a head, and 64 values of a block by its head. Types of 4 or
 * 5 bits make tables of 16 or 32 values in bf16 and look codes up in them, 32 with one instruction (vpermw); where
 * scales change every 16 values a table isn't worth it. Rounding takes denormals to 0. Values go to lines of an array, or
 * straight into panels of kernels/pack.h, along the lines or across them. */
#ifndef EN_DECODE_BF16_H
#define EN_DECODE_BF16_H

typedef __m512i vh; /* 32 numbers of 16 bits */

WORD void store_halves(uint16_t *y, vh a) { _mm512_storeu_si512(y, a); }

struct head {
    float slope[16];
    union {
        struct {
            float base[16];
            vh table; /* or the fifth bits of codes */
        };
        int8_t code[256];
    };
};

/* 16 values as a table of bf16, twice: bit 4 of an index doesn't count. */
WORD vh table_of(vf values) { return v_pack_bf16(values, values); }
WORD vf counting(void) { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
WORD vh look_up(vh table, vh codes) { return _mm512_permutexvar_epi16(codes, table); }
WORD vh bytes_at(const uint8_t *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
WORD vf floats_at(const uint8_t *p) { return v_from_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }

/* Codes of 16 bytes, two each, the high half before the low one; bits above the low four mean nothing. */
WORD vh codes_in_order(const uint8_t *p) {
    const vh twice = _mm512_setr_epi64(
        0x0001000100000000, 0x0003000300020002, 0x0005000500040004, 0x0007000700060006, 0x0009000900080008,
        0x000b000b000a000a, 0x000d000d000c000c, 0x000f000f000e000e);
    const vh bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, twice), _mm512_set1_epi32(0x00000004));
}

WORD void nf4_head(const struct en_blocks *w, int64_t block, struct head *h) {
    h->table = table_of(v_mul(v_load(en_nf4_levels), v_set(absmax_of(w, block))));
}
WORD void fp4_head(const struct en_blocks *w, int64_t block, struct head *h) {
    h->table = table_of(v_mul(v_load(en_fp4_levels), v_set(absmax_of(w, block))));
}
WORD void nf4_part(const uint8_t *raw, const struct head *h, int i, vh *low, vh *high) {
    (void)i;
    *low = look_up(h->table, codes_in_order(raw));
    *high = look_up(h->table, codes_in_order(raw + 16));
}
#define fp4_part nf4_part

/* Blocks of 32 are taken by two and need no heads. */
WORD void no_head(const struct en_blocks *w, int64_t block, struct head *h) { (void)w, (void)block, (void)h; }

/* 16 bytes' low nibbles, then their high ones; of 4 bits a code, above which bits mean nothing. */
WORD vh low_then_high(const uint8_t *p) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    return _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
}
/* The same with a fifth bit each, 32 of them at `fifths`. */
WORD vh five_bits(const uint8_t *p, const uint8_t *fifths) {
    uint32_t set;
    memcpy(&set, fifths, sizeof set);
    const vh low = _mm512_and_si512(low_then_high(p), _mm512_set1_epi16(15));
    return _mm512_mask_add_epi16(low, set, low, _mm512_set1_epi16(16));
}
WORD vf above(vf codes) { return v_add(codes, v_set(16)); }
WORD vf line(vf codes, const uint8_t *d, const uint8_t *m) {
    return v_add(v_mul(codes, v_set(half_at(d))), v_set(half_at(m)));
}

WORD vh q4_0_block(const uint8_t *raw) {
    return look_up(table_of(v_mul(v_sub(counting(), v_set(8)), v_set(half_at(raw)))), low_then_high(raw + 2));
}
WORD vh q4_1_block(const uint8_t *raw) {
    return look_up(table_of(line(counting(), raw, raw + 2)), low_then_high(raw + 4));
}
WORD vh q5_0_block(const uint8_t *raw) {
    const vf d = v_set(half_at(raw));
    const vh table = v_pack_bf16(v_mul(v_sub(counting(), v_set(16)), d), v_mul(counting(), d));
    return look_up(table, five_bits(raw + 6, raw + 2));
}
WORD vh q5_1_block(const uint8_t *raw) {
    const vh table = v_pack_bf16(line(counting(), raw, raw + 2), line(above(counting()), raw, raw + 2));
    return look_up(table, five_bits(raw + 8, raw + 4));
}
WORD vh q8_0_block(const uint8_t *raw) {
    const vf d = v_set(half_at(raw));
    return v_pack_bf16(v_mul(floats_at(raw + 2), d), v_mul(floats_at(raw + 18), d));
}
WORD vh iq4_nl_block(const uint8_t *raw) {
    const vf levels = floats_at((const uint8_t *)en_iq4_levels);
    return look_up(table_of(v_mul(v_set(half_at(raw)), levels)), low_then_high(raw + 2));
}
#define OF_32(name, bytes)                                                                          \
    WORD void name##_part(const uint8_t *raw, const struct head *h, int i, vh *low, vh *high) {     \
        (void)h, (void)i;                                                                           \
        *low = name##_block(raw);                                                                   \
        *high = name##_block(raw + (bytes));                                                        \
    }
OF_32(q4_0, 18)
OF_32(q4_1, 20)
OF_32(q5_0, 22)
OF_32(q5_1, 24)
OF_32(q8_0, 34)
OF_32(iq4_nl, 18)
#undef OF_32

/* d times eight bytes */
WORD void eight_times(float y[8], float d, uint64_t bytes) {
    const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes)));
    _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_set1_ps(d), values));
}

/* The slopes and bases of eight groups, as group_lines has them. */
WORD void q4_k_head(const struct en_blocks *w, int64_t block, struct head *h) {
    const uint64_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
    const uint8_t *raw = w->raw + block * w->bytes;
    uint32_t word[3];
    memcpy(word, raw + 4, sizeof word);
    eight_times(h->slope, half_at(raw), (word[0] & six) | ((word[2] & four) | (word[0] >> 6 & two) << 4) << 32);
    eight_times(h->base, half_at(raw + 2), (word[1] & six) | ((word[2] >> 4 & four) | (word[1] >> 6 & two) << 4) << 32);
}
/* Two groups' tables are one of 32 values. */
WORD void q4_k_part(const uint8_t *raw, const struct head *h, int i, vh *low, vh *high) {
    const vh bytes = bytes_at(raw + 16 + i * 32);
    const vh table = v_pack_bf16(v_sub(v_mul(v_set(h->slope[2 * i]), counting()), v_set(h->base[2 * i])),
                                 v_sub(v_mul(v_set(h->slope[2 * i + 1]), counting()), v_set(h->base[2 * i + 1])));
    *low = look_up(table, _mm512_and_si512(bytes, _mm512_set1_epi16(15)));
    *high = look_up(table, _mm512_or_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi16(16)));
}

WORD void q5_k_head(const struct en_blocks *w, int64_t block, struct head *h) {
    q4_k_head(w, block, h);
    h->table = _mm512_slli_epi16(bytes_at(w->raw + block * w->bytes + 16), 4);
}
/* 32 values of a group fill the table; codes are their low bits and, from bits 4 of `fifths`, the fifth. */
WORD vh q5_k_group(const struct head *h, int g, vh low_bits, vh fifths) {
    const vf s = v_set(h->slope[g]), b = v_set(h->base[g]);
    const vh table = v_pack_bf16(v_sub(v_mul(s, counting()), b), v_sub(v_mul(s, above(counting())), b));
    return look_up(table, _mm512_ternarylogic_epi64(_mm512_set1_epi16(15), low_bits, fifths, 0xca));
}
WORD void q5_k_part(const uint8_t *raw, const struct head *h, int i, vh *low, vh *high) {
    const vh bytes = bytes_at(raw + 48 + i * 32);
    const vh fifths = _mm512_srlv_epi16(h->table, _mm512_set1_epi16((short)(2 * i)));
    *low = q5_k_group(h, 2 * i, bytes, fifths);
    *high = q5_k_group(h, 2 * i + 1, _mm512_srli_epi16(bytes, 4), _mm512_srli_epi16(fifths, 1));
}

/* Codes are nibbles of 64 bytes, and above them pairs of bits of 32 bytes, those of the last 32 values higher by 2. All
 * are bytes here first, as q8_0 has them: taken apart in registers they take half as long again. */
WORD void q6_k_codes(int8_t code[64], vh nibbles, vh pairs) {
    const vh low = _mm512_set1_epi8(15), high = _mm512_and_si512(pairs, _mm512_set1_epi8(48));
    _mm512_storeu_si512(code, _mm512_sub_epi8(_mm512_ternarylogic_epi64(low, nibbles, high, 0xea), _mm512_set1_epi8(32)));
}
WORD void q6_k_head(const struct en_blocks *w, int64_t block, struct head *h) {
    const uint8_t *raw = w->raw + block * w->bytes;
    v_store(h->slope, v_mul(v_set(half_at(raw + 208)), floats_at(raw + 192)));
    const vh up = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
    const vh down = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const vh nibbles = _mm512_loadu_si512(raw + i * 64);
        const vh pairs = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(raw + 128 + i * 32)));
        q6_k_codes(h->code + i * 128, nibbles, _mm512_sllv_epi16(pairs, up));
        q6_k_codes(h->code + i * 128 + 64, _mm512_srli_epi16(nibbles, 4), _mm512_srlv_epi16(pairs, down));
    }
}
WORD vh q6_k_half(const struct head *h, int i) {
    const uint8_t *code = (const uint8_t *)h->code + i * 32;
    return v_pack_bf16(v_mul(v_set(h->slope[2 * i]), floats_at(code)),
                       v_mul(v_set(h->slope[2 * i + 1]), floats_at(code + 16)));
}
WORD void q6_k_part(const uint8_t *raw, const struct head *h, int i, vh *low, vh *high) {
    (void)raw;
    *low = q6_k_half(h, 2 * i);
    *high = q6_k_half(h, 2 * i + 1);
}

/* Lines of n blocks each, `step` blocks from one to the next. */
struct decoding {
    const struct en_blocks *w;
    int64_t first, n, lines, step;
};

/* PARTS values at a time: of a block, or of two of 32 values. */
enum { PARTS = 64 };
_Static_assert((int)PARTS / 2 == (int)NR, "half a part fills a panel");
typedef void (*head_fn)(const struct en_blocks *w, int64_t block, struct head *h);
typedef void (*part_fn)(const uint8_t *raw, const struct head *h, int i, vh *low, vh *high);

/* The lines to y, y_step numbers from one to the next. */
WORD void decode_to_lines(head_fn head, part_fn part, const int values, const struct decoding *d, uint16_t *restrict y,
                          int64_t y_step) {
    const int blocks = values < PARTS ? PARTS / values : 1, parts = values < PARTS ? 1 : values / PARTS;
    for (int64_t line = 0; line < d->lines; line++) {
        uint16_t *restrict to = y + line * y_step;
        for (int64_t b = 0; b < d->n; b += blocks) {
            const int64_t block = d->first + line * d->step + b;
            const uint8_t *raw = d->w->raw + block * d->w->bytes;
            struct head h;
            head(d->w, block, &h);
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++, to += PARTS) {
                vh low, high;
                part(raw, &h, i, &low, &high);
                store_halves(to, low);
                store_halves(to + PARTS / 2, high);
            }
        }
    }
}

/* Two by two, lines are pairs of k: to panels of NR columns that the lines run across, `panel` words from one to the
 * next. */
WORD void decode_across(head_fn head, part_fn part, const int values, const struct decoding *d, float *restrict y,
                        int64_t panel) {
    const int blocks = values < PARTS ? PARTS / values : 1, parts = values < PARTS ? 1 : values / PARTS;
    for (int64_t first = 0; first < d->lines; first += VL, y += VL / 2 * NR) {
        const int64_t lines = d->lines - first < VL ? d->lines - first : VL;
        for (int64_t b = 0; b < d->n; b += blocks) {
            const int64_t block = d->first + first * d->step + b, values_before = b * values;
            struct head h[VL];
            for (int64_t line = 0; line < lines; line++) head(d->w, block + line * d->step, &h[line]);
            for (int i = 0; i < parts; i++) {
                float *restrict to = y + (values_before + i * PARTS) / NR * panel;
                for (int64_t line = 0; line < lines; line += 2, to += NR) {
                    const uint8_t *raw = d->w->raw + (block + line * d->step) * d->w->bytes;
                    vh even[2], odd[2];
                    part(raw, &h[line], i, &even[0], &even[1]);
                    part(raw + d->step * d->w->bytes, &h[line + 1], i, &odd[0], &odd[1]);
#pragma GCC unroll 2
                    for (int x = 0; x < 2; x++) {
                        float *at = to + x * (PARTS / 2) / NR * panel;
                        v_store(at, v_from_bits(v_zip_low(even[x], odd[x])));
                        v_store(at + VL, v_from_bits(v_zip_high(even[x], odd[x])));
                    }
                }
            }
        }
    }
}

/* VL lines as columns of a panel, whose steps they run along. */
WORD void decode_along(head_fn head, part_fn part, const int values, const struct decoding *d, float *restrict y) {
    const int blocks = values < PARTS ? PARTS / values : 1, parts = values < PARTS ? 1 : values / PARTS;
    for (int64_t b = 0; b < d->n; b += blocks) {
        struct head h[VL];
        for (int line = 0; line < VL; line++) head(d->w, d->first + line * d->step + b, &h[line]);
        for (int i = 0; i < parts; i++) {
            vf low[VL], high[VL];
#pragma GCC unroll 16
            for (int line = 0; line < VL; line++) {
                vh l, u;
                part(d->w->raw + (d->first + line * d->step + b) * d->w->bytes, &h[line], i, &l, &u);
                low[line] = v_from_bits(l), high[line] = v_from_bits(u);
            }
            v_transpose(low);
            v_transpose(high);
#pragma GCC unroll 16
            for (int s = 0; s < VL; s++) v_store(y + s * NR, low[s]), v_store(y + (VL + s) * NR, high[s]);
            y += 2 * VL * NR;
        }
    }
}

/* DOT_N lines' dot products with m vectors of words, x_row apart: to sums (m, DOT_N). Every one is added up by VL words
 * at a time, as skinny.h's dot_tile does it. */
WORD void decode_dots_of(head_fn head, part_fn part, const int values, const int m, const struct decoding *d,
                         const float *x, int64_t x_row, float *sums) {
    const int blocks = values < PARTS ? PARTS / values : 1, parts = values < PARTS ? 1 : values / PARTS;
    vf acc[DOT_M][DOT_N];
#pragma GCC unroll 4
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int line = 0; line < DOT_N; line++) acc[r][line] = v_zero();
    for (int64_t b = 0; b < d->n; b += blocks) {
        struct head h[DOT_N];
        for (int line = 0; line < DOT_N; line++) head(d->w, d->first + line * d->step + b, &h[line]);
        for (int i = 0; i < parts; i++, x += 2 * VL) {
#pragma GCC unroll 4
            for (int line = 0; line < DOT_N; line++) {
                vh low, high;
                part(d->w->raw + (d->first + line * d->step + b) * d->w->bytes, &h[line], i, &low, &high);
#pragma GCC unroll 4
                for (int r = 0; r < m; r++)
                    acc[r][line] = v_dot_bf16(v_bits(v_load(x + r * x_row)), low, acc[r][line]);
#pragma GCC unroll 4
                for (int r = 0; r < m; r++)
                    acc[r][line] = v_dot_bf16(v_bits(v_load(x + r * x_row + VL)), high, acc[r][line]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int line = 0; line < DOT_N; line++) sums[r * DOT_N + line] = v_hsum(acc[r][line]);
}

WORD void decode_dots(head_fn head, part_fn part, const int values, int64_t m, const struct decoding *d, const float *x,
                      int64_t x_row, float *sums) {
    switch (m) {
    case 1: decode_dots_of(head, part, values, 1, d, x, x_row, sums); break;
    case 2: decode_dots_of(head, part, values, 2, d, x, x_row, sums); break;
    case 3: decode_dots_of(head, part, values, 3, d, x, x_row, sums); break;
    default: decode_dots_of(head, part, values, 4, d, x, x_row, sums); break;
    }
}

struct decoder {
    void (*to_lines)(const struct decoding *d, uint16_t *y, int64_t y_step);
    void (*across)(const struct decoding *d, float *y, int64_t panel);
    void (*along)(const struct decoding *d, float *y);
    void (*dots)(int64_t m, const struct decoding *d, const float *x, int64_t x_row, float *sums);
};

#define DECODER(name, head, values)                                                                                   \
    static void name##_to_lines(const struct decoding *d, uint16_t *y, int64_t y_step) {                              \
        decode_to_lines(head, name##_part, values, d, y, y_step);                                                     \
    }                                                                                                                 \
    static void name##_across(const struct decoding *d, float *y, int64_t panel) {                                    \
        decode_across(head, name##_part, values, d, y, panel);                                                        \
    }                                                                                                                 \
    static void name##_along(const struct decoding *d, float *y) {                                                    \
        decode_along(head, name##_part, values, d, y);                                                                \
    }                                                                                                                 \
    static void name##_dots(int64_t m, const struct decoding *d, const float *x, int64_t x_row, float *sums) {        \
        decode_dots(head, name##_part, values, m, d, x, x_row, sums);                                                 \
    }
DECODER(q4_0, no_head, 32)
DECODER(q4_1, no_head, 32)
DECODER(q5_0, no_head, 32)
DECODER(q5_1, no_head, 32)
DECODER(q8_0, no_head, 32)
DECODER(iq4_nl, no_head, 32)
DECODER(q4_k, q4_k_head, 256)
DECODER(q5_k, q5_k_head, 256)
DECODER(q6_k, q6_k_head, 256)
DECODER(nf4, nf4_head, 64)
DECODER(fp4, fp4_head, 64)
#undef DECODER
#define DECODER(name) {name##_to_lines, name##_across, name##_along, name##_dots}
static const struct decoder decoders[EN_QTYPE_COUNT] = {
    [EN_Q4_0] = DECODER(q4_0), [EN_Q4_1] = DECODER(q4_1), [EN_Q5_0] = DECODER(q5_0), [EN_Q5_1] = DECODER(q5_1),
    [EN_Q8_0] = DECODER(q8_0), [EN_Q4_K] = DECODER(q4_k), [EN_Q5_K] = DECODER(q5_k), [EN_Q6_K] = DECODER(q6_k),
    [EN_IQ4_NL] = DECODER(iq4_nl), [EN_NF4] = DECODER(nf4), [EN_NF4_F32] = DECODER(nf4), [EN_FP4] = DECODER(fp4),
    [EN_FP4_F32] = DECODER(fp4),
};
#undef DECODER

/* n blocks from `first` on as bf16, of any type. */
static void decode_halves(const struct en_blocks *w, int64_t first, int64_t n, uint16_t *y) {
    const struct decoder *decoder = &decoders[w->type];
    if (decoder->to_lines) {
        const int64_t whole = n * w->values / PARTS * PARTS / w->values;
        const struct decoding d = {w, first, whole, 1, 0};
        decoder->to_lines(&d, y, 0);
        first += whole, n -= whole, y += whole * w->values;
    }
    for (int64_t b = first; b < first + n; b++, y += w->values) {
        _Alignas(64) float block[EN_MAX_BLOCK];
        decode_floats(w, b, 1, block);
        for (int64_t i = 0; i < w->values; i += 2 * VL)
            store_halves(y + i, v_pack_bf16(v_load(block + i), v_load(block + i + VL)));
    }
}

#endif

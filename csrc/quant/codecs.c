/* The storage types in one table, and what is done over whole arrays: reading any elements, gathering rows, encoding.
 * Everything is cut by elements or blocks, so no bit depends on the number of threads. */
#include "codec.h"

#include <stdatomic.h>

#define BOTH(name) en_decode_##name, en_encode_##name
#define READ(name) en_decode_##name, NULL

const struct en_codec en_codecs[EN_QTYPE_COUNT] = {
    [EN_Q4_0] = {"q4_0", 32, 18, BOTH(q4_0), 0, 1, NULL, 0},
    [EN_Q4_1] = {"q4_1", 32, 20, BOTH(q4_1), 0, 2, NULL, 0},
    [EN_Q5_0] = {"q5_0", 32, 22, BOTH(q5_0), 0, 1, NULL, 0},
    [EN_Q5_1] = {"q5_1", 32, 24, BOTH(q5_1), 0, 2, NULL, 0},
    [EN_Q8_0] = {"q8_0", 32, 34, BOTH(q8_0), 0, 1, NULL, 0},
    [EN_Q2_K] = {"q2_k", 256, 84, BOTH(q2_k), 80, 2, NULL, 0},
    [EN_Q3_K] = {"q3_k", 256, 110, BOTH(q3_k), 108, 1, NULL, 0},
    [EN_Q4_K] = {"q4_k", 256, 144, BOTH(q4_k), 0, 2, NULL, 0},
    [EN_Q5_K] = {"q5_k", 256, 176, BOTH(q5_k), 0, 2, NULL, 0},
    [EN_Q6_K] = {"q6_k", 256, 210, BOTH(q6_k), 208, 1, NULL, 0},
    [EN_IQ2_XXS] = {"iq2_xxs", 256, 66, READ(iq2_xxs), 0, 0, NULL, 0},
    [EN_IQ2_XS] = {"iq2_xs", 256, 74, READ(iq2_xs), 0, 0, NULL, 0},
    [EN_IQ3_XXS] = {"iq3_xxs", 256, 98, READ(iq3_xxs), 0, 0, NULL, 0},
    [EN_IQ1_S] = {"iq1_s", 256, 50, READ(iq1_s), 0, 0, NULL, 0},
    [EN_IQ4_NL] = {"iq4_nl", 32, 18, BOTH(iq4_nl), 0, 1, NULL, 0},
    [EN_IQ3_S] = {"iq3_s", 256, 110, READ(iq3_s), 0, 0, NULL, 0},
    [EN_IQ2_S] = {"iq2_s", 256, 82, READ(iq2_s), 0, 0, NULL, 0},
    [EN_IQ4_XS] = {"iq4_xs", 256, 136, BOTH(iq4_xs), 0, 1, NULL, 0},
    [EN_IQ1_M] = {"iq1_m", 256, 56, READ(iq1_m), 0, 0, NULL, 0},
    [EN_TQ1_0] = {"tq1_0", 256, 54, READ(tq1_0), 0, 0, NULL, 0},
    [EN_TQ2_0] = {"tq2_0", 256, 66, READ(tq2_0), 0, 0, NULL, 0},
    [EN_MXFP4] = {"mxfp4", 32, 17, READ(mxfp4), 0, 0, NULL, 0},
    [EN_NF4] = {"nf4", 64, 32, NULL, NULL, 0, 0, en_nf4_levels, 1},
    [EN_NF4_F32] = {"nf4-f32", 64, 36, NULL, NULL, 0, 0, en_nf4_levels, 0},
    [EN_FP4] = {"fp4", 64, 32, NULL, NULL, 0, 0, en_fp4_levels, 1},
    [EN_FP4_F32] = {"fp4-f32", 64, 36, NULL, NULL, 0, 0, en_fp4_levels, 0},
};

enum { PIECE = 4096 }; /* elements a task reads at once */

int64_t en_packed_bytes(enum en_qtype type, int64_t n, int64_t block) {
    const struct en_codec *codec = &en_codecs[type];
    if (codec->levels) return en_flat_layout(n, block, codec->nested).bytes;
    return n % codec->values ? -1 : n / codec->values * codec->bytes;
}

void en_packed_read(const struct en_packed *w, int64_t begin, int64_t end, float *y) {
    const struct en_codec *codec = &en_codecs[w->type];
    if (codec->levels) {
        struct en_flat at = en_flat_layout(w->n, w->block, codec->nested);
        en_flat_decode(&at, codec->levels, w->raw, begin, end, y);
        return;
    }
    int64_t values = codec->values;
    for (int64_t i = begin; i < end;) {
        const uint8_t *raw = w->raw + i / values * codec->bytes;
        int64_t skip = i % values, take = values - skip < end - i ? values - skip : end - i;
        if (take == values) {
            codec->decode(raw, y + (i - begin));
        } else {
            float block[EN_MAX_BLOCK];
            codec->decode(raw, block);
            memcpy(y + (i - begin), block + skip, (size_t)take * sizeof *y);
        }
        i += take;
    }
}

static void narrow(enum en_dtype type, int64_t n, const float *x, uint16_t *y) {
    for (int64_t i = 0; i < n; i++) y[i] = type == EN_F16 ? half_of_float(x[i]) : bf16_of_float(x[i]);
}

struct gather {
    const struct en_packed *w;
    int64_t width, pieces; /* pieces a row */
    const int64_t *ids;
    enum en_dtype type;
    void *y;
};

static void gather_pieces(void *context, int64_t first, int64_t last) {
    const struct gather *p = context;
    float x[PIECE];
    for (int64_t piece = first; piece < last; piece++) {
        int64_t row = piece / p->pieces, begin = piece % p->pieces * PIECE;
        int64_t n = p->width - begin < PIECE ? p->width - begin : PIECE;
        int64_t from = (p->ids ? p->ids[row] : row) * p->width + begin, to = row * p->width + begin;
        float *y = p->type == EN_F32 ? (float *)p->y + to : x;
        en_packed_read(p->w, from, from + n, y);
        if (p->type != EN_F32) narrow(p->type, n, x, (uint16_t *)p->y + to);
    }
}

en_status en_packed_rows(const struct en_packed *w, int64_t width, int64_t count, const int64_t *ids,
                         enum en_dtype type, void *y) {
    for (int64_t i = 0; ids && i < count; i++)
        if (ids[i] < 0 || ids[i] >= w->n / width) {
            en_set_bad_id(ids[i]);
            return EN_BAD_ID;
        }
    struct gather p = {w, width, (width + PIECE - 1) / PIECE, ids, type, y};
    en_parallel_for(count * p.pieces, width < PIECE ? PIECE / width : 1, gather_pieces, &p);
    return EN_OK;
}

int64_t en_source_read(const struct en_source *source, int64_t begin, int64_t most, float *x) {
    int64_t n = source->n - begin < most ? source->n - begin : most;
    const uint16_t *narrow = (const uint16_t *)source->x + begin;
    if (source->type == EN_F32) memcpy(x, (const float *)source->x + begin, (size_t)n * sizeof *x);
    for (int64_t i = 0; source->type != EN_F32 && i < n; i++)
        x[i] = source->type == EN_F16 ? float_of_half(narrow[i]) : float_of_bits((uint32_t)narrow[i] << 16);
    return n;
}

struct encoding {
    const struct en_codec *codec;
    const struct en_source *source;
    uint8_t *raw;
    _Atomic int64_t odd, large; /* the first element that is not finite; the first of a block too large for its type */
};

static void note(_Atomic int64_t *first, int64_t i) {
    int64_t seen = atomic_load(first);
    while (i < seen && !atomic_compare_exchange_weak(first, &seen, i)) {}
}

/* Beyond every type's range, and squares of such values would not be finite: fits would then fail unseen. */
static const float beyond = 1e9f;

static void look_for_odd(void *context, int64_t first, int64_t last) {
    struct encoding *p = context;
    float x[PIECE];
    for (int64_t piece = first; piece < last; piece++) {
        int64_t n = en_source_read(p->source, piece * PIECE, PIECE, x);
        for (int64_t i = 0; i < n; i++) {
            int64_t at = piece * PIECE + i;
            if (!isfinite(x[i])) note(&p->odd, at);
            if (fabsf(x[i]) > beyond && !p->codec->levels) note(&p->large, at - at % p->codec->values);
        }
    }
}

static void encode_blocks(void *context, int64_t first, int64_t last) {
    struct encoding *p = context;
    const struct en_codec *codec = p->codec;
    for (int64_t block = first; block < last; block++) {
        float x[EN_MAX_BLOCK];
        uint8_t *raw = p->raw + block * codec->bytes;
        en_source_read(p->source, block * codec->values, codec->values, x);
        codec->encode(x, raw);
        for (int i = 0; i < codec->halves; i++)
            if (!isfinite(half_at(raw + codec->halves_at + i * 2))) note(&p->large, block * codec->values);
    }
}

en_status en_quantize(enum en_qtype type, int64_t block, const struct en_source *source, uint8_t *raw) {
    const struct en_codec *codec = &en_codecs[type];
    struct encoding p = {.codec = codec, .source = source, .raw = raw, .odd = INT64_MAX, .large = INT64_MAX};
    en_parallel_for((source->n + PIECE - 1) / PIECE, 4, look_for_odd, &p);
    if (p.odd != INT64_MAX) {
        en_set_bad_id(p.odd);
        return EN_NOT_FINITE;
    }
    if (codec->levels) {
        struct en_flat at = en_flat_layout(source->n, block, codec->nested);
        return en_flat_encode(&at, codec->levels, source, raw);
    }
    en_parallel_for(source->n / codec->values, PIECE / codec->values, encode_blocks, &p);
    if (p.large == INT64_MAX) return EN_OK;
    en_set_bad_id(p.large);
    return EN_TOO_LARGE;
}

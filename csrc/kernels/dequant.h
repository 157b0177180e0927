/* ggml's blocks, whole arrays of them, to floats. */
#ifndef EN_DEQUANT_H
#define EN_DEQUANT_H

#include "convert.h"
#include "decode.h"
#include "strided.h"

struct dequantization {
    enum en_qtype qtype;
    enum en_dtype type;
    const uint8_t *raw;
    void *y;
};

static void dequantize_range(void *context, int64_t begin, int64_t end) {
    const struct dequantization *p = context;
    const struct en_codec *codec = &en_codecs[p->qtype];
    const struct en_blocks blocks = {.type = p->qtype, .values = codec->values, .bytes = codec->bytes, .raw = p->raw};
    const int64_t values = codec->values;
    for (int64_t i = begin; i < end; i++) {
        float block[EN_MAX_BLOCK];
        float *y = p->type == EN_F32 ? (float *)p->y + i * values : block;
        decode_floats(&blocks, i, 1, y);
        if (p->type != EN_F32) narrow_row(p->type, values, block, (uint16_t *)p->y + i * values);
    }
}

static en_status dequantize(enum en_qtype qtype, int64_t blocks, const uint8_t *raw, enum en_dtype type, void *y) {
    struct dequantization p = {qtype, type, raw, y};
    en_parallel_for(blocks, row_grain(GRAIN, en_codecs[qtype].values), dequantize_range, &p);
    return EN_OK;
}

#endif

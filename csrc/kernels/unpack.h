/* Packed operands: patches of quantized numbers become f32 or bf16 in a buffer that stays in L1, from where they are laid
 * out as panels like any others.
 *
 * A packed matrix is a row of blocks over its elements in order; rows may begin inside a block (NF4 and FP4). Every
 * value has the bits of its f32 decoding, rounded to bf16 once where that is wanted.
 */
#ifndef EN_UNPACK_H
#define EN_UNPACK_H

#include "decode.h"
#include "pack.h"

/* A patch: lines of up to a run of elements that lie side by side, which ends where a block does. A line of the buffer
 * has room for NR more, and isn't a power of two apart from the next. */
enum { PATCH_LINES = 32, PATCH_RUN = 256, PATCH_ROW = PATCH_RUN + 2 * 32 };
_Static_assert((int)PATCH_RUN % (int)EN_MAX_BLOCK == 0 && NV * VL <= PATCH_LINES, "whole blocks and panels");

/* Elements from the i-th on until the run's end. */
static inline int64_t patch_run(const struct operand *o, int64_t i) {
    return PATCH_RUN - (o->at + i) % o->packed->values;
}

static inline const char *stored_at(const struct en_blocks *w, int64_t at) {
    return (const char *)w->raw + at / w->values * w->bytes;
}

/* Bytes of n elements in a row. */
static inline int64_t bytes_of(const struct operand *o, int64_t n) {
    if (!o->packed) return n * type_size(o->type);
    return ceil_div(n * o->packed->bytes, o->packed->values);
}

/* Elements [at, at + n) as f32, or rounded to bf16. */
static void decode_run(const int pairs, const struct en_blocks *w, int64_t at, int64_t n, void *y) {
    const int64_t size = pairs ? 2 : 4, values = w->values;
    while (n > 0) {
        const int64_t block = at / values, skip = at % values, whole = skip ? 0 : n / values;
        int64_t done = whole * values;
        if (whole) {
            decode_blocks(pairs, w, block, whole, y);
        } else {
            _Alignas(64) float part[EN_MAX_BLOCK];
            decode_blocks(pairs, w, block, 1, part);
            done = min64(n, values - skip);
            memcpy(y, (const char *)part + skip * size, (size_t)(done * size));
        }
        at += done, n -= done, y = (char *)y + done * size;
    }
}

/* `rows` rows of k elements of a packed operand, in patch, as a plain one. */
static struct operand unpack(const int pairs, const struct operand *o, int64_t rows, int64_t k, float *patch) {
    const int along_k = o->k == 1;
    const int64_t lines = along_k ? rows : k, n = along_k ? k : rows, step = along_k ? o->row : o->k;
    const int64_t size = pairs ? 2 : 4;
    for (int64_t i = 0; i < lines; i++)
        decode_run(pairs, o->packed, o->at + i * step, n, (char *)patch + i * PATCH_ROW * size);
    return (struct operand){.type = pairs ? EN_BF16 : EN_F32,
                            .data = patch,
                            .row = along_k ? PATCH_ROW : 1,
                            .k = along_k ? 1 : PATCH_ROW};
}

/* `rows` rows of k elements straight into panels of NR columns, `panel` words from one to the next. False: the type has
 * no decoder for it, or the piece is not of whole blocks and panels. */
static int unpack_panels(const int pairs, const struct operand *o, int64_t rows, int64_t k, int64_t steps, float *y,
                         int64_t panel) {
#ifdef EN_BF16_DOT
    const struct en_blocks *w = o->packed;
    const struct decoder *decoder = &decoders[w->type];
    const int64_t unit = max64(w->values, PARTS), run = o->k == 1 ? k : rows, step = o->k == 1 ? o->row : o->k;
    if (!pairs || !decoder->along || 2 * steps != k || rows % NR || run % unit || o->at % w->values || step % w->values)
        return 0;
    struct decoding d = {w, o->at / w->values, run / w->values, k, step / w->values};
    if (o->k != 1) {
        decoder->across(&d, y, panel);
        return 1;
    }
    d.lines = VL;
    for (int64_t i = 0; i < rows; i += VL, d.first += VL * d.step)
        decoder->along(&d, y + i / NR * panel + i % NR);
    return 1;
#else
    (void)pairs, (void)o, (void)rows, (void)k, (void)steps, (void)y, (void)panel;
    return 0;
#endif
}

#endif

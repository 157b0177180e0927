/* The codecs without Python: blocks of exactly their size decoded by any ranges and rows, any floats encoded and read
 * again. What it finds is a sanitizer's report; built and run by `make fuzz`. */
#include "../csrc/entrenar.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static _Thread_local int64_t bad; /* csrc/dispatch.c has these, and needs every kernel */
void en_set_bad_id(int64_t id) { bad = id; }
int64_t en_bad_id(void) { return bad; }

static void *copy_of(const void *from, size_t bytes) {
    void *block = malloc(bytes ? bytes : 1);
    if (block == NULL) abort();
    if (from) memcpy(block, from, bytes);
    return block;
}

/* The most elements whose stored form has at most `bytes`. */
static int64_t elements_in(enum en_qtype type, int64_t block, int64_t bytes) {
    const struct en_codec *codec = &en_codecs[type];
    if (!codec->levels) return bytes / codec->bytes * codec->values;
    int64_t n = bytes * 2;
    while (n > 0 && en_packed_bytes(type, n, block) > bytes) n -= n > 64 ? 61 : 1;
    return en_packed_bytes(type, n, block) <= bytes ? n : -1;
}

static void read_all(const struct en_packed *w, int64_t begin, int64_t width) {
    if (begin > w->n) begin = w->n;
    float *part = copy_of(NULL, (size_t)(w->n - begin) * sizeof *part);
    en_packed_read(w, begin, w->n, part);
    int64_t rows = w->n / width, ids[3] = {rows - 1, 0, begin % 4};
    uint16_t *gathered = copy_of(NULL, (size_t)(3 * width) * sizeof *gathered);
    en_packed_rows(w, width, rows ? 3 : 0, ids, begin % 2 ? EN_F16 : EN_BF16, gathered);
    free(part);
    free(gathered);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 5) return 0;
    enum en_qtype type = (enum en_qtype)(data[0] % EN_QTYPE_COUNT);
    const struct en_codec *codec = &en_codecs[type];
    int64_t block = (int64_t)32 << data[1] % 8, begin = data[2] * 3, width = data[3] + 1;
    enum en_dtype from = (enum en_dtype)(data[4] % 3);
    data += 5, size -= 5;

    int64_t n = elements_in(type, block, (int64_t)size);
    if (n >= 0) {
        size_t bytes = (size_t)en_packed_bytes(type, n, block);
        struct en_packed w = {type, n, copy_of(data, bytes), block};
        read_all(&w, begin, width);
        free((void *)w.raw);
    }
    int64_t count = (int64_t)(size / (from == EN_F32 ? 4 : 2));
    if (!codec->levels) count -= count % codec->values;
    if (codec->encode == NULL && codec->levels == NULL) return 0;
    struct en_source source = {from, count, copy_of(data, (size_t)count * (from == EN_F32 ? 4 : 2))};
    struct en_packed w = {type, count, copy_of(NULL, (size_t)en_packed_bytes(type, count, block)), block};
    if (en_quantize(type, block, &source, (uint8_t *)w.raw) == EN_OK) read_all(&w, begin, width);
    free((void *)source.x);
    free((void *)w.raw);
    return 0;
}

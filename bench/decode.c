/* How fast packed weights become panels: the packing of csrc/kernels/gemm.h, one thread, into a buffer that stays in
 * L2, from a matrix that lies in L2 as well (a product fetches its memory ahead). bench/decode.py compiles it for a
 * level and runs it.
 *
 *     decode TYPE f32|bf16 forward|input SECONDS
 *
 * TYPE is a name of csrc/quant/codecs.c; forward: x·Wᵀ, along the rows of W (N, K), input: g·W, across them. Checks
 * every value that lands in a panel against the plain decoder, then prints weights a second, the best of five rounds.
 */
#include LEVEL

#include <stdio.h>
#include <stdlib.h>

enum { N = 512, K = 1024, FLAT = 64, ROUNDS = 5 };
static float plain[N * K];

void en_set_bad_id(int64_t id) { (void)id; }

/* Weights like a trained layer's, quantized; NF4's and FP4's scales are f32 or quantized, as the type has them. */
static struct en_blocks quantized(enum en_qtype type) {
    uint64_t state = 1;
    for (int64_t i = 0; i < N * K; i++) {
        float sum = 0;
        for (int draw = 0; draw < 4; draw++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += (float)(state >> 40) * 0x1p-24f - 0.5f;
        }
        plain[i] = 0.03f * sum;
    }
    const struct en_codec *codec = &en_codecs[type];
    const struct en_source source = {EN_F32, N * K, plain};
    uint8_t *raw = aligned_alloc(64, (size_t)round_up(en_packed_bytes(type, N * K, FLAT), 64));
    if (!raw || en_quantize(type, FLAT, &source, raw) != EN_OK) exit(1);
    const struct en_packed packed = {type, N * K, raw, FLAT};
    en_packed_read(&packed, 0, N * K, plain);
    struct en_blocks w = {.type = type, .values = codec->values, .bytes = codec->bytes, .raw = raw};
    if (!codec->levels) return w;
    const struct en_flat at = en_flat_layout(N * K, FLAT, codec->nested);
    w.bytes = FLAT / 2;
    if (!codec->nested) {
        w.absmax = (const float *)(raw + at.scales);
        return w;
    }
    static float map[256];
    for (int code = 0; code < 256; code++) map[code] = en_dynamic_value(code);
    w.codes = raw + at.scales, w.nested = (const float *)(raw + at.nested_scales), w.map = map;
    w.offset = *(const float *)(raw + at.offset);
    return w;
}

/* Packs all of W, block by block; with `check`, compares what lies in each panel. Returns how many values differ. */
static int64_t pack_all(const struct plan *q, float *dst, int check) {
    const struct en_term *t = q->p->term;
    int64_t wrong = 0;
    for (int64_t block = 0; block < q->blocks; block++) {
        const struct columns c = columns_of_block(q, block);
        for (struct k_block kb = {0}; next_k_block(q, c.g, &kb);) {
            pack_b_columns(q, &kb, c, dst);
            for (int64_t k = 0; check && k < kb.piece->k; k++)
                for (int64_t j = c.j0; j < c.j1; j++) {
                    const int64_t panel = (j - c.j0) / NR * NR, width = panel_width(min64(NR, c.j1 - c.j0 - panel));
                    const float value = plain[(kb.piece->k0 + k) * t->b_row + j * t->b_col];
                    const int64_t word = panel * kb.steps + k / (1 + q->e->pairs) * width + (j - c.j0 - panel);
                    if (q->e->pairs) {
                        uint16_t got, want;
                        memcpy(&got, (uint16_t *)(dst + word) + k % 2, 2);
                        store_as(EN_BF16, &want, 0, v_set(value), 1);
                        wrong += got != want;
                    } else {
                        wrong += dst[word] != value;
                    }
                }
        }
    }
    return wrong;
}

int main(int count, char **argument) {
    if (count != 5) return 2;
    const int forward = !strcmp(argument[3], "forward"), pairs = !strcmp(argument[2], "bf16");
    const struct engine *e = pairs ? EN_BF16_ENGINE : &f32_engine;
    if (!e) return 2;
    int type = 0;
    while (type < EN_QTYPE_COUNT && strcmp(en_codecs[type].name, argument[1])) type++;
    if (type == EN_QTYPE_COUNT) return 2;
    const struct en_blocks w = quantized((enum en_qtype)type);
    const int64_t k = forward ? K : N, n = forward ? N : K;
    static float a[1];
    const struct en_term term = {.k = k, .n = n, .a = a, .a_type = pairs ? EN_BF16 : EN_F32, .a_row = k, .a_col = 1,
                                 .b_row = forward ? 1 : K, .b_col = forward ? K : 1, .packed = &w};
    const struct en_gemm p = {.m = 1024, .n = n, .terms = 1, .term = {term}};
    const struct plan q = make_plan(&p, e);
    float *dst = aligned_alloc(64, (size_t)(e->block * 2) * sizeof(float));
    if (!dst) return 1;
    const int64_t wrong = pack_all(&q, dst, 1);
    if (wrong) {
        fprintf(stderr, "decode: %lld values are wrong\n", (long long)wrong);
        return 1;
    }
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t start = en_now();
        int64_t passes = 0, elapsed;
        do {
            pack_all(&q, dst, 0);
            passes++;
            elapsed = en_now() - start;
        } while ((double)elapsed < atof(argument[4]) * 1e9 / ROUNDS);
        const double rate = (double)passes * N * K / ((double)elapsed * 1e-9);
        if (rate > best) best = rate;
    }
    printf("%.4e\n", best);
    return 0;
}

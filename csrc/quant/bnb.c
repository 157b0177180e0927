/* NF4 and FP4 as bitsandbytes stores them: 4-bit codes in flat blocks over the row-major array, a scale (the largest
 * magnitude) a block. Values are level[code] · scale. Where the scales are quantized again ("double quantization"), a
 * byte stands for dynamic[byte] · nested + offset, nested for 256 of them, offset being their mean.
 *
 * Tables: QLoRA (Dettmers et al. 2023), appendix E; FP4's levels are twelfths; the dynamic map is that of 8-bit
 * Approximations for Parallelism in Deep Learning (Dettmers 2015) with 7 exponent bits, in float. bitsandbytes computes
 * it by torch.linspace, whose last bits depend on the CPU; its encoder chooses the same codes by any of them. */
#include "codec.h"

enum { ALIGN = 64, NESTED = 256, PIECE = 4096 /* elements a task treats at once: whole blocks */ };

const float en_nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

const float en_fp4_levels[16] = {
    0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
    0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

/* Codes by rising level; of FP4's two zeros the first takes what is not above 0. */
static const uint8_t nf4_order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const uint8_t fp4_order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

/* Bytes 128 to 255; 127 is 0, and byte 126 - i the negative of 128 + i. */
static const float dynamic[128] = {
    5.5000004e-07f, 3.2500002e-06f, 7.75e-06f, 2.1249998e-05f, 4.375e-05f, 6.625e-05f, 8.875e-05f, 0.00015625001f,
    0.00026875004f, 0.00038125f, 0.00049375f, 0.0006062501f, 0.00071875006f, 0.00083125f, 0.0009437501f,
    0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f, 0.00409375f, 0.0046562497f, 0.0052187503f,
    0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f, 0.00859375f, 0.009156249f, 0.00971875f,
    0.01140625f, 0.01421875f, 0.01703125f, 0.01984375f, 0.02265625f, 0.02546875f, 0.028281247f, 0.03109375f,
    0.033906247f, 0.036718752f, 0.03953125f, 0.042343747f, 0.045156248f, 0.04796875f, 0.05078125f, 0.053593755f,
    0.05640625f, 0.059218753f, 0.06203125f, 0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f,
    0.07890625f, 0.08171876f, 0.08453125f, 0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f, 0.09859375f,
    0.107031256f, 0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f, 0.17734374f, 0.19140625f, 0.20546874f,
    0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578124f, 0.28984374f, 0.30390626f, 0.31796873f,
    0.33203125f, 0.3460937f, 0.36015624f, 0.37421876f, 0.38828123f, 0.40234375f, 0.4164062f, 0.43046874f, 0.44453123f,
    0.45859373f, 0.47265625f, 0.4867187f, 0.50078124f, 0.51484376f, 0.5289062f, 0.54296875f, 0.5570313f, 0.57109374f,
    0.58515626f, 0.5992187f, 0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f, 0.68359375f, 0.6976563f,
    0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f, 0.79609376f, 0.8101562f, 0.82421875f,
    0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f, 0.9085938f, 0.92265624f, 0.93671876f, 0.9507812f,
    0.96484375f, 0.9789063f, 0.99296874f, 1.0f,
};

float en_dynamic_value(int code) { return code > 127 ? dynamic[code - 128] : code == 127 ? 0 : -dynamic[126 - code]; }

struct en_flat en_flat_layout(int64_t n, int64_t block, int nested) {
    struct en_flat at = {.block = block, .blocks = (n + block - 1) / block, .nested = nested};
    at.scales = ((n + 1) / 2 + ALIGN - 1) / ALIGN * ALIGN;
    if (nested) {
        at.nested_scales = at.scales + (at.blocks + ALIGN - 1) / ALIGN * ALIGN;
        at.offset = at.nested_scales + (at.blocks + NESTED - 1) / NESTED * 4;
        at.bytes = at.offset + 4;
    } else {
        at.nested_scales = at.offset = at.bytes = at.scales + at.blocks * 4;
    }
    return at;
}

float en_flat_scale(const struct en_flat *at, const uint8_t *raw, int64_t block) {
    if (!at->nested) return f32_at(raw + at->scales + block * 4);
    float nested = f32_at(raw + at->nested_scales + block / NESTED * 4), offset = f32_at(raw + at->offset);
    return en_dynamic_value(raw[at->scales + block]) * nested + offset;
}

void en_flat_decode(const struct en_flat *at, const float *levels, const uint8_t *raw, int64_t begin, int64_t end,
                    float *y) {
    for (int64_t i = begin; i < end;) {
        int64_t block = i / at->block, stop = (block + 1) * at->block;
        float scale = en_flat_scale(at, raw, block);
        for (stop = stop < end ? stop : end; i < stop; i++)
            y[i - begin] = levels[i % 2 ? raw[i / 2] & 15 : raw[i / 2] >> 4] * scale;
    }
}

static float magnitude(const float *x, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; i++)
        if (fabsf(x[i]) > most) most = fabsf(x[i]);
    return most;
}

struct encoding {
    const struct en_flat *at;
    const struct en_source *source;
    const uint8_t *order; /* codes by rising level */
    float bounds[15];     /* halfway between neighbours; what lies on one takes the lower code */
    float *scales;
    uint8_t *raw;
};

/* A last block that is not full divides where others multiply by the inverse, and its scale is never 0. */
static void encode_block(const struct encoding *p, int64_t n, float *x, float *scale, uint8_t *raw) {
    const float least = 1e-38f;
    float most = magnitude(x, n), divisor = most > least ? most : least, inverse = 1 / divisor;
    int full = n == p->at->block;
    int32_t rank[PIECE + 1];
    memset(rank, 0, (size_t)(n + 1) * sizeof *rank);
    *scale = full ? most : divisor;
    for (int64_t i = 0; i < n; i++) {
        float scaled = full ? x[i] * inverse : x[i] / divisor;
        x[i] = scaled < -1 ? -1 : scaled > 1 ? 1 : scaled;
    }
    x[n] = 0; /* the neighbour of a last, odd one */
    for (int k = 0; k < 15; k++)
        for (int64_t i = 0; i <= n; i++) rank[i] += p->bounds[k] < x[i];
    for (int64_t i = 0; i < n; i += 2) raw[i / 2] = (uint8_t)(p->order[rank[i]] << 4 | p->order[rank[i + 1]]);
}

static void encode_pieces(void *context, int64_t first, int64_t last) {
    const struct encoding *p = context;
    float all[PIECE], x[PIECE + 1];
    for (int64_t piece = first; piece < last; piece++) {
        int64_t begin = piece * PIECE, n = en_source_read(p->source, begin, PIECE, all);
        for (int64_t i = 0; i < n; i += p->at->block) {
            int64_t count = n - i < p->at->block ? n - i : p->at->block;
            memcpy(x, all + i, (size_t)count * sizeof *x);
            encode_block(p, count, x, p->scales + (begin + i) / p->at->block, p->raw + (begin + i) / 2);
        }
    }
}

/* bitsandbytes looks a scale up in a table of 65,536 steps from -1 to 1, which here and there is not the nearest code
 * of the scale itself. */
static int dynamic_code(float x) {
    float place = (x + 1) * 32767.5f + 0.5f;
    int step = place >= 65535 ? 65535 : place >= 0 ? (int)place : 0; /* NaN: 0 */
    float value = -1 + (float)step * (2.0f / 65535);
    int low = 0, high = 255;
    while (low < high) {
        int middle = (low + high) / 2;
        if ((en_dynamic_value(middle) + en_dynamic_value(middle + 1)) / 2 < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The mean is summed in double, so that it depends on nothing but the scales. */
static void encode_scales(const struct en_flat *at, const float *scales, uint8_t *raw) {
    double sum = 0;
    for (int64_t i = 0; i < at->blocks; i++) sum += (double)scales[i];
    float offset = at->blocks ? (float)(sum / (double)at->blocks) : 0;
    memcpy(raw + at->offset, &offset, sizeof offset);
    for (int64_t begin = 0; begin < at->blocks; begin += NESTED) {
        float x[NESTED], nested;
        int64_t n = at->blocks - begin < NESTED ? at->blocks - begin : NESTED;
        for (int64_t i = 0; i < n; i++) x[i] = scales[begin + i] - offset;
        nested = magnitude(x, n);
        memcpy(raw + at->nested_scales + begin / NESTED * 4, &nested, sizeof nested);
        float inverse = 1 / nested;
        for (int64_t i = 0; i < n; i++) raw[at->scales + begin + i] = (uint8_t)dynamic_code(x[i] * inverse);
    }
}

en_status en_flat_encode(const struct en_flat *at, const float *levels, const struct en_source *source, uint8_t *raw) {
    struct encoding p = {.at = at, .source = source, .raw = raw};
    p.order = levels == en_fp4_levels ? fp4_order : nf4_order;
    for (int k = 0; k < 15; k++) p.bounds[k] = (levels[p.order[k]] + levels[p.order[k + 1]]) / 2;
    p.scales = at->nested ? en_alloc((size_t)at->blocks * sizeof *p.scales) : (float *)(raw + at->scales);
    if (p.scales == NULL) return EN_NO_MEMORY;
    memset(raw + (source->n + 1) / 2, 0, (size_t)(at->bytes - (source->n + 1) / 2)); /* what pads the parts */
    en_parallel_for((source->n + PIECE - 1) / PIECE, 4, encode_pieces, &p);
    if (at->nested) {
        encode_scales(at, p.scales, raw);
        en_free(p.scales);
    }
    return EN_OK;
}

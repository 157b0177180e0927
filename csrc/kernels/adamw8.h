/* Adam with moments of one byte: blocks of EN_MOMENT_BLOCK codes, each with the largest magnitude in it as a float.
 *
 * Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit optimizers via block-wise quantization" (arXiv 2110.02861). A code
 * stands for a value in [0, 1] times that magnitude: seven decades from 1e-7 to 1, each cut into twice as many equal
 * cells as the one below, the codes being the cells' middles, and 0 and 1 themselves.
 *
 *   decade           0 |  1e-7 | 1e-6 | … |   1e-1    | 1
 *   code of v        0 |  1  2 | 3 … 6| … | 127 … 254 | 255
 *   code of |m|      0 |     1 | 2   3| … |  64 … 127 | 128      stored as 127 ± it; -1 itself has no code
 *
 * What both have in common is the position, code + 3/2 of v and 2·code + 1 of |m|: in the decade from `low` it goes from
 * C to 2·C, C = 2, 4, … 128, and there value = low·(9·position / C - 8). So the binary exponent of a position tells its
 * decade, and the position of a value, a concave function, is the least of seven lines. */
#ifndef EN_ADAMW8_H
#define EN_ADAMW8_H

#include <string.h>

#include "adamw.h"

enum { DECADES = 7, SIGNED_ZERO = 127 };

struct codes {
    float value_slope[16], value_offset[16]; /* by the position's exponent: 15 of 0, 0 to 6 of the decades, 7 of 1 */
    float slope[DECADES], offset[DECADES];   /* of the lines */
    const struct en_adam *settings;
};

static struct codes make_codes(const struct en_adam *settings) {
    struct codes c = {.settings = settings, .value_offset[DECADES] = 1};
    double low = 1e-7, cells = 2;
    for (int i = 0; i < DECADES; i++, low *= 10, cells *= 2) {
        c.value_slope[i] = (float)(9 * low / cells);
        c.value_offset[i] = (float)(-8 * low);
        c.slope[i] = (float)(cells / (9 * low));
        c.offset[i] = (float)(cells * 8 / 9);
    }
    return c;
}

WORD vf value_at(const struct codes *c, vf position) {
    vi exponent = vi_shr(v_bits(position), 23); /* 127 and up; the lookup takes it mod 16 */
    return v_fma(v_lookup(c->value_slope, exponent), position, v_lookup(c->value_offset, exponent));
}

WORD vf position_of(const struct codes *c, vf y) {
    vf position = v_fma(v_set(c->slope[0]), y, v_set(c->offset[0]));
    for (int i = 1; i < DECADES; i++) position = v_min(v_fma(v_set(c->slope[i]), y, v_set(c->offset[i])), position);
    return position;
}

WORD vf decode_m(const struct codes *c, const uint8_t *code) {
    vf signed_code = v_sub(v_load_u8(code), v_set(SIGNED_ZERO));
    vf magnitude = value_at(c, v_fma(v_set(2), v_abs(signed_code), v_set(1)));
    return v_select(v_lt(signed_code, v_zero()), v_neg(magnitude), magnitude);
}

WORD vf decode_v(const struct codes *c, const uint8_t *code) {
    return value_at(c, v_add(v_load_u8(code), v_set(1.5f)));
}

/* Stores round to nearest, so half is taken off for a floor. A thousandth of a cell less than half, so that what should
 * be 1 but for rounding keeps its own code. */
#define LESS_HALF (0x1p-10f - 0.5f)

WORD void encode_m(const struct codes *c, vf y, uint8_t *code) {
    vf magnitude = v_round(v_fma(v_set(0.5f), position_of(c, v_abs(y)), v_set(LESS_HALF)));
    vf zero = v_set(SIGNED_ZERO);
    v_store_u8(code, v_select(v_lt(y, v_zero()), v_sub(zero, v_min(magnitude, zero)), v_add(zero, magnitude)));
}

/* Never 0 where y is not: m, which may be larger against its block, would be divided by eps alone. */
WORD void encode_v(const struct codes *c, vf y, uint8_t *code) {
    vf floor = v_add(position_of(c, y), v_set(LESS_HALF - 1));
    v_store_u8(code, v_max(floor, v_select(v_lt(v_zero(), y), v_set(1), v_zero())));
}

/* Magnitudes so small that the inverse overflows stand for 0. */
WORD float inverse(float absmax) { return absmax >= 0x1p-126f ? 1 / absmax : 0; }

/* A whole block. */
static void adam8_block(const struct adam *settings, const struct codes *c, float *p, const float *g, uint8_t *m_codes,
                        uint8_t *v_codes, float *m_absmax, float *v_absmax) {
    _Alignas(64) float ms[EN_MOMENT_BLOCK], vs[EN_MOMENT_BLOCK];
    struct adam a = *settings;
    vf m_scale = v_set(*m_absmax), v_scale = v_set(*v_absmax), m_most = v_zero(), v_most = v_zero();
    for (int i = 0; i < EN_MOMENT_BLOCK; i += VL) {
        vf m = v_mul(decode_m(c, m_codes + i), m_scale), v = v_mul(decode_v(c, v_codes + i), v_scale);
        v_store(p + i, adam_lanes(&a, v_load(p + i), v_load(g + i), &m, &v));
        v_store(ms + i, m);
        v_store(vs + i, v);
        m_most = v_max(v_abs(m), m_most);
        v_most = v_max(v, v_most);
    }
    *m_absmax = v_hmax(m_most);
    *v_absmax = v_hmax(v_most);
    m_scale = v_set(inverse(*m_absmax));
    v_scale = v_set(inverse(*v_absmax));
    for (int i = 0; i < EN_MOMENT_BLOCK; i += VL) {
        encode_m(c, v_mul(v_load(ms + i), m_scale), m_codes + i);
        encode_v(c, v_mul(v_load(vs + i), v_scale), v_codes + i);
    }
}

/* The n elements at the end of a parameter, among zeros. */
static void adam8_rest(const struct adam *a, const struct codes *c, int64_t n, float *p, const float *g,
                       uint8_t *m_codes, uint8_t *v_codes, float *m_absmax, float *v_absmax) {
    float all_p[EN_MOMENT_BLOCK] = {0}, all_g[EN_MOMENT_BLOCK] = {0};
    uint8_t all_m[EN_MOMENT_BLOCK], all_v[EN_MOMENT_BLOCK] = {0};
    size_t bytes = (size_t)n, floats = bytes * sizeof(float);
    memset(all_m, SIGNED_ZERO, sizeof all_m);
    memcpy(all_p, p, floats);
    memcpy(all_g, g, floats);
    memcpy(all_m, m_codes, bytes);
    memcpy(all_v, v_codes, bytes);
    adam8_block(a, c, all_p, all_g, all_m, all_v, m_absmax, v_absmax);
    memcpy(p, all_p, floats);
    memcpy(m_codes, all_m, bytes);
    memcpy(v_codes, all_v, bytes);
}

static void adam8(const struct adam *a, const struct codes *c, const struct en_param *param, int64_t begin,
                  int64_t end) {
    float *p = param->p;
    uint8_t *m = param->m, *v = param->v;
    for (int64_t i = begin; i < end; i += EN_MOMENT_BLOCK) {
        float *m_absmax = param->m_absmax + i / EN_MOMENT_BLOCK, *v_absmax = param->v_absmax + i / EN_MOMENT_BLOCK;
        if (end - i >= EN_MOMENT_BLOCK)
            adam8_block(a, c, p + i, param->g + i, m + i, v + i, m_absmax, v_absmax);
        else
            adam8_rest(a, c, end - i, p + i, param->g + i, m + i, v + i, m_absmax, v_absmax);
    }
}

struct adam_work {
    struct adam adam;
    const struct codes *codes;
};

static void adam_range(const void *context, const struct en_param *param, int64_t begin, int64_t end) {
    const struct adam_work *w = context;
    if (param->m_absmax)
        adam8(&w->adam, w->codes, param, begin, end);
    else
        adam_f32(&w->adam, param, begin, end);
}

static void adam_piece(const struct multi *multi, int64_t piece, const struct en_param *param, int64_t begin,
                       int64_t end) {
    const struct codes *codes = multi->context;
    struct adam_work w = {adam_at(codes->settings, param->step), codes};
    (void)piece;
    if (param->p_type == EN_BF16)
        step_bf16(&w, param, begin, end, adam_range);
    else
        adam_range(&w, param, begin, end);
}

static en_status adam_step(int64_t count, const struct en_param *params, const struct en_adam *settings) {
    struct codes c = make_codes(settings);
    struct multi m = {.count = count, .params = params, .work = adam_piece, .context = &c};
    return multi_run(&m);
}

#endif

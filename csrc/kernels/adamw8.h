/* Adam with moments of one byte: blocks of EN_MOMENT_BLOCK codes, each with the largest magnitude in it as a float.
 *
 * Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit optimizers via block-wise quantization" (arXiv 2110.02861). A code
 * stands for a value in [0, 1] times that magnitude: seven decades from 1e-7 to 1, each cut into twice as many equal
 * cells as the one below, the codes being the cells' middles, and 0 and 1 themselves.
 *
 *   code        0 | 1 2 | 3 … 6 | 7 … 14 | … | 127 … 254 | 255        of v, which has no sign
 *   decade      0 | -7  | -6    | -5     |   | -1        | 1
 *
 * m has half as many cells a decade and its codes count from 127, up for positive values, down for negative ones
 * (which have no code for the magnitude itself). */
#ifndef EN_ADAMW8_H
#define EN_ADAMW8_H

#include <string.h>

#include "adamw.h"

enum { DECADES = 7, SIGNED_ZERO = 127 };

/* The cell of y as a real number is concave and piecewise linear: the least of one line a decade. */
struct lines {
    float slope[DECADES], offset[DECADES];
};

struct codes {
    float m[256], v[256]; /* the value of each code */
    struct lines m_cell, v_cell;
    const struct en_adam *settings;
};

/* values, of codes from 0 up: `cells` of them in the lowest decade */
static void make_codes(int cells, float *values, struct lines *lines) {
    double low = 1e-7;
    int code = 1;
    values[0] = 0;
    for (int i = 0; i < DECADES; i++, low *= 10, cells *= 2) {
        /* v_round takes the place of a floor; the last term keeps 1, and what rounds to nearly 1, within its code */
        lines->slope[i] = (float)(cells / (9 * low));
        lines->offset[i] = (float)(code - cells / 9.0 - 0.5 + 0x1p-10);
        for (int k = 0; k < cells; k++) values[code++] = (float)(low * (1 + 9 * (k + 0.5) / cells));
    }
    values[code] = 1;
}

WORD vf cell_of(const struct lines *lines, vf y) {
    vf cell = v_fma(v_set(lines->slope[0]), y, v_set(lines->offset[0]));
    for (int i = 1; i < DECADES; i++) cell = v_min(v_fma(v_set(lines->slope[i]), y, v_set(lines->offset[i])), cell);
    return v_round(cell);
}

/* 0 where magnitudes are so small that the inverse overflows: they become code 0, or 1 */
WORD vf inverse(float absmax) { return v_set(absmax >= 0x1p-126f ? 1 / absmax : 0); }

/* int32 lanes as bytes */
static void store_codes(uint8_t *codes, const float *lanes, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int32_t code;
        memcpy(&code, lanes + i, sizeof code);
        codes[i] = (uint8_t)code;
    }
}

/* At most EN_MOMENT_BLOCK elements that share their magnitudes. */
static void adam8_block(const struct adam *a, const struct codes *c, int64_t n, float *p, const float *g,
                        uint8_t *m_codes, uint8_t *v_codes, float *m_absmax, float *v_absmax) {
    _Alignas(64) float ms[EN_MOMENT_BLOCK], vs[EN_MOMENT_BLOCK];
    float m_scale = *m_absmax, v_scale = *v_absmax;
    for (int64_t i = 0; i < n; i++) {
        ms[i] = c->m[m_codes[i]] * m_scale;
        vs[i] = c->v[v_codes[i]] * v_scale;
    }
    for (int64_t i = n; i < EN_MOMENT_BLOCK; i++) ms[i] = vs[i] = 0;

    vf m_most = v_zero(), v_most = v_zero();
    for (int64_t i = 0; i < n; i += VL) {
        vf m = v_load(ms + i), v = v_load(vs + i);
        v_store_n(p + i, adam_lanes(a, v_load_n(p + i, n - i), v_load_n(g + i, n - i), &m, &v), n - i);
        v_store(ms + i, m);
        v_store(vs + i, v);
        m_most = v_max(v_abs(m), m_most);
        v_most = v_max(v, v_most);
    }
    *m_absmax = v_hmax(m_most);
    *v_absmax = v_hmax(v_most);

    vf scale = inverse(*m_absmax), zero = v_set(SIGNED_ZERO);
    for (int64_t i = 0; i < n; i += VL) {
        vf m = v_load(ms + i), cell = cell_of(&c->m_cell, v_mul(v_abs(m), scale));
        vf code = v_select(v_lt(m, v_zero()), v_sub(zero, v_min(cell, zero)), v_add(zero, cell));
        v_store(ms + i, v_from_bits(v_to_int(code)));
    }
    store_codes(m_codes, ms, n);
    scale = inverse(*v_absmax);
    for (int64_t i = 0; i < n; i += VL) {
        vf v = v_load(vs + i), cell = cell_of(&c->v_cell, v_mul(v, scale));
        /* Never 0 where v is not: m, which may be larger against its block, would be divided by eps alone. */
        vf least_code = v_select(v_lt(v_zero(), v), v_set(1), v_zero());
        v_store(vs + i, v_from_bits(v_to_int(v_max(cell, least_code))));
    }
    store_codes(v_codes, vs, n);
}

static void adam_piece(const struct multi *multi, int64_t piece, const struct en_param *param, int64_t begin,
                       int64_t end) {
    const struct codes *c = multi->context;
    struct adam a = adam_at(c->settings, param->step);
    (void)piece;
    if (!param->m_absmax) {
        adam_f32(&a, param, begin, end);
        return;
    }
    for (int64_t i = begin; i < end; i += EN_MOMENT_BLOCK) {
        int64_t block = i / EN_MOMENT_BLOCK;
        adam8_block(&a, c, least(EN_MOMENT_BLOCK, end - i), param->p + i, param->g + i, (uint8_t *)param->m + i,
                    (uint8_t *)param->v + i, param->m_absmax + block, param->v_absmax + block);
    }
}

static en_status adam_step(int64_t count, const struct en_param *params, const struct en_adam *settings) {
    struct codes c = {.settings = settings};
    make_codes(1, c.m + SIGNED_ZERO, &c.m_cell);
    for (int i = 0; i < SIGNED_ZERO; i++) c.m[i] = -c.m[2 * SIGNED_ZERO - i];
    make_codes(2, c.v, &c.v_cell);
    struct multi m = {.count = count, .params = params, .work = adam_piece, .context = &c};
    return multi_run(&m);
}

#endif

/* Contract: fit.h. */
#include "fit.h"

#include "codec.h"

static const float negligible = 1e-15f; /* groups of smaller values are zeros */

float largest(int n, const float *x) {
    float most = 0;
    for (int i = 0; i < n; i++)
        if (x[i] > most) most = x[i];
    return most;
}

float farthest(int n, const float *x) {
    float most = 0, found = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > most) {
            most = fabsf(x[i]);
            found = x[i];
        }
    return found;
}

static lanes choose(codes mask, lanes a, lanes b) { return (lanes)(((codes)a & mask) | ((codes)b & ~mask)); }
static lanes numbers(codes q) { return __builtin_convertvector(q, lanes); }

/* `nearest` and `clamp` of codec.h, in lanes. */
static codes bounded(lanes x, int levels) {
    codes q = ((codes)(x + 12582912.0f) & 0x7fffff) - 0x400000, top = (codes){0} + levels;
    q &= q > 0;
    codes over = q > top;
    return (top & over) | (q & ~over);
}

static lanes affine_errors(const struct groups *g, const codes *q, lanes scale, lanes min, int absolute) {
    lanes error = {0};
    for (int i = 0; i < g->n; i++) {
        lanes miss = scale * numbers(q[i]) + min - g->x[i];
        error += g->weight[i] * (absolute ? (lanes)((codes)miss & 0x7fffffff) : miss * miss);
    }
    return error;
}

/* The scale and min of least weighted squares for these codes; min is NaN where there are none. */
static void affine_solve(const struct groups *g, const codes *q, lanes sum_w, lanes sum_x, lanes *scale, lanes *min) {
    lanes sum_q = {0}, sum_qq = {0}, sum_xq = {0};
    for (int i = 0; i < g->n; i++) {
        lanes code = numbers(q[i]), weighted = g->weight[i] * code;
        sum_q += weighted;
        sum_qq += weighted * code;
        sum_xq += weighted * g->x[i];
    }
    lanes determinant = sum_w * sum_qq - sum_q * sum_q, slope = (sum_w * sum_xq - sum_x * sum_q) / determinant;
    lanes base = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
    codes above = base > 0;
    *scale = choose(above, sum_xq / sum_qq, slope);
    *min = choose(determinant > 0, choose(above, (lanes){0}, base), (lanes){0} + NAN);
}

void fit_affine(const struct fit_affine *how, const struct groups *g, uint8_t *q, float *scales, float *mins) {
    codes best[MOST], trial[MOST];
    lanes min = g->x[0], max = g->x[0], sum_w = {0}, sum_x = {0};
    for (int i = 0; i < g->n; i++) {
        min = choose(g->x[i] < min, g->x[i], min);
        max = choose(g->x[i] > max, g->x[i], max);
        sum_w += g->weight[i];
        sum_x += g->weight[i] * g->x[i];
    }
    min = choose(min > 0, (lanes){0}, min);
    codes flat = max == min; /* one value, not above 0 */
    lanes inverse = (float)how->levels / (max - min), scale = 1 / inverse;
    for (int i = 0; i < g->n; i++) best[i] = bounded(inverse * (g->x[i] - min), how->levels);
    lanes least = affine_errors(g, best, scale, min, how->absolute);
    for (int step = 0; step <= how->steps; step++) {
        lanes slope, base;
        inverse = (how->first + how->step * (float)step + (float)how->levels) / (max - min);
        for (int i = 0; i < g->n; i++) trial[i] = bounded(inverse * (g->x[i] - min), how->levels);
        affine_solve(g, trial, sum_w, sum_x, &slope, &base);
        lanes error = affine_errors(g, trial, slope, base, how->absolute);
        codes better = error < least;
        least = choose(better, error, least);
        scale = choose(better, slope, scale);
        min = choose(better, base, min);
        for (int i = 0; i < g->n; i++) best[i] = (trial[i] & better) | (best[i] & ~better);
    }
    for (int lane = 0; lane < LANES; lane++) {
        scales[lane] = flat[lane] ? 0 : scale[lane];
        mins[lane] = -min[lane];
        for (int i = 0; i < g->n; i++) q[lane * g->n + i] = (uint8_t)(flat[lane] ? 0 : best[i][lane]);
    }
}

struct sums {
    float xq, qq; /* of x²·x·q and x²·q² */
};

/* Codes, from 0 on, for a scale of 1 / inverse. */
static struct sums symmetric_codes(int n, int levels, const float *x, float inverse, uint8_t *q) {
    struct sums s = {0, 0};
    for (int i = 0; i < n; i++) {
        int code = clamp(nearest(inverse * x[i]), -levels, levels - 1);
        float w = x[i] * x[i];
        q[i] = (uint8_t)(code + levels);
        s.xq += w * x[i] * (float)code;
        s.qq += w * (float)code * (float)code;
    }
    return s;
}

float fit_symmetric(int n, int levels, const float *x, uint8_t *q) {
    float extreme = farthest(n, x);
    if (fabsf(extreme) < negligible) {
        memset(q, 0, (size_t)n);
        return 0;
    }
    struct sums s = symmetric_codes(n, levels, x, (float)-levels / extreme, q);
    float scale = s.qq != 0 ? s.xq / s.qq : 0, best = scale * s.xq;
    for (int step = -9; step <= 9; step++) {
        uint8_t trial[MOST];
        if (step == 0) continue;
        s = symmetric_codes(n, levels, x, -((float)levels + 0.1f * (float)step) / extreme, trial);
        if (!(s.qq > 0 && s.xq * s.xq > best * s.qq)) continue;
        memcpy(q, trial, (size_t)n);
        scale = s.xq / s.qq;
        best = scale * s.xq;
    }
    return scale;
}

float fit_in_turn(int n, int levels, const float *x, uint8_t *q) {
    float extreme = farthest(n, x);
    if (fabsf(extreme) < negligible) {
        memset(q, 0, (size_t)n);
        return 0;
    }
    struct sums s = symmetric_codes(n, levels, x, (float)-levels / extreme, q);
    for (int round = 0, moved = 1; round < 5 && moved; round++) {
        moved = 0;
        for (int i = 0; i < n; i++) {
            float w = x[i] * x[i], code = (float)(q[i] - levels);
            struct sums other = {s.xq - w * x[i] * code, s.qq - w * code * code};
            if (!(other.xq > 0)) continue;
            int better = clamp(nearest(x[i] * other.qq / other.xq), -levels, levels - 1);
            if (better == q[i] - levels) continue;
            other.xq += w * x[i] * (float)better;
            other.qq += w * (float)better * (float)better;
            if (!(other.qq > 0 && other.xq * other.xq * s.qq > s.xq * s.xq * other.qq)) continue;
            q[i] = (uint8_t)(better + levels);
            s = other;
            moved = 1;
        }
    }
    return s.qq > 0 ? s.xq / s.qq : 0;
}

void round_affine(int n, const float *x, float scale, float min, int levels, uint8_t *q) {
    if (scale == 0) return;
    for (int i = 0; i < n; i++) q[i] = (uint8_t)clamp(nearest((x[i] + min) / scale), 0, levels);
}

void round_symmetric(int n, const float *x, float scale, int levels, uint8_t *q) {
    if (scale == 0) return;
    for (int i = 0; i < n; i++) q[i] = (uint8_t)(clamp(nearest(x[i] / scale), -levels, levels - 1) + levels);
}

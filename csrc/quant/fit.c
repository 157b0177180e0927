/* Contract: fit.h. */
#include "fit.h"

#include "codec.h"

enum { MOST = 32 };                        /* values in a group */
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

static float affine_error(int n, const float *x, const float *weight, const uint8_t *q, float scale, float min,
                          int absolute) {
    float error = 0;
    for (int i = 0; i < n; i++) {
        float miss = scale * (float)q[i] + min - x[i];
        error += weight[i] * (absolute ? fabsf(miss) : miss * miss);
    }
    return error;
}

static void affine_codes(int n, const float *x, float inverse, float min, int levels, uint8_t *q) {
    for (int i = 0; i < n; i++) q[i] = (uint8_t)clamp(nearest(inverse * (x[i] - min)), 0, levels);
}

float fit_affine(const struct fit_affine *how, int n, const float *x, const float *weight, uint8_t *q, float *least) {
    float min = x[0], max = x[0], sum_w = weight[0], sum_x = weight[0] * x[0];
    for (int i = 1; i < n; i++) {
        if (x[i] < min) min = x[i];
        if (x[i] > max) max = x[i];
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    if (min > 0) min = 0;
    *least = -min;
    if (max == min) {
        memset(q, 0, (size_t)n);
        return 0;
    }
    int levels = how->levels;
    float range = max - min, inverse = (float)levels / range, scale = 1 / inverse;
    affine_codes(n, x, inverse, min, levels, q);
    float best = affine_error(n, x, weight, q, scale, min, how->absolute);
    for (int step = 0; step <= how->steps; step++) {
        uint8_t trial[MOST];
        affine_codes(n, x, (how->first + how->step * (float)step + (float)levels) / (max - min), min, levels, trial);
        float sum_q = 0, sum_qq = 0, sum_xq = 0;
        for (int i = 0; i < n; i++) {
            float w = weight[i], l = (float)trial[i];
            sum_q += w * l;
            sum_qq += w * l * l;
            sum_xq += w * l * x[i];
        }
        float determinant = sum_w * sum_qq - sum_q * sum_q;
        if (!(determinant > 0)) continue;
        float this_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
        float this_min = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
        if (this_min > 0) {
            this_min = 0;
            this_scale = sum_xq / sum_qq;
        }
        float error = affine_error(n, x, weight, trial, this_scale, this_min, how->absolute);
        if (!(error < best)) continue;
        memcpy(q, trial, (size_t)n);
        best = error;
        scale = this_scale;
        min = this_min;
    }
    *least = -min;
    return scale;
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

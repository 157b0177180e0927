/* Scales for a group of values, as ggml searches them: several are tried, and the one of least squared error (or
 * another measure) is kept. Sums run in order and in float, because the bytes depend on which trial wins. */
#ifndef EN_QUANT_FIT_H
#define EN_QUANT_FIT_H

#include <stdint.h>

enum { LANES = 4, MOST = 32 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t codes __attribute__((vector_size(LANES * sizeof(int32_t))));

/* Four groups at once, one a lane, so that their sums run side by side, each in its order. */
struct groups {
    int n; /* values in a group */
    lanes x[MOST], weight[MOST];
};

/* x about scale·q - min, q from 0 to levels, min >= 0. The first trial spans the values; then 1/scale is tried for
 * levels + first, + step, ... (steps of them), each with the scale and min of least weighted squares. */
struct fit_affine {
    int levels;
    float first, step;
    int steps;
    int absolute; /* compare by weighted absolute errors, else squares */
};
void fit_affine(const struct fit_affine *how, const struct groups *g, uint8_t *q /* group after group */, float *scale,
                float *min);

/* x about scale·(q - levels), q from 0 to 2·levels - 1, weighted by x². The extreme value becomes the lowest code, or
 * nearly: 19 scales around that are tried. */
float fit_symmetric(int n, int levels, const float *x, uint8_t *q);
/* The same from that first scale, improved by moving one code after the other, five rounds at most. */
float fit_in_turn(int n, int levels, const float *x, uint8_t *q);

/* The codes for scales that have been rounded; where the scale is 0, codes stay as they are. */
void round_affine(int n, const float *x, float scale, float min, int levels, uint8_t *q);
void round_symmetric(int n, const float *x, float scale, int levels, uint8_t *q);

/* The largest of n values and 0; the value farthest from 0, the first of several. */
float largest(int n, const float *x);
float farthest(int n, const float *x);

#endif

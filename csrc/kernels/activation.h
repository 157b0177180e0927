/* Activations of a vector and their derivatives, each with the incoming gradient: x, g -> g·f'(x).
 *
 * All rest on e = exp(-|z|), never on a large exponential, so that nothing overflows and the far tails keep their
 * relative accuracy down to denormals. NaN passes through all of them. */
#ifndef EN_ACTIVATION_H
#define EN_ACTIVATION_H

#include "vmath.h"

WORD vf v_neg_backward(vf x, vf g) {
    (void)x;
    return v_neg(g);
}
WORD vf v_exp_backward(vf x, vf g) { return v_mul(g, v_exp(x)); }
WORD vf v_log_backward(vf x, vf g) { return v_div(g, x); }

WORD vf v_relu(vf x) { return v_max(v_zero(), x); } /* constant first: NaN passes */
WORD vf v_relu_backward(vf x, vf g) { return v_select(v_le(x, v_zero()), v_zero(), g); }

/* ---- SiLU: x·s(x), s the logistic function ---- */

/* s(x) from e = exp(-|x|). 1 - s(x) is the same of -x. */
WORD vf v_sigmoid_of(vf x, vf e) {
    vf one = v_set(1.0f);
    return v_div(v_select(v_lt(x, v_zero()), e, one), v_add(one, e));
}

WORD vf v_silu(vf x) { return v_mul(x, v_sigmoid_of(x, v_exp(v_neg(v_abs(x))))); }

/* s(x)·(1 + x·s(-x)) */
WORD vf v_silu_slope(vf x) {
    vf e = v_exp(v_neg(v_abs(x)));
    return v_mul(v_sigmoid_of(x, e), v_fma(x, v_sigmoid_of(v_neg(x), e), v_set(1.0f)));
}
WORD vf v_silu_backward(vf x, vf g) { return v_mul(g, v_silu_slope(x)); }

/* ---- GELU: x·Phi(x), Phi the normal distribution ---- */

/* Phi(-|x|) / e and e = exp(-x²/2), whose argument is taken with its rounding error. The ratio (Mills' ratio over
 * √2π) times (1 + a/3.25) is a polynomial in t = (a - 3.25) / (a + 3.25), a minimax fit within 1e-8. Beyond 20 both
 * Phi and e are 0 in single precision. */
WORD vf v_normal_tail(vf x, vf *e) {
    vf a = v_min(v_set(20.0f), v_abs(x));
    vf square = v_mul(a, a), low = v_mul_error(a, a, square), half = v_set(-0.5f);
    vf main = v_exp(v_mul(half, square));
    *e = v_fma(main, v_mul(half, low), main);
    vf centre = v_set(3.25f), r = v_div(v_set(1.0f), v_add(a, centre));
    vf t = v_mul(v_sub(a, centre), r);
    vf p = v_set(4.04545281e-05f);
    p = v_fma(p, t, v_set(4.63911844e-05f));
    p = v_fma(p, t, v_set(-3.23470973e-04f));
    p = v_fma(p, t, v_set(-3.59820566e-04f));
    p = v_fma(p, t, v_set(2.55471830e-03f));
    p = v_fma(p, t, v_set(3.38036661e-04f));
    p = v_fma(p, t, v_set(-2.48997313e-02f));
    p = v_fma(p, t, v_set(8.44473164e-02f));
    p = v_fma(p, t, v_set(-1.65995919e-01f));
    p = v_fma(p, t, v_set(2.26904124e-01f));
    return v_mul(p, v_mul(centre, r));
}

WORD vf v_gelu(vf x) {
    vf e, ratio = v_normal_tail(x, &e);
    vf lower = v_mul(v_mul(x, ratio), e), upper = v_mul(x, v_fnma(ratio, e, v_set(1.0f)));
    return v_select(v_lt(x, v_zero()), lower, upper);
}

/* Phi(x) + x·exp(-x²/2)/√2π */
WORD vf v_gelu_backward(vf x, vf g) {
    vf e, ratio = v_normal_tail(x, &e), near = v_max(v_set(-20.0f), v_min(v_set(20.0f), x));
    vf density = v_mul(near, v_set(0.398942280f));
    vf lower = v_mul(e, v_add(ratio, density)), upper = v_fma(e, v_sub(density, ratio), v_set(1.0f));
    return v_mul(g, v_select(v_lt(x, v_zero()), lower, upper));
}

/* ---- GELU by tanh: x·(1 + tanh(u))/2 = x·s(2u), 2u = √(8/pi)·(x + 0.044715 x³) ---- */

/* exp(-2|u|): 2|u| = a·(k1 + k3·a²) reaches 100, so it is carried in two floats. Beyond 12 the result is 0. */
WORD vf v_gelu_tanh_exp(vf x) {
    vf k1 = v_set(0x1.988454p+0f), k1_low = v_set(-0x1.857936p-25f);
    vf k3 = v_set(0x1.2444f2p-4f), k3_low = v_set(0x1.49b16ap-29f);
    vf a = v_min(v_set(12.0f), v_abs(x));
    vf square = v_mul(a, a), cubic = v_mul(k3, square), sum = v_add(k1, cubic);
    vf back = v_sub(sum, k1);
    vf low = v_add(v_sub(k1, v_sub(sum, back)), v_sub(cubic, back)); /* of the sum, exactly */
    low = v_add(low, v_add(k1_low, v_mul_error(k3, square, cubic)));
    low = v_fma(k3, v_mul_error(a, a, square), v_fma(k3_low, square, low));
    vf u = v_mul(a, sum), u_low = v_fma(a, low, v_mul_error(a, sum, u));
    vf e = v_exp(v_neg(u));
    return v_fnma(e, u_low, e);
}

WORD vf v_gelu_tanh(vf x) { return v_mul(x, v_sigmoid_of(x, v_gelu_tanh_exp(x))); }

/* s + x·s·(1 - s)·(2u)' */
WORD vf v_gelu_tanh_backward(vf x, vf g) {
    vf e = v_gelu_tanh_exp(x), s = v_sigmoid_of(x, e), rest = v_sigmoid_of(v_neg(x), e);
    vf near = v_max(v_set(-12.0f), v_min(v_set(12.0f), x));
    vf slope = v_fma(v_set(0.214064449f), v_mul(near, near), v_set(1.59576917f)); /* 3·k3, k1 */
    return v_mul(g, v_mul(s, v_fma(v_mul(near, slope), rest, v_set(1.0f))));
}

#endif

/* Functions of a vector. Errors are in units of the last place of the exact result, over all floats. */
#ifndef EN_VMATH_H
#define EN_VMATH_H

enum { EXP_GROUP = 4 }; /* vectors that v_exp_each takes at most */

/* e^x, within 1.1 ulp (1.5 without FMA), right at ±Inf, NaN, overflow (above 88.72) and for denormal results.
 * x = n·ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts, the first short enough for n·part to be exact.
 * The polynomial is (e^r - 1 - r) / r^2, degree 5, a minimax fit.
 *
 * Of k vectors at once, in place, a step of each in turn: one vector's steps wait for each other, and a core that looks
 * ahead sees too few of the next one's. */
WORD void v_exp_each(const int k, vf *x) {
    static const float coefficient[] = {0x1.6d44e4p-10f, 0x1.1110e0p-7f, 0x1.5554e8p-5f, 0x1.555556p-3f, 0.5f};
    vf n[EXP_GROUP], r[EXP_GROUP], p[EXP_GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) x[i] = v_max(v_set(-105.0f), x[i]); /* constant first: NaN passes */
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) x[i] = v_min(v_set(89.0f), x[i]);
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) n[i] = v_mul(x[i], v_set(0x1.715476p+0f));
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) n[i] = v_round(n[i]);
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) r[i] = v_fnma(n[i], v_set(0x1.63p-1f), x[i]);
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) r[i] = v_fnma(n[i], v_set(-0x1.bd0106p-13f), r[i]);
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) p[i] = v_set(0x1.a1267ep-13f);
#pragma GCC unroll 8
    for (int c = 0; c < 5; c++)
#pragma GCC unroll 8
        for (int i = 0; i < k; i++) p[i] = v_fma(p[i], r[i], v_set(coefficient[c]));
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) x[i] = v_mul(r[i], r[i]);
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) x[i] = v_fma(x[i], p[i], r[i]);
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) x[i] = v_add(x[i], v_set(1.0f));
#pragma GCC unroll 8
    for (int i = 0; i < k; i++) x[i] = v_ldexp(x[i], n[i]);
}

WORD vf v_exp(vf x) {
    v_exp_each(1, &x);
    return x;
}

/* 2^x for x <= 127, within 2.3e-7 of it, but 0 below 2^-125; NaN stays NaN. x = n + f, |f| <= 1/2; the polynomial
 * is 2^f, degree 5, a minimax fit. */
WORD vf v_exp2(vf x) {
    const vf least = v_set(-125.0f), clamped = v_max(least, x); /* constant first: NaN passes */
    const vi n = v_to_int(clamped);
    const vf f = v_sub(clamped, v_from_int(n));
    vf p = v_set(0x1.5bba14p-10f);
    p = v_fma(p, f, v_set(0x1.3cea88p-7f));
    p = v_fma(p, f, v_set(0x1.c6b752p-5f));
    p = v_fma(p, f, v_set(0x1.ebf9bcp-3f));
    p = v_fma(p, f, v_set(0x1.62e42ap-1f));
    p = v_fma(p, f, v_set(1.0f));
    return v_select(v_lt(x, least), v_zero(), v_from_bits(vi_add(v_bits(p), vi_shl(n, 23))));
}

/* log x, within 1 ulp (2 without FMA): NaN below 0, -Inf at ±0, exact scaling of denormals. x = m·2^k with m in
 * [√½, √2), f = m - 1, s = f / (2 + f): log m = f - s·(f - R), R = s²·(2/3 + 2/5 s² + ...). */
WORD vf v_log(vf x) {
    vm tiny = v_lt(x, v_set(0x1p-126f));
    vi bits = v_bits(v_select(tiny, v_mul(x, v_set(0x1p25f)), x));
    vi biased = vi_shr(vi_add(bits, vi_set(0x3f800000 - 0x3f3504f3)), 23); /* less the bits of √½ */
    vf f = v_sub(v_from_bits(vi_sub(bits, vi_shl(vi_sub(biased, vi_set(127)), 23))), v_set(1.0f));
    vf k = v_sub(v_from_int(biased), v_select(tiny, v_set(127 + 25), v_set(127)));
    vf s = v_div(f, v_add(v_set(2.0f), f)), z = v_mul(s, s);
    vf r = v_fma(v_set(0x1.c71c72p-3f), z, v_set(0x1.24924ap-2f));
    r = v_mul(z, v_fma(v_fma(r, z, v_set(0x1.99999ap-2f)), z, v_set(0x1.555556p-1f)));
    vf part = v_fnma(k, v_set(-0x1.bd0106p-13f), v_mul(s, v_sub(f, r)));
    vf y = v_fma(k, v_set(0x1.63p-1f), v_sub(f, part));
    y = v_select(v_eq(x, v_set(__builtin_inff())), x, y);
    y = v_select(v_eq(x, v_zero()), v_set(-__builtin_inff()), y);
    return v_select(v_lt(x, v_zero()), v_set(__builtin_nanf("")), v_select(v_nan(x), x, y));
}

#endif

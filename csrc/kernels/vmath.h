/* Functions of a vector. Errors are in units of the last place of the exact result, over all floats. */
#ifndef EN_VMATH_H
#define EN_VMATH_H

/* e^x, within 1.1 ulp (1.5 without FMA), right at ±Inf, NaN, overflow (above 88.72) and for denormal results.
 * x = n·ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts, the first short enough for n·part to be exact.
 * The polynomial is (e^r - 1 - r) / r^2, degree 5, a minimax fit. */
WORD vf v_exp(vf x) {
    x = v_min(v_set(89.0f), v_max(v_set(-105.0f), x)); /* constant first: NaN passes */
    vf n = v_round(v_mul(x, v_set(0x1.715476p+0f)));
    vf r = v_fnma(n, v_set(0x1.63p-1f), x);
    r = v_fnma(n, v_set(-0x1.bd0106p-13f), r);
    vf p = v_set(0x1.a1267ep-13f);
    p = v_fma(p, r, v_set(0x1.6d44e4p-10f));
    p = v_fma(p, r, v_set(0x1.1110e0p-7f));
    p = v_fma(p, r, v_set(0x1.5554e8p-5f));
    p = v_fma(p, r, v_set(0x1.555556p-3f));
    p = v_fma(p, r, v_set(0.5f));
    return v_ldexp(v_add(v_fma(v_mul(r, r), p, r), v_set(1.0f)), n);
}

#endif

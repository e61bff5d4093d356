"""Elementary functions of vectors, accurate to a few units in the last place.

Everything reduces an exponent ``t = n log 2 + r`` with whole ``n`` and ``abs(r) <= log(2)/2``
and evaluates one polynomial in ``r``.  Polynomials of float32 functions were fitted for the
smallest largest relative error over the reduced range (that error stands beside each);
those of float64 are Taylor series cut below 1e-17.

No function below uses a comparison to repair an infinity unless its docstring says so:
callers bound the arguments.
"""

from __future__ import annotations

import math

from .compiler import jit
from .simd import (
    HAS_SCALEF,
    fma,
    fraction32,
    log2_ratio_32,
    log_split64,
    pow2,
    remainder32,
    rint,
    rounded32,
    scalef32,
    unordered,
    vabs,
    vmax,
    where,
)

#: Helpers are inlined into the kernels that call them; only the large ones stay functions.
outline = jit()
inline = jit(forceinline=True)

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# log 2 in two parts: n * LN_2_HIGH is exact in float64 for every exponent n.
LN_2_HIGH = 0.6931471803691238
LN_2_LOW = 1.9082149292705877e-10

# --- float32 ---------------------------------------------------------------------------


@inline
def _exp2_32_portable(z):
    z = vmax(-127.0, z)  # where 2**n is 0
    n, s = rounded32(z, 1.0)
    r = z - n
    p = fma(r, 0.0013344198232516646, 0.009671825915575027)  # 7.0e-8 on [-1/2, 1/2]
    p = fma(p, r, 0.05550477281212807)
    p = fma(p, r, 0.24022231996059418)
    p = fma(p, r, 0.6931471824645996)
    p = fma(p, r, 1.0)
    return p * s


@inline
def _exp2_32_scalef(z):
    r = fraction32(z)
    p = fma(r, 0.0018562247278168797, 0.009042846038937569)  # 6.6e-8 on [0, 1]
    p = fma(p, r, 0.0557791143655777)
    p = fma(p, r, 0.24017098546028137)
    p = fma(p, r, 0.6931506991386414)
    p = fma(p, r, 1.0)
    return scalef32(p, z)


@inline
def _power_32_portable(n):
    return pow2(vmax(n, -126.0))


@inline
def _power_32_scalef(n):
    return scalef32(1.0, n)


@inline
def _whole_32_portable(t):
    n = rint(t)
    return n, t - n


@inline
def _whole_32_scalef(t):
    r = remainder32(t)
    return t - r, r


#: The whole number n that is nearest to t, and t - n, for finite t.
whole_32 = _whole_32_scalef if HAS_SCALEF else _whole_32_portable
#: 2**z for z <= 127: 0 far below (also at -inf), NaN at NaN; relative error 1.3e-7, portable 2e-7.
exp2_32 = _exp2_32_scalef if HAS_SCALEF else _exp2_32_portable
#: 2**n for whole n <= 127: 0, or next to it, far below.
power_32 = _power_32_scalef if HAS_SCALEF else _power_32_portable


@inline
def phi_32(t):
    """(2**t - 1)/log 2 - t >= 0 without cancellation, for t <= 126.

    With t = n + r, s = 2**n and 2**r = 1 + (r + u) log 2, where u = r**2 P(r), this is

        s u + [(s r + (s - 1)/log 2) - t]:

    where n = 0 the bracket is exactly 0, elsewhere nothing is lost because the result is not
    small.
    """
    n, r = whole_32(t)
    p = fma(r, 0.00022250396033731293, 0.0019305298518179372)  # 1.1e-7
    p = fma(p, r, 0.013876057354467354)
    p = fma(p, r, 0.08007507514766778)
    p = fma(p, r, 0.34657359027997264)
    s = power_32(n)
    return fma(s, r * r * p, fma(s, r, fma(s, LOG2_E, -LOG2_E)) - t)


#: Where ``near_phi_32`` holds: 2**t is between 1/5.7 and 5.7.
PHI_NEAR = 2.5


@inline
def near_phi_32(t, z):
    """phi_32(t)/z for z = t**2 and abs(t) <= PHI_NEAR, in two thirds of the instructions."""
    # Even and odd powers side by side: half as long to wait.
    even = fma(z, 1.0347294576718014e-08, 1.9085734948021127e-06)  # 2.7e-8
    odd = fma(z, 1.5595242075505666e-07, 2.196298009948805e-05)
    even = fma(even, z, 0.0002222130715381354)
    odd = fma(odd, z, 0.0019236966036260128)
    even = fma(even, z, 0.013876046054065228)
    odd = fma(odd, z, 0.0800754725933075)
    return fma(odd, t, fma(even, z, 0.3465735912322998))


@inline
def _reduced_32(t):
    """2**n and 2**r - 1 with t = n + r, for abs(t) <= 126."""
    n, r = whole_32(t)
    p = fma(r, 0.0001497050398029387, 0.001337212510406971)  # 5e-9
    p = fma(p, r, 0.00961929652839899)
    p = fma(p, r, 0.055504098534584045)
    p = fma(p, r, 0.24022650718688965)
    p = fma(p, r, 0.6931471824645996)
    return power_32(n), r * p


@inline
def exp2_minus_one_32(t):
    """2**t - 1 without cancellation, for abs(t) <= 126."""
    s, grown = _reduced_32(t)
    return fma(s, grown, s - 1.0)


@inline
def exp2_and_rest_32(tau):
    """2**-tau, and 1 - 2**-tau without cancellation, for 0 <= tau <= 126."""
    s, grown = _reduced_32(-tau)
    return fma(s, grown, s), fma(-s, grown, 1.0 - s)


@inline
def one_minus_exp2_32(tau):
    """1 - 2**-tau without cancellation, for 0 <= tau <= 126."""
    return exp2_and_rest_32(tau)[1]


# The functions of z = t**2 below hold for abs(t) <= NEAR (see ``polynomials``).  With
# x = t log(2)/2, half a log-ratio.  Their polynomials hold to 1e-7 each.


@inline
def near_cosh_32(z):
    """(cosh(x) - 1)/z."""
    p = fma(z, 5.332512209577089e-09, 2.4055050289462088e-06)  # 2.0e-8
    p = fma(p, z, 0.0006011361838318408)
    return fma(p, z, 0.06005662679672241)


@inline
def near_sinh_32(z):
    """sinh(x)/t."""
    p = fma(z, 1.2405344307353516e-07, 4.1630439227446914e-05)  # 9.3e-8
    p = fma(p, z, 0.006938101723790169)
    return fma(p, z, 0.3465735614299774)


@inline
def near_lag_32(z):
    """(x cosh(x) - sinh(x))/(t z)."""
    p = fma(z, 1.6438888028602605e-09, 7.145646350181778e-07)  # 2.6e-8
    p = fma(p, z, 0.00016667046293150634)
    return fma(p, z, 0.01387602649629116)


@inline
def near_js_32(z):
    """(x sinh(x) - cosh(x) log(cosh(x)))/z."""
    p = fma(z, -1.036074143145882e-10, 7.01186797513742e-09)  # 7.9e-8
    p = fma(p, z, -2.773200549199828e-07)
    p = fma(p, z, 1.2003277333860751e-05)
    p = fma(p, z, 2.999011172732935e-08)
    return fma(p, z, 0.060056623071432114)


@inline
def polynomial_32(t, z, coefficients):
    """One of ``polynomials`` at t, z = t**2."""
    c = coefficients
    # Even and odd powers side by side: half as long to wait.
    even = fma(z, c[10], c[8])
    odd = fma(z, c[11], c[9])
    even = fma(even, z, c[6])
    odd = fma(odd, z, c[7])
    even = fma(even, z, c[4])
    odd = fma(odd, z, c[5])
    even = fma(even, z, c[2])
    odd = fma(odd, z, c[3])
    even = fma(even, z, c[0])
    odd = fma(odd, z, c[1])
    return fma(odd, t, even)


@inline
def twice_atanh_32(s):
    """2 atanh(s) for abs(s) <= 0.2004; 1e-8."""
    z = s * s
    p = fma(z, 1 / 9, 1 / 7)
    p = fma(p, z, 1 / 5)
    p = fma(p, z, 1 / 3)
    return 2.0 * s * fma(p, z, 1.0)


@inline
def log_ratio_32(a, b, missing):
    """log(a/b) of normal float32 a <= b, where ``missing`` is b - a to full accuracy; 2e-7.

    With a = m 2**e and m/b between 2**-0.5861 and 2**0.5861, log(m/b) is 2 atanh((m - b)/(m + b)),
    of at most 0.2004.
    """
    e = log2_ratio_32(a, b)
    m = a * pow2(-e)
    return fma(e, LN_2, twice_atanh_32(where(e < 0.0, m - b, -missing) / (m + b)))


@inline
def log1p_32(g):
    """log(1 + g) for 0 <= g <= 1/4; 1e-8."""
    p = fma(g, -0.10168222337961197, 0.18768173456192017)
    p = fma(p, g, -0.2490830421447754)
    p = fma(p, g, 0.3333164155483246)
    p = fma(p, g, -0.49999991059303284)
    return g * fma(p, g, 1.0)


# --- float64 ---------------------------------------------------------------------------


@inline
def _reduce_64(t):
    """(n, r, u) with t = n log 2 + r and u = exp(r) - 1 - r; abs(t) <= 708."""
    n = rint(t * LOG2_E)
    r = fma(n, -LN_2_LOW, fma(n, -LN_2_HIGH, t))
    p = fma(r, 1 / 6227020800, 1 / 479001600)
    p = fma(p, r, 1 / 39916800)
    p = fma(p, r, 1 / 3628800)
    p = fma(p, r, 1 / 362880)
    p = fma(p, r, 1 / 40320)
    p = fma(p, r, 1 / 5040)
    p = fma(p, r, 1 / 720)
    p = fma(p, r, 1 / 120)
    p = fma(p, r, 1 / 24)
    p = fma(p, r, 1 / 6)
    p = fma(p, r, 0.5)
    return n, r, r * r * p


@inline
def exp_64(t):
    """exp(t) for t <= 708: 0 below -708 (also at -inf), NaN at NaN."""
    n, r, u = _reduce_64(vmax(-708.0, t))
    s = pow2(n)
    return where(t < -708.0, 0.0, fma(s, r + u, s))


@inline
def phi_64(t):
    """exp(t) - 1 - t >= 0 without cancellation, for finite t <= 708 (see phi_32)."""
    n, r, u = _reduce_64(vmax(t, -700.0))
    s = pow2(n)
    return fma(s, u, fma(s, r, s - 1.0) - t)


@inline
def expm1_64(t):
    """exp(t) - 1 without cancellation, for t <= 708."""
    n, r, u = _reduce_64(vmax(t, -700.0))
    s = pow2(n)
    return fma(s, r + u, s - 1.0)


@inline
def atanh_tail_64(s):
    """(atanh(s) - s)/s for abs(s) <= 0.172."""
    z = s * s
    p = fma(z, 1 / 23, 1 / 21)
    p = fma(p, z, 1 / 19)
    p = fma(p, z, 1 / 17)
    p = fma(p, z, 1 / 15)
    p = fma(p, z, 1 / 13)
    p = fma(p, z, 1 / 11)
    p = fma(p, z, 1 / 9)
    p = fma(p, z, 1 / 7)
    p = fma(p, z, 1 / 5)
    p = fma(p, z, 1 / 3)
    return p * z


@inline
def log_64(x):
    """log(x) of positive finite x; -inf at 0, NaN below and at NaN."""
    small = x < 2.2250738585072014e-308
    w = where(small, x * 18014398509481984.0, x)  # subnormal: times 2**54
    e = log_split64(w)
    m = w * pow2(-e)
    s = (m - 1.0) / (m + 1.0)
    e = where(small, e - 54.0, e)
    tail = fma(e, LN_2_LOW, 2.0 * s * atanh_tail_64(s))
    result = fma(e, LN_2_HIGH, 2.0 * s + tail)
    result = where(x == 0.0, -math.inf, result)
    return where(x < 0.0, math.nan, where(unordered(x, x), x, result))


@inline
def log1p_64(t):
    """log(1 + t) without cancellation, for t > -1; -inf at -1."""
    w = 1.0 + t
    # (w - 1) - t is what the addition rounded off.
    return where(w == 0.0, -math.inf, log_64(w) + (t - (w - 1.0)) / w)


@inline
def jensen_64(t):
    """(1 + t) log1p(t) - t >= 0 without cancellation, for finite t >= -1.

    With s = t/(2 + t): log1p(t) = 2 atanh(s), and the whole is
    2/(1 - s) [s**2 + (1 + s)(atanh(s) - s)].
    """
    s = t / (2.0 + t)
    near = 2.0 / (1.0 - s) * s * fma(1.0 + s, atanh_tail_64(s), s)
    far = fma(1.0 + t, where(t == -1.0, 0.0, log1p_64(t)), -t)
    return where(vabs(s) < 0.17, near, far)


# --- scalars ---------------------------------------------------------------------------


@inline
def phi(t):
    """exp(t) - 1 - t of one number."""
    return math.expm1(t) - t


@inline
def exp2_near_0(z):
    """2**z of one number, without a call to the library where z is as small as usual."""
    if abs(z) > 1e-4:
        return math.exp2(z)
    t = z * LN_2
    return 1.0 + t * (1.0 + t * (0.5 + t * (1.0 / 6.0)))


@inline
def psi(t):
    """1 - exp(t) + t exp(t) >= 0 of one number."""
    if t < -1.0:
        return 1.0 - math.exp(t) * (1.0 - t)
    return t * math.expm1(t) - phi(t)


@inline
def excess(a):
    """a - log1p(a) >= 0 of one number: what Jensen's inequality leaves."""
    return a - math.log1p(a)

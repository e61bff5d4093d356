"""KL divergence between Gaussians with diagonal covariance, and its gradients, in one read.

With t = log(variance of P / variance of Q), d the difference of the means and w = 1/variance of Q,

    KL = 1/2 sum [phi(t) + (d w) d],   phi(t) = exp(t) - 1 - t >= 0,

and the derivatives are d w and expm1(t)/2 with respect to mean and log-variance of P, and
-d w and -(expm1(t) + (d w) d)/2 with respect to those of Q.  Neither cancels.  Against the
standard normal distribution, d is the mean, t the log-variance and w is 1.

Exponents are natural here, because log-variances are given as such: what float32 rounds off from
t log2(e) would be t times as large in the result.  A row whose sum leaves the range of float32
becomes infinite or very small; the caller does it again in float64.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp_64, expm1_64, inline, phi_64, power_32
from .rowloop import BLOCK, f32
from .simd import (
    ITEMSIZE,
    LANES32,
    LANES64,
    f32v,
    f64v,
    fetch_add,
    fma,
    fold64,
    hsum,
    lanes_below,
    loader,
    peek_f64,
    poke_f64,
    prefetch,
    rint,
    splat32,
    splat64,
    storer,
    tail_loader,
    vmax,
    vmin,
    where,
)

#: How far ahead to ask for memory, in bytes.
AHEAD = 2048

# log 2 in two parts: n times the first is exact in float32 for every exponent n.
LN_2_HIGH_32 = 0.693145751953125
LN_2_LOW_32 = 1.4286068203094172e-06


@inline
def _reduce_32(t, lost):
    """(s, r, u) with t + lost = n log 2 + r, s = 2**n and u = exp(r) - 1 - r; 1.1e-7."""
    t = vmin(88.0, vmax(-100.0, t))  # NaN stays
    n = rint(t * LOG2_E)
    r = fma(n, -LN_2_LOW_32, fma(n, -LN_2_HIGH_32, t))
    # Where n = 0, r must be t, so that nothing but u is left of phi.
    r = r + where(n == 0.0, 0.0, lost)
    p = fma(r, 0.0013906263047829268, 0.008363242261111736)  # as phi_32, in base e
    p = fma(p, r, 0.04166675731539726)
    p = fma(p, r, 0.16666577756404874)
    p = fma(p, r, 0.5)
    return power_32(n), r, r * r * p


@inline
def phi_and_expm1_32(t, lost):
    """phi(t) and expm1(t) of t + lost; infinite from t = 88."""
    s, r, u = _reduce_32(t, lost)
    expm1 = fma(s, r + u, s - 1.0)
    phi = fma(s, u, fma(s, r, s - 1.0) - t)
    return where(t > 88.0, math.inf, phi), expm1


@inline
def exp_32(t):
    """exp(t); infinite from t = 88."""
    s, r, u = _reduce_32(t, splat32(0.0))
    return where(t > 88.0, math.inf, fma(s, r + u, s))


@inline
def phi_and_expm1_64(t, lost):
    bounded = vmin(700.0, t)
    return where(t > 700.0, math.inf, phi_64(bounded)), expm1_64(bounded)


@inline
def exp_or_inf_64(t):
    return where(t > 700.0, math.inf, exp_64(vmin(700.0, t)))


def build(dtype, prior, gradient):
    """Values of rows, or with ``gradient`` also their gradients, times a factor a row.

    ``prior``: Q is the standard normal distribution, and is not read.
    """
    wide = dtype == "float64"
    vector, lanes = (f64v, LANES64) if wide else (f32v, LANES32)
    splat = splat64 if wide else splat32
    functions = phi_and_expm1_64 if wide else phi_and_expm1_32
    exponential = exp_or_inf_64 if wide else exp_32
    load, load_tail = loader(dtype, vector), tail_loader(dtype, vector)
    store, store_tail = storer(dtype)
    size = ITEMSIZE[dtype]

    @inline
    def widened(x):
        return x if wide else fold64(x)

    @inline
    def narrowed(x):
        return x if wide else f32(x)

    @inline
    def read(at, j, n):
        """The next n entries of an array; 0 in the lanes beyond them, where every term is 0."""
        if n == lanes:
            prefetch(at + j * size + AHEAD)
            return load(at + j * size)
        x = load_tail(at + j * size, n)
        return where(lanes_below(x, n), x, 0.0)

    @inline
    def write(at, j, n, x):
        if n == lanes:
            store(at + j * size, x)
        else:
            store_tail(at + j * size, x, n)

    @inline
    def terms(mp, lp, mq, lq, j, n):
        """(phi, d w, d, expm1) of one vector."""
        m, own = read(mp, j, n), read(lp, j, n)
        if prior:
            phi, expm1 = functions(own, splat(0.0))
            return phi, m, m, expm1
        other = read(lq, j, n)
        t = own - other
        back = t - own
        lost = (own - (t - back)) - (other + back)
        phi, expm1 = functions(t, lost)
        d = m - read(mq, j, n)
        return phi, d * exponential(-other), d, expm1

    @inline
    def step(mp, lp, mq, lq, into, j, n, scale, half, s):
        """Add one vector to the sum, and write its gradients."""
        phi, g, d, e = terms(mp, lp, mq, lq, j, n)
        if gradient:
            write(into[0], j, n, g * scale)
            write(into[1], j, n, e * half)
            if not prior:
                write(into[2], j, n, g * -scale)
                write(into[3], j, n, fma(g, d, e) * -half)
        return s + fma(g, d, phi)

    def kernel(
        mean_p, mean_p_stride, logvar_p, logvar_p_stride,
        mean_q, mean_q_stride, logvar_q, logvar_q_stride,
        width, n_rows, counter, chunk, parts, part_width, out, scales,
        into_mean_p, into_logvar_p, into_mean_q, into_logvar_q,
    ):  # fmt: skip
        n_tasks = n_rows * parts
        while True:
            first = fetch_add(counter, chunk)
            if first >= n_tasks:
                return
            for task in range(first, min(first + chunk, n_tasks)):
                row = task // parts
                start = (task - row * parts) * part_width
                stop = min(start + part_width, width)
                mp = mean_p + row * mean_p_stride
                lp = logvar_p + row * logvar_p_stride
                mq = mean_q + row * mean_q_stride
                lq = logvar_q + row * logvar_q_stride
                skip = row * width * size
                into = (
                    into_mean_p + skip, into_logvar_p + skip,
                    into_mean_q + skip, into_logvar_q + skip,
                )  # fmt: skip
                scale = narrowed(peek_f64(scales + 8 * row)) if gradient else narrowed(0.0)
                half = scale * narrowed(0.5)
                total = splat64(0.0)
                j = start
                while j < stop:
                    last = min(stop, j + BLOCK)
                    s = splat(0.0)
                    while j + lanes <= last:
                        s = step(mp, lp, mq, lq, into, j, lanes, scale, half, s)
                        j += lanes
                    if j < last:
                        s = step(mp, lp, mq, lq, into, j, last - j, scale, half, s)
                        j = last
                    total = total + widened(s)
                poke_f64(out + 8 * task, 0.5 * hsum(total))

    return kernel

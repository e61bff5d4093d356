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

from .mathematics import LOG2_E, exp_64, expm1_64, inline, phi_64
from .rowloop import BLOCK, UNDERFLOW, f32
from .simd import (
    ITEMSIZE,
    LANES32,
    LANES64,
    f32v,
    f64v,
    fetch_add,
    fma,
    fold64,
    hany,
    hsum,
    lane_sums,
    lanes_below,
    loader,
    narrow_store,
    narrowed32,
    peek_f64,
    poke_f64,
    prefetch,
    rounded32,
    scratch,
    splat32,
    splat64,
    storer,
    tail_loader,
    vmax,
    vmin,
    where,
)

#: How far ahead to ask for memory, in bytes.
AHEAD = 4096

area = scratch(4 * LANES32 * LANES32)
store32, store_tail32 = storer("float32")
poke_f32 = narrow_store("float32")

# log 2 in two parts: n times the first is exact in float32 for every exponent n.
LN_2_HIGH_32 = 0.693145751953125
LN_2_LOW_32 = 1.4286068203094172e-06


@inline
def _reduce_32(t):
    """(n, s, r) with t = n log 2 + r and s = 2**n, for t <= 88; below -87 as there."""
    t = vmax(-87.0, t)  # NaN stays
    n, s = rounded32(t, LOG2_E)
    return n, s, fma(n, -LN_2_LOW_32, fma(n, -LN_2_HIGH_32, t))


@inline
def _rest_32(r):
    """exp(r) - 1 - r; 1.1e-7."""
    p = fma(r, 0.0013906263047829268, 0.008363242261111736)  # as phi_32, in base e
    p = fma(p, r, 0.04166675731539726)
    p = fma(p, r, 0.16666577756404874)
    p = fma(p, r, 0.5)
    return r * r * p


@inline
def phi_and_expm1_32(t, lost):
    """phi(t) and expm1(t) of t + lost, for t <= 88."""
    n, s, r = _reduce_32(t)
    # Where n = 0, r must be t, so that nothing but u is left of phi.
    r = r + where(n == 0.0, 0.0, lost)
    u = _rest_32(r)
    return fma(s, u, fma(s, r, s - 1.0) - t), fma(s, r + u, s - 1.0)


@inline
def phi_and_expm1_exact_32(t, lost):
    """The same of a t that nothing was lost of."""
    n, s, r = _reduce_32(t)
    u = _rest_32(r)
    return fma(s, u, fma(s, r, s - 1.0) - t), fma(s, r + u, s - 1.0)


@inline
def exp_32(t):
    """exp(t) for t <= 88."""
    n, s, r = _reduce_32(t)
    return fma(s, r + _rest_32(r), s)


@inline
def phi_and_expm1_64(t, lost):
    """phi(t) and expm1(t), for t <= 700."""
    bounded = vmin(700.0, t)
    return phi_64(bounded), expm1_64(bounded)


@inline
def exp_or_less_64(t):
    """exp(t) for t <= 700."""
    return exp_64(vmin(700.0, t))


def build(dtype, prior, gradient):
    """Values of rows, or with ``gradient`` also their gradients, times a factor a row.

    Values are in float64 if entries are, as are those of parts of rows, and else in float32.

    ``prior``: Q is the standard normal distribution, and is not read.  ``doubtful`` becomes 1 where
    a value, or a part of it, is not within the range of float32.
    """
    wide = dtype == "float64"
    vector, lanes = (f64v, LANES64) if wide else (f32v, LANES32)
    splat = splat64 if wide else splat32
    exact = phi_and_expm1_exact_32 if prior else phi_and_expm1_32
    functions = phi_and_expm1_64 if wide else exact
    exponential = exp_or_less_64 if wide else exp_32
    largest = 700.0 if wide else 88.0
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
    def terms(mp, lp, mq, lq, j, n, high):
        """(phi, d w, d, expm1) of one vector, and the largest exponent so far."""
        m, own = read(mp, j, n), read(lp, j, n)
        if prior:
            phi, expm1 = functions(own, splat(0.0))
            return phi, m, m, expm1, vmax(own, high)
        other = read(lq, j, n)
        t = own - other
        back = t - own
        lost = (own - (t - back)) - (other + back)
        phi, expm1 = functions(t, lost)
        d = m - read(mq, j, n)
        return phi, d * exponential(-other), d, expm1, vmax(-other, vmax(t, high))

    @inline
    def step(mp, lp, mq, lq, into, j, n, scale, half, s, high):
        """Add one vector to the sum, and write its gradients."""
        phi, g, d, e, high = terms(mp, lp, mq, lq, j, n, high)
        if gradient:
            write(into[0], j, n, g * scale)
            write(into[1], j, n, e * half)
            if not prior:
                write(into[2], j, n, g * -scale)
                write(into[3], j, n, fma(g, d, e) * -half)
        return s + fma(g, d, phi), high

    @inline
    def block(row, start, stop, pointers, scales):
        """The sums of the entries [start, stop) of a row in the lanes of a vector.

        Infinite where an exponential was, which is what gradients are computed again for.
        """
        (mean_p, logvar_p, mean_q, logvar_q), strides, into, skip = pointers
        mp = mean_p + row * strides[0]
        lp = logvar_p + row * strides[1]
        mq = mean_q + row * strides[2]
        lq = logvar_q + row * strides[3]
        row_into = (
            into[0] + row * skip, into[1] + row * skip, into[2] + row * skip, into[3] + row * skip,
        )  # fmt: skip
        scale = narrowed(peek_f64(scales + 8 * row)) if gradient else narrowed(0.0)
        half = scale * narrowed(0.5)
        s = splat(0.0)
        high = s
        j = start
        while j + lanes <= stop:
            s, high = step(mp, lp, mq, lq, row_into, j, lanes, scale, half, s, high)
            j += lanes
        if j < stop:
            s, high = step(mp, lp, mq, lq, row_into, j, stop - j, scale, half, s, high)
        return where(high > largest, math.inf, s)

    @inline
    def inside(sums):
        """Where sums are within the range that float32 terms have."""
        return (sums > 2.0 * UNDERFLOW) & (sums < math.inf)

    def kernel(
        mean_p, mean_p_stride, logvar_p, logvar_p_stride,
        mean_q, mean_q_stride, logvar_q, logvar_q_stride,
        width, n_rows, counter, chunk, parts, part_width, out, doubtful, scales,
        into_mean_p, into_logvar_p, into_mean_q, into_logvar_q,
    ):  # fmt: skip
        pointers = (
            (mean_p, logvar_p, mean_q, logvar_q),
            (mean_p_stride, logvar_p_stride, mean_q_stride, logvar_q_stride),
            (into_mean_p, into_logvar_p, into_mean_q, into_logvar_q),
            width * size,
        )
        n_tasks = n_rows * parts
        rows = area()
        while True:
            first = fetch_add(counter, chunk)
            if first >= n_tasks:
                return
            last = min(first + chunk, n_tasks)
            if not wide and width <= BLOCK:
                # Narrow rows: sums over the lanes of 16 rows at a time.
                for start in range(first, last, LANES32):
                    count = min(LANES32, last - start)
                    for i in range(count):
                        sums = block(start + i, 0, width, pointers, scales)
                        store32(rows + 4 * LANES32 * i, sums)
                    low, high = lane_sums(rows)
                    store_tail32(out + 4 * start, narrowed32(low * 0.5, high * 0.5), count)
                    outside = ~inside(low) & lanes_below(low, count)
                    if hany(outside | (~inside(high) & lanes_below(high, count - LANES64))):
                        poke_f64(doubtful, 1.0)
                continue
            for task in range(first, last):
                row = task // parts
                start = (task - row * parts) * part_width
                stop = min(start + part_width, width)
                total = splat64(0.0)
                for j in range(start, stop, BLOCK):
                    sums = block(row, j, min(j + BLOCK, stop), pointers, scales)
                    total = total + widened(sums)
                value = 0.5 * hsum(total)
                if wide or parts > 1:
                    poke_f64(out + 8 * task, value)
                else:
                    poke_f32(out + 4 * task, value)
                if not (value > UNDERFLOW and value < math.inf):
                    poke_f64(doubtful, 1.0)

    return kernel

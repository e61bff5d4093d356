"""Mean and variance of an estimate of KL over samples, from one read of their log-probabilities.

The estimator "mean" is the first array itself; the second is not read then.

Squares are taken about the first value of a part, so that nothing is lost where the mean is large
beside the spread.
"""

from __future__ import annotations

import math

from .mathematics import inline, phi_64
from .simd import (
    ITEMSIZE,
    LANES64,
    f64v,
    fetch_add,
    fma,
    hmax,
    hsum,
    lanes_below,
    loader,
    poke_f64,
    prefetch,
    splat64,
    tail_loader,
    vmin,
    where,
)


def build(dtype, estimator):
    load, load_tail = loader(dtype, f64v), tail_loader(dtype, f64v)
    size = ITEMSIZE[dtype]

    @inline
    def estimate(p, q):
        """k1, k2 or k3 of r = log p - log q; 0 where both are the same, also at -inf."""
        if estimator == "mean":
            return p
        r = where(p == q, 0.0, p - q)
        if estimator == "k1":
            return r
        if estimator == "k2":
            return r * r * 0.5
        k3 = phi_64(vmin(700.0, -r))
        return where(r == math.inf, math.inf, where(r < -700.0, math.inf, k3))

    def kernel(p, p_stride, q, q_stride, width, n_rows, counter, parts, part_width, out):
        n_tasks = n_rows * parts
        while True:
            task = fetch_add(counter, 1)
            if task >= n_tasks:
                return
            row = task // parts
            start = (task - row * parts) * part_width
            n = min(part_width, width - start)
            x = p + row * p_stride + start * size
            y = q + row * q_stride + start * size
            only = lanes_below(splat64(0.0), 1)
            first = estimate(load_tail(x, 1), load_tail(y, 1))
            origin = hmax(where(only, first, -math.inf))
            if not abs(origin) < math.inf:
                origin = 0.0
            total, squares = splat64(0.0), splat64(0.0)
            j = 0
            while j + LANES64 <= n:
                prefetch(x + j * size + 2048)
                prefetch(y + j * size + 2048)
                v = estimate(load(x + j * size), load(y + j * size)) - origin
                total = total + v
                squares = fma(v, v, squares)
                j += LANES64
            if j < n:
                v = estimate(load_tail(x + j * size, n - j), load_tail(y + j * size, n - j))
                v = where(lanes_below(v, n - j), v - origin, 0.0)
                total = total + v
                squares = fma(v, v, squares)
            mean = hsum(total) / n
            poke_f64(out + 16 * task, origin + mean)
            poke_f64(out + 16 * task + 8, hsum(squares) - n * mean * mean)

    return kernel

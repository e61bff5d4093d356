"""All pairs of two tables of rows: sums over the vocabulary that are no matrix product.

A task is a few rows of the first table against many of the second, a part of the vocabulary at a
time: four rows of the second are in the first-level cache while the rows of the first pass by.
The tables hold p for the total variation and log2 p for Jensen-Shannon, in float32, a whole number
of vectors wide; what is added for that is 0 or -inf and has no weight.
"""

from __future__ import annotations

from .mathematics import exp2_32, inline
from .normalization import FAR
from .rowloop import BLOCK
from .simd import (
    LANES32,
    f32v,
    fetch_add,
    fold64,
    hsum,
    loader,
    peek_f64,
    poke_f64,
    splat32,
    vabs,
    vmax,
    vmin,
)
from .two_phase import k_js

#: Rows of the first and the second table in a task.
FEW, MANY = 8, 32

_load = loader("float32", f32v)


@inline
def tv(x, y):
    """abs(p - q)/2 of probabilities."""
    return vabs(x - y) * 0.5


@inline
def js(x, y):
    """max(p, q) k(tau) of logarithms in base 2 (see two_phase)."""
    return exp2_32(vmax(x, y)) * k_js(vmin(vabs(x - y), FAR))


INTEGRANDS = {"tv": tv, "js": js}


def build(operation):
    """Add the sums over ``width`` entries to ``out``, of shape (n, m).

    ``triangle``: both tables are the same; pairs far below the diagonal are left out.
    """
    integrand = INTEGRANDS[operation]

    @inline
    def four(x, y, stride, start, stop):
        """Sums of one row against four that follow each other."""
        a = splat32(0.0)
        b = a
        c = a
        d = a
        for j in range(4 * start, 4 * stop, 4 * LANES32):
            p = _load(x + j)
            a = a + integrand(p, _load(y + j))
            b = b + integrand(p, _load(y + j + stride))
            c = c + integrand(p, _load(y + j + 2 * stride))
            d = d + integrand(p, _load(y + j + 3 * stride))
        return hsum(fold64(a)), hsum(fold64(b)), hsum(fold64(c)), hsum(fold64(d))

    @inline
    def one(x, y, start, stop):
        a = splat32(0.0)
        for j in range(4 * start, 4 * stop, 4 * LANES32):
            a = a + integrand(_load(x + j), _load(y + j))
        return hsum(fold64(a))

    def kernel(x, n, y, m, width, counter, out, triangle):
        stride = 4 * width
        across = (m + MANY - 1) // MANY
        tasks = (n + FEW - 1) // FEW * across
        while True:
            task = fetch_add(counter, 1)
            if task >= tasks:
                return
            top = task // across * FEW
            left = (task - task // across * across) * MANY
            bottom, right = min(top + FEW, n), min(left + MANY, m)
            if triangle and right <= top:
                continue
            for column in range(left, right, 4):
                at = y + column * stride
                for start in range(0, width, BLOCK):
                    stop = min(start + BLOCK, width)
                    for row in range(top, bottom):
                        own = x + row * stride
                        to = out + 8 * (row * m + column)
                        if column + 4 <= right:
                            sums = four(own, at, stride, start, stop)
                            for i in range(4):
                                poke_f64(to + 8 * i, peek_f64(to + 8 * i) + sums[i])
                        else:
                            for i in range(right - column):
                                value = one(own, at + i * stride, start, stop)
                                poke_f64(to + 8 * i, peek_f64(to + 8 * i) + value)

    return kernel

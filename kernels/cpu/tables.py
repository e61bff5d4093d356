"""Tables of a part of the vocabulary, of many rows, and what there is to sum for each of them.

With u = (x - c)/T - rest, which is log p but for a constant of the row: exp(u) ("probs"), a power
of it ("powers") or u times a factor ("logs"), where entries of -inf have the logarithm ``nothing``;
and the sums of exp(u), which say what the constant is, and with "probs" of exp(u) u.  Float32, for
`pairwise`.

Rows lie in panels of 16, whose entries of one index follow each other: a vector has a lane for each
row, with a reference and sums of its own.  The lanes of a last panel that has fewer rows are those
of the last row again.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp2_32, inline
from .rowloop import f32
from .simd import (
    ITEMSIZE,
    LANES32,
    add64,
    f32v,
    fetch_add,
    fma,
    hany,
    lane_is,
    loader,
    poke_f64,
    scratch,
    splat32,
    store,
    tail_loader,
    transpose,
    where,
)

square = scratch(4 * LANES32 * LANES32)
turned = scratch(4 * LANES32 * LANES32)
_load = loader("float32", f32v)


def filler(dtype, kind):
    """A function that writes the table of one panel, adds its sums, and returns lanes with -inf.

    ``at`` is the address of the first of ``width`` entries of the first of ``rows`` rows; ``c`` and
    ``rest`` have a lane for each row, ``masses`` and ``own`` are addresses of their sums.
    """
    load, load_tail = loader(dtype, f32v), tail_loader(dtype, f32v)
    size = ITEMSIZE[dtype]

    @inline
    def turn(x, x_stride, rows, n, area, columns):
        """Write the next n entries of 16 rows to ``columns``, those of an index in a vector."""
        for i in range(LANES32):
            at = x + min(i, rows - 1) * x_stride
            if n == LANES32:
                store(area + 4 * LANES32 * i, load(at))
            else:
                store(area + 4 * LANES32 * i, load_tail(at, n))
        transpose(area, columns)

    @inline
    def power(z, zero):
        """2**z, and 0 for an entry that is."""
        return where(zero, 0.0, where(z > 127.0, math.inf, exp2_32(z)))

    @inline
    def fill(
        at, x_stride, rows, width, c, rest, target, masses, own, it, factor, nothing, area, columns
    ):
        multiple, exponent, nought = f32(factor), f32(factor * LOG2_E), f32(nothing)
        empty = lane_is(c, -1)
        for j in range(0, width, LANES32):
            count = min(LANES32, width - j)
            turn(at + j * size, x_stride, rows, count, area, columns)
            mass, total = splat32(0.0), splat32(0.0)
            for i in range(count):
                entry = _load(columns + 4 * LANES32 * i)
                to = target + 4 * LANES32 * (j + i)
                zero = entry == -math.inf
                empty = empty | zero
                u = fma(entry - c, it, -rest)
                e = power(u * LOG2_E, zero)
                mass = mass + e
                if kind == "probs":
                    total = total + where(zero, 0.0, e * u)
                    store(to, e)
                elif kind == "powers":
                    store(to, power(u * exponent, zero))
                else:
                    store(to, where(zero, nought, u * multiple))
            add64(masses, mass)
            if kind == "probs":
                add64(own, total)
        return empty

    return fill


def build(dtype, kind):
    size = ITEMSIZE[dtype]
    fill = filler(dtype, kind)

    def kernel(
        x, x_stride, n, start, stop, counter, references, rests, table, padded, masses, own, zeros,
        inverse_temperature, factor, nothing,
    ):  # fmt: skip
        it = f32(inverse_temperature)
        area, columns = square(), turned()
        while True:
            first = LANES32 * fetch_add(counter, 1)
            if first >= n:
                return
            empty = fill(
                x + first * x_stride + start * size, x_stride, min(LANES32, n - first),
                stop - start, _load(references + 4 * first), _load(rests + 4 * first),
                table + 4 * first * padded, masses + 8 * first, own + 8 * first,
                it, factor, nothing, area, columns,
            )  # fmt: skip
            if hany(empty):
                poke_f64(zeros, 1.0)

    return kernel

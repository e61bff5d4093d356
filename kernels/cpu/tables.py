"""Tables of a part of the vocabulary, of many rows whose normalizers are known.

With u = (x - c)/T - rest, which is log p: powers exp(order u), and u itself times a factor, where
entries of -inf become ``nothing``; with the powers the sum of powers times u, and whether a row has
an entry of -inf.  Float32, for `pairwise`.

Rows lie in panels of 16, whose entries of one index follow each other: a vector has a lane for each
row, with a reference and sums of its own.  The lanes of a last panel that has fewer rows are those
of the last row again.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp2_32, inline
from .rowloop import BLOCK, f32
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


def build(dtype, has_powers, has_logs):
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

    def kernel(
        x, x_stride, n, start, stop, counter, references, rests, powers, logs, padded, own, zeros,
        inverse_temperature, order, factor, nothing,
    ):  # fmt: skip
        it, exponent, multiple = f32(inverse_temperature), f32(order * LOG2_E), f32(factor)
        filler = f32(nothing)
        area, columns = square(), turned()
        width = stop - start
        while True:
            first = LANES32 * fetch_add(counter, 1)
            if first >= n:
                return
            at = x + first * x_stride + start * size
            c, rest = _load(references + 4 * first), _load(rests + 4 * first)
            target = 4 * first * padded
            empty = lane_is(c, -1)
            for block in range(0, width, BLOCK):
                total = splat32(0.0)
                for j in range(block, min(block + BLOCK, width), LANES32):
                    count = min(LANES32, width - j)
                    turn(at + j * size, x_stride, min(LANES32, n - first), count, area, columns)
                    for i in range(count):
                        entry = _load(columns + 4 * LANES32 * i)
                        to = target + 4 * LANES32 * (j + i)
                        zero = entry == -math.inf
                        empty = empty | zero
                        u = fma(entry - c, it, -rest)
                        if has_powers:
                            z = u * exponent
                            e = where(zero, 0.0, where(z > 127.0, math.inf, exp2_32(z)))
                            total = total + where(zero, 0.0, e * u)
                            store(powers + to, e)
                        if has_logs:
                            store(logs + to, where(zero, filler, u * multiple))
                if has_powers:
                    add64(own + 8 * first, total)
            if hany(empty):
                poke_f64(zeros, 1.0)

    return kernel

"""Tables of a part of the vocabulary, of many rows whose normalizers are known.

With u = (x - c)/T - rest, which is log p: powers exp(order u), and u itself times a factor, where
entries of -inf (and the padding to whole vectors) become ``nothing``; with them the sum of powers
times u, and whether a row has an entry of -inf.  Float32, for `pairwise`.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp2_32
from .rowloop import BLOCK, f32
from .simd import (
    ITEMSIZE,
    LANES32,
    f32v,
    fetch_add,
    fma,
    fold64,
    hany,
    hsum,
    lane_is,
    lanes_below,
    loader,
    peek_f64,
    poke_f64,
    prefetch,
    splat32,
    splat64,
    store,
    tail_loader,
    where,
)

#: Rows that a thread takes at a time.
ROWS = 8


def build(dtype):
    load, load_tail = loader(dtype, f32v), tail_loader(dtype, f32v)
    size = ITEMSIZE[dtype]

    def kernel(
        x, x_stride, n, start, stop, counter, shifts, powers, logs, padded, own, zeros,
        inverse_temperature, order, factor, nothing,
    ):  # fmt: skip
        it, exponent, multiple = f32(inverse_temperature), f32(order * LOG2_E), f32(factor)
        filler = f32(nothing)
        while True:
            first = fetch_add(counter, ROWS)
            if first >= n:
                return
            for row in range(first, min(first + ROWS, n)):
                at = x + row * x_stride + start * size
                c, rest = f32(peek_f64(shifts + 16 * row)), f32(peek_f64(shifts + 16 * row + 8))
                power, log = powers + 4 * row * padded, logs + 4 * row * padded
                width = stop - start
                total = splat64(0.0)
                empty = lane_is(splat32(0.0), -1)
                block = 0
                while block < width:
                    last = min(block + BLOCK, width)
                    s = splat32(0.0)
                    for j in range(block, last, LANES32):
                        prefetch(at + j * size + 2048)
                        if j + LANES32 <= width:
                            entry = load(at + j * size)
                            zero = entry == -math.inf
                            empty = empty | zero
                        else:
                            entry = load_tail(at + j * size, width - j)
                            zero = entry == -math.inf
                            empty = empty | (zero & lanes_below(entry, width - j))
                        u = fma(entry - c, it, -rest)
                        z = u * exponent
                        e = where(zero, 0.0, where(z > 127.0, math.inf, exp2_32(z)))
                        v = where(zero, filler, u * multiple)
                        s = s + where(zero, 0.0, e * v)
                        if powers != 0:
                            store(power + 4 * j, e)
                        if logs != 0:
                            store(log + 4 * j, v)
                    total = total + fold64(s)
                    block = last
                poke_f64(own + 8 * row, peek_f64(own + 8 * row) + hsum(total))
                if hany(empty):
                    poke_f64(zeros, 1.0)

    return kernel

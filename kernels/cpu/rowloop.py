"""What every row kernel shares: addresses of rows, tiles, maxima, tasks."""

from __future__ import annotations

import functools

from numba import types
from numba.core.extending import intrinsic

from .mathematics import inline, outline
from .simd import (
    ITEMSIZE,
    LANES32,
    any_order,
    f32v,
    first,
    first_lane,
    hany,
    hmax,
    peek_f64,
    peek_i64,
    prefetch,
    splat32,
    tail_loader,
    vmax,
)

#: Entries in a tile, whose maximum is known before they are summed.  Two float32 tiles of each
#: array (the one at work and the one being prefetched) fit in L1.
TILE = 2048

#: Entries that are summed in float32 before they go to float64: 32 additions in a lane.  (Equal
#: terms, as masked or flat rows have, round the same way every time.)
BLOCK = 512

#: How far ahead to ask for memory: the whole next tile must be there when its maximum is
#: looked for, and its last entries a while earlier.
AHEAD = TILE + TILE // 2

#: Numbers that describe a row on its own.  With m the largest entry and k its first index:
#: m;  S = sum exp(x - m) and U = sum (m - x) exp(x - m) over all indices but k;  k;  and
#: x - m of the row's token, where tokens are given.
STATISTICS = 5

#: Results below this may have lost terms to float32's exponent range: unless the rows are
#: equal, such a row is left to the float64 kernel.
UNDERFLOW = 1e-30


@inline
def row_address(base, stride, offsets, row):
    """Address of a row: ``stride`` bytes apart, or at an offset of its own where given."""
    if offsets != 0:
        return base + peek_i64(offsets + 8 * row)
    return base + row * stride


@inline
def task_row(rows, number):
    """The row that is task ``number``: all of them, or those that ``rows`` lists."""
    if rows != 0:
        return peek_i64(rows + 8 * number)
    return number


def _rounding(to):
    @intrinsic
    def cast(typingctx, x):
        def codegen(context, builder, sig, args):
            return context.cast(builder, args[0], sig.args[0], to)

        return to(x), codegen

    return cast


#: Round a number to float32; widen one to float64 (Numba's ``float`` keeps float32).
f32 = _rounding(types.float32)
f64 = _rounding(types.float64)


@inline
def halves(x):
    """A float64 number in float32, and what that cannot hold of it."""
    high = f32(x)
    return high, f32(x - f64(high))


@functools.cache
def passes(dtype):
    """The passes over one array of ``dtype`` that look for its largest entry.

    ``tile_max(row, start, stop)`` gives the maximum of the entries [start, stop), NaN
    ignored; ``find(row, start, stop, value)`` the index of the first entry equal to value.
    """
    vector, splat, load = any_order(dtype)
    load_tail = tail_loader(dtype, f32v)
    size = ITEMSIZE[dtype]
    lanes = vector.lanes

    @inline
    def tile_max(row, start, stop):
        m0 = splat(-float("inf"))
        m1 = m0
        m2 = m0
        m3 = m0
        rest = splat32(-float("inf"))
        j = start
        while j + 4 * lanes <= stop:
            at = row + j * size
            m0 = vmax(load(at), m0)
            m1 = vmax(load(at + lanes * size), m1)
            m2 = vmax(load(at + 2 * lanes * size), m2)
            m3 = vmax(load(at + 3 * lanes * size), m3)
            j += 4 * lanes
        while j + lanes <= stop:
            m0 = vmax(load(row + j * size), m0)
            j += lanes
        while j < stop:
            rest = vmax(load_tail(row + j * size, stop - j), rest)
            j += LANES32
        return max(hmax(vmax(vmax(m0, m1), vmax(m2, m3))), hmax(rest))

    @inline
    def find(row, start, stop, value):
        j = start
        while j < stop:
            lane = first_lane(load_tail(row + j * size, stop - j) == value)
            if lane < LANES32:
                return j + lane
            j += LANES32
        return start

    return tile_max, find


@functools.cache
def first_top(dtype):
    """An inlined ``first_top(row, width)``: the largest entry of a row and its first index."""
    tile_max, find = passes(dtype)

    @inline
    def largest(row, width):
        top = -float("inf")
        found = 0
        for start in range(0, width, TILE):
            m = f64(tile_max(row, start, min(start + TILE, width)))
            if m > top:
                top = m
                found = start
        return top, find(row, found, min(found + TILE, width), f32(top))

    return largest


@functools.cache
def entry(dtype):
    """An inlined ``entry(row, j)``: one entry as a float64 number."""
    load_tail = tail_loader(dtype, f32v)
    size = ITEMSIZE[dtype]

    @inline
    def get(row, j):
        return f64(first(load_tail(row + j * size, 1)))

    return get


@functools.cache
def ahead(dtype):
    """An inlined ``ahead(row, j)``: asks for the cache line AHEAD entries further on."""
    size = ITEMSIZE[dtype]

    @inline
    def ask(row, j):
        prefetch(row + (j + AHEAD) * size)

    return ask


@functools.cache
def comparison(dtype_p, dtype_q):
    """An inlined ``differ(x, y, width)``: whether two rows differ anywhere, as numbers."""
    load_p, load_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]

    @outline
    def differ(x, y, width):
        for j in range(0, width, LANES32):
            p = load_p(x + j * size_p, width - j)
            if hany(p != load_q(y + j * size_q, width - j)):
                return True
        return False

    return differ


@inline
def coefficients_at(at):
    """Those of a polynomial (see ``polynomials``) in memory, as float32 numbers."""
    return (
        f32(peek_f64(at)), f32(peek_f64(at + 8)), f32(peek_f64(at + 16)), f32(peek_f64(at + 24)),
        f32(peek_f64(at + 32)), f32(peek_f64(at + 40)), f32(peek_f64(at + 48)),
        f32(peek_f64(at + 56)), f32(peek_f64(at + 64)), f32(peek_f64(at + 72)),
        f32(peek_f64(at + 80)), f32(peek_f64(at + 88)),
    )  # fmt: skip

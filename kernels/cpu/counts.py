"""Divergence of two rows of counts from each other, and what corrections of it need.

With counts w and v (a constant added to each, if asked for), their totals W and U, p = w/W and
q = v/U, the ratio q/p is 1 + x with x = (v W - w U)/(w U), whose numerator is exact, so that the
terms

    p (x - log1p(x)) >= 0

of KL(P, Q) do not cancel; a symbol that only Q has adds q.  The first read finds the totals, the
second the terms.  A term depends on its two counts alone, and most counts are small: of long rows
of integers the terms of all pairs of counts below SMALL are tabulated first, and vectors of such
counts look theirs up.

Written for each row are KL; the totals of both; how many symbols P has, Q has, only P has; the sum
of p (1-q)/q over the symbols of Q, or 0 where not asked for; and the smallest count of either.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import cgutils
from numba.core.extending import intrinsic

from .family import COUNT_COLUMNS
from .mathematics import atanh_tail_64, inline, log_64
from .simd import (
    ITEMSIZE,
    LANES64,
    f64v,
    fetch_add,
    fma,
    hany,
    hmax,
    hsum,
    lanes_below,
    poke_f64,
    prefetch,
    scratch,
    splat64,
    storer,
    tail_loader,
    vabs,
    vmax,
    vmin,
    where,
)

INTEGERS = {"int32": 4, "int64": 8}

#: Counts below this are looked up: a table of SMALL**2 terms stays in the first-level cache.
SMALL = 48
#: Rows from this width on are worth a table, which takes as long as SMALL**2 of their entries.
WIDE = 4 * SMALL * SMALL

values_table = scratch(8 * SMALL * SMALL)
spread_table = scratch(8 * SMALL * SMALL)
store, _ = storer("float64")


@intrinsic
def lane_numbers(typingctx):
    """0, 1, 2, ... as a float64 vector."""

    def codegen(context, builder, sig, args):
        return ir.Constant(f64v.llvm, [float(i) for i in range(LANES64)])

    return f64v(), codegen


@intrinsic
def look_up(typingctx, table, row, column):
    """The entries of a table of SMALL columns for vectors of whole numbers as float64."""

    def codegen(context, builder, sig, args):
        i32, i64 = ir.IntType(32), ir.VectorType(ir.IntType(64), LANES64)
        i1 = ir.VectorType(ir.IntType(1), LANES64)
        rows, columns = (builder.fptosi(each, i64) for each in args[1:])
        index = builder.add(builder.mul(rows, ir.Constant(i64, [SMALL] * LANES64)), columns)
        first = builder.insert_element(ir.Constant(i64, ir.Undefined), args[0], i32(0))
        zeros = ir.Constant(ir.VectorType(i32, LANES64), [0] * LANES64)
        base = builder.shuffle_vector(first, ir.Constant(i64, ir.Undefined), zeros)
        index = builder.shl(index, ir.Constant(i64, [3] * LANES64))
        pointers = ir.VectorType(ir.DoubleType().as_pointer(), LANES64)
        places = builder.inttoptr(builder.add(base, index), pointers)
        none = ir.Constant(f64v.llvm, [0.0] * LANES64)
        kind = ir.FunctionType(f64v.llvm, [pointers, i32, i1, f64v.llvm])
        name = f"llvm.masked.gather.v{LANES64}f64.v{LANES64}p0"
        gather = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(gather, [places, i32(8), ir.Constant(i1, [1] * LANES64), none])

    return f64v(table, row, column), codegen


def _integers(dtype):
    """An intrinsic ``load(address, n)``: n integers as float64, the other lanes 0."""
    memory = ir.VectorType(ir.IntType(8 * INTEGERS[dtype]), LANES64)

    @intrinsic
    def load(typingctx, address, n):
        def codegen(context, builder, sig, args):
            i32, i64 = ir.IntType(32), ir.VectorType(ir.IntType(64), LANES64)
            pointer = builder.inttoptr(args[0], memory.as_pointer())
            first = builder.insert_element(ir.Constant(i64, ir.Undefined), args[1], i32(0))
            zeros = ir.Constant(ir.VectorType(i32, LANES64), [0] * LANES64)
            n64 = builder.shuffle_vector(first, ir.Constant(i64, ir.Undefined), zeros)
            mask = builder.icmp_signed("<", ir.Constant(i64, list(range(LANES64))), n64)
            kind = ir.FunctionType(memory, [pointer.type, i32, mask.type, memory])
            name = f"llvm.masked.load.v{LANES64}i{8 * INTEGERS[dtype]}.p0"
            masked = cgutils.get_or_insert_function(builder.module, kind, name)
            none = ir.Constant(memory, [0] * LANES64)
            loaded = builder.call(masked, [pointer, i32(INTEGERS[dtype]), mask, none])
            return builder.sitofp(loaded, f64v.llvm)

        return f64v(address, n), codegen

    return load


def _numbers(dtype):
    """An inlined ``load(address, n)``: n counts as float64, the other lanes 0."""
    if dtype in INTEGERS:
        return _integers(dtype)
    load_tail = tail_loader(dtype, f64v)

    @inline
    def load(address, n):
        x = load_tail(address, n)
        return where(lanes_below(x, n), x, 0.0)

    return load


@inline
def excess_64(x, ratio):
    """x - log1p(x) >= 0 without cancellation, where ``ratio`` is 1 + x.

    With s = x/(2+x): log1p(x) = 2 atanh(s), and x - 2 s = x s.
    """
    s = x / (2.0 + x)
    near = s * (x - 2.0 * atanh_tail_64(s))
    return where(vabs(s) < 0.17, near, x - log_64(ratio))


def build(dtype):
    load = _numbers(dtype)
    size = INTEGERS.get(dtype) or ITEMSIZE[dtype]
    whole = dtype in INTEGERS

    @inline
    def both(x, y, j, n, drop):
        """The counts of a vector; ``drop`` leaves out the symbols that Q has not."""
        prefetch(x + j * size + 2048)
        prefetch(y + j * size + 2048)
        w, v = load(x + j * size, n), load(y + j * size, n)
        if drop != 0:
            w = where(v > 0.0, w, 0.0)
        return w, v

    @inline
    def terms(w, v, W, U, per_p, per_q, wants_spread):
        """What symbols add to KL, and to the sum of p (1-q)/q."""
        left, right = v * W, w * U
        lost = fma(v, W, -left) - fma(w, U, -right)
        ratio = ((left - right) + lost) / right
        share = w * per_p
        term = where(w == 0.0, v * per_q, share * excess_64(ratio, left / right))
        spread = splat64(0.0)
        if wants_spread != 0:
            spread = where(v == 0.0, 0.0, share * (U - v) / v)
        return term, spread

    def kernel(
        p, p_stride, q, q_stride, width, n_rows, counter, chunk, drop, wants_spread, out, smoothing
    ):
        values, spreads, numbers = values_table(), spread_table(), lane_numbers()
        while True:
            first = fetch_add(counter, chunk)
            if first >= n_rows:
                return
            for row in range(first, min(first + chunk, n_rows)):
                x, y = p + row * p_stride, q + row * q_stride
                zero = splat64(0.0)
                total_p, total_q, some_p, some_q, only_p = zero, zero, zero, zero, zero
                least = splat64(math.inf)
                for j in range(0, width, LANES64):
                    w, v = both(x, y, j, min(LANES64, width - j), drop)
                    least = vmin(vmin(w, v), least)
                    total_p = total_p + w
                    total_q = total_q + v
                    some_p = some_p + where(w > 0.0, 1.0, zero)
                    some_q = some_q + where(v > 0.0, 1.0, zero)
                    only_p = only_p + where((w > 0.0) & (v == 0.0), 1.0, zero)
                W = hsum(total_p) + width * smoothing
                U = hsum(total_q) + width * smoothing
                per_p, per_q = 1.0 / W, 1.0 / U
                smallest = -hmax(-least)
                # A negative count is refused later; it is no place in a table.
                tabulated = whole and width >= WIDE and smallest >= 0.0
                if tabulated:
                    for i in range(SMALL):
                        w = splat64(i + smoothing)
                        for j in range(0, SMALL, LANES64):
                            v = numbers + (j + smoothing)
                            term, more = terms(w, v, W, U, per_p, per_q, wants_spread)
                            store(values + 8 * (SMALL * i + j), term)
                            store(spreads + 8 * (SMALL * i + j), more)
                value, spread = zero, zero
                for j in range(0, width, LANES64):
                    n = min(LANES64, width - j)
                    w, v = both(x, y, j, n, drop)
                    if tabulated and n == LANES64 and not hany(vmax(w, v) > SMALL - 1.0):
                        value = value + look_up(values, w, v)
                        if wants_spread != 0:
                            spread = spread + look_up(spreads, w, v)
                        continue
                    if smoothing != 0.0:
                        inside = lanes_below(w, n)
                        w = where(inside, w + smoothing, 0.0)
                        v = where(inside, v + smoothing, 0.0)
                    term, more = terms(w, v, W, U, per_p, per_q, wants_spread)
                    value = value + term
                    spread = spread + more
                at = out + row * (8 * COUNT_COLUMNS)
                poke_f64(at, hsum(value))
                poke_f64(at + 8, W)
                poke_f64(at + 16, U)
                poke_f64(at + 24, hsum(some_p))
                poke_f64(at + 32, hsum(some_q))
                poke_f64(at + 40, hsum(only_p))
                poke_f64(at + 48, hsum(spread))
                poke_f64(at + 56, smallest)

    return kernel

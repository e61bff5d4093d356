"""All pairs of two tables of rows: sums over the vocabulary of a function of two entries.

Tables are those that ``tables`` makes, in panels of 16 rows, a lane for each: one entry of a row of
the first table goes with the same entry of 16 rows of the second.  A task is a few panels of the
first table against many of the second, BLOCK entries at a time: a panel of the first is in the
first-level cache and those of the second are in the next while they pass by.

The product of the entries is a matrix product, and runs as fast as multiplications and additions
can be issued: as many sums as there are registers for are kept in them.  Total variation takes p,
Jensen-Shannon log2 p.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from .mathematics import exp2_32, inline
from .normalization import FAR
from .rowloop import BLOCK
from .simd import (
    HAS_AVX512,
    LANES32,
    add64,
    add_widened,
    ask_for,
    f32v,
    fetch_add,
    loader,
    repeat32,
    splat32,
    spread,
    vabs,
    vmax,
    vmin,
)
from .two_phase import k_js

#: Panels of the first and the second table in a task; where there are that many PAIRS of them,
#: more of the first, so that what is read of the second is used longer.
FEW, MANY, MORE, PAIRS = 4, 9, 16, 2048

#: Rows of the first and panels of the second table whose sums are in registers at a time: sums,
#: a vector of each panel, and one for what is spread.
PRODUCT_ROWS, PRODUCT_PANELS = (8, 3) if HAS_AVX512 else (4, 1)
#: Rows of the other operations, which need registers for themselves, and one panel.
ROWS = 4
#: How far ahead to ask for entries: they come from the second-level cache.
AHEAD = 16

#: Bytes of an entry of a panel: that of each of its rows.
PANEL_ENTRY = 4 * LANES32

_load = loader("float32", f32v)


def products(rows, panels):
    """An intrinsic that adds the products of entries of ``rows`` with those of panels to ``out``.

    ``depth`` entries of each; of the first table from the address of an entry of its first row.
    """

    @intrinsic
    def add(typingctx, x, y, panel_bytes, depth, out, out_bytes):
        def codegen(context, builder, sig, args):
            x, y, panel_bytes, depth, out, out_bytes = args
            i64, number, vector = ir.IntType(64), ir.FloatType(), f32v.llvm
            sums = [
                [cgutils.alloca_once(builder, vector) for _ in range(panels)] for _ in range(rows)
            ]
            zero = ir.Constant(vector, [0.0] * LANES32)
            for each in (place for row in sums for place in row):
                builder.store(zero, each)
            fnty = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, fnty, "llvm.fma.v16f32")
            with cgutils.for_range(builder, depth) as loop:
                skip = builder.mul(loop.index, i64(PANEL_ENTRY))
                at = builder.add(x, skip)
                ask_for(builder, builder.add(at, i64(AHEAD * PANEL_ENTRY)))
                columns = []
                for panel in range(panels):
                    place = builder.add(builder.add(y, skip), builder.mul(panel_bytes, i64(panel)))
                    ask_for(builder, builder.add(place, i64(AHEAD * PANEL_ENTRY)))
                    pointer = builder.inttoptr(place, vector.as_pointer())
                    columns.append(builder.load(pointer, align=4))
                pointer = builder.inttoptr(at, number.as_pointer())
                for row in range(rows):
                    entry = builder.load(builder.gep(pointer, [i64(row)]), align=4)
                    entry = spread(builder, entry, f32v)
                    for place, column in zip(sums[row], columns, strict=True):
                        total = builder.call(fma, [entry, column, builder.load(place)])
                        builder.store(total, place)
            for row in range(rows):
                for panel in range(panels):
                    place = builder.add(out, builder.mul(out_bytes, i64(row)))
                    place = builder.add(place, i64(8 * LANES32 * panel))
                    add_widened(builder, place, builder.load(sums[row][panel]))
            return context.get_dummy_value()

        signature = types.void(x, y, panel_bytes, depth, out, out_bytes)
        return signature, codegen

    return add


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
    """Add the sums over ``depth`` entries to ``out``, n rows ``stride`` numbers apart.

    Panels are ``width`` entries apart.  ``triangle``: both tables are the same; panels below the
    diagonal are left out.
    """
    product = operation == "product"
    rows, panels = (PRODUCT_ROWS, PRODUCT_PANELS) if product else (ROWS, 1)
    several, single = products(rows, panels), products(rows, 1)

    @inline
    def four(x, y, depth, out, out_bytes):
        a = splat32(0.0)
        b = a
        c = a
        d = a
        for j in range(0, PANEL_ENTRY * depth, PANEL_ENTRY):
            entries = _load(y + j)
            a = a + integrand(repeat32(x + j), entries)
            b = b + integrand(repeat32(x + j + 4), entries)
            c = c + integrand(repeat32(x + j + 8), entries)
            d = d + integrand(repeat32(x + j + 12), entries)
        add64(out, a)
        add64(out + out_bytes, b)
        add64(out + 2 * out_bytes, c)
        add64(out + 3 * out_bytes, d)

    integrand = INTEGRANDS.get(operation, tv)

    def kernel(x, n, y, m, width, depth, counter, out, stride, triangle):
        panel_bytes, out_bytes = PANEL_ENTRY * width, 8 * stride
        n_panels, m_panels = (n + LANES32 - 1) // LANES32, (m + LANES32 - 1) // LANES32
        few = FEW if n_panels * m_panels < PAIRS else MORE
        down = (n_panels + few - 1) // few
        tasks = (m_panels + MANY - 1) // MANY * down
        while True:
            task = fetch_add(counter, 1)
            if task >= tasks:
                return
            left = task // down * MANY
            top = (task - task // down * down) * few
            bottom, right = min(top + few, n_panels), min(left + MANY, m_panels)
            if triangle and right <= top:
                continue
            for start in range(0, depth, BLOCK):
                count = min(BLOCK, depth - start)
                for row in range(LANES32 * top, min(LANES32 * bottom, n), rows):
                    panel = row // LANES32
                    at = x + panel * panel_bytes + PANEL_ENTRY * start + 4 * (row - LANES32 * panel)
                    j = left
                    while j < right:
                        column = y + j * panel_bytes + PANEL_ENTRY * start
                        to = out + row * out_bytes + 8 * LANES32 * j
                        if not product:
                            four(at, column, count, to, out_bytes)
                            j += 1
                        elif j + panels <= right:
                            several(at, column, panel_bytes, count, to, out_bytes)
                            j += panels
                        else:
                            single(at, column, panel_bytes, count, to, out_bytes)
                            j += 1

    return kernel

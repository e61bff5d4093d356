"""All pairs of a few rows and many: products with tables that are only made in cache.

What ``tables`` makes of the many rows is used once or twice for each of the few, and would take
longer to write to memory and to read again than to make.  A task is a few panels of the many rows:
DEPTH entries of their tables are made at a time, and multiplied with those of all of the few rows,
whose table there is.
"""

from __future__ import annotations

from .pairwise import PANEL_ENTRY, PRODUCT_PANELS, PRODUCT_ROWS, products
from .rowloop import f32
from .simd import (
    ITEMSIZE,
    LANES32,
    f32v,
    fetch_add,
    hany,
    lane_is,
    loader,
    poke_f64,
    scratch,
)
from .tables import filler, square, turned

#: Entries that are made at a time: those of all panels of a task are 48 KiB.
DEPTH = 256
#: Up to this many of the few rows, a task is one panel: making tables takes most of its time.
ONE_PANEL = 16

made = scratch(PANEL_ENTRY * DEPTH * PRODUCT_PANELS)
_load = loader("float32", f32v)


def build(dtype, kind):
    """Add the products of ``k`` rows of a table with n others to ``out``; and sums, as ``tables``.

    Panels of the table are ``width`` entries apart, and rows of ``out`` ``stride`` numbers.
    """
    size = ITEMSIZE[dtype]
    fill = filler(dtype, kind)
    several, single = products(PRODUCT_ROWS, PRODUCT_PANELS), products(PRODUCT_ROWS, 1)

    def kernel(
        x, x_stride, n, start, stop, counter, references, rests, table, width, k, out, stride,
        masses, own, zeros, inverse_temperature, factor, nothing,
    ):  # fmt: skip
        it = f32(inverse_temperature)
        area, columns, place = square(), turned(), made()
        apart, out_bytes = PANEL_ENTRY * DEPTH, 8 * stride
        panels = 1 if k <= ONE_PANEL else PRODUCT_PANELS
        while True:
            first = LANES32 * panels * fetch_add(counter, 1)
            if first >= n:
                return
            rows = min(LANES32 * panels, n - first)
            empty = lane_is(_load(references + 4 * first), -1)
            for at in range(start, stop, DEPTH):
                count = min(DEPTH, stop - at)
                for i in range(0, rows, LANES32):
                    row = first + i
                    empty = empty | fill(
                        x + row * x_stride + at * size, x_stride, min(LANES32, n - row), count,
                        _load(references + 4 * row), _load(rests + 4 * row),
                        place + i // LANES32 * apart, masses + 8 * row, own + 8 * row,
                        it, factor, nothing, area, columns,
                    )  # fmt: skip
                for i in range(0, k, PRODUCT_ROWS):
                    panel = i // LANES32
                    entry = table + PANEL_ENTRY * (panel * width + at - start)
                    entry += 4 * (i - LANES32 * panel)
                    to = out + i * out_bytes + 8 * first
                    if rows > LANES32 * (PRODUCT_PANELS - 1) and panels == PRODUCT_PANELS:
                        several(entry, place, apart, count, to, out_bytes)
                    else:
                        for j in range(0, rows, LANES32):
                            source = place + j // LANES32 * apart
                            single(entry, source, apart, count, to + 8 * j, out_bytes)
            if hany(empty):
                poke_f64(zeros, 1.0)

    return kernel

"""Rows of 16-bit numbers as float32: what a matrix product takes."""

from __future__ import annotations

from .simd import ITEMSIZE, LANES32, f32v, fetch_add, loader, store, store_tail, tail_loader


def build(dtype):
    load, load_tail = loader(dtype, f32v), tail_loader(dtype, f32v)
    size = ITEMSIZE[dtype]

    def kernel(source, source_step, out, out_step, width, rows, counter, chunk):
        full = width // LANES32 * LANES32
        while True:
            first = fetch_add(counter, chunk)
            if first >= rows:
                return
            for row in range(first, min(first + chunk, rows)):
                x, y = source + row * source_step, out + row * out_step
                for j in range(0, full, LANES32):
                    store(y + j * 4, load(x + j * size))
                if full < width:
                    n = width - full
                    store_tail(y + full * 4, load_tail(x + full * size, n), n)

    return kernel

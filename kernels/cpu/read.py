"""Read memory and do nothing else: what the other kernels' speed is compared with."""

from __future__ import annotations

from .simd import f32v, fetch_add, hsum, loader, poke_f64, prefetch, splat32

#: Bytes that a thread takes at a time, in four streams side by side.
BLOCK = 1 << 20

_load = loader("float32", f32v)


def build():
    def kernel(address, n_bytes, counter, out, unused):
        while True:
            begin = fetch_add(counter, 1) * BLOCK
            if begin >= n_bytes:
                return
            part = (min(BLOCK, n_bytes - begin) // 4) & -64
            a = splat32(0.0)
            b = a
            c = a
            d = a
            for at in range(address + begin, address + begin + part, 64):
                prefetch(at + 2048)
                prefetch(at + 2048 + part)
                prefetch(at + 2048 + 2 * part)
                prefetch(at + 2048 + 3 * part)
                a = a + _load(at)
                b = b + _load(at + part)
                c = c + _load(at + 2 * part)
                d = d + _load(at + 3 * part)
            # The sum is stored so that no load can be left out.
            poke_f64(out, hsum((a + b) + (c + d)))

    return kernel

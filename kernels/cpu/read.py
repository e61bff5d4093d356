"""Read memory and do nothing else: what the other kernels' speed is compared with."""

from __future__ import annotations

from .simd import f32v, fetch_add, hsum, loader, poke_f64, splat32


#: Bytes that a thread takes at a time.
BLOCK = 1 << 18

_load = loader("float32", f32v)


def build():
    def kernel(address, n_bytes, counter, out, unused):
        while True:
            begin = fetch_add(counter, 1) * BLOCK
            if begin >= n_bytes:
                return
            a = splat32(0.0)
            b = a
            c = a
            d = a
            for at in range(address + begin, address + min(begin + BLOCK, n_bytes) - 255, 256):
                a = a + _load(at)
                b = b + _load(at + 64)
                c = c + _load(at + 128)
                d = d + _load(at + 192)
            # The sum is stored so that no load can be left out.
            poke_f64(out, hsum((a + b) + (c + d)))

    return kernel

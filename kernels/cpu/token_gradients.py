"""Gradients of token log-probabilities, from one read of the logits and one write.

With L = log sum exp(x/T) and the log-probability l of the row's token, both known from the read
that gave the values,

    d l / d x = (onehot - exp(x/T - L)) / T,

where the token's own entry is -expm1(l)/T, exact also where its probability is near 1.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp2_32
from .rowloop import f32, halves, row_address
from .simd import (
    ITEMSIZE,
    LANES32W,
    f32w,
    fetch_add,
    fma,
    loader,
    peek_f64,
    peek_i64,
    splat32w,
    storer,
    tail_loader,
    vmax,
)


def build(dtype):
    load, load_tail = loader(dtype, f32w), tail_loader(dtype, f32w)
    write, write_tail = storer(dtype)
    size = ITEMSIZE[dtype]

    def kernel(
        p, p_stride, p_offsets, into, into_stride, width, n_rows, counter, chunk,
        tokens, values, log_sums, scales, inverse_temperature,
    ):  # fmt: skip
        a0, a1 = halves(inverse_temperature * LOG2_E)
        full = width // LANES32W * LANES32W
        while True:
            begin = fetch_add(counter, chunk)
            if begin >= n_rows:
                return
            for row in range(begin, min(begin + chunk, n_rows)):
                x = row_address(p, p_stride, p_offsets, row)
                out = into + row * into_stride
                value = peek_f64(values + 8 * row)
                scale = peek_f64(scales + 8 * row) * inverse_temperature
                if scale == 0.0 or not value > -math.inf:
                    # No part of the loss, or no derivative; or no distribution.
                    flat = math.nan if scale != 0.0 and value != value else 0.0
                    constant = splat32w(f32(flat))
                    for j in range(0, full, LANES32W):
                        write(out + j * size, constant)
                    if full < width:
                        write_tail(out + full * size, constant, width - full)
                    continue
                k0, k1 = halves(-LOG2_E * peek_f64(log_sums + 8 * row))
                factor = f32(-scale)
                for j in range(0, full, LANES32W):
                    v = load(x + j * size)
                    # Of -inf the sum may be a NaN, which becomes a number whose power is 0.
                    z = vmax(fma(v, a0, k0) + fma(v, a1, k1), -200.0)
                    write(out + j * size, exp2_32(z) * factor)
                if full < width:
                    v = load_tail(x + full * size, width - full)
                    z = vmax(fma(v, a0, k0) + fma(v, a1, k1), -200.0)
                    write_tail(out + full * size, exp2_32(z) * factor, width - full)
                own = splat32w(f32(-math.expm1(value) * scale))
                write_tail(out + peek_i64(tokens + 8 * row) * size, own, 1)

    return kernel

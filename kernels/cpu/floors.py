"""Two rows of 16-bit log-probabilities, decoded, with what lies at the floor of either left out.

Files of llama.cpp store a row as words of 16 bits, ``scale * word + least``; the word 0 may stand
for all that is smaller. What that means for divergences is told in `klfast._pairs`: this kernel
decodes, and sums up what is needed, in one read of the words.

A side comes with four numbers a row: scale, least, the word that is the floor (NaN: none), and the
largest log-probability. Of each side five sums are returned: over the entries that are at neither
floor, the mass and the sum of squares of those below the largest, and how many equal the largest;
over those at the floor of the other side only, the mass; and how many are at its own floor. The
mass of the largest is left to the caller, who knows it better than a float32 exponential: 1 minus
the mass is what it is about.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp2_32, inline
from .simd import (
    ITEMSIZE,
    LANES32,
    f32v,
    fetch_add,
    fma,
    fold64,
    hsum,
    lanes_below,
    loader,
    peek_f64,
    poke_f64,
    prefetch,
    splat32,
    splat64,
    store,
    store_tail,
    tail_loader,
    where,
)

_AHEAD = 1024  # bytes


def build(of_p, of_q):
    """The kernel for sides that are uint16 words or float32 log-probabilities."""
    load_p, load_p_tail = loader(of_p, f32v), tail_loader(of_p, f32v)
    load_q, load_q_tail = loader(of_q, f32v), tail_loader(of_q, f32v)
    size_p, size_q = ITEMSIZE[of_p], ITEMSIZE[of_q]
    words_p, words_q = of_p == "uint16", of_q == "uint16"

    @inline
    def one_side(value, floor, either, below, sums):
        """Add one vector to the sums of a side; ``below`` are entries less than the largest."""
        e = exp2_32(value * LOG2_E)
        zero, one = splat32(0.0), splat32(1.0)
        mass, squares, equal, other, own = sums
        kept = where(either, zero, where(below, e, zero))
        mass = mass + fold64(kept)
        squares = fma(kept, kept, squares)
        equal = equal + where(either, zero, where(below, zero, one))
        other = other + where(either, where(floor, zero, e), zero)
        return mass, squares, equal, other, own + where(floor, one, zero)

    @inline
    def write(results, sums):
        mass, squares, equal, other, own = sums
        poke_f64(results, hsum(mass))
        poke_f64(results + 8, hsum(squares))
        poke_f64(results + 16, hsum(equal))
        poke_f64(results + 24, hsum(other))
        poke_f64(results + 32, hsum(own))

    def kernel(
        p, p_step, q, q_step, width, rows, counter, parameters, out_p, out_q, out_step, results
    ):
        while True:
            row = fetch_add(counter, 1)
            if row >= rows:
                return
            at = parameters + row * 64
            scale_p, least_p = peek_f64(at), peek_f64(at + 8)
            floor_p, top_p = splat32(peek_f64(at + 16)), splat32(peek_f64(at + 24))
            scale_q, least_q = peek_f64(at + 32), peek_f64(at + 40)
            floor_q, top_q = splat32(peek_f64(at + 48)), splat32(peek_f64(at + 56))
            a_p, b_p = splat32(scale_p), splat32(least_p)
            a_q, b_q = splat32(scale_q), splat32(least_q)
            zero = splat32(0.0)
            sums_p = (splat64(0.0), zero, zero, zero, zero)
            sums_q = sums_p
            x, y = p + row * p_step, q + row * q_step
            u, v = out_p + row * out_step, out_q + row * out_step
            for j in range(0, width, LANES32):
                n = width - j
                if n >= LANES32:
                    prefetch(x + j * size_p + _AHEAD)
                    prefetch(y + j * size_q + _AHEAD)
                    a, b = load_p(x + j * size_p), load_q(y + j * size_q)
                else:
                    a, b = load_p_tail(x + j * size_p, n), load_q_tail(y + j * size_q, n)
                at_p, at_q = a == floor_p, b == floor_q
                if words_p:
                    a = fma(a, a_p, b_p)
                if words_q:
                    b = fma(b, a_q, b_q)
                either = at_p | at_q
                if n < LANES32:
                    inside = lanes_below(a, n)
                    at_p, at_q, either = at_p & inside, at_q & inside, either | ~inside
                    a, b = where(inside, a, -math.inf), where(inside, b, -math.inf)
                sums_p = one_side(a, at_p, either, a < top_p, sums_p)
                sums_q = one_side(b, at_q, either, b < top_q, sums_q)
                a, b = where(either, -math.inf, a), where(either, -math.inf, b)
                if n >= LANES32:
                    store(u + j * 4, a)
                    store(v + j * 4, b)
                else:
                    store_tail(u + j * 4, a, n)
                    store_tail(v + j * 4, b, n)
            write(results + row * 80, sums_p)
            write(results + row * 80 + 40, sums_q)

    return kernel

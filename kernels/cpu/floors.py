"""Two rows of 16-bit log-probabilities, decoded, with what lies at the floor of either left out.

Files of llama.cpp store a row as words of 16 bits, ``scale * word + least``; the word 0 may stand
for all that is smaller. What that means for divergences is told in `klfast._pairs`: this kernel
decodes, and sums up what is needed, in one read of the words.

A side comes with three numbers a row: scale, least, and the word that is the floor (NaN: none). Of
each side seven are returned. Over the entries that are at neither floor: the mass and the sum of
squares of those that are not the largest of the row, and how many are. Over those at the floor of
the other side only: the mass. How many are at its own floor. The index of the largest entry, the
first of equal ones, and its log-probability, -1 and NaN where there is none. The mass of the
largest is left to the caller, who knows it better than a float32 exponential: 1 minus the mass is
what it is about.

The largest entry of a row of words has the word 65535, so that it is found on the way; where it
has not, and of log-probabilities, another look at the row tells what to look for.
"""

from __future__ import annotations

import math

from .mathematics import LOG2_E, exp2_32, inline
from .rowloop import BLOCK, f64, passes
from .simd import (
    ITEMSIZE,
    LANES32,
    f32v,
    fetch_add,
    fma,
    fold64,
    hany,
    hmax,
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
    store_tail,
    tail_loader,
    where,
)

_AHEAD = 1024  # bytes
_LARGEST = 65535.0
#: The log-probability of what lies at a floor, on both sides: its exponential is 0 and so is the
#: difference of the two, which takes rows no further from each other. -inf would, in the kernels
#: that compare them, and took them twice as long.
LEFT_OUT = -1e4
#: Numbers that come with a row of one side, and that are returned.
PARAMETERS = 3
RESULTS = 7


def build(of_p, of_q):
    """The kernel for sides that are uint16 words or float32 log-probabilities."""
    load_p, load_p_tail = loader(of_p, f32v), tail_loader(of_p, f32v)
    load_q, load_q_tail = loader(of_q, f32v), tail_loader(of_q, f32v)
    (max_p, find_p), (max_q, find_q) = passes(of_p), passes(of_q)
    size_p, size_q = ITEMSIZE[of_p], ITEMSIZE[of_q]
    words_p, words_q = of_p == "uint16", of_q == "uint16"

    @inline
    def add(value, floor, theirs, either, top, sums):
        """Add one vector to the sums of a side; at its floor, or theirs, or either or outside."""
        mass, squares, equal, other, own = sums
        e = exp2_32(value * LOG2_E)
        kept = where(either | top, splat32(0.0), e)
        mass = mass + kept
        squares = fma(kept, kept, squares)
        # A masked addition is one instruction.
        equal = where(top & ~either, equal + splat32(1.0), equal)
        other = where(theirs & ~floor, other + e, other)
        own = where(floor, own + splat32(1.0), own)
        return mass, squares, equal, other, own

    @inline
    def decoded(a, decode, words):
        return fma(a, decode[0], decode[1]) if words else a

    @inline
    def step(a, b, at_p, at_q, is_p, is_q, either, decode_p, decode_q, sums_p, sums_q):
        """One vector of each side: what is stored of it, and the sums."""
        a, b = decoded(a, decode_p, words_p), decoded(b, decode_q, words_q)
        sums_p = add(a, at_p, at_q, either, is_p, sums_p)
        sums_q = add(b, at_q, at_p, either, is_q, sums_q)
        return where(either, LEFT_OUT, a), where(either, LEFT_OUT, b), sums_p, sums_q

    @inline
    def part(
        x, y, u, v, start, stop, decode_p, decode_q, floor_p, floor_q, top_p, top_q,
        sums_p, sums_q, seen_p, seen_q,
    ):  # fmt: skip
        """Entries [start, stop) of a row, few enough for sums in float32."""
        full = start + (stop - start) // LANES32 * LANES32
        for j in range(start, full, LANES32):
            prefetch(x + j * size_p + _AHEAD)
            prefetch(y + j * size_q + _AHEAD)
            a, b = load_p(x + j * size_p), load_q(y + j * size_q)
            at_p, at_q, is_p, is_q = a == floor_p, b == floor_q, a == top_p, b == top_q
            a, b, sums_p, sums_q = step(
                a, b, at_p, at_q, is_p, is_q, at_p | at_q, decode_p, decode_q, sums_p, sums_q
            )
            seen_p, seen_q = seen_p | is_p, seen_q | is_q
            store(u + j * 4, a)
            store(v + j * 4, b)
        if full < stop:
            n = stop - full
            a, b = load_p_tail(x + full * size_p, n), load_q_tail(y + full * size_q, n)
            inside = lanes_below(a, n)
            at_p, at_q = (a == floor_p) & inside, (b == floor_q) & inside
            is_p, is_q = (a == top_p) & inside, (b == top_q) & inside
            a, b, sums_p, sums_q = step(
                a, b, at_p, at_q, is_p, is_q, at_p | at_q | ~inside, decode_p, decode_q,
                sums_p, sums_q,
            )  # fmt: skip
            seen_p, seen_q = seen_p | is_p, seen_q | is_q
            store_tail(u + full * 4, a, n)
            store_tail(v + full * 4, b, n)
        return sums_p, sums_q, seen_p, seen_q

    @inline
    def wide(mass, sums):
        """The mass so far in float64, and sums of which that of the mass begins anew."""
        part, squares, equal, other, own = sums
        return mass + fold64(part), (splat32(0.0), squares, equal, other, own)

    @inline
    def write(results, mass, sums, seen, index, largest):
        _, squares, equal, other, own = sums
        poke_f64(results, hsum(mass))
        poke_f64(results + 8, f64(hsum(squares)))
        poke_f64(results + 16, f64(hsum(equal)))
        poke_f64(results + 24, f64(hsum(other)))
        poke_f64(results + 32, f64(hsum(own)))
        found = hany(seen)
        poke_f64(results + 40, f64(index) if found else -1.0)
        poke_f64(results + 48, f64(hmax(largest)) if found else math.nan)

    def kernel(
        p, p_step, q, q_step, width, rows, counter, parameters, out_p, out_q, out_step, results
    ):
        zero = splat32(0.0)
        nothing = (zero, zero, zero, zero, zero)
        while True:
            row = fetch_add(counter, 1)
            if row >= rows:
                return
            at = parameters + row * (2 * 8 * PARAMETERS)
            decode_p = splat32(peek_f64(at)), splat32(peek_f64(at + 8))
            floor_p = splat32(peek_f64(at + 16))
            decode_q = splat32(peek_f64(at + 24)), splat32(peek_f64(at + 32))
            floor_q = splat32(peek_f64(at + 40))
            x, y = p + row * p_step, q + row * q_step
            u, v = out_p + row * out_step, out_q + row * out_step
            top_p = splat32(_LARGEST) if words_p else splat32(max_p(x, 0, width))
            top_q = splat32(_LARGEST) if words_q else splat32(max_q(y, 0, width))
            looked = False
            while True:
                mass_p = splat64(0.0)
                mass_q = mass_p
                sums_p = nothing
                sums_q = nothing
                seen_p = lane_is(zero, -1)
                seen_q = seen_p
                for start in range(0, width, BLOCK):
                    sums_p, sums_q, seen_p, seen_q = part(
                        x, y, u, v, start, min(start + BLOCK, width), decode_p, decode_q,
                        floor_p, floor_q, top_p, top_q, sums_p, sums_q, seen_p, seen_q,
                    )  # fmt: skip
                    mass_p, sums_p = wide(mass_p, sums_p)
                    mass_q, sums_q = wide(mass_q, sums_q)
                if looked or (hany(seen_p) and hany(seen_q)):
                    break
                looked = True
                top_p, top_q = splat32(max_p(x, 0, width)), splat32(max_q(y, 0, width))
            at = results + row * (2 * 8 * RESULTS)
            index = find_p(x, 0, width, hmax(top_p))
            write(at, mass_p, sums_p, seen_p, index, decoded(top_p, decode_p, words_p))
            at += 8 * RESULTS
            index = find_q(y, 0, width, hmax(top_q))
            write(at, mass_q, sums_q, seen_q, index, decoded(top_q, decode_q, words_q))

    return kernel

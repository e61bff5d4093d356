"""The normalizers of two rows and the logarithm of their ratio: the first phase of two.

Exponents are kept in base 2: with a = log2(e)/T, u = a x + rx and v = a y + ry for references rx,
ry (about minus the maxima), t = v - u = a (y - x) + (ry - rx), h = 1 - 2**-abs(t) and
M = 2**max(u, v), the sums are

    S = sum (2**u + 2**v) = 2 sum M - sum M h,   D = sum (2**v - 2**u) = sum sign(t) M h,

so that the normalizers' ratio comes from D, whose terms vanish where the rows agree, and not
from the difference of two large sums: with Sx = (S - D)/2 and Sy = (S + D)/2,

    log2(p/q) = -(t + C - (ry - rx)),   C = ry - rx + log2(Sx/Sy).

References are multiples of 1/1024, hence ry - rx is exact, and D is nearly what it would be with
the maxima themselves.  What the subtraction y - x rounds off
is carried along where that is asked for.  Moving references
by f = 2**hx, g = 2**hy changes (S, D) into ((f+g) S + (g-f) D, (f+g) D + (g-f) S)/2, where g - f is
taken as an odd function of hy - hx.  The sum H of M h bounds the rounding error of D.  Every
quantity is symmetric in the two rows or changes its sign only, operation by operation.

S - abs(D) must not cancel, or the smaller of Sx and Sy is lost: a tile that would leave abs(D)
above S/2 is done again with references moved apart until both sums are about equal.  So both have
small relative errors, of some e, when they are summed.  Moving references multiplies each by a
number, in float64, and leaves D with an error of no more than about 2 e S, whatever H was.
This is done where ``equal`` asks for it.

Near form.  Where all abs(t) of a block are at most NEAR, one exponential is enough, that of the
geometric mean g = 2**((u + v)/2): with x = t log(2)/2,

    2**u + 2**v = 2 g cosh(x),   2**v - 2**u = 2 g sinh(x),

and cosh and sinh are polynomials in t**2.  A block is tried in this form as long as the one before
it was near, and is done again if it turns out not to be; -inf is never near.
"""

from __future__ import annotations

import functools
import math

from .mathematics import (
    LN_2,
    exp2_32,
    inline,
    near_cosh_32,
    near_sinh_32,
    one_minus_exp2_32,
    power_32,
)
from .polynomials import NEAR
from .rowloop import BLOCK, TILE, ahead, f32, f64, passes
from .simd import (
    ITEMSIZE,
    LANES32,
    copysign,
    f32v,
    fma,
    fold64,
    hany,
    hsum,
    lane_is,
    loader,
    rint,
    splat32,
    splat64,
    tail_loader,
    unordered,
    vabs,
    vmax,
    vmin,
    where,
)

#: The largest tau, in base 2, that is told apart: 2**-126 is the smallest normal number.
FAR = 126.0


@inline
def exact_subtraction(p, q):
    """q - p, and what its rounding lost: NaN where that is infinite or NaN."""
    d = q - p
    back = d - q
    return d, (q - (d - back)) - (p + back)


@functools.cache
def subtraction(exactly):
    """An inlined ``difference(p, q)``: q - p, and what its rounding lost (0 where that is inf).

    The loss is looked after only where ``exactly`` is asked for: it costs a fifth of a kernel's
    time.
    """

    @inline
    def difference(p, q):
        if not exactly:
            return q - p, splat32(0.0)
        d, lost = exact_subtraction(p, q)
        return d, where(unordered(lost, lost), 0.0, lost)

    return difference


@functools.cache
def power(exactly):
    """An inlined ``power(p, a, k, rest)``: 2**(a p + k + rest), for a small ``rest``.

    A rounded exponent of -33 alone makes an error of 1.3e-6.  ``exactly`` takes the whole number n
    off before anything is rounded, and takes along what k - n is rounded by.
    """

    @inline
    def plain(p, a, k, rest):
        return exp2_32(fma(p, a, k) + rest)

    @inline
    def careful(p, a, k, rest):
        n = vmax(rint(fma(p, a, k)), -200.0)
        left = k - n
        return exp2_32(fma(p, a, left) + ((k - (left + n)) + rest)) * power_32(n)

    return careful if exactly else plain


@functools.cache
def larger_power(exactly):
    """An inlined function: the larger of two powers, whichever way round they are given."""
    raised = power(exactly)

    @inline
    def larger(p, kx, rest_x, q, ky, rest_y, a):
        if exactly:
            return vmax(raised(p, a, kx, rest_x), raised(q, a, ky, rest_y))
        return exp2_32(vmax(fma(p, a, kx) + rest_x, fma(q, a, ky) + rest_y))

    return larger


#: Where abs(D) is more than this times S, the references are moved until both sums are about equal.
UNEQUAL = 0.5

#: Rows that differ by more than this are left to the kernel that subtracts exactly: the rounding of
#: y - x is then no longer small beside 1.
CLOSE = 16.0


@functools.cache
def rounding(exactly):
    """An inlined ``rounded(c)``: how much y - x, where it is about c, is rounded.

    0 not at all, 1 as float32 numbers are, infinity by too much.  Narrow numbers count as float32:
    where one is so near 0 that the other is thousands of times as large, float32 cannot hold their
    difference, and a symbol with much of the mass may be such.
    """

    @inline
    def rounded(c):
        if exactly:
            return 0.0
        if abs(c) > CLOSE:
            return math.inf
        return 1.0

    return rounded


@inline
def geometric_mean(p, q, half, kx, ky):
    """2**((u + v)/2) with u/2 = half p + kx and v/2 = half q + ky."""
    return exp2_32(fma(p, half, kx) + fma(q, half, ky))


@inline
def all_near(high, s):
    """Whether the largest t**2 says that all were near, and no NaN has got into a sum."""
    return not hany((high > NEAR * NEAR) | unordered(s, s))


@functools.cache
def normalization(dtype_p, dtype_q, difference, larger, near):
    """``first`` (the sums of a part of a row pair), ``merge`` of two parts, ``normalizers``.

    ``difference`` and ``larger`` are what ``subtraction`` and ``larger_power`` give; ``near`` says
    whether near blocks take the near form, which does not subtract exactly.
    """
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    ahead_p, ahead_q = ahead(dtype_p), ahead(dtype_q)
    max_p, _ = passes(dtype_p)
    max_q, _ = passes(dtype_q)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]

    @inline
    def moved(state, rx, ry, equal):
        """The same sums relative to other references."""
        rx0, ry0, S, D, H = state
        hx = rx - rx0
        hy = ry - ry0
        both = 0.5 * (math.exp2(hx) + math.exp2(hy))
        odd = math.exp2(0.5 * (hx + hy)) * math.sinh((hy - hx) * (0.5 * LN_2))
        S, D, H = both * S + odd * D, both * D + odd * S, both * H + abs(odd) * S
        return rx, ry, S, D, (min(H, 2.0 * S) if equal else H)

    @inline
    def balance(S, D):
        """How far to move the references apart for equal sums: odd in D, a multiple of 1/1024."""
        least = 1e-6 * S
        ratio = math.log2(max(S - D, least)) - math.log2(max(S + D, least))
        return math.copysign(math.floor(512.0 * abs(ratio)) / 1024.0, ratio)

    @inline
    def merge(a, b, equal):
        rx = min(a[0], b[0])
        ry = min(a[1], b[1])
        a = moved(a, rx, ry, equal)
        b = moved(b, rx, ry, equal)
        S = a[2] + b[2]
        D = a[3] + b[3]
        move = 0.0
        if equal and abs(D) > UNEQUAL * S:
            move = balance(S, D)
        return moved((rx, ry, S, D, a[4] + b[4]), rx - move, ry + move, equal)

    @inline
    def step(p, q, a, rx, ry, c, S, D, H, high, bad):
        if near:
            t = fma(q - p, a, c)
            m = exp2_32(vmax(fma(p, a, rx), fma(q, a, ry)))
        else:
            d, lost = difference(p, q)
            t = fma(lost, a, fma(d, a, c))
            m = larger(p, rx, 0.0, q, ry, 0.0, a)
        tau = vmin(vabs(t), FAR)  # a NaN from -inf - -inf becomes FAR
        mh = m * one_minus_exp2_32(tau)
        bad = bad | unordered(p, q)
        return S + m, D + copysign(mh, t), H + mh, vmax(tau, high), bad

    @inline
    def near_block(x, y, start, stop, a, rx, ry, c):
        """(S, D, H) in halves of a block of whole vectors, and whether it was near."""
        half = f32(0.5) * a
        kx = f32(0.5) * rx
        ky = f32(0.5) * ry
        s = splat32(0.0)
        d = s
        h = s
        high = s
        for j in range(start, stop, LANES32):
            ahead_p(x, j)
            ahead_q(y, j)
            p = load_p(x + j * size_p)
            q = load_q(y + j * size_q)
            t = fma(q - p, a, c)
            z = t * t
            high = vmax(z, high)
            g = geometric_mean(p, q, half, kx, ky)
            s = fma(g, fma(z, near_cosh_32(z), 1.0), s)
            w = g * t * near_sinh_32(z)
            d = d + w
            h = h + vabs(w)
        return s, d, h, all_near(high, s)

    @inline
    def sums(x, y, start, stop, a, rx, ry, c, close):
        """(S, D, H, any NaN) of [start, stop), and whether the last block was near."""
        zero = splat32(0.0)
        S = splat64(0.0)
        D = S
        H = S
        bad = lane_is(zero, -1)
        full = start + (stop - start) // LANES32 * LANES32
        j = start
        while j < full:
            last = min(full, j + BLOCK)
            if near and close:
                s, d, h, close = near_block(x, y, j, last, a, rx, ry, c)
                if close:
                    S = S + 2.0 * fold64(s)
                    D = D + 2.0 * fold64(d)
                    H = H + 2.0 * fold64(h)
                    j = last
                    continue
            s = zero
            d = zero
            h = zero
            high = zero
            while j < last:
                ahead_p(x, j)
                ahead_q(y, j)
                s, d, h, high, bad = step(
                    load_p(x + j * size_p), load_q(y + j * size_q),
                    a, rx, ry, c, s, d, h, high, bad,
                )  # fmt: skip
                j += LANES32
            close = not hany(high > NEAR)
            S = S + (2.0 * fold64(s) - fold64(h))
            D = D + fold64(d)
            H = H + fold64(h)
        if full < stop:
            p = tail_p(x + full * size_p, stop - full)
            q = tail_q(y + full * size_q, stop - full)
            s, d, h, _, bad = step(p, q, a, rx, ry, c, zero, zero, zero, zero, bad)
            S = S + (2.0 * fold64(s) - fold64(h))
            D = D + fold64(d)
            H = H + fold64(h)
        return hsum(S), hsum(D), hsum(H), hany(bad), close

    @inline
    def first(x, y, start, stop, a, equal):
        """The sums of [start, stop) and their references; S is NaN where they cannot be had.

        And of each row the largest entry, and where the first tile that has it starts.
        """
        state = (0.0, 0.0, 0.0, 0.0, 0.0)
        top_x = -math.inf
        top_y = top_x
        tile_x = 0.0
        tile_y = 0.0
        close = True
        apart = 0.0
        again = False
        j = start
        while j < stop:
            tile_stop = min(j + TILE, stop)
            largest_x = f64(max_p(x, j, tile_stop))
            largest_y = f64(max_q(y, j, tile_stop))
            if largest_x > top_x:
                top_x = largest_x
                tile_x = f64(j)
            if largest_y > top_y:
                top_y = largest_y
                tile_y = f64(j)
            rx = -1024.0 * a * largest_x
            ry = -1024.0 * a * largest_y
            # Beyond 2**19 the references are no longer exact in float32 (or not finite).
            if not (abs(rx) < 8388608.0 and abs(ry) < 8388608.0):
                if not (j > start and rx > 0.0 and ry > 0.0):
                    return 0.0, 0.0, math.nan, 0.0, 0.0, top_x, tile_x, top_y, tile_y
                # -inf all over: nothing to add, whatever the references.
                rx = state[0]
                ry = state[1]
            else:
                rx = math.floor(rx) / 1024.0 - apart
                ry = math.floor(ry) / 1024.0 + apart
            if j == start:
                state = (rx, ry, 0.0, 0.0, 0.0)
            elif rx < state[0] or ry < state[1]:
                state = moved(state, min(rx, state[0]), min(ry, state[1]), equal)
            rx, ry, S, D, H = state
            s, d, h, bad, close = sums(
                x, y, j, tile_stop, f32(a), f32(rx), f32(ry), f32(ry - rx), close
            )
            if bad:
                return rx, ry, math.nan, D, H, top_x, tile_x, top_y, tile_y
            if equal and abs(D + d) > UNEQUAL * (S + s):
                if again:
                    return rx, ry, math.nan, D, H, top_x, tile_x, top_y, tile_y
                again = True
                move = balance(S + s, D + d)
                apart += move
                state = moved(state, rx - move, ry + move, equal)
                continue
            again = False
            state = (rx, ry, S + s, D + d, H + h)
            j = tile_stop
        rx, ry, S, D, H = state
        return rx, ry, S, D, H, top_x, tile_x, top_y, tile_y

    @inline
    def normalizers(state):
        rx, ry, S, D, H = state
        sx = 0.5 * (S - D)
        sy = 0.5 * (S + D)
        # Odd in D, so that swapped arguments give the same bits.
        if abs(D) < 0.5 * S:
            ratio = -2.0 * math.atanh(D / S) / LN_2
        else:
            ratio = math.log2(sx) - math.log2(sy)
        return rx - math.log2(sx), ry - math.log2(sy), (ry - rx) + ratio

    return first, merge, normalizers

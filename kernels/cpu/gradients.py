"""Gradients of the divergences with respect to the logits.

Everything is a multiple of p or q that vanishes where the rows agree.  In base 2, with u = log2 p,
v = log2 q, t = v - u, tau = abs(t), M = 2**max(u, v) and h = 1 - 2**-tau, the difference
q - p = sign(t) M h does not cancel, and p and q are M and M - M h.  With d = log(p/q) = -t log 2:

    KL        wrt q  q - p                        wrt p  p (d - KL)
    Jeffreys  wrt q  q (-d - W) + (q - p)         wrt p  p (d - W) - (q - p)
    JS        wrt q  (1-w) q (log(q/m) - W)       wrt p  w p (log(p/m) - W)
    TV        wrt q  q (sign(t)/2 - W)            wrt p  p (-sign(t)/2 - W)
    cross-entropy  wrt q  q - p                   wrt p  p (-log q - W)
    Renyi     wrt q  q - r                        wrt p  alpha/(alpha-1) (r - p)

W is the mean of what it is subtracted from, under the same distribution: the entries of a gradient
add up to 0.  m = w p + (1-w) q.  The tilted distribution r = p**alpha q**(1-alpha)/S is
q 2**e with e = -alpha t - (alpha-1) R, and p 2**e with e = -(alpha-1) (t + R), where R is the
Renyi divergence in base 2; the differences are again of the form sign M h.

The values were computed just before, so that the row pair is in cache.  ``one_pass`` then also
knows the constants of log2 p, log2 q and log2(q/p); where it did not run, they are found as
two_phase finds them.  Rows whose normalizers are not found, or whose value is infinite, are listed
before anything is written: the gradient may go to the logits' own memory.
"""

from __future__ import annotations

import math

from .mathematics import LN_2, LOG2_E, exp2_32, inline, log_32, one_minus_exp2_32
from .normalization import FAR, larger_power, normalization, subtraction
from .rowloop import BLOCK, f32, f64, row_address, task_row
from .simd import (
    ITEMSIZE,
    LANES32,
    copysign,
    f32v,
    fetch_add,
    fma,
    fold64,
    hsum,
    loader,
    peek_f64,
    poke_i64,
    splat32,
    splat64,
    storer,
    tail_loader,
    vabs,
    vmax,
    vmin,
    where,
)

#: Operations and sides whose gradient subtracts a mean that is computed on its own.  (Of the
#: cross-entropy it is the value, but what the normalizers are off cancels in its own mean.)
CENTRED = {
    "js": "pq", "tv": "pq", "jeffreys": "pq", "cross_entropy": "p", "kl": "", "renyi": "",
}  # fmt: skip


def formulas(operation, side):
    """``bracket``, what a mean is subtracted from, and ``entry``, one vector of the gradient."""
    of_p = side == "p"
    js, tv, jeffreys, renyi, cross = (
        operation == name for name in ("js", "tv", "jeffreys", "renyi", "cross_entropy")
    )
    centred = side in CENTRED[operation]
    difference = operation in ("kl", "cross_entropy") and not of_p

    @inline
    def bracket(terms, weight):
        p_, q_, change, u, v, t = terms
        if cross:
            return vmax(v, -1e30) * -LN_2
        sign = -1.0 if of_p else 1.0
        if tv:
            return where(t == 0.0, 0.0, copysign(splat32(0.5), t * sign))
        if js:
            own_larger = t * sign > 0.0
            h = one_minus_exp2_32(vmin(vabs(t), FAR))
            # m/M = 1 - s, with s = h times the weight of the smaller one.
            own_weight = splat32(weight) if of_p else splat32(1.0 - weight)
            s = h * where(own_larger, 1.0 - own_weight, own_weight)
            return where(own_larger, 0.0, vabs(t) * -LN_2) - log_32(1.0 - s, s)
        return t * (LN_2 * sign)

    @inline
    def entry(terms, value, mean, alpha, beta, weight):
        p_, q_, change, u, v, t = terms
        if difference:
            return change
        own, sign = (p_, -1.0) if of_p else (q_, 1.0)
        if renyi:
            # value is R in base 2; the difference r - own, from its exponent e over own.
            e = (t + value) * -beta if of_p else fma(t, -alpha, value * -beta)
            e = vmin(vmax(e, -FAR), FAR)
            base = u if of_p else v
            size = exp2_32(base + vmax(e, 0.0)) * one_minus_exp2_32(vabs(e))
            return copysign(size, e * (1.0 if of_p else -1.0))
        if not centred:
            return own * fma(t, -LN_2, -value)
        b = bracket(terms, weight)
        product = own * (b - mean)
        if jeffreys:
            product = product + change * sign
        return product

    return bracket, entry


def build(operation, sides, dtype_p, dtype_q, dtype_into_p, dtype_into_q):
    """``sides`` is "p", "q" or "pq": whose logits the gradient is with respect to."""
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    size_out_p, size_out_q = ITEMSIZE[dtype_into_p], ITEMSIZE[dtype_into_q]
    store_p, store_tail_p = storer(dtype_into_p)
    store_q, store_tail_q = storer(dtype_into_q)
    difference = subtraction(True)
    first, _, normalizers = normalization(dtype_p, dtype_q, difference, larger_power(False))
    bracket_p, entry_p = formulas(operation, "p")
    bracket_q, entry_q = formulas(operation, "q")
    to_p, to_q = "p" in sides, "q" in sides
    centred = any(side in CENTRED[operation] for side in sides)

    @inline
    def pair(p, q, a, constants):
        """p, q, q - p, log2 p, log2 q and t of one vector; p = q = 0 where both are -inf."""
        kx0, kx1, ky0, ky1, c0, c1 = constants
        u = fma(p, a, kx0) + kx1
        v = fma(q, a, ky0) + ky1
        d, lost = difference(p, q)
        t = fma(d, a, c0) + fma(lost, a, c1)
        t = vmin(vmax(t, -1e30), 1e30)  # a NaN from -inf - -inf becomes a number; there M is 0
        m = exp2_32(vmax(u, v))
        mh = m * one_minus_exp2_32(vmin(vabs(t), FAR))
        less = m - mh
        q_larger = t > 0.0
        return where(q_larger, less, m), where(q_larger, m, less), copysign(mh, t), u, v, t

    @inline
    def vectors(x, y, j, width):
        if j + LANES32 <= width:
            return load_p(x + j * size_p), load_q(y + j * size_q)
        return tail_p(x + j * size_p, width - j), tail_q(y + j * size_q, width - j)

    @inline
    def excess(x, y, width, a, constants):
        """sum (q - p), which is 0 for the right constant c."""
        total = splat64(0.0)
        start = 0
        while start < width:
            stop = min(start + BLOCK, width)
            s = splat32(0.0)
            for j in range(start, stop, LANES32):
                p, q = vectors(x, y, j, width)
                s = s + pair(p, q, a, constants)[2]
            total = total + fold64(s)
            start = stop
        return hsum(total)

    @inline
    def split(kx, ky, c):
        """The constants, each with what float32 cannot hold of it."""
        kx0, ky0, c0 = f32(kx), f32(ky), f32(c)
        return kx0, f32(kx - f64(kx0)), ky0, f32(ky - f64(ky0)), c0, f32(c - f64(c0))

    @inline
    def means(x, y, width, a, constants, weight):
        """The means of the brackets under their own distributions, in float64."""
        total_p = splat64(0.0)
        total_q = total_p
        mass_p = total_p
        mass_q = total_p
        start = 0
        while start < width:
            stop = min(start + BLOCK, width)
            s = splat32(0.0)
            r = s
            n = s
            o = s
            for j in range(start, stop, LANES32):
                p, q = vectors(x, y, j, width)
                terms = pair(p, q, a, constants)
                if to_p:
                    s = fma(terms[0], bracket_p(terms, weight), s)
                    n = n + terms[0]
                if to_q:
                    r = fma(terms[1], bracket_q(terms, weight), r)
                    o = o + terms[1]
            total_p = total_p + fold64(s)
            total_q = total_q + fold64(r)
            mass_p = mass_p + fold64(n)
            mass_q = mass_q + fold64(o)
            start = stop
        mean_p = hsum(total_p) / hsum(mass_p) if to_p else 0.0
        mean_q = hsum(total_q) / hsum(mass_q) if to_q else 0.0
        return mean_p, mean_q

    @inline
    def write(x, y, out_p, out_q, width, a, constants, scale_p, scale_q, value, mean_p, mean_q,
              alpha, beta, weight):  # fmt: skip
        for j in range(0, width, LANES32):
            p, q = vectors(x, y, j, width)
            terms = pair(p, q, a, constants)
            if to_p:
                g = entry_p(terms, value, mean_p, alpha, beta, weight) * scale_p
                if j + LANES32 <= width:
                    store_p(out_p + j * size_out_p, g)
                else:
                    store_tail_p(out_p + j * size_out_p, g, width - j)
            if to_q:
                g = entry_q(terms, value, mean_q, alpha, beta, weight) * scale_q
                if j + LANES32 <= width:
                    store_q(out_q + j * size_out_q, g)
                else:
                    store_tail_q(out_q + j * size_out_q, g, width - j)

    @inline
    def clear(out_p, out_q, width):
        zero = splat32(0.0)
        for j in range(0, width, LANES32):
            if to_p:
                store_tail_p(out_p + j * size_out_p, zero, width - j)
            if to_q:
                store_tail_q(out_q + j * size_out_q, zero, width - j)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows, counter, chunk, redo,
        values, scales, known, into_p, into_p_stride, into_p_offsets, into_q, into_q_stride,
        into_q_offsets, inverse_temperature, alpha, weight,
    ):  # fmt: skip
        a = f64(f32(inverse_temperature * LOG2_E))
        while True:
            begin = fetch_add(counter, chunk)
            if begin >= n_rows:
                return
            for number in range(begin, min(begin + chunk, n_rows)):
                row = task_row(rows, number)
                x = row_address(p, p_stride, p_offsets, row)
                y = row_address(q, q_stride, q_offsets, row)
                out_p = row_address(into_p, into_p_stride, into_p_offsets, row) if to_p else 0
                out_q = row_address(into_q, into_q_stride, into_q_offsets, row) if to_q else 0
                value = peek_f64(values + 8 * row)
                scale_p = peek_f64(scales + 16 * row) * inverse_temperature
                scale_q = peek_f64(scales + 16 * row + 8) * inverse_temperature
                if scale_p == 0.0 and scale_q == 0.0:
                    clear(out_p, out_q, width)
                    continue
                kx = peek_f64(known + 24 * row)
                ky = peek_f64(known + 24 * row + 8)
                c = peek_f64(known + 24 * row + 16)
                D, H = 0.0, 0.0
                usable = abs(value) < math.inf
                if usable and not (abs(kx) < math.inf and abs(c) < math.inf):
                    state = first(x, y, 0, width, a)
                    rx, ry, S, D, H = state
                    usable = S < math.inf and abs(D) <= 0.75 * S
                    if usable:
                        kx, ky, c = normalizers(state)
                if not usable:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)
                    continue
                constants = split(kx, ky, c)
                if abs(D) > 0.5 * H:
                    # Most of what D adds up is the distance of the references from each other,
                    # and its rounding is not small beside what the rows differ by.
                    c -= LOG2_E * excess(x, y, width, f32(a), constants)
                    constants = split(kx, ky, c)
                mean_p, mean_q = 0.0, 0.0
                if centred:
                    mean_p, mean_q = means(x, y, width, f32(a), constants, f32(weight))
                write(
                    x, y, out_p, out_q, width, f32(a), constants, f32(scale_p), f32(scale_q),
                    f32(value), f32(mean_p), f32(mean_q), f32(alpha), f32(alpha - 1.0), f32(weight),
                )  # fmt: skip

    return kernel

"""Gradients of the divergences with respect to the logits, of rows that need care.

Ordinary rows are those of ``fused_gradients``.

Everything is a multiple of p or q that vanishes where the rows agree.  In base 2, with u = log2 p,
v = log2 q, t = v - u, tau = abs(t), M = 2**max(u, v) and h = 1 - 2**-tau, the difference
q - p = sign(t) M h does not cancel; nor does p (2**t - 1), which is cheaper, and as good unless p
underflows where q does not.  With d = log(p/q) = -t log 2:

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

Where one token has nearly all the mass, or log(p/q) is nearly the same all over, a gradient is far
smaller than the numbers that it is the difference of, and W must be right far beyond float32.
Where log p/q or log q itself is what a mean is taken off, the mean goes into its constant, which is
held in two parts, so that the difference is rounded once, after it has cancelled; the value is a
first guess of the mean, the sum of the entries that it leads to corrects it (p and q have mass 1).
Of Renyi this is R: e is -(alpha-1) s with s = t + R over p, and -alpha s with
s = t + R (alpha-1)/alpha over q; the sum of r - p is what S is off, relatively.  The mean of total
variation is
1/2 (above - below) for the masses where q > p and q < p, each summed on its own (ties are half in
either): sign/2 - W is ``below`` or -``above``.

The values were computed just before, so that the row pair is in cache.  Their kernel then also
knows the constants of log2 p, log2 q and log2(q/p), unless that was ``exact``, or too rough for a
gradient; then they are found here, as two_phase finds them.  Rows whose normalizers are not found,
or whose value is infinite, are listed before anything is written: the gradient may go to
the logits' own memory.
"""

from __future__ import annotations

import math

from .mathematics import (
    ATANH_LIMIT,
    LN_2,
    LOG2_E,
    exp2_32,
    exp2_and_rest_32,
    exp2_minus_one_32,
    inline,
    log_ratio_32,
    one_minus_exp2_32,
    twice_atanh_32,
)
from .normalization import FAR, larger_power, normalization, subtraction
from .rowloop import BLOCK, f32, f64, halves, row_address, task_row
from .simd import (
    ITEMSIZE,
    LANES32,
    copysign,
    f32v,
    fetch_add,
    fma,
    fold64,
    hany,
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

#: Operations and sides of which a mean is computed on its own, and subtracted.
CENTRED = {"js": "pq", "tv": "pq", "jeffreys": "pq"}

#: Those where it is taken off a constant of the exponents.
SHIFTED = {"kl": "p", "renyi": "pq", "cross_entropy": "p"}

#: Where log2(q/p) is no larger, q - p is p (2**t - 1): what p loses where it underflows is then
#: next to nothing in q as well.  Vectors with larger ones, which are few, go by the larger of both.
NEAR = 16.0

#: Gradients that are multiples of more than this are left to the reference.
LARGEST = 1e30


def formulas(operation, side):
    """``bracket``, what a mean is subtracted from, and ``entry``, one vector of the gradient."""
    of_p = side == "p"
    js, tv, jeffreys, renyi, cross = (
        operation == name for name in ("js", "tv", "jeffreys", "renyi", "cross_entropy")
    )
    shifted = side in SHIFTED.get(operation, "")
    difference = operation in ("kl", "cross_entropy") and not of_p

    @inline
    def bracket(terms, own_weight, other_weight, far):
        t = terms[5]
        sign = -1.0 if of_p else 1.0
        if tv:
            return where(t == 0.0, 0.0, copysign(splat32(0.5), t * sign))
        if js:
            if not (far or hany(vabs(t) > NEAR)):
                # With e = q/p - 1: own/m = (1 + s)/(1 - s) for this s.
                e = exp2_minus_one_32(t)
                if of_p:
                    s = e * -other_weight / fma(e, other_weight, 2.0)
                else:
                    s = e * other_weight / (fma(e, own_weight, 2.0) + e)
                if not hany(vabs(s) > ATANH_LIMIT):
                    return twice_atanh_32(s)
            # With M = max(p, q) and g = 2**-tau = 1 - h: m/M = 1 - h w', where w' is the weight of
            # the smaller one.  Near rows take log(own/m), which is near 0; rows that are far apart
            # log(w own/m), which differs by a constant and is near 0 there.
            rest, h = exp2_and_rest_32(vmin(vabs(t), FAR))
            own_larger = t * sign > 0.0
            s = h * where(own_larger, splat32(other_weight), splat32(own_weight))
            mixed = 1.0 - s
            if far:
                own = where(own_larger, 1.0, rest) * own_weight
                other = where(own_larger, rest, 1.0) * other_weight
                return log_ratio_32(own, mixed, other)
            log = log_ratio_32(
                where(own_larger, mixed, rest), where(own_larger, 1.0, mixed), h * other_weight
            )
            return where(own_larger, -log, log)
        return t * (LN_2 * sign)

    @inline
    def entry(terms, exponent, mean, alpha, beta, own_weight, other_weight, far):
        """``exponent`` is shifted; ``mean`` comes in two parts."""
        p_, q_, change, u, v = terms[:5]
        if difference:
            return change
        if renyi:
            # The difference of r and own, from the exponent e of r over own.
            e = exponent * (-beta if of_p else -alpha)
            own, sign = (u, 1.0) if of_p else (v, -1.0)
            if hany(vabs(e) > NEAR):
                h = one_minus_exp2_32(vmin(vabs(e), FAR))
                return copysign(exp2_32(own + vmax(e, 0.0)) * h, e * sign)
            return exp2_32(own) * exp2_minus_one_32(e) * sign
        if shifted:
            return exp2_32(u) * (exponent * -LN_2)
        own, sign = (p_, -1.0) if of_p else (q_, 1.0)
        b = bracket(terms, own_weight, other_weight, far)
        if tv:
            # ``mean`` is the mass below and that above, of which one is what b - W is.
            below, above = mean
            lower = where(b < 0.0, splat32(-above), 0.5 * (below - above))
            centred = where(b > 0.0, below, lower)
        else:
            centred = (b - mean[0]) - mean[1]
        product = own * centred
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
    centre_p, centre_q = (
        side in sides and side in CENTRED.get(operation, "") for side in ("p", "q")
    )
    shift_p, shift_q = (side in sides and side in SHIFTED.get(operation, "") for side in ("p", "q"))
    renyi = operation == "renyi"
    cross = operation == "cross_entropy"
    tv = operation == "tv"
    # Whether the gradient has q - p in it.
    differs = operation == "jeffreys" or (operation in ("kl", "cross_entropy") and to_q)

    @inline
    def change_of(u, v, t):
        """q - p."""
        if hany(vabs(t) > NEAR):
            return copysign(exp2_32(vmax(u, v)) * one_minus_exp2_32(vmin(vabs(t), FAR)), t)
        return exp2_32(u) * exp2_minus_one_32(t)

    @inline
    def pair(p, q, a, constants):
        """p, q, q - p, log2 p, log2 q and t of one vector.

        p = q = 0 where both are -inf.
        """
        kx0, kx1, ky0, ky1, c0, c1 = constants
        u = fma(p, a, kx0) + kx1
        v = fma(q, a, ky0) + ky1
        d, lost = difference(p, q)
        t = fma(d, a, c0) + fma(lost, a, c1)
        t = vmin(vmax(t, -1e30), 1e30)  # a NaN from -inf - -inf becomes a number; there p is 0
        change = t
        if differs:
            change = change_of(u, v, t)
        return exp2_32(u), exp2_32(v), change, u, v, t

    @inline
    def exponent(p, q, a, shift):
        """The logarithm that a mean was taken off: of q/p, or of q."""
        s0, s1 = shift
        if cross:
            z = fma(q, a, s0) + s1
        else:
            d, lost = difference(p, q)
            z = fma(d, a, s0) + fma(lost, a, s1)
        return vmin(vmax(z, -1e30), 1e30)

    @inline
    def vectors(x, y, j, width):
        if j + LANES32 <= width:
            return load_p(x + j * size_p), load_q(y + j * size_q)
        return tail_p(x + j * size_p, width - j), tail_q(y + j * size_q, width - j)

    @inline
    def split(kx, ky, c):
        """The constants, each with what float32 cannot hold of it."""
        kx0, kx1 = halves(kx)
        ky0, ky1 = halves(ky)
        c0, c1 = halves(c)
        return kx0, kx1, ky0, ky1, c0, c1

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
                u, v, t = pair(p, q, a, constants)[3:]
                s = s + change_of(u, v, t)
            total = total + fold64(s)
            start = stop
        return hsum(total)

    @inline
    def sums(x, y, width, a, constants, shift_of_p, shift_of_q, alpha, beta, weights):
        """What the means are made of, in float64: a sum and a mass of each side."""
        none = (f32(0.0), f32(0.0))
        wp, wq, far = weights
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
                if centre_p:
                    b = bracket_p(terms, wp, wq, far)
                    if tv:
                        s = fma(terms[0], 0.5 + b, s)
                        n = fma(terms[0], 0.5 - b, n)
                    else:
                        s = fma(terms[0], b, s)
                        n = n + terms[0]
                if centre_q:
                    b = bracket_q(terms, wq, wp, far)
                    if tv:
                        r = fma(terms[1], 0.5 + b, r)
                        o = fma(terms[1], 0.5 - b, o)
                    else:
                        r = fma(terms[1], b, r)
                        o = o + terms[1]
                if shift_p:
                    z = exponent(p, q, a, shift_of_p)
                    s = s + entry_p(terms, z, none, alpha, beta, wp, wq, far)
                if shift_q:
                    z = exponent(p, q, a, shift_of_q)
                    r = r - entry_q(terms, z, none, alpha, beta, wq, wp, far)
            total_p = total_p + fold64(s)
            total_q = total_q + fold64(r)
            mass_p = mass_p + fold64(n)
            mass_q = mass_q + fold64(o)
            start = stop
        return hsum(total_p), hsum(total_q), hsum(mass_p), hsum(mass_q)

    @inline
    def mean(total, mass):
        """In two parts; of total variation, the mass below and that above, as shares."""
        if tv:
            return f32(mass / (total + mass)), f32(total / (total + mass))
        return halves(total / mass)

    @inline
    def correction(total, order):
        """How far the exponents are from where the gradient's entries add up to 0."""
        if renyi:
            return math.log1p(total) * LOG2_E / order
        return total * LOG2_E

    @inline
    def write(x, y, out_p, out_q, width, a, constants, scale_p, scale_q, shift_of_p, shift_of_q,
              mean_p, mean_q, alpha, beta, weights):  # fmt: skip
        wp, wq, far = weights
        for j in range(0, width, LANES32):
            p, q = vectors(x, y, j, width)
            terms = pair(p, q, a, constants)
            if to_p:
                z = exponent(p, q, a, shift_of_p)
                g = entry_p(terms, z, mean_p, alpha, beta, wp, wq, far) * scale_p
                if j + LANES32 <= width:
                    store_p(out_p + j * size_out_p, g)
                else:
                    store_tail_p(out_p + j * size_out_p, g, width - j)
            if to_q:
                z = exponent(p, q, a, shift_of_q)
                g = entry_q(terms, z, mean_q, alpha, beta, wq, wp, far) * scale_q
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
        beta = alpha - 1.0
        # Jensen-Shannon divergences above this are of rows that are far apart: half the largest.
        half = -0.5 * (weight * math.log2(weight) + (1.0 - weight) * math.log2(1.0 - weight))
        powers = renyi and weight == 1.0  # scales hold S, which is corrected with R
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
                value = peek_f64(values + 8 * row) * LOG2_E
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
                usable = usable and abs(scale_p) < LARGEST and abs(scale_q) < LARGEST
                if usable and not (abs(kx) < math.inf and abs(c) < math.inf):
                    state = first(x, y, 0, width, a, False)
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
                weights = f32(weight), f32(1.0 - weight), value > half
                # value is a mean in base 2, and of Renyi what makes r a distribution.
                shift_of_p = (ky if cross else c) + value
                shift_of_q = c + value * (beta / alpha)
                of_p, of_q = (f32(0.0), f32(0.0)), (f32(0.0), f32(0.0))
                if centre_p or centre_q or shift_p or shift_q:
                    total_p, total_q, mass_p, mass_q = sums(
                        x, y, width, f32(a), constants, halves(shift_of_p), halves(shift_of_q),
                        f32(alpha), f32(beta), weights,
                    )  # fmt: skip
                    if centre_p:
                        of_p = mean(total_p, mass_p)
                    if centre_q:
                        of_q = mean(total_q, mass_q)
                    if shift_p:
                        if powers:
                            scale_p *= 1.0 + total_p
                        shift_of_p += correction(total_p, beta)
                        usable = abs(shift_of_p) < math.inf
                    if shift_q:
                        if powers:
                            scale_q *= 1.0 + total_q
                        shift_of_q += correction(total_q, alpha)
                        usable = usable and abs(shift_of_q) < math.inf
                if not usable:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)
                    continue
                write(
                    x, y, out_p, out_q, width, f32(a), constants, f32(scale_p), f32(scale_q),
                    halves(shift_of_p), halves(shift_of_q), of_p, of_q, f32(alpha), f32(beta),
                    weights,
                )  # fmt: skip

    return kernel

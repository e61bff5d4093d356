"""Values with gradients in float64, for any input whatever: what ``exact`` is for values alone.

It serves float64 logits, strided rows, unequal temperatures, and the rows that ``fused_gradients``
hands over.  With d = log(p/q), up to factors that are the same at all indices, the gradients are

    KL        wrt q  q - p                        wrt p  p (d - W)
    Jeffreys  wrt q  q (-d - W) + (q - p)         wrt p  p (d - W) - (q - p)
    JS        wrt q  q (log(q/m) - W)             wrt p  p (log(p/m) - W)
    TV        wrt q  q (sign(-d)/2 - W)           wrt p  p (sign(d)/2 - W)
    cross-entropy  wrt q  q - p                   wrt p  p (-log q - W)
    Renyi     wrt q  q - r                        wrt p  r - p

W is the mean of what it is subtracted from, under the same distribution: the entries of a gradient
add up to 0.  m = w p + (1-w) q.  With S = sum p**alpha q**(1-alpha) and the Renyi divergence
R = log(S)/(alpha-1), the tilted distribution r = p**alpha q**(1-alpha)/S is p exp((alpha-1)(d - R))
and q exp(alpha d - (alpha-1) R); of order infinity it is 1 where d is largest.

The mean of total variation is (above - below)/2 for the masses above and below the other row, each
summed on its own (ties are half in either): sign/2 - W is ``below`` or -``above``.

A gradient is 0 where the value is infinite and has no derivative; that of Renyi is its limit there,
in which r is nothing where both have support.  Tiles are read before they are written, so that the
gradient may go to the logits' own memory.
"""

from __future__ import annotations

import math

from .exact import (
    TILE,
    buffer_t,
    buffer_x,
    buffer_y,
    infinity,
    log_sums,
    stage_pair,
    summation,
    terms,
    tops,
    write,
)
from .mathematics import exp_64, expm1_64, inline, log1p_64, log_64
from .rowloop import row_address, task_row
from .simd import (
    LANES64,
    copysign,
    fetch_add,
    fma,
    hsum,
    lane_is,
    peek_f64,
    poke_f64,
    splat64,
    store,
    vabs,
    vmax,
    vmin,
    where,
)

_LARGEST = 1.7976931348623157e308

#: Gradients that a mean is taken off.
CENTRED_P = ("kl", "cross_entropy", "jeffreys", "js", "tv")
CENTRED_Q = ("jeffreys", "js", "tv")


def formulas(operation, side):
    """``bracket``, what a mean is subtracted from, and ``entry``, one vector of the gradient."""
    of_p = side == "p"
    tilted = operation in ("renyi", "renyi_0")
    largest = operation == "renyi_inf"
    centred = operation in (CENTRED_P if of_p else CENTRED_Q)

    @inline
    def bracket(at, parameter):
        p_, q_, t, log_p, log_q = at
        d = -t if of_p else t
        if operation == "cross_entropy":
            return -vmax(log_q, -_LARGEST)
        if operation == "tv":
            return where(d == 0.0, 0.0, copysign(splat64(0.5), d))
        if operation == "js":
            # m over the larger of both is 1 + (its weight - 1) (1 - g), with g = exp(-tau).
            own = parameter if of_p else 1.0 - parameter
            other = 1.0 - parameter if of_p else parameter
            above = d > 0.0
            tau = vabs(d)
            of_smaller = where(above, splat64(other), splat64(own))
            of_larger = where(above, splat64(own), splat64(other))
            excess = of_smaller * expm1_64(-tau)
            mixed = fma(of_smaller, exp_64(-tau), of_larger)
            log = where(excess < -0.5, log_64(mixed), log1p_64(vmax(excess, -0.75)))
            return vmin(d, 0.0) - log
        return d

    @inline
    def entry(at, place, parameter, known):
        p_, q_, t, log_p, log_q = at
        own, log_own = (p_, log_p) if of_p else (q_, log_q)
        sign = 1.0 if of_p else -1.0
        # How much more than the other one is.
        change = vmax(p_, q_) * copysign(expm1_64(-vabs(t)), t * -sign)
        if largest:
            return (where(lane_is(own, place), splat64(1.0), 0.0) - own) * sign
        if tilted:
            divergence = known[0]
            if of_p:
                tilt = (-t - divergence) * parameter
            else:
                tilt = fma(t, -(parameter + 1.0), -parameter * divergence)
            near = own * expm1_64(vmin(vmax(tilt, -1.0), 1.0))
            far = exp_64(vmin(log_own + tilt, 1.0)) - own
            difference = where(vabs(tilt) < 1.0, near, far)
            difference = where(log_p == -math.inf, -own, difference)
            if of_p and parameter > 0.0:
                difference = where(log_q == -math.inf, 0.0, difference)
            return difference * sign
        if not centred:
            return change
        b = bracket(at, parameter)
        if operation == "tv":
            above, below = known
            tie = splat64(0.5 * (below - above))
            return own * where(b > 0.0, splat64(below), where(b < 0.0, splat64(-above), tie))
        product = own * (b - known[0])
        if operation == "jeffreys":
            product = product + change
        return where(log_own == -math.inf, 0.0, product)

    return bracket, entry


def build(operation):
    tv = operation == "tv"
    tilted = operation in ("renyi", "renyi_0")
    support = operation == "renyi_0"
    largest = operation == "renyi_inf"
    # Those of P have no derivative where Q lacks support that P has.
    steep_p = operation in ("kl", "cross_entropy", "jeffreys")
    steep_q = operation == "jeffreys"
    centred = operation in CENTRED_P
    centred_q = operation in CENTRED_Q
    total = summation(operation)
    place_of = summation("top_ratio")
    infinite = infinity(operation)
    bracket_p, entry_p = formulas(operation, "p")
    bracket_q, entry_q = formulas(operation, "q")

    @inline
    def add(own, b, sums):
        """To the sum and the mass; of total variation, to the masses above and below."""
        s, n = sums
        if tv:
            return fma(own, 0.5 + b, s), fma(own, 0.5 - b, n)
        return s + where(own == 0.0, 0.0, own * b), n + own

    @inline
    def known_of(s, n):
        if tv:
            return s / (s + n), n / (s + n)
        return s / n, 0.0

    @inline
    def means(x, y, t, xp, yq, width, how, found, sums, parameter):
        p_step, p_dtype, q_step, q_dtype, probabilities, ip, iq = how
        mx, my, wx, wy = found
        s = 0.0
        n_p = 0.0
        r = 0.0
        n_q = 0.0
        for start in range(0, width, TILE):
            n = min(TILE, width - start)
            stage_pair(x, y, t, xp + start * p_step, yq + start * q_step, how, mx, my, wx, wy, n)
            of_p = (splat64(0.0), splat64(0.0))
            of_q = of_p
            for j in range(0, n, LANES64):
                at = terms(x, y, t, j, sums)
                of_p = add(at[0], bracket_p(at, parameter), of_p)
                if centred_q:
                    of_q = add(at[1], bracket_q(at, parameter), of_q)
            s += hsum(of_p[0])
            n_p += hsum(of_p[1])
            r += hsum(of_q[0])
            n_q += hsum(of_q[1])
        if centred_q:
            return known_of(s, n_p), known_of(r, n_q)
        return known_of(s, n_p), (0.0, 0.0)

    @inline
    def fill(out, step, dtype, width, value):
        for j in range(width):
            write(out + j * step, dtype, value)

    @inline
    def copy(buffer, out, step, dtype, n):
        for j in range(n):
            write(out + j * step, dtype, peek_f64(buffer + 8 * j))

    @inline
    def usable(g, log_own):
        """What there is no derivative of is 0, as what is outside the support."""
        return where((vabs(g) < math.inf) & (log_own > -math.inf), g, 0.0)

    def kernel(
        p, p_stride, p_offsets, p_step, p_dtype, q, q_stride, q_offsets, q_step, q_dtype,
        width, rows, n_rows, counter, chunk, values, scales,
        into_p, into_p_stride, into_p_offsets, into_p_step, into_p_dtype,
        into_q, into_q_stride, into_q_offsets, into_q_step, into_q_dtype,
        powers, ip, iq, parameter, factor_p, factor_q,
    ):  # fmt: skip
        x = buffer_x()
        y = buffer_y()
        t = buffer_t()
        how = (p_step, p_dtype, q_step, q_dtype, 0, ip, iq)
        while True:
            begin = fetch_add(counter, chunk)
            if begin >= n_rows:
                return
            for number in range(begin, min(begin + chunk, n_rows)):
                row = task_row(rows, number)
                xp = row_address(p, p_stride, p_offsets, row)
                yq = row_address(q, q_stride, q_offsets, row)
                out_p = row_address(into_p, into_p_stride, into_p_offsets, row) if into_p else 0
                out_q = row_address(into_q, into_q_stride, into_q_offsets, row) if into_q else 0
                scale = peek_f64(scales + 8 * row)
                mx, my, top_x, top_y, valid, no_q, no_p = tops(x, y, xp, yq, width, how)
                found = (mx, my, 0.0, 0.0)
                places = (mx, my, top_x, top_y)
                sums = (0.0, 0.0, 0.0, 0.0)
                value = math.nan
                if valid:
                    sums = log_sums(x, y, t, xp, yq, width, how, places, 0.0, 0.0)
                    if infinite(no_q, no_p, parameter):
                        value = math.inf
                    elif support and not no_p:
                        value = 0.0
                    else:
                        value = total(x, y, t, xp, yq, width, how, found, sums, parameter)
                poke_f64(values + 8 * row, value)
                if scale == 0.0 or not valid:
                    flat = 0.0 if scale == 0.0 else math.nan
                    if into_p:
                        fill(out_p, into_p_step, into_p_dtype, width, flat)
                    if into_q:
                        fill(out_q, into_q_step, into_q_dtype, width, flat)
                    continue
                scale_p = scale * factor_p * ip
                scale_q = scale * factor_q * iq
                known_p = (value, 0.0)
                known_q = known_p
                place = -1
                if centred:
                    known_p, known_q = means(x, y, t, xp, yq, width, how, found, sums, parameter)
                if largest:
                    place = int(place_of(x, y, t, xp, yq, width, how, found, sums, parameter))
                if (steep_p and no_q) or (tilted and value == math.inf and parameter <= 0.0):
                    scale_p = 0.0
                if (steep_q and no_p) or (tilted and value == math.inf and parameter <= 0.0):
                    scale_q = 0.0
                if powers != 0:  # the gradient is that of S
                    S = math.exp(parameter * value)
                    scale_p *= S
                    scale_q *= S
                for start in range(0, width, TILE):
                    n = min(TILE, width - start)
                    stage_pair(
                        x, y, t, xp + start * p_step, yq + start * q_step, how, mx, my, 0.0, 0.0, n
                    )
                    for j in range(0, n, LANES64):
                        at = terms(x, y, t, j, sums)
                        here = place - start - j
                        g = entry_p(at, here, parameter, known_p) * scale_p
                        h = entry_q(at, here, parameter, known_q) * scale_q
                        store(x + 8 * j, usable(g, at[3]))
                        store(y + 8 * j, usable(h, at[4]))
                    if into_p:
                        copy(x, out_p + start * into_p_step, into_p_step, into_p_dtype, n)
                    if into_q:
                        copy(y, out_q + start * into_q_step, into_q_step, into_q_dtype, n)

    return kernel

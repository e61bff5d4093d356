"""KL divergence, Rényi divergence and cross-entropy in one read of the two rows.

State of a row.  Let m be the largest x seen, k its first index (the *top*), c a constant,
t = (y - x) + c and e = exp(x - m).  With phi(t) = exp(t) - 1 - t >= 0, the state holds

    S = sum e,  D = sum e t,  B = sum e phi(t)

over all indices seen but the top, and a fourth sum G that depends on the operation:
e phi(-beta t) for Rényi, e (m - x) for the cross-entropy, e psi(t) (below) for both KL.  To
these come the top's own t and the constants m and c.  The top is kept apart so that nothing
is lost when one symbol has nearly all the mass: everything else is then small and summed
among its equals.  E adds up, twice, what negative numbers went into B (and G, or G/beta): with the
sums themselves, what rounding errors are proportional to.

Result.  With the top put in, A = (B + D)/S = E_p[expm1(t)], and the normalizers differ by
logsumexp(x) - logsumexp(y) = c - log1p(A), so that

    KL = E_p[exp(-d) - 1 + d] = B/S - (A - log1p(A)),

two terms that are each >= 0; the second is of second order in the distance of c from the
mean of x - y, which is kept small by moving c when it drifts.  For the Rényi divergence of
order alpha = 1 + beta, with C = E_p[expm1(-beta t)] = G/S - beta D/S,

    log sum p^alpha q^(1-alpha) = beta log1p(A) + log1p(C)
                                = beta B/S + G/S - beta (A - log1p(A)) - (C - log1p(C)),

where again nothing cancels for alpha >= 1/2 (smaller orders swap the arguments), and
which divided by beta goes over into KL as beta goes to 0.  Far apart, terms are much larger than
what is left of them; there the logarithms themselves are taken, and KL = log1p(A) - D/S.  The
cross-entropy is the entropy of P, log(1 + S) + G/(1 + S), plus KL: both are >= 0.

The operation ``kl_both`` adds KL(Q, P), with G = sum e psi(t), psi(t) = 1 - exp(t) + t exp(t)
>= 0: under Q, whose sum is S' = S + D + B, it is E_q[phi(-t)] = G/S' less the same excess of
A' = E_q[expm1(-t)] = -(D + B)/S'.

Moving c by h (t becomes t + h) and m by a factor f is exact in these sums:
D + h S;  exp(h) B + expm1(h) D + phi(h) S;  for Rényi's G the same with -beta h, -beta D; for
that of both KL, exp(h) (G + h S') - expm1(h) S.

Rows that this form cannot finish exactly (NaN, an index in one support only, a log-ratio
beyond ``limit``, or more cancellation than float32 sums allow) are listed for the float64
kernel, which knows no exceptions.  Rows where the same entries are -inf in both stay here.
"""

from __future__ import annotations

import functools
import math

from .mathematics import (
    LN_2,
    LOG2_E,
    PHI_NEAR,
    excess,
    exp2_32,
    exp2_near_0,
    inline,
    near_phi_32,
    phi,
    phi_32,
    psi,
)
from .normalization import power, rounding, subtraction
from .rowloop import (
    BLOCK,
    TILE,
    UNDERFLOW,
    ahead,
    comparison,
    entry,
    f32,
    f64,
    first_top,
    passes,
    row_address,
    task_row,
)
from .simd import (
    ITEMSIZE,
    LANES32,
    any_order,
    f32v,
    fetch_add,
    fma,
    fold64,
    halves_sum32,
    hany,
    hmax,
    hsum,
    lane_is,
    lanes_below,
    loader,
    peek_f64,
    poke_f64,
    poke_i64,
    splat32,
    splat64,
    tail_loader,
    unordered,
    vabs,
    vmax,
    vmin,
    where,
)

#: Numbers in the state of a row, as it is written for another thread to merge.
STATE = 8

#: A sum may be this much larger than the result that its rounding errors go into.  (For a
#: Rényi divergence of order 1/2 it is three times as large at best.)
CANCELLATION = 8.0

#: From here on, errors of a few 1e-7 in a result are beside it; and of 1e-7, as ``exactly`` has.
APART, APART_EXACTLY = 1.0, 0.25

#: An entry so far below all others that its exponential is 0.
NO_MASS = -1e30

#: Rows that differ by a constant as large as this are left to the float64 kernel.
FARTHEST = 1000.0


@functools.cache
def arithmetic(operation, exactly, cancellation=CANCELLATION):
    """What an operation does with vectors and states, of whatever dtypes they were read from.

    ``moved``, ``under`` and ``merge`` of states, ``step`` and ``near_step`` by a vector, ``finish``
    and ``constants``.
    """
    renyi = operation == "renyi"
    cross = operation == "cross_entropy"
    both = operation == "kl_both"
    # Of both directions E holds what went into either sum and its moves.
    allowed = 3.0 * cancellation if both else cancellation
    difference, raised = subtraction(exactly), power(exactly)
    rounded = rounding(exactly)
    apart = APART_EXACTLY if exactly else APART

    @inline
    def exponent(p, q, a, c):
        """t = a (q - p) + c, and with ``exactly`` what it is rounded off, else 0."""
        d, lost = difference(p, q)
        if not exactly:
            return fma(d, a, c), lost
        # The rounding errors of a product and a sum; then t and they are rounded to their sum.
        product = d * a
        t = product + c
        back = t - product
        rest = (product - (t - back)) + (c - back) + fma(lost, a, fma(d, a, -product))
        total = where(unordered(rest, rest), t, t + rest)  # infinities stay
        rest = rest - (total - t)
        return total, where(unordered(rest, rest), 0.0, rest)

    @inline
    def corrected(f, t, rest):
        """phi of t + rest from that of t, in base 2: its derivative is expm1."""
        return fma((f + t) * LN_2, rest, f) if exactly else f

    @inline
    def moved(state, h, beta):
        """The same row seen with c + h."""
        m, S, top, c, D, B, G, E = state
        f = math.exp(h)
        linear = math.expm1(h) * D
        constant = phi(h) * S
        E = max(f, math.exp(-beta * h)) * E + 2.0 * max(0.0, -linear)
        if both:
            G = f * (G + h * (S + D + B)) - math.expm1(h) * S
            E += abs(h) * (abs(D) + B) + constant
        B = f * B + linear + constant
        if renyi:
            f = math.exp(-beta * h)
            linear = -math.expm1(-beta * h) * beta * D
            constant = phi(-beta * h) * S
            E += 2.0 * max(0.0, -linear) / abs(beta)
            G = f * G + linear + constant
        return m, S, top + h, c + h, D + h * S, B, G, E

    @inline
    def under(state, m, beta):
        """The sums (S, D, B, G, E) of a state, its top among them, relative to a larger m."""
        own, S, top, c, D, B, G, E = state
        f = math.exp(own - m)
        b = phi(top)
        if renyi:
            G += phi(-beta * top)
        if both:
            G += psi(top)
        if cross:
            G += (m - own) * (S + 1.0)
        return f * (S + 1.0), f * (D + top), f * (B + b), f * G, f * E

    @inline
    def merge(a, b, beta):
        """The state of two parts together."""
        if b[0] > a[0]:
            a, b = b, a
        b = moved(b, a[3] - b[3], beta)
        m, S, top, c, D, B, G, E = a
        s, d, bb, g, ee = under(b, m, beta)
        return m, S + s, top, c, D + d, B + bb, G + g, E + ee

    @inline
    def step(p, q, a, ref, c, beta, limit, reach, S, D, B, G, high, low, bad, far):
        """Add one vector of entries to the sums; -inf in both rows adds nothing."""
        z = fma(p, a, ref)
        e = raised(p, a, ref, 0.0) if exactly else exp2_32(z)
        t, rest = exponent(p, q, a, c)
        bad = bad | unordered(p, q)
        far = far | ~(vabs(t) < reach)
        high = vmax(t, high)
        t = vmin(t, limit)  # a NaN from -inf - -inf becomes a number; its e is 0
        D = fma(e, t, D)
        f = corrected(phi_32(t), t, rest)
        B = fma(e, f, B)
        if both:
            # psi = t expm1(t) - phi(t); far below 0, where this cancels, 1 - exp(t) (1 - t).
            # In base 2, with phi and psi over log 2: expm1(t) = (t + phi) log 2.
            grown = (t + f) * LN_2
            close = fma(t, grown, -f)
            apart = fma(grown + 1.0, t, -(t + f))
            below = t < -4.0
            if hany(below):  # what f is rounded by, times t, would show
                apart = where(below, fma(exp2_32(t), t - LOG2_E, LOG2_E), apart)
            G = fma(e, where(t < -1.0, apart, close), G)
        if renyi:
            low = vmin(t, low)
            v = vmin(t * -beta, 126.0)
            G = fma(e, corrected(phi_32(v), v, fma(t, -beta, -v) - rest * beta), G)
        if exactly:
            D = fma(e, rest, D)
        if cross:
            G = fma(e, vmax(-200.0, z), G)
        return S + e, D, B, G, high, low, bad, far

    @inline
    def near_step(p, q, a, ref, c, beta, S, D, B, G, high):
        """``step`` where abs(t) and abs(beta t) are small; ``high`` is their largest square."""
        u = fma(p, a, ref)
        e = exp2_32(u)
        t = fma(q - p, a, c)
        z = t * t
        high = vmax(z, high)
        D = fma(e, t, D)
        if both:
            f = z * near_phi_32(t, z)
            B = fma(e, f, B)
            G = fma(e, fma(t, (t + f) * LN_2, -f), G)
        else:
            B = fma(e * z, near_phi_32(t, z), B)
        if renyi:
            t = t * -beta
            z = t * t
            high = vmax(z, high)
            G = fma(e * z, near_phi_32(t, z), G)
        if cross:
            G = fma(e, vmax(-200.0, u), G)
        return S + e, D, B, G, high

    @inline
    def finish(state, beta):
        """The divergence and, of both KL, the reverse; NaN where the sums do not carry them.

        And whether the rows are close enough for the normalizers' ratio to be as exact.
        """
        m, S, top, c, D, B, G, E = state
        S = S + 1.0
        D = D + top
        B = B + phi(top)
        E = E + B
        A = (B + D) / S
        value = B / S - excess(A)
        # Where the rows differ by a constant c, the rounding of y - x makes errors of c 2**-24 in
        # t, which average out over the S or more symbols that carry the mass.  The top's own t is
        # exact: of a row where it has nearly all, the errors are beside the t of the others, whose
        # square is about the value over their mass.
        noise = rounded(c) * c * c * min(1.0, S - 1.0) / (100.0 * S)
        total = S + D + B
        other = 0.0
        C = A
        if both:
            G += psi(top)
            E += G
            other = G / total - excess(-(B + D) / total)
        entropy = math.log1p(S - 1.0) + G / S if cross else 0.0
        value += entropy
        if renyi:
            G += phi(-beta * top)
            E += G / abs(beta)
            C = (G - beta * D) / S
            value += (G / S - excess(C)) / beta
        # Cancellation among the terms, or in a sum whose logarithm is taken.  What is made of the
        # power has as relative error beta times the error of its logarithm.
        least = min(1.0, 1.0 + A, 1.0 + C)
        most = 1.0 / abs(beta) if renyi else math.inf
        close = E <= allowed * min(value, most) * S * least
        if not close or (both and E > allowed * other * total):
            close = False
            # Far apart, the logarithms of the sums themselves are exact enough.
            # Rounding errors of either are proportional to what went into its sum.
            ratio = math.log1p(A)
            if renyi:
                value = ratio + math.log1p(C) / beta
                own = E - G / abs(beta), E - B
                errors = (own[0] + abs(D)) / (1.0 + A) + (own[1] + abs(D)) / (1.0 + C)
            else:
                value = ratio + (entropy - D / S)
                errors = (E + abs(D)) / (1.0 + A) + abs(D)
            least = value
            if both:
                other = (G + B + D) / total - ratio
                least = min(value, other)
            if not (least >= apart and errors <= CANCELLATION * min(least, most) * S):
                return math.nan, math.nan, False
        # log2(e), as rounded, is a temperature that is off by 1.3e-8: so much of the logarithm.
        if renyi and abs(beta) * value > 40.0:
            return math.nan, math.nan, False
        if not (noise <= value and abs(c) < FARTHEST and (not both or noise <= other)):
            return math.nan, math.nan, False
        return max(value, 0.0), max(other, 0.0), close

    @inline
    def constants(state):
        """Those of log2 p = a x + kx, log2 q = a y + ky and log2(q/p) = a (y - x) + c."""
        m, S, top, c, D, B, G, E = state
        kx = -LOG2_E * (m + math.log1p(S))
        c -= math.log1p((B + phi(top) + D + top) / (S + 1.0))
        return kx, kx + LOG2_E * c, LOG2_E * c

    return moved, under, merge, step, near_step, finish, constants


@functools.cache
def reader(operation, dtype_p, dtype_q, exactly):
    """An inlined ``part(x, y, start, stop, a, beta, limit)``: the state of a part of two rows."""
    renyi = operation == "renyi"
    cross = operation == "cross_entropy"
    near = not exactly
    moved, under, _, step, near_step, _, _ = arithmetic(operation, exactly)
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    # Vectors of near blocks; where there is something to leave out, in the order of memory.
    vector, splat, near_p, near_q = any_order(dtype_p, dtype_q)
    lanes = vector.lanes
    near_tail_p, near_tail_q = tail_loader(dtype_p, vector), tail_loader(dtype_q, vector)
    entry_p, entry_q = entry(dtype_p), entry(dtype_q)
    ahead_p, ahead_q = ahead(dtype_p), ahead(dtype_q)
    max_p, find_p = passes(dtype_p)
    max_q, _ = passes(dtype_q)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]

    @inline
    def near_block(x, y, start, stop, hole, a, ref, c, beta):
        """(S, D, B, G) of [start, stop) without ``hole``, and whether they were near."""
        s = splat(0.0)
        d = s
        b = s
        g = s
        high = s
        j = start
        full = start + (stop - start) // lanes * lanes
        last = full
        if start <= hole < full:
            last = start + (hole - start) // lanes * lanes
        while True:
            while j < last:
                ahead_p(x, j)
                ahead_q(y, j)
                s, d, b, g, high = near_step(
                    near_p(x + j * size_p), near_q(y + j * size_q),
                    a, ref, c, beta, s, d, b, g, high,
                )  # fmt: skip
                j += lanes
            if j >= stop:
                break
            p = near_tail_p(x + j * size_p, stop - j)
            q = near_tail_q(y + j * size_q, stop - j)
            # The hole, and what is beyond the end, become entries without mass.
            out = lane_is(s, hole - j) | ~lanes_below(s, stop - j)
            p = where(out, NO_MASS, p)
            q = where(out, NO_MASS, q)
            s, d, b, g, high = near_step(p, q, a, ref, c, beta, s, d, b, g, high)
            j += lanes
            last = full
        near = not hany((high > PHI_NEAR * PHI_NEAR) | unordered(d, d))
        return halves_sum32(s), halves_sum32(d), halves_sum32(b), halves_sum32(g), near

    @inline
    def begins_near(x, y, start, stop, a, c):
        """Whether the first vector is near: where it is not, a near block would be for nothing."""
        p = tail_p(x + start * size_p, stop - start)
        q = tail_q(y + start * size_q, stop - start)
        return not hany(vabs(fma(q - p, a, c)) > PHI_NEAR)

    @inline
    def sums(x, y, start, stop, hole, a, ref, c, beta, limit, close):
        """(S, D, B, G, largest t, largest -t, any NaN, near) of [start, stop) without ``hole``."""
        zero = splat32(0.0)
        S = splat64(0.0)
        D = S
        B = S
        G = S
        high = zero
        low = zero
        never = lane_is(zero, -1)
        bad = never
        reach = f32(PHI_NEAR) / max(abs(beta), f32(1.0))
        full = start + (stop - start) // LANES32 * LANES32
        j = start
        while j < stop:
            last = min(full, j + BLOCK)
            s = zero
            d = zero
            b = zero
            g = zero
            done = False
            if near and close:
                s, d, b, g, done = near_block(x, y, j, last, hole, a, ref, c, beta)
            if done:
                j = last
            else:
                if j <= hole < last:
                    last = start + (hole - start) // LANES32 * LANES32
                s = zero
                d = zero
                b = zero
                g = zero
                far = never
                while j < last:
                    ahead_p(x, j)
                    ahead_q(y, j)
                    s, d, b, g, high, low, bad, far = step(
                        load_p(x + j * size_p), load_q(y + j * size_q),
                        a, ref, c, beta, limit, reach, s, d, b, g, high, low, bad, far,
                    )  # fmt: skip
                    j += LANES32
                close = not hany(far)
            if j == full or j <= hole < j + LANES32:
                p = tail_p(x + j * size_p, stop - j)
                q = tail_q(y + j * size_q, stop - j)
                out = lane_is(p, hole - j)
                p = where(out, -math.inf, p)
                q = where(out, -math.inf, q)
                s, d, b, g, high, low, bad, _ = step(
                    p, q, a, ref, c, beta, limit, reach, s, d, b, g, high, low, bad, never
                )
                j += LANES32
            S = S + fold64(s)
            D = D + fold64(d)
            B = B + fold64(b)
            G = G + fold64(g)
        return (
            hsum(S), hsum(D), hsum(B), hsum(G), hmax(high), hmax(-low), hany(bad), close,
        )  # fmt: skip

    @inline
    def part(x, y, start, stop, a, beta, limit):
        """The state of the entries [start, stop) of a row; B is NaN where it cannot be had.

        ``a`` is log2(e)/T in float32.  Vectors hold exponents in base 2, with a constant c2
        that float32 holds exactly; the state holds natural ones, c = c2 log 2.
        """
        far = limit / max(abs(beta), 1e-30)
        off = 0.5 / max(abs(beta), 1.0)
        tile_stop = min(start + TILE, stop)
        largest = f64(max_p(x, start, tile_stop))
        c2 = f64(f32((largest - f64(max_q(y, start, tile_stop))) * a))
        if not math.isfinite(c2):
            return 0.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0.0, 0.0
        guessed = True
        close = begins_near(x, y, start, tile_stop, f32(a), f32(c2))
        hole = find_p(x, start, tile_stop, f32(largest))
        top = ((entry_q(y, hole) - entry_p(x, hole)) * a + c2) * LN_2
        state = (largest * a * LN_2, 0.0, top, c2 * LN_2, 0.0, 0.0, 0.0, 0.0)
        # exp(x - m) is computed as 2**(a x + ref) with a rounded ref, which multiplies every
        # term by 2**(a m + ref).
        ref = f32(-largest * a)
        shift = largest * a + ref
        factor = exp2_near_0(-shift)
        j = start
        while True:
            s, d, b, g, high, low, bad, close = sums(
                x, y, j, tile_stop, hole, f32(a), ref, f32(c2), f32(beta), f32(limit), close
            )
            s *= factor
            d *= factor * LN_2
            b *= factor * LN_2
            g *= factor * LN_2
            if cross:  # sum of e (m - x), from that of e (a x + ref)
                g = shift * LN_2 * s - g
            m, S, top, c, D, B, G, E = state
            state = (
                m,
                S + s,
                top,
                c,
                D + d,
                B + b,
                G + g,
                E,
            )
            if bad or high > limit or (renyi and low > far) or not B + b < math.inf:
                return m, S, top, c, D, math.nan, G, E
            m, S, top, c, D, B, G, E = state
            d = D + top
            b = B + min(0.5 * top * top, abs(top))  # B with the top, nearly
            if guessed and (d * d > 1.3 * b * (S + 1.0) or abs(d) > off * (S + 1.0)):
                # The first tile's c was a guess from two maxima.  It was bad: again.
                guessed = False
                c2 = f64(f32(c2 - d / (S + 1.0) * LOG2_E))
                close = begins_near(x, y, start, tile_stop, f32(a), f32(c2))
                state = (m, 0.0, top + (c2 * LN_2 - c), c2 * LN_2, 0.0, 0.0, 0.0, 0.0)
                continue
            guessed = False
            j = tile_stop
            if j >= stop:
                return state
            if d * d > b * (S + 1.0) or abs(d) > off * (S + 1.0):
                # c is off the mean of t by so much that half of B comes from it, or that terms are
                # beyond what is left of them: move it.
                c2 = f64(f32(c2 - d / (S + 1.0) * LOG2_E))
                state = moved(state, c2 * LN_2 - c, beta)
            tile_stop = min(j + TILE, stop)
            hole = -1
            before = largest
            largest = f64(max_p(x, j, tile_stop))
            if largest > before:
                hole = find_p(x, j, tile_stop, f32(largest))
                m = largest * a * LN_2
                S, D, B, G, E = under(state, m, beta)
                ref = f32(-largest * a)
                shift = largest * a + ref
                factor = exp2_near_0(-shift)
                top = ((entry_q(y, hole) - entry_p(x, hole)) * a + c2) * LN_2
                state = (m, S, top, c2 * LN_2, D, B, G, E)
                # A top that outweighs the rest is where the mean now is.
                if S < 1.0 and math.isfinite(top):
                    c2 = f64(f32(c2 - top * LOG2_E))
                    state = moved(state, c2 * LN_2 - state[3], beta)
            else:
                largest = before

    return part


def build(operation, dtype_p, dtype_q, exactly):
    """``exactly`` carries along what the subtraction y - x rounds off.

    Into ``known`` go the constants of a row, and where it has five columns the first index of the
    largest entry of P and of Q.
    """
    both = operation == "kl_both"
    _, _, merge, _, _, finish, constants = arithmetic(operation, exactly)
    part = reader(operation, dtype_p, dtype_q, exactly)
    differ = comparison(dtype_p, dtype_q)
    first_top_p, first_top_q = first_top(dtype_p), first_top(dtype_q)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows,
        counter, chunk, parts, part_width, states, done, redo, out, known, known_columns,
        inverse_temperature, beta, limit,
    ):  # fmt: skip
        a = f64(f32(inverse_temperature * LOG2_E))
        n_tasks = n_rows * parts
        while True:
            first = fetch_add(counter, chunk)
            if first >= n_tasks:
                return
            for task in range(first, min(first + chunk, n_tasks)):
                number = task // parts
                row = task_row(rows, number)
                x = row_address(p, p_stride, p_offsets, row)
                y = row_address(q, q_stride, q_offsets, row)
                start = (task - number * parts) * part_width
                state = part(x, y, start, min(start + part_width, width), a, beta, limit * LOG2_E)
                if parts > 1:
                    at = states + task * (8 * STATE)
                    for i in range(STATE):
                        poke_f64(at + 8 * i, state[i])
                    # The thread that brings the last part of a row merges all of them, in
                    # their order.
                    if fetch_add(done + 8 * number, 1) + 1 < parts:
                        continue
                    at = states + number * parts * (8 * STATE)
                    state = load_state(at)
                    for i in range(1, parts):
                        state = merge(state, load_state(at + i * (8 * STATE)), beta)
                value, other, close = finish(state, beta)
                if (value < UNDERFLOW or (both and other < UNDERFLOW)) and differ(x, y, width):
                    value = math.nan
                if known != 0:
                    found = constants(state)
                    at = known + 8 * known_columns * row
                    for i in range(3):
                        poke_f64(at + 8 * i, found[i] if close else math.nan)
                    if known_columns > 3:
                        poke_f64(at + 24, first_top_p(x, width)[1])
                        poke_f64(at + 32, first_top_q(y, width)[1])
                if both:
                    poke_f64(out + 16 * row, value)
                    poke_f64(out + 16 * row + 8, other)
                else:
                    poke_f64(out + 8 * row, value)
                if not value < math.inf:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)

    @inline
    def load_state(at):
        return (
            peek_f64(at), peek_f64(at + 8), peek_f64(at + 16), peek_f64(at + 24),
            peek_f64(at + 32), peek_f64(at + 40), peek_f64(at + 48), peek_f64(at + 56),
        )  # fmt: skip

    return kernel

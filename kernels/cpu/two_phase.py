"""The symmetric divergences: Jensen-Shannon, total variation, Hellinger, Jeffreys.

All are sums of M k(tau) with M = max(p, q), tau = abs(log(p/q)), so they need the
normalizers first.  The first phase reads the row pair from memory and finds them; the
second reads the pair again, from cache, and sums.

Swapping the arguments must not change a bit.  So every quantity is either symmetric or
changes its sign only, operation by operation.  Exponents are kept in base 2: with a =
log2(e)/T, u = a x + rx and v = a y + ry for references rx, ry (about minus the maxima),
t = v - u = a (y - x) + (ry - rx), h = 1 - 2**-abs(t) and M = 2**max(u, v), the first phase
sums

    S = sum (2**u + 2**v) = 2 sum M - sum M h,   D = sum (2**v - 2**u) = sum sign(t) M h,

so that the normalizers' ratio comes from D, whose terms vanish where the rows agree, and not
from the difference of two large sums: with Sx = (S - D)/2 and Sy = (S + D)/2,

    log2(p/q) = -(t + C - (ry - rx)),   C = ry - rx + log2(Sx/Sy).

References are multiples of 1/16, hence ry - rx is exact.  Moving them by f = 2**hx, g =
2**hy changes (S, D) into ((f+g) S + (g-f) D, (f+g) D + (g-f) S)/2, where g - f is taken as
an odd function of hy - hx.  The sum H of M h bounds the rounding error of D.

Entries that are -inf in both rows have M = 0 and contribute nothing.
"""

from __future__ import annotations

import math

from .mathematics import LN_2, LOG2_E, exp2_32, inline, one_minus_exp2_32
from .rowloop import (
    BLOCK,
    TILE,
    UNDERFLOW,
    ahead,
    comparison,
    f32,
    f64,
    passes,
    row_address,
    task_row,
)
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
    lane_is,
    loader,
    peek_f64,
    poke_f64,
    poke_i64,
    prefetch,
    splat32,
    splat64,
    tail_loader,
    unordered,
    vabs,
    vmax,
    vmin,
    where,
)

STATE = 6

#: The largest tau, in base 2, that is told apart: 2**-126 is the smallest normal number.
FAR = 126.0

# Whole row, or only one phase of a part of it.
BOTH, FIRST, SECOND = 0, 1, 2


# The integrands k of tau, in base 2, 0 <= tau <= FAR.


@inline
def k_js(tau):
    """[(1+g)(log 2 - log1p(g)) - g tau]/2 with g = exp(-tau).

    tau**2 times a polynomial up to tau = 2, which nearly always is all that is needed where
    the rows are close: the rest is jumped over when no lane needs it.
    """
    k = fma(tau, 4.97996211379359e-07, -6.252591447264422e-06)  # 4e-8
    k = fma(k, tau, 4.7387035010615364e-05)
    k = fma(k, tau, -0.0004160769749432802)
    k = fma(k, tau, 0.0036066104657948017)
    k = fma(k, tau, -0.02081403322517872)
    k = fma(k, tau, 0.06005662679672241)
    k = k * tau * tau
    apart = tau > 2.0
    if hany(apart):
        g = exp2_32(-tau)
        log1p = fma(g, -0.10168222337961197, 0.18768173456192017)  # g <= 1/4: 1e-8
        log1p = fma(log1p, g, -0.2490830421447754)
        log1p = fma(log1p, g, 0.3333164155483246)
        log1p = fma(log1p, g, -0.49999991059303284)
        log1p = g * fma(log1p, g, 1.0)
        far = fma(1.0 + g, fma(log1p, -0.5, 0.5 * LN_2), g * tau * (-0.5 * LN_2))
        k = where(apart, far, k)
    return k


@inline
def k_tv(tau):
    """(1 - exp(-tau))/2."""
    return one_minus_exp2_32(tau) * 0.5


@inline
def k_hellinger2(tau):
    """(1 - exp(-tau/2))**2/2."""
    r = one_minus_exp2_32(tau * 0.5)
    return r * r * 0.5


@inline
def k_jeffreys(tau):
    """(1 - exp(-tau)) tau."""
    return one_minus_exp2_32(tau) * tau * LN_2


#: Rounding must not carry a result beyond what it can be.
CEILING = {"js": LN_2, "tv": 1.0, "hellinger2": 1.0}
INTEGRANDS = {"js": k_js, "tv": k_tv, "hellinger2": k_hellinger2, "jeffreys": k_jeffreys}


def build(operation, dtype_p, dtype_q):
    k = INTEGRANDS[operation]
    ceiling = CEILING.get(operation, math.inf)
    unbounded = operation == "jeffreys"
    first_order = operation == "tv"
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    ahead_p, ahead_q = ahead(dtype_p), ahead(dtype_q)
    max_p, _ = passes(dtype_p)
    max_q, _ = passes(dtype_q)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    differ = comparison(dtype_p, dtype_q)

    @inline
    def moved(state, rx, ry):
        """The same sums relative to other references."""
        rx0, ry0, S, D, H = state
        hx = rx - rx0
        hy = ry - ry0
        both = 0.5 * (math.exp2(hx) + math.exp2(hy))
        odd = math.exp2(0.5 * (hx + hy)) * math.sinh((hy - hx) * (0.5 * LN_2))
        return rx, ry, both * S + odd * D, both * D + odd * S, both * H + abs(odd) * S

    @inline
    def merge(a, b):
        rx = min(a[0], b[0])
        ry = min(a[1], b[1])
        a = moved(a, rx, ry)
        b = moved(b, rx, ry)
        return rx, ry, a[2] + b[2], a[3] + b[3], a[4] + b[4]

    @inline
    def step(p, q, a, rx, ry, c, S, D, H, bad):
        u = fma(p, a, rx)
        v = fma(q, a, ry)
        t = fma(q - p, a, c)
        h = one_minus_exp2_32(vmin(vabs(t), FAR))  # a NaN from -inf - -inf becomes FAR
        m = exp2_32(vmax(u, v))
        bad = bad | unordered(p, q)
        mh = m * h
        return S + m, D + copysign(mh, t), H + mh, bad

    @inline
    def sums(x, y, start, stop, a, rx, ry, c):
        """(sum M, D, H, any NaN) of [start, stop)."""
        zero = splat32(0.0)
        S = splat64(0.0)
        D = S
        H = S
        bad = lane_is(zero, -1)
        full = start + (stop - start) // LANES32 * LANES32
        j = start
        while j < stop:
            last = min(full, j + BLOCK)
            s = zero
            d = zero
            h = zero
            while j < last:
                ahead_p(x, j)
                ahead_q(y, j)
                s, d, h, bad = step(
                    load_p(x + j * size_p), load_q(y + j * size_q), a, rx, ry, c, s, d, h, bad
                )
                j += LANES32
            if full == j < stop:
                p = tail_p(x + j * size_p, stop - j)
                q = tail_q(y + j * size_q, stop - j)
                s, d, h, bad = step(p, q, a, rx, ry, c, s, d, h, bad)
                j += LANES32
            S = S + fold64(s)
            D = D + fold64(d)
            H = H + fold64(h)
        return hsum(S), hsum(D), hsum(H), hany(bad)

    @inline
    def first(x, y, start, stop, a):
        """The sums of [start, stop) and their references; S is NaN where they cannot be had."""
        state = (0.0, 0.0, 0.0, 0.0, 0.0)
        j = start
        while j < stop:
            tile_stop = min(j + TILE, stop)
            rx = -16.0 * a * f64(max_p(x, j, tile_stop))
            ry = -16.0 * a * f64(max_q(y, j, tile_stop))
            # Beyond 2**19 the references are no longer exact in float32 (or not finite).
            if not (abs(rx) < 8388608.0 and abs(ry) < 8388608.0):
                if j > start and rx > 0.0 and ry > 0.0:  # -inf all over: nothing to add
                    rx = math.inf
                    ry = math.inf
                else:
                    return 0.0, 0.0, math.nan, 0.0, 0.0
            rx = math.floor(rx) / 16.0
            ry = math.floor(ry) / 16.0
            if j == start:
                state = (rx, ry, 0.0, 0.0, 0.0)
            elif rx < state[0] or ry < state[1]:
                state = moved(state, min(rx, state[0]), min(ry, state[1]))
            rx, ry, S, D, H = state
            s, d, h, bad = sums(x, y, j, tile_stop, f32(a), f32(rx), f32(ry), f32(ry - rx))
            if bad:
                return rx, ry, math.nan, D, H
            state = (rx, ry, S + (2.0 * s - h), D + d, H + h)
            j = tile_stop
        return state

    @inline
    def second(x, y, start, stop, a, constants):
        """Sum of M k(tau) over [start, stop)."""
        # Normalized exponents u - log2(Sx), v - log2(Sy) and their difference, each with
        # the part of its constant that float32 cannot hold.
        kx, ky, c = constants
        kx0 = f32(kx)
        ky0 = f32(ky)
        c0 = f32(c)
        kx1 = f32(kx - f64(kx0))
        ky1 = f32(ky - f64(ky0))
        c1 = f32(c - f64(c0))
        a32 = f32(a)
        # Backwards, block by block: what the first phase read last is still near.
        total = splat64(0.0)
        high = splat32(0.0)
        block_stop = stop
        while block_stop > start:
            block_start = start + (block_stop - start - 1) // BLOCK * BLOCK
            full = block_start + (block_stop - block_start) // LANES32 * LANES32
            T = splat32(0.0)
            j = block_start
            while j < block_stop:
                prefetch(x + (j - TILE) * size_p)
                prefetch(y + (j - TILE) * size_q)
                if j < full:
                    p = load_p(x + j * size_p)
                    q = load_q(y + j * size_q)
                else:
                    p = tail_p(x + j * size_p, block_stop - j)
                    q = tail_q(y + j * size_q, block_stop - j)
                m = exp2_32(vmax(fma(p, a32, kx0) + kx1, fma(q, a32, ky0) + ky1))
                tau = vabs(fma(q - p, a32, c0) + c1)
                if unbounded:
                    high = vmax(tau, high)
                T = fma(m, k(vmin(tau, FAR)), T)
                j += LANES32
            total = total + fold64(T)
            block_stop = block_start
        if unbounded and hany(high > FAR):
            return math.nan
        return hsum(total)

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

    @inline
    def finish(total, S, D, H, c):
        """The divergence, or NaN where rounding errors of the first phase would show.

        An error in the normalizers' ratio enters total variation as it is, the others as
        its square.  The rounding of y - x, where the rows differ by a constant c, makes errors
        of c 2**-24 that average out over the S or more symbols that carry the mass.
        """
        # Sx and Sy come from S and D, which leaves nothing of the smaller of unequal ones, nor
        # of either where D is what is left of a much larger H.
        share = 2.0 * H / S
        if abs(D) > 0.75 * S or share > 8.0:
            return math.nan
        if first_order:
            if share > 12.0 * total or c * c > 100.0 * total * total * S:
                return math.nan
        elif share * share > 1e6 * total or c * c > 100.0 * total * S:
            return math.nan
        return min(total, ceiling)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows,
        counter, chunk, parts, part_width, phase, states, done, redo, out, inverse_temperature,
    ):  # fmt: skip
        a = f64(f32(inverse_temperature * LOG2_E))
        n_tasks = n_rows * parts
        while True:
            start_task = fetch_add(counter, chunk)
            if start_task >= n_tasks:
                return
            for task in range(start_task, min(start_task + chunk, n_tasks)):
                number = task // parts
                row = task_row(rows, number)
                x = row_address(p, p_stride, p_offsets, row)
                y = row_address(q, q_stride, q_offsets, row)
                start = (task - number * parts) * part_width
                stop = min(start + part_width, width)
                at = states + task * (8 * STATE)
                row_at = states + number * parts * (8 * STATE)
                state = (0.0, 0.0, 0.0, 0.0, 0.0)
                if phase != SECOND:
                    state = first(x, y, start, stop, a)
                if phase == FIRST:
                    for i in range(5):
                        poke_f64(at + 8 * i, state[i])
                    continue
                if phase == SECOND:
                    state = load_state(row_at)
                    for i in range(1, parts):
                        state = merge(state, load_state(row_at + i * (8 * STATE)))
                value = math.nan
                S = state[2]
                if S < math.inf:
                    constants = normalizers(state)
                    value = second(x, y, start, stop, a, constants)
                    if parts > 1:
                        poke_f64(at + 40, value)
                        if fetch_add(done + 8 * number, 1) + 1 < parts:
                            continue
                        value = 0.0
                        for i in range(parts):
                            value += peek_f64(row_at + i * (8 * STATE) + 40)
                    value = finish(value, S, state[3], state[4], state[1] - state[0])
                elif parts > 1 and fetch_add(done + 8 * number, 1) + 1 < parts:
                    continue
                if value < UNDERFLOW and differ(x, y, width):
                    value = math.nan
                poke_f64(out + 8 * row, value)
                if not value < math.inf:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)

    @inline
    def load_state(at):
        return (
            peek_f64(at), peek_f64(at + 8), peek_f64(at + 16), peek_f64(at + 24),
            peek_f64(at + 32),
        )  # fmt: skip

    return kernel

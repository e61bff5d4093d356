"""The symmetric divergences: Jensen-Shannon, total variation, Hellinger, Jeffreys.

All are sums of M k(tau) with M = max(p, q), tau = abs(log(p/q)), so they need the
normalizers first.  The first phase reads the row pair from memory and finds them; the
second reads the pair again, from cache, and sums.

The constants of log2 p, log2 q and log2(q/p) go into ``found``, where it is not 0, of uncut rows.

Where the normalizers of the whole row are given (the rows are shards of it), only the second phase
is run.

Swapping the arguments must not change a bit.  So every quantity is either symmetric or changes
its sign only, operation by operation; the first phase is that of ``normalization``.

Entries that are -inf in both rows have M = 0 and contribute nothing.
"""

from __future__ import annotations

import math

from .mathematics import LN_2, LOG2_E, exp2_32, inline, one_minus_exp2_32
from .normalization import FAR, larger_power, normalization, rounding, subtraction
from .rowloop import (
    BLOCK,
    TILE,
    UNDERFLOW,
    comparison,
    f32,
    f64,
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
    loader,
    peek_f64,
    poke_f64,
    poke_i64,
    prefetch,
    splat32,
    splat64,
    tail_loader,
    vabs,
    vmax,
    vmin,
    where,
)

STATE = 6

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


def build(operation, dtype_p, dtype_q, exactly):
    """``exactly`` carries along what the subtraction y - x rounds off."""
    k = INTEGRANDS[operation]
    ceiling = CEILING.get(operation, math.inf)
    unbounded = operation == "jeffreys"
    first_order = operation == "tv"
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    difference, larger = subtraction(exactly), larger_power(exactly)
    first, merge, normalizers = normalization(dtype_p, dtype_q, difference, larger)
    rounded = rounding(exactly)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    differ = comparison(dtype_p, dtype_q)

    @inline
    def measured(m, t):
        return m * k(vmin(vabs(t), FAR))

    @inline
    def changed(m, t):
        """q - p."""
        return copysign(m * one_minus_exp2_32(vmin(vabs(t), FAR)), t)

    @inline
    def second(term, x, y, start, stop, a, constants):
        """Sum of the terms over [start, stop)."""
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
                m = larger(p, kx0, kx1, q, ky0, ky1, a32)
                d, lost = difference(p, q)
                t = fma(d, a32, c0) + fma(lost, a32, c1)
                if unbounded:
                    high = vmax(vabs(t), high)
                T = T + term(m, t)
                j += LANES32
            total = total + fold64(T)
            block_stop = block_start
        if unbounded and hany(high > FAR):
            return math.nan
        return hsum(total)

    @inline
    def finish(total, S, D, H, c, corrected):
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
        if corrected:
            return min(total, ceiling)
        if first_order:
            # Errors of the terms average out, but for those of a top that has nearly all the mass.
            carried = min(12.0, 2.5 * math.sqrt(S))
            if share > carried * total or rounded(c) * c * c > 100.0 * total * total * S:
                return math.nan
        elif share * share > 1e6 * total or rounded(c) * c * c > 100.0 * total * S:
            return math.nan
        return min(total, ceiling)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows,
        counter, chunk, parts, part_width, phase, states, done, redo, out, known,
        found, inverse_temperature,
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
                if known != 0:
                    constants = (
                        peek_f64(known + 24 * row),
                        peek_f64(known + 24 * row + 8),
                        peek_f64(known + 24 * row + 16),
                    )
                    value = math.nan
                    if constants[2] == constants[2]:
                        value = second(measured, x, y, start, stop, a, constants)
                    if parts > 1:
                        poke_f64(at + 40, value)
                        if fetch_add(done + 8 * number, 1) + 1 < parts:
                            continue
                        value = 0.0
                        for i in range(parts):
                            value += peek_f64(row_at + i * (8 * STATE) + 40)
                    if value < UNDERFLOW and differ(x, y, width):
                        value = math.nan
                    poke_f64(out + 8 * row, value)
                    if not value < math.inf:
                        poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)
                    continue
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
                    corrected = first_order and exactly and parts == 1
                    if corrected:
                        # What c is off shows in the sum of q - p, which is 0.
                        kx, ky, c = constants
                        c -= LOG2_E * second(changed, x, y, start, stop, a, constants)
                        constants = (kx, ky, c)
                    value = second(measured, x, y, start, stop, a, constants)
                    # Where most of D is the distance of the references from each other, c is not
                    # as exact as a gradient needs it.
                    if found != 0 and (corrected or abs(state[3]) <= 0.5 * state[4]):
                        for i in range(3):
                            poke_f64(found + 24 * row + 8 * i, constants[i])
                    if parts > 1:
                        poke_f64(at + 40, value)
                        if fetch_add(done + 8 * number, 1) + 1 < parts:
                            continue
                        value = 0.0
                        for i in range(parts):
                            value += peek_f64(row_at + i * (8 * STATE) + 40)
                    value = finish(value, S, state[3], state[4], state[1] - state[0], corrected)
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

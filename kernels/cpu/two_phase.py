"""The symmetric divergences, and Jensen-Shannon of any weight.

All (Jensen-Shannon, total variation, Hellinger, Jeffreys) are sums of M k(tau) with M = max(p, q),
tau = abs(log(p/q)), where of a weight other than 1/2 k depends on the sign of the log-ratio too.
So they need the normalizers first.  The first phase reads the row pair from memory and finds
them; the second reads the pair again, from cache, and sums.

The constants of log2 p, log2 q and log2(q/p) go into ``found``, where it is not 0, of uncut rows.

Where the normalizers of the whole row are given (the rows are shards of it), only the second phase
is run.

Swapping the arguments of symmetric ones must not change a bit.  So every quantity is either
symmetric or changes its sign only, operation by operation; the first phase is that of
``normalization``.

Entries that are -inf in both rows have M = 0 and contribute nothing.
"""

from __future__ import annotations

import functools
import math

from .mathematics import (
    LN_2,
    LOG2_E,
    exp2_32,
    exp2_and_rest_32,
    exp2_near_0,
    inline,
    log1p_32,
    log_ratio_32,
    near_cosh_32,
    near_js_32,
    near_lag_32,
    near_sinh_32,
    one_minus_exp2_32,
    phi_32,
    polynomial_32,
)
from .normalization import (
    FAR,
    all_near,
    geometric_mean,
    larger_power,
    normalization,
    rounding,
    subtraction,
)
from .polynomials import NEAR
from .rowloop import (
    BLOCK,
    TILE,
    UNDERFLOW,
    coefficients_at,
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
        far = fma(1.0 + g, fma(log1p_32(g), -0.5, 0.5 * LN_2), g * tau * (-0.5 * LN_2))
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
def k_skew_js(t, tau, mix):
    """A term of Jensen-Shannon of any weight over w v M, M the larger of p and q; tau = abs(t).

    With a the weight of the larger one, b = 1 - a that of the smaller one, g = exp(-tau) and
    n = a + b g, which is m over M, w p log(p/m) + v q log(q/m) is M times

        a log(1/n) + b g log(g/n),

    which has a value and a slope of 0 at g = 1, because a + b g = n: there it cancels, and up to
    NEAR it is the polynomial of the near form.  Beyond it g is below 1/11, and one logarithm is
    enough, for the other one is tau less that:

        a > g:   n log(1/n) - b g tau,   log(1/n) from 1 - n = b (1 - g),
        else     a tau - n log(n/g),     log(n/g) from n - g = a (1 - g).

    What the logarithms' arguments are from 1, and n, are sums and products of positive numbers, so
    that they keep their relative accuracy whatever the weight.  Neither difference cancels much:
    for a next to 0 the second one is a (tau - 1 + g), for b next to 0 the first one
    b (1 - g - g tau), and in between, at a = g = 1/11, a third of what it is taken from is left.
    In float32, with weights from 1e-6 to 1 - 1e-6 and tau up to FAR, it is off by 4e-7 at most.
    """
    w, v, inverse, coefficients = mix
    z = t * t
    k = exp2_32(tau * -0.5) * z * polynomial_32(t, z, coefficients)
    apart = tau > NEAR
    if hany(apart):
        above = t > 0.0
        a = where(above, splat32(v), splat32(w))
        b = where(above, splat32(w), splat32(v))
        g, h = exp2_and_rest_32(tau)
        n = fma(b, g, a)
        heavy = a > g
        low, high = where(heavy, n, g), where(heavy, splat32(1.0), n)
        log = -log_ratio_32(low, high, where(heavy, b, a) * h)
        natural = tau * LN_2
        far = where(heavy, fma(n, log, -(b * g * natural)), fma(a, natural, -(n * log)))
        k = where(apart, far * inverse, k)
    return k


#: Rounding must not carry a result beyond what it can be.
CEILING = {"js": LN_2, "tv": 1.0, "hellinger2": 1.0}
INTEGRANDS = {"tv": k_tv, "hellinger2": k_hellinger2, "js": k_js}
#: The sums that ``second`` gives.
SUMS = ("tv", "hellinger2", "js", "kl", "reverse_kl", "jeffreys")
TV, JS = SUMS.index("tv"), SUMS.index("js")
#: Jensen-Shannon of any weight, in the place of that of 1/2.
SKEW_JS = "skew_js"
#: Infinite where one row alone has -inf.
UNBOUNDED = ("kl", "reverse_kl", "jeffreys")


@inline
def both_kl(m, tau):
    """Terms of the KL divergence from the smaller to the larger, and back, over log 2.

    With phi(t) = (2**t - 1)/log 2 - t they are m 2**-tau phi(tau) and m phi(-tau); their sum is
    m tau (1 - 2**-tau).
    """
    g, h = exp2_and_rest_32(tau)
    back = phi_32(-tau)
    there = where(tau > 4.0, fma(tau, -g, h * LOG2_E), fma(tau, h, -back))
    return m * there, m * back


@functools.cache
def terms(names, difference, larger, exactly):
    """What the sums of a row are made of.

    The five sums are of total variation, Hellinger, Jensen-Shannon, KL and reverse KL, as far as
    ``names`` asks for them; any other of INTEGRANDS stands in the place of total variation and has
    no near form, SKEW_JS in that of Jensen-Shannon, over w v.  ``step`` adds those of a vector of
    entries, whatever it is.
    ``near_step`` adds those of near entries, from their geometric mean g and t; the last two of
    its sums are instead those of g t sinh(x) and of g t lag, t lag = x cosh(x) - sinh(x), from
    which ``near_sums`` makes those of both KL: p phi(t) = 2 g (x sinh(x) - t lag).
    """
    tv, hellinger, js = "tv" in names, "hellinger2" in names, "js" in names
    skew_js = SKEW_JS in names
    kl = any(name in names for name in UNBOUNDED)
    other = None if names[0] in (*SUMS, SKEW_JS) else INTEGRANDS[names[0]]

    @inline
    def step(p, q, a, constants, sums, high):
        kx0, ky0, c0, kx1, ky1, c1, mix = constants
        V, H, J, A, B = sums
        m = larger(p, kx0, kx1, q, ky0, ky1, a)
        if exactly:
            d, lost = difference(p, q)
            t = fma(d, a, c0) + fma(lost, a, c1)
        else:
            t = fma(q - p, a, c0) + c1
        high = vmax(vabs(t), high)
        tau = vmin(vabs(t), FAR)  # a NaN from -inf - -inf becomes FAR
        if other is not None:
            V = V + m * other(tau)
        if tv:
            V = V + m * k_tv(tau)
        if hellinger:
            H = H + m * k_hellinger2(tau)
        if js:
            J = J + m * k_js(tau)
        if skew_js:
            J = J + m * k_skew_js(copysign(tau, t), tau, mix)
        if kl:
            there, back = both_kl(m, tau)
            larger_q = t > 0.0
            A = A + where(larger_q, there, back)
            B = B + where(larger_q, back, there)
        return (V, H, J, A, B), high

    @inline
    def near_step(g, t, z, sums, mix):
        V, H, J, E, U = sums
        if tv or kl:
            gt = g * t
            w = gt * near_sinh_32(z)
        if tv:
            V = V + vabs(w)
        if kl:
            E = fma(w, t, E)
            U = fma(gt * z, near_lag_32(z), U)
        if hellinger:
            H = fma(g * z, near_cosh_32(z), H)
        if js:
            J = fma(g * z, near_js_32(z), J)
        if skew_js:
            J = fma(g * z, polynomial_32(t, z, mix[3]), J)
        return V, H, J, E, U

    @inline
    def totals(sums):
        V, H, J, A, B = sums
        return fold64(V), fold64(H), fold64(J), LN_2 * fold64(A), LN_2 * fold64(B)

    @inline
    def near_totals(sums):
        V, H, J, E, U = sums
        even = LN_2 * fold64(E)
        odd = 2.0 * fold64(U)
        return fold64(V), fold64(H), fold64(J), even - odd, even + odd

    return step, near_step, totals, near_totals


@inline
def added(sums, others, factor):
    """Five sums and others times a factor."""
    return (
        sums[0] + factor * others[0], sums[1] + factor * others[1], sums[2] + factor * others[2],
        sums[3] + factor * others[3], sums[4] + factor * others[4],
    )  # fmt: skip


def build(operation, dtype_p, dtype_q, exactly):
    """Kernel of one operation, or of several, joined by commas, of uncut rows.

    There is a column of results for each.  ``top``, which comes last, has four: the largest entry
    of P and its first index, and those of Q.  ``exactly`` carries along what the subtraction
    y - x rounds off.
    """
    names = operation.split(",")
    top = names[-1] == "top"
    skewed = SKEW_JS in names
    places = {name: place for place, name in enumerate(SUMS)} | {SKEW_JS: JS}
    which = tuple(places.get(name, TV) for name in names[: len(names) - top])
    measures = len(which)
    columns = measures + 4 * top
    ceilings = tuple(CEILING.get(name, math.inf) for name in names)
    unbounded = any(name in names for name in UNBOUNDED)
    first_order = operation == "tv"
    near = not exactly and names[0] in places
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    difference, larger = subtraction(exactly), larger_power(exactly)
    first, merge, normalizers = normalization(dtype_p, dtype_q, difference, larger, near)
    measured, near_step, totals, near_totals = terms(tuple(names), difference, larger, exactly)
    rounded = rounding(exactly)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    differ = comparison(dtype_p, dtype_q)
    _, find_p = passes(dtype_p)
    _, find_q = passes(dtype_q)

    @inline
    def changed(p, q, a, constants, sums, high):
        """q - p."""
        kx0, ky0, c0, kx1, ky1, c1, _ = constants
        V, H, J, A, B = sums
        m = larger(p, kx0, kx1, q, ky0, ky1, a)
        d, lost = difference(p, q)
        t = fma(d, a, c0) + fma(lost, a, c1)
        V = V + copysign(m * one_minus_exp2_32(vmin(vabs(t), FAR)), t)
        return (V, H, J, A, B), high

    @inline
    def near_block(x, y, start, stop, a, constants):
        """Sums over a block of whole vectors, and whether it was near."""
        kx0, ky0, c0, _, _, c1, mix = constants
        half = f32(0.5) * a
        kx = f32(0.5) * kx0
        ky = f32(0.5) * ky0
        high = splat32(0.0)
        sums = (high, high, high, high, high)
        for j in range(start, stop, LANES32):
            prefetch(x + (j - TILE) * size_p)
            prefetch(y + (j - TILE) * size_q)
            p = load_p(x + j * size_p)
            q = load_q(y + j * size_q)
            t = fma(q - p, a, c0) + c1
            z = t * t
            high = vmax(z, high)
            sums = near_step(geometric_mean(p, q, half, kx, ky), t, z, sums, mix)
        V, H, J, E, U = sums
        return sums, all_near(high, (V + H) + (J + (E + U)))

    @inline
    def second(step, x, y, start, stop, a, constants, mix):
        """Sums of the terms over [start, stop); of those that can be infinite NaN if they are."""
        # Normalized exponents u - log2(Sx), v - log2(Sy) and their difference, each with
        # the part of its constant that float32 cannot hold.
        kx, ky, c = constants
        kx0 = f32(kx)
        ky0 = f32(ky)
        c0 = f32(c)
        kx1 = kx - f64(kx0)
        ky1 = ky - f64(ky0)
        parts = (kx0, ky0, c0, f32(kx1), f32(ky1), f32(c - f64(c0)), mix)
        factor = exp2_near_0(0.5 * (kx1 + ky1))
        a32 = f32(a)
        # Backwards, block by block: what the first phase read last is still near.
        nothing = splat64(0.0)
        total = (nothing, nothing, nothing, nothing, nothing)
        zero = splat32(0.0)
        largest = zero
        close = near
        block_stop = stop
        while block_stop > start:
            block_start = start + (block_stop - start - 1) // BLOCK * BLOCK
            full = block_start + (block_stop - block_start) // LANES32 * LANES32
            sums = (zero, zero, zero, zero, zero)
            high = zero
            done = False
            if near and close:
                near_sums, done = near_block(x, y, block_start, full, a32, parts)
                if done:
                    total = added(total, near_totals(near_sums), factor)
            if not done:
                for j in range(block_start, full, LANES32):
                    prefetch(x + (j - TILE) * size_p)
                    prefetch(y + (j - TILE) * size_q)
                    p = load_p(x + j * size_p)
                    q = load_q(y + j * size_q)
                    sums, high = step(p, q, a32, parts, sums, high)
                close = not hany(high > NEAR)
                largest = vmax(high, largest)
            if full < block_stop:
                p = tail_p(x + full * size_p, block_stop - full)
                q = tail_q(y + full * size_q, block_stop - full)
                sums, largest = step(p, q, a32, parts, sums, largest)
            if not done or full < block_stop:
                total = added(total, totals(sums), 1.0)
            block_stop = block_start
        V, H, J, A, B = total
        a_sum, b_sum = hsum(A), hsum(B)
        if unbounded and hany(largest > FAR):
            a_sum = math.nan
            b_sum = math.nan
        return hsum(V), hsum(H), hsum(J), a_sum, b_sum, a_sum + b_sum

    @inline
    def finish(number, total, ceiling, level, S, D, H, c, corrected):
        """A divergence, or NaN where rounding errors of the first phase would show.

        An error in the normalizers' ratio enters total variation as it is, the others as
        its square.  The rounding of y - x, where the rows differ by a constant c, makes errors
        of c 2**-24 that average out over the S or more symbols that carry the mass.  Where rows are
        close, a Jensen-Shannon divergence is ``level`` times that of weight 1/2.
        """
        # Sx and Sy come from S and D, which leaves nothing of the smaller of unequal ones, nor
        # of either where D is what is left of a much larger H.
        share = 2.0 * H / S
        if abs(D) > 0.75 * S or share > 8.0:
            return math.nan
        if corrected:
            return min(total, ceiling)
        if number == TV:
            # Errors of the terms average out, but for those of a top that has nearly all the mass.
            carried = min(12.0, 2.5 * math.sqrt(S))
            if share > carried * total or rounded(c) * c * c > 100.0 * total * total * S:
                return math.nan
        else:
            even = total / level
            if share * share > 1e6 * even or rounded(c) * c * c > 100.0 * even * S:
                return math.nan
        return min(total, ceiling)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows,
        counter, chunk, parts, part_width, phase, states, done, redo, out, known,
        found, polynomial, inverse_temperature, weight,
    ):  # fmt: skip
        other_weight = 1.0 - weight
        product = weight * other_weight
        mix = (
            f32(weight), f32(other_weight), f32(1.0 / product), coefficients_at(polynomial),
        ) if skewed else ()  # fmt: skip
        entropy = math.inf
        if skewed:
            entropy = -(weight * math.log(weight) + other_weight * math.log1p(-weight))
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
                        value = second(measured, x, y, start, stop, a, constants, mix)[which[0]]
                        if skewed:
                            value *= product
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
                tops = (0.0, 0.0, 0.0, 0.0)
                if phase != SECOND:
                    read = first(x, y, start, stop, a, found == 0)
                    state = read[:5]
                    tops = read[5:]
                if phase == FIRST:
                    for i in range(5):
                        poke_f64(at + 8 * i, state[i])
                    continue
                if phase == SECOND:
                    state = load_state(row_at)
                    for i in range(1, parts):
                        state = merge(state, load_state(row_at + i * (8 * STATE)), found == 0)
                S = state[2]
                unfinished = not S < math.inf
                at_out = out + 8 * columns * row
                if unfinished:
                    poke_f64(at_out, math.nan)
                    if parts > 1 and fetch_add(done + 8 * number, 1) + 1 < parts:
                        continue
                else:
                    constants = normalizers(state)
                    corrected = first_order and exactly and parts == 1
                    if corrected:
                        # What c is off shows in the sum of q - p, which is 0.
                        kx, ky, c = constants
                        c -= LOG2_E * second(changed, x, y, start, stop, a, constants, mix)[0]
                        constants = (kx, ky, c)
                    sums = second(measured, x, y, start, stop, a, constants, mix)
                    # Where most of D is the distance of the references from each other, c is not
                    # as exact as the rows are close: who asks for it gets none.
                    if found != 0 and (corrected or abs(state[3]) <= 0.5 * state[4]):
                        for i in range(3):
                            poke_f64(found + 24 * row + 8 * i, constants[i])
                    total = 0.0
                    if parts > 1:
                        poke_f64(at + 40, sums[which[0]])
                        if fetch_add(done + 8 * number, 1) + 1 < parts:
                            continue
                        for i in range(parts):
                            total += peek_f64(row_at + i * (8 * STATE) + 40)
                    smallest = math.inf
                    for i in range(measures):
                        value = total if parts > 1 else sums[which[i]]
                        ceiling = ceilings[i]
                        level = 1.0
                        if skewed and which[i] == JS:
                            value *= product
                            ceiling = entropy
                            level = 4.0 * product
                        value = finish(
                            which[i], value, ceiling, level, S, state[3], state[4],
                            state[1] - state[0], corrected,
                        )  # fmt: skip
                        poke_f64(at_out + 8 * i, value)
                        if not value < math.inf:
                            unfinished = True
                        smallest = min(smallest, value)
                    if smallest < UNDERFLOW and differ(x, y, width):
                        poke_f64(at_out, math.nan)
                        unfinished = True
                    if top:
                        top_x, tile_x, top_y, tile_y = tops
                        at_x = int(tile_x)
                        at_y = int(tile_y)
                        at_x = find_p(x, at_x, min(at_x + TILE, width), f32(top_x))
                        at_y = find_q(y, at_y, min(at_y + TILE, width), f32(top_y))
                        poke_f64(at_out + 8 * measures, top_x * inverse_temperature)
                        poke_f64(at_out + 8 * measures + 8, at_x)
                        poke_f64(at_out + 8 * measures + 16, top_y * inverse_temperature)
                        poke_f64(at_out + 8 * measures + 24, at_y)
                if unfinished:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)

    @inline
    def load_state(at):
        return (
            peek_f64(at), peek_f64(at + 8), peek_f64(at + 16), peek_f64(at + 24),
            peek_f64(at + 32),
        )  # fmt: skip

    return kernel

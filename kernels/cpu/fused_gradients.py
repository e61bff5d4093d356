"""Values and gradients of ordinary rows in one go: read from memory once, then from cache.

Formulas stand in ``exact_gradients``; here is what remains of them where nothing needs care.  Rows
that do (that are too far apart, are masked in one only, or whose gradient is hardly more than
rounding) are listed, before anything is written into the logits' own memory, and left to that.

The first pass is that of ``one_pass``: it leaves the constants of u = log2 p, v = log2 q and
t = v - u, and a value.  A gradient whose mean is known then is written by the second one, as

    own (2**e - 1)    q - p = p (2**t - 1), and r - p and r - q of a tilted distribution r,  or
    own e             p (log2(q/p) + mean) and p (log2 q + mean);

that of Jeffreys is one of either kind together.  The entries add up to 0.  What they add up to
instead is how far e is off: it is compared with the largest of them, and where it shows, e is
corrected and they are written once more.

The means of total variation and Jensen-Shannon are sums over the second pass.  It leaves own b
(of own (b - W)) in the place of the gradient, and the third pass subtracts own W.  Exchanging P and
Q changes no bit: the first of both is the one that is smaller where they first differ.

Of rows that are far apart, the first pass does not give c as exactly as their value.  There q - p,
whose sum is 0, says how far c is off, and the second pass is done once more; what is left of own b
beside own W is then looked at, before the third.

What bounds it are instructions and, next to them, memory: two vectors are in work at once, because
one chain of operations after the other leaves the processor waiting.

A row that is written into the logits' own memory, or in a narrow type, is staged in a row of
float32 that each thread has of its own.
"""

from __future__ import annotations

import functools
import math

from .mathematics import (
    LN_2,
    LOG2_E,
    exp2_32,
    exp2_and_rest_32,
    exp2_minus_one_32,
    exp2_near_0,
    inline,
    log_ratio_32,
    outline,
    polynomial_32,
)
from .normalization import FAR, exact_subtraction
from .one_pass import arithmetic, reader
from .polynomials import LOG_NEAR
from .rowloop import (
    BLOCK,
    UNDERFLOW,
    coefficients_at,
    entry,
    f32,
    f64,
    halves,
    row_address,
    task_row,
)
from .simd import (
    ITEMSIZE,
    LANES32,
    LANES32W,
    copysign,
    f32v,
    f32w,
    fetch_add,
    first_lane,
    fma,
    fold64,
    hany,
    hmax,
    hsum,
    loader,
    peek_f64,
    poke_f64,
    poke_i64,
    prefetch,
    splat32w,
    splat64,
    store,
    store_tail,
    storer,
    tail_loader,
    vabs,
    vmax,
    vmin,
    where,
)

#: Operations whose means are sums over the second pass.
TWO_SUMS = ("js", "tv")

#: Gradients that are multiples of more than this are left to float64.
LARGEST = 1e30

#: A sum of entries that is no more than this, beside the largest of them, times the largest
#: probability.
BALANCE = 2e-6
#: What ``one_pass`` calls CANCELLATION.  Orders of 1/2, of squared Hellinger, begin at 3.
CARRIED = 24.0
#: Where the largest entry is smaller, others may have been lost because p underflows.
SMALLEST = 1e-14
#: From where on (of the divergence of Q from P) brackets of Jensen-Shannon are shifted first.
APART = 2.0
#: What t is at most where p = q, beside the square root of KL: what c is off.
TIE = 6e-8
#: What it is at most in rows that are far apart, beside what their masses differ by.
FAR_TIE = 1e-6
#: How many times as large brackets may be as what is left beside their mean, and from where on
#: (of the divergence of Q from P) that is looked at.
SHOWING = 4.0
DOUBTFUL = 0.1
#: Mean squares about the mean, beside the square of the mean: where there is less, the gradient
#: is much smaller than what it is the difference of.
SPREAD = 0.01


@inline
def ask_ahead(row, j, size):
    """Ask for the two vectors of a row that are a block further on."""
    prefetch(row + (j + BLOCK) * size)
    prefetch(row + (j + BLOCK + LANES32) * size)


@functools.cache
def balanced(operation, sides, dtype_p, dtype_q):
    """An inlined second pass, of gradients whose mean is known."""
    load_p, load_q = loader(dtype_p, f32w), loader(dtype_q, f32w)
    tail_p, tail_q = tail_loader(dtype_p, f32w), tail_loader(dtype_q, f32w)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    to_p, to_q = "p" in sides, "q" in sides
    renyi = operation == "renyi"
    cross = operation == "cross_entropy"
    jeffreys = operation == "jeffreys"

    @inline
    def vector(own, d, lost, a, of, sums, tilted):
        """An entry times the scale; sum, largest entry and largest probability."""
        k, offset, rest, factor, scale = of
        s, largest, top = sums
        mass = exp2_32(fma(own, a, k))
        e = fma(d, a, offset) + fma(lost, a, rest)
        if renyi:
            e = e * factor
        # A NaN from -inf - -inf becomes a number; there the mass is 0.
        g = mass * (exp2_minus_one_32(vmax(e, -FAR)) if tilted else vmax(e, -1e30))
        return g * scale, (s + g, vmax(vabs(g), largest), vmax(mass, top))

    @inline
    def summed_up(own, e, change, scale, sums):
        """As ``vector``, of own e + change."""
        s, largest, top = sums
        g = fma(own, vmax(e, -1e30), change)
        return g * scale, (s + g, vmax(vabs(g), largest), vmax(own, top))

    @inline
    def both_ways(p, q, a, of_p, of_q, common, sums_p, sums_q):
        """``both`` of Jeffreys: p (t + mean) + (q - p)/log 2, and q (mean - t) - (q - p)/log 2.

        The difference is a multiple of p even for q: where p underflows, q is next to nothing too.
        """
        kx1, ky1, c0, c1 = common
        d, lost = exact_subtraction(p, q)
        t = vmax(fma(d, a, c0) + fma(lost, a, c1), -FAR)
        mass = exp2_32(fma(p, a, of_p[0]) + kx1)
        change = mass * exp2_minus_one_32(t) * LOG2_E
        g, h = d, d
        if to_p:
            e = fma(d, a, of_p[1]) + fma(lost, a, of_p[2])
            g, sums_p = summed_up(mass, e, change, of_p[4], sums_p)
        if to_q:
            e = -(fma(d, a, of_q[1]) + fma(lost, a, of_q[2]))
            own = exp2_32(fma(q, a, of_q[0]) + ky1)
            h, sums_q = summed_up(own, e, -change, of_q[4], sums_q)
        return g, h, sums_p, sums_q

    @inline
    def both(p, q, a, of_p, of_q, common, sums_p, sums_q):
        if jeffreys:
            return both_ways(p, q, a, of_p, of_q, common, sums_p, sums_q)
        d, lost = exact_subtraction(p, q)
        g, h = d, d
        if to_p:
            if cross:
                g, sums_p = vector(p, q, splat32w(0.0), a, of_p, sums_p, False)
            else:
                g, sums_p = vector(p, d, lost, a, of_p, sums_p, renyi)
        if to_q:
            h, sums_q = vector(q if renyi else p, d, lost, a, of_q, sums_q, True)
        return g, h, sums_p, sums_q

    @inline
    def write(x, y, at_p, at_q, width, a, of_p, of_q, common):
        zero = splat32w(0.0)
        total_p = splat64(0.0)
        total_q = total_p
        sums_p = (zero, zero, zero)
        sums_q = sums_p
        full = width // LANES32W * LANES32W
        j = 0
        while j < width:
            last = min(full, j + BLOCK)
            sums_p = (zero, sums_p[1], sums_p[2])
            sums_q = (zero, sums_q[1], sums_q[2])
            while j < last:
                ask_ahead(x, j, size_p)
                ask_ahead(y, j, size_q)
                p, q = load_p(x + j * size_p), load_q(y + j * size_q)
                g, h, sums_p, sums_q = both(p, q, a, of_p, of_q, common, sums_p, sums_q)
                if to_p:
                    store(at_p + 4 * j, g)
                if to_q:
                    store(at_q + 4 * j, h)
                j += LANES32W
            if full == j < width:
                p, q = tail_p(x + j * size_p, width - j), tail_q(y + j * size_q, width - j)
                g, h, sums_p, sums_q = both(p, q, a, of_p, of_q, common, sums_p, sums_q)
                if to_p:
                    store_tail(at_p + 4 * j, g, width - j)
                if to_q:
                    store_tail(at_q + 4 * j, h, width - j)
                j += LANES32W
            total_p = total_p + fold64(sums_p[0])
            total_q = total_q + fold64(sums_q[0])
        found_p = hsum(total_p), f64(hmax(sums_p[1])), f64(hmax(sums_p[2]))
        return found_p, (hsum(total_q), f64(hmax(sums_q[1])), f64(hmax(sums_q[2])))

    @inline
    def verdict(found):
        """Whether the entries are right; whether another offset can make them so."""
        total, largest, top = found
        sound = SMALLEST < largest < math.inf
        return sound and abs(total) * top <= BALANCE * largest, sound

    @inline
    def second(
        x, y, at_p, at_q, width, a, constants, value, other, close, alpha, mix, scale_p, scale_q,
    ):  # fmt: skip
        """Write the gradients; gives the value again, NaN where they are not right.

        ``other`` is the divergence of P from Q, of Jeffreys.
        """
        kx, ky, c = constants
        mean = value * LOG2_E  # of Renyi, what makes r a distribution
        shift_p = (ky if cross else c) + mean
        shift_q = c
        factor_p = 1.0 - alpha
        factor_q = 1.0
        if renyi:
            shift_q -= mean * factor_p / alpha
            factor_q = -alpha
            scale_q = -scale_q
            kq = ky
        elif jeffreys:
            shift_q -= other * LOG2_E
            value += other
            scale_p *= -LN_2
            scale_q *= -LN_2
            kq = ky
        else:
            scale_p *= -LN_2
            kq = kx
        common = (halves(kx)[1], halves(kq)[1], *halves(c))
        if not jeffreys:
            # What float32 does not hold of the probabilities' exponents.
            scale_p *= exp2_near_0(kx - f64(f32(kx)))
            scale_q *= exp2_near_0(kq - f64(f32(kq)))
        none = (1.0, 1.0)
        for _attempt in range(3):
            of_p = (f32(kx), *halves(shift_p), f32(factor_p), f32(scale_p))
            of_q = (f32(kq), *halves(shift_q), f32(factor_q), f32(scale_q))
            found_p, found_q = write(x, y, at_p, at_q, width, f32(a), of_p, of_q, common)
            right = True
            if to_p:
                right, sound = verdict(found_p)
                if not sound:
                    return math.nan, none, none
                if renyi:
                    shift_p -= math.log1p(found_p[0]) * LOG2_E / factor_p
                else:
                    shift_p -= found_p[0]
            if to_q:
                fits, sound = verdict(found_q)
                if not sound:
                    return math.nan, none, none
                if jeffreys:
                    shift_q += found_q[0]
                else:
                    shift_q -= math.log1p(found_q[0]) * LOG2_E / factor_q
                right = right and fits
            if right:
                return value, none, none
        return math.nan, none, none

    return second


@inline
def jensen_shannon(t, change, p, q, mix):
    """w p log(p/m) + v q log(q/m) and the brackets of both, these logarithms plus a constant.

    m = w p + v q with v = 1 - w; change is q - p, tau = log(q/p).  With k = log(m/p) - v tau >= 0,
    of second order in tau, log(p/m) is -v tau - k, log(q/m) is w tau - k, and the term

        w v tau (q - p) - m k,

    of which the second part is half the first where tau is small.  k/t**2 is a polynomial in t,
    the base 2 logarithm, to abs(t) = LOG_NEAR.  Beyond it, the logarithm of m over the larger of
    both is taken.

    Rows that are far apart have brackets near -log w, and -log v: that is then taken off before
    anything is rounded.
    """
    w, v, far, shift_p, shift_q, coefficients = mix
    z = t * t
    k = z * polynomial_32(t, z, coefficients)
    tau = t * LN_2
    log_p, log_q = fma(tau, -v, -k), fma(tau, w, -k)
    term = fma(change * (w * v), tau, -fma(p, w, q * v) * k)
    b_p, b_q = log_p + shift_p, log_q + shift_q
    apart = vabs(t) > LOG_NEAR
    if hany(apart):
        above = t > 0.0
        rest, h = exp2_and_rest_32(vmin(vabs(t), FAR))  # the smaller over the larger
        of_larger = where(above, splat32w(v), splat32w(w))
        of_smaller = where(above, splat32w(w), splat32w(v))
        # A sum of positive numbers, for a larger one of next to no weight.
        mixed = fma(of_smaller, rest, of_larger)
        larger = -log_ratio_32(mixed, splat32w(1.0), of_smaller * h)
        smaller = log_ratio_32(rest, mixed, of_larger * h)
        far_p, far_q = where(above, smaller, larger), where(above, larger, smaller)
        term = where(apart, fma(p * w, far_p, q * v * far_q), term)
        b_p, b_q = where(apart, far_p + shift_p, b_p), where(apart, far_q + shift_q, b_q)
        if far:
            share = log_ratio_32(of_larger, mixed, of_smaller * rest)
            b_p, b_q = where(apart & ~above, share, b_p), where(apart & above, share, b_q)
    return term, b_p, b_q


@functools.cache
def summed(operation, sides, dtype_p, dtype_q):
    """An inlined second pass, which sums up value and means."""
    load_p, load_q = loader(dtype_p, f32w), loader(dtype_q, f32w)
    tail_p, tail_q = tail_loader(dtype_p, f32w), tail_loader(dtype_q, f32w)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    to_p, to_q = "p" in sides, "q" in sides
    tv, js = operation == "tv", operation == "js"

    @inline
    def side(own, t, bracket, sums):
        """What is staged; of total variation the masses above and below, else mean and square."""
        s, r = sums
        if tv:
            above = t > 0.0
            sums = s + where(above, own, 0.0), r + where(above, 0.0, own)
            return copysign(own, t), sums
        product = own * bracket
        return product, (s + product, fma(product, bracket, r))

    @inline
    def both(p, q, a, constants, sums, sums_p, sums_q, closest):
        kx0, kx1, c0, c1, mix = constants
        d, lost = exact_subtraction(p, q)
        t = vmax(fma(d, a, c0) + fma(lost, a, c1), -FAR)
        of_p = exp2_32(fma(p, a, kx0) + kx1)
        # Not the sum of p and q - p: of a q that is much smaller, all of it would be rounding.
        ratio, less = exp2_and_rest_32(-t)
        of_q, change = of_p * ratio, -of_p * less
        b_p, b_q = t, t
        s, r = sums
        if tv:
            s = s + vabs(change)
            closest = vmin(vabs(t), closest)
        else:
            term, b_p, b_q = jensen_shannon(t, change, of_p, of_q, mix)
            s = s + term
        r = r + change
        g, h = t, t
        if to_p:
            g, sums_p = side(of_p, -t, b_p, sums_p)
        if to_q:
            h, sums_q = side(of_q, t, b_q, sums_q)
        return g, h, (s, r), sums_p, sums_q, closest

    @inline
    def folded(totals, sums):
        return totals[0] + fold64(sums[0]), totals[1] + fold64(sums[1])

    @inline
    def add_up(x, y, at_p, at_q, width, a, constants):
        zero = splat32w(0.0)
        none = (zero, zero)
        closest = splat32w(FAR)
        totals = (splat64(0.0), splat64(0.0))
        totals_p = totals
        totals_q = totals
        full = width // LANES32W * LANES32W
        j = 0
        while j < width:
            last = min(full, j + BLOCK)
            sums = none
            sums_p = none
            sums_q = none
            while j < last:
                ask_ahead(x, j, size_p)
                ask_ahead(y, j, size_q)
                p, q = load_p(x + j * size_p), load_q(y + j * size_q)
                g, h, sums, sums_p, sums_q, closest = both(
                    p, q, a, constants, sums, sums_p, sums_q, closest
                )
                if to_p:
                    store(at_p + 4 * j, g)
                if to_q:
                    store(at_q + 4 * j, h)
                j += LANES32W
            if full == j < width:
                p, q = tail_p(x + j * size_p, width - j), tail_q(y + j * size_q, width - j)
                g, h, sums, sums_p, sums_q, closest = both(
                    p, q, a, constants, sums, sums_p, sums_q, closest
                )
                if to_p:
                    store_tail(at_p + 4 * j, g, width - j)
                if to_q:
                    store_tail(at_q + 4 * j, h, width - j)
                j += LANES32W
            totals = folded(totals, sums)
            totals_p = folded(totals_p, sums_p)
            totals_q = folded(totals_q, sums_q)
        return (
            (hsum(totals[0]), hsum(totals[1])), (hsum(totals_p[0]), hsum(totals_p[1])),
            (hsum(totals_q[0]), hsum(totals_q[1])), -f64(hmax(-closest)),
        )  # fmt: skip

    @inline
    def shares(sums):
        """Of the masses; or the mean alone."""
        s, r = sums
        if tv:
            return s / (s + r), r / (s + r)
        return s, 0.0

    @inline
    def spread(sums, least):
        return tv or sums[1] - sums[0] * sums[0] > least * sums[0] * sums[0]

    @inline
    def second(
        x, y, at_p, at_q, width, a, constants, value, other, close, alpha, mix, scale_p, scale_q,
    ):  # fmt: skip
        """Gives the value and what the third pass takes of each side; NaN: not an ordinary row."""
        kx, ky, c = constants
        least = TIE * math.sqrt(value)
        of_p = (0.0, 0.0)
        of_q = (0.0, 0.0)
        w, coefficients = mix
        far = value > APART  # a guess
        # Of rows that are apart, a few entries may make up all of the mean square.
        wide = 10.0 * SPREAD if far else SPREAD
        turned = False
        for _attempt in range(4):
            shift_p = math.log(w) if far else 0.0
            shift_q = math.log1p(-w) if far else 0.0
            mixed = (f32(w), f32(1.0 - w), far, f32(shift_p), f32(shift_q), coefficients)
            given = (*halves(kx), *halves(c), mixed)
            sums, sums_p, sums_q, closest = add_up(x, y, at_p, at_q, width, f32(a), given)
            # Both rows' masses are 1.  c is known of close rows, and total variation of them is
            # checked beside its size; of others the difference is one of order 1.
            off = abs(sums[1])
            if not off <= (BALANCE * sums[0] if tv else math.inf if close else BALANCE):
                c -= math.log1p(sums[1]) * LOG2_E
                continue
            if not close:
                least = max(least, FAR_TIE + off * LOG2_E)
            value = sums[0]
            if tv:
                # p is more exact than q = p 2**t: take the sum where p is the larger.
                value = min(0.5 * (sums[0] if close else sums[0] - sums[1]), 1.0)
            if to_p:
                of_p = shares(sums_p)
            if to_q:
                of_q = shares(sums_q)
                if js:  # beside what the third pass takes for q, with ky as it was
                    of_q = of_q[0] * math.exp2(c - constants[2]), 0.0
            clear = (not to_p or spread(sums_p, wide)) and (not to_q or spread(sums_q, wide))
            if js and not clear and not turned:
                far = not far
                turned = True
                continue
            usable = UNDERFLOW <= value and closest >= least and clear
            return (value if usable else math.nan), of_p, of_q
        return math.nan, of_p, of_q

    return second


@functools.cache
def third(operation, dtype, dtype_into):
    """Inlined passes over what is staged.

    One subtracts the mean, where one is left, and rounds; the other, of Jensen-Shannon, says
    beforehand whether what remains is not much smaller than what it is the difference of.
    """
    load, load_tail = loader(dtype, f32w), tail_loader(dtype, f32w)
    staged, staged_tail = loader("float32", f32w), tail_loader("float32", f32w)
    write, write_tail = storer(dtype_into)
    size, size_into = ITEMSIZE[dtype], ITEMSIZE[dtype_into]
    tv, js = operation == "tv", operation == "js"

    @inline
    def vector(g, z, a, constants):
        k0, k1, one, other = constants
        if tv:
            return g * where(g > 0.0, splat32w(other), splat32w(one))
        if js:
            return fma(exp2_32(fma(z, a, k0) + k1), other, g * one)
        return g

    @inline
    def shows(x, at, width, a, k, mean):
        constants = (*halves(k), f32(1.0), f32(-mean))
        a32 = f32(a)
        zero = splat32w(0.0)
        before = zero
        after = zero
        full = width // LANES32W * LANES32W
        for j in range(0, width, LANES32W):
            g, z = zero, zero
            if j < full:
                g, z = staged(at + 4 * j), load(x + j * size)
            else:
                g, z = staged_tail(at + 4 * j, width - j), load_tail(x + j * size, width - j)
                g = where(g > -math.inf, g, 0.0)  # which the lanes beyond are
            before = vmax(vabs(g), before)
            after = vmax(vabs(vector(g, z, a32, constants)), after)
        return hmax(before) <= SHOWING * hmax(after)

    @inline
    def run(x, at, out, width, a, k, numbers, scale):
        one, other = numbers
        if js:
            one, other = 1.0, -one
        constants = (*halves(k), f32(one * scale), f32(other * scale))
        a32 = f32(a)
        full = width // LANES32W * LANES32W
        for j in range(0, full, LANES32W):
            g = vector(staged(at + 4 * j), load(x + j * size), a32, constants)
            write(out + j * size_into, g)
        if full < width:
            n = width - full
            g = vector(staged_tail(at + 4 * full, n), load_tail(x + full * size, n), a32, constants)
            write_tail(out + full * size_into, g, n)

    return run, shows


@functools.cache
def order(dtype):
    """An inlined ``larger(x, y, width)``: whether x is, where both rows first differ."""
    load, get = tail_loader(dtype, f32v), entry(dtype)
    size = ITEMSIZE[dtype]

    @outline
    def larger(x, y, width):
        for j in range(0, width, LANES32):
            n = width - j
            lane = first_lane(load(x + j * size, n) != load(y + j * size, n))
            if lane < LANES32:
                return get(x, j + lane) > get(y, j + lane)
        return False

    return larger


def build(operation, sides, dtype_p, dtype_q, dtype_into_p, dtype_into_q):
    """``sides`` is "p", "q" or "pq": whose logits the gradient is with respect to."""
    summing = operation in TWO_SUMS
    reading = {"js": "kl", "tv": "kl", "jeffreys": "kl_both"}.get(operation, operation)
    part = reader(reading, dtype_p, dtype_q, False)
    _, _, _, _, _, finish, constants_of = arithmetic(reading, False, CARRIED)
    passes = summed if summing else balanced
    second = passes(operation, sides, dtype_p, dtype_q)
    # Of rows of two dtypes it is for the caller to give always the same one first.
    js, renyi, jeffreys = (operation == name for name in ("js", "renyi", "jeffreys"))
    exchanging = (summing or renyi or jeffreys) and dtype_p == dtype_q
    if exchanging:
        other_sides = "".join(side for side in "pq" if "qp"["pq".index(side)] in sides)
        second_exchanged = passes(operation, other_sides, dtype_q, dtype_p)
        larger = order(dtype_p)
    turned = -1.0 if renyi else 1.0
    to_p, to_q = "p" in sides, "q" in sides
    third_p, shows_p = third(operation, dtype_p, dtype_into_p)
    third_q, shows_q = third(operation, dtype_q, dtype_into_q)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows, counter, chunk, redo,
        values, scales, spare, into_p, into_p_stride, into_p_offsets, into_q, into_q_stride,
        into_q_offsets, powers, polynomial, inverse_temperature, beta, limit,
    ):  # fmt: skip
        a = f64(f32(inverse_temperature * LOG2_E))
        alpha = beta + 1.0
        mix = (beta, coefficients_at(polynomial)) if js else (0.5, ())
        symmetric = not (renyi or js) or beta == (0.5 if js else -0.5)
        padded = (width + LANES32W - 1) // LANES32W * LANES32W
        spare_p = spare
        if spare != 0:
            spare_p += fetch_add(counter + 8, 1) * (4 * padded * (int(to_p) + int(to_q)))
        spare_q = spare_p + 4 * padded * int(to_p)
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
                at_p = spare_p if spare != 0 else out_p
                at_q = spare_q if spare != 0 else out_q
                scale_p = peek_f64(scales + 16 * row) * inverse_temperature
                scale_q = peek_f64(scales + 16 * row + 8) * inverse_temperature
                exchanged = False
                if exchanging and symmetric:
                    exchanged = larger(x, y, width)
                first, other = x, y
                if exchanged:
                    first, other = y, x
                state = part(first, other, 0, width, a, beta, limit * LOG2_E)
                value, back, close = finish(state, beta)
                doubtful = js and (not close or value > DOUBTFUL)
                constants = constants_of(state)
                of_p = (1.0, 1.0)
                of_q = of_p
                if powers != 0:  # the gradient is that of S
                    S = math.exp(beta * value)
                    scale_p *= S
                    scale_q *= S
                # Constants that are not as exact as the value are found out by either pass.
                usable = UNDERFLOW <= value < math.inf
                usable = usable and (not jeffreys or back >= UNDERFLOW)
                if usable and abs(scale_p) < LARGEST and abs(scale_q) < LARGEST:
                    if exchanged:
                        value, of_q, of_p = second_exchanged(
                            y, x, at_q, at_p, width, a, constants, value, back, close, alpha, mix,
                            turned * scale_q, turned * scale_p,
                        )  # fmt: skip
                        constants = constants[1], constants[0], -constants[2]
                    else:
                        value, of_p, of_q = second(
                            x, y, at_p, at_q, width, a, constants, value, back, close, alpha, mix,
                            scale_p, scale_q,
                        )  # fmt: skip
                    usable = value == value
                    if usable and doubtful:
                        if to_p:
                            usable = shows_p(x, at_p, width, a, constants[0], of_p[0])
                        if to_q and usable:
                            usable = shows_q(y, at_q, width, a, constants[1], of_q[0])
                else:
                    usable = False
                if not usable:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)
                    continue
                poke_f64(values + 8 * row, value)
                if summing or spare != 0:
                    if to_p:
                        third_p(x, at_p, out_p, width, a, constants[0], of_p, scale_p)
                    if to_q:
                        third_q(y, at_q, out_q, width, a, constants[1], of_q, scale_q)

    return kernel

"""Values and gradients of ordinary rows in one go: read from memory once, then from cache.

Formulas stand in ``gradients``; here is what remains of them where nothing needs care.  Rows that
do (that are far apart, are masked in one only, or whose gradient is hardly more than rounding) are
listed, before anything is written into the logits' own memory, and left to the kernels of their
values and to ``gradients``.

The first pass is that of ``one_pass``: it leaves the constants of u = log2 p, v = log2 q and
t = v - u, and a value.  A gradient whose mean is known then is written by the second one, as

    own (2**e - 1)    q - p = p (2**t - 1), and r - p and r - q of a tilted distribution r,  or
    own e             p (log2(q/p) + mean) and p (log2 q + mean).

The entries add up to 0.  What they add up to instead is how far e is off: it is compared with the
largest of them, and where it shows, e is corrected and they are written once more.

The means of total variation and Jensen-Shannon are sums over the second pass.  It leaves own b
(of own (b - W)) in the place of the gradient, and the third pass subtracts own W.  Exchanging P and
Q changes no bit: the first of both is the one that is smaller where they first differ.

What bounds it are instructions and, next to them, memory: two vectors are in work at once, because
one chain of operations after the other leaves the processor waiting.

A row that is written into the logits' own memory, or in a narrow type, is staged in a row of
float32 that each thread has of its own.
"""

from __future__ import annotations

import functools
import math

from .gradients import LARGEST
from .mathematics import (
    LN_2,
    LOG2_E,
    exp2_32,
    exp2_minus_one_32,
    exp2_near_0,
    inline,
    log1p_32,
    outline,
)
from .normalization import FAR, exact_subtraction
from .one_pass import arithmetic, reader
from .rowloop import BLOCK, UNDERFLOW, entry, f32, f64, halves, row_address, task_row
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
    where,
)

#: Operations whose means are sums over the second pass.  Both are symmetric.
TWO_SUMS = ("js", "tv")

#: A sum of entries that is no more than this, beside the largest of them, times the largest
#: probability.
BALANCE = 2e-6
#: What ``one_pass`` calls CANCELLATION.  Orders of 1/2, of squared Hellinger, begin at 3.
CARRIED = 24.0
#: Where the largest entry is smaller, others may have been lost because p underflows.
SMALLEST = 1e-14
#: What t is at most where p = q, beside the square root of KL: what c is off.
TIE = 6e-8
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
    def both(p, q, a, of_p, of_q, sums_p, sums_q):
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
    def write(x, y, at_p, at_q, width, a, of_p, of_q):
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
                g, h, sums_p, sums_q = both(p, q, a, of_p, of_q, sums_p, sums_q)
                if to_p:
                    store(at_p + 4 * j, g)
                if to_q:
                    store(at_q + 4 * j, h)
                j += LANES32W
            if full == j < width:
                p, q = tail_p(x + j * size_p, width - j), tail_q(y + j * size_q, width - j)
                g, h, sums_p, sums_q = both(p, q, a, of_p, of_q, sums_p, sums_q)
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
    def second(x, y, at_p, at_q, width, a, constants, value, alpha, scale_p, scale_q):
        """Write the gradients; gives the value again, NaN where they are not right."""
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
        else:
            scale_p *= -LN_2
            kq = kx
        # What float32 does not hold of the probabilities' exponents.
        scale_p *= exp2_near_0(kx - f64(f32(kx)))
        scale_q *= exp2_near_0(kq - f64(f32(kq)))
        none = (1.0, 1.0)
        for _attempt in range(3):
            of_p = (f32(kx), *halves(shift_p), f32(factor_p), f32(scale_p))
            of_q = (f32(kq), *halves(shift_q), f32(factor_q), f32(scale_q))
            found_p, found_q = write(x, y, at_p, at_q, width, f32(a), of_p, of_q)
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
                shift_q -= math.log1p(found_q[0]) * LOG2_E / factor_q
                right = right and fits
            if right:
                return value, none, none
        return math.nan, none, none

    return second


@inline
def jensen_shannon(t, change, p, q):
    """(p log(p/m) + q log(q/m))/2 and these logarithms; change is q - p, m the mean of both.

    log(q/m) is t/2 - log cosh(t/2), and log(p/m) -t/2 - log cosh(t/2): the term is
    [(q - p) t/2 - (p + q) log cosh(t/2)]/2, of which the second part is half the first where t is
    small.  Where t is not, log cosh(t/2) = tau/2 - log 2 + log1p(exp(-tau)).
    """
    z = t * t
    k = fma(z, -1.3893793893160478e-09, 5.131991542839387e-08)  # 7e-9, to abs(t) = 2
    k = fma(k, z, -1.3975447927805362e-06)
    k = fma(k, z, 3.85028324672021e-05)
    k = fma(k, z, -0.0012022641021758318)
    k = fma(k, z, 0.06005662679672241) * z
    half = t * (0.5 * LN_2)
    term = fma(change, half, -(p + q) * k) * 0.5
    log_p, log_q = -half - k, half - k
    apart = vabs(t) > 2.0
    if hany(apart):
        tau = vabs(t)
        larger = LN_2 - log1p_32(exp2_32(-tau))
        smaller = fma(tau, -LN_2, larger)
        above = t > 0.0
        far_p, far_q = where(above, smaller, larger), where(above, larger, smaller)
        log_p, log_q = where(apart, far_p, log_p), where(apart, far_q, log_q)
        term = where(apart, fma(p, far_p, q * far_q) * 0.5, term)
    return term, log_p, log_q


@functools.cache
def summed(operation, sides, dtype_p, dtype_q):
    """An inlined second pass, which sums up value and means."""
    load_p, load_q = loader(dtype_p, f32w), loader(dtype_q, f32w)
    tail_p, tail_q = tail_loader(dtype_p, f32w), tail_loader(dtype_q, f32w)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    to_p, to_q = "p" in sides, "q" in sides
    tv = operation == "tv"

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
    def both(p, q, a, constants, sums, sums_p, sums_q, tie):
        kx0, kx1, c0, c1, least = constants
        d, lost = exact_subtraction(p, q)
        t = vmax(fma(d, a, c0) + fma(lost, a, c1), -FAR)
        of_p = exp2_32(fma(p, a, kx0) + kx1)
        change = of_p * exp2_minus_one_32(t)
        of_q = of_p + change
        b_p, b_q = t, t
        s, r = sums
        if tv:
            s, r = s + vabs(change), r + change
            tie = tie | (vabs(t) < least)
        else:
            term, b_p, b_q = jensen_shannon(t, change, of_p, of_q)
            s = s + term
        g, h = t, t
        if to_p:
            g, sums_p = side(of_p, -t, b_p, sums_p)
        if to_q:
            h, sums_q = side(of_q, t, b_q, sums_q)
        return g, h, (s, r), sums_p, sums_q, tie

    @inline
    def folded(totals, sums):
        return totals[0] + fold64(sums[0]), totals[1] + fold64(sums[1])

    @inline
    def add_up(x, y, at_p, at_q, width, a, constants):
        zero = splat32w(0.0)
        none = (zero, zero)
        tie = zero != zero
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
                g, h, sums, sums_p, sums_q, tie = both(
                    p, q, a, constants, sums, sums_p, sums_q, tie
                )
                if to_p:
                    store(at_p + 4 * j, g)
                if to_q:
                    store(at_q + 4 * j, h)
                j += LANES32W
            if full == j < width:
                p, q = tail_p(x + j * size_p, width - j), tail_q(y + j * size_q, width - j)
                g, h, sums, sums_p, sums_q, tie = both(
                    p, q, a, constants, sums, sums_p, sums_q, tie
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
            (hsum(totals_q[0]), hsum(totals_q[1])), hany(tie),
        )  # fmt: skip

    @inline
    def shares(sums):
        """Of the masses; or the mean alone."""
        s, r = sums
        if tv:
            return s / (s + r), r / (s + r)
        return s, 0.0

    @inline
    def spread(sums):
        return tv or sums[1] - sums[0] * sums[0] > SPREAD * sums[0] * sums[0]

    @inline
    def second(x, y, at_p, at_q, width, a, constants, value, alpha, scale_p, scale_q):
        """Gives the value and what the third pass takes of each side; NaN: not an ordinary row."""
        kx, ky, c = constants
        least = f32(TIE * math.sqrt(value))
        of_p = (0.0, 0.0)
        of_q = (0.0, 0.0)
        for _attempt in range(3):
            given = (*halves(kx), *halves(c), least)
            sums, sums_p, sums_q, tie = add_up(x, y, at_p, at_q, width, f32(a), given)
            if tv and not abs(sums[1]) <= BALANCE * sums[0]:
                c -= math.log1p(sums[1]) * LOG2_E
                continue
            # Rows that are far apart have brackets that are near another constant.
            value = min(0.5 * sums[0], 1.0) if tv else sums[0]
            usable = UNDERFLOW <= value and not tie and (tv or value < 0.5 * LN_2)
            if to_p:
                of_p = shares(sums_p)
                usable = usable and spread(sums_p)
            if to_q:
                of_q = shares(sums_q)
                usable = usable and spread(sums_q)
            return (value if usable else math.nan), of_p, of_q
        return math.nan, of_p, of_q

    return second


@functools.cache
def third(operation, dtype, dtype_into):
    """An inlined pass over what is staged: it subtracts the mean, where one is left; and rounds."""
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

    return run


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
    reading = "kl" if summing else operation
    part = reader(reading, dtype_p, dtype_q, False)
    _, _, _, _, _, finish, constants_of = arithmetic(reading, False, CARRIED)
    passes = summed if summing else balanced
    second = passes(operation, sides, dtype_p, dtype_q)
    # Of rows of two dtypes it is for the caller to give always the same one first.
    exchanging = (summing or operation == "renyi") and dtype_p == dtype_q
    if exchanging:
        other_sides = "".join(side for side in "pq" if "qp"["pq".index(side)] in sides)
        second_exchanged = passes(operation, other_sides, dtype_q, dtype_p)
        larger = order(dtype_p)
    to_p, to_q = "p" in sides, "q" in sides
    third_p = third(operation, dtype_p, dtype_into_p)
    third_q = third(operation, dtype_q, dtype_into_q)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows, counter, chunk, redo,
        values, scales, spare, into_p, into_p_stride, into_p_offsets, into_q, into_q_stride,
        into_q_offsets, powers, inverse_temperature, beta, limit,
    ):  # fmt: skip
        a = f64(f32(inverse_temperature * LOG2_E))
        alpha = beta + 1.0
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
                if exchanging and (summing or alpha == 0.5):
                    exchanged = larger(x, y, width)
                first, other = x, y
                if exchanged:
                    first, other = y, x
                state = part(first, other, 0, width, a, beta, limit * LOG2_E)
                value, _, close = finish(state, beta)
                constants = constants_of(state)
                of_p = (1.0, 1.0)
                of_q = of_p
                if powers != 0:  # the gradient is that of S
                    S = math.exp(beta * value)
                    scale_p *= S
                    scale_q *= S
                usable = close and UNDERFLOW <= value < math.inf
                if usable and abs(scale_p) < LARGEST and abs(scale_q) < LARGEST:
                    if exchanged:
                        value, of_q, of_p = second_exchanged(
                            y, x, at_q, at_p, width, a, constants, value, alpha, -scale_q, -scale_p
                        )
                        constants = constants[1], constants[0], -constants[2]
                    else:
                        value, of_p, of_q = second(
                            x, y, at_p, at_q, width, a, constants, value, alpha, scale_p, scale_q
                        )
                    usable = value == value
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

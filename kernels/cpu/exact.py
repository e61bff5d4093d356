"""Every operation in float64, for any input whatever: the path without preconditions.

It serves float64 logits, probabilities, unequal temperatures, strided rows, and the rows
that the float32 kernels hand over (one-sided -inf, log-ratios out of range, cancellation).
Every row is read tile by tile into small float64 buffers, three times or more:

1. the maxima, and which supports differ;
2. the normalizers, and the difference of their logarithms from terms that vanish where the
   rows agree (see two_phase), with the constant c moved once or twice until it fits;
3. the sum of non-negative terms (an *integrand*: it takes p, q and t = log(q/p)).

Of a shard of a row, ``log_ratio`` gives what the second step finds, ``top_ratio`` the index where
log(p/q) is largest, and with the normalizers of the whole row the third one gives the shard's share
of its sum.

All steps are symmetric in the two rows or change sign only, so that symmetric divergences
give the same bits when the arguments are swapped.
"""

from __future__ import annotations

import functools
import math

from .mathematics import (
    atanh_tail_64,
    exp_64,
    expm1_64,
    inline,
    jensen_64,
    log_64,
    outline,
    phi_64,
)
from .rowloop import STATISTICS, row_address, task_row
from .simd import (
    ITEMSIZE,
    LANES64,
    copysign,
    f64v,
    fetch_add,
    first_lane,
    fma,
    hany,
    hmax,
    hsum,
    lane_is,
    lanes_below,
    loader,
    narrow_store,
    peek_f64,
    peek_i64,
    poke_f64,
    scratch,
    splat64,
    store,
    tail_loader,
    unordered,
    vabs,
    vmax,
    vmin,
    where,
)

#: Entries staged at a time, 8 KiB of each array. Whole vectors are stored, each behind the last: of
#: entries that do not follow each other in memory the last vector begins with the last entry.
TILE = 1024
BUFFER = 8 * (TILE + LANES64)

#: How the kernel is told the type of an array.
DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}


_LARGEST = 1.7976931348623157e308

_load = {name: loader(name, f64v) for name in DTYPE_CODE}
_load_tail = {name: tail_loader(name, f64v) for name in DTYPE_CODE}


def _stager(dtype):
    """A function that copies entries of ``dtype`` into a float64 buffer, padded with -inf."""
    load, load_tail, size = _load[dtype], _load_tail[dtype], ITEMSIZE[dtype]

    @outline
    def stage(buffer, at, step, n):
        j = 0
        if step == size:
            while j + LANES64 <= n:
                store(buffer + 8 * j, load(at + j * size))
                j += LANES64
            if j < n:
                store(buffer + 8 * j, load_tail(at + j * size, n - j))
        else:
            while j < n:
                store(buffer + 8 * j, load_tail(at + j * step, 1))
                j += 1

    return stage


_stage_f16, _stage_bf16, _stage_f32, _stage_f64 = (_stager(name) for name in DTYPE_CODE)

_poke_f16, _poke_bf16, _poke_f32, _poke_f64 = (narrow_store(name) for name in DTYPE_CODE)

_get = loader("float64", f64v)
buffer_x, buffer_y, buffer_t = scratch(BUFFER), scratch(BUFFER), scratch(BUFFER)


@outline
def stage(buffer, at, step, dtype, probabilities, n):
    """Read n entries as logits; probabilities become their logarithms."""
    if dtype == 0:
        _stage_f16(buffer, at, step, n)
    elif dtype == 1:
        _stage_bf16(buffer, at, step, n)
    elif dtype == 2:
        _stage_f32(buffer, at, step, n)
    else:
        _stage_f64(buffer, at, step, n)
    if probabilities != 0:
        for j in range(0, n, LANES64):
            # -inf is the padding; a probability of -inf is as wrong as any below 0.
            w = _get(buffer + 8 * j)
            logarithm = where(w == math.inf, w, log_64(w))
            store(buffer + 8 * j, where(lanes_below(w, n - j), logarithm, -math.inf))


# --- integrands: p, q, t = log(q/p), the logarithms of p and q, and one parameter -----------


@inline
def kl(p, q, t, log_p, log_q, parameter):
    """p (exp(t) - 1 - t); where q is much larger than p, as q - p - p t."""
    return where(t > 1.0, fma(p, -t, q - p), p * phi_64(vmin(t, 1.0)))


@inline
def cross_entropy(p, q, t, log_p, log_q, parameter):
    return p * -vmax(log_q, -_LARGEST)


@inline
def total_variation(p, q, t, log_p, log_q, parameter):
    return vmax(p, q) * expm1_64(-vabs(t)) * -0.5


@inline
def hellinger2(p, q, t, log_p, log_q, parameter):
    r = expm1_64(vabs(t) * -0.5)
    return vmax(p, q) * r * r * 0.5


@inline
def jeffreys(p, q, t, log_p, log_q, parameter):
    tau = vabs(t)
    return vmax(p, q) * -expm1_64(-tau) * tau


@inline
def js(p, q, t, log_p, log_q, weight):
    """m [w f(u) + (1-w) f(v)] with f = jensen_64, u = (p-m)/m, v = (q-m)/m."""
    other = 1.0 - weight
    difference = -copysign(vmax(p, q) * expm1_64(-vabs(t)), t)  # p - q
    m = weight * p + other * q
    ratio = where(m > 0.0, difference / m, 0.0)
    u = vmax(-1.0, other * ratio)
    v = vmax(-1.0, -weight * ratio)
    return m * (weight * jensen_64(u) + other * jensen_64(v))


@inline
def renyi(p, q, t, log_p, log_q, beta):
    """p [phi(beta d) + beta phi(-d)] with d = -t; far apart, p expm1(beta d) + beta (q - p)."""
    v = -beta * t
    near = (vabs(t) < 1.0) & (vabs(v) < 1.0)
    t = vmin(vmax(t, -1.0), 1.0)
    w = vmin(vmax(v, -1.0), 1.0)
    close = p * (phi_64(w) + beta * phi_64(t))
    apart = p * expm1_64(vmin(v, 700.0)) + beta * (q - p)
    return where(near, close, apart)


@inline
def renyi_exponent(p, q, t, log_p, log_q, beta):
    """alpha log p + (1 - alpha) log q = log p + beta log(p/q)."""
    outside = (log_p == -math.inf) | (log_q == -math.inf)
    return where(outside, -math.inf, fma(t, -beta, log_p))


@inline
def log_mass_inside(p, q, t, log_p, log_q, parameter):
    """log q where p > 0."""
    return where(log_p == -math.inf, -math.inf, log_q)


@inline
def log_ratio(p, q, t, log_p, log_q, parameter):
    """log(p/q) on the support of P."""
    return where(log_p == -math.inf, -math.inf, -t)


@inline
def mass_outside(p, q, t, log_p, log_q, parameter):
    """q where p = 0."""
    return where(log_p == -math.inf, q, 0.0)


SUMS = {
    "kl": kl,
    "cross_entropy": cross_entropy,
    "tv": total_variation,
    "hellinger2": hellinger2,
    "jeffreys": jeffreys,
    "js": js,
    "renyi": renyi,
    "renyi_0": mass_outside,
    "renyi_inf": log_ratio,
    "top_ratio": log_ratio,
}
#: +inf where P has support that Q has not, or (both) either way round.
INFINITE_WITHOUT_Q = {"kl", "cross_entropy", "jeffreys", "renyi_inf"}
INFINITE_WITHOUT_P = {"jeffreys"}


#: Rounding must not carry a result beyond what it can be.
CEILING = {"tv": 1.0, "hellinger2": 1.0}


def build(operation):
    if operation in ("statistics", "log_softmax", "renyi_entropy"):
        return _build_single(operation)
    return _build_pair(operation)


@outline
def write(address, dtype, value):
    if dtype == 0:
        _poke_f16(address, value)
    elif dtype == 1:
        _poke_bf16(address, value)
    elif dtype == 2:
        _poke_f32(address, value)
    else:
        _poke_f64(address, value)


@inline
def difference(a, b):
    """a - b, and what its rounding lost (NaN at infinity)."""
    d = a - b
    back = d - a
    return d, (a - (d - back)) - (b + back)


@inline
def tile_top(buffer, n, largest):
    """(larger of ``largest`` and the tile's maximum, its first index or -1, any NaN or inf)."""
    m = splat64(-math.inf)
    bad = lane_is(m, -1)
    for j in range(0, n, LANES64):
        w = _get(buffer + 8 * j)
        m = vmax(w, m)
        bad = bad | unordered(w, w) | (w == math.inf)
    value = hmax(m)
    if not value > largest:
        return largest, -1, hany(bad)
    j = 0
    while True:
        lane = first_lane(_get(buffer + 8 * j) == value)
        if lane < LANES64:
            return value, j + lane, hany(bad)
        j += LANES64


def _build_single(operation):
    statistics = operation == "statistics"
    writes = operation == "log_softmax"

    def kernel(
        p, p_stride, p_offsets, p_step, p_dtype, q, q_stride, q_offsets, q_step, q_dtype,
        width, rows, n_rows, counter, chunk, probabilities, tokens, out, known, ip, iq, alpha,
    ):  # fmt: skip
        buffer = buffer_x()
        size = p_step
        while True:
            begin = fetch_add(counter, chunk)
            if begin >= n_rows:
                return
            for number in range(begin, min(begin + chunk, n_rows)):
                row = task_row(rows, number)
                x = row_address(p, p_stride, p_offsets, row)
                top = -math.inf
                index = -1
                bad = False
                for start in range(0, width, TILE):
                    n = min(TILE, width - start)
                    stage(buffer, x + start * size, size, p_dtype, probabilities, n)
                    top, at, wrong = tile_top(buffer, n, top)
                    if at >= 0:
                        index = start + at
                    bad = bad or wrong
                S = 0.0
                U = 0.0
                R = 0.0
                T = 0.0
                finite = top > -math.inf and not bad
                if finite:
                    for start in range(0, width, TILE):
                        n = min(TILE, width - start)
                        stage(buffer, x + start * size, size, p_dtype, probabilities, n)
                        s = splat64(0.0)
                        u = s
                        r = s
                        for j in range(0, n, LANES64):
                            w = _get(buffer + 8 * j)
                            w = where(lane_is(w, index - start - j), -math.inf, w)
                            none = w == -math.inf
                            w = vmax((w - top) * ip, -_LARGEST)
                            e = where(none, 0.0, exp_64(w))
                            s = s + e
                            if statistics:
                                u = fma(e, -w, u)
                            elif not writes:
                                r = r + where(none, 0.0, exp_64(alpha * w))
                        S += hsum(s)
                        U += hsum(u)
                        R += hsum(r)
                if writes:  # q is what is written
                    log_s = math.log1p(S)
                    y = row_address(q, q_stride, q_offsets, row)
                    for start in range(0, width, TILE):
                        n = min(TILE, width - start)
                        stage(buffer, x + start * size, size, p_dtype, probabilities, n)
                        for j in range(n):
                            value = (peek_f64(buffer + 8 * j) - top) * ip - log_s
                            write(y + (start + j) * q_step, q_dtype, value if finite else math.nan)
                    continue
                if statistics:
                    at = out + row * (8 * STATISTICS)
                    scaled = min(max(top * ip, -_LARGEST), _LARGEST)
                    poke_f64(at, scaled if finite else math.nan)
                    poke_f64(at + 8, math.nan if bad else S)
                    poke_f64(at + 16, U)
                    poke_f64(at + 24, index)
                    if tokens != 0:
                        token = peek_i64(tokens + 8 * row)
                        stage(buffer, x + token * size, size, p_dtype, probabilities, 1)
                        poke_f64(at + 32, (peek_f64(buffer) - top) * ip)
                    continue
                # log sum p**alpha = log(1 + R) - alpha log(1 + S), over 1 - alpha; near
                # alpha = 1 from sum p expm1((alpha - 1) log p), whose terms have one sign.
                log_s = math.log1p(S)
                beta = alpha - 1.0
                value = math.nan
                if finite and alpha == math.inf:
                    value = log_s
                elif finite and abs(beta) > 0.5:
                    value = (alpha * log_s - math.log1p(R)) / beta
                elif finite:
                    for start in range(0, width, TILE):
                        n = min(TILE, width - start)
                        stage(buffer, x + start * size, size, p_dtype, probabilities, n)
                        t = splat64(0.0)
                        for j in range(0, n, LANES64):
                            log_p = (_get(buffer + 8 * j) - top) * ip - log_s
                            p_ = exp_64(log_p)
                            v = vmax(log_p, -1e9)
                            if beta == 0.0:
                                t = fma(p_, -v, t)
                            else:
                                t = fma(p_, expm1_64(vmin(beta * v, 700.0)), t)
                        T += hsum(t)
                    value = T if beta == 0.0 else -math.log1p(T) / beta
                poke_f64(out + 8 * row, value if value != 0.0 else 0.0)

    return kernel


# --- pairs of rows -----------------------------------------------------------------------

# ``how`` is how both rows are read: bytes between entries and type of P, the same of Q, whether
# they are probabilities, and the inverse temperatures.


@outline
def stage_pair(x, y, t, xp, yq, how, mx, my, wx, wy, n):
    """Fill the buffers with u = (x - mx)/T, v = (y - my)/T and t = v - u.

    t is rounded once: what the subtractions round off is carried along.  ``wx`` and ``wy``
    are the largest probabilities, where the entries are such.
    """
    p_step, p_dtype, q_step, q_dtype, probabilities, ip, iq = how
    stage(x, xp, p_step, p_dtype, 0, n)
    stage(y, yq, q_step, q_dtype, 0, n)
    same = ip == iq
    if probabilities != 0:
        # The logarithm of (q/wy) / (p/wx) near 1 comes from exact products, not from
        # logarithms: 2 atanh(s) with s = (q wx - p wy)/(q wx + p wy), odd as it must be.
        for j in range(0, n, LANES64):
            p = _get(x + 8 * j)
            q = _get(y + 8 * j)
            left = q * wx
            right = p * wy
            lost = fma(q, wx, -left) - fma(p, wy, -right)
            s = ((left - right) + lost) / (left + right)
            near = 2.0 * ip * fma(s, atanh_tail_64(s), s)
            usable = (vabs(s) < 0.17) & (vmin(left, right) > 1e-280)
            store(t + 8 * j, where(usable, near, math.nan))
        stage(x, xp, p_step, p_dtype, 1, n)
        stage(y, yq, q_step, q_dtype, 1, n)
    for j in range(0, n, LANES64):
        p = _get(x + 8 * j)
        q = _get(y + 8 * j)
        dx, lost_x = difference(p, mx)
        dy, lost_y = difference(q, my)
        u = dx * ip
        v = dy * iq
        if same:
            lost = (lost_y - lost_x) * ip
            d = (dy - dx) * ip
        else:
            lost = fma(lost_y, iq, -lost_x * ip) - fma(dx, ip, -u)
            d = fma(dy, iq, -u)
        d = d + where(unordered(lost, lost), 0.0, lost)
        if probabilities != 0 and same:
            near = _get(t + 8 * j)
            d = where(unordered(near, near), d, near)
        store(t + 8 * j, d)
        # A finite logit far below the range is still in the support.
        store(x + 8 * j, where(p == -math.inf, p, vmax(u, -_LARGEST)))
        store(y + 8 * j, where(q == -math.inf, q, vmax(v, -_LARGEST)))


@inline
def terms(x, y, t, j, sums):
    """p, q, log(q/p), log p, log q of one vector; all 0 or finite outside the supports."""
    log_x, log_y, off, fine = sums
    log_p = _get(x + 8 * j) - log_x
    log_q = _get(y + 8 * j) - log_y
    d = (_get(t + 8 * j) + off) + fine
    d = where(unordered(d, d), 0.0, vmin(vmax(d, -_LARGEST), _LARGEST))
    return exp_64(log_p), exp_64(log_q), d, log_p, log_q


@outline
def tops(x, y, xp, yq, width, how):
    """Maxima with their indices, whether rows are valid, and which lack what the other has."""
    p_step, p_dtype, q_step, q_dtype, probabilities, ip, iq = how
    mx = -math.inf
    my = -math.inf
    top_x = -1
    top_y = -1
    bad = False
    no_q = False
    no_p = False
    for start in range(0, width, TILE):
        n = min(TILE, width - start)
        stage(x, xp + start * p_step, p_step, p_dtype, probabilities, n)
        stage(y, yq + start * q_step, q_step, q_dtype, probabilities, n)
        mx, at, wrong = tile_top(x, n, mx)
        if at >= 0:
            top_x = start + at
        bad = bad or wrong
        my, at, wrong = tile_top(y, n, my)
        if at >= 0:
            top_y = start + at
        bad = bad or wrong
        only_p = lane_is(splat64(0.0), -1)
        only_q = only_p
        for j in range(0, n, LANES64):
            zero_p = _get(x + 8 * j) == -math.inf
            zero_q = _get(y + 8 * j) == -math.inf
            only_p = only_p | (zero_q & ~zero_p)
            only_q = only_q | (zero_p & ~zero_q)
        no_q = no_q or hany(only_p)
        no_p = no_p or hany(only_q)
    valid = not bad and mx > -math.inf and my > -math.inf
    return mx, my, top_x, top_y, valid, no_q, no_p


@outline
def log_sums(x, y, t, xp, yq, width, how, found, wx, wy):
    """Logarithms of the normalizers, relative to the maxima, and that of their ratio.

    The latter in two parts: the last correction is kept apart, because t + off cancels.
    """
    p_step, p_dtype, q_step, q_dtype, probabilities, ip, iq = how
    mx, my, top_x, top_y = found
    # ``off`` tends to log(Sx/Sy), with the tops in.
    off = 0.0
    fine = 0.0
    Sx = 0.0
    Sy = 0.0
    for _attempt in range(4):
        Sx = 0.0
        Sy = 0.0
        D = 0.0
        H = 0.0
        fx = math.exp(-0.5 * (off + fine))
        fy = math.exp(0.5 * (off + fine))
        for start in range(0, width, TILE):
            n = min(TILE, width - start)
            stage_pair(x, y, t, xp + start * p_step, yq + start * q_step, how, mx, my, wx, wy, n)
            sx = splat64(0.0)
            sy = sx
            change_sum = sx
            size = sx
            for j in range(0, n, LANES64):
                ex = exp_64(_get(x + 8 * j))
                ey = exp_64(_get(y + 8 * j))
                d = (_get(t + 8 * j) + off) + fine
                tau = vmin(vabs(d), 700.0)  # NaN from -inf - -inf: ex = ey = 0
                change = vmax(ex * fx, ey * fy) * -expm1_64(-tau)
                change_sum = change_sum + copysign(change, d)
                size = size + change
                sx = sx + where(lane_is(ex, top_x - start - j), 0.0, ex)
                sy = sy + where(lane_is(ey, top_y - start - j), 0.0, ey)
            Sx += hsum(sx)
            Sy += hsum(sy)
            D += hsum(change_sum)
            H += hsum(size)
        total = fx * (1.0 + Sx) + fy * (1.0 + Sy)
        if not abs(D) < 0.5 * total:
            off = math.log1p(Sx) - math.log1p(Sy)
            fine = 0.0
        elif abs(D) > 0.25 * H:
            off += fine - 2.0 * math.atanh(D / total)
            fine = 0.0
        else:
            fine -= 2.0 * math.atanh(D / total)
            break
        if not abs(off) < 600.0:
            break
    return math.log1p(Sx), math.log1p(Sy), off, fine


@functools.cache
def summation(operation):
    """``total``: the value of a pair, once its normalizers are known."""
    integrand = SUMS[operation]
    ceiling = CEILING.get(operation, math.inf)
    order = operation == "renyi"
    exponent = log_mass_inside if operation == "renyi_0" else renyi_exponent
    place_only = operation == "top_ratio"
    largest_only = operation == "renyi_inf"
    support = operation == "renyi_0"

    @outline
    def total(x, y, t, xp, yq, width, how, found, sums, parameter):
        p_step, p_dtype, q_step, q_dtype, probabilities, ip, iq = how
        mx, my, wx, wy = found
        value = 0.0
        peak = -math.inf
        place = -1
        for start in range(0, width, TILE):
            n = min(TILE, width - start)
            stage_pair(x, y, t, xp + start * p_step, yq + start * q_step, how, mx, my, wx, wy, n)
            s = splat64(0.0)
            m = splat64(-math.inf)
            for j in range(0, n, LANES64):
                p_, q_, d, log_p, log_q = terms(x, y, t, j, sums)
                term = integrand(p_, q_, d, log_p, log_q, parameter)
                if place_only:  # in place of what has been read
                    store(x + 8 * j, term)
                elif largest_only:
                    m = vmax(term, m)
                else:
                    s = s + term
                if order or support:
                    m = vmax(exponent(p_, q_, d, log_p, log_q, parameter), m)
            value += hsum(s)
            if place_only:
                peak, at, _ = tile_top(x, n, peak)
                if at >= 0:
                    place = start + at
            else:
                peak = max(peak, hmax(m))

        if place_only:
            value = place
        if largest_only:
            value = peak
        if order or support:
            # The logarithm of the sum whose terms' logarithms are the exponents: of
            # S = sum p**alpha q**(1 - alpha), or of Q's mass on the support of P.
            log_s = -math.inf
            if peak == math.inf:
                log_s = peak
            elif peak > -math.inf:
                mass = 0.0
                for start in range(0, width, TILE):
                    n = min(TILE, width - start)
                    stage_pair(
                        x, y, t, xp + start * p_step, yq + start * q_step, how, mx, my, wx, wy, n
                    )
                    s = splat64(0.0)
                    for j in range(0, n, LANES64):
                        p_, q_, d, log_p, log_q = terms(x, y, t, j, sums)
                        r = exponent(p_, q_, d, log_p, log_q, parameter)
                        s = s + exp_64(r - peak)
                    mass += hsum(s)
                log_s = peak + math.log(mass)
            # Close to 0 it comes from the sum that does not cancel, which on the other
            # hand has lost terms where p underflows.
            close = math.log1p(max(-value if support else value, -1.0))
            if abs(log_s) < 1.0 and abs(close - log_s) < 1e-9:
                log_s = close
            value = -log_s if support else log_s / parameter
        if operation == "js":
            w = parameter
            value = min(value, -w * math.log(w) - (1.0 - w) * math.log1p(-w))
        return min(max(value, 0.0), ceiling) + 0.0  # no -0

    return total


@functools.cache
def infinity(operation):
    """An inlined ``infinite``: whether a value is, for what one of the rows lacks."""
    without_q = operation in INFINITE_WITHOUT_Q
    without_p = operation in INFINITE_WITHOUT_P
    order = operation == "renyi"

    @inline
    def infinite(no_q, no_p, parameter):
        return (without_q and no_q) or (without_p and no_p) or (order and no_q and parameter >= 0.0)

    return infinite


def _build_pair(operation):
    only_ratio = operation == "log_ratio"
    support = operation == "renyi_0"
    total = summation("kl" if only_ratio else operation)
    infinite = infinity(operation)

    def kernel(
        p, p_stride, p_offsets, p_step, p_dtype, q, q_stride, q_offsets, q_step, q_dtype,
        width, rows, n_rows, counter, chunk, probabilities, tokens, out, known, ip, iq, parameter,
    ):  # fmt: skip
        x = buffer_x()
        y = buffer_y()
        t = buffer_t()
        how = (p_step, p_dtype, q_step, q_dtype, probabilities, ip, iq)
        while True:
            begin = fetch_add(counter, chunk)
            if begin >= n_rows:
                return
            for number in range(begin, min(begin + chunk, n_rows)):
                row = task_row(rows, number)
                xp = row_address(p, p_stride, p_offsets, row)
                yq = row_address(q, q_stride, q_offsets, row)
                if known != 0:
                    # The whole row's normalizers are given, of which this is a shard.
                    at = known + 40 * row
                    mx = peek_f64(at)
                    my = peek_f64(at + 16)
                    off = peek_f64(at + 32)
                    sums = (peek_f64(at + 8), peek_f64(at + 24), off, 0.0)
                    if not abs(sums[0]) + abs(sums[1]) + abs(off) < math.inf:
                        poke_f64(out + 8 * row, math.nan)
                        continue
                    wx = 0.0
                    wy = 0.0
                    if probabilities != 0:
                        wx = mx
                        wy = my
                        mx = math.log(wx)
                        my = math.log(wy)
                else:
                    mx, my, top_x, top_y, valid, no_q, no_p = tops(x, y, xp, yq, width, how)
                    if not valid:
                        poke_f64(out + 8 * row, math.nan)
                        continue
                    if infinite(no_q, no_p, parameter):
                        poke_f64(out + 8 * row, math.inf)
                        continue
                    if support and not no_p:
                        poke_f64(out + 8 * row, 0.0)
                        continue
                    wx = 0.0
                    wy = 0.0
                    if probabilities != 0:
                        stage(x, xp + top_x * p_step, p_step, p_dtype, 0, 1)
                        stage(y, yq + top_y * q_step, q_step, q_dtype, 0, 1)
                        wx = peek_f64(x)
                        wy = peek_f64(y)
                    places = (mx, my, top_x, top_y)
                    sums = log_sums(x, y, t, xp, yq, width, how, places, wx, wy)
                    if only_ratio:
                        poke_f64(out + 8 * row, sums[2] + sums[3])
                        continue
                found = (mx, my, wx, wy)
                value = total(x, y, t, xp, yq, width, how, found, sums, parameter)
                poke_f64(out + 8 * row, value)

    return kernel

"""The squared Hellinger distance in one read of the two rows.

It is 1 - sum sqrt(p q), and both that sum and the normalizers are sums over the geometric mean of
the two rows' powers.  In base 2, with u = a x + rx and v = a y + ry for references rx, ry (minus
the maxima), g = 2**((u + v)/2), a constant c and t = a (y - x) + c, let z = t log(2)/2 and

    G = sum g,   K = sum g (cosh(z) - 1),   D = sum g sinh(z).

G + K - D and G + K + D are the normalizers, up to factors 2**(+-constant) whose product is 1, and
sum sqrt(p q) is G over the root R of their product:

    R**2 = G**2 + N,   N = K (2 G + K) - D**2,   1 - G/R = N/(R (R + G)).

K is a sum of terms that are never negative and vanish where the rows agree.  N is a variance: it is
the same whatever c, and with c near the mean of a (x - y) nothing of it cancels, since D is then
small beside K.  Moving c by 2 h/log(2), which adds h to every z, is exact in these sums:

    K + [sinh(h) D + (cosh(h) - 1) (G + K)],   D + [sinh(h) (G + K) + (cosh(h) - 1) D].

So a tile that leaves D too large is done again with a better c, and smaller distances of c from the
mean are taken out between tiles.  E adds up, twice, what negative numbers went into K.

With M = 2**max(u', v'), u' = a x + k - c/2, v' = a y + k + c/2, k = (rx + ry)/2 (hence
v' - u' = t) and r = 1 - 2**(-abs(t)/2), the terms are M (1 - r), M r**2/2 and
sign(t) M r (2 - r)/2, which hold for any t, infinite ones included.  Blocks where all abs(t) are
at most NEAR take g and polynomials instead, as in ``normalization``.

Swapping the arguments changes the signs of c, t and D, operation by operation, and nothing else.

Rows that these sums do not carry are listed for ``two_phase``, which subtracts exactly.
"""

from __future__ import annotations

import math

from .mathematics import (
    LN_2,
    LOG2_E,
    exp2_32,
    inline,
    near_cosh_32,
    near_sinh_32,
    one_minus_exp2_32,
)
from .normalization import CLOSE, FAR, all_near, geometric_mean
from .polynomials import NEAR
from .rowloop import (
    BLOCK,
    TILE,
    UNDERFLOW,
    ahead,
    comparison,
    f32,
    f64,
    halves,
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
    splat32,
    splat64,
    tail_loader,
    unordered,
    vabs,
    vmax,
    vmin,
)

#: Numbers in the state of a row, as it is written for another thread to merge.
STATE = 8

#: Shares of D**2 in K (2 G + K) from where c is moved, and from where a tile is done again.
OFF, FAR_OFF = 1 / 16, 5 / 8

#: K may be this much larger than what N leaves of it.
CANCELLATION = 4.0

#: How far, in base 2, c may be from the difference of the references: powers stay below half of it.
REACH = 32.0


def build(dtype_p, dtype_q):
    """Kernel for rows of these dtypes."""
    load_p, load_q = loader(dtype_p, f32v), loader(dtype_q, f32v)
    tail_p, tail_q = tail_loader(dtype_p, f32v), tail_loader(dtype_q, f32v)
    ahead_p, ahead_q = ahead(dtype_p), ahead(dtype_q)
    max_p, _ = passes(dtype_p)
    max_q, _ = passes(dtype_q)
    size_p, size_q = ITEMSIZE[dtype_p], ITEMSIZE[dtype_q]
    differ = comparison(dtype_p, dtype_q)

    @inline
    def near_block(x, y, start, stop, a, rx, ry, c):
        """(G, K, D) of a block of whole vectors, and whether it was near."""
        half = f32(0.5) * a
        kx = f32(0.5) * rx
        ky = f32(0.5) * ry
        s = splat32(0.0)
        k = s
        d = s
        high = s
        for j in range(start, stop, LANES32):
            ahead_p(x, j)
            ahead_q(y, j)
            p = load_p(x + j * size_p)
            q = load_q(y + j * size_q)
            t = fma(q - p, a, c)
            z = t * t
            high = vmax(z, high)
            g = geometric_mean(p, q, half, kx, ky)
            s = s + g
            k = fma(g * z, near_cosh_32(z), k)
            d = fma(g * t, near_sinh_32(z), d)
        return s, k, d, all_near(high, s)

    @inline
    def step(p, q, a, constants, s, k, d, high, bad):
        """Add one vector, whatever it is; k and d are in halves."""
        kx, lost_x, ky, lost_y, c = constants
        t = fma(q - p, a, c)
        m = exp2_32(vmax(fma(p, a, kx) + lost_x, fma(q, a, ky) + lost_y))
        tau = vmin(vabs(t), FAR)  # a NaN from -inf - -inf becomes FAR
        r = one_minus_exp2_32(tau * 0.5)
        mr = m * r
        s = s + (m - mr)
        k = fma(mr, r, k)
        d = d + copysign(fma(mr, -r, mr + mr), t)
        return s, k, d, vmax(tau, high), bad | unordered(p, q)

    @inline
    def sums(x, y, start, stop, a, rx, ry, c, close):
        """(G, K, D, any NaN) of [start, stop), and whether the last block was near."""
        kx, lost_x = halves(0.5 * (rx + ry) - 0.5 * c)
        ky, lost_y = halves(0.5 * (rx + ry) + 0.5 * c)
        constants = (kx, lost_x, ky, lost_y, f32(c))
        zero = splat32(0.0)
        G = splat64(0.0)
        K = G
        D = G
        bad = lane_is(zero, -1)
        full = start + (stop - start) // LANES32 * LANES32
        j = start
        while j < full:
            last = min(full, j + BLOCK)
            if close:
                s, k, d, close = near_block(x, y, j, last, a, f32(rx), f32(ry), f32(c))
                if close:
                    G = G + fold64(s)
                    K = K + fold64(k)
                    D = D + fold64(d)
                    j = last
                    continue
            s = zero
            k = zero
            d = zero
            high = zero
            while j < last:
                ahead_p(x, j)
                ahead_q(y, j)
                s, k, d, high, bad = step(
                    load_p(x + j * size_p), load_q(y + j * size_q),
                    a, constants, s, k, d, high, bad,
                )  # fmt: skip
                j += LANES32
            close = not hany(high > NEAR)
            G = G + fold64(s)
            K = K + 0.5 * fold64(k)
            D = D + 0.5 * fold64(d)
        if full < stop:
            p = tail_p(x + full * size_p, stop - full)
            q = tail_q(y + full * size_q, stop - full)
            s, k, d, _, bad = step(p, q, a, constants, zero, zero, zero, zero, bad)
            G = G + fold64(s)
            K = K + 0.5 * fold64(k)
            D = D + 0.5 * fold64(d)
        return hsum(G), hsum(K), hsum(D), hany(bad), close

    @inline
    def moved(state, c):
        """The same row seen with another c."""
        rx, ry, before, G, K, D, E = state
        h = (0.5 * LN_2) * (c - before)
        odd = math.sinh(h)
        # cosh(h) - 1
        even = 2.0 * math.sinh(0.5 * h) * math.sinh(0.5 * h)
        linear = odd * D
        E = (1.0 + even) * E + 2.0 * max(0.0, -linear)
        return rx, ry, c, G, K + (linear + even * (G + K)), D + (odd * (G + K) + even * D), E

    @inline
    def lowered(state, rx, ry):
        """The same sums relative to other references."""
        f = math.exp2(0.5 * ((rx - state[0]) + (ry - state[1])))
        return rx, ry, state[2], f * state[3], f * state[4], f * state[5], f * state[6]

    @inline
    def centred(c, G, K, D):
        """The c that makes D vanish, as far as float32 holds it: odd where c and D are."""
        share = max(-0.999999, min(0.999999, D / (G + K)))
        return f64(f32(c - (2.0 / LN_2) * math.atanh(share)))

    @inline
    def part(x, y, start, stop, a):
        """The state of the entries [start, stop); G is NaN where it cannot be had."""
        state = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        close = True
        again = False
        j = start
        while j < stop:
            tile_stop = min(j + TILE, stop)
            rx = -1024.0 * a * f64(max_p(x, j, tile_stop))
            ry = -1024.0 * a * f64(max_q(y, j, tile_stop))
            # Beyond 2**19 the references are no longer exact in float32 (or not finite).
            if not (abs(rx) < 8388608.0 and abs(ry) < 8388608.0):
                if not (j > start and rx > 0.0 and ry > 0.0):
                    return 0.0, 0.0, 0.0, math.nan, 0.0, 0.0, 0.0
                # -inf all over: nothing to add, whatever the references.
                rx = state[0]
                ry = state[1]
            else:
                rx = math.floor(rx) / 1024.0
                ry = math.floor(ry) / 1024.0
            if j == start:
                c = state[2] if again else ry - rx
                state = (rx, ry, c, 0.0, 0.0, 0.0, 0.0)
            elif rx < state[0] or ry < state[1]:
                state = lowered(state, min(rx, state[0]), min(ry, state[1]))
            if abs(state[2] - (state[1] - state[0])) > REACH:
                state = moved(state, state[1] - state[0])
            rx, ry, c, G, K, D, E = state
            g, k, d, bad, close = sums(x, y, j, tile_stop, f32(a), rx, ry, c, close)
            if bad:
                return rx, ry, c, math.nan, K, D, E
            G += g
            K += k
            D += d
            square = D * D
            whole = K * (2.0 * G + K)
            if square > FAR_OFF * whole and not again:
                again = True
                close = True
                state = moved(state, centred(c, G, K, D))
                continue
            again = False
            state = (rx, ry, c, G, K, D, E)
            if square > OFF * whole:
                state = moved(state, centred(c, G, K, D))
            j = tile_stop
        return state

    @inline
    def merge(a, b):
        """The state of two parts together."""
        rx = min(a[0], b[0])
        ry = min(a[1], b[1])
        a = lowered(a, rx, ry)
        b = moved(lowered(b, rx, ry), a[2])
        return rx, ry, a[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6]

    @inline
    def finish(state):
        """The squared distance, or NaN where the sums do not carry it."""
        rx, ry, c, G, K, D, E = state
        both = 2.0 * G + K
        N = K * both - D * D
        # Also where they are NaN.  (For identical rows K and N are 0.)
        if not (G + K > 0.0 and (K + E) * both <= CANCELLATION * N):
            return math.nan
        # One normalizer is what is left of two much larger numbers.
        if abs(D) > 0.75 * (G + K):
            return math.nan
        R = math.sqrt(G * G + N)
        value = N / (R * (R + G))
        # Where the rows differ by a constant, the rounding of y - x makes errors of it times 2**-24
        # in t, which average out over the S or more symbols that carry the mass.
        f = math.exp2(0.5 * (c - (ry - rx)))
        S = (G + K - D) * f + (G + K + D) / f
        if abs(c) > CLOSE or c * c > 100.0 * value * S:
            return math.nan
        return min(value, 1.0)

    def kernel(
        p, p_stride, p_offsets, q, q_stride, q_offsets, width, rows, n_rows,
        counter, chunk, parts, part_width, states, done, redo, out, inverse_temperature,
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
                state = part(x, y, start, min(start + part_width, width), a)
                if parts > 1:
                    at = states + task * (8 * STATE)
                    for i in range(7):
                        poke_f64(at + 8 * i, state[i])
                    if fetch_add(done + 8 * number, 1) + 1 < parts:
                        continue
                    at = states + number * parts * (8 * STATE)
                    state = load_state(at)
                    for i in range(1, parts):
                        state = merge(state, load_state(at + i * (8 * STATE)))
                value = finish(state)
                if value < UNDERFLOW and differ(x, y, width):
                    value = math.nan
                poke_f64(out + 8 * row, value)
                if not value < math.inf:
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)

    @inline
    def load_state(at):
        return (
            peek_f64(at), peek_f64(at + 8), peek_f64(at + 16), peek_f64(at + 24),
            peek_f64(at + 32), peek_f64(at + 40), peek_f64(at + 48),
        )  # fmt: skip

    return kernel

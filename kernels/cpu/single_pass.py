"""What there is to know of one row, in one read: its maximum, its normalizer, its entropy.

The state (m, S, U, k) is described at ``rowloop.STATISTICS``.  The largest entry is kept
apart from the sums, so that log1p(S) - the surprise of the top symbol - and the entropy
log1p(S) + U/(1 + S) are accurate however close the top's probability is to 1.  Entries of
-inf have no weight and contribute nothing.
"""

from __future__ import annotations

import math

from .mathematics import LN_2, LOG2_E, exp2_32, exp2_near_0, inline
from .rowloop import (
    BLOCK,
    STATISTICS,
    TILE,
    UNDERFLOW,
    ahead,
    entry,
    f32,
    f64,
    passes,
    row_address,
    task_row,
)
from .simd import (
    ITEMSIZE,
    LANES32,
    f32v,
    fetch_add,
    fma,
    fold64,
    hsum,
    lane_is,
    loader,
    peek_f64,
    peek_i64,
    poke_f64,
    poke_i64,
    splat32,
    splat64,
    store,
    store_tail,
    tail_loader,
    vmax,
    where,
)

STATE = 4


def build(operation, dtype):
    """Statistics; or only their m and k (``top``); or x - logsumexp(x), written in float32."""
    writes = operation == "log_softmax"
    only_top = operation == "top"
    load, load_tail = loader(dtype, f32v), tail_loader(dtype, f32v)
    get, look_ahead = entry(dtype), ahead(dtype)
    tile_max, find = passes(dtype)
    size = ITEMSIZE[dtype]

    @inline
    def under(state, m):
        """The sums of a state, its top among them, relative to a larger maximum m."""
        own, S, U, k = state
        if own == -math.inf:
            return S, U
        f = math.exp(own - m)
        return f * (S + 1.0), f * (U + (m - own) * (S + 1.0))

    @inline
    def merge(a, b):
        """The state of two parts, a before b."""
        if b[0] > a[0]:
            a, b = b, a
        s, u = under(b, a[0])
        return a[0], a[1] + s, a[2] + u, a[3]

    @inline
    def step(p, a, ref, S, U):
        z = fma(p, a, ref)
        e = exp2_32(z)
        return S + e, fma(e, vmax(-200.0, z), U)

    @inline
    def sums(x, start, stop, hole, a, ref):
        zero = splat32(0.0)
        S = splat64(0.0)
        U = S
        full = start + (stop - start) // LANES32 * LANES32
        j = start
        while j < stop:
            last = full
            if j <= hole < full:
                last = start + (hole - start) // LANES32 * LANES32
            last = min(last, j + BLOCK)
            s = zero
            u = zero
            while j < last:
                look_ahead(x, j)
                s, u = step(load(x + j * size), a, ref, s, u)
                j += LANES32
            if j == full or j <= hole < j + LANES32:
                p = load_tail(x + j * size, stop - j)
                s, u = step(where(lane_is(p, hole - j), -math.inf, p), a, ref, s, u)
                j += LANES32
            S = S + fold64(s)
            U = U + fold64(u)
        return hsum(S), hsum(U)

    @inline
    def not_a_number(x, start, stop):
        """NaN if there is one among the entries, else 0."""
        total = splat32(0.0)
        full = start + (stop - start) // LANES32 * LANES32
        for j in range(start, full, LANES32):
            look_ahead(x, j)
            p = load(x + j * size)
            total = total + where(p == p, 0.0, p)
        if full < stop:
            p = load_tail(x + full * size, stop - full)
            total = total + where(p == p, 0.0, p)
        return f64(hsum(total))

    @inline
    def part(x, start, stop, a):
        """The state of the entries [start, stop); S is NaN where an entry is NaN or +inf."""
        state = (-math.inf, 0.0, 0.0, -1.0)
        largest = -math.inf
        ref = f32(0.0)
        shift = 0.0
        factor = 1.0
        j = start
        while j < stop:
            tile_stop = min(j + TILE, stop)
            hole = -1
            tile_top = f64(tile_max(x, j, tile_stop))
            if tile_top > largest:
                largest = tile_top
                hole = find(x, j, tile_stop, f32(largest))
                m = largest * a * LN_2
                S, U = under(state, m)
                state = (m, S, U, f64(hole))
                # exp(x - m) is computed as 2**(a x + ref) with a rounded ref.
                ref = f32(-largest * a)
                shift = largest * a + ref
                factor = exp2_near_0(-shift)
            if only_top:
                s, u = not_a_number(x, j, tile_stop), 0.0
            else:
                s, u = sums(x, j, tile_stop, hole, f32(a), ref)
            u = LN_2 * (shift * s - u)
            m, S, U, k = state
            state = (m, S + s, U, k) if only_top else (m, S + s * factor, U + u * factor, k)
            j = tile_stop
        return state

    @inline
    def write(x, out, start, stop, it, top, log_s):
        """out = (x - top) it - log_s; the top itself gets -log_s exactly."""
        j = start
        while j + LANES32 <= stop:
            store(out + 4 * j, fma(load(x + j * size) - top, it, -log_s))
            j += LANES32
        if j < stop:
            value = fma(load_tail(x + j * size, stop - j) - top, it, -log_s)
            store_tail(out + 4 * j, value, stop - j)

    def kernel(
        p, p_stride, p_offsets, width, rows, n_rows,
        counter, chunk, parts, part_width, states, done, redo, tokens, out,
        written, written_stride, written_offsets, inverse_temperature,
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
                start = (task - number * parts) * part_width
                state = part(x, start, min(start + part_width, width), a)
                if parts > 1:
                    at = states + task * (8 * STATE)
                    for i in range(STATE):
                        poke_f64(at + 8 * i, state[i])
                    if fetch_add(done + 8 * number, 1) + 1 < parts:
                        continue
                    at = states + number * parts * (8 * STATE)
                    state = load_state(at)
                    for i in range(1, parts):
                        state = merge(state, load_state(at + i * (8 * STATE)))
                m, S, U, k = state
                if not (S < math.inf and (k >= 0.0)) or (only_top and m == math.inf):
                    m = math.nan
                # Underflow, or logits so large that their scaled values overflow (or NaN).
                if not only_top and not S >= UNDERFLOW and (k >= 0.0 or S != S):
                    poke_i64(redo + 8 * (fetch_add(redo, 1) + 1), row)
                if writes:
                    # NaN rows: everything follows from a NaN top.
                    top = get(x, int(k)) if m == m else math.nan
                    write(
                        x, row_address(written, written_stride, written_offsets, row), 0, width,
                        f32(inverse_temperature), f32(top), f32(math.log1p(S)),
                    )  # fmt: skip
                    continue
                at = out + row * (8 * STATISTICS)
                # Not m, whose factor a is rounded: a result of 1e5 would be off by 1e-3.
                top = get(x, int(k)) if m == m else math.nan
                poke_f64(at, top * inverse_temperature)
                poke_f64(at + 8, S)
                poke_f64(at + 16, U)
                poke_f64(at + 24, k)
                if tokens != 0:
                    token = get(x, peek_i64(tokens + 8 * row))
                    poke_f64(at + 32, (token - top) * inverse_temperature)

    @inline
    def load_state(at):
        return peek_f64(at), peek_f64(at + 8), peek_f64(at + 16), peek_f64(at + 24)

    return kernel

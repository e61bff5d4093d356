"""How many of the k largest entries two rows have in common."""

from __future__ import annotations

import math

from .exact import TILE, buffer_x, stage
from .mathematics import outline
from .rowloop import row_address, task_row
from .simd import (
    LANES64,
    f64v,
    fetch_add,
    hany,
    loader,
    peek_f64,
    peek_i64,
    poke_f64,
    poke_i64,
)

_get = loader("float64", f64v)


@outline
def largest(values, indices, k, buffer, row, step, dtype, probabilities, width):
    """Fill ``values`` (descending) and ``indices`` with the k largest entries of a row.

    Of equal entries the first counts.  Returns False where an entry is NaN or +inf, or all
    are -inf.
    """
    for i in range(k):
        poke_f64(values + 8 * i, -math.inf)
        poke_i64(indices + 8 * i, -1)
    found = 0
    for start in range(0, width, TILE):
        n = min(TILE, width - start)
        stage(buffer, row + start * step, step, dtype, probabilities, n)
        for j in range(0, n, LANES64):
            # Nearly always no lane of a vector gets into the list.
            w = _get(buffer + 8 * j)
            smallest = peek_f64(values + 8 * (k - 1))
            if found == k and not hany(~((w < smallest) | (w == smallest))):
                continue
            for i in range(j, min(j + LANES64, n)):
                x = peek_f64(buffer + 8 * i)
                if not x < math.inf:
                    return False
                if found == k and x <= peek_f64(values + 8 * (k - 1)):
                    continue
                at = min(found, k - 1)
                while at > 0 and peek_f64(values + 8 * (at - 1)) < x:
                    poke_f64(values + 8 * at, peek_f64(values + 8 * (at - 1)))
                    poke_i64(indices + 8 * at, peek_i64(indices + 8 * (at - 1)))
                    at -= 1
                poke_f64(values + 8 * at, x)
                poke_i64(indices + 8 * at, start + i)
                found = min(found + 1, k)
    return peek_f64(values) > -math.inf


def build(operation):
    def kernel(
        p, p_stride, p_offsets, p_step, p_dtype, q, q_stride, q_offsets, q_step, q_dtype,
        width, rows, n_rows, counter, lists, probabilities, out, k,
    ):  # fmt: skip
        buffer = buffer_x()
        while True:
            number = fetch_add(counter, 1)
            if number >= n_rows:
                return
            row = task_row(rows, number)
            area = lists + number * k * 32
            values = area + 16 * k
            left = area
            right = area + 8 * k
            x = row_address(p, p_stride, p_offsets, row)
            y = row_address(q, q_stride, q_offsets, row)
            good = largest(values, left, k, buffer, x, p_step, p_dtype, probabilities, width)
            if good:
                good = largest(values, right, k, buffer, y, q_step, q_dtype, probabilities, width)
            common = 0
            if good:
                for i in range(k):
                    for j in range(k):
                        if peek_i64(left + 8 * i) == peek_i64(right + 8 * j):
                            common += 1
            poke_f64(out + 8 * row, common / k if good else math.nan)

    return kernel

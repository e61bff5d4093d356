"""Calls of the kernels outside the operation table: Gaussians, counts, samples, many against many.

And of that for gradients of token log-probabilities.

What comes in are rows of one dtype that lie in memory as the kernels read them; what goes out are
float64 values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klfast._arrays import Rows

from .native import kernel
from .runs import Values, address, cut, launch, placed, written_at_a_time
from .threads import get_num_threads

__all__ = [
    "add_pairs",
    "add_products",
    "count_sums",
    "fill_table",
    "gaussian_kl",
    "moments",
    "token_gradients",
]

#: Values that the kernel ``counts`` gives for a row.
COUNT_COLUMNS = 8
#: Float32 entries of Gaussians that take as long as one of logits: waking a thread for the values
#: of 2**18 of them takes half as long again as doing without; at 2**20 it is about even.
GAUSSIAN_ENTRIES = 4
#: Samples of which the kernel ``moments`` takes mean and variance at a time.
SAMPLES = 1 << 15

#: Tables of shape (panels of rows, entries, 16).
Panels = NDArray[np.float32]

_kernel = functools.cache(kernel)


def token_gradients(
    x: Rows,
    into: NDArray[Any],
    tokens: NDArray[np.int64],
    values: Values,
    log_sums: Values,
    scales: Values,
) -> None:
    """Write gradients of token log-probabilities, times ``scales``, into a contiguous array.

    ``values`` and ``log_sums`` are the log-probabilities and log sum exp(x/T), one a row. ``into``
    has the dtype of the rows, bfloat16 as its bits. Rows with a scale of 0 are not read.
    """
    space = np.zeros(1, np.int64)
    n, width = x.count, x.width
    row_bytes = width * into.itemsize
    function = _kernel("token_gradients", (x.dtype,), "q" * 13 + "d")
    arguments = (
        *placed(x), address(into), row_bytes, width, n, address(space),
        written_at_a_time(n, row_bytes, get_num_threads()), address(tokens), address(values),
        address(log_sums), address(scales), 1.0 / x.temperature,
    )  # fmt: skip
    launch(function, arguments, 2 * n * width, alone=False)


def gaussian_kl(
    rows: Sequence[Rows], scales: Values | None, into: Sequence[NDArray[Any]]
) -> tuple[NDArray[Any], bool]:
    """KL divergence of each row; of mean and log-variance of P, and of Q unless that is standard.

    In float64 if the rows are, or few and wide, else in float32. And whether all of them are finite
    and not so small that float32 terms may be missing.

    ``into`` are contiguous arrays of the dtype of the rows for the gradients with respect to
    each, times ``scales``, one a row; empty for values alone.
    """
    first = rows[0]
    n, width = first.count, first.width
    chunk, parts, part_width = cut(n, width)
    # More rows at a time where there are many: nobody has asked ahead for the first of them.
    chunk = max(chunk, min(4 * chunk, n // (16 * get_num_threads())))
    out = np.empty((n, parts), "float32" if first.dtype != "float64" and parts == 1 else "float64")
    space = np.zeros(2, np.int64)  # the counter, and whether a value is doubtful
    counter = address(space)
    function = _kernel("gaussian", (first.dtype, len(rows) == 2, bool(into)), "q" * 21)
    places: list[int] = []
    for each in rows:
        places += each.address, each.row_stride
    targets = [address(each) for each in into] + [0] * (4 - len(into))
    light = not into and first.dtype != "float64"
    launch(
        function,
        (
            *places, *[0] * (8 - len(places)), width, n, counter, chunk, parts, part_width,
            address(out), counter + 8, address(scales), *targets,
        ),
        n * width * len(rows) // (GAUSSIAN_ENTRIES if light else 1),
        alone=False,
    )  # fmt: skip
    return out.sum(1) if parts > 1 else out[:, 0], not space[1]


def add_pairs(
    operation: str, x: Panels, y: Panels, shape: tuple[int, int], depth: int, out: Values
) -> None:
    """Add the sums over ``depth`` entries to the values of all pairs of rows of two tables.

    ``shape`` are their numbers of rows; ``out`` has whole panels of them.  Where both are the same
    table, the pairs below the diagonal are undefined, but for the operation "product".
    """
    counter = np.zeros(1, np.int64)
    n, m = shape
    function = _kernel("pairwise", (operation,), "q" * 10)
    arguments = (
        address(x), n, address(y), m, x.shape[1], depth, address(counter), address(out),
        out.shape[1], int(x is y and operation != "product"),
    )  # fmt: skip
    launch(function, arguments, n * m * depth, alone=False)


def fill_table(
    rows: Rows,
    part: slice,
    shifts: Values,
    table: Panels,
    kind: str,
    sums: Values,
    *,
    factor: float = 1.0,
    nothing: float = 0.0,
) -> bool:
    """Write a table of a part of the vocabulary, and add what is summed to ``sums``.

    ``kind``: "probs", "powers" or "logs", of the power or times the factor ``factor``.  ``shifts``
    are c and rest of each row; ``sums`` those of exp(u), and of exp(u) u, the second with "probs"
    alone.  Both are for whole panels of rows.  Returns whether an entry is -inf.
    """
    places = (address(table), table.shape[1])
    alone = len(table) == 1
    return _make_table(
        "tables", rows, part, shifts, kind, sums, places, factor, nothing, 4 * table.size, alone
    )


def add_products(
    few: Panels,
    count: int,
    rows: Rows,
    part: slice,
    shifts: Values,
    kind: str,
    sums: Values,
    out: Values,
    *,
    factor: float = 1.0,
) -> bool:
    """Add the products of a table of ``count`` rows with that of others, which is not kept.

    The others and their table are those of `fill_table`, as is what is returned; ``out`` has the
    shape (count, rows.count) in whole panels.
    """
    places = (address(few), few.shape[1], count, address(out), out.shape[1])
    entries = (4 + count) * rows.count * (part.stop - part.start)
    return _make_table(
        "few_rows", rows, part, shifts, kind, sums, places, factor, 0.0, entries, False
    )


def _make_table(
    module: str,
    rows: Rows,
    part: slice,
    shifts: Values,
    kind: str,
    sums: Values,
    places: tuple[int, ...],
    factor: float,
    nothing: float,
    entries: int,
    alone: bool,
) -> bool:
    """Run a kernel that makes the table of `fill_table`; ``places``: what it does with it."""
    counter, zeros = np.zeros(1, np.int64), np.zeros(1)
    references, rests = shifts.astype(np.float32)
    masses, own = sums
    function = _kernel(module, (rows.dtype, kind), "q" * (11 + len(places)) + "d" * 3)
    arguments = (
        rows.address, rows.row_stride, rows.count, part.start, part.stop, address(counter),
        address(references), address(rests), *places, address(masses), address(own),
        address(zeros), 1.0 / rows.temperature, factor, nothing,
    )  # fmt: skip
    launch(function, arguments, entries, alone)
    return bool(zeros[0])


def count_sums(
    p: NDArray[Any], q: NDArray[Any], smoothing: float, drop: bool, wants_spread: bool
) -> Values:
    """KL divergence of rows of counts and what goes with it: the columns of the kernel ``counts``.

    ``p`` and ``q`` are tables of the same shape and dtype: int32, int64 or a floating-point dtype.
    The sum of p (1-q)/q is 0 unless ``wants_spread``.
    """
    n, width = p.shape
    out = np.empty((n, COUNT_COLUMNS))
    counter = np.zeros(1, np.int64)
    function = _kernel("counts", (p.dtype.name,), "q" * 11 + "d")
    chunk = cut(n, width)[0]
    arguments = (
        p.ctypes.data, p.strides[0], q.ctypes.data, q.strides[0], width, n, address(counter),
        chunk, int(drop), int(wants_spread), address(out), smoothing,
    )  # fmt: skip
    launch(function, arguments, 2 * p.size, alone=False)
    return out


def moments(log_p: Rows, log_q: Rows, estimator: str) -> tuple[Values, Values]:
    """Mean of an estimator over each row of log-probabilities, and the sum of squares about it.

    Both are of the same dtype.
    """
    n, width = log_p.count, log_p.width
    parts = -(-width // SAMPLES)
    out = np.empty((n, parts, 2))
    counter = np.zeros(1, np.int64)
    function = _kernel("moments", (log_p.dtype, estimator), "q" * 10)
    arguments = (
        log_p.address, log_p.row_stride, log_q.address, log_q.row_stride, width, n,
        address(counter), parts, SAMPLES, address(out),
    )  # fmt: skip
    launch(function, arguments, 2 * n * width, alone=False)
    sizes = np.minimum(SAMPLES, width - SAMPLES * np.arange(parts))
    with np.errstate(invalid="ignore"):
        mean = (out[..., 0] * sizes).sum(1) / width
        squares = out[..., 1].sum(1) + (sizes * (out[..., 0] - mean[:, None]) ** 2).sum(1)
    return mean, squares

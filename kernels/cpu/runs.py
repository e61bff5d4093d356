"""One run of one kernel on a batch, shared out to threads, and of ``exact`` on the rows it leaves.

A float32 kernel names the rows that it could not finish to full accuracy; the same kernel with
more careful steps, or ``exact``, does those.  Rows are shared out to threads; batches of few long
rows are cut along the vocabulary and merged.  How they are cut depends on the shape alone, so a
result never depends on the number of threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klfast._arrays import FLOATS, Rows, address_of

from ..plans import COLUMNS, Step, exact_operation
from . import threads
from .native import kernel
from .polynomials import skew_js
from .threads import get_num_threads

__all__ = [
    "AT_A_TIME",
    "FEW_ROWS",
    "LOG2_E",
    "PART",
    "WORTH_A_THREAD",
    "Numbers",
    "Values",
    "address",
    "compiled",
    "cut",
    "in_one_read",
    "is_fast",
    "launch",
    "placed",
    "run_exact",
    "run_step",
    "space_of",
    "strided",
    "unfinished",
    "written_at_a_time",
]

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]
#: A batch of fewer rows than this is cut into parts of PART entries.
FEW_ROWS = 64
#: Entries (of both rows) that are worth waking a thread for, and that a thread takes at a time.
WORTH_A_THREAD = 1 << 17
AT_A_TIME = 1 << 16
#: Bytes that a thread writes at a time: several of the 2 MB pages of large new arrays.
#: Where two threads touch one first, both fill it with zeros.
WRITTEN_AT_A_TIME = 8 << 20
PART = 32768
LOG2_E = math.log2(math.e)
_FARTHEST = 8192.0
_DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
#: The parameters of each kernel, as native.kernel wants them.
_SIGNATURE = {
    "one_pass": "q" * 19 + "d" * 3,
    "two_phase": "q" * 21 + "dd",
    "affinity": "q" * 17 + "d",
    "single_pass": "q" * 18 + "d",
    "exact": "q" * 19 + "d" * 3,
    "fused_gradients": "q" * 23 + "d" * 3,
    "exact_gradients": "q" * 28 + "d" * 5,
    "top_k": "q" * 18,
    "floors": "q" * 12,
    "widen": "q" * 8,
    "read": "q" * 5,
}


def address(array: NDArray[Any] | None) -> int:
    return 0 if array is None else address_of(array)


def placed(rows: Rows) -> tuple[int, int, int]:
    """How kernels find a row: address, bytes between rows, address of the offsets."""
    return rows.address, rows.row_stride, address(rows.offsets)


def strided(rows: Rows | None) -> tuple[int, int, int, int, int]:
    """How the float64 kernels find entries; zeros where there are none."""
    if rows is None:
        return 0, 0, 0, 0, 0
    return *placed(rows), rows.stride, _DTYPE_CODE[rows.dtype]


def is_fast(p: Rows, q: Rows | None = None) -> bool:
    """Whether the float32 kernels can read these rows."""
    size = FLOATS[p.dtype]
    if size == 8 or p.stride != size or p.input == "probs" or p.temperature < 1e-30:
        return False
    return q is None or (is_fast(q) and q.temperature == p.temperature)


def in_one_read(step: Step) -> bool:
    """Whether ``affinity`` does this step of ``two_phase``, where nobody asks for constants."""
    return step.module == "two_phase" and step.operation == "hellinger2"


def cut(n: int, width: int) -> tuple[int, int, int]:
    """(rows a thread takes at a time, parts of a row, entries of a part), from the shape alone."""
    if n < FEW_ROWS and width > PART:
        return 1, -(-width // PART), PART
    return max(4, AT_A_TIME // width), 1, width


def written_at_a_time(n: int, row_bytes: int, workers: int) -> int:
    """Rows that a thread takes at a time where each is as many bytes to write."""
    return max(1, min(WRITTEN_AT_A_TIME // row_bytes, n // (4 * workers)))


def launch(
    function: Callable[..., None], arguments: tuple[Any, ...], entries: int, alone: bool
) -> None:
    """Run a kernel in this thread, and in others where there is enough to do."""
    if alone or entries < 2 * WORTH_A_THREAD:
        function(*arguments)
    else:
        workers = min(get_num_threads(), entries // WORTH_A_THREAD)
        threads.run(functools.partial(function, *arguments), workers)


def run_step(
    step: Step,
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    out: NDArray[Any] | Rows,
    tokens: Numbers | None,
    alone: bool = False,
    exactly: bool = False,
    known: Values | None = None,
    normalizers: Values | None = None,
) -> None:
    """Run one kernel, and on the rows that it did not finish more careful ones.

    First the same ``exactly``, where that is another one, then ``exact``.  ``out`` is an array of
    values, or for log_softmax the rows to write.  ``alone`` keeps the work in this thread, and
    rows uncut.  Into ``known`` go the constants of each row, NaN where only ``exact`` has them, and
    where it has five columns the first indices of the largest entries.
    ``normalizers`` are those of whole rows, of which these are shards.
    """
    if step.rows[0] == "q":
        assert q is not None
        p, q = q, p
    if len(step.rows) == 1:
        q = None
    written = None if isinstance(out, np.ndarray) else out
    if (
        step.module in ("exact", "top_k")
        or not is_fast(p, q)
        or (written is not None and (written.dtype != "float32" or written.stride != 4))
    ):
        run_exact(step, p, q, rows, out, tokens, alone, normalizers)
        return
    again = unfinished(step, p, q, rows, out, tokens, alone, exactly, known, normalizers)
    if len(again):
        if q is None or exactly:
            if known is not None:
                known[again] = np.nan
            run_exact(step, p, q, again, out, tokens, alone, normalizers)
        else:
            pair = step._replace(rows="pq")
            run_step(pair, p, q, again, out, tokens, alone, True, known, normalizers)


def unfinished(
    step: Step,
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    out: NDArray[Any] | Rows,
    tokens: Numbers | None,
    alone: bool,
    exactly: bool = False,
    known: Values | None = None,
    normalizers: Values | None = None,
) -> Numbers:
    """Run one float32 kernel as `run_step` does; returns the rows that it did not finish."""
    written = None if isinstance(out, np.ndarray) else out
    n = p.count if rows is None else len(rows)
    chunk, parts, part_width = (n, 1, p.width) if alone else cut(n, p.width)
    if written is not None:  # a row is written when all of it has been read
        parts, part_width = 1, p.width
    # Work space: the task counter, the rows left to ``exact`` (their number first), and where
    # rows are cut, a count of the finished parts of each row and the states of all parts.
    space = np.zeros(n + 2 if parts == 1 else 2 * n + 2 + 8 * n * parts, np.int64)
    counter = address(space)
    redo = counter + 8
    done = redo + 8 * (n + 1)
    states = done + 8 * n
    share = (p.width, address(rows), n, counter, chunk, parts, part_width)
    inverse = 1.0 / p.temperature
    if q is None:
        function = compiled(step.module, step.operation, p.dtype)
        if written is None:
            assert isinstance(out, np.ndarray)
            results: tuple[Any, ...] = (address(out), 0, 0, 0)
        else:
            results = (0, *placed(written))
        runs = [(*placed(p), *share, states, done, redo, address(tokens), *results, inverse)]
    else:
        once = in_one_read(step) and not exactly and known is None and normalizers is None
        if once:
            function = compiled("affinity", p.dtype, q.dtype)
        else:
            function = compiled(step.module, step.operation, p.dtype, q.dtype, exactly)
        assert isinstance(out, np.ndarray)
        lead = (*placed(p), *placed(q), *share)
        results = (states, done, redo, address(out))
        if once:
            runs = [(*lead, *results, inverse)]
        elif step.module == "one_pass":
            # A power of the sums takes the order's multiple of an error.
            reach = REACH_EXACTLY if exactly else REACH / max(1.0, step.parameter)
            if step.parameter > 2.0:
                reach = min(reach, step.limit)
            columns = 0 if known is None else known.shape[1]
            known_at = (address(known), columns)
            runs = [(*lead, *results, *known_at, inverse, step.parameter, reach)]
        else:
            constants = None if normalizers is None else _constants(normalizers, p.temperature)
            phases = (0,) if parts == 1 or constants is not None else (1, 2)
            skew = "skew_js" in step.operation
            polynomial = address(skew_js(step.parameter)) if skew else 0
            tail = (address(constants), address(known), polynomial, inverse, step.parameter)
            runs = [(*lead, phase, *results, *tail) for phase in phases]
    for arguments in runs:
        space[0] = 0
        launch(function, arguments, n * p.width * len(step.rows), alone)
    left = int(space[1])
    return np.sort(space[2 : 2 + left]) if left else _NONE


#: No row numbers.
_NONE = np.empty(0, np.int64)
#: Log-ratios up to which one_pass gives a result, and where it takes along what exponents
#: t log2(e) are rounded by.  That is half a unit in their last place: up to 11 an error of 3.3e-7
#: where all of Q's mass is at such an index, and as much from P's exponent; twice that up to 22.
REACH, REACH_EXACTLY = 11.0, 60.0


def _constants(normalizers: Values, temperature: float) -> Values:
    """Those of log2 p = a x + kx, log2 q = a y + ky and log2(q/p) = a (y - x) + c."""
    mx, log_x, my, log_y, ratio = normalizers.T
    with np.errstate(all="ignore"):
        a = np.float64(np.float32(LOG2_E / temperature))
        columns = (-a * mx - LOG2_E * log_x, -a * my - LOG2_E * log_y)
        constants = np.stack([*columns, a * (mx - my) + LOG2_E * ratio], axis=-1)
    # Larger ones leave too few bits of float32 to the exponents: such rows need float64.
    constants[~(np.abs(constants) < _FARTHEST).all(axis=-1)] = np.nan
    return constants


def run_exact(
    step: Step,
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    out: NDArray[Any] | Rows,
    tokens: Numbers | None,
    alone: bool = False,
    normalizers: Values | None = None,
) -> None:
    """Run a step in float64, whatever the input; or the top_k kernel, which reads alike."""
    if step.operation == "kl_both":
        assert q is not None
        assert isinstance(out, np.ndarray)
        for column, pair in enumerate(((p, q), (q, p))):
            values = np.empty(p.count)
            run_exact(Step("exact", "kl", "pq"), *pair, rows, values, None, alone)
            keep = slice(None) if rows is None else rows
            out[keep, column] = values[keep]
        return
    module = "top_k" if step.module == "top_k" else "exact"
    function = compiled(module, exact_operation(step))
    if isinstance(out, np.ndarray):
        other, result = (p if q is None else q), address(out)
    else:  # log_softmax writes where a pair has its second row
        other, result = out, 0
    n = p.count if rows is None else len(rows)
    space = np.zeros(1, np.int64)
    common = (
        *placed(p), p.stride, _DTYPE_CODE[p.dtype],
        *placed(other), other.stride, _DTYPE_CODE[other.dtype],
        p.width, address(rows), n, address(space),
    )  # fmt: skip
    probabilities = int(p.input == "probs")
    if module == "top_k":
        lists = np.empty(4 * int(step.parameter) * n, np.int64)
        arguments: tuple[Any, ...] = (
            *common, address(lists), probabilities, result, int(step.parameter),
        )  # fmt: skip
    else:
        inverses = (1.0 / p.temperature, 1.0 / other.temperature)
        pointers = (address(tokens), result, address(normalizers))
        tail = (1, probabilities, *pointers, *inverses, step.parameter)
        arguments = (*common, *tail)
    launch(function, arguments, n * p.width * 4, alone)


@functools.cache
def compiled(module: str, *arguments: str | bool) -> Callable[..., None]:
    return kernel(module, arguments, _SIGNATURE[module])


def space_of(step: Step, count: int) -> Values:
    columns = COLUMNS.get(step.operation)
    return np.empty((count, columns) if columns else count)

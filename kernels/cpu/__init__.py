"""The CPU backend: Numba kernels on explicit vectors, run by a few threads.

A call is planned as one or more kernel runs (a *step*), which write one value a row - or
``STATISTICS`` values - and a function that makes the result of them:

======================  ====================================================================
``one_pass``            KL, Rényi and what follows from it, cross-entropy: float32, one read
``two_phase``           JS with weight 1/2, total variation, Hellinger, Jeffreys: float32;
                        for ``compare`` several of them, both KL and the largest entries together
``single_pass``         entropy, log-sum-exp, token log-probabilities, argmax: float32
``exact``               all of them, and the rest, in float64, for any input
``top_k``               overlap of the largest entries
======================  ====================================================================

A float32 kernel names the rows that it could not finish to full accuracy; ``exact`` does
those.  Rows are shared out to threads; batches of few long rows are cut along the vocabulary
and merged.  How they are cut depends on the shape alone, so a result never depends on the
number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from klfast._arrays import FLOATS, Rows, address_of

from ..plans import (
    COLUMNS,
    ENTRIES,
    EXAMPLE,
    LOG_RATIO,
    LOG_SOFTMAX,
    NORMALIZERS,
    STATISTICS,
    Finish,
    Plan,
    Step,
    exact_operation,
    plan_of,
    plans_of,
    statistics_of,
)
from . import native, threads
from .native import kernel
from .threads import get_num_threads, set_num_threads

__all__ = [
    "available",
    "compare",
    "explain",
    "get_num_threads",
    "gradient",
    "info",
    "log_softmax",
    "partial_sums",
    "read_bytes",
    "run",
    "set_num_threads",
    "shard",
    "warmup",
]

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]

#: A batch of fewer rows than this is cut into parts of PART entries.
FEW_ROWS = 64
PART = 32768
#: Entries (of both rows) that are worth waking a thread for, and that a thread takes at a time.
WORTH_A_THREAD = 1 << 17
AT_A_TIME = 1 << 16
#: Bytes of both rows that ``compare`` keeps in cache while every metric reads them.
CACHE_BLOCK = 1 << 21

#: Divergences from which the normalizers of a part are compared as they are.
FAR = 0.02

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_FARTHEST = 8192.0
_DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
#: The parameters of each kernel, as native.kernel wants them.
_SIGNATURE = {
    "one_pass": "q" * 19 + "d" * 3,
    "two_phase": "q" * 20 + "d",
    "single_pass": "q" * 18 + "d",
    "exact": "q" * 19 + "d" * 3,
    "fused_gradients": "q" * 23 + "d" * 3,
    "exact_gradients": "q" * 28 + "d" * 5,
    "top_k": "q" * 18,
    "floors": "q" * 12,
    "widen": "q" * 8,
    "read": "q" * 5,
}


# --- formulas ----------------------------------------------------------------------------


def _power(values: Values, beta: float, factor: float, scale: float) -> Values:
    with np.errstate(over="ignore", invalid="ignore"):
        log_s = beta * factor * values
        # expm1(z)/z is 1 where z vanishes; far from 1 the sum S itself is used.
        ratio = np.where(log_s == 0.0, 1.0, np.expm1(log_s) / np.where(log_s == 0.0, 1.0, log_s))
        near = ratio * (factor * scale) * values
        far = np.expm1(log_s) / beta * scale  # scale/beta alone may underflow
        return np.where(np.abs(log_s) < 1.0, near, far)


def _entropy(s: Values) -> Values:
    return np.log1p(s[:, 1]) + s[:, 2] / (1.0 + s[:, 1]) + 0.0 * s[:, 0]


def _token_log_prob(s: Values) -> Values:
    return s[:, 4] - np.log1p(s[:, 1]) + 0.0 * s[:, 0]


def _same_top(p: Values, q: Values) -> Values:
    undefined = np.isnan(p[:, 0]) | np.isnan(q[:, 0])
    return np.where(undefined, np.nan, np.where(p[:, 3] == q[:, 3], 1.0, 0.0))


_FORMULAS: dict[Finish, Callable[..., Values]] = {
    Finish.SAME: lambda values: values,
    Finish.SCALED: lambda values, factor: factor * values,
    Finish.POWER: _power,
    Finish.INFINITE_POWER: lambda values: np.where(values > 0.0, math.inf, values),
    Finish.ZERO: lambda values: 0.0 * values,
    Finish.ENTROPY: _entropy,
    Finish.LOGSUMEXP: lambda s: s[:, 0] + np.log1p(s[:, 1]),
    Finish.TOP_P: lambda s: 1.0 / (1.0 + s[:, 1]) + 0.0 * s[:, 0],
    Finish.TOKEN: _token_log_prob,
    Finish.NLL: lambda s: 0.0 - _token_log_prob(s),
    Finish.SAME_TOP: _same_top,
    Finish.DELTA_PROB: lambda p, q: np.exp(_token_log_prob(q)) - np.exp(_token_log_prob(p)),
}


def _finish(plan: Plan, values: Sequence[Values]) -> Values:
    """The result of the values of the steps."""
    if plan.finish is Finish.SAME and values[0].ndim == 2:
        return values[0][:, plan.column]
    return _FORMULAS[plan.finish](*values, *plan.numbers)


# --- kernel runs -------------------------------------------------------------------------


def _address(array: NDArray[Any] | None) -> int:
    return 0 if array is None else address_of(array)


def _place(rows: Rows) -> tuple[int, int, int]:
    """How kernels find a row: address, bytes between rows, address of the offsets."""
    return rows.address, rows.row_stride, _address(rows.offsets)


class _Bytes:
    """Lends memory to NumPy, byte by byte."""

    def __init__(self, address: int, length: int) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (address, True), "typestr": "|u1", "shape": (length,),
        }  # fmt: skip


def _entries(batch: Rows, rows: Numbers, indices: Numbers) -> Values:
    """One entry of each of the rows, as it is given."""
    if not len(rows):
        return np.empty(0)
    size = FLOATS[batch.dtype]
    starts = rows * batch.row_stride if batch.offsets is None else batch.offsets[rows]
    at = starts + indices * batch.stride
    first = int(at.min())
    table = np.asarray(_Bytes(batch.address + first, int(at.max()) - first + size))
    found = table[(at - first)[:, None] + np.arange(size)]
    if batch.dtype == "bfloat16":
        wide = np.concatenate([np.zeros_like(found), found], axis=-1)
        return np.asarray(wide.view(np.float32)[:, 0], np.float64)
    return np.asarray(found.view(batch.dtype)[:, 0], np.float64)


def _is_fast(p: Rows, q: Rows | None = None) -> bool:
    """Whether the float32 kernels can read these rows."""
    size = FLOATS[p.dtype]
    if size == 8 or p.stride != size or p.input == "probs" or p.temperature < 1e-30:
        return False
    return q is None or (_is_fast(q) and q.temperature == p.temperature)


def _cut(n: int, width: int) -> tuple[int, int, int]:
    """(rows a thread takes at a time, parts of a row, entries of a part), from the shape alone."""
    if n < FEW_ROWS and width > PART:
        return 1, -(-width // PART), PART
    return max(4, AT_A_TIME // width), 1, width


def _launch(
    function: Callable[..., None], arguments: tuple[Any, ...], entries: int, alone: bool
) -> None:
    """Run a kernel in this thread, and in others where there is enough to do."""
    if alone or entries < 2 * WORTH_A_THREAD:
        function(*arguments)
    else:
        workers = min(get_num_threads(), entries // WORTH_A_THREAD)
        threads.run(functools.partial(function, *arguments), workers)


def _step(
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
        or not _is_fast(p, q)
        or (written is not None and (written.dtype != "float32" or written.stride != 4))
    ):
        _step_exact(step, p, q, rows, out, tokens, alone, normalizers)
        return
    again = _unfinished(step, p, q, rows, out, tokens, alone, exactly, known, normalizers)
    if len(again):
        if q is None or exactly:
            if known is not None:
                known[again] = np.nan
            _step_exact(step, p, q, again, out, tokens, alone, normalizers)
        else:
            pair = step._replace(rows="pq")
            _step(pair, p, q, again, out, tokens, alone, True, known, normalizers)


def _unfinished(
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
    """Run one float32 kernel as `_step` does; returns the rows that it did not finish."""
    written = None if isinstance(out, np.ndarray) else out
    n = p.count if rows is None else len(rows)
    chunk, parts, part_width = (n, 1, p.width) if alone else _cut(n, p.width)
    if written is not None:  # a row is written when all of it has been read
        parts, part_width = 1, p.width
    # Work space: the task counter, the rows left to ``exact`` (their number first), and where
    # rows are cut, a count of the finished parts of each row and the states of all parts.
    space = np.zeros(n + 2 if parts == 1 else 2 * n + 2 + 8 * n * parts, np.int64)
    counter = _address(space)
    redo = counter + 8
    done = redo + 8 * (n + 1)
    states = done + 8 * n
    share = (p.width, _address(rows), n, counter, chunk, parts, part_width)
    inverse = 1.0 / p.temperature
    if q is None:
        function = _kernel(step.module, step.operation, p.dtype)
        if written is None:
            assert isinstance(out, np.ndarray)
            results: tuple[Any, ...] = (_address(out), 0, 0, 0)
        else:
            results = (0, *_place(written))
        runs = [(*_place(p), *share, states, done, redo, _address(tokens), *results, inverse)]
    else:
        function = _kernel(step.module, step.operation, p.dtype, q.dtype, exactly)
        assert isinstance(out, np.ndarray)
        lead = (*_place(p), *_place(q), *share)
        results = (states, done, redo, _address(out))
        if step.module == "one_pass":
            # A power of the sums takes the order's multiple of an error.
            reach = REACH_EXACTLY if exactly else REACH / max(1.0, step.parameter)
            if step.parameter > 2.0:
                reach = min(reach, step.limit)
            columns = 0 if known is None else known.shape[1]
            known_at = (_address(known), columns)
            runs = [(*lead, *results, *known_at, inverse, step.parameter, reach)]
        else:
            constants = None if normalizers is None else _constants(normalizers, p.temperature)
            phases = (0,) if parts == 1 or constants is not None else (1, 2)
            tail = (_address(constants), _address(known), inverse)
            runs = [(*lead, phase, *results, *tail) for phase in phases]
    for arguments in runs:
        space[0] = 0
        _launch(function, arguments, n * p.width * len(step.rows), alone)
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
        a = np.float64(np.float32(_LOG2_E / temperature))
        columns = (-a * mx - _LOG2_E * log_x, -a * my - _LOG2_E * log_y)
        constants = np.stack([*columns, a * (mx - my) + _LOG2_E * ratio], axis=-1)
    # Larger ones leave too few bits of float32 to the exponents: such rows need float64.
    constants[~(np.abs(constants) < _FARTHEST).all(axis=-1)] = np.nan
    return constants


def _step_exact(
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
            _step_exact(Step("exact", "kl", "pq"), *pair, rows, values, None, alone)
            keep = slice(None) if rows is None else rows
            out[keep, column] = values[keep]
        return
    module = "top_k" if step.module == "top_k" else "exact"
    function = _kernel(module, exact_operation(step))
    if isinstance(out, np.ndarray):
        other, result = (p if q is None else q), _address(out)
    else:  # log_softmax writes where a pair has its second row
        other, result = out, 0
    n = p.count if rows is None else len(rows)
    space = np.zeros(1, np.int64)
    common = (
        *_place(p), p.stride, _DTYPE_CODE[p.dtype],
        *_place(other), other.stride, _DTYPE_CODE[other.dtype],
        p.width, _address(rows), n, _address(space),
    )  # fmt: skip
    probabilities = int(p.input == "probs")
    if module == "top_k":
        lists = np.empty(4 * int(step.parameter) * n, np.int64)
        arguments: tuple[Any, ...] = (
            *common, _address(lists), probabilities, result, int(step.parameter),
        )  # fmt: skip
    else:
        inverses = (1.0 / p.temperature, 1.0 / other.temperature)
        pointers = (_address(tokens), result, _address(normalizers))
        tail = (1, probabilities, *pointers, *inverses, step.parameter)
        arguments = (*common, *tail)
    _launch(function, arguments, n * p.width * 4, alone)


@functools.cache
def _kernel(module: str, *arguments: str | bool) -> Callable[..., None]:
    return kernel(module, arguments, _SIGNATURE[module])


def _empty(step: Step, count: int) -> Values:
    columns = COLUMNS.get(step.operation)
    return np.empty((count, columns) if columns else count)


# --- what dispatch calls -----------------------------------------------------------------


def run(
    name: str,
    p: Rows,
    q: Rows | None,
    parameters: tuple[float, ...],
    rows: Numbers | None,
    out: Values,
    tokens: Numbers | None = None,
) -> None:
    """Write one value a row, in float64 and nats, for the row numbers in ``rows`` (None: all)."""
    plan = plan_of(name, parameters)
    if plan.finish is Finish.SAME:
        _step(plan.steps[0], p, q, rows, out, tokens)
        return
    values = []
    for step in plan.steps:
        space = _empty(step, p.count)
        _step(step, p, q, rows, space, tokens)
        values.append(space if rows is None else space[rows])
    out[slice(None) if rows is None else rows] = _finish(plan, values)


def compare(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows,
    rows: Numbers | None,
    tokens: Numbers | None,
) -> list[Values]:
    """Values of many operations, from one read of main memory.

    Values of rows that are not in ``rows`` are undefined.
    """
    plans = plans_of(metrics)
    spaces = _steps((step for plan in plans for step in plan.steps), p, q, rows, tokens)
    return [_planned(plan, spaces, rows, p.count) for plan in plans]


def _steps(
    steps: Iterable[Step],
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    tokens: Numbers | None,
    known: tuple[Step, Values] | None = None,
    exactly: bool = False,
) -> dict[Step, Values]:
    """What each step gives.

    What ``two_phase`` can do together is one run of it. Each thread takes a few rows at a time and
    runs every other step on them while they are in its cache.  ``known`` gets the constants of the
    rows from the step that has them, which then runs on its own: of rows that are not cut, if it is
    to have them ``exactly``.
    """
    spaces = {step: _empty(step, p.count) for step in steps}
    into = dict.fromkeys(spaces) if known is None else dict.fromkeys(spaces) | dict([known])
    numbers = np.arange(p.count) if rows is None else rows
    row_bytes = p.width * (FLOATS[p.dtype] + (0 if q is None else FLOATS[q.dtype]))
    at_a_time = max(1, CACHE_BLOCK // row_bytes)

    def each(steps: Iterable[Step], block: Numbers, alone: bool) -> None:
        for step in steps:
            _step(step, p, q, block, spaces[step], tokens, alone, exactly, into[step])

    few = len(numbers) < FEW_ROWS and p.width > PART
    if not exactly and (few or len(spaces) == 1):
        # Too few to give every thread rows of its own: all threads work on each row.  Or nothing
        # is to be found in a cache.
        each(spaces, numbers, False)
        return spaces
    together = _together(spaces) if q is not None and known is None and _is_fast(p, q) else {}
    others = [step for step in spaces if step not in together]

    names = _joint_names(together)
    run = Step("two_phase", ",".join(names), "pq")
    table = np.empty((p.count, len(names) + 3 * ("top" in names)))

    def joint(block: Numbers, alone: bool) -> None:
        again = _unfinished(run, p, q, block, table, None, alone)
        for step, name in together.items():
            values = table[block, names.index(name) :]
            if name == "top":
                spaces[step][block, 0], spaces[step][block, 3] = values[
                    :, slice(0, 2) if step.rows == "p" else slice(2, 4)
                ].T
            elif step.operation == "kl_both":
                spaces[step][block] = values[:, :2]
            else:
                spaces[step][block] = values[:, 0]
        if len(again):
            each(together, again, alone)

    if together and not others:
        joint(numbers, False)
        return spaces
    starts = iter(range(0, len(numbers), at_a_time))

    def work() -> None:
        for start in starts:
            block = numbers[start : start + at_a_time]
            if together:
                joint(block, True)
            each(others, block, True)

    blocks = -(-len(numbers) // at_a_time)
    threads.run(work, min(get_num_threads(), blocks))
    return spaces


#: What one run of ``two_phase`` can give together, in the order of its columns; ``top`` is last
#: and has four.
_COLUMNS = ("tv", "hellinger2", "js", "kl", "reverse_kl", "jeffreys", "top")
#: The steps that have such values, and the first of them.
_TOGETHER = {
    **{plan_of(name, EXAMPLE.get(name, ())).steps[0]: name for name in _COLUMNS[:-1]},
    plans_of([("kl", ()), ("reverse_kl", ())])[0].steps[0]: "kl",
    **dict.fromkeys(plan_of("same_top", ()).steps, "top"),
}


def _together(steps: Iterable[Step]) -> dict[Step, str]:
    """The steps that are better done in one run of ``two_phase``, and where their values are."""
    found = {step: _TOGETHER[step] for step in steps if step in _TOGETHER}
    tops = [step for step, name in found.items() if name == "top"]
    if len(tops) == 1:
        del found[tops[0]]
    if len(found) < 2 or not any(step.module == "two_phase" for step in found):
        return {}
    return found


def _joint_names(together: dict[Step, str]) -> tuple[str, ...]:
    """The names of the values of such a run."""
    wanted = set(together.values())
    if any(step.operation == "kl_both" for step in together):
        wanted.add("reverse_kl")
    return tuple(name for name in _COLUMNS if name in wanted)


def _planned(plan: Plan, spaces: dict[Step, Values], rows: Numbers | None, count: int) -> Values:
    keep = slice(None) if rows is None else rows
    out = np.empty(count)
    out[keep] = _finish(plan, [spaces[step][keep] for step in plan.steps])
    return out


def shard(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    tokens: Numbers | None,
    symmetric: bool = False,
    alone: bool = True,
) -> tuple[list[Values], Values | None, list[Values]]:
    """What is known of each row by itself, as of a part of a wider one.

    Of each batch the largest entry m as it is given, L = log sum exp((x - m)/T) and the index of
    m, three columns: NaN where the row is no distribution, -inf, 0 and -1 where all of it is -inf.
    Of two batches Lx - Ly, as exactly as the rows are close; ``symmetric`` where exchanging them
    must change nothing but its sign, and what it is off may enter a result as it is, and not as its
    square.  And the values of the metrics.  L is relatively exact where a metric has it ``alone``
    or of its own; else as exact as a mass has to be.
    """
    plans = plans_of(metrics)
    if q is not None and not symmetric and _knowing(plans) is None:
        plans = plans_of([*metrics, ("kl", ())])
    batches = [p] if q is None else [p, q]
    single = [statistics_of(side) for side in "pq"[: len(batches)]]
    # Exponentials of large multiples of what is known of a part.
    powers = any(name == "log_power" and order[0] > 5.0 for name, order in metrics)
    if q is not None and (powers or not _is_fast(p, q)):
        # Of a pair one of which needs float64, the masses of both do.
        plans = [plan._replace(steps=tuple(map(_in_float64, plan.steps))) for plan in plans]
        single = [_in_float64(step) for step in single]
    keep = slice(None) if rows is None else rows
    numbers = np.arange(p.count) if rows is None else rows
    steps = [step for plan in plans for step in plan.steps]
    # A kernel of both batches has their masses, and finds their largest entries.
    knows = _knowing(plans)
    shared = not (knows is None or alone or powers)
    known = np.full((p.count, 5), np.nan)
    asked = [step for step in single if step in steps or not shared]
    into = None if knows is None else (knows, known)
    spaces = _steps([*asked, *steps], p, q, rows, tokens, into)
    sides = []
    for number, (batch, step) in enumerate(zip(batches, single, strict=True)):
        if step not in spaces:
            spaces[step] = _statistics(batch, known[:, number], known[:, 3 + number], rows)
            left = numbers[~np.isfinite(known[numbers]).all(axis=-1)]
            if len(left):
                _step(step, p, q, left, spaces[step], None)
        sides.append(_masses(batch, spaces[step], rows))
    values = [_planned(plan, spaces, rows, p.count) for plan in plans[: len(metrics)]]
    for (name, _), found in zip(metrics, values, strict=True):
        if name in ENTRIES:
            found[keep] = _picked(batches[ENTRIES[name]], found[keep], rows)
    if q is None:
        return sides, None, values
    if symmetric:
        known = np.full((p.count, 3), np.nan)
        _steps([NORMALIZERS], p, q, rows, None, (NORMALIZERS, known), exactly=True)
    # The kernels' exponents are in base 2, with a rounded 1/T.
    with np.errstate(all="ignore"):  # NaN where they are not known
        a = float(np.float32(_LOG2_E / p.temperature))
        ratio = known[:, 2] - a * (sides[0][:, 0] - sides[1][:, 0])
        ratio *= _LN_2 * (_LOG2_E / p.temperature / a)
        if knows is not None:
            # Far apart, the difference of two sums is as good.
            far = ~np.isfinite(ratio) & (spaces[knows].reshape(p.count, -1)[:, 0] >= FAR)
            ratio = np.where(far, sides[0][:, 1] - sides[1][:, 1], ratio)
    # The largest log(p/q) is as exact as this is.
    exactly = powers or any(name in ENTRIES for name, _ in metrics)
    left = numbers if exactly else numbers[~np.isfinite(ratio[numbers])]
    if len(left):
        _step(LOG_RATIO, p, q, left, ratio, None)
    return sides, ratio, values


def _knowing(plans: Sequence[Plan]) -> Step | None:
    """The first step that leaves the constants of each row."""
    steps = (step for plan in plans for step in plan.steps)
    return next((step for step in steps if (step.module, step.rows) == ("one_pass", "pq")), None)


def _in_float64(step: Step) -> Step:
    return step._replace(module="exact") if step.module == "single_pass" else step


def _picked(batch: Rows, indices: Values, rows: Numbers | None) -> Values:
    """One entry of each row as it is given, NaN where its index is."""
    found = np.full(len(indices), np.nan)
    there = np.isfinite(indices)
    numbers = (np.arange(batch.count) if rows is None else rows)[there]
    found[there] = _entries(batch, numbers, indices[there].astype(np.int64))
    return found


def _statistics(batch: Rows, constants: Values, indices: Values, rows: Numbers | None) -> Values:
    """What `_masses` takes, of the constants of log2 p = a x + constant and the largest entries."""
    found = np.full((batch.count, STATISTICS), np.nan)
    keep = slice(None) if rows is None else rows
    largest = _picked(batch, indices[keep], rows)
    a = float(np.float32(_LOG2_E / batch.temperature))
    log_sum = np.maximum(-_LN_2 * (constants[keep] + a * largest), 0.0)
    found[keep] = np.stack([largest, np.expm1(log_sum), largest, indices[keep], largest], axis=-1)
    return found


def _masses(batch: Rows, statistics: Values, rows: Numbers | None) -> Values:
    """Largest entry, log-sum and index, of the statistics of one batch."""
    columns = np.full((batch.count, 3), np.nan)
    keep = slice(None) if rows is None else rows
    m, S, _, k = statistics[keep, :4].T
    empty = np.isnan(m) & (S == 0.0) & (k < 0.0)
    index = np.where(np.isnan(m) & ~empty, np.nan, k)
    usable = ~np.isnan(m)
    largest = _picked(batch, np.where(usable, k, np.nan), rows)
    largest = np.where(empty, -np.inf, largest)
    log_sum = np.where(empty, 0.0, np.where(usable, np.log1p(S), np.nan))
    columns[keep] = np.stack([largest, log_sum, index], axis=-1)
    return columns


def partial_sums(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows,
    rows: Numbers | None,
    normalizers: Values,
) -> list[Values]:
    """The shares of these rows in the sums of total variation or Jensen-Shannon of whole rows.

    ``normalizers`` has of each whole row, whose shards these rows are, m and L of P, of Q, and
    Lx - Ly.
    """
    results = [np.full(p.count, np.nan) for _ in metrics]
    for metric, out in zip(metrics, results, strict=True):
        (step,) = plan_of(*metric).steps
        # The fast kernel knows nothing of other shards: what it subtracts must be exact.
        _step(step, p, q, rows, out, None, exactly=True, normalizers=normalizers)
    return results


def log_softmax(x: Rows, rows: Numbers | None, out: Rows) -> None:
    """Write x - logsumexp(x) of every entry, in the dtype of ``out``."""
    _step(LOG_SOFTMAX, x, None, rows, out, None)


class Tilt(NamedTuple):
    """How a gradient follows from those that the kernels know, of the rows as they are given.

    ``operation`` of its step, the factors of the gradients with respect to P and Q, and whether
    they have S as a further one; whether float32 carries it, for ordinary rows.
    """

    operation: str
    factors: tuple[float, float] = (1.0, 1.0)
    powers: bool = False
    fused: bool = True


def _tilt(name: str, parameters: tuple[float, ...]) -> Tilt:
    (parameter,) = parameters or (1.0,)
    operation = _gradient_plan(name, parameters).steps[0].operation
    if name == "js":
        w = parameter
        if operation != "js":  # there is nothing to mix
            return Tilt(operation, factors=(0.0, 0.0), fused=False)
        # Where one weight is next to nothing, float32 loses what it multiplies in far rows.
        return Tilt("js", factors=(w, 1.0 - w), fused=1e-3 <= w <= 1.0 - 1e-3)
    if operation not in ("renyi", "renyi_0", "renyi_inf"):
        return Tilt(operation)
    alpha = {"chi2": 2.0, "hellinger2": 0.5}.get(name, parameter)
    fused = 0.01 < alpha <= 16.0
    beta = alpha - 1.0
    if name == "renyi":
        # Derivatives of log(S)/beta are alpha/beta (r - p) and q - r.
        ratio = 1.0 if alpha == math.inf else alpha / beta
        return Tilt(operation, factors=(ratio, 1.0), fused=fused)
    if operation != "renyi":  # of order 0, or infinite
        return Tilt(operation, factors=(0.0, 0.0), fused=False)
    # S has S beta times those; S - 1 over the value.
    scale = {"alpha": alpha * beta, "tsallis": beta, "chi2": 1.0, "hellinger2": -1.0}[name]
    return Tilt(operation, factors=(alpha / scale, beta / scale), powers=True, fused=fused)


def gradient(
    name: str,
    p: Rows,
    q: Rows | None,
    parameters: tuple[float, ...],
    rows: Numbers | None,
    out: Values,
    scale: Values,
    into_p: Rows | None,
    into_q: Rows | None,
) -> None:
    """Write values, and gradients with respect to the logits times ``scale``, one a row.

    One kernel does ordinary rows; another in float64 those that it leaves, and any others.
    """
    other = p if q is None else q
    tilt = _tilt(name, parameters)
    plan = _gradient_plan(name, parameters)
    numbers = np.arange(p.count) if rows is None else rows
    if tilt.fused and _is_fused(plan.steps[0], p, other, into_p, into_q):
        numbers = _fused_gradient(tilt, plan, p, other, numbers, out, scale, into_p, into_q)
    if len(numbers):
        _exact_gradient(tilt, plan, p, other, numbers, out, scale, into_p, into_q)


def _is_fused(step: Step, p: Rows, q: Rows, *targets: Rows | None) -> bool:
    """Whether ``fused_gradients`` knows the operation, and reads and writes such rows."""
    known = step.module == "one_pass" or step.operation in ("js", "tv", "jeffreys")
    narrow = all(
        into.stride == FLOATS[into.dtype] and into.dtype != "float64"
        for into in targets
        if into is not None
    )
    return known and narrow and _is_fast(p, q)


def _gradient_plan(name: str, parameters: tuple[float, ...]) -> Plan:
    """How a value comes from what the kernels of gradients know of a row."""
    if name == "hellinger2":  # 1 - S, of order 1/2
        return Plan((Step("one_pass", "renyi", "pq", -0.5, 40.0),), Finish.POWER, (-0.5, 1.0, 0.5))
    if name == "entropy":  # cross-entropy with itself
        return plan_of("cross_entropy", ())
    return plan_of(name, parameters)


def _fused_gradient(
    tilt: Tilt,
    plan: Plan,
    p: Rows,
    q: Rows,
    rows: Numbers,
    out: Values,
    scale: Values,
    into_p: Rows | None,
    into_q: Rows | None,
) -> Numbers:
    """Do the ordinary rows; returns the others."""
    if not len(rows):
        return rows
    (step,) = plan.steps
    values = out if plan.finish is Finish.SAME else np.empty(p.count)
    scales = scale[:, None] * tilt.factors
    sides = [(p, into_p), (q, into_q)]
    # Symmetric ones take the same dtype first whatever the order.
    symmetric = step.module == "two_phase" or step.parameter == -0.5
    if step.rows == "qp" or (symmetric and p.dtype > q.dtype):
        sides.reverse()
        scales = scales[:, ::-1] * (-1.0 if tilt.operation == "renyi" else 1.0)
    scales = np.ascontiguousarray(scales)
    (first, into_first), (second, into_second) = sides
    letters = "p" * (into_first is not None) + "q" * (into_second is not None)
    some = into_first or into_second
    assert some is not None
    targets = (into_first or some, into_second or some)
    staged = any(
        into is not None and (into.dtype != "float32" or into.address == own.address)
        for own, into in sides
    )
    n, width = len(rows), p.width
    workers = min(get_num_threads(), n, max(1, 2 * n * width // WORTH_A_THREAD))
    # A row for each thread and side, of whole vectors.
    spare = np.empty((workers, len(letters), -(-width // 32) * 32), np.float32) if staged else None
    polynomial = _address(_mixture(step.parameter)) if step.operation == "js" else 0
    space = np.zeros(n + 3, np.int64)
    counter = _address(space)
    chunk = max(1, min(4, n // (4 * workers)))
    function = _kernel(
        "fused_gradients", tilt.operation, letters, first.dtype, second.dtype,
        *(target.dtype for target in targets),
    )  # fmt: skip
    arguments = (
        *_place(first), *_place(second), width, _address(rows), n, counter, chunk, counter + 16,
        _address(values), _address(scales), _address(spare), *_place(targets[0]),
        *_place(targets[1]), int(tilt.powers), polynomial, 1.0 / p.temperature,
        step.parameter, step.limit,
    )  # fmt: skip
    threads.run(functools.partial(function, *arguments), workers)
    left = np.sort(space[3 : 3 + space[2]])
    if plan.finish is not Finish.SAME:
        done = rows if not len(left) else np.setdiff1d(rows, left)
        out[done] = _finish(plan, [values[done]])
    return left


@functools.cache
def _mixture(weight: float) -> Values:
    """The polynomial of ``jensen_shannon`` in fused_gradients, from its values at Chebyshev nodes.

    With the singularities of log(w + v exp(tau)) at imaginary parts of pi, 12 coefficients are good
    for 2e-9.
    """
    other = 1.0 - weight

    chebyshev = np.polynomial.chebyshev
    nodes = chebyshev.chebpts1(12)
    tau = _LN_2 * 2.0 * nodes
    quotients = (np.log1p(other * np.expm1(tau)) - other * tau) / (2.0 * nodes) ** 2
    coefficients = chebyshev.cheb2poly(chebyshev.chebfit(nodes, quotients, 11))
    return np.asarray(coefficients * 0.5 ** np.arange(12), np.float64)


def _exact_gradient(
    tilt: Tilt,
    plan: Plan,
    p: Rows,
    q: Rows,
    rows: Numbers,
    out: Values,
    scale: Values,
    into_p: Rows | None,
    into_q: Rows | None,
) -> None:
    """Do any rows whatever, in float64."""
    (step,) = plan.steps
    values = out if plan.finish is Finish.SAME else np.empty(p.count)
    sides, factors = [(p, into_p), (q, into_q)], tilt.factors
    if step.rows == "qp":
        sides.reverse()
        sign = -1.0 if tilt.operation == "renyi" else 1.0
        factors = (sign * factors[1], sign * factors[0])
    beta = -1.0 if step.operation == "renyi_0" else step.parameter
    space = np.zeros(1, np.int64)
    scale = np.ascontiguousarray(scale)
    arguments = (
        *(number for rows_of, _ in sides for number in _strided(rows_of)), p.width, _address(rows),
        len(rows), _address(space), 1, _address(values), _address(scale),
        *(number for _, into in sides for number in _strided(into)), int(tilt.powers),
        *(1.0 / rows_of.temperature for rows_of, _ in sides), beta, *factors,
    )  # fmt: skip
    _launch(_kernel("exact_gradients", step.operation), arguments, 8 * len(rows) * p.width, False)
    if plan.finish is not Finish.SAME:
        out[rows] = _finish(plan, [values[rows]])


def _strided(rows: Rows | None) -> tuple[int, int, int, int, int]:
    """How the float64 kernels find entries; zeros where there are none."""
    if rows is None:
        return 0, 0, 0, 0, 0
    return *_place(rows), rows.stride, _DTYPE_CODE[rows.dtype]


def explain(name: str, p: Rows, q: Rows | None) -> dict[str, object]:
    """What ``run`` would do with these arrays."""
    if name == "log_softmax":
        steps: tuple[Step, ...] = (LOG_SOFTMAX,)
    else:
        operation = name.partition(":")
        parameters = (float(operation[2]),) if operation[2] else EXAMPLE.get(name, ())
        steps = plan_of(operation[0], parameters).steps
    entries = p.count * p.width * (1 if q is None else 2)
    workers = get_num_threads()
    if entries < 2 * WORTH_A_THREAD:
        workers = 1
    _, parts, _ = _cut(p.count, p.width)
    described = []
    for step in steps:
        pair = len(step.rows) == 2
        fast = step.module not in ("exact", "top_k") and _is_fast(p, q if pair else None)
        module = step.module if fast or step.module == "top_k" else "exact"
        described.append(
            {
                "kernel": f"{module}.{step.operation}",
                "arithmetic": "float32 vectors, float64 sums" if fast else "float64",
                "passes": _PASSES[module],
                "parts_of_a_row": parts if fast else 1,
            }
        )
    return {"steps": described, "threads": min(workers, max(1, entries // WORTH_A_THREAD))}


#: Times that a row is read: from main memory once, then from cache.
_PASSES = {"one_pass": 1, "single_pass": 1, "two_phase": 2, "exact": 3, "top_k": 1}


def read_bytes(array: NDArray[Any]) -> None:
    """Read a contiguous array once with all threads, as fast as memory allows."""
    function = kernel("read", (), _SIGNATURE["read"])
    space = np.zeros(2, np.int64)
    _launch(
        function,
        (array.ctypes.data, array.nbytes, _address(space), _address(space) + 8, 0),
        array.nbytes // 4,
        alone=False,
    )


def available() -> str | None:
    """Why this backend cannot be used, or None."""
    missing = [name for name in ("numba", "llvmlite") if find_spec(name) is None]
    return f"{' and '.join(missing)} cannot be found" if missing else None


def warmup(names: Sequence[str], dtypes: Sequence[str]) -> None:
    """Compile, or load from the cache, the kernels of these operations."""
    metrics = [(name, EXAMPLE.get(name, ())) for name in names]
    floats = [dtype for dtype in dtypes if dtype != "float64"]
    # Alone, and together in ``compare``.
    if together := _together(step for plan in plans_of(metrics) for step in plan.steps):
        joint = ",".join(_joint_names(together))
        for pair in itertools.product(floats, repeat=2):
            _kernel("two_phase", joint, *pair, False)
    for plan in (*(plan_of(*metric) for metric in metrics), *plans_of(metrics)):
        for step in plan.steps:
            module = "top_k" if step.module == "top_k" else "exact"
            _kernel(module, exact_operation(step))
            if step.module in ("exact", "top_k"):
                continue
            for types in itertools.product(floats, repeat=len(step.rows)):
                for last in ((False,), (True,)) if len(types) == 2 else ((),):
                    _kernel(step.module, step.operation, *types, *last)


def info() -> dict[str, object]:
    """Threads, vector width and where compiled kernels are kept."""
    directory = native.cache_directory()
    return {
        "threads": get_num_threads(),
        "processor": native.processor(),
        "vector_bits": native.vector_bits(),
        "cache": "none: no folder can be written to" if directory is None else str(directory),
    }


# --- 16-bit log-probabilities ------------------------------------------------------------


def to_float32(source: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Write a float16 or bfloat16 array (n, D), of entries that lie together, as float32."""
    rows, width = source.shape
    counter = np.zeros(1, np.int64)
    function = _kernel("widen", source.dtype.name)
    chunk = max(1, AT_A_TIME // max(1, width))
    arguments = (
        source.ctypes.data, source.strides[0], out.ctypes.data, out.strides[0], width, rows,
        _address(counter), chunk,
    )  # fmt: skip
    _launch(function, arguments, rows * width, alone=False)


def join_floors(
    sides: Sequence[tuple[NDArray[Any], Values]], rows: Sequence[NDArray[np.float32]]
) -> Values:
    """Decode rows of both sides into ``rows``, with `LEFT_OUT` where either is at its floor.

    Each side is its words, uint16 (n, V), or log-probabilities, float32 (n, V), of any stride
    between rows, and three numbers a row, as kernels/cpu/floors.py has them. ``rows`` are two
    float32 arrays (n, V or more); those of log-probabilities may be the very ones. Returns seven
    numbers a row and side, (n, 2, 7), see there.
    """
    (p, of_p), (q, of_q) = sides
    n, width = p.shape
    parameters = np.ascontiguousarray(np.stack([of_p, of_q], 1), np.float64)
    results = np.empty((n, 2, 7))
    counter = np.zeros(1, np.int64)
    function = _kernel("floors", p.dtype.name, q.dtype.name)
    arguments = (
        p.ctypes.data, p.strides[0], q.ctypes.data, q.strides[0], width, n, _address(counter),
        _address(parameters), rows[0].ctypes.data, rows[1].ctypes.data, rows[0].strides[0],
        _address(results),
    )  # fmt: skip
    _launch(function, arguments, 2 * n * width, alone=False)
    return results

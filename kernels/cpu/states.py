"""Rows as parts of wider ones: masses and log-ratios, and sums with normalizers of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from klfast._arrays import FLOATS, Rows

from ..plans import (
    ENTRIES,
    LOG_RATIO,
    NORMALIZERS,
    STATISTICS,
    Plan,
    Step,
    plan_of,
    plans_of,
    statistics_of,
)
from .runs import LOG2_E, Numbers, Values, is_fast, run_step
from .values import planned, run_steps

__all__ = [
    "partial_sums",
    "shard",
]

#: Divergences from which the normalizers of a part are compared as they are.
FAR = 0.02
_LN_2 = math.log(2.0)


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
    if q is not None and (powers or not is_fast(p, q)):
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
    spaces = run_steps([*asked, *steps], p, q, rows, tokens, into)
    sides = []
    for number, (batch, step) in enumerate(zip(batches, single, strict=True)):
        if step not in spaces:
            spaces[step] = _statistics(batch, known[:, number], known[:, 3 + number], rows)
            left = numbers[~np.isfinite(known[numbers]).all(axis=-1)]
            if len(left):
                run_step(step, p, q, left, spaces[step], None)
        sides.append(_masses(batch, spaces[step], rows))
    values = [planned(plan, spaces, rows, p.count) for plan in plans[: len(metrics)]]
    for (name, _), found in zip(metrics, values, strict=True):
        if name in ENTRIES:
            found[keep] = _picked(batches[ENTRIES[name]], found[keep], rows)
    if q is None:
        return sides, None, values
    if symmetric:
        known = np.full((p.count, 3), np.nan)
        run_steps([NORMALIZERS], p, q, rows, None, (NORMALIZERS, known), exactly=True)
    # The kernels' exponents are in base 2, with a rounded 1/T.
    with np.errstate(all="ignore"):  # NaN where they are not known
        a = float(np.float32(LOG2_E / p.temperature))
        ratio = known[:, 2] - a * (sides[0][:, 0] - sides[1][:, 0])
        ratio *= _LN_2 * (LOG2_E / p.temperature / a)
        if knows is not None:
            # Far apart, the difference of two sums is as good.
            far = ~np.isfinite(ratio) & (spaces[knows].reshape(p.count, -1)[:, 0] >= FAR)
            ratio = np.where(far, sides[0][:, 1] - sides[1][:, 1], ratio)
    # The largest log(p/q) is as exact as this is.
    exactly = powers or any(name in ENTRIES for name, _ in metrics)
    left = numbers if exactly else numbers[~np.isfinite(ratio[numbers])]
    if len(left):
        run_step(LOG_RATIO, p, q, left, ratio, None)
    return sides, ratio, values


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
        run_step(step, p, q, rows, out, None, exactly=True, normalizers=normalizers)
    return results


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


def _statistics(batch: Rows, constants: Values, indices: Values, rows: Numbers | None) -> Values:
    """What `_masses` takes, of the constants of log2 p = a x + constant and the largest entries."""
    found = np.full((batch.count, STATISTICS), np.nan)
    keep = slice(None) if rows is None else rows
    largest = _picked(batch, indices[keep], rows)
    a = float(np.float32(LOG2_E / batch.temperature))
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

"""Values of operations: the runs of kernels that they are planned as, alone and together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from klfast._arrays import FLOATS, Rows

from ..plans import EXAMPLE, LOG_SOFTMAX, Finish, Plan, Step, plan_of, plans_of
from . import threads
from .formulas import finish
from .runs import FEW_ROWS, PART, Numbers, Values, is_fast, run_step, space_of, unfinished
from .threads import get_num_threads

__all__ = [
    "compare",
    "joint_names",
    "log_softmax",
    "planned",
    "run",
    "run_steps",
    "taken_together",
]

#: Bytes of both rows that ``compare`` keeps in cache while every metric reads them.
CACHE_BLOCK = 1 << 21


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
        run_step(plan.steps[0], p, q, rows, out, tokens)
        return
    values = []
    for step in plan.steps:
        space = space_of(step, p.count)
        run_step(step, p, q, rows, space, tokens)
        values.append(space if rows is None else space[rows])
    out[slice(None) if rows is None else rows] = finish(plan, values)


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
    spaces = run_steps((step for plan in plans for step in plan.steps), p, q, rows, tokens)
    return [planned(plan, spaces, rows, p.count) for plan in plans]


def log_softmax(x: Rows, rows: Numbers | None, out: Rows) -> None:
    """Write x - logsumexp(x) of every entry, in the dtype of ``out``."""
    run_step(LOG_SOFTMAX, x, None, rows, out, None)


def run_steps(
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
    spaces = {step: space_of(step, p.count) for step in steps}
    into = dict.fromkeys(spaces) if known is None else dict.fromkeys(spaces) | dict([known])
    numbers = np.arange(p.count) if rows is None else rows
    row_bytes = p.width * (FLOATS[p.dtype] + (0 if q is None else FLOATS[q.dtype]))
    at_a_time = max(1, CACHE_BLOCK // row_bytes)

    def each(steps: Iterable[Step], block: Numbers, alone: bool) -> None:
        for step in steps:
            run_step(step, p, q, block, spaces[step], tokens, alone, exactly, into[step])

    few = len(numbers) < FEW_ROWS and p.width > PART
    if not exactly and (few or len(spaces) == 1):
        # Too few to give every thread rows of its own: all threads work on each row.  Or nothing
        # is to be found in a cache.
        each(spaces, numbers, False)
        return spaces
    together = taken_together(spaces) if q is not None and known is None and is_fast(p, q) else {}
    others = [step for step in spaces if step not in together]

    names = joint_names(together)
    weights = [step.parameter for step, name in together.items() if name == "skew_js"]
    run = Step("two_phase", ",".join(names), "pq", *weights)
    table = np.empty((p.count, len(names) + 3 * ("top" in names)))

    def joint(block: Numbers, alone: bool) -> None:
        again = unfinished(run, p, q, block, table, None, alone)
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
_COLUMNS = ("tv", "hellinger2", "js", "skew_js", "kl", "reverse_kl", "jeffreys", "top")
#: The steps that have such values, and the first of them.
_TOGETHER = {
    **{
        plan_of(name, EXAMPLE.get(name, ())).steps[0]: name
        for name in _COLUMNS
        if name not in ("skew_js", "top")
    },
    plans_of([("kl", ()), ("reverse_kl", ())])[0].steps[0]: "kl",
    **dict.fromkeys(plan_of("same_top", ()).steps, "top"),
}


def taken_together(steps: Iterable[Step]) -> dict[Step, str]:
    """The steps that are better done in one run of ``two_phase``, and where their values are."""
    steps = list(steps)
    found = {step: _TOGETHER[step] for step in steps if step in _TOGETHER}
    if "js" not in found.values():  # one weight of Jensen-Shannon, in its place
        skew = (step for step in steps if step.operation == "skew_js")
        found.update((step, "skew_js") for step in itertools.islice(skew, 1))
    tops = [step for step, name in found.items() if name == "top"]
    if len(tops) == 1:
        del found[tops[0]]
    if len(found) < 2 or not any(step.module == "two_phase" for step in found):
        return {}
    return found


def joint_names(together: dict[Step, str]) -> tuple[str, ...]:
    """The names of the values of such a run."""
    wanted = set(together.values())
    if any(step.operation == "kl_both" for step in together):
        wanted.add("reverse_kl")
    return tuple(name for name in _COLUMNS if name in wanted)


def planned(plan: Plan, spaces: dict[Step, Values], rows: Numbers | None, count: int) -> Values:
    keep = slice(None) if rows is None else rows
    out = np.empty(count)
    out[keep] = finish(plan, [spaces[step][keep] for step in plan.steps])
    return out

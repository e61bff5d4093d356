"""Values with gradients: how an operation's follow from those that kernels know, and their runs."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from klfast._arrays import FLOATS, Rows

from ..plans import SKEWEST, Finish, Plan, Step, exact_operation, plan_of
from . import threads
from .formulas import finish
from .polynomials import log_mixture
from .runs import (
    WORTH_A_THREAD,
    Numbers,
    Values,
    address,
    compiled,
    is_fast,
    launch,
    placed,
    strided,
    written_at_a_time,
)
from .threads import get_num_threads

__all__ = [
    "gradient",
]


class Tilt(NamedTuple):
    """How a gradient follows from those that the kernels know, of the rows as they are given.

    ``operation`` of its step, the factors of the gradients with respect to P and Q, and whether
    they have S as a further one; whether float32 carries it, for ordinary rows.
    """

    operation: str
    factors: tuple[float, float] = (1.0, 1.0)
    powers: bool = False
    fused: bool = True


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
    plan = _gradient_plan(name, parameters)
    (step,) = plan.steps
    tilt = _tilt(name, parameters, step.operation)
    numbers = left = np.arange(p.count) if rows is None else rows
    values = out if plan.finish is Finish.SAME else np.empty(p.count)
    if len(left) and tilt.fused and _is_fused(step, p, other, into_p, into_q):
        left = _fused_gradient(tilt, step, p, other, left, values, scale, into_p, into_q)
    if len(left):
        _exact_gradient(tilt, step, p, other, left, values, scale, into_p, into_q)
    if values is not out:
        out[numbers] = finish(plan, [values[numbers]])


def _tilt(name: str, parameters: tuple[float, ...], operation: str) -> Tilt:
    (parameter,) = parameters or (1.0,)
    if name == "js":
        w = parameter
        if operation != "js":  # there is nothing to mix
            return Tilt(operation, factors=(0.0, 0.0), fused=False)
        return Tilt("js", factors=(w, 1.0 - w), fused=min(w, 1.0 - w) >= SKEWEST)
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


def _gradient_plan(name: str, parameters: tuple[float, ...]) -> Plan:
    """How a value comes from what the kernels of gradients know of a row."""
    if name == "hellinger2":  # 1 - S, of order 1/2
        return Plan((Step("one_pass", "renyi", "pq", -0.5, 40.0),), Finish.POWER, (-0.5, 1.0, 0.5))
    if name == "entropy":  # cross-entropy with itself
        return plan_of("cross_entropy", ())
    plan = plan_of(name, parameters)
    if name == "js":  # of any weight in the same kernels
        return Plan(
            tuple(s._replace(operation=exact_operation(s)) for s in plan.steps), plan.finish
        )
    return plan


def _is_fused(step: Step, p: Rows, q: Rows, *targets: Rows | None) -> bool:
    """Whether ``fused_gradients`` knows the operation, and reads and writes such rows."""
    known = step.module == "one_pass" or step.operation in ("js", "tv", "jeffreys")
    narrow = all(
        into.stride == FLOATS[into.dtype] and into.dtype != "float64"
        for into in targets
        if into is not None
    )
    return known and narrow and is_fast(p, q)


def _fused_gradient(
    tilt: Tilt,
    step: Step,
    p: Rows,
    q: Rows,
    rows: Numbers,
    values: Values,
    scale: Values,
    into_p: Rows | None,
    into_q: Rows | None,
) -> Numbers:
    """Do the ordinary rows; returns the others."""
    scales = scale[:, None] * tilt.factors
    sides = [(p, into_p), (q, into_q)]
    # Symmetric ones take the same dtype first whatever the order.
    symmetric = step.parameter == (0.5 if step.operation == "js" else -0.5) or (
        step.operation in ("tv", "jeffreys")
    )
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
    polynomial = address(log_mixture(step.parameter)) if step.operation == "js" else 0
    space = np.zeros(n + 3, np.int64)
    counter = address(space)
    chunk = written_at_a_time(n, width * targets[0].stride, workers)
    function = compiled(
        "fused_gradients", tilt.operation, letters, first.dtype, second.dtype,
        *(target.dtype for target in targets),
    )  # fmt: skip
    arguments = (
        *placed(first), *placed(second), width, address(rows), n, counter, chunk, counter + 16,
        address(values), address(scales), address(spare), *placed(targets[0]),
        *placed(targets[1]), int(tilt.powers), polynomial, 1.0 / p.temperature,
        step.parameter, step.limit,
    )  # fmt: skip
    threads.run(functools.partial(function, *arguments), workers)
    return np.sort(space[3 : 3 + space[2]])


def _exact_gradient(
    tilt: Tilt,
    step: Step,
    p: Rows,
    q: Rows,
    rows: Numbers,
    values: Values,
    scale: Values,
    into_p: Rows | None,
    into_q: Rows | None,
) -> None:
    """Do any rows whatever, in float64."""
    sides, factors = [(p, into_p), (q, into_q)], tilt.factors
    if step.rows == "qp":
        sides.reverse()
        sign = -1.0 if tilt.operation == "renyi" else 1.0
        factors = (sign * factors[1], sign * factors[0])
    beta = -1.0 if step.operation == "renyi_0" else step.parameter
    space = np.zeros(1, np.int64)
    scale = np.ascontiguousarray(scale)
    arguments = (
        *(number for rows_of, _ in sides for number in strided(rows_of)), p.width, address(rows),
        len(rows), address(space), 1, address(values), address(scale),
        *(number for _, into in sides for number in strided(into)), int(tilt.powers),
        *(1.0 / rows_of.temperature for rows_of, _ in sides), beta, *factors,
    )  # fmt: skip
    launch(compiled("exact_gradients", step.operation), arguments, 8 * len(rows) * p.width, False)

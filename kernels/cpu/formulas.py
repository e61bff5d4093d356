"""Results of the values that kernels give: what a plan makes of the numbers of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..plans import Finish, Plan
from .runs import Values

__all__ = [
    "finish",
]


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


def finish(plan: Plan, values: Sequence[Values]) -> Values:
    """The result of the values of the steps."""
    if plan.finish is Finish.SAME and values[0].ndim == 2:
        return values[0][:, plan.column]
    return _FORMULAS[plan.finish](*values, *plan.numbers)

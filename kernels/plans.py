"""How each operation is computed: which kernels run on which rows, and what becomes of the values.

Both compiled backends have the same kernels, so that they share these plans. A kernel run (a
*step*) gives every row one value, or several columns of them; a formula (`Finish`) makes the result
of these. The CPU backend evaluates formulas with NumPy, the CUDA backend in `finish.cuh`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "COLUMNS",
    "ENTRIES",
    "EXAMPLE",
    "LOG_RATIO",
    "LOG_SOFTMAX",
    "NORMALIZERS",
    "SKEWEST",
    "STATISTICS",
    "Finish",
    "Plan",
    "Step",
    "exact_operation",
    "plan_of",
    "plans_of",
    "statistics_of",
]

#: Orders and weights below this are 0: their products with anything are below every accuracy.
TINY = 1e-300
#: Down to this weight of either row float32 carries a Jensen-Shannon divergence.
SKEWEST = 1e-6

#: Numbers that describe a row on its own.  With m the largest entry and k its first index:
#: m;  S = sum exp(x - m) and U = sum (m - x) exp(x - m) over all indices but k;  k;  and
#: x - m of the row's token, where tokens are given.
STATISTICS = 5

#: Values that a step writes for each row, where it is more than one.
COLUMNS = {"statistics": STATISTICS, "top": STATISTICS, "kl_both": 2}

#: A parameter to explain or compile an operation with, where none is given: kernels take it at
#: run time.
EXAMPLE: dict[str, tuple[float, ...]] = {
    "js": (0.5,), "renyi": (2.0,), "alpha": (1.5,), "tsallis": (1.5,),
    "renyi_entropy": (2.0,), "topk_overlap": (1.0,),
}  # fmt: skip


class Finish(IntEnum):
    """Formulas of the values v of a step, or of the columns of one or two rows."""

    SAME = 0  #: v
    SCALED = 1  #: (factor): factor v
    POWER = 2  #: (beta, factor, scale): scale (S - 1)/beta, with log S = beta factor v
    INFINITE_POWER = 3  #: infinity, or 0 where v is
    ZERO = 4  #: 0, or NaN where v is
    ENTROPY = 5
    LOGSUMEXP = 6
    TOP_P = 7  #: the largest probability
    TOKEN = 8  #: the log-probability of the token
    NLL = 9
    SAME_TOP = 10  #: of two rows: 1 where their largest entries have the same index
    DELTA_PROB = 11  #: of two rows: how much more probable the second makes the token


class Step(NamedTuple):
    """One kernel run: which kernel, on which rows, with which parameter."""

    module: str
    operation: str
    rows: str  # "pq", "qp", "p" or "q"
    parameter: float = 0.0
    limit: float = 0.0


class Plan(NamedTuple):
    """The steps of an operation, and the formula that makes the result of their values.

    ``column`` is that of the value, where the only step has several values.
    """

    steps: tuple[Step, ...]
    finish: Finish = Finish.SAME
    numbers: tuple[float, ...] = ()
    column: int = 0


def _pair(module: str, operation: str, parameter: float = 0.0, rows: str = "pq") -> Plan:
    return Plan((Step(module, operation, rows, parameter, 40.0),))


def _statistics(finish: Finish, sides: str) -> Plan:
    return Plan(tuple(statistics_of(side) for side in sides), finish)


def statistics_of(side: str) -> Step:
    return Step("single_pass", "statistics", side)


def _top(side: str) -> Step:
    return Step("single_pass", "top", side)


def _renyi_step(alpha: float, limit: float) -> tuple[Step, float]:
    """The step for order alpha, and the factor that its value must be multiplied with.

    Orders below 1/2 exchange the arguments: (1 - a) D_a(P, Q) = a D_(1-a)(Q, P).
    """
    if alpha == 1.0:
        return Step("one_pass", "kl", "pq", 0.0, 40.0), 1.0
    if alpha < TINY:
        return Step("exact", "renyi_0", "pq"), 1.0
    if alpha == math.inf:
        return Step("exact", "renyi_inf", "pq"), 1.0
    if alpha < 0.5:
        return Step("one_pass", "renyi", "qp", -alpha, limit), alpha / (1.0 - alpha)
    return Step("one_pass", "renyi", "pq", alpha - 1.0, limit), 1.0


def _renyi(alpha: float) -> Plan:
    step, factor = _renyi_step(alpha, 40.0)
    return Plan((step,)) if factor == 1.0 else Plan((step,), Finish.SCALED, (factor,))


def _power_step(alpha: float) -> tuple[Step, float]:
    """As `_renyi_step`, for an S itself."""
    # The relative error of S is the absolute error of its logarithm, which grows with the order
    # and with the largest log-ratio.
    step, factor = _renyi_step(alpha, 8.0)
    return (step._replace(module="exact") if alpha > 5.0 else step), factor


def _power(alpha: float, scale: Callable[[float], float]) -> Plan:
    """(S - 1)/(alpha - 1) scale(alpha), with log S = (alpha - 1) times the Rényi divergence."""
    if alpha < TINY and scale(1.0) != scale(2.0):
        return _pair("one_pass", "kl", rows="qp")  # the limit of the alpha-divergence
    if alpha == math.inf:
        return Plan((Step("exact", "renyi_inf", "pq"),), Finish.INFINITE_POWER)
    step, factor = _power_step(alpha)
    if alpha == 1.0:
        return Plan((step,))
    return Plan((step,), Finish.POWER, (alpha - 1.0, factor, scale(alpha)))


def _js(weight: float) -> Plan:
    if weight == 0.5:
        return _pair("two_phase", "js", 0.5)
    if weight < TINY or weight == 1.0:
        # 0, but still NaN for rows that are no distribution.
        return Plan(_pair("two_phase", "tv").steps, Finish.ZERO)
    if min(weight, 1.0 - weight) < SKEWEST:
        return _pair("exact", "js", weight)
    return _pair("two_phase", "skew_js", weight)


_PLANS = {
    "kl": _pair("one_pass", "kl"),
    "reverse_kl": _pair("one_pass", "kl", rows="qp"),
    "cross_entropy": _pair("one_pass", "cross_entropy"),
    "tv": _pair("two_phase", "tv"),
    "hellinger2": _pair("two_phase", "hellinger2"),
    "jeffreys": _pair("two_phase", "jeffreys"),
    "chi2": _power(2.0, scale=lambda alpha: 1.0),
    "entropy": _statistics(Finish.ENTROPY, "p"),
    "entropy_p": _statistics(Finish.ENTROPY, "p"),
    "entropy_q": _statistics(Finish.ENTROPY, "q"),
    "logsumexp": _statistics(Finish.LOGSUMEXP, "p"),
    "top_p": _statistics(Finish.TOP_P, "p"),
    "token_log_probs": _statistics(Finish.TOKEN, "p"),
    "nll_p": _statistics(Finish.NLL, "p"),
    "nll_q": _statistics(Finish.NLL, "q"),
    "same_top": Plan((_top("p"), _top("q")), Finish.SAME_TOP),
    "delta_prob": _statistics(Finish.DELTA_PROB, "pq"),
    # Of shards alone: where log(p/q) is largest.
    "top_ratio_p": _pair("exact", "top_ratio"),
    "top_ratio_q": _pair("exact", "top_ratio"),
}

#: log(Sx/Sy), with Sx the sum of exp((x - m)/T) and m the largest x, as exactly as they are close.
LOG_RATIO = Step("exact", "log_ratio", "pq")
#: Measures of shards that are the entry of one of the rows at an index that the plan gives.
ENTRIES = {"top_ratio_p": 0, "top_ratio_q": 1}
#: What knows log(Sx/Sy), with references instead of m, symmetrically and to first order.
NORMALIZERS = Step("two_phase", "tv", "pq", 0.0, 40.0)

#: What writes log-probabilities; it gives no values.
LOG_SOFTMAX = Step("single_pass", "log_softmax", "p")


@functools.cache
def plan_of(name: str, parameters: tuple[float, ...]) -> Plan:
    """How an operation of the table is computed, or one that only states have."""
    if not parameters:
        return _PLANS[name]
    (parameter,) = parameters
    if name == "js":
        return _js(parameter)
    if name == "renyi":
        return _renyi(parameter)
    if name == "alpha":
        return _power(parameter, scale=lambda alpha: 1.0 / alpha)
    if name == "tsallis":
        return _power(parameter, scale=lambda alpha: 1.0)
    if name == "log_power":
        # As Rényi, and as exact as exponentials of its multiples need.
        step, factor = _power_step(parameter)
        return Plan((step,)) if factor == 1.0 else Plan((step,), Finish.SCALED, (factor,))
    if name == "topk_overlap":
        return _pair("top_k", "overlap", parameter)
    assert name == "renyi_entropy"
    if parameter == 1.0:
        return _statistics(Finish.ENTROPY, "p")
    return _pair("exact", "renyi_entropy", parameter, rows="p")


def plans_of(metrics: Sequence[tuple[str, tuple[float, ...]]]) -> list[Plan]:
    """Plans of several operations, with steps that serve two of them at once where there are."""
    plans = [plan_of(name, parameters) for name, parameters in metrics]
    if _PLANS["kl"] in plans and _PLANS["reverse_kl"] in plans:
        step = Step("one_pass", "kl_both", "pq", 0.0, 40.0)
        both = {
            _PLANS[name]: Plan((step,), column=column)
            for column, name in enumerate(("kl", "reverse_kl"))
        }
        plans = [both.get(plan, plan) for plan in plans]
    steps = {step for plan in plans for step in plan.steps}
    known = {_top(side): step for side in "pq" if (step := statistics_of(side)) in steps}
    return [plan._replace(steps=tuple(known.get(s, s) for s in plan.steps)) for plan in plans]


def exact_operation(step: Step) -> str:
    """What the kernel ``exact`` calls the operation of a step."""
    return {"top": "statistics", "kl_both": "kl", "skew_js": "js"}.get(
        step.operation, step.operation
    )

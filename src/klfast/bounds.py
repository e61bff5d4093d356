"""Bounds of one divergence by another, true of all pairs of distributions.

Every function takes a divergence in nats, or without unit where it has none, as a number or an
array of any shape and library, and returns the bound as the same kind. Total variation is
1/2 sum |p - q| and squared Hellinger distance 1/2 sum (sqrt p - sqrt q)^2, both in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._values import given

__all__ = [
    "bretagnolle_huber",
    "chi2_from_tv",
    "hellinger2_from_kl",
    "js_from_hellinger2",
    "js_from_tv",
    "kl_from_chi2",
    "kl_from_hellinger2",
    "kl_from_tv",
    "kl_from_tv_and_smallest",
    "pinsker",
    "tv_from_chi2",
    "tv_from_hellinger2",
    "tv_from_js",
]

Values = NDArray[np.float64]


def pinsker(kl: Any) -> Any:
    """Upper bound of the total variation, sqrt(KL / 2); better than the next one below KL = 1.6.

    Source: Pinsker, Information and Information Stability of Random Variables and Processes, 1964,
    with the constant of Csiszár, 1967.
    """
    return _of({"kl": kl}, lambda x: np.minimum(np.sqrt(0.5 * x), 1.0))


def bretagnolle_huber(kl: Any) -> Any:
    """Upper bound of the total variation, sqrt(1 - exp(-KL)), which is below 1 for every finite KL.

    Source: Bretagnolle and Huber, Estimation des densités: risque minimax, 1979.
    """
    return _of({"kl": kl}, lambda x: np.sqrt(-np.expm1(-x)))


def kl_from_tv(tv: Any) -> Any:
    """Lower bound of KL by the total variation, the larger of those of the two functions above.

    max(2 TV^2, -log(1 - TV^2)); sources: `pinsker`, `bretagnolle_huber`.
    """
    return _of({"tv": tv}, lambda x: np.maximum(2.0 * x * x, -np.log1p(-x * x)))


def kl_from_tv_and_smallest(tv: Any, smallest: Any) -> Any:
    """Upper bound of KL by the total variation and the smallest q: log(1 + 2 TV^2 / smallest).

    A reverse of Pinsker's inequality, which needs Q bounded from below.
    Source: Sason and Verdú, f-Divergence Inequalities, 2016, section V.
    """
    return _of({"tv": tv, "smallest": smallest}, lambda x, q: np.log1p(2.0 * x * x / q))


def kl_from_hellinger2(hellinger2: Any) -> Any:
    """Lower bound of KL: -2 log(1 - H^2), the Rényi divergence of order 1/2.

    Source: van Erven and Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2014,
    theorem 3 (it does not decrease in its order).
    """
    return _of({"hellinger2": hellinger2}, lambda x: -2.0 * np.log1p(-x))


def hellinger2_from_kl(kl: Any) -> Any:
    """Upper bound of the squared Hellinger distance, 1 - exp(-KL / 2); see `kl_from_hellinger2`."""
    return _of({"kl": kl}, lambda x: -np.expm1(-0.5 * x))


def kl_from_chi2(chi2: Any) -> Any:
    """Upper bound of KL: log(1 + chi^2), the Rényi divergence of order 2.

    Source: as `kl_from_hellinger2`; Gibbs and Su, On Choosing and Bounding Probability Metrics,
    2002.
    """
    return _of({"chi2": chi2}, np.log1p)


def tv_from_hellinger2(hellinger2: Any) -> tuple[Any, Any]:
    """Lower and upper bound of the total variation: H^2 and sqrt(H^2 (2 - H^2)).

    Source: Le Cam, Asymptotic Methods in Statistical Decision Theory, 1986, section 4.2.
    """
    lower = _of({"hellinger2": hellinger2}, lambda x: x)
    return lower, _of({"hellinger2": hellinger2}, lambda x: np.sqrt(x * (2.0 - x)))


def tv_from_chi2(chi2: Any) -> Any:
    """Upper bound of the total variation: sqrt(chi^2) / 2, and at most chi^2 / (1 + chi^2) above 1.

    Source: Sason and Verdú, f-Divergence Inequalities, 2016, theorem 25 and the inversion of
    `chi2_from_tv`.
    """

    def bound(x: Values) -> Values:
        root = 0.5 * np.sqrt(x)
        with np.errstate(invalid="ignore"):
            share = np.where(np.isinf(x), 1.0, x / (1.0 + x))
        return np.where(x < 1.0, root, share)

    return _of({"chi2": chi2}, bound)


def chi2_from_tv(tv: Any) -> Any:
    """Lower bound of chi-squared: 4 TV^2, or TV / (1 - TV) from TV = 1/2.

    Source: Sason and Verdú, f-Divergence Inequalities, 2016.
    """
    return _of(
        {"tv": tv},
        lambda x: np.where(x < 0.5, 4.0 * x * x, np.where(x < 1.0, x / (1.0 - x), np.inf)),
    )


def js_from_tv(tv: Any) -> tuple[Any, Any]:
    """Lower and upper bound of the Jensen-Shannon divergence by the total variation.

    log 2 - h((1 - TV) / 2), with h the entropy of a coin, and TV log 2.
    Source: Lin, Divergence Measures Based on the Shannon Entropy, 1991 (both); Briët and Harremoës,
    Properties of Classical and Quantum Jensen-Shannon Divergence, 2009 (the lower one).
    """

    def lower(x: Values) -> Values:
        # ((1+x) log(1+x) + (1-x) log(1-x)) / 2, whose terms cancel where x is small.
        small = np.minimum(x, 0.1)
        series = sum(small ** (2 * k) / (2 * k * (2 * k - 1)) for k in range(8, 0, -1))
        rest = np.where(x < 1.0, (1.0 - x) * np.log1p(-np.minimum(x, 1.0)), 0.0)
        return np.where(x < 0.1, series, 0.5 * ((1.0 + x) * np.log1p(x) + rest))

    arguments = {"tv": tv}
    return _of(arguments, lower), _of(arguments, lambda x: x * math.log(2.0))


def tv_from_js(js: Any) -> tuple[Any, Any]:
    """Lower and upper bound of the total variation by Jensen-Shannon: JS / log 2, and sqrt(2 JS).

    From `js_from_tv`, whose lower bound is at least TV^2 / 2.
    """
    arguments = {"js": js}
    upper = _of(arguments, lambda x: np.minimum(np.sqrt(2.0 * x), 1.0))
    return _of(arguments, lambda x: x / math.log(2.0)), upper


def js_from_hellinger2(hellinger2: Any) -> tuple[Any, Any]:
    """Lower and upper bound of the Jensen-Shannon divergence: H^2 log 2 and H^2.

    Source: Jayram, Hellinger Strikes Back, 2009; Sason, On f-Divergences: Integral Representations,
    Local Behavior, and Inequalities, 2018.
    """
    arguments = {"hellinger2": hellinger2}
    return _of(arguments, lambda x: x * math.log(2.0)), _of(arguments, lambda x: x)


def _of(arguments: dict[str, Any], formula: Callable[..., Any]) -> Any:
    """The formula of float64 values, as the kind of array that was given."""
    origin = given(arguments)
    values = origin.values()
    for name, value in zip(arguments, values, strict=True):
        if (value < 0).any():
            raise ValueError(f"{name} holds {value.min():g}; accepted: numbers from 0")
    with np.errstate(all="ignore"):
        return origin.result(formula(*values))

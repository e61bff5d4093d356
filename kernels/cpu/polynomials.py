"""Polynomials of float32 kernels with coefficients that depend on a weight.

With w and v = 1 - w the weights of P and Q and t = log2(q/p), both are analytic where
w + v exp(tau) is not 0, tau = t log 2: as far as tau = log(w/v) +- i pi, never nearer than pi.  So
COEFFICIENTS of them are good for 1e-7 up to abs(t) = NEAR, and for 2e-9 up to LOG_NEAR.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COEFFICIENTS",
    "LOG_NEAR",
    "NEAR",
    "log_mixture",
    "skew_js",
]

Values = NDArray[np.float64]

COEFFICIENTS = 12
#: How far near forms go, of all divergences: 2**t is between 1/11 and 11.  How far the logarithm
#: does.
NEAR, LOG_NEAR = 3.5, 2.0
_LN_2 = math.log(2.0)


def _fitted(function: Callable[[Values], Any], reach: float) -> Values:
    """Coefficients of what is ``function`` at the Chebyshev nodes of [-reach, reach]."""
    chebyshev = np.polynomial.chebyshev
    nodes = chebyshev.chebpts1(COEFFICIENTS)
    found = chebyshev.chebfit(nodes, function(reach * nodes), COEFFICIENTS - 1)
    return np.asarray(chebyshev.cheb2poly(found) * reach ** -np.arange(COEFFICIENTS), np.float64)


@functools.cache
def log_mixture(weight: float) -> Values:
    """(log(m/p) - v tau)/t**2, with m = w p + v q."""
    other = 1.0 - weight

    def quotient(t: Values) -> Any:
        tau = _LN_2 * t
        return (np.log1p(other * np.expm1(tau)) - other * tau) / t**2

    return _fitted(quotient, LOG_NEAR)


@functools.cache
def skew_js(weight: float) -> Values:
    """A term of Jensen-Shannon over w v sqrt(p q) t**2.

    With x = tau/2 and c = m/sqrt(p q) = w exp(-x) + v exp(x) the term w p log(p/m) + v q log(q/m)
    is sqrt(p q) times x (v exp(x) - w exp(-x)) - c log(c).  In float64 that is off by some 1e-16,
    beside a result of about w v t**2/10.
    """
    other = 1.0 - weight

    def quotient(t: Values) -> Any:
        x = 0.5 * _LN_2 * t
        p, q = weight * np.exp(-x), other * np.exp(x)
        return (x * (q - p) - (p + q) * np.log(p + q)) / (weight * other * t**2)

    return _fitted(quotient, NEAR)

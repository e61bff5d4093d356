"""Elementary functions of float64 arrays that do not cancel."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["excess", "kl_term"]


def excess(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """a - log1p(a) >= 0, in s = a/(2+a): a - 2 atanh(s) = s (a - 2 (s^2/3 + s^4/5 + ...))."""
    s = a / (2.0 + a)
    near = np.clip(s, -0.2, 0.2)
    series = np.zeros_like(near)
    for k in range(25, 1, -2):
        series = (series + 1.0 / k) * near * near
    return np.where(np.abs(s) < 0.2, s * (a - 2.0 * series), a - np.log1p(a))


def kl_term(
    p: NDArray[np.float64], q: NDArray[np.float64], change: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p log(p/q) - p + q >= 0, where ``change`` is q - p, better than its rounded parts give it."""
    with np.errstate(all="ignore"):
        near = np.abs(change) < 0.5 * p
        close = p * excess(np.where(near, change / p, 0.0))
        far = np.where(p == 0.0, q, change - p * np.log(q / p))
        return np.where(near, close, far)

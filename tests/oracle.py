"""Textbook formulas in mpmath at 60 digits, for single rows of Python floats.

The second opinion that `klfast.reference` is held against: it knows nothing of forms that do not
cancel or of log-sum-exp, it has digits enough to do without. ``softmax`` and ``normalized`` turn
a row into a Distribution; every other function takes Distributions and bears the name of its
counterpart in klfast. What is infinite is +inf; NaN rows are not for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mpmath import MPContext

# A context of its own: the precision of mpmath's global one is the user's.
mp = MPContext()
mp.dps = 60

Number = Any  # mpmath has no types


class Distribution(NamedTuple):
    p: tuple[Number, ...]
    log: tuple[Number, ...]  # -inf where p = 0


@lru_cache(maxsize=1024)
def softmax(row: tuple[float, ...], temperature: float = 1.0) -> Distribution:
    """exp(x/T) / sum exp(x/T)."""
    largest = mp.mpf(max(row))
    return _distribution(mp.exp((mp.mpf(x) - largest) / mp.mpf(temperature)) for x in row)


@lru_cache(maxsize=1024)
def normalized(row: tuple[float, ...], temperature: float = 1.0) -> Distribution:
    """w^(1/T) / sum w^(1/T)."""
    return _distribution(mp.mpf(w) ** (1 / mp.mpf(temperature)) if w else mp.zero for w in row)


def _distribution(weights: Iterable[Number]) -> Distribution:
    weights = tuple(weights)
    total = mp.fsum(weights)
    p = tuple(w / total for w in weights)
    return Distribution(p, tuple(mp.log(x) if x else -mp.inf for x in p))


def _support(p: Distribution, q: Distribution) -> Iterator[tuple[Number, Number, Number, Number]]:
    """p, q, log p and log q of the indices where p > 0."""
    for x, y, a, b in zip(p.p, q.p, p.log, q.log, strict=True):
        if x:
            yield x, y, a, b


def kl_divergence(p: Distribution, q: Distribution) -> Number:
    return mp.fsum(x * (a - b) for x, _, a, b in _support(p, q))


def jeffreys_divergence(p: Distribution, q: Distribution) -> Number:
    return kl_divergence(p, q) + kl_divergence(q, p)


def js_divergence(p: Distribution, q: Distribution, weight: float = 0.5) -> Number:
    if weight in (0, 1):
        return mp.zero
    w = mp.mpf(weight)
    m = _distribution(w * x + (1 - w) * y for x, y in zip(p.p, q.p, strict=True))
    return w * kl_divergence(p, m) + (1 - w) * kl_divergence(q, m)


def power_sum(p: Distribution, q: Distribution, alpha: float) -> Number:
    """sum p^alpha q^(1-alpha) over the support of P."""
    order = mp.mpf(alpha)
    outside = mp.inf if order > 1 else mp.zero
    return mp.fsum(
        mp.exp(order * a + (1 - order) * b) if y else outside for _, y, a, b in _support(p, q)
    )


def renyi_divergence(p: Distribution, q: Distribution, alpha: float) -> Number:
    if alpha == 1:
        return kl_divergence(p, q)
    if alpha == mp.inf:
        return max(a - b for _, _, a, b in _support(p, q))
    total = power_sum(p, q, alpha)
    return (mp.log(total) if total else -mp.inf) / (mp.mpf(alpha) - 1)


def alpha_divergence(p: Distribution, q: Distribution, alpha: float) -> Number:
    if alpha == 0:
        return kl_divergence(q, p)
    if alpha in (1, mp.inf):
        return tsallis_divergence(p, q, alpha)
    return tsallis_divergence(p, q, alpha) / mp.mpf(alpha)


def tsallis_divergence(p: Distribution, q: Distribution, alpha: float) -> Number:
    if alpha == 1:
        return kl_divergence(p, q)
    if alpha == mp.inf:
        return mp.zero if p.p == q.p else mp.inf
    return (power_sum(p, q, alpha) - 1) / (mp.mpf(alpha) - 1)


def total_variation(p: Distribution, q: Distribution) -> Number:
    return mp.fsum(abs(x - y) for x, y in zip(p.p, q.p, strict=True)) / 2


def squared_hellinger(p: Distribution, q: Distribution) -> Number:
    return mp.fsum((mp.sqrt(x) - mp.sqrt(y)) ** 2 for x, y in zip(p.p, q.p, strict=True)) / 2


def chi2_divergence(p: Distribution, q: Distribution) -> Number:
    pairs = list(zip(p.p, q.p, strict=True))
    if any(x and not y for x, y in pairs):
        return mp.inf
    return mp.fsum((x - y) ** 2 / y for x, y in pairs if y)


def cross_entropy(p: Distribution, q: Distribution) -> Number:
    return -mp.fsum(x * b for x, _, _, b in _support(p, q))


def entropy(p: Distribution) -> Number:
    return cross_entropy(p, p)


def renyi_entropy(p: Distribution, alpha: float) -> Number:
    if alpha == 1:
        return entropy(p)
    if alpha == mp.inf:
        return -max(p.log)
    order = mp.mpf(alpha)
    return mp.log(mp.fsum(mp.exp(order * a) for _, _, a, _ in _support(p, p))) / (1 - order)


def logsumexp(row: Sequence[float], temperature: float = 1.0) -> Number:
    return mp.log(mp.fsum(mp.exp(mp.mpf(x) / mp.mpf(temperature)) for x in row))

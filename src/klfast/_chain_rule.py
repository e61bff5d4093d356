"""How what is known of two parts of a row makes what is known of both.

Let the vocabulary be cut into parts s, and let P give them the masses w_s and Q the masses z_s. P_s
and Q_s are the distributions within a part, and d_s = log(w_s / z_s). Everything that klfast
computes in one phase follows from the same quantity of the parts and of the masses:

    KL(P, Q)        sum w KL_s                      +  KL(w, z)
    H(P)            sum w H_s                       +  H(w)
    Hellinger       sum sqrt(w z) h_s               +  1/2 sum (sqrt w - sqrt z)^2
    S - 1           sum w^a z^(1-a) (S_s - 1)       +  sum w^a z^(1-a) - 1
    Renyi entropy   log sum w^a exp((1-a) H_s) / (1-a)
    -log p[token]   the smallest of  -log p_s[token] - log w_s  (infinite where it is not in s)
    max log(p/q)    kept as the two entries where it is, of which it follows once m, L, r are known

Nothing in these sums cancels: terms have one sign, and the second ones vanish with d as the
divergences of two rows of two entries do, so that the relative accuracy of the parts is that of the
whole, however the row was cut. What remains is to know d_s as well as that. A part keeps, of each
row, its largest logit m and L = log sum exp((x - m)/T), and beside those of P and Q

    r = Lx - Ly,  so that  log(p/q) = (x - mx)/T - (y - my)/T - r

within the part, not as that difference but from terms that vanish where the rows agree. With
lambda = (mx_a - mx_b)/T - (my_a - my_b)/T + r_a - r_b of two parts a and b,

    d_a = log(w_a + w_b exp(lambda)) = -log(z_a + z_b exp(-lambda)),

of which the one with a negative exponent is taken: no overflow, and d only changes its sign when P
and Q change places.

Total variation and Jensen-Shannon do not follow from their parts. They are sums over all entries of
terms that are known once m, L and r of the whole row are, and of parts the sums simply add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .reference import (
    _difference_error,
    _excess,
    _kl,
    _log_ratio_of_products,
    _multiple,
    _oriented,
    _Pair,
)

__all__ = ["HEADER", "SECOND_PHASE", "TOP_RATIO", "Measure", "merge", "needed", "value_of"]

Array = NDArray[np.float64]


class Measure(NamedTuple):
    """A quantity that a state holds of its part: a metric's, or an index, with its parameters."""

    name: str
    parameters: tuple[float, ...] = ()


#: What comes first in a state: of each side m and L, and of two sides r.
HEADER = {1: ("max_p", "log_sum_p"), 2: ("max_p", "log_sum_p", "max_q", "log_sum_q", "log_ratio")}

#: What is summed once the masses are known.
SECOND_PHASE = ("js", "tv")

#: The entries of both rows where log(p/q) is largest, -inf where there is none.
TOP_RATIO = (Measure("top_ratio_p"), Measure("top_ratio_q"))

_LARGEST = float(np.finfo(np.float64).max)
#: Orders below this are 0.
_TINY = 1e-300


def needed(name: str, parameters: tuple[float, ...]) -> tuple[Measure, ...]:
    """What has to be known of the parts for an operation of the table."""
    (order,) = parameters or (1.0,)
    zero = order < _TINY
    if name == "renyi" and order == math.inf:
        return TOP_RATIO
    if name in ("renyi", "alpha", "tsallis") and order == 1.0:
        return (Measure("kl"),)
    if name == "alpha" and zero:
        return (Measure("reverse_kl"),)
    if name in ("renyi", "alpha", "tsallis"):
        # Of a part with little mass S may be large: what is known of log S must carry it.
        return (Measure("renyi", (0.0,)) if zero else Measure("log_power", (order,)),)
    if name == "renyi_entropy" and order != 1.0:
        return () if order == math.inf else (Measure(name, parameters),)
    return _NEEDED[name]


_NEEDED: dict[str, tuple[Measure, ...]] = {
    "kl": (Measure("kl"),),
    "reverse_kl": (Measure("reverse_kl"),),
    "jeffreys": (Measure("kl"), Measure("reverse_kl")),
    "cross_entropy": (Measure("entropy_p"), Measure("kl")),
    "hellinger2": (Measure("hellinger2"),),
    "chi2": (Measure("log_power", (2.0,)),),
    "entropy": (Measure("entropy_p"),),
    "renyi_entropy": (Measure("entropy_p"),),
    "entropy_p": (Measure("entropy_p"),),
    "entropy_q": (Measure("entropy_q"),),
    "logsumexp": (),
    "top_p": (),
    "js": (),
    "tv": (),
    "token_log_probs": (Measure("nll_p"),),
    "nll_p": (Measure("nll_p"),),
    "nll_q": (Measure("nll_q"),),
    "delta_prob": (Measure("nll_p"), Measure("nll_q")),
    "same_top": (Measure("top_index_p"), Measure("top_index_q")),
}


# Two parts


@dataclass(frozen=True, slots=True)
class _Side:
    """The masses of both parts under one of the distributions; parts are the last axis."""

    largest: Array  # (rows, 2)
    log_share: Array  # (rows, 2), log w
    merged_max: Array  # (rows,)
    merged_log_sum: Array  # (rows,)

    @property
    def share(self) -> Array:
        return np.exp(self.log_share)

    @property
    def empty(self) -> NDArray[np.bool_]:
        return np.equal(self.largest, -np.inf)


def _apart(left: Array, right: Array, temperature: float, probabilities: bool) -> Array:
    """(left - right)/T of two logits, or that of the logarithms of two probabilities."""
    if probabilities:
        ratio = (left - right) / right
        near = np.log1p(ratio)
        distance = np.where(np.abs(ratio) < 0.5, near, np.log(left) - np.log(right))
    else:
        distance = left - right
    distance = np.clip(distance / temperature, -_LARGEST, _LARGEST)
    return np.where(np.isinf(left) | np.isinf(right), left - right, distance)


def _side(largest: Array, log_sum: Array, temperature: float, probabilities: bool) -> _Side:
    a, b = largest[:, 0], largest[:, 1]
    ahead = _apart(b, a, temperature, probabilities) + (log_sum[:, 1] - log_sum[:, 0])
    log_share = -np.stack([np.logaddexp(0.0, ahead), np.logaddexp(0.0, -ahead)], axis=-1)
    log_share = np.where(largest == -np.inf, -np.inf, log_share)
    top = np.where(b > a, 1, 0)[:, None]
    merged = np.maximum(a, b)
    total = np.take_along_axis(log_sum - log_share, top, axis=-1)[:, 0]
    total = np.where(merged == -np.inf, 0.0, total + 0.0 * merged)
    return _Side(largest, log_share, merged, total)


def _distance(p: Array, q: Array, temperatures: tuple[float, float], probabilities: bool) -> Array:
    """(p[0] - p[1])/T_p - (q[0] - q[1])/T_q of two pairs of largest entries, rounded once."""
    (p_a, p_b), (q_a, q_b) = p.T, q.T
    far = _apart(p_a, p_b, temperatures[0], probabilities) - _apart(
        q_a, q_b, temperatures[1], probabilities
    )
    if temperatures[0] != temperatures[1]:
        return far
    if probabilities:
        near = _log_ratio_of_products(p_a, q_b, q_a, p_b)
    else:
        lost = _difference_error(p_a, p_b) - _difference_error(q_a, q_b)
        change = (p_a - p_b) - (q_a - q_b)
        near = change + (_difference_error(p_a - p_b, q_a - q_b) + lost)
    near = near / temperatures[0]
    return np.where(np.isfinite(near), near, far)


def _ratio_of_shares(distance: Array, p: _Side, q: _Side, part: int) -> Array:
    """d of a part: log(w + w' exp(-distance)), w' that of the other part."""
    other = 1 - part
    by_p = distance > 0.0
    own = np.where(by_p, p.log_share[:, part], q.log_share[:, part])
    rest = np.where(by_p, p.log_share[:, other], q.log_share[:, other])
    size = np.abs(distance)
    change = np.exp(rest) * np.expm1(-size)
    value = np.where(change > -0.5, np.log1p(change), np.logaddexp(own, rest - size))
    signed: Array = np.where(by_p, value, -value)
    return signed


class _Parts(NamedTuple):
    """Two parts of the same rows, under P and, of pairs, Q."""

    p: _Side
    q: _Side | None
    d: Array  # (rows, 2)
    log_ratio: Array  # (rows,), of both together

    @property
    def pair(self) -> _Pair:
        """The masses of the parts, as a row of two entries."""
        assert self.q is not None
        valid = np.ones(len(self.d), np.bool_)
        return _Pair(self.p.log_share, self.q.log_share, self.d, valid)


def _parts(header: Array, temperatures: tuple[float, float], probabilities: bool) -> _Parts:
    """``header`` has the shape (columns, rows, 2)."""
    p = _side(header[0], header[1], temperatures[0], probabilities)
    if len(header) == 2:
        return _Parts(p, None, np.zeros_like(p.largest), np.zeros(len(p.largest)))
    q = _side(header[2], header[3], temperatures[1], probabilities)
    ratio = header[4]
    two_sided = ~(p.empty | q.empty)  # or NaN, which goes through all that follows
    both = np.logical_and.reduce(two_sided, axis=-1)
    step = _distance(p.largest, q.largest, temperatures, probabilities)
    step = np.where(both, step + (ratio[:, 0] - ratio[:, 1]), 0.0)
    step = np.clip(step, -_LARGEST, _LARGEST)
    d = np.stack([_ratio_of_shares(-step, p, q, 0), _ratio_of_shares(step, p, q, 1)], axis=-1)
    plain = np.where(p.empty & q.empty, 0.0, p.log_share - q.log_share)
    d = np.where(both[:, None], d, plain)
    # r of both from that of one which P and Q share, the heavier one.
    weight = np.where(two_sided, np.nan_to_num(p.share + q.share), -1.0)
    base = np.where(weight[:, 1] > weight[:, 0], 1, 0)[:, None]
    chosen = [np.take_along_axis(each, base, axis=-1)[:, 0] for each in (p.largest, q.largest)]
    moved = _distance(
        np.stack([chosen[0], p.merged_max], axis=-1),
        np.stack([chosen[1], q.merged_max], axis=-1),
        temperatures,
        probabilities,
    )
    merged = np.take_along_axis(ratio - d, base, axis=-1)[:, 0] + moved
    merged = np.where(two_sided.any(axis=-1), merged, p.merged_log_sum - q.merged_log_sum)
    return _Parts(p, q, d, merged)


# The rules, each with the values of a measure in both parts, shape (rows, 2)


def _weighted(weight: Array, value: Array) -> Array:
    """sum weight value, where a weight of 0 makes 0 of anything."""
    total: Array = np.sum(np.where(weight == 0.0, 0.0, weight * value), axis=-1)
    return total


def _log1p_or(excess: Array, far: Array) -> Array:
    """The logarithm of a sum, from what the sum exceeds 1 by where it is near 1."""
    return np.where(np.abs(far) < 0.5, np.log1p(np.maximum(excess, -1.0)), far)


def _kl_rule(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
    return _weighted(parts.p.share, values) + _kl(parts.pair)


def _reverse_kl_rule(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
    assert parts.q is not None
    return _weighted(parts.q.share, values) + _kl(parts.pair.swapped)


def _hellinger2(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
    pair = parts.pair
    within = _weighted(np.exp(0.5 * (pair.log_p + pair.log_q)), values)
    between: Array = np.sum(0.5 * pair.larger * np.expm1(-0.5 * np.abs(pair.d)) ** 2, axis=-1)
    return within + between


def _renyi(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
    (alpha,) = parameters
    pair = parts.pair
    if alpha == 0.0:
        # The Q-mass within and without P's support.
        values = np.where(parts.p.empty, np.inf, values)
        outside = _weighted(pair.q, -np.expm1(-values))
        inside = np.logaddexp.reduce(pair.log_q - values, axis=-1)
        return np.where(outside < 0.5, -np.log1p(-outside), -inside)
    turned, beta = _oriented(pair, alpha)
    exponent = turned.log_p + _multiple(beta, turned.d)  # log(w^alpha z^(1-alpha))
    exponent = np.where(turned.log_p == -np.inf, -np.inf, exponent)
    log_sums = (alpha - 1.0) * values
    weight = np.exp(exponent)
    # One of the factors may be out of range where their product is not.
    change = np.where(
        log_sums < 1.0, weight * np.expm1(log_sums), np.exp(exponent + log_sums) - weight
    )
    nothing = (log_sums == 0.0) | (exponent == -np.inf)
    within = np.sum(np.where(nothing, 0.0, change), axis=-1)
    excess = _excess(pair, alpha) + within
    far = np.logaddexp.reduce(np.where(exponent == -np.inf, -np.inf, exponent + log_sums), axis=-1)
    return np.maximum(_log1p_or(excess, far) / (alpha - 1.0), 0.0)


def _entropy(side: _Side, values: Array) -> Array:
    return _weighted(side.share, values - side.log_share)


def _renyi_entropy(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
    (alpha,) = parameters
    beta, side = alpha - 1.0, parts.p
    excess = _weighted(side.share, np.expm1(beta * (side.log_share - values)))
    exponent = alpha * side.log_share - beta * values
    exponent = np.where(side.empty, -np.inf, exponent)
    far = np.logaddexp.reduce(exponent, axis=-1)
    return np.maximum(_log1p_or(excess, far) / -beta, 0.0)


def _surprise(side: _Side, values: Array) -> Array:
    surprise: Array = np.min(np.where(side.empty, np.inf, values - side.log_share), axis=-1)
    return surprise


def _index(side: _Side, values: Array) -> Array:
    """Of the part with the larger entry; of equal ones the first index."""
    a, b = side.largest.T
    first = np.minimum(values[:, 0], values[:, 1])
    return np.where(a > b, values[:, 0], np.where(b > a, values[:, 1], first))


def _with_top_ratio(
    p: Array, q: Array, temperatures: tuple[float, float], probabilities: bool
) -> NDArray[np.int64]:
    """The part whose entries have the larger log(p/q), of those in the support of P."""
    rank = np.where(p == -np.inf, 0, np.where(q == -np.inf, 2, 1))
    ahead = _distance(p, q, temperatures, probabilities)
    first = np.where(rank[:, 0] == rank[:, 1], ahead >= 0.0, rank[:, 0] > rank[:, 1])
    return np.where(first, 0, 1)[:, None]


def _only(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
    """Of one part, which has been chosen."""
    return values[:, 0]


def _of(side: str, rule: Callable[[_Side, Array], Array]) -> Callable[..., Array]:
    def of_side(parts: _Parts, values: Array, parameters: tuple[float, ...]) -> Array:
        chosen = parts.p if side == "p" else parts.q
        assert chosen is not None
        return rule(chosen, values)

    return of_side


_RULES: dict[str, Callable[[_Parts, Array, tuple[float, ...]], Array]] = {
    "kl": _kl_rule,
    "reverse_kl": _reverse_kl_rule,
    "hellinger2": _hellinger2,
    "renyi": _renyi,
    "log_power": _renyi,
    "entropy_p": _of("p", _entropy),
    "entropy_q": _of("q", _entropy),
    "renyi_entropy": _renyi_entropy,
    "nll_p": _of("p", _surprise),
    "nll_q": _of("q", _surprise),
    "top_ratio_p": _only,
    "top_ratio_q": _only,
    "top_index_p": _of("p", _index),
    "top_index_q": _of("q", _index),
}


def merge(
    first: Array,
    second: Array,
    sides: int,
    measures: tuple[Measure, ...],
    temperatures: tuple[float, float],
    probabilities: bool,
) -> Array:
    """The state of two parts together, from theirs, of the same shape (rows, columns)."""
    with np.errstate(all="ignore"):  # infinities and NaN are data here
        states = np.stack([first, second], axis=-1)
        count = len(HEADER[sides])
        parts = _parts(np.moveaxis(states[:, :count], 1, 0), temperatures, probabilities)
        columns = [parts.p.merged_max, parts.p.merged_log_sum]
        if parts.q is not None:
            columns += [parts.q.merged_max, parts.q.merged_log_sum, parts.log_ratio]
        known = dict(zip(measures, np.moveaxis(states[:, count:], 1, 0), strict=True))
        if TOP_RATIO[0] in known:
            p, q = (known[each] for each in TOP_RATIO)
            chosen = _with_top_ratio(p, q, temperatures, probabilities)
            for each in TOP_RATIO:
                known[each] = np.take_along_axis(known[each], chosen, axis=-1)
        for measure, values in known.items():
            columns.append(_RULES[measure.name](parts, values, measure.parameters))
        return np.stack(columns, axis=-1)


# What a whole row's state says


def value_of(
    name: str,
    parameters: tuple[float, ...],
    columns: dict[str, Array],
    values: dict[Measure, Array],
    temperatures: tuple[float, float],
    probabilities: bool,
) -> Array:
    """The value of an operation of one phase, in nats; NaN is put where it belongs elsewhere."""
    of = [values[measure] for measure in needed(name, parameters)]
    if name == "renyi" and parameters[0] == math.inf:
        p, q = (np.stack([each, columns[f"max_{side}"]], axis=-1)
                for side, each in zip("pq", of, strict=True))  # fmt: skip
        ratio = _distance(p, q, temperatures, probabilities) - columns["log_ratio"]
        return np.where(of[1] == -np.inf, np.inf, np.maximum(ratio, 0.0))
    if name in ("jeffreys", "cross_entropy"):
        return of[0] + of[1]
    if name in ("alpha", "tsallis", "chi2"):
        order = 2.0 if name == "chi2" else parameters[0]
        if order == 1.0 or (name == "alpha" and order < _TINY):
            return of[0]
        scale = 1.0 if name == "chi2" else order - 1.0
        if name == "alpha":
            scale *= order
        return np.expm1((order - 1.0) * of[0]) / scale + 0.0
    if name == "logsumexp":
        largest = columns["max_p"]
        largest = np.log(largest) if probabilities else largest
        return largest / temperatures[0] + columns["log_sum_p"]
    if name == "top_p":
        return np.exp(-columns["log_sum_p"])
    if name == "renyi_entropy" and not of:
        return columns["log_sum_p"]
    if name == "token_log_probs":
        return 0.0 - of[0]
    if name == "delta_prob":
        return np.exp(-of[1]) - np.exp(-of[0])
    if name == "same_top":
        return np.where(of[0] == of[1], 1.0, 0.0)
    return of[0]

"""Float64 NumPy reference of every function of klfast, readable like its formula.

Every function takes array-likes of any floating dtype (bfloat16 of ml_dtypes included), converts
them exactly to float64, broadcasts the batch axes and returns float64 in nats, one value a row.
P = softmax(p / T) and Q = softmax(q / T) along ``axis``; keywords, common to all functions:

- ``axis``: the vocabulary axis, default -1;
- ``temperature``: T > 0, or for two rows a pair (T_p, T_q), default 1;
- ``input``: "logits", "log_probs" (normalized again) or "probs" (weights, normalized again).

A row that holds NaN or +inf, that is all -inf (all zero for "probs"), or that has a negative
weight gives NaN. Arguments are not checked here: the public functions do that.

Notation: a = log p, b = log q, d = a - b. As P and Q both sum to 1, every divergence is a sum of
terms that are each >= 0. They are written that way, so that the relative accuracy does not depend
on the size of the result: about 1e-14, and 1e-15 * log(result) for results that are exponentials
of large exponents. Nothing here is shared with the kernels, which are held against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_LARGEST = float(np.finfo(np.float64).max)
_Arguments = ParamSpec("_Arguments")


class RowOptions(TypedDict, total=False):
    """Keywords of the functions of one batch of rows."""

    axis: int
    temperature: float
    input: str


class PairOptions(TypedDict, total=False):
    """Keywords of the functions of two batches of rows."""

    axis: int
    temperature: float | tuple[float, float]
    input: str


def _silent(function: Callable[_Arguments, Array]) -> Callable[_Arguments, Array]:
    """Infinities and NaN are data here: no floating-point warning leaves ``function``."""

    @wraps(function)
    def silenced(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Array:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return silenced


# Elementary functions that do not cancel


def _phi(t: Array) -> Array:
    """exp(t) - 1 - t; by its Taylor series where abs(t) < 1, as the difference cancels there."""
    small = np.clip(t, -1.0, 1.0)
    series = np.zeros_like(small)
    for k in range(19, 1, -1):
        series = series * small + 1.0 / math.factorial(k)
    return np.where(np.abs(t) < 1.0, series * small * small, np.expm1(t) - t)


def _scaled_expm1(log_p: Array, t: Array) -> Array:
    """p (exp(t) - 1), also where exp(t) overflows or p underflows; 0 where p = 0."""
    p = np.exp(log_p)
    far = np.exp(np.where(log_p == -np.inf, -np.inf, log_p + t)) - p
    return np.where(np.abs(t) < 1.0, p * np.expm1(t), far)


def _scaled_phi(log_p: Array, t: Array) -> Array:
    """p (exp(t) - 1 - t), also where exp(t) overflows or p underflows."""
    p = np.exp(log_p)
    return np.where(np.abs(t) < 1.0, p * _phi(t), _scaled_expm1(log_p, t) - _weighted(p, t))


def _weighted(p: Array, value: Array) -> Array:
    """p value, where 0 times infinity is 0."""
    return np.where(p == 0.0, 0.0, p * value)


def _multiple(factor: float, value: Array) -> Array:
    """factor value, where a factor of +0 or -0 times infinity is the limit of small factors."""
    limit = math.copysign(math.inf, factor) * np.sign(value)
    return np.where(np.isinf(value), limit, factor * value)


def _kl_terms(p: Array, q: Array, d: Array) -> Array:
    """p log(p/q) - p + q >= 0, where d = log(p/q)."""
    return np.where(np.abs(d) < 1.0, p * _phi(-d), q - p + _weighted(p, d))


def _difference_error(minuend: Array, subtrahend: Array) -> Array:
    """What the rounding of ``minuend - subtrahend`` took away (Knuth's exact difference)."""
    difference = minuend - subtrahend
    virtual = difference - minuend
    error = (minuend - (difference - virtual)) - (subtrahend + virtual)
    return np.where(np.isfinite(error), error, 0.0)


def _product_error(left: Array, right: Array) -> Array:
    """What the rounding of ``left * right`` took away (Dekker's exact product)."""
    left_high, right_high = _leading_half(left), _leading_half(right)
    left_low, right_low = left - left_high, right - right_high
    error = left_high * right_high - left * right
    error = error + left_high * right_low + left_low * right_high + left_low * right_low
    return np.where(np.isfinite(error), error, 0.0)


def _leading_half(value: Array) -> Array:
    """The leading 26 of the 53 bits; by their mask, as Veltkamp's product would overflow."""
    return (value.view(np.int64) & -(1 << 27)).view(np.float64)


def _log_share(weights: Array, largest: Array) -> Array:
    """log(weights / largest), accurate also next to 1 and where the quotient underflows."""
    share = weights / largest
    near = np.log1p((weights - largest) / largest)
    far = np.where(share > 1e-290, np.log(share), np.log(weights) - np.log(largest))
    return np.where(share > 0.5, near, far)


# Rows


@dataclass(frozen=True, slots=True)
class _Rows:
    """One batch of rows, shifted by their maxima: log p = shifted - log_sum."""

    shifted: Array  # (..., V), (x - max x) / T <= 0
    tail: Array  # (..., V), what rounding took from shifted; differences need it
    log_sum: Array  # (..., 1), log(sum exp(shifted)) >= 0
    maximum: Array  # (..., 1), log of the largest weight over T
    given: Array  # (..., V), as the user gave them
    valid: NDArray[np.bool_]  # (...)
    temperature: float

    @property
    def log_p(self) -> Array:
        return self.shifted - self.log_sum

    def result(self, value: Array, upper: float = math.inf) -> Array:
        return _checked(value, self.valid, upper)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two batches of rows and the logarithm d of their ratio."""

    log_p: Array
    log_q: Array
    d: Array  # +inf where only q = 0, -inf where only p = 0, 0 outside both supports
    valid: NDArray[np.bool_]
    log_ratio: Array | float = 0.0  # (..., 1), of the sums of exp(shifted)

    @property
    def p(self) -> Array:
        return np.exp(self.log_p)

    @property
    def q(self) -> Array:
        return np.exp(self.log_q)

    @property
    def larger(self) -> Array:
        """max(p, q), of which the smaller one is the multiple exp(-abs(d))."""
        return np.exp(np.maximum(self.log_p, self.log_q))

    @property
    def swapped(self) -> _Pair:
        return _Pair(self.log_q, self.log_p, -self.d, self.valid, -self.log_ratio)

    def total(self, terms: Array, upper: float = math.inf) -> Array:
        return self.result(np.sum(terms, axis=-1), upper)

    def result(self, value: Array, upper: float = math.inf) -> Array:
        return _checked(value, self.valid, upper)


def _checked(value: Array, valid: NDArray[np.bool_], upper: float) -> Array:
    """``value`` without the last rounding past its bounds, and NaN for rows that are not valid."""
    return np.where(valid, np.clip(value, 0.0, upper) + 0.0, np.nan)  # + 0.0 turns -0.0 into 0.0


def _rows(x: ArrayLike, axis: int = -1, temperature: float = 1.0, input: str = "logits") -> _Rows:
    given = np.ascontiguousarray(np.moveaxis(np.asarray(x).astype(np.float64), axis, -1))
    largest = np.max(given, axis=-1, keepdims=True)
    valid = np.isfinite(largest)
    if input == "probs":
        valid &= (largest > 0.0) & (np.min(given, axis=-1, keepdims=True) >= 0.0)
    largest = np.where(valid, largest, np.nan)

    if input == "probs":
        maximum = np.log(largest) / temperature
        shifted = _log_share(given, largest) / temperature
        tail = np.zeros_like(shifted)
    else:
        maximum = largest / temperature
        shifted, tail = _divided(
            given - largest, _difference_error(given, largest), np.float64(temperature)
        )
        # A finite logit stays one, however far below the maximum it is.
        shifted = np.where(given == -np.inf, shifted, np.maximum(shifted, -_LARGEST))

    # Without the top entry's own 1, so that log p of an entry near 1 keeps its digits.
    weights = np.exp(shifted)
    np.put_along_axis(weights, np.argmax(given, axis=-1)[..., None], 0.0, axis=-1)
    log_sum = np.log1p(np.sum(weights, axis=-1, keepdims=True))
    return _Rows(shifted, tail, log_sum, maximum, given, valid[..., 0], temperature)


def _divided(value: Array, tail: Array, divisor: np.float64) -> tuple[Array, Array]:
    """(value + tail) / divisor as a rounded quotient and what the rounding took away."""
    quotient = value / divisor
    remainder = (value - quotient * divisor) - _product_error(quotient, np.asarray(divisor)) + tail
    return quotient, np.where(np.isfinite(remainder), remainder / divisor, 0.0)


def _below(given: Array) -> tuple[Array, Array]:
    """How far each entry is from its row's largest, and what rounding took from that."""
    largest = np.max(given, axis=-1, keepdims=True)
    tail = _difference_error(given, largest)
    return given - largest, np.where(np.isfinite(tail), tail, 0.0)


def _both(
    p: ArrayLike,
    q: ArrayLike,
    axis: int = -1,
    temperature: float | tuple[float, float] = 1.0,
    input: str = "logits",
) -> tuple[_Rows, _Rows]:
    if axis >= 0:  # counted in the broadcast shape; from the end it is the same in both arrays
        axis -= max(np.ndim(p), np.ndim(q))
    temperature_p, temperature_q = np.broadcast_to(temperature, 2).tolist()
    return _rows(p, axis, temperature_p, input), _rows(q, axis, temperature_q, input)


def _pair(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> _Pair:
    first, second = _both(p, q, **options)
    log_p, log_q = np.broadcast_arrays(first.log_p, second.log_p)

    difference = (first.shifted - second.shifted) + (first.tail - second.tail)
    if first.temperature == second.temperature:
        # One division is better than two, and weights are better than their logarithms.
        if options.get("input") == "probs":
            close = _log_ratio_of_weights(first.given, second.given)
        else:
            (p_below, p_tail), (q_below, q_tail) = _below(first.given), _below(second.given)
            close = (p_below - q_below) + (p_tail - q_tail)
        close = close / first.temperature
        difference = np.where(np.isfinite(close), close, difference)

    # The difference of the two rounded log_sum is only a first estimate of the normalizers'
    # difference. What it misses is log(sum p / sum q) of the p and q it leads to, and that is
    # sum (p - q), taken from d itself; once more, because the first correction may cancel nearly
    # all of d. Every step only changes its sign when P and Q change places, which makes the
    # symmetric divergences symmetric to the bit.
    log_ratio = first.log_sum - second.log_sum
    d = difference - log_ratio
    in_p, in_q = log_p > -np.inf, log_q > -np.inf
    one_sided = np.where(in_p, np.inf, np.where(in_q, -np.inf, 0.0))
    d = np.where(in_p & in_q, np.clip(d, -_LARGEST, _LARGEST), one_sided)
    larger = np.exp(np.maximum(log_p, log_q))
    for _ in range(2):
        missed = np.sum(-np.sign(d) * larger * np.expm1(-np.abs(d)), axis=-1, keepdims=True)
        d = np.where(in_p & in_q, d - missed, d)
        log_ratio = log_ratio + missed
    return _Pair(log_p, log_q, d, first.valid & second.valid, log_ratio)


def _log_ratio_of_weights(w: Array, v: Array) -> Array:
    """log((w / max w) / (v / max v)) where it is small, NaN elsewhere.

    From w max v - v max w with exact products: two rows of weights that differ by a factor and
    by a little more cancel neither in the weights nor in their logarithms.
    """
    w, v = _scaled(w), _scaled(v)
    w_max, v_max = np.max(w, axis=-1, keepdims=True), np.max(v, axis=-1, keepdims=True)
    return _log_ratio_of_products(w, v_max, v, w_max)


def _log_ratio_of_products(a: Array, b: Array, c: Array, d: Array) -> Array:
    """log(a b / (c d)) where it is small, NaN elsewhere."""
    left, right = a * b, c * d
    smaller = np.minimum(left, right)
    difference = (left - right) + (_product_error(a, b) - _product_error(c, d))
    ratio = np.abs(difference) / (left + right)
    log_ratio = np.copysign(2.0 * np.arctanh(ratio), difference)
    return np.where((np.abs(difference) < 0.5 * smaller) & (smaller > 1e-280), log_ratio, np.nan)


def _scaled(weights: Array) -> Array:
    """Each row over the power of two next to its maximum, so that products do not overflow."""
    _, exponent = np.frexp(np.max(weights, axis=-1, keepdims=True))
    scaled: Array = np.ldexp(weights, -exponent)
    return scaled


# Divergences of two rows


@_silent
def kl_divergence(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """KL(P, Q) = sum p d, as sum p (exp(-d) - 1 + d). Kullback and Leibler (1951)."""
    return _kl(_pair(p, q, **options))


def _kl(pair: _Pair) -> Array:
    # Where only q = 0 the term is infinite, though p may underflow.
    return pair.total(np.where(pair.d == np.inf, np.inf, _kl_terms(pair.p, pair.q, pair.d)))


@_silent
def jeffreys_divergence(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """KL(P, Q) + KL(Q, P), as sum max(p, q) (1 - exp(-|d|)) |d|. Jeffreys (1946)."""
    pair = _pair(p, q, **options)
    tau = np.abs(pair.d)
    terms = _weighted(-pair.larger * np.expm1(-tau), tau)
    return pair.total(np.where(tau == np.inf, np.inf, terms))


@_silent
def js_divergence(
    p: ArrayLike, q: ArrayLike, weight: float = 0.5, **options: Unpack[PairOptions]
) -> Array:
    """w KL(P, M) + (1-w) KL(Q, M) with M = w P + (1-w) Q and w = weight in [0, 1]. Lin (1991)."""
    return _js(_pair(p, q, **options), weight)


def _js(pair: _Pair, weight: float) -> Array:
    w, other = float(weight), 1.0 - float(weight)
    if w == 0.0 or other == 0.0:
        return pair.total(np.zeros_like(pair.d))
    log_w, log_other = math.log(w), math.log1p(-w)
    mixture = w * pair.p + other * pair.q
    log_p_over_m = -_log_mixture_over(log_w, log_other, other, pair.d)
    log_q_over_m = -_log_mixture_over(log_other, log_w, w, -pair.d)
    terms_p = w * _kl_terms(pair.p, mixture, log_p_over_m)
    terms_q = other * _kl_terms(pair.q, mixture, log_q_over_m)
    return pair.total(terms_p + terms_q, upper=-w * log_w - other * log_other)


def _log_mixture_over(log_w: float, log_other: float, other: float, d: Array) -> Array:
    """log(m/p) = log(w + (1-w) exp(-d)) for m = w p + (1-w) q, d = log(p/q) and other = 1-w."""
    near = np.log1p(other * np.expm1(-d))
    return np.where(np.abs(d) < 1.0, near, np.logaddexp(log_w, log_other - d))


@_silent
def renyi_divergence(
    p: ArrayLike, q: ArrayLike, alpha: float, **options: Unpack[PairOptions]
) -> Array:
    """log(S) / (alpha-1) with S = sum p^alpha q^(1-alpha), 0 <= alpha <= inf. Renyi (1961).

    Order 0 is -log of the Q-mass of P's support, 1 is KL(P, Q), inf is the maximum of d over P's
    support (van Erven and Harremoes, 2014).
    """
    pair = _pair(p, q, **options)
    if alpha == 1.0:
        return _kl(pair)
    if alpha == math.inf:
        return pair.result(_largest_ratio(pair))
    excess = _excess(pair, alpha)
    near = np.log1p(excess) / (alpha - 1.0)
    turned, beta = _oriented(pair, alpha)
    scale = max(1.0, abs(beta))
    exponent = turned.log_p / scale + _multiple(beta / scale, turned.d)
    exponent = np.where(turned.log_p == -np.inf, -np.inf, exponent)
    far = _log_sum_exp(exponent, scale) * (scale / (alpha - 1.0))
    return pair.result(np.where(np.abs(excess) < 0.5, near, far))


@_silent
def alpha_divergence(
    p: ArrayLike, q: ArrayLike, alpha: float, **options: Unpack[PairOptions]
) -> Array:
    """(S-1) / (alpha (alpha-1)), S as for Renyi. Cichocki and Amari (2010).

    The limits are KL(P, Q) at alpha = 1 and KL(Q, P) at alpha = 0.
    """
    pair = _pair(p, q, **options)
    if alpha in (0.0, 1.0):
        return _kl(pair if alpha == 1.0 else pair.swapped)
    if alpha == math.inf:
        return pair.result(_infinite_unless_equal(pair))
    return pair.result(_excess(pair, alpha) / (alpha - 1.0) / alpha)


@_silent
def tsallis_divergence(
    p: ArrayLike, q: ArrayLike, alpha: float, **options: Unpack[PairOptions]
) -> Array:
    """(S-1) / (alpha-1), S as for Renyi; KL(P, Q) at alpha = 1. Tsallis (1998)."""
    pair = _pair(p, q, **options)
    if alpha == 1.0:
        return _kl(pair)
    if alpha == math.inf:
        return pair.result(_infinite_unless_equal(pair))
    return pair.result(_excess(pair, alpha) / (alpha - 1.0))


def _excess(pair: _Pair, alpha: float) -> Array:
    """S - 1 = sum p [expm1(beta d) + beta expm1(-d)], beta = alpha - 1; each term has beta's sign.

    With phi(t) = expm1(t) - t the bracket is phi(beta d) + beta phi(-d), which loses no digits
    where d is small.
    """
    pair, beta = _oriented(pair, alpha)
    scaled = _multiple(beta, pair.d)
    near = _scaled_phi(pair.log_p, scaled) + beta * pair.p * _phi(-pair.d)
    far = _scaled_expm1(pair.log_p, scaled) + beta * (pair.q - pair.p)
    total: Array = np.sum(np.where(np.abs(pair.d) < 1.0, near, far), axis=-1)
    return np.clip(total, 0.0, np.inf) if alpha > 1.0 else np.clip(total, -1.0, 0.0)


def _oriented(pair: _Pair, alpha: float) -> tuple[_Pair, float]:
    """The pair and the beta >= -1/2 with S = sum p exp(beta d).

    S of (P, Q) at alpha is S of (Q, P) at 1 - alpha. Below -1/2, the two parts of a term cancel.
    """
    return (pair, alpha - 1.0) if alpha >= 0.5 else (pair.swapped, -float(alpha))


def _log_sum_exp(exponent: Array, scale: float) -> Array:
    """log(sum exp(scale * exponent)) / scale, where scale * exponent may overflow."""
    largest: Array = np.max(exponent, axis=-1)
    rest: Array = np.log(np.sum(np.exp(scale * (exponent - largest[..., None])), axis=-1)) / scale
    return np.where(np.isinf(largest), largest, largest + rest)


def _largest_ratio(pair: _Pair) -> Array:
    """The maximum of log(p/q) over the support of P; it is not negative."""
    largest: Array = np.max(np.where(pair.log_p == -np.inf, -np.inf, pair.d), axis=-1)
    return np.maximum(largest, 0.0)


def _infinite_unless_equal(pair: _Pair) -> Array:
    """What (S-1) / (alpha-1) and (S-1) / (alpha (alpha-1)) tend to for alpha to infinity."""
    return np.where(_largest_ratio(pair) > 0.0, np.inf, 0.0)


@_silent
def total_variation(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """sum |p - q| / 2, as sum max(p, q) (1 - exp(-|d|)) / 2."""
    return _total_variation(_pair(p, q, **options))


def _total_variation(pair: _Pair) -> Array:
    return pair.total(-0.5 * pair.larger * np.expm1(-np.abs(pair.d)), upper=1.0)


@_silent
def squared_hellinger(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """sum (sqrt p - sqrt q)^2 / 2, as sum max(p, q) (1 - exp(-|d|/2))^2 / 2. Hellinger (1909)."""
    pair = _pair(p, q, **options)
    return pair.total(0.5 * pair.larger * np.expm1(-0.5 * np.abs(pair.d)) ** 2, upper=1.0)


@_silent
def chi2_divergence(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """sum (p - q)^2 / q = sum q expm1(d)^2. Pearson (1900)."""
    pair = _pair(p, q, **options)
    # For d > 0 from p exp(d): q expm1(d)^2 = p exp(d) expm1(-d)^2.
    log_scale = np.maximum(pair.log_p, pair.log_q) + np.maximum(pair.d, 0.0)
    return pair.total(np.exp(log_scale) * np.expm1(-np.abs(pair.d)) ** 2)


@_silent
def cross_entropy(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """-sum p log q."""
    pair = _pair(p, q, **options)
    return pair.total(np.where(pair.d == np.inf, np.inf, -_weighted(pair.p, pair.log_q)))


# Functions of one row


@_silent
def entropy(p: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """-sum p log p. Shannon (1948)."""
    return _entropy(_rows(p, **options))


def _entropy(rows: _Rows) -> Array:
    log_p = rows.log_p
    terms = -_weighted(np.exp(log_p), log_p)
    return rows.result(np.sum(terms, axis=-1), upper=math.log(log_p.shape[-1]))


@_silent
def renyi_entropy(p: ArrayLike, alpha: float, **options: Unpack[RowOptions]) -> Array:
    """log(sum p^alpha) / (1-alpha), 0 <= alpha <= inf. Renyi (1961).

    Order 0 is the log of the size of the support, 1 is the entropy, inf is -log max p.
    """
    rows = _rows(p, **options)
    if alpha == 1.0:
        return _entropy(rows)
    if alpha == math.inf:
        return rows.result(rows.log_sum[..., 0])
    log_p, beta = rows.log_p, alpha - 1.0
    p, tilt, scale = np.exp(log_p), beta * log_p, max(1.0, alpha)
    # alpha log p, and not log p + tilt, which cancels where alpha is small
    exponent = np.where(log_p == -np.inf, -np.inf, (alpha / scale) * log_p)
    terms = np.where(np.abs(tilt) < 1.0, p * np.expm1(tilt), np.exp(scale * exponent) - p)
    excess = np.sum(terms, axis=-1)  # sum p^alpha - 1
    far = _log_sum_exp(exponent, scale) * (scale / -beta)
    value = np.where(np.abs(excess) < 0.5, np.log1p(excess) / -beta, far)
    return rows.result(value, upper=math.log(log_p.shape[-1]))


@_silent
def logsumexp(x: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """log(sum exp(x / T))."""
    rows = _rows(x, **options)
    return (rows.maximum + rows.log_sum)[..., 0]


@_silent
def log_softmax(x: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """log p of every entry: x / T - logsumexp(x / T), in the shape of x."""
    return np.moveaxis(_rows(x, **options).log_p, -1, options.get("axis", -1))


@_silent
def token_log_probs(logits: ArrayLike, tokens: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """log p[tokens], with one token index a row."""
    return _at(_rows(logits, **options).log_p, tokens)


def _at(values: Array, tokens: ArrayLike) -> Array:
    """The entry of each row that ``tokens`` names; tokens and rows broadcast."""
    index = np.asarray(tokens)[..., None]
    shape = np.broadcast_shapes(values.shape[:-1], index.shape[:-1])
    values = np.broadcast_to(values, (*shape, values.shape[-1]))
    return np.take_along_axis(values, np.broadcast_to(index, (*shape, 1)), axis=-1)[..., 0]


# Measures that only `compare` has


@_silent
def nll(logits: ArrayLike, tokens: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """-log p[tokens]."""
    return 0.0 - _at(_rows(logits, **options).log_p, tokens)


@_silent
def delta_prob(
    p: ArrayLike, q: ArrayLike, tokens: ArrayLike, **options: Unpack[PairOptions]
) -> Array:
    """q[tokens] - p[tokens]: how much more probable Q makes the token than P."""
    pair = _pair(p, q, **options)
    change = np.sign(pair.d) * pair.larger * np.expm1(-np.abs(pair.d))
    return np.where(pair.valid, _at(change, tokens) + 0.0, np.nan)


@_silent
def top_p(p: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """The largest probability of P."""
    rows = _rows(p, **options)
    return rows.result(np.exp(-rows.log_sum[..., 0]))


@_silent
def same_top(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """1 where P and Q have their (first) largest entry at the same index, else 0."""
    first, second = _both(p, q, **options)
    same = np.argmax(first.given, axis=-1) == np.argmax(second.given, axis=-1)
    return _checked(same, first.valid & second.valid, 1.0)


@_silent
def topk_overlap(p: ArrayLike, q: ArrayLike, k: int, **options: Unpack[PairOptions]) -> Array:
    """The share of the k largest entries of P that are among the k largest of Q; ties go first."""
    first, second = _both(p, q, **options)
    common = _among_largest(first.given, k) & _among_largest(second.given, k)
    return _checked(np.sum(common, axis=-1) / k, first.valid & second.valid, 1.0)


def _among_largest(values: Array, k: int) -> NDArray[np.bool_]:
    """Where the k largest entries of each row are; of equal entries the first ones count."""
    order = np.argsort(-values, axis=-1, kind="stable")
    among = np.zeros(values.shape, dtype=np.bool_)
    np.put_along_axis(among, order[..., :k], True, axis=-1)
    return among


# Shards of rows


@_silent
def masses(x: ArrayLike, **options: Unpack[RowOptions]) -> Array:
    """Largest entry m, log(sum exp((x - m) / T)) and the index of m, as a last axis.

    -inf, 0 and -1 where all of a row is -inf; NaN where it is no part of a distribution.
    """
    rows = _rows(x, **options)
    largest = np.max(rows.given, axis=-1)
    empty = largest == (0.0 if options.get("input") == "probs" else -np.inf)
    if options.get("input") == "probs":
        empty &= np.min(rows.given, axis=-1) == 0.0
    found = [largest, rows.log_sum[..., 0], np.argmax(rows.given, axis=-1)]
    if_empty = (-np.inf, 0.0, -1.0)
    columns = [
        np.where(rows.valid, value, np.where(empty, other, np.nan))
        for value, other in zip(found, if_empty, strict=True)
    ]
    return np.stack(columns, axis=-1)


@_silent
def log_ratio(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """The second column of ``masses`` of p less that of q, exact also where they are close."""
    ratio = _pair(p, q, **options).log_ratio
    return np.asarray(ratio)[..., 0]


@_silent
def top_ratio(p: ArrayLike, q: ArrayLike, **options: Unpack[PairOptions]) -> Array:
    """The first index at which log(p/q) is largest, on the support of P."""
    pair = _pair(p, q, **options)
    index = np.argmax(np.where(pair.log_p == -np.inf, -np.inf, pair.d), axis=-1)
    return np.where(pair.valid, index, np.nan)


@_silent
def partial_sum(
    name: str,
    p: ArrayLike,
    q: ArrayLike,
    normalizers: Array,
    *parameters: float,
    **options: Unpack[PairOptions],
) -> Array:
    """The share of these entries in the sum of "tv" or "js" over the whole rows.

    ``normalizers`` has of the whole rows, as a last axis: the first two columns of their
    ``masses``, of p and then of q, and their ``log_ratio``.
    """
    temperature_p, temperature_q = np.broadcast_to(options.get("temperature", 1.0), 2).tolist()
    x, y = np.asarray(p, np.float64), np.asarray(q, np.float64)
    m_p, sum_p, m_q, sum_q, ratio = np.moveaxis(normalizers, -1, 0)[..., None]
    probabilities = options.get("input") == "probs"
    log_p = _relative(x, m_p, temperature_p, probabilities) - sum_p
    log_q = _relative(y, m_q, temperature_q, probabilities) - sum_q
    if temperature_p != temperature_q:
        difference = (log_p + sum_p) - (log_q + sum_q)
    elif probabilities:
        difference = _log_ratio_of_products(x, m_q, y, m_p) / temperature_p
    else:
        difference = (x - m_p) - (y - m_q)
        difference += _difference_error(x, m_p) - _difference_error(y, m_q)
        difference /= temperature_p
    difference = np.where(np.isfinite(difference), difference, (log_p + sum_p) - (log_q + sum_q))
    in_p, in_q = log_p > -np.inf, log_q > -np.inf
    one_sided = np.where(in_p, np.inf, np.where(in_q, -np.inf, 0.0))
    d = np.where(in_p & in_q, np.clip(difference - ratio, -_LARGEST, _LARGEST), one_sided)
    valid = np.logical_and.reduce(np.isfinite(normalizers), axis=-1)
    pair = _Pair(log_p, log_q, d, valid)
    return _js(pair, *parameters) if name == "js" else _total_variation(pair)


def _relative(x: Array, m: Array, temperature: float, probabilities: bool) -> Array:
    """(x - m) / T, or log(x / m) / T; a finite logit stays one, however far below m it is."""
    if probabilities:
        return _log_share(x, m) / temperature
    return np.where(x == -np.inf, x, np.maximum((x - m) / temperature, -_LARGEST))


# Gradients with respect to the logits
#
# Through x, P has the derivative dp_i/dx_j = p_i ([i = j] - p_j) / T, so that a function F of P has
# dF/dx_j = p_j (w_j - sum p w) / T with w = dF/dp. Each is written as p_j (or q_j) times something
# that vanishes with d, so that gradients of close distributions keep their digits. With the tilted
# distribution r = p^alpha q^(1-alpha) / S and log S = (alpha-1) R, R the Renyi divergence,
#
#     r/p = exp((alpha-1) (d - R)),   r/q = exp(alpha d - (alpha-1) R).


@_silent
def gradient(
    name: str,
    p: ArrayLike,
    q: ArrayLike | None = None,
    *parameters: float,
    wrt: str = "q",
    **options: Unpack[PairOptions],
) -> Array:
    """d value / d logits of the row ``wrt``, "p" or "q", for the operation ``name``, of its shape.

    Exactly 0 outside the support of that row, and 0 with respect to P throughout a row whose value
    is infinite and has no derivative; NaN in rows that are no distributions.
    """
    axis, temperature = options.get("axis", -1), options.get("temperature", 1.0)
    divisor = float(np.broadcast_to(temperature, 2)["pq".index(wrt)])
    if q is None:
        rows = _rows(p, axis, divisor, options.get("input", "logits"))
        log_p, valid = rows.log_p, rows.valid
        product = -_weighted(np.exp(log_p), log_p + _entropy(rows)[..., None])
    else:
        pair = _pair(p, q, **options)
        product = _GRADIENTS[name][wrt](pair, *parameters)
        log_p, valid = pair.log_p if wrt == "p" else pair.log_q, pair.valid
    product = np.where(np.isfinite(product) & (log_p > -np.inf), product, 0.0)
    return np.moveaxis(np.where(valid[..., None], product / divisor, np.nan), -1, axis)


def _change(pair: _Pair) -> Array:
    """q - p."""
    return np.sign(pair.d) * pair.larger * np.expm1(-np.abs(pair.d))


def _kl_wrt_p(pair: _Pair) -> Array:
    return _weighted(pair.p, pair.d - _kl(pair)[..., None])


def _jeffreys_wrt_p(pair: _Pair) -> Array:
    return _kl_wrt_p(pair) - _change(pair)


def _js_wrt_p(pair: _Pair, weight: float = 0.5) -> Array:
    if weight in (0.0, 1.0):
        return np.zeros_like(pair.d)
    other = 1.0 - weight
    log_p_over_m = -_log_mixture_over(math.log(weight), math.log1p(-weight), other, pair.d)
    mixture = weight * pair.p + other * pair.q
    divergence = np.sum(_kl_terms(pair.p, mixture, log_p_over_m), axis=-1, keepdims=True)
    return weight * _weighted(pair.p, log_p_over_m - divergence)


def _js_wrt_q(pair: _Pair, weight: float = 0.5) -> Array:
    return _js_wrt_p(pair.swapped, 1.0 - weight)


def _renyi_of(pair: _Pair, alpha: float) -> Array:
    """The Renyi divergence, with an axis to broadcast over the entries."""
    turned, beta = _oriented(pair, alpha)
    excess = _excess(pair, alpha)
    exponent = turned.log_p + _multiple(beta, turned.d)
    exponent = np.where(turned.log_p == -np.inf, -np.inf, exponent)
    log_s = np.where(np.abs(excess) < 0.5, np.log1p(excess), _log_sum_exp(exponent, 1.0))
    divergence: Array = (log_s / (alpha - 1.0))[..., None]
    return divergence


def _tilt_from_p(pair: _Pair, alpha: float) -> Array:
    """(r - p) / (alpha-1); its limit p (d - KL) for alpha = 1."""
    if alpha == 1.0:
        return _kl_wrt_p(pair)
    tilt = (alpha - 1.0) * (pair.d - _renyi_of(pair, alpha))
    return _scaled_expm1(pair.log_p, tilt) / (alpha - 1.0)


def _tilt_from_q(pair: _Pair, alpha: float) -> Array:
    """(q - r) / alpha; its limit q (-d - KL(Q, P)) for alpha = 0."""
    if alpha == 0.0:
        return _kl_wrt_p(pair.swapped)
    if alpha == 1.0:
        return _change(pair)
    tilt = alpha * pair.d - (alpha - 1.0) * _renyi_of(pair, alpha)
    return -_scaled_expm1(pair.log_q, tilt) / alpha


def _renyi_wrt_p(pair: _Pair, alpha: float) -> Array:
    if alpha == math.inf:
        return _at_largest_ratio(pair) - pair.p
    return _multiple(alpha, _tilt_from_p(pair, alpha))


def _renyi_wrt_q(pair: _Pair, alpha: float) -> Array:
    if alpha == math.inf:
        return pair.q - _at_largest_ratio(pair)
    if alpha == 0.0:
        inside = np.where(pair.log_p == -np.inf, 0.0, pair.q)
        total: Array = np.sum(inside, axis=-1, keepdims=True)
        return pair.q - inside / total
    return alpha * _tilt_from_q(pair, alpha)


def _at_largest_ratio(pair: _Pair) -> Array:
    """1 at the first index where d is largest, on the support of P."""
    one = np.zeros_like(pair.d)
    index = np.argmax(np.where(pair.log_p == -np.inf, -np.inf, pair.d), axis=-1)
    np.put_along_axis(one, index[..., None], 1.0, axis=-1)
    return one


def _power_sum(pair: _Pair, alpha: float) -> Array:
    """S."""
    return np.exp((alpha - 1.0) * _renyi_of(pair, alpha)) if alpha != 1.0 else np.ones(1)


def _alpha_wrt_p(pair: _Pair, alpha: float) -> Array:
    if alpha == 0.0:  # KL(Q, P), also where it is infinite
        return -_change(pair)
    return _power_sum(pair, alpha) * _tilt_from_p(pair, alpha)


def _alpha_wrt_q(pair: _Pair, alpha: float) -> Array:
    return _power_sum(pair, alpha) * _tilt_from_q(pair, alpha)


def _tv_wrt_p(pair: _Pair) -> Array:
    sign = 0.5 * np.sign(pair.d)
    mean: Array = np.sum(pair.p * sign, axis=-1, keepdims=True)
    return pair.p * (sign - mean)


def _cross_entropy_wrt_p(pair: _Pair) -> Array:
    value = np.sum(-_weighted(pair.p, pair.log_q), axis=-1, keepdims=True)
    return -_weighted(pair.p, pair.log_q + value)


_GRADIENTS: dict[str, dict[str, Callable[..., Array]]] = {
    "kl": {"p": _kl_wrt_p, "q": _change},
    "reverse_kl": {
        "p": lambda pair: -_change(pair),
        "q": lambda pair: _kl_wrt_p(pair.swapped),
    },
    "jeffreys": {"p": _jeffreys_wrt_p, "q": lambda pair: _jeffreys_wrt_p(pair.swapped)},
    "js": {"p": _js_wrt_p, "q": _js_wrt_q},
    "renyi": {"p": _renyi_wrt_p, "q": _renyi_wrt_q},
    "alpha": {"p": _alpha_wrt_p, "q": _alpha_wrt_q},
    "tsallis": {
        "p": lambda pair, alpha: alpha * _alpha_wrt_p(pair, alpha),
        "q": lambda pair, alpha: alpha * _alpha_wrt_q(pair, alpha),
    },
    "tv": {"p": _tv_wrt_p, "q": lambda pair: _tv_wrt_p(pair.swapped)},
    # A quarter of the alpha-divergence of order 1/2.
    "hellinger2": {
        "p": lambda pair: 0.25 * _alpha_wrt_p(pair, 0.5),
        "q": lambda pair: 0.25 * _alpha_wrt_q(pair, 0.5),
    },
    "chi2": {
        "p": lambda pair: 2.0 * _alpha_wrt_p(pair, 2.0),
        "q": lambda pair: 2.0 * _alpha_wrt_q(pair, 2.0),
    },
    "cross_entropy": {"p": _cross_entropy_wrt_p, "q": _change},
}

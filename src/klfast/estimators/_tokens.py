"""Estimates of KL(P, Q) from tokens that were sampled from P, and from the k largest of each row.

Reinforcement learning from human feedback penalizes a policy P for leaving a reference Q and knows
only the log-probabilities of the tokens that P drew. With r = log p - log q of such a token, each
of the following has KL(P, Q) as its expectation over P, or is close to it where P and Q are close
(Schulman, Approximating KL Divergence, 2020):

    k1 = r,    k2 = r^2 / 2,    k3 = exp(-r) - 1 + r.

k1 is unbiased, of either sign and noisy; k2 is biased and never negative; k3 is unbiased, never
negative and usually the least noisy. All take NumPy arrays, or whatever NumPy makes an array of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["AdaptiveController", "TopKBounds", "kl_from_topk", "sampled_kl"]

Estimator = Literal["k1", "k2", "k3"]


class Sampled(NamedTuple):
    """An estimate for each token, and its derivative with respect to log p of that token."""

    value: NDArray[Any]
    gradient: NDArray[Any]


def sampled_kl(
    log_p: ArrayLike,
    log_q: ArrayLike,
    estimator: Estimator = "k3",
    *,
    clip_log_ratio: float | None = None,
    clip: float | None = None,
) -> Sampled:
    """Estimate KL(P, Q) at each token that was sampled from P, with the estimate's gradient.

    Formula:
        r = log p - log q;  k1 = r,  k2 = r^2 / 2,  k3 = exp(-r) - 1 + r.

    Arguments:
        log_p: log-probabilities of the sampled tokens under P, in nats.
        log_q: those under Q, of a shape that broadcasts with it.
        estimator: "k1", "k2" or "k3".
        clip_log_ratio: limits r to [-clip_log_ratio, clip_log_ratio] first (verl uses 20).
        clip: limits the estimate to [-clip, clip] (verl and OpenRLHF use 10).

    Returns:
        value and gradient (d value / d log p), in float64 if an input is, else in float32. Both
        are finite for every finite input: where exp(-r) would overflow, r is held at the largest
        the dtype allows, and where anything is held or clipped, the gradient is exactly 0. A token
        with log p = log q gives exactly 0, infinite ones included; a token that only Q excludes
        has r = +inf, which is held likewise; NaN stays NaN.

    Raises:
        ValueError: for an unknown estimator, or a clip that is not above 0.

    Source:
        Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"estimator is {estimator!r}; accepted: 'k1', 'k2', 'k3'")
    for name, limit in (("clip_log_ratio", clip_log_ratio), ("clip", clip)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} is {limit!r}; accepted: None, or a number above 0")
    p, q = np.asarray(log_p), np.asarray(log_q)
    dtype = np.float64 if np.float64 in (p.dtype, q.dtype) else np.float32
    p, q = np.broadcast_arrays(p.astype(np.float64), q.astype(np.float64))
    with np.errstate(invalid="ignore"):
        r = np.where(p == q, 0.0, p - q)
    # The square and the exponential of this still fit into the result.
    largest = float(np.finfo(dtype).max)
    reach = {"k1": largest, "k2": math.sqrt(largest), "k3": 0.99 * math.log(largest)}[estimator]
    held = reach if clip_log_ratio is None else min(reach, clip_log_ratio)
    upper = largest if estimator == "k3" and clip_log_ratio is None else held
    inside = (r >= -held) & (r <= upper)
    r = np.clip(r, -held, upper)
    if estimator == "k1":
        value, gradient = r, np.ones_like(r)
    elif estimator == "k2":
        value, gradient = 0.5 * r * r, r
    else:
        # expm1(-r) + r, whose parts cancel where r is small: there by its Taylor series.
        s = np.clip(r, -0.02, 0.02)
        near = s * s * (0.5 - s * (1 / 6 - s * (1 / 24 - s * (1 / 120 - s * (1 / 720 - s / 5040)))))
        gradient = -np.expm1(-r)
        value = np.where(np.abs(r) < 0.02, near, r - gradient)
    if clip is not None:
        inside &= np.abs(value) <= clip
        value = np.clip(value, -clip, clip)
    gradient = np.where(inside | np.isnan(r), gradient, 0.0)
    return Sampled(value.astype(dtype), gradient.astype(dtype))


@dataclass
class AdaptiveController:
    """The coefficient of a KL penalty, steered so that the divergence stays near a target.

    After every batch of n tokens with mean divergence d, the coefficient is multiplied by
    1 + n / horizon * clip(d / target - 1, -0.2, 0.2).

    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.2.
    """

    coefficient: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        for name in ("coefficient", "target", "horizon"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; accepted: a number above 0")

    def update(self, divergence: float, count: int) -> float:
        """Take in the mean divergence of `count` tokens, and return the new coefficient."""
        if not math.isfinite(divergence) or count < 0:
            raise ValueError(
                f"divergence is {divergence!r} of {count!r} tokens; accepted: a finite number, and "
                "a whole number from 0"
            )
        proportional = min(max(divergence / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + proportional * count / self.horizon
        return self.coefficient


class TopKBounds(NamedTuple):
    """What the k largest of two rows tell of KL(P, Q) over the whole vocabulary, one a row."""

    estimate: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def kl_from_topk(
    p_ids: ArrayLike,
    p_logprobs: ArrayLike,
    q_ids: ArrayLike,
    q_logprobs: ArrayLike,
    vocab_size: int,
    *,
    floor: float | None = None,
) -> TopKBounds:
    """KL(P, Q) from the most probable tokens of each row, as serving interfaces give them.

    Let A and B be the given tokens of P and of Q, and C those in both. What is not in C is one
    bucket, with the masses P' = 1 - sum_C p and Q' = 1 - sum_C q:

        estimate = sum_C p log(p/q) + P' log(P'/Q') >= 0,

    the divergence of the two rows with all other tokens made one, which by the data processing
    inequality is never above that of the whole rows. ``lower`` is at least as large: it also uses
    that a token of A that is not in B cannot be more probable under Q than the last one of B.
    Q' is taken larger by what the rounding of the given numbers can have taken from it, so that
    both stay below. ``upper`` holds if no token is less probable under Q than exp(floor): for
    tokens of A outside B then log(p/q) <= log p - floor, and those outside A are no more probable
    than the last of A.

    Arguments:
        p_ids: integers, shape (..., k), the k most probable tokens of each row, each once.
        p_logprobs: their log-probabilities in nats, normalized over the whole vocabulary.
        q_ids: those of Q, of the same batch axes; k may differ.
        q_logprobs: their log-probabilities.
        vocab_size: number of tokens there are.
        floor: the smallest log q that a token can have, or None: then ``upper`` is infinite unless
            the given tokens are all there are.

    Returns:
        estimate, lower and upper in nats, float64, one a row.

    Raises:
        ValueError: for shapes that do not fit, repeated or impossible ids, log-probabilities above
            0 or that add up to more than 1 (by more than 1e-3), or a vocabulary smaller than k.

    Source:
        Cover and Thomas, Elements of Information Theory, 2006, theorem 2.7.1 (log sum inequality).
    """
    p_ids, p_log = _checked("p", p_ids, p_logprobs, vocab_size)
    q_ids, q_log = _checked("q", q_ids, q_logprobs, vocab_size)
    if p_ids.shape[:-1] != q_ids.shape[:-1]:
        raise ValueError(
            f"p_ids and q_ids have shapes {p_ids.shape} and {q_ids.shape}; accepted: the same "
            "batch axes (all but the last)"
        )
    # What rounding of the given numbers can take from the mass of the others.
    slack = q_ids.shape[-1] * float(np.finfo(np.result_type(q_logprobs, np.float16)).eps)
    batch = p_ids.shape[:-1]
    flat = [each.reshape(-1, each.shape[-1]) for each in (p_ids, p_log, q_ids, q_log)]
    rows = [
        _row_bounds(flat[0][i], flat[1][i], flat[2][i], flat[3][i], vocab_size, floor, slack)
        for i in range(len(flat[0]))
    ]
    table = np.array(rows, np.float64).reshape(*batch, 3)
    return TopKBounds(table[..., 0], table[..., 1], table[..., 2])


def _checked(
    side: str, ids: ArrayLike, logprobs: ArrayLike, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    index, log = np.asarray(ids), np.asarray(logprobs).astype(np.float64)
    if index.dtype.kind not in "iu":
        raise ValueError(f"{side}_ids has dtype {index.dtype}; accepted: integers")
    if index.shape != log.shape or index.ndim == 0 or index.shape[-1] == 0:
        raise ValueError(
            f"{side}_ids and {side}_logprobs have shapes {index.shape} and {log.shape}; accepted: "
            "the same, (..., k) with k from 1"
        )
    if index.size and not (index.min() >= 0 and index.max() < vocab_size):
        raise ValueError(
            f"{side}_ids reach from {index.min()} to {index.max()}; accepted: 0 to {vocab_size - 1}"
        )
    ordered = np.sort(index, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{side}_ids repeats a token in a row; accepted: each once")
    if np.isnan(log).any() or (log > 0).any():
        raise ValueError(f"{side}_logprobs holds NaN or a number above 0; accepted: log p <= 0")
    total = np.exp(log).sum(-1)
    if (total > 1 + 1e-3).any():
        raise ValueError(
            f"{side}_logprobs add up to {total.max():.6g} in a row; accepted: at most 1 (normalized"
            " over the whole vocabulary)"
        )
    return index.astype(np.int64), log


def _row_bounds(
    p_ids: NDArray[Any],
    p_log: NDArray[Any],
    q_ids: NDArray[Any],
    q_log: NDArray[Any],
    vocab_size: int,
    floor: float | None,
    slack: float,
) -> tuple[float, float, float]:
    _, in_p, in_q = np.intersect1d(p_ids, q_ids, assume_unique=True, return_indices=True)
    common_p, common_q = p_log[in_p], q_log[in_q]
    only_p = np.delete(p_log, in_p)
    rest_p = max(0.0, -math.fsum([-1.0, *np.exp(common_p)]))
    rest_q = max(0.0, -math.fsum([-1.0, *np.exp(common_q)])) + slack
    common = math.fsum(_term(a, b) for a, b in zip(common_p, common_q, strict=True))
    estimate = max(0.0, common + _bucket(rest_p, rest_q))

    # Of all ways to share out rest_q, the one with the least divergence gives each token the same
    # multiple of its p, except where that is more than the last of B allows: those get that.
    most = math.exp(q_log.min()) if len(q_ids) < vocab_size else 0.0
    mass_p, mass_q, capped = rest_p, rest_q, 0.0
    for log_p in np.sort(only_p)[::-1]:
        p = math.exp(log_p)
        if p == 0.0 or most * mass_p >= p * mass_q:
            break
        capped += _term(float(log_p), math.log(most) if most > 0.0 else -math.inf)
        mass_p, mass_q = max(0.0, mass_p - p), max(0.0, mass_q - most)
    lower = max(estimate, common + capped + _bucket(mass_p, mass_q))

    tail_p = max(0.0, -math.fsum([-1.0, *np.exp(p_log)]))
    if not only_p.size and (len(p_ids) == vocab_size or tail_p == 0.0):
        return estimate, lower, max(lower, estimate)
    if floor is None:
        return estimate, lower, math.inf
    unseen = math.fsum(math.exp(a) * (a - floor) for a in only_p if a > -math.inf)
    highest = float(p_log.min())
    if tail_p > 0.0 and highest > -math.inf:
        unseen += tail_p * (highest - floor)
    return estimate, lower, max(lower, common + unseen)


def _term(log_p: float, log_q: float) -> float:
    """p log(p/q)."""
    return 0.0 if log_p == -math.inf else math.exp(log_p) * (log_p - log_q)


def _bucket(p: float, q: float) -> float:
    """P log(P/Q) of two masses."""
    if p == 0.0:
        return 0.0
    return math.inf if q == 0.0 else p * math.log(p / q)

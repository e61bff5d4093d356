"""Lower bounds of a divergence, or of mutual information, from the scores of a critic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._api import logsumexp
from .._values import check_axis, given
from ._samples import Estimate

__all__ = ["donsker_varadhan", "infonce", "nwj"]

Values = NDArray[np.float64]


def donsker_varadhan(joint: Any, marginal: Any, *, correct_bias: bool = False) -> Estimate:
    """Donsker-Varadhan bound of KL(P, Q) from the scores of a critic on samples of both.

    Formula:
        mean of T over P - log of the mean of exp(T) over Q <= KL(P, Q), with equality for
        T = log(p/q) + constant. With P the joint distribution of two variables and Q the product of
        its marginals, KL(P, Q) is their mutual information.
        correct_bias: the logarithm of a mean of n samples is too small by about 1/n of their
        relative variance, which makes the bound too large. The jackknife takes that away:
        n L - (n-1) mean of the L without one sample, all of them from one log-sum-exp.

    Arguments:
        joint: scores of samples of P, shape (..., n): NumPy arrays, PyTorch tensors or JAX arrays
            on the CPU, numbers or lists.
        marginal: scores of samples of Q, shape (..., m).
        correct_bias: leave-one-out correction of the second term.

    Returns:
        value and standard_error, in nats, of the shape of the batch and the same kind of array; the
        error by the delta method.

    Source:
        Donsker and Varadhan, Asymptotic evaluation of certain Markov process expectations for large
        time IV, 1983; Belghazi et al., Mutual Information Neural Estimation, 2018; Efron, The
        Jackknife, 1982.
    """
    origin = given({"joint": joint, "marginal": marginal})
    a, b = _scores(*origin.values())
    log_sum = _log_sum_exp(b)
    m = b.shape[-1]
    log_mean = log_sum - math.log(m)
    share = np.exp(b - log_sum[..., None])  # of each sample in the mean
    if correct_bias:
        if m < 2:
            raise ValueError("marginal has 1 score; accepted: at least 2, to leave one out")
        without = log_mean[..., None] + np.log1p(-share) + math.log(m / (m - 1))
        log_mean = m * log_mean - (m - 1) * without.mean(-1)
    # The relative variance of the mean of exp(T): that of m share about its mean, 1.
    relative = _variance_of_mean(m * share)
    return Estimate(
        origin.result(a.mean(-1) - log_mean),
        origin.result(np.sqrt(_variance_of_mean(a) + relative)),
    )


def nwj(joint: Any, marginal: Any) -> Estimate:
    """Nguyen-Wainwright-Jordan bound of KL(P, Q): without bias, and with more variance.

    Formula:
        mean of T over P - mean of exp(T - 1) over Q <= KL(P, Q), with equality for
        T = 1 + log(p/q). Arguments and result as `donsker_varadhan`.

    Source:
        Nguyen, Wainwright and Jordan, Estimating divergence functionals and the likelihood ratio by
        convex risk minimization, 2010.
    """
    origin = given({"joint": joint, "marginal": marginal})
    a, b = _scores(*origin.values())
    with np.errstate(over="ignore"):
        weights = np.exp(b - 1.0)
        error = np.sqrt(_variance_of_mean(a) + _variance_of_mean(weights))
        return Estimate(origin.result(a.mean(-1) - weights.mean(-1)), origin.result(error))


def infonce(scores: Any) -> Estimate:
    """InfoNCE bound of the mutual information, from the scores of all pairs of a batch.

    Formula:
        mean over i of [s_ii - log(1/n sum_j exp(s_ij))] <= min(I, log n).

    Arguments:
        scores: s_ij of the critic on (x_i, y_j), shape (..., n, n), the true pairs on the diagonal.

    Returns:
        value and standard_error, in nats, of the shape of the batch and the same kind of array. The
        error takes the rows as independent, which they are nearly.

    Source:
        van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding,
        2018; Poole et al., On Variational Bounds of Mutual Information, 2019.
    """
    origin = given({"scores": scores})
    (s,) = origin.values()
    check_axis("scores", s.shape, 2)
    n = s.shape[-1]
    if s.shape[-2] != n:
        raise ValueError(f"scores has shape {s.shape}; accepted: shape (..., n, n)")
    own = np.diagonal(s, axis1=-2, axis2=-1)
    # The sum holds its own term; rounding must not carry it below.
    terms = math.log(n) - np.maximum(_log_sum_exp(s) - own, 0.0)
    error = np.sqrt(_variance_of_mean(terms))
    return Estimate(origin.result(terms.mean(-1)), origin.result(error))


def _scores(joint: Values, marginal: Values) -> tuple[Values, Values]:
    check_axis("joint", joint.shape)
    check_axis("marginal", marginal.shape)
    return joint, marginal


def _log_sum_exp(x: Values) -> Values:
    result: Values = np.asarray(logsumexp(x))
    return result


def _variance_of_mean(x: Values) -> Values:
    n = x.shape[-1]
    with np.errstate(all="ignore"):
        squares = np.sum((x - x.mean(-1, keepdims=True)) ** 2, -1)
        variance: Values = squares / (n * np.float64(n - 1))
    return variance

"""Lower bounds of a divergence, or of mutual information, from the scores of a critic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._api import chi2_divergence, logsumexp
from .._values import check_axis, check_batches, given
from ._samples import Estimate, mean_and_variance

__all__ = ["donsker_varadhan", "infonce", "nwj"]

Values = NDArray[np.float64]
Scores = NDArray[Any]


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
    a, b = _scores(*origin.arrays())
    mean, variance = _mean(a)
    log_mean, relative = _log_mean(b)
    if correct_bias:
        m = b.shape[-1]
        if m < 2:
            raise ValueError("marginal has 1 score; accepted: at least 2, to leave one out")
        left = _log_left(b.astype(np.float64), log_mean + math.log(m))
        without = log_mean + left.mean(-1) + math.log(m / (m - 1))
        log_mean = m * log_mean - (m - 1) * without
    return Estimate(origin.result(mean - log_mean), origin.result(np.sqrt(variance + relative)))


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
    a, b = _scores(*origin.arrays())
    mean, variance = _mean(a)
    log_mean, relative = _log_mean(b)
    with np.errstate(over="ignore"):
        weight = np.exp(log_mean - 1.0)
        error = np.sqrt(variance + weight * weight * relative)
        return Estimate(origin.result(mean - weight), origin.result(error))


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
    (s,) = origin.arrays()
    check_axis("scores", s.shape, 2)
    n = s.shape[-1]
    if s.shape[-2] != n:
        raise ValueError(f"scores has shape {s.shape}; accepted: shape (..., n, n)")
    own = np.diagonal(s, axis1=-2, axis2=-1).astype(np.float64)
    # The sum holds its own term; rounding must not carry it below.
    terms = math.log(n) - np.maximum(np.asarray(logsumexp(s, dtype="float64")) - own, 0.0)
    mean, variance = _mean(terms)
    return Estimate(origin.result(mean), origin.result(np.sqrt(variance)))


def _log_left(x: Values, total: Values) -> Values:
    """log of the share of the sum of exp(x) that is left without each entry."""
    share = np.exp(x - total[..., None])
    left = np.log1p(-np.minimum(share, 0.5))
    # Of a sum that is nearly all one entry, what is left is summed without that entry.
    for place in zip(*np.nonzero(share > 0.5), strict=True):
        *row, i = place
        others = np.delete(x[tuple(row)], i)
        left[place] = np.logaddexp.reduce(others) - total[tuple(row)]
    return left


def _scores(joint: Scores, marginal: Scores) -> tuple[Scores, Scores]:
    check_axis("joint", joint.shape)
    check_axis("marginal", marginal.shape)
    check_batches(joint=joint.shape[:-1], marginal=marginal.shape[:-1])
    return joint, marginal


def _mean(x: Scores) -> tuple[Values, Values]:
    """The mean over the last axis, and the variance of that mean."""
    return mean_and_variance(given({"x": x, "itself": x}), "mean")


def _log_mean(x: Scores) -> tuple[Values, Values]:
    """The logarithm of the mean of exp(x), and the relative variance of that mean.

    With w the shares of the sum, which are softmax(x), that variance is (m sum w^2 - 1)/(m - 1).
    sum w^2 comes from the log-sum-exp of 2 x. Where it is nearly 1/m, m sum w^2 - 1 is taken as
    what it is, the chi-squared divergence of w from the uniform distribution, which takes longer.
    """
    m = x.shape[-1]
    log_mean = np.asarray(logsumexp(x, dtype="float64")) - math.log(m)
    twice = np.asarray(logsumexp(x, temperature=0.5, dtype="float64")) - math.log(m)
    with np.errstate(all="ignore"):
        spread = np.expm1(twice - 2.0 * log_mean)
        close = spread < 1e-3
        if close.any():
            exact = chi2_divergence(x, np.zeros(m, np.float32), where=close, dtype="float64")
            spread = np.where(close, exact, spread)
        return log_mean, spread / np.float64(m - 1)

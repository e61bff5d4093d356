"""KL from samples: with their log-probabilities, or from the distances to their neighbours."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._dispatch import compiled
from .._elementary import excess
from .._scipy import scipy
from .._values import Given, check_axis, given, plain_rows

__all__ = ["Estimate", "knn_kl", "mean_and_variance", "monte_carlo_kl"]

Values = NDArray[np.float64]

#: From here on neighbours are nearly as far as everything else.
HIGH_DIMENSION = 20


class Estimate(NamedTuple):
    """An estimate and its standard error, the latter from the spread of the samples."""

    value: Any
    standard_error: Any


def monte_carlo_kl(log_p: Any, log_q: Any, estimator: Literal["k1", "k2", "k3"] = "k1") -> Estimate:
    """Estimate KL(P, Q) from log-probabilities (or densities) of samples drawn from P.

    Formula:
        the mean of k1 = r, k2 = r^2 / 2 or k3 = exp(-r) - 1 + r with r = log p - log q, and its
        standard error, sqrt(sum (k - mean)^2 / (n (n-1))).

    Arguments:
        log_p: those of P, shape (..., n), n samples each: NumPy arrays, PyTorch tensors or JAX
            arrays on the CPU, numbers or lists.
        log_q: those of Q at the same samples.
        estimator: "k1" is unbiased; "k3" is too, never negative and less noisy where P and Q are
            close, but has no finite variance where Q is much wider than P; "k2" is biased by the
            third order of r.

    Returns:
        value and standard_error of the shape of the batch, the same kind of array, in float64. A
        sample that Q excludes makes the value infinite; the standard error of one sample is NaN.

    Source:
        Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"estimator is {estimator!r}; accepted: 'k1', 'k2', 'k3'")
    origin = given({"log_p": log_p, "log_q": log_q})
    mean, variance = mean_and_variance(origin, estimator)
    dtype = "float64" if origin.place.kind != "JAX" else origin.dtype
    return Estimate(origin.result(mean, dtype), origin.result(np.sqrt(variance), dtype))


def mean_and_variance(origin: Given, estimator: str) -> tuple[Values, Values]:
    """Mean of an estimator over the last axis of two arrays, and the variance of that mean."""
    views = list(origin.views.values())
    first, second = origin.views
    try:
        shape = np.broadcast_shapes(*(view.shape for view in views))
    except ValueError:
        raise ValueError(
            f"{first} and {second} have shapes {views[0].shape} and {views[1].shape}; accepted: "
            "the same"
        ) from None
    check_axis(first, shape)
    batch, n = shape[:-1], shape[-1]
    kernels = compiled()
    rows = [plain_rows(view, batch, n) for view in views]
    alike = views[0].dtype == views[1].dtype
    if kernels is not None and alike and all(each is not None for each in rows):
        mean, squares = kernels.moments(*rows, estimator)
    else:
        mean, squares = _moments(estimator, *np.broadcast_arrays(*origin.values()))
    with np.errstate(all="ignore"):
        variance = squares / (n * np.float64(n - 1))
    return mean.reshape(batch), variance.reshape(batch)


def _moments(estimator: str, p: Values, q: Values) -> tuple[Values, Values]:
    with np.errstate(all="ignore"):
        r = np.where(p == q, 0.0, p - q)
        if estimator == "mean":
            k = p
        elif estimator == "k1":
            k = r
        elif estimator == "k2":
            k = 0.5 * r * r
        else:  # exp(-r) - 1 + r is the excess of expm1(-r)
            k = np.where(np.abs(r) < 1.0, excess(np.expm1(-r)), np.expm1(-r) + r)
        mean = k.mean(-1)
        return mean, ((k - mean[..., None]) ** 2).sum(-1)


def knn_kl(x: ArrayLike, y: ArrayLike, k: int = 5, *, bias_reduced: bool = False) -> float:
    """Estimate KL(P, Q) from samples x of P and y of Q alone, by distances to neighbours.

    Formula:
        d/n sum log(nu_k(i) / rho_k(i)) + log(m / (n-1)), where rho_k(i) is the distance of x_i to
        its k-th neighbour among the other x, and nu_k(i) that among the y.
        bias_reduced: the ball around x_i is the larger of both, with l_i of the other x in it and
        k_i of the y; d/n sum log(nu_{k_i}(i) / rho_{l_i}(i)) + 1/n sum (psi(l_i) - psi(k_i))
        + log(m / (n-1)).

    Arguments:
        x: samples of P, shape (n, d) or (n,).
        y: samples of Q, shape (m, d) or (m,).
        k: which neighbour; more is less noise and more bias.
        bias_reduced: less bias where the densities differ much, for more time.

    Returns:
        The estimate in nats. It may be negative, as noise is.

    Raises:
        TypeError: for samples that are not real numbers.
        ValueError: for samples that are not finite, too few, or that repeat: the densities that
            the method needs do not exist then.
        ImportError: without SciPy, which the extra "stats" installs.

    Warns:
        UserWarning: for d above 20, where distances hardly differ and the bias is large.

    Source:
        Wang, Kulkarni and Verdú, Divergence Estimation for Multidimensional Densities via
        k-Nearest-Neighbor Distances, 2009, equations 5 and 25.
    """
    samples = {name: _samples(name, each) for name, each in (("x", x), ("y", y))}
    a, b = samples["x"], samples["y"]
    (n, d), m = a.shape, len(b)
    if b.shape[1] != d:
        raise ValueError(f"x and y have {d} and {b.shape[1]} dimensions; accepted: the same number")
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k < min(n, m + 1):
        raise ValueError(
            f"k is {k!r}; accepted: a whole number from 1 to {min(n - 1, m)}, with {n} x and {m} y"
        )
    if d > HIGH_DIMENSION:
        warnings.warn(
            f"knn_kl in {d} dimensions: distances hardly differ there, and the estimate is biased "
            "towards 0",
            stacklevel=2,
        )
    cKDTree = scipy("spatial").cKDTree  # noqa: N806
    tree_x, tree_y = cKDTree(a), cKDTree(b)
    own, _ = tree_x.query(a, [2, k + 1], workers=-1)
    other, _ = tree_y.query(a, [1, k], workers=-1)
    within, _ = tree_y.query(b, [min(2, m)], workers=-1)
    for nearest, name, where in (
        (own[:, 0], "x", "another sample of x"), (other[:, 0], "x", "in y"),
        (within[:, 0] if m > 1 else np.ones(1), "y", "another sample of y"),
    ):  # fmt: skip
        bad = np.flatnonzero(nearest == 0)
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}] is also {where}; accepted: samples of continuous distributions, "
                "which do not repeat (count those of discrete ones: kl_from_counts)"
            )
    rho, nu = own[:, 1], other[:, 1]
    constant = math.log(m / (n - 1))
    if not bias_reduced:
        return float(d * np.mean(np.log(nu / rho)) + constant)
    # A little more than the radius, so that rounding leaves no neighbour on the edge outside.
    radius = np.maximum(rho, nu) * (1.0 + 1e-12)
    inside_x = tree_x.query_ball_point(a, radius, return_length=True, workers=-1) - 1
    inside_y = tree_y.query_ball_point(a, radius, return_length=True, workers=-1)
    rho = _distance_to(tree_x, a, inside_x + 1)
    nu = _distance_to(tree_y, a, inside_y)
    psi = scipy("special").digamma
    terms = d * np.log(nu / rho) + psi(inside_x) - psi(inside_y)
    return float(np.mean(terms) + constant)


def _samples(name: str, x: ArrayLike) -> Values:
    array = np.asarray(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; accepted: real numbers")
    array = array.astype(np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; accepted: shape (n, d), neither 0")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or an infinity; accepted: finite numbers")
    return array


def _distance_to(tree: Any, points: Values, neighbours: NDArray[np.int64]) -> Values:
    """The distance of each point to a neighbour of its own number."""
    distances = np.empty(len(points))
    order = np.argsort(neighbours)
    starts = np.flatnonzero(np.diff(neighbours[order], prepend=0))
    for some in np.split(order, starts[1:]):
        found, _ = tree.query(points[some], [neighbours[some[0]]], workers=-1)
        distances[some] = found[:, 0]
    return distances

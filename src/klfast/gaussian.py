"""Divergences between Gaussians in closed form: diagonal or full covariance, in batches.

    >>> from klfast import gaussian
    >>> gaussian.kl_divergence(mean, logvar)                      # from the standard normal
    >>> gaussian.kl_divergence(mean_p, logvar_p, mean_q, logvar_q)
    >>> gaussian.kl_divergence_full(mean_p, cov_p, mean_q, cov_q)

Diagonal covariances are given as variational autoencoders have them, by mean and log-variance, both
of shape (..., n); results are summed over the last axis. Q is the standard normal distribution
where it is left out. Batch axes broadcast. Arrays are NumPy's, PyTorch's or JAX's on the CPU, in
float16, bfloat16, float32 or float64, numbers or lists; results are of the same kind, in float64 if
an argument is, else in float32, in nats where they are logarithms. Whatever the dtype, nothing
cancels where P is close to Q: divergences are never negative, and exactly 0 for equal arguments.

TypeError for arrays of two libraries or dtypes that are no floating-point numbers, ValueError for
shapes that do not fit. Rows that hold NaN give NaN, and so do infinite log-variances (but for the
Wasserstein distance) and covariances; an infinite mean is infinitely far from a finite one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._arguments import out_view
from ._arrays import STORAGE, encode, memory, wrap
from ._dispatch import compiled
from ._elementary import excess
from ._values import Given, check_axis, check_batches, given, plain_rows
from .reference import _phi

__all__ = [
    "ValueAndGradients",
    "bhattacharyya_distance",
    "bhattacharyya_distance_full",
    "diffusion_kl",
    "diffusion_prior_kl",
    "kl_divergence",
    "kl_divergence_full",
    "renyi_divergence",
    "renyi_divergence_full",
    "reverse_kl_divergence",
    "squared_hellinger",
    "squared_hellinger_full",
    "value_and_grad",
    "wasserstein_distance",
    "wasserstein_distance_full",
]

Values = NDArray[np.float64]

#: Sums below this, or infinite ones, may have left the range of float32.
UNDERFLOW = 1e-30


class ValueAndGradients(NamedTuple):
    """One value a row, and its gradient with respect to every argument that was given."""

    value: Any
    gradients: tuple[Any, ...]


# Diagonal covariance


def kl_divergence(mean_p: Any, logvar_p: Any, mean_q: Any = None, logvar_q: Any = None) -> Any:
    """Kullback-Leibler divergence of Gaussians with diagonal covariance, in one read.

    Formula:
        KL(P, Q) = 1/2 sum [exp(t) - 1 - t + (mean_p - mean_q)^2 / exp(logvar_q)],
        t = logvar_p - logvar_q. Every term is >= 0.

    Arguments:
        mean_p: means of P, shape (..., n).
        logvar_p: logarithms of its variances.
        mean_q: means of Q; with the next one, the standard normal distribution if left out.
        logvar_q: logarithms of its variances.

    Returns:
        One value a row, in nats, of the shape of the batch.

    Source:
        Kullback, Information Theory and Statistics, 1959, chapter 9; Kingma and Welling,
        Auto-Encoding Variational Bayes, 2014, appendix B.
    """
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    return batch.given.result(_fused(batch, None, []))


def value_and_grad(
    mean_p: Any,
    logvar_p: Any,
    mean_q: Any = None,
    logvar_q: Any = None,
    *,
    grad_scale: Any = 1.0,
    out: Sequence[Any] | None = None,
) -> ValueAndGradients:
    """`kl_divergence`, and its gradients from the same read.

    Formula:
        with d = (mean_p - mean_q) / exp(logvar_q): d and (exp(t) - 1)/2 with respect to mean and
        log-variance of P; -d and -(exp(t) - 1 + d (mean_p - mean_q))/2 to those of Q.

    Arguments:
        mean_p: as for `kl_divergence`, and so are the others; here all of one shape and dtype.
        logvar_p: log-variances of P.
        mean_q: means of Q.
        logvar_q: log-variances of Q.
        grad_scale: what gradients are multiplied with, a number or one a row: that of the loss
            which the divergence is a term of.
        out: memory for the gradients, which new memory would take longer than the computation: one
            contiguous array for each argument, of its shape, dtype and library, apart from all.

    Returns:
        value, one a row, and gradients: two arrays, or with Q four, of the shape, dtype and library
        of the arguments.
    """
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    shapes = {view.shape for view in batch.given.views.values()}
    dtypes = {view.dtype for view in batch.given.views.values()}
    if len(shapes) > 1 or len(dtypes) > 1:
        raise ValueError(
            f"the arguments have shapes {sorted(shapes)} and dtypes {sorted(dtypes)}; accepted: "
            "gradients of arguments of one shape and dtype"
        )
    (scales,) = given({"grad_scale": grad_scale}).values()
    try:
        scales = np.broadcast_to(scales, batch.shape).reshape(-1)
    except ValueError:
        raise ValueError(
            f"grad_scale has shape {scales.shape}; accepted: {batch.shape}, one number a row, or "
            "what broadcasts to it"
        ) from None
    (shape,), (dtype,) = shapes, dtypes
    origin = batch.given
    if out is None:
        gradients = [np.empty(shape, STORAGE[dtype]) for _ in origin.views]
    else:
        gradients = _memory_of(out, origin, shape, dtype)
    value = origin.result(_fused(batch, np.ascontiguousarray(scales), gradients))
    if out is not None:
        return ValueAndGradients(value, tuple(out))
    wrapped = (wrap(each, dtype, origin.place, origin.like) for each in gradients)
    return ValueAndGradients(value, tuple(wrapped))


def _memory_of(
    out: Sequence[Any], origin: Given, shape: tuple[int, ...], dtype: str
) -> list[NDArray[Any]]:
    """The memory that gradients are written to, if it is fit for that."""
    if len(out) != len(origin.views):
        raise ValueError(f"out has {len(out)} arrays; accepted: {len(origin.views)}, as arguments")
    targets: list[NDArray[Any]] = []
    for each in out:
        view = out_view(each, origin.place, shape)
        array = memory(view, writable=True)
        if view.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"out is of dtype {view.dtype}; accepted: {dtype}, contiguous")
        others = [*map(memory, origin.views.values()), *targets]
        if any(np.shares_memory(array, other) for other in others):
            raise ValueError("out overlaps an argument, or itself; accepted: memory of its own")
        targets.append(array)
    return targets


def reverse_kl_divergence(
    mean_p: Any, logvar_p: Any, mean_q: Any = None, logvar_q: Any = None
) -> Any:
    """KL(Q, P): that of the second Gaussian from the first, with the arguments of `kl_divergence`.

    Fitted to a distribution Q of many modes, P covers all of them, where KL(P, Q) settles on one.
    """
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    mp, lp, mq, lq = batch.parameters()
    return batch.given.result(_kl(mq, lq, mp, lp))


def renyi_divergence(
    mean_p: Any, logvar_p: Any, mean_q: Any = None, logvar_q: Any = None, *, alpha: float
) -> Any:
    """Rényi divergence of order `alpha` > 0 of Gaussians with diagonal covariance.

    Formula:
        D(P, Q) = sum [alpha d^2 / (2 s) + log(v_p^(1-alpha) v_q^alpha / s) / (2 (alpha - 1))],
        s = (1-alpha) v_p + alpha v_q, v the variances and d the difference of the means; infinite
        where s is not above 0, the KL divergence for alpha = 1. Arguments as `kl_divergence`.

    Source:
        Gil, Alajaji and Linder, Rényi divergence measures for commonly used univariate continuous
        distributions, 2013.
    """
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    return batch.given.result(_renyi(_order(alpha), *batch.parameters()))


def bhattacharyya_distance(
    mean_p: Any, logvar_p: Any, mean_q: Any = None, logvar_q: Any = None
) -> Any:
    """Bhattacharyya distance -log(integral of sqrt(p q)), with the arguments of `kl_divergence`.

    Formula:
        sum [d^2 / (4 (v_p + v_q)) + 1/2 log((v_p + v_q) / (2 sqrt(v_p v_q)))].

    Source:
        Kailath, The divergence and Bhattacharyya distance measures in signal selection, 1967.
    """
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    return batch.given.result(_bhattacharyya(*batch.parameters()))


def squared_hellinger(mean_p: Any, logvar_p: Any, mean_q: Any = None, logvar_q: Any = None) -> Any:
    """Squared Hellinger distance, in [0, 1], without unit: 1 - exp(-bhattacharyya_distance)."""
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    return batch.given.result(-np.expm1(-_bhattacharyya(*batch.parameters())))


def wasserstein_distance(
    mean_p: Any, logvar_p: Any, mean_q: Any = None, logvar_q: Any = None
) -> Any:
    """2-Wasserstein distance, in the unit of the means, with the arguments of `kl_divergence`.

    Formula:
        sqrt(sum [(mean_p - mean_q)^2 + (exp(logvar_p / 2) - exp(logvar_q / 2))^2]).

    Source:
        Olkin and Pukelsheim, The distance between two random vectors with given dispersion
        matrices, 1982.
    """
    batch = _diagonal(mean_p, logvar_p, mean_q, logvar_q)
    mp, lp, mq, lq = batch.parameters()
    with np.errstate(all="ignore"):
        larger = np.exp(0.5 * np.maximum(lp, lq))
        spread = np.where(lp == lq, 0.0, -larger * np.expm1(-0.5 * np.abs(lp - lq)))
        return batch.given.result(np.sqrt(np.sum((mp - mq) ** 2 + spread**2, -1)))


# Full covariance


def kl_divergence_full(mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any) -> Any:
    """Kullback-Leibler divergence of Gaussians with any covariance.

    Formula:
        KL(P, Q) = 1/2 [tr(C_q^-1 C_p) - n - log det(C_q^-1 C_p) + d' C_q^-1 d].
        With C_q = L L' (Cholesky) and e the eigenvalues of L^-1 (C_p - C_q) L'^-1, this is
        1/2 [sum (e - log(1 + e)) + |L^-1 d|^2], where nothing cancels.

    Arguments:
        mean_p: means of P, shape (..., n).
        cov_p: its covariances, shape (..., n, n), symmetric and positive definite.
        mean_q: means of Q.
        cov_q: its covariances.

    Returns:
        One value a Gaussian, in nats.

    Raises:
        ValueError: for a covariance that is not symmetric or not positive definite.

    Source:
        Kullback, Information Theory and Statistics, 1959, chapter 9.
    """
    origin, d, t = _whitened(mean_p, cov_p, mean_q, cov_q)
    zero = np.zeros(1)
    return origin.result(_kl(d, t, zero, zero))


def renyi_divergence_full(mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any, *, alpha: float) -> Any:
    """Rényi divergence of order `alpha` > 0; arguments as `kl_divergence_full`."""
    origin, d, t = _whitened(mean_p, cov_p, mean_q, cov_q)
    zero = np.zeros(1)
    return origin.result(_renyi(_order(alpha), d, t, zero, zero))


def bhattacharyya_distance_full(mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any) -> Any:
    """Bhattacharyya distance -log(integral of sqrt(p q)); arguments as `kl_divergence_full`."""
    origin, d, t = _whitened(mean_p, cov_p, mean_q, cov_q)
    zero = np.zeros(1)
    return origin.result(_bhattacharyya(d, t, zero, zero))


def squared_hellinger_full(mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any) -> Any:
    """Squared Hellinger distance, in [0, 1]; arguments as `kl_divergence_full`."""
    origin, d, t = _whitened(mean_p, cov_p, mean_q, cov_q)
    zero = np.zeros(1)
    return origin.result(-np.expm1(-_bhattacharyya(d, t, zero, zero)))


def wasserstein_distance_full(mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any) -> Any:
    """2-Wasserstein distance, in the unit of the means; arguments as `kl_divergence_full`.

    Formula:
        sqrt(|d|^2 + tr(C_p + C_q - 2 (C_q^1/2 C_p C_q^1/2)^1/2)). The trace is the least
        |L_p - L_q U|^2 over all rotations U, of the Cholesky factors, which does not cancel;
        A B' is the best, where A S B' is the singular value decomposition of L_q' L_p.

    Source:
        Olkin and Pukelsheim, 1982; Schönemann, A generalized solution of the orthogonal Procrustes
        problem, 1966.
    """
    origin, mp, cp, mq, cq = _full(mean_p, cov_p, mean_q, cov_q)
    lp, lq = _cholesky("cov_p", cp), _cholesky("cov_q", cq)
    a, _, b = np.linalg.svd(np.swapaxes(lq, -1, -2) @ lp)
    spread = np.sum((lp - lq @ (a @ b)) ** 2, (-1, -2))
    spread = np.where((cp == cq).all((-1, -2)), 0.0, spread)
    return origin.result(np.sqrt(np.sum((mp - mq) ** 2, -1) + spread))


# Diffusion models


def diffusion_kl(x_0: Any, predicted_x_0: Any, betas: Any, steps: Any, logvar: Any = None) -> Any:
    """KL term of one denoising step in the variational bound of a diffusion model.

    Formula:
        KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t)) of Gaussians whose means differ by
        sqrt(a_{t-1}) beta_t / (1 - a_t) (x_0 - predicted x_0), a_t = prod_{s <= t} (1 - beta_s);
        q has the variance (1 - a_{t-1}) / (1 - a_t) beta_t.

    Arguments:
        x_0: the data, shape (..., n).
        predicted_x_0: what the model takes x_0 to be, seeing x_t; the same shape.
        betas: the variances of the noise of the steps 1 to T, shape (T,), in (0, 1).
        steps: t, whole numbers from 2 to T that broadcast with the batch; the term of step 1 is no
            divergence but the log-likelihood of the data.
        logvar: the model's log-variance, that broadcasts with x_0; that of q if left out.

    Returns:
        One value a row, in nats, summed over the last axis.

    Source:
        Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, equations 5 to 8.
    """
    arrays = {"x_0": x_0, "predicted_x_0": predicted_x_0}
    origin = given(arrays if logvar is None else arrays | {"logvar": logvar})
    x, predicted, *model = origin.values()
    check_axis("x_0", x.shape)
    beta, log_kept = _schedule(betas)
    t = np.asarray(steps)
    if t.dtype.kind not in "iu" or (t.size and not (t.min() >= 2 and t.max() <= len(beta))):
        raise ValueError(f"steps are {steps!r}; accepted: whole numbers from 2 to {len(beta)}")
    before, now = log_kept[t - 2], log_kept[t - 1]
    share = beta[t - 1] / -np.expm1(now)
    variance = share * -np.expm1(before)
    difference = (np.exp(0.5 * before) * share)[..., None] * (x - predicted)
    logvar_q = np.log(variance)[..., None]
    logvar_p = model[0] if model else logvar_q
    return origin.result(_kl(difference, logvar_q, np.zeros(1), logvar_p))


def diffusion_prior_kl(x_0: Any, betas: Any) -> Any:
    """KL(q(x_T | x_0), standard normal): the first term of a diffusion model's variational bound.

    q has the mean sqrt(a_T) x_0 and the variance 1 - a_T. Arguments and source: `diffusion_kl`.
    """
    origin = given({"x_0": x_0})
    (x,) = origin.values()
    check_axis("x_0", x.shape)
    _, log_kept = _schedule(betas)
    kept = log_kept[-1]
    logvar = np.full(1, np.log1p(-np.exp(kept)))
    return origin.result(_kl(np.exp(0.5 * kept) * x, logvar, np.zeros(1), np.zeros(1)))


def _schedule(betas: Any) -> tuple[Values, Values]:
    """The noise of every step, and log(a_t)."""
    (beta,) = given({"betas": betas}).values()
    if beta.ndim != 1 or not ((beta > 0) & (beta < 1)).all() or not beta.size:
        raise ValueError(f"betas have shape {beta.shape}; accepted: shape (T,), between 0 and 1")
    return beta, np.cumsum(np.log1p(-beta))


# Formulas, in float64


def _distance(difference: Values, log_variance: Values) -> Values:
    """difference^2 / variance; 0 where the difference is, whatever the variance."""
    with np.errstate(all="ignore"):
        scaled = difference * np.exp(-0.5 * log_variance)
        return np.where(difference == 0.0, 0.0, scaled * scaled)


def _apart(lp: Values, lq: Values) -> Values:
    """Return lp - lq, NaN where one of them is infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(lp) & np.isfinite(lq), lp - lq, np.nan)


def _kl(mp: Values, lp: Values, mq: Values, lq: Values) -> Values:
    t = _apart(lp, lq)
    with np.errstate(all="ignore"):
        total: Values = 0.5 * np.sum(_phi(t) + _distance(mp - mq, lq), -1)
    return total


def _renyi(alpha: float, mp: Values, lp: Values, mq: Values, lq: Values) -> Values:
    """Rényi divergence, each term as 1/2 [phi(t) - excess((1-alpha) v) / (1-alpha)] and a distance.

    v = expm1(t), so that s / v_q = 1 + (1-alpha) v. Below order 1/2 the arguments change places:
    (1-a) D_a(P, Q) = a D_(1-a)(Q, P).
    """
    if alpha == 1.0:
        return _kl(mp, lp, mq, lq)
    if alpha < 0.5:
        return alpha / (1.0 - alpha) * _renyi(1.0 - alpha, mq, lq, mp, lp)
    t = _apart(lp, lq)
    rest = 1.0 - alpha
    with np.errstate(all="ignore"):
        share = rest * np.expm1(t)
        close = 0.5 * (_phi(t) - excess(share) / rest)
        # Far apart, log(s / v_q) from exponents that do not overflow.
        log_s = np.where(t > 1.0, t + np.log(rest + alpha * np.exp(-t)), np.log1p(share))
        far = 0.5 * (log_s / rest - t)
        spread = np.where(np.abs(t) < 1.0, close, far)
        terms = spread + 0.5 * alpha * _distance(mp - mq, lq + log_s)
        infinite = (1.0 + share <= 0.0) & ~np.isnan(mp - mq)
        terms = np.where(infinite, np.inf, np.maximum(terms, 0.0))
    total: Values = np.sum(terms, -1)
    return total


def _bhattacharyya(mp: Values, lp: Values, mq: Values, lq: Values) -> Values:
    """Half the Rényi divergence of order 1/2: log cosh(t/2) does not cancel."""
    t = _apart(lp, lq)
    with np.errstate(all="ignore"):
        small = np.log1p(2.0 * np.sinh(0.25 * np.clip(t, -4.0, 4.0)) ** 2)
        half = 0.5 * np.abs(t)
        log_cosh = np.where(
            np.abs(t) < 4.0, small, half - math.log(2.0) + np.log1p(np.exp(-2 * half))
        )
        middle = 0.5 * (lp + lq) + log_cosh  # log((v_p + v_q) / 2)
        total: Values = np.sum(0.5 * log_cosh + 0.125 * _distance(mp - mq, middle), -1)
    return total


def _order(alpha: float) -> float:
    value = float(alpha)
    if not 0.0 < value < math.inf:
        raise ValueError(f"alpha is {alpha!r}; accepted: a number above 0")
    return value


# Arguments


class _Diagonal(NamedTuple):
    """The checked arguments of a call: two arrays, or four."""

    given: Given
    shape: tuple[int, ...]  # of the batch
    width: int

    def parameters(self) -> list[Values]:
        """Return mean_p, logvar_p, mean_q and logvar_q in float64."""
        values = self.given.values()
        return values if len(values) == 4 else [*values, np.zeros(1), np.zeros(1)]


def _diagonal(mean_p: Any, logvar_p: Any, mean_q: Any, logvar_q: Any) -> _Diagonal:
    arrays = {"mean_p": mean_p, "logvar_p": logvar_p}
    if (mean_q is None) != (logvar_q is None):
        missing = "mean_q" if mean_q is None else "logvar_q"
        raise TypeError(f"{missing} is None; accepted: both of Q, or neither (standard normal)")
    if mean_q is not None:
        arrays |= {"mean_q": mean_q, "logvar_q": logvar_q}
    origin = given(arrays)
    shapes = {name: view.shape for name, view in origin.views.items()}
    shape = shapes["mean_p"]
    if any(each != shape for each in shapes.values()):
        try:
            shape = np.broadcast_shapes(*shapes.values())
        except ValueError:
            text = ", ".join(f"{name} {each}" for name, each in shapes.items())
            raise ValueError(f"shapes do not broadcast: {text}; accepted: shape (..., n)") from None
    check_axis("mean_p", shape)
    return _Diagonal(origin, shape[:-1], shape[-1])


def _fused(batch: _Diagonal, scales: Values | None, into: list[NDArray[Any]]) -> NDArray[Any]:
    """KL divergence of each row, and its gradients if there is memory for them.

    In float64, or rounded to float32 already.
    """
    kernels = compiled()
    rows = [plain_rows(view, batch.shape, batch.width) for view in batch.given.views.values()]
    usable = all(each is not None and each.dtype == rows[0].dtype for each in rows if rows[0])
    if kernels is None or rows[0] is None or not usable or not rows[0].count:
        values = _kl(*batch.parameters())
        bad = np.ones(values.size, np.bool_)
        flat = np.broadcast_to(values, batch.shape).reshape(-1).copy()
    else:
        flat, carried = kernels.gaussian_kl(rows, scales, into)
        if carried:
            shaped: NDArray[Any] = flat.reshape(batch.shape)
            return shaped
        bad = ~((flat >= UNDERFLOW) & (flat < math.inf))
        if bad.any():
            flat[bad] = encode(_kl(*_some(batch, bad)), flat.dtype.name)
    if into and bad.any():
        assert scales is not None
        origin = batch.given
        dtype = next(iter(origin.views.values())).dtype
        for target, gradient in zip(into, _gradients(*_some(batch, bad)), strict=False):
            table = target.reshape(-1, batch.width)
            table[bad] = encode(gradient * scales[bad, None], dtype)
    return flat.reshape(batch.shape)


def _some(batch: _Diagonal, rows: NDArray[np.bool_]) -> list[Values]:
    """The parameters of some rows, in float64."""
    whole = (*batch.shape, batch.width)
    return [
        np.broadcast_to(each, whole).reshape(-1, batch.width)[rows] for each in batch.parameters()
    ]


def _gradients(mp: Values, lp: Values, mq: Values, lq: Values) -> list[Values]:
    with np.errstate(all="ignore"):
        t = _apart(lp, lq)
        difference = mp - mq
        slope = np.where(difference == 0.0, 0.0, difference * np.exp(-lq))
        growth = np.expm1(t)
        return [slope, 0.5 * growth, -slope, -0.5 * (growth + slope * difference)]


def _full(
    mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any
) -> tuple[Given, Values, Values, Values, Values]:
    origin = given({"mean_p": mean_p, "cov_p": cov_p, "mean_q": mean_q, "cov_q": cov_q})
    mp, cp, mq, cq = origin.values()
    check_axis("mean_p", mp.shape)
    n = mp.shape[-1]
    for name, array, tail in (
        ("cov_p", cp, (n, n)), ("mean_q", mq, (n,)), ("cov_q", cq, (n, n)),
    ):  # fmt: skip
        if array.shape[-len(tail) :] != tail:
            text = ", ".join(["...", *map(str, tail)])
            raise ValueError(
                f"{name} has shape {array.shape}; accepted: shape ({text}), as mean_p has {n}"
            )
    check_batches(
        mean_p=mp.shape[:-1], cov_p=cp.shape[:-2], mean_q=mq.shape[:-1], cov_q=cq.shape[:-2]
    )
    (mp, cp), (mq, cq) = _without_faults(mp, cp), _without_faults(mq, cq)
    for name, array in (("cov_p", cp), ("cov_q", cq)):
        skew = np.abs(array - np.swapaxes(array, -1, -2))
        if (skew > 1e-6 * np.abs(array).max((-1, -2), keepdims=True)).any():
            raise ValueError(f"{name} is not symmetric; accepted: symmetric positive definite")
    return origin, mp, cp, mq, cq


def _without_faults(mean: Values, covariance: Values) -> tuple[Values, Values]:
    """NaN in the mean in place of a covariance that is not finite, which no factor is found of."""
    whole = np.asarray(np.isfinite(covariance).all((-1, -2)))
    if whole.all():
        return mean, covariance
    return (
        np.where(whole[..., None], mean, np.nan),
        np.where(whole[..., None, None], covariance, np.eye(mean.shape[-1])),
    )


def _cholesky(name: str, covariance: Values) -> Values:
    try:
        factor: Values = np.linalg.cholesky(covariance).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"{name} is not positive definite; accepted: symmetric positive definite"
        ) from None
    return factor


def _whitened(mean_p: Any, cov_p: Any, mean_q: Any, cov_q: Any) -> tuple[Given, Values, Values]:
    """The coordinates where Q is standard and P diagonal: means and log-variances of P.

    The divergences do not change when both Gaussians are transformed alike.
    """
    origin, mp, cp, mq, cq = _full(mean_p, cov_p, mean_q, cov_q)
    _cholesky("cov_p", cp)
    factor = _cholesky("cov_q", cq)
    half = np.linalg.solve(factor, cp - cq)
    change = np.linalg.solve(factor, np.swapaxes(half, -1, -2))
    e, vectors = np.linalg.eigh(0.5 * (change + np.swapaxes(change, -1, -2)))
    d = np.linalg.solve(factor, (mp - mq)[..., None])
    d = (np.swapaxes(vectors, -1, -2) @ d)[..., 0]
    # Rounding must not carry a nearly singular covariance over the edge.
    return origin, d, np.log1p(np.maximum(e, -1.0 + 1e-16))

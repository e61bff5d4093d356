"""Divergences of discrete distributions and of Dirichlet's in closed form.

Gaussians have a module of their own, `klfast.gaussian`. Arrays are NumPy's, PyTorch's or JAX's on
the CPU, numbers or lists; batch axes broadcast; results are of the same kind, in nats, in float64
if an argument is, else in float32.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from ._api import kl_divergence
from ._arguments import Options
from ._arrays import Place, place_of, view_of, wrap
from ._elementary import kl_term
from ._scipy import scipy
from ._values import check_axis, check_batches, given

__all__ = ["bernoulli_kl", "dirichlet_kl", "kl_from_uniform", "kl_of_uniform"]

Values = NDArray[np.float64]


def kl_from_uniform(p: Any, **options: Unpack[Options]) -> Any:
    """KL(P, U) of each row of logits from the uniform distribution: log V less the entropy.

    Exact also where P is nearly uniform and that difference cancels. Arguments, keywords and result
    as `klfast.kl_divergence`, without q.
    """
    return kl_divergence(p, _uniform(p, options), **options)


def kl_of_uniform(q: Any, **options: Unpack[Options]) -> Any:
    """KL(U, Q) of the uniform distribution from each row of logits; infinite where a q is 0."""
    return kl_divergence(_uniform(q, options), q, **options)


def _uniform(x: Any, options: Options) -> Any:
    """One uniform row that broadcasts with the rows of x, of the same library."""
    place: Place = place_of(x, "p")
    shape = view_of(x, place, "p").shape
    axis = options.get("axis", -1)
    if not -len(shape) <= axis < len(shape):
        return x  # kl_divergence says what is wrong with it
    whole = [1] * len(shape)
    whole[axis] = shape[axis]
    row = np.full(whole, float(options.get("input") == "probs"), np.float32)
    return wrap(row, "float32", place, x)


def bernoulli_kl(p: Any, q: Any, *, input: Literal["probs", "logits"] = "probs") -> Any:
    """KL divergence of Bernoulli distributions.

    Formula:
        p log(p/q) + (1-p) log((1-p)/(1-q)), from two terms that are never negative.

    Arguments:
        p: probabilities in [0, 1], or logits log(p / (1-p)), of any shape.
        q: the same of Q, of a shape that broadcasts with it.
        input: which of them.

    Returns:
        One value an entry; NaN outside [0, 1], infinite where q excludes what p does not.

    Source:
        Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    if input not in ("probs", "logits"):
        raise ValueError(f"input is {input!r}; accepted: 'probs', 'logits'")
    origin = given({"p": p, "q": q})
    x, y = origin.values()
    check_batches(p=x.shape, q=y.shape)
    if input == "logits":
        return origin.result(np.asarray(kl_divergence(_two_logits(x), _two_logits(y))))
    x, y = (np.where((each >= 0.0) & (each <= 1.0), each, np.nan) for each in (x, y))
    return origin.result(kl_term(x, y, y - x) + kl_term(1.0 - x, 1.0 - y, x - y))


def _two_logits(x: Values) -> Values:
    """Logits of both outcomes; an infinite one leaves only one of them."""
    first = np.where(np.isinf(x), np.where(x > 0.0, 0.0, -np.inf), x)
    return np.stack([first, np.where(x == np.inf, -np.inf, 0.0)], -1)


def dirichlet_kl(p: Any, q: Any) -> Any:
    """KL divergence of Dirichlet distributions; of Beta distributions for n = 2.

    Formula:
        log G(p_0) - sum log G(p_i) - log G(q_0) + sum log G(q_i)
        + sum (p_i - q_i) (psi(p_i) - psi(p_0)), with p_0 and q_0 the sums. Written as
        sum B(q_i, p_i) - B(q_0, p_0) with B(y, x) = log G(y) - log G(x) - psi(x) (y - x) >= 0, and
        B, where x and y are close, as the integral of (y - t) psi'(t) from x to y.

    Arguments:
        p: concentrations of P, above 0, shape (..., n).
        q: those of Q; batch axes broadcast.

    Returns:
        One value a row; NaN where a concentration is not above 0.

    Raises:
        ImportError: without SciPy, which the extra "stats" installs.

    Source:
        Penny, Kullback-Leibler divergences of Normal, Gamma, Dirichlet and Wishart densities, 2001.
    """
    origin = given({"p": p, "q": q})
    a, b = origin.values()
    for name, x in (("p", a), ("q", b)):
        check_axis(name, x.shape)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"p and q have {a.shape[-1]} and {b.shape[-1]} concentrations; accepted: the same "
            "number"
        )
    check_batches(p=a.shape[:-1], q=b.shape[:-1])
    a, b = np.broadcast_arrays(a, b)
    inside = (a > 0.0) & (b > 0.0) & np.isfinite(a) & np.isfinite(b)
    valid = np.all(inside, -1, keepdims=True)
    safe_a = np.where(valid, a, 1.0)
    change = np.where(valid, b, 1.0) - safe_a
    value = np.sum(_bregman(safe_a, change), -1) - _bregman(safe_a.sum(-1), change.sum(-1))
    return origin.result(np.where(valid[..., 0], np.maximum(value, 0.0), np.nan))


#: Nodes in (0, 1) and weights of Gauss and Legendre: enough for the smooth psi' of a short way.
_NODES, _WEIGHTS = (0.5 * (each + shift) for each, shift in zip(
    np.polynomial.legendre.leggauss(12), (1.0, 0.0), strict=True
))  # fmt: skip


def _bregman(x: Values, change: Values) -> Values:
    """log G(x + h) - log G(x) - psi(x) h = integral over u in (0, 1) of (1-u) h^2 psi'(x + u h)."""
    special = scipy("special")
    y = x + change
    near = np.abs(change) < 0.5 * x
    step = np.where(near, change, 0.0)
    total = np.zeros_like(x)
    for u, weight in zip(_NODES, _WEIGHTS, strict=True):
        total += weight * (1.0 - u) * special.zeta(2.0, x + u * step)
    far = special.gammaln(y) - special.gammaln(x) - special.digamma(x) * change
    return np.where(near, step * step * total, far)

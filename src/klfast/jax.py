"""The divergences as differentiable functions of JAX on the CPU, for `jit`, `grad` and `vmap`.

    >>> import jax, klfast.jax
    >>> loss = lambda student: klfast.jax.kl_divergence(teacher, student).mean()
    >>> value, gradient = jax.jit(jax.value_and_grad(loss))(student)

The kernels are called back from the compiled program; they read JAX's own memory. Gradients are
computed in the backward pass, of those arguments alone that are differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

import klfast

from ._arguments import number, temperatures
from ._gradients import differentiable, value_and_grad

__all__ = [
    "alpha_divergence",
    "chi2_divergence",
    "cross_entropy",
    "entropy",
    "jeffreys_divergence",
    "js_divergence",
    "kl_divergence",
    "renyi_divergence",
    "squared_hellinger",
    "total_variation",
    "tsallis_divergence",
]


@functools.cache
def _function(name: str, temperature: tuple[float, ...]) -> Any:
    """The operation as a function of one or two arrays that JAX can differentiate."""
    operation, parameters = differentiable(name)
    public = getattr(klfast, operation.function)
    keyword = {"weight": parameters[0]} if operation.name == "js" else {}
    options: Any = {"temperature": temperature if len(temperature) > 1 else temperature[0]}

    def values(*rows: Any) -> Any:
        arrays = [np.asarray(each) for each in rows]
        value = public(*arrays, *(() if keyword else parameters), **keyword, **options)
        return np.asarray(value)

    def gradients(wrt: str, upstream: Any, *rows: Any) -> Any:
        arrays = [np.asarray(each) for each in rows]
        side: Any = wrt
        scale = np.asarray(upstream)
        found = value_and_grad(name, *arrays, wrt=side, grad_scale=scale, **options).gradient
        return found if wrt == "both" else (found,)

    def call(*rows: Any) -> Any:
        wide = any(each.dtype == jnp.float64 for each in rows)
        dtype = jnp.float64 if wide else jnp.float32
        shape = jax.ShapeDtypeStruct(rows[0].shape[:-1], dtype)
        return jax.pure_callback(values, shape, *rows, vmap_method="broadcast_all")

    def forward(*rows: CustomVJPPrimal) -> Any:
        # Which of them are differentiated is known now and not in `backward`: it travels in the
        # structure of what is kept, () or None.
        wanted = tuple(() if each.perturbed else None for each in rows)
        arrays = tuple(each.value for each in rows)
        return call(*arrays), (arrays, wanted)

    def backward(kept: Any, upstream: Any) -> Any:
        arrays, wanted = kept
        sides = [side for side, mark in zip("pq", wanted, strict=False) if mark is not None]
        if isinstance(upstream, SymbolicZero) or not sides:
            return tuple(jnp.zeros_like(each) for each in arrays)
        wrt = "both" if len(sides) == 2 else sides[0]
        found = iter(
            jax.pure_callback(
                functools.partial(gradients, wrt),
                tuple(
                    jax.ShapeDtypeStruct(each.shape, each.dtype)
                    for each, mark in zip(arrays, wanted, strict=True)
                    if mark is not None
                ),
                upstream, *arrays, vmap_method="broadcast_all",
            )
        )  # fmt: skip
        return tuple(
            jnp.zeros_like(each) if mark is None else next(found)
            for each, mark in zip(arrays, wanted, strict=True)
        )

    function = jax.custom_vjp(call)
    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


def _evaluate(
    name: str, rows: Mapping[str, Any], temperature: Any, parameters: tuple[Any, ...] = ()
) -> Any:
    """An operation of the arrays, by their names; what does not fit is refused before it is traced.

    (An error in a call back from a compiled program is not raised as what it is.)
    """
    arrays = {argument: jnp.asarray(each) for argument, each in rows.items()}
    for argument, each in arrays.items():
        if each.dtype.name not in _FLOATS:
            raise TypeError(f"{argument} has dtype {each.dtype}; accepted: {', '.join(_FLOATS)}")
        if each.ndim == 0 or each.shape[-1] == 0:
            raise ValueError(
                f"{argument} has shape {each.shape}; accepted: (..., V) with V at least 1"
            )
    shapes = [each.shape for each in arrays.values()]
    names = " and ".join(arrays)
    if len({shape[-1] for shape in shapes}) > 1:
        given = " and ".join(str(shape[-1]) for shape in shapes)
        raise ValueError(f"{names} have vocabularies of {given} entries; accepted: the same number")
    try:
        batch = jnp.broadcast_shapes(*(shape[:-1] for shape in shapes))
    except ValueError:
        raise ValueError(
            f"{names} have shapes {' and '.join(map(str, shapes))}; accepted: batch axes (all but "
            "the last) that broadcast"
        ) from None
    # Broadcast here, so that JAX adds up the gradient of rows that are repeated.
    repeated = [jnp.broadcast_to(each, (*batch, each.shape[-1])) for each in arrays.values()]
    full_name = ":".join([name, *(repr(number(name, each)) for each in parameters)])
    return _function(full_name, temperatures(temperature, len(arrays)))(*repeated)


_FLOATS = ("float16", "bfloat16", "float32", "float64")


def kl_divergence(p: Any, q: Any, *, temperature: float | tuple[float, float] = 1.0) -> Any:
    """KL(P, Q) = sum p log(p / q) of each row; see `klfast.kl_divergence`.

    Arguments:
        p: logits, shape (..., V), in float16, bfloat16, float32 or float64.
        q: logits, whose batch axes broadcast with those of p.
        temperature: T > 0 that divides the logits, or a pair (T_p, T_q); a Python number.

    Returns:
        One value a row in nats, float32 or, if an input is, float64; differentiable once.

    Source:
        Kullback and Leibler, On Information and Sufficiency, 1951
    """
    return _evaluate("kl", {"p": p, "q": q}, temperature)


def jeffreys_divergence(p: Any, q: Any, *, temperature: float | tuple[float, float] = 1.0) -> Any:
    """KL both ways, summed; arguments as of `kl_divergence`."""
    return _evaluate("jeffreys", {"p": p, "q": q}, temperature)


def js_divergence(
    p: Any, q: Any, *, weight: float = 0.5, temperature: float | tuple[float, float] = 1.0
) -> Any:
    """Jensen-Shannon divergence with `weight` as that of P; arguments as of `kl_divergence`."""
    return _evaluate("js", {"p": p, "q": q}, temperature, (weight,))


def renyi_divergence(
    p: Any, q: Any, alpha: float, *, temperature: float | tuple[float, float] = 1.0
) -> Any:
    """Rényi divergence of order `alpha`; arguments as of `kl_divergence`."""
    return _evaluate("renyi", {"p": p, "q": q}, temperature, (alpha,))


def alpha_divergence(
    p: Any, q: Any, alpha: float, *, temperature: float | tuple[float, float] = 1.0
) -> Any:
    """alpha-divergence, KL(P, Q) at 1 and KL(Q, P) at 0; arguments as of `kl_divergence`."""
    return _evaluate("alpha", {"p": p, "q": q}, temperature, (alpha,))


def tsallis_divergence(
    p: Any, q: Any, alpha: float, *, temperature: float | tuple[float, float] = 1.0
) -> Any:
    """Tsallis relative entropy of order `alpha`; arguments as of `kl_divergence`."""
    return _evaluate("tsallis", {"p": p, "q": q}, temperature, (alpha,))


def total_variation(p: Any, q: Any, *, temperature: float | tuple[float, float] = 1.0) -> Any:
    """Total variation distance; arguments as of `kl_divergence`."""
    return _evaluate("tv", {"p": p, "q": q}, temperature)


def squared_hellinger(p: Any, q: Any, *, temperature: float | tuple[float, float] = 1.0) -> Any:
    """Squared Hellinger distance; arguments as of `kl_divergence`."""
    return _evaluate("hellinger2", {"p": p, "q": q}, temperature)


def chi2_divergence(p: Any, q: Any, *, temperature: float | tuple[float, float] = 1.0) -> Any:
    """Pearson's chi-squared divergence; arguments as of `kl_divergence`."""
    return _evaluate("chi2", {"p": p, "q": q}, temperature)


def cross_entropy(p: Any, q: Any, *, temperature: float | tuple[float, float] = 1.0) -> Any:
    """Cross-entropy of Q under P, both given by logits; arguments as of `kl_divergence`."""
    return _evaluate("cross_entropy", {"p": p, "q": q}, temperature)


def entropy(p: Any, *, temperature: float = 1.0) -> Any:
    """Shannon entropy; arguments as of `kl_divergence`."""
    return _evaluate("entropy", {"p": p}, temperature)

"""The same measures as other libraries' users write them, to compare with in one run.

Each peer gets the libraries' own arrays and its own best usual way: log-softmax, then the
textbook formula, compiled where the library compiles. Low-precision inputs are widened to float32
first, as is the custom; float32 and float64 are computed as they are.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Measure = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Peer:
    """Another library, and how its users compute a measure of logits.

    ``array`` makes the library's array of a NumPy array, without a copy where it can;
    ``measure(name)`` returns a function of two such arrays that gives one value a row and has
    finished when it returns, or None where the library offers no way; ``version`` is None where
    the library is not installed.
    """

    name: str
    package: str
    array: Callable[[NDArray[Any]], Any]
    measure: Callable[[str], Measure | None]

    def available(self) -> bool:
        """Tell whether the library is installed; importing it is left to its first use."""
        return importlib.util.find_spec(self.package) is not None


def formulas(xp: Any, log_softmax: Callable[[Any], Any]) -> dict[str, Measure]:
    """Return the textbook formulas over any library that has NumPy's names.

    Every one takes two arrays of logits and reduces over their last axis.
    """

    def textbook(term: Callable[[Any, Any], Any]) -> Measure:
        return lambda x, y: term(log_softmax(x), log_softmax(y)).sum(-1)

    def jensen_shannon(a: Any, b: Any) -> Any:
        m = xp.logaddexp(a, b) - math.log(2)
        return (xp.exp(a) * (a - m) + xp.exp(b) * (b - m)) / 2

    def renyi(x: Any, y: Any) -> Any:
        a, b = log_softmax(x), log_softmax(y)
        return xp.log(xp.exp(2 * a - b).sum(-1))

    return {
        "kl": textbook(lambda a, b: xp.exp(a) * (a - b)),
        "reverse_kl": textbook(lambda a, b: xp.exp(b) * (b - a)),
        "jeffreys": textbook(lambda a, b: (xp.exp(a) - xp.exp(b)) * (a - b)),
        "js": textbook(jensen_shannon),
        "renyi:2": renyi,
        "tv": textbook(lambda a, b: xp.abs(xp.exp(a) - xp.exp(b)) / 2),
        "hellinger2": textbook(lambda a, b: (xp.exp(a / 2) - xp.exp(b / 2)) ** 2 / 2),
        "chi2": textbook(lambda a, b: (xp.exp(a) - xp.exp(b)) ** 2 / xp.exp(b)),
        "cross_entropy": textbook(lambda a, b: -xp.exp(a) * b),
        "entropy_p": lambda x, y: -(xp.exp(a := log_softmax(x)) * a).sum(-1),
        "entropy_q": lambda x, y: -(xp.exp(b := log_softmax(y)) * b).sum(-1),
    }


# NumPy and SciPy


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _numpy_log_softmax(x: NDArray[Any]) -> Any:
    x = _widened(x)
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _scipy_measures() -> dict[str, Measure]:
    from scipy import special
    from scipy.spatial import distance

    def log_softmax(x: NDArray[Any]) -> Any:
        return special.log_softmax(_widened(x), axis=-1)

    def softmax(x: NDArray[Any]) -> Any:
        return special.softmax(_widened(x), axis=-1)

    own: dict[str, Measure] = {
        "kl": lambda x, y: special.rel_entr(softmax(x), softmax(y)).sum(-1),
        "reverse_kl": lambda x, y: special.rel_entr(softmax(y), softmax(x)).sum(-1),
        "js": lambda x, y: distance.jensenshannon(softmax(x), softmax(y), axis=-1) ** 2,
        "entropy_p": lambda x, y: special.entr(softmax(x)).sum(-1),
        "entropy_q": lambda x, y: special.entr(softmax(y)).sum(-1),
    }
    return formulas(np, log_softmax) | own


# PyTorch


def _torch_array(array: NDArray[Any]) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_measures() -> dict[str, Measure]:
    import torch
    from torch.nn import functional

    def log_softmax(x: Any) -> Any:
        return functional.log_softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))

    def kl(x: Any, y: Any) -> Any:
        terms = functional.kl_div(log_softmax(y), log_softmax(x), log_target=True, reduction="none")
        return terms.sum(-1)

    own: dict[str, Measure] = {"kl": kl, "reverse_kl": lambda x, y: kl(y, x)}
    return formulas(torch, log_softmax) | own


def _torch_compiled(name: str) -> Measure | None:
    import torch

    measure = _torch_measures().get(name)
    return None if measure is None else torch.compile(measure)


# JAX


def _jax_array(array: NDArray[Any]) -> Any:
    import jax

    return jax.device_put(array, jax.devices("cpu")[0])


def _jax_measure(name: str) -> Measure | None:
    import jax
    from jax import numpy as jnp

    def log_softmax(x: Any) -> Any:
        return jax.nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1)

    measure = formulas(jnp, log_softmax).get(name)
    if measure is None:
        return None
    compiled = jax.jit(measure)
    return lambda x, y: compiled(x, y).block_until_ready()


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


PEERS = (
    Peer("numpy", "numpy", _same, lambda name: formulas(np, _numpy_log_softmax).get(name)),
    Peer("scipy", "scipy", _same, lambda name: _scipy_measures().get(name)),
    Peer("torch eager", "torch", _torch_array, lambda name: _torch_measures().get(name)),
    Peer("torch.compile", "torch", _torch_array, _torch_compiled),
    Peer("jax.jit", "jax", _jax_array, _jax_measure),
)

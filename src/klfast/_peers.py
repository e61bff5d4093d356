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
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._operations import DEFAULT_METRICS

Measure = Callable[..., Any]

#: The name of the default metrics of `compare` together, where a measure is named.
COMPARE = "compare"


@dataclass(frozen=True)
class Peer:
    """Another library, and how its users compute a measure of logits.

    ``array`` makes the library's array of a NumPy array, without a copy where it can;
    ``measure(name)`` returns a function of two such arrays, or of whatever the operation of that
    name reads, that gives one value a row and has finished when it returns, or None where the
    library offers no way.
    """

    name: str
    package: str
    array: Callable[[NDArray[Any]], Any]
    measure: Callable[[str], Measure | None]

    def available(self) -> bool:
        """Tell whether the library is installed; importing it is left to its first use."""
        return importlib.util.find_spec(self.package) is not None


def formulas(
    xp: Any,
    log_softmax: Callable[[Any], Any],
    logsumexp: Callable[[Any], Any],
    pick: Callable[[Any, Any], Any],
) -> dict[str, Measure]:
    """Return the textbook formulas over any library that has NumPy's names.

    They take arrays of logits and reduce over their last axis: a pair for a divergence, one for
    an entropy, one and a token for each row for ``token_log_probs``. ``compare`` gives the
    default metrics, one column each. ``pick(x, tokens)`` are the entries of x at the tokens.
    """

    def js(a: Any, b: Any) -> Any:
        m = xp.logaddexp(a, b) - math.log(2)
        return (xp.exp(a) * (a - m) + xp.exp(b) * (b - m)).sum(-1) / 2

    def entropy(a: Any) -> Any:
        return -(xp.exp(a) * a).sum(-1)

    of_log_probs: dict[str, Measure] = {
        "kl": lambda a, b: (xp.exp(a) * (a - b)).sum(-1),
        "reverse_kl": lambda a, b: (xp.exp(b) * (b - a)).sum(-1),
        "jeffreys": lambda a, b: ((xp.exp(a) - xp.exp(b)) * (a - b)).sum(-1),
        "js": js,
        "renyi:2": lambda a, b: xp.log(xp.exp(2 * a - b).sum(-1)),
        "tv": lambda a, b: xp.abs(xp.exp(a) - xp.exp(b)).sum(-1) / 2,
        "hellinger2": lambda a, b: ((xp.exp(a / 2) - xp.exp(b / 2)) ** 2).sum(-1) / 2,
        "chi2": lambda a, b: ((xp.exp(a) - xp.exp(b)) ** 2 / xp.exp(b)).sum(-1),
        "cross_entropy": lambda a, b: -(xp.exp(a) * b).sum(-1),
        "same_top": lambda a, b: (a.argmax(-1) == b.argmax(-1)) + 0.0,
    }

    def measure(formula: Measure) -> Measure:
        return lambda x, y: formula(log_softmax(x), log_softmax(y))

    def compare(x: Any, y: Any) -> Any:
        a, b = log_softmax(x), log_softmax(y)
        return xp.stack([of_log_probs[name](a, b) for name in DEFAULT_METRICS], -1)

    return {name: measure(formula) for name, formula in of_log_probs.items()} | {
        "entropy": lambda x: entropy(log_softmax(x)),
        "entropy_p": lambda x: entropy(log_softmax(x)),
        "entropy_q": lambda y: entropy(log_softmax(y)),
        "logsumexp": logsumexp,
        "token_log_probs": lambda x, tokens: pick(x, tokens) - logsumexp(x),
        COMPARE: compare,
    }


# NumPy and SciPy


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _numpy_pick(x: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[Any]:
    return _widened(np.take_along_axis(x, tokens[:, None], -1)[:, 0])


def _numpy_measures() -> dict[str, Measure]:
    def logsumexp(x: NDArray[Any]) -> Any:
        x = _widened(x)
        top = x.max(-1, keepdims=True)
        return (np.log(np.exp(x - top).sum(-1, keepdims=True)) + top)[:, 0]

    def log_softmax(x: NDArray[Any]) -> Any:
        x = _widened(x)
        return x - logsumexp(x)[:, None]

    return formulas(np, log_softmax, logsumexp, _numpy_pick)


def _scipy_measures() -> dict[str, Measure]:
    from scipy import special
    from scipy.spatial import distance

    def logsumexp(x: NDArray[Any]) -> Any:
        return special.logsumexp(_widened(x), axis=-1)

    def log_softmax(x: NDArray[Any]) -> Any:
        return special.log_softmax(_widened(x), axis=-1)

    def softmax(x: NDArray[Any]) -> Any:
        return special.softmax(_widened(x), axis=-1)

    def entropy(x: NDArray[Any]) -> Any:
        return special.entr(softmax(x)).sum(-1)

    own: dict[str, Measure] = {
        "kl": lambda x, y: special.rel_entr(softmax(x), softmax(y)).sum(-1),
        "reverse_kl": lambda x, y: special.rel_entr(softmax(y), softmax(x)).sum(-1),
        "js": lambda x, y: distance.jensenshannon(softmax(x), softmax(y), axis=-1) ** 2,
        "entropy": entropy,
        "entropy_p": entropy,
        "entropy_q": entropy,
    }
    return formulas(np, log_softmax, logsumexp, _numpy_pick) | own


# PyTorch


def _torch_array(array: NDArray[Any]) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_measures() -> dict[str, Measure]:
    import torch
    from torch.nn import functional

    def widened(x: Any) -> Any:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def logsumexp(x: Any) -> Any:
        return torch.logsumexp(widened(x), -1)

    def log_softmax(x: Any) -> Any:
        return functional.log_softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))

    def pick(x: Any, tokens: Any) -> Any:
        return widened(x.gather(-1, tokens[:, None])[:, 0])

    def kl(x: Any, y: Any) -> Any:
        terms = functional.kl_div(log_softmax(y), log_softmax(x), log_target=True, reduction="none")
        return terms.sum(-1)

    own: dict[str, Measure] = {"kl": kl, "reverse_kl": lambda x, y: kl(y, x)}
    return formulas(torch, log_softmax, logsumexp, pick) | own


def _torch_compiled(name: str) -> Measure | None:
    import torch

    measure = _torch_measures().get(name)
    if not isinstance(measure, FunctionType):
        return None
    # After a few compilations of one code object, torch.compile runs it uncompiled. Closures
    # share theirs, so this one gets its own; and each is compiled for the one shape it will see.
    own = FunctionType(
        measure.__code__.replace(co_name=name.replace(":", "_")),
        measure.__globals__,
        closure=measure.__closure__,
    )
    compiled: Measure = torch.compile(own, dynamic=False)
    return compiled


# JAX


def _jax_array(array: NDArray[Any]) -> Any:
    import jax

    return jax.device_put(array, jax.devices("cpu")[0])


def _jax_measure(name: str) -> Measure | None:
    import jax
    from jax import numpy as jnp

    def widened(x: Any) -> Any:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def logsumexp(x: Any) -> Any:
        return jax.nn.logsumexp(widened(x), axis=-1)

    def log_softmax(x: Any) -> Any:
        return jax.nn.log_softmax(widened(x), axis=-1)

    def pick(x: Any, tokens: Any) -> Any:
        return widened(jnp.take_along_axis(x, tokens[:, None], -1)[:, 0])

    measure = formulas(jnp, log_softmax, logsumexp, pick).get(name)
    if measure is None:
        return None
    compiled = jax.jit(measure)
    return lambda *arrays: compiled(*arrays).block_until_ready()


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


PEERS = (
    Peer("numpy", "numpy", _same, lambda name: _numpy_measures().get(name)),
    Peer("scipy", "scipy", _same, lambda name: _scipy_measures().get(name)),
    Peer("torch eager", "torch", _torch_array, lambda name: _torch_measures().get(name)),
    Peer("torch.compile", "torch", _torch_array, _torch_compiled),
    Peer("jax.jit", "jax", _jax_array, _jax_measure),
)

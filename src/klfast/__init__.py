"""Divergences between wide categorical distributions, straight from logits.

One fused pass over memory, exact to the last bits, for NumPy, PyTorch and JAX arrays:

    >>> import klfast
    >>> klfast.kl_divergence(p, q)               # one value a row, in nats
    >>> klfast.compare(p, q, ("kl", "renyi:2"))  # many measures from one read

`klfast.reference` has the same functions in float64 NumPy, written like their formulas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import reference
from ._api import (
    Explanation,
    alpha_divergence,
    chi2_divergence,
    cross_entropy,
    entropy,
    explain,
    jeffreys_divergence,
    js_divergence,
    kl_divergence,
    log_softmax,
    logsumexp,
    renyi_divergence,
    renyi_entropy,
    squared_hellinger,
    token_log_probs,
    total_variation,
    tsallis_divergence,
)
from ._compare import Comparison, compare
from ._dispatch import (
    BackendStatus,
    backends,
    get_num_threads,
    set_num_threads,
    warmup,
)
from .errors import BackendUnavailable

if TYPE_CHECKING:
    from . import bounds, closed_forms, estimators, gaussian, information, llama_cpp
    from ._bench import Timing, bench
    from ._evaluation import Evaluation
    from ._gradients import ValueAndGradient, value_and_grad
    from ._html import write_report
    from ._job import evaluate
    from ._linear import LinearLogits
    from ._machine import info
    from ._pairwise import pairwise
    from ._sources import LogitSource, SourceError, open_logits
    from ._states import RowState
    from .information import mutual_information

__version__ = "0.1.0"

# What evaluation jobs use is imported on first use: it costs more than the rest together.
_LAZY = {
    "Evaluation": "_evaluation",
    "LinearLogits": "_linear",
    "LogitSource": "_sources",
    "RowState": "_states",
    "SourceError": "_sources",
    "Timing": "_bench",
    "ValueAndGradient": "_gradients",
    "bench": "_bench",
    "evaluate": "_job",
    "info": "_machine",
    "mutual_information": "information",
    "open_logits": "_sources",
    "pairwise": "_pairwise",
    "value_and_grad": "_gradients",
    "write_report": "_html",
}
_MODULES = ("bounds", "closed_forms", "estimators", "gaussian", "information", "llama_cpp")
# These import a library, which no look at this package, such as help(klfast), may do.
_TO_BE_IMPORTED = ("distributed", "jax", "torch")

__all__ = [
    "BackendStatus",
    "BackendUnavailable",
    "Comparison",
    "Evaluation",
    "Explanation",
    "LinearLogits",
    "LogitSource",
    "RowState",
    "SourceError",
    "Timing",
    "ValueAndGradient",
    "alpha_divergence",
    "backends",
    "bench",
    "bounds",
    "chi2_divergence",
    "closed_forms",
    "compare",
    "cross_entropy",
    "entropy",
    "estimators",
    "evaluate",
    "explain",
    "gaussian",
    "get_num_threads",
    "info",
    "information",
    "jeffreys_divergence",
    "js_divergence",
    "kl_divergence",
    "llama_cpp",
    "log_softmax",
    "logsumexp",
    "mutual_information",
    "open_logits",
    "pairwise",
    "reference",
    "renyi_divergence",
    "renyi_entropy",
    "set_num_threads",
    "squared_hellinger",
    "token_log_probs",
    "total_variation",
    "tsallis_divergence",
    "value_and_grad",
    "warmup",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _LAZY:
        hint = f" (import {__name__}.{name})" if name in _TO_BE_IMPORTED else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})

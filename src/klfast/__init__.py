"""Divergences between wide categorical distributions, straight from logits.

One fused pass over memory, exact to the last bits, for NumPy, PyTorch and JAX arrays:

    >>> import klfast
    >>> klfast.kl_divergence(p, q)               # one value a row, in nats
    >>> klfast.compare(p, q, ("kl", "renyi:2"))  # many measures from one read

`klfast.reference` has the same functions in float64 NumPy, written like their formulas.
"""

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

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "BackendUnavailable",
    "Comparison",
    "Explanation",
    "alpha_divergence",
    "backends",
    "chi2_divergence",
    "compare",
    "cross_entropy",
    "entropy",
    "explain",
    "get_num_threads",
    "jeffreys_divergence",
    "js_divergence",
    "kl_divergence",
    "log_softmax",
    "logsumexp",
    "reference",
    "renyi_divergence",
    "renyi_entropy",
    "set_num_threads",
    "squared_hellinger",
    "token_log_probs",
    "total_variation",
    "tsallis_divergence",
    "warmup",
]

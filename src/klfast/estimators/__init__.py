"""Estimates of divergences where the distributions are not known whole.

From tokens and from the k largest of each row (`sampled_kl`, `kl_from_topk`), from samples with or
without log-probabilities (`monte_carlo_kl`, `knn_kl`), from the scores of a critic
(`donsker_varadhan`, `nwj`, `infonce`), and from counts (`kl_from_counts`, `entropy_from_counts`).
"""

from ._counts import entropy_from_counts, kl_from_counts
from ._critics import donsker_varadhan, infonce, nwj
from ._samples import Estimate, knn_kl, monte_carlo_kl
from ._tokens import AdaptiveController, TopKBounds, kl_from_topk, sampled_kl

__all__ = [
    "AdaptiveController",
    "Estimate",
    "TopKBounds",
    "donsker_varadhan",
    "entropy_from_counts",
    "infonce",
    "kl_from_counts",
    "kl_from_topk",
    "knn_kl",
    "monte_carlo_kl",
    "nwj",
    "sampled_kl",
]

"""Estimates of divergences where the distributions are not known whole.

From tokens and from the k largest of each row (`sampled_kl`, `kl_from_topk`), from samples with or
without log-probabilities (`monte_carlo_kl`, `knn_kl`), from the scores of a critic
(`donsker_varadhan`, `nwj`, `infonce`), and from counts (`kl_from_counts`, `entropy_from_counts`).
"""

from ._tokens import AdaptiveController, TopKBounds, kl_from_topk, sampled_kl

__all__ = [
    "AdaptiveController",
    "TopKBounds",
    "kl_from_topk",
    "sampled_kl",
]

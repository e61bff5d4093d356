"""Information measures: of joint distributions, of token log-probabilities, of calibration.

Joint distributions are arrays of shape (..., X, Y): logits over all X Y pairs of a table, their
log-probabilities, weights, or counts. Arrays are NumPy's, PyTorch's or JAX's on the CPU; results
are of the same kind, in nats where nothing else is said, in float64 if an argument is (or holds
counts), else in float32. TypeError and ValueError name the argument, what was given and what is
accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._api import entropy, kl_divergence, logsumexp
from ._values import Given, check_axis, check_batches, given
from .closed_forms import bernoulli_kl

__all__ = [
    "Bottleneck",
    "Calibration",
    "bits_per_byte",
    "bits_per_token",
    "calibration_kl",
    "conditional_entropy",
    "information_bottleneck",
    "mutual_information",
    "perplexity",
]

Values = NDArray[np.float64]
Input = Literal["logits", "log_probs", "probs", "counts"]

INPUTS = ("logits", "log_probs", "probs", "counts")


class Bottleneck(NamedTuple):
    """The terms of the information bottleneck: I(X; Z), I(Z; Y), and the first less beta second."""

    rate: Any
    relevance: Any
    objective: Any


def mutual_information(
    joint: Any, input: Input = "logits", *, correction: Literal["miller_madow"] | None = None
) -> Any:
    """Mutual information of the two variables of a joint distribution.

    Formula:
        I(X; Y) = KL(joint, product of its marginals), as `kl_divergence` computes it: never
        negative, and exact also where the variables are nearly independent.
        correction="miller_madow", for counts: less the bias to the first order of 1/N,
        (K_xy - K_x - K_y + 1) / (2 N) with K the numbers of different pairs, x and y that were
        seen. It may be negative.

    Arguments:
        joint: shape (..., X, Y).
        input: "logits", "log_probs", "probs" or "counts"; all are normalized. Counts may be
            integers.
        correction: None or "miller_madow".

    Returns:
        One value a table.

    Source:
        Cover and Thomas, Elements of Information Theory, 2006, section 2.3; Miller, 1955.
    """
    origin, table = _joint(joint, input)
    if correction not in (None, "miller_madow"):
        raise ValueError(f"correction is {correction!r}; accepted: None, 'miller_madow'")
    value = _information(table, input)
    if correction is not None:
        if input != "counts":
            raise ValueError(f"correction is of counts, and input is {input!r}; accepted: 'counts'")
        kinds = [np.count_nonzero(each, axis=-1) for each in (
            table.reshape(*table.shape[:-2], -1), table.sum(-1), table.sum(-2)
        )]  # fmt: skip
        with np.errstate(all="ignore"):
            value = value - (kinds[0] - kinds[1] - kinds[2] + 1) / (2.0 * table.sum((-1, -2)))
    return origin.result(value)


def conditional_entropy(joint: Any, input: Input = "logits", *, given_axis: int = -2) -> Any:
    """Entropy of one variable of a joint distribution where the other is known.

    Formula:
        H(Y | X) = sum over x of p(x) H(Y | X = x).

    Arguments:
        joint: as for `mutual_information`.
        input: as for `mutual_information`.
        given_axis: the axis of the known variable: -2 for H(Y | X), -1 for H(X | Y).

    Returns:
        One value a table.

    Source:
        Cover and Thomas, Elements of Information Theory, 2006, section 2.2.
    """
    origin, table = _joint(joint, input)
    if given_axis not in (-2, -1):
        raise ValueError(f"given_axis is {given_axis!r}; accepted: -2, -1")
    if given_axis == -1:
        table = np.swapaxes(table, -1, -2)
    kind = _row_input(input)
    weights = np.exp(_log_marginal(table, kind))
    each = np.asarray(entropy(table, input=kind))
    # Rows without mass have no distribution, and no weight; a table without any has no entropy.
    with np.errstate(invalid="ignore"):
        return origin.result(np.sum(np.where(weights == 0.0, 0.0, weights * each), -1))


def information_bottleneck(
    joint: Any, encoder: Any, *, beta: float = 1.0, input: Input = "logits"
) -> Bottleneck:
    """Terms of the information bottleneck of a stochastic encoder.

    Formula:
        rate I(X; Z) and relevance I(Z; Y), with Y - X - Z: p(z, y) = sum_x p(x, y) p(z | x);
        objective: rate - beta relevance, which the best encoder makes smallest.

    Arguments:
        joint: p(x, y), shape (..., X, Y).
        encoder: logits of p(z | x), shape (..., X, Z).
        beta: how much relevance is worth, from 0.
        input: what the joint distribution is given as, as for `mutual_information`.

    Returns:
        rate, relevance and objective, one a table, in nats.

    Source:
        Tishby, Pereira and Bialek, The Information Bottleneck Method, 1999.
    """
    origin = given({"joint": joint, "encoder": encoder}) if input != "counts" else None
    known, table = _joint(joint, input)
    codes = given({"encoder": encoder}).values()[0] if origin is None else origin.values()[1]
    check_axis("encoder", codes.shape, 2)
    if codes.shape[-2] != table.shape[-2]:
        raise ValueError(
            f"encoder has shape {codes.shape}, joint {table.shape}; accepted: the same number of x"
        )
    check_batches(joint=table.shape[:-2], encoder=codes.shape[:-2])
    if not 0.0 <= float(beta) < math.inf:
        raise ValueError(f"beta is {beta!r}; accepted: a number from 0")
    if input in ("probs", "counts"):
        weights = table / table.sum((-1, -2), keepdims=True)
    else:
        flat = np.asarray(logsumexp(table.reshape(*table.shape[:-2], -1)))
        weights = np.exp(table - flat[..., None, None])
    code = np.exp(codes - np.asarray(logsumexp(codes))[..., None])
    rate = _information(weights.sum(-1)[..., None] * code, "probs")
    relevance = _information(np.swapaxes(code, -1, -2) @ weights, "probs")
    result = (known if origin is None else origin).result
    return Bottleneck(result(rate), result(relevance), result(rate - beta * relevance))


def perplexity(log_probs: Any, where: ArrayLike | None = None) -> Any:
    """Perplexity of a text: exp of the mean of -log p of its tokens.

    Arguments:
        log_probs: log-probabilities of the tokens that followed, in nats, of any shape, as
            `token_log_probs` gives them.
        where: booleans that say which of them count; all if None.

    Returns:
        One number; NaN for no tokens.

    Source:
        Jelinek et al., Perplexity - a measure of the difficulty of speech recognition tasks, 1977.
    """
    origin, kept = _kept(log_probs, where)
    with np.errstate(over="ignore"):
        return origin.result(np.exp(_mean_loss(kept)))


def bits_per_token(log_probs: Any, where: ArrayLike | None = None) -> Any:
    """Mean of -log2 p of the tokens of a text; arguments as for `perplexity`."""
    origin, kept = _kept(log_probs, where)
    return origin.result(_mean_loss(kept) / math.log(2.0))


def bits_per_byte(log_probs: Any, n_bytes: int, where: ArrayLike | None = None) -> Any:
    """Sum of -log2 p of the tokens of a text over its length in bytes.

    It can be compared between models of different vocabularies, where bits per token cannot.
    `n_bytes` is the length of the text that the tokens stand for, in UTF-8; other arguments as for
    `perplexity`. Source: Gao et al., The Pile, 2020, section 3.1.
    """
    origin, kept = _kept(log_probs, where)
    if not n_bytes > 0:
        raise ValueError(f"n_bytes is {n_bytes!r}; accepted: a number above 0")
    return origin.result(np.asarray(math.fsum(-kept) / (n_bytes * math.log(2.0))))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predicted and observed frequencies, in bins of the predicted probability.

    ``kl`` is the mean over predictions of KL(observed, predicted) of their bin, as of two coins, in
    nats; ``error`` that of the absolute difference, known as the expected calibration error.
    ``count``, ``predicted`` and ``observed`` have one entry a bin, NaN where a bin is empty.
    """

    kl: float
    error: float
    count: NDArray[np.int64]
    predicted: Values
    observed: Values
    edges: Values

    def plot(self, axes: Any = None) -> Any:
        """Draw the reliability diagram with matplotlib (the extra "plot"), and return its axes."""
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError('this needs matplotlib: pip install "klfast[plot]"') from error
            axes = Figure(figsize=(4, 4)).subplots()
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=1)
        filled = self.count > 0
        area = 200.0 * self.count[filled] / self.count.max(initial=1)
        axes.plot(self.predicted[filled], self.observed[filled], color="C0", linewidth=1)
        axes.scatter(self.predicted[filled], self.observed[filled], s=4 + area, alpha=0.6)
        axes.set(xlabel="predicted probability", ylabel="observed frequency",
                 xlim=(0, 1), ylim=(0, 1),
                 title=f"KL {self.kl:.3g}, error {self.error:.3g}")  # fmt: skip
        return axes


def calibration_kl(
    probabilities: Any,
    outcomes: ArrayLike,
    bins: int = 15,
    *,
    spacing: Literal["uniform", "quantile"] = "uniform",
) -> Calibration:
    """How far predicted probabilities are from the frequencies of what was predicted.

    Formula:
        sum over bins of n_b / n KL(o_b, c_b), with c_b the mean of the predicted probabilities in
        a bin and o_b the share of them that came true. It exceeds the divergence of calibrated
        predictions, 0, by about bins / (2 n).

    Arguments:
        probabilities: in [0, 1], of any shape.
        outcomes: whether each came true, of the same shape: booleans, or 0 and 1.
        bins: how many.
        spacing: "uniform" of [0, 1], or "quantile" for about as many predictions in each.

    Returns:
        A `Calibration`, which can draw the reliability diagram.

    Source:
        Bröcker, Reliability, sufficiency, and the decomposition of proper scores, 2009; Guo et al.,
        On Calibration of Modern Neural Networks, 2017.
    """
    origin = given({"probabilities": probabilities})
    p, hit = origin.values()[0].ravel(), np.asarray(outcomes)
    if hit.shape != next(iter(origin.views.values())).shape:
        raise ValueError(
            f"outcomes have shape {hit.shape}; accepted: that of probabilities, "
            f"{next(iter(origin.views.values())).shape}"
        )
    if hit.dtype.kind not in "biuf" or not np.isin(hit, (0, 1)).all():
        raise ValueError(f"outcomes have dtype {hit.dtype}; accepted: booleans, or 0 and 1")
    if not ((p >= 0.0) & (p <= 1.0)).all() or not p.size:
        raise ValueError("probabilities are none, or outside [0, 1]; accepted: numbers in [0, 1]")
    if isinstance(bins, bool) or not hasattr(bins, "__index__") or bins < 1:
        raise ValueError(f"bins is {bins!r}; accepted: a whole number from 1")
    if spacing not in ("uniform", "quantile"):
        raise ValueError(f"spacing is {spacing!r}; accepted: 'uniform', 'quantile'")
    even = np.linspace(0.0, 1.0, bins + 1)
    edges = even if spacing == "uniform" else np.quantile(p, even)
    number = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, bins - 1)
    count = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(number, p, bins) / count
        observed = np.bincount(number, hit.ravel().astype(np.float64), bins) / count
    filled = count > 0
    share = count[filled] / p.size
    divergence = np.asarray(bernoulli_kl(observed[filled], predicted[filled]))
    difference = np.abs(observed[filled] - predicted[filled])
    return Calibration(
        float(share @ divergence), float(share @ difference), count, predicted, observed, edges
    )


def _joint(joint: Any, input: str) -> tuple[Given, Values]:
    """The checked table, in float64."""
    if input not in INPUTS:
        raise ValueError(f"input is {input!r}; accepted: {', '.join(map(repr, INPUTS))}")
    if input == "counts":
        joint = np.asarray(joint)
        if joint.dtype.kind not in "biuf":
            raise TypeError(f"joint has dtype {joint.dtype}; accepted: integers or real numbers")
        joint = joint.astype(np.float64)
        if not (np.isfinite(joint).all() and (joint >= 0.0).all()):
            raise ValueError("joint holds a negative count, NaN or infinity; accepted: from 0")
    origin = given({"joint": joint})
    (table,) = origin.values()
    check_axis("joint", table.shape, 2)
    return origin, table


def _row_input(input: str) -> Any:
    return "probs" if input == "counts" else input


def _information(table: Values, input: str) -> Values:
    """KL of a table from the product of its marginals, through the functions of rows."""
    kind = _row_input(input)
    if kind == "probs":
        product = table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :]
    else:
        across, down = _log_sums(table, kind), _log_sums(np.swapaxes(table, -1, -2), kind)
        product = across[..., :, None] + down[..., None, :]
    rows = [each.reshape(*each.shape[:-2], -1) for each in (table, product)]
    return np.asarray(kl_divergence(*rows, input=kind), np.float64)


def _log_marginal(table: Values, kind: Any) -> Values:
    """The logarithms of p(x)."""
    rows = _log_sums(table, kind)
    normalized: Values = rows - np.asarray(logsumexp(rows))[..., None]
    return normalized


def _log_sums(table: Values, kind: Any) -> Values:
    """The log-sum-exp of every row; -inf, and not NaN, of a row without mass."""
    nothing = 0.0 if kind == "probs" else -np.inf
    sums = np.asarray(logsumexp(table, input=kind))
    return np.where((table == nothing).all(-1), -np.inf, sums)


def _kept(log_probs: Any, where: ArrayLike | None) -> tuple[Given, Values]:
    origin = given({"log_probs": log_probs})
    (values,) = origin.values()
    if where is not None:
        keep = np.asarray(where)
        if keep.dtype != np.bool_ or keep.shape != values.shape:
            raise ValueError(
                f"where has dtype {keep.dtype} and shape {keep.shape}; accepted: booleans of shape "
                f"{values.shape}"
            )
        values = values[keep]
    if (values > 0.0).any():
        raise ValueError(f"log_probs hold {values.max():g}; accepted: logarithms, at most 0")
    return origin, values.ravel()


def _mean_loss(kept: Values) -> Values:
    return np.asarray(math.fsum(-kept) / kept.size if kept.size else math.nan)

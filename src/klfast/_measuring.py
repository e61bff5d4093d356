"""Which measures an evaluation makes, and how a batch of rows of two models is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._operations import DEFAULT_METRICS, OPERATIONS, TARGET_METRICS, parse_metric
from ._pairs import Block

#: What an evaluation makes if nothing else is asked for: top_p is the base model's confidence.
EVALUATION_METRICS = (*DEFAULT_METRICS, "top_p")
#: What the metric "all" stands for.
ALL_METRICS = (
    "kl", "reverse_kl", "js", "renyi:0.5", "renyi:2", "tv", "hellinger2", "entropy_p", "entropy_q",
    "same_top", "topk_overlap:5", "top_p",
)  # fmt: skip

# Numbers of explicit mantissa bits, and the smallest exponent of a normal number.
_SIXTEEN_BITS = {"float16": (10, -14), "bfloat16": (7, -126)}


class Rows(NamedTuple):
    """A batch of rows of both models, of shape (..., V), and what is known of them.

    Everything else has one entry a row: of shape (...) what goes to `klfast.compare` (targets and
    where), and flat what does not.
    """

    block: Block
    targets: Any = None
    where: Any = None
    sequences: NDArray[np.int64] | None = None
    numbers: NDArray[np.int64] | None = None  # where rows of a file are left out: which each is,
    positions: NDArray[np.int64] | None = None  # and how many rows of its sequence are before it
    noise_at: Sequence[int] = ()  # rows of which to estimate the effect of rounding to 16 bits


def measured(
    rows: Rows, settings: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], list[float]]:
    """Measure a batch of rows: a column for each measure and for what is known of the rows.

    ``settings`` are those of an `Evaluation`. Second come estimates of the mean KL from rounding to
    16 bits, of the rows ``noise_at``.
    """
    import klfast

    block = rows.block._replace(p=_plain(rows.block.p), q=_plain(rows.block.q))
    rows = rows._replace(targets=_plain(rows.targets), where=_plain(rows.where))
    with_targets = rows.targets is not None
    asked = names = measures(settings["metrics"], with_targets)
    options = {name: each for name, each in settings.items() if name != "metrics"}
    if block.nll is not None:
        asked = tuple(name for name in asked if name not in TARGET_METRICS)
    if block.tops is not None:
        asked = tuple(name for name in asked if name != "same_top")
    if block.input is not None:
        options["input"] = block.input
    values: dict[str, NDArray[Any]] = {}
    if asked:
        result = klfast.compare(
            block.p, block.q, asked,
            targets=None if block.nll is not None else rows.targets,
            where=rows.where,
            dtype=np.float64,
            **options,
        )  # fmt: skip
        values = {name: on_host(result[name]) for name in asked}
    if block.nll is not None:
        nll_p, nll_q = (np.asarray(each, np.float64) for each in block.nll)
        change = np.exp(-nll_q) - np.exp(-nll_p)
        values |= {"nll_p": nll_p, "nll_q": nll_q, "delta_prob": change}
    if block.tops is not None:
        p, q = block.tops
        values["same_top"] = np.where((p < 0) | (q < 0), np.nan, p == q)
    columns: dict[str, NDArray[Any]] = {name: values[name] for name in names}
    for name, each in (block.extra or {}).items():
        columns[name] = np.asarray(each, np.float64)
    if with_targets:
        columns["target"] = on_host(rows.targets).astype(np.int64)
        if "same_top" in names:
            columns["flip"] = _flips(
                block, values["same_top"], columns["target"], settings["vocab_size"]
            )
    if rows.sequences is not None:
        columns["sequence"] = rows.sequences
    if rows.numbers is not None:
        columns["row"] = rows.numbers
    if rows.positions is not None:
        columns["position"] = rows.positions
    if rows.where is not None:
        keep = on_host(rows.where)
        columns = {name: column[keep] for name, column in columns.items()}
    return columns, [_rounding(block, row, settings) for row in rows.noise_at]


def _flips(
    block: Block, same_top: NDArray[np.float64], targets: NDArray[np.int64], width: int | None
) -> NDArray[np.int8]:
    """The kind of flip of each row: only of those that flip the largest entry is looked up."""
    kinds = np.zeros(len(same_top), np.int8)
    for row in np.flatnonzero(same_top == 0):
        tops = [each[row] for each in block.tops or ()] or [
            largest_entry(_row(x, int(row))[:width]) for x in (block.p, block.q)
        ]
        right = [top == targets[row] for top in tops]
        kinds[row] = 1 if right[0] else 2 if right[1] else 3
    return kinds


def _rounding(block: Block, row: int, settings: Mapping[str, Any]) -> float:
    """Expected KL from the rounding of one row to 16 bits, on both sides."""
    temperature = settings["temperature"]
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    if settings["input"] != "logits" or block.input is not None:
        return math.nan
    width = settings["vocab_size"]
    return sum(
        _rounding_noise(_row(x, row)[:width], float(t))
        for x, t in zip((block.p, block.q), pair, strict=True)
        if rounded(x)
    )


def compares(metric: str) -> bool:
    """Whether a measure says how far two rows are from each other."""
    operation = OPERATIONS.get(metric.partition(":")[0])
    compares = operation is not None and operation.arity == 2 and not operation.tokens
    return compares and metric != "cross_entropy"


def is_similarity(metric: str) -> bool:
    """Whether a measure is the larger, the closer two rows are."""
    return metric.partition(":")[0] in ("same_top", "topk_overlap")


def measures(metrics: str | Sequence[str] | None, with_targets: bool) -> tuple[str, ...]:
    """Names of the measures an evaluation makes; ValueError for one it cannot make."""
    asked = (metrics,) if isinstance(metrics, str) else metrics
    names = EVALUATION_METRICS if asked is None else tuple(asked)
    if not names:
        raise ValueError("metrics is empty; accepted: at least one measure")
    names = tuple(
        each for name in names for each in (ALL_METRICS if name == "all" else (name,))
    )  # fmt: skip
    for name in names:
        operation, _ = parse_metric(name)
        if operation.tokens and not with_targets:
            raise ValueError(f"metric {name!r} needs targets")
    return tuple(dict.fromkeys(names + (TARGET_METRICS if with_targets else ())))


def _plain(array: Any) -> Any:
    """An array of JAX as one of NumPy, in the same memory: JAX has no float64 unless asked to."""
    return np.asarray(array) if type(array).__module__.startswith("jax") else array


def on_host(array: Any) -> NDArray[Any]:
    """One value a row as a flat NumPy array, wherever it is."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    elif hasattr(array, "get"):
        array = array.get()
    return np.asarray(array).reshape(-1)


def _row(logits: Any, number: int) -> Any:
    """One row of logits of shape (..., V), as a view."""
    lead = tuple(logits.shape[:-1])
    return logits[tuple(int(i) for i in np.unravel_index(number, lead))] if lead else logits


def largest_entry(row: Any) -> int:
    """Index of the largest entry, the first of equal ones."""
    if isinstance(row, np.ndarray) and row.itemsize == 2:
        # As integers of the same order, 16 bits are found twenty times as fast.
        bits = row.view(np.int16)
        row = bits ^ ((bits >> 15) & 0x7FFF)
        row[row == -1] = 0  # a negative zero
    return int(row.argmax())


def rounded(logits: Any) -> bool:
    return str(logits.dtype).rpartition(".")[2] in _SIXTEEN_BITS


def _rounding_noise(row: Any, temperature: float) -> float:
    """Expected KL between a row and itself before it was rounded to 16 bits.

    Rounding errors e are independent, with the variance of a uniform one, step^2 / 12. To second
    order KL is half the variance of e under p, of which 1/2 sum p (1 - p) step^2 / 12 is the mean.
    """
    bits, least = _SIXTEEN_BITS[str(row.dtype).rpartition(".")[2]]
    wide = row.double() if hasattr(row, "double") else row.astype(np.float64)
    x = on_host(wide)
    if not (np.isfinite(x) | (x == -np.inf)).all() or x.max() == -np.inf:
        return math.nan
    p = np.exp((x - x.max()) / temperature)
    p /= p.sum()
    _, exponent = np.frexp(np.where(p > 0, x, 0.0))
    step = np.ldexp(1.0, np.maximum(exponent - 1, least) - bits) / temperature
    return float((p * (1 - p) * step**2).sum() / 24)

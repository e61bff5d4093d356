"""Many measures from one read of main memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from . import _device
from ._api import documented
from ._arguments import CompareOptions, check_options, finish, prepare, target_of
from ._operations import DEFAULT_METRICS, TARGET_METRICS, parse_metric

__all__ = ["Comparison", "compare"]


class Comparison(Mapping[str, Any]):
    """The result of `compare`: a mapping from each metric to its values.

    `metrics` are the names, in the order they were asked for. The values are arrays of the kind of
    the inputs, one value a row, or single numbers after a reduction.
    """

    def __init__(
        self, values: Mapping[str, Any], shape: tuple[int, ...], vocab_size: int, reduction: str
    ) -> None:
        self._values = dict(values)
        self.shape = shape  # of the batch
        self.vocab_size = vocab_size  # entries of a row that were read
        self.reduction = reduction

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(self._values)

    def to_dict(self) -> dict[str, Any]:
        """Return Python numbers, in lists that nest like the batch, ready for JSON."""
        return {name: _numbers(values) for name, values in self._values.items()}

    def __getitem__(self, metric: str) -> Any:
        if metric not in self._values:
            raise KeyError(f"metric {metric!r} was not computed; there are: {list(self._values)}")
        return self._values[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        """Name each metric with its mean, median and maximum over the rows that are not NaN."""
        columns: dict[str, Any] = {"mean": np.mean, "median": np.median, "max": np.max}
        if self.reduction != "none":
            columns = {self.reduction: np.max}  # of one number
        width = max(map(len, self._values))
        rows, left_out = [" " * width + "".join(f"{name:>14}" for name in columns)], 0
        for name, values in self._values.items():
            numbers = np.array(_numbers(values), np.float64)
            valid = numbers[~np.isnan(numbers)]
            left_out = max(left_out, numbers.size - valid.size)
            cells = (of(valid) if valid.size else np.nan for of in columns.values())
            rows.append(f"{name:<{width}}" + "".join(f"{cell:>14.6g}" for cell in cells))
        if left_out and self.reduction == "none":
            rows.append(f"NaN in {left_out} rows, left out here")
        title = f"Comparison of {math.prod(self.shape)} rows, vocabulary {self.vocab_size}"
        return "\n  ".join([title, *rows])


def _numbers(values: Any) -> Any:
    """Python numbers of any array, also of a library that offers only DLPack."""
    return (values if hasattr(values, "tolist") else np.from_dlpack(values)).tolist()


@documented(
    CompareOptions,
    returns='A `Comparison`, in which r["kl"] are the values of one metric, r.metrics the names, '
    "and\nr.to_dict() everything in Python numbers.",
)
def compare(
    p: Any,
    q: Any,
    metrics: str | Sequence[str] | None = None,
    targets: Any = None,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """Compare each row of `p` with that of `q` by many measures, in one pass over main memory.

    `metrics` are names: "kl", "reverse_kl", "jeffreys", "js", "js:W" with the weight of P,
    "renyi:A", "alpha:A", "tsallis:A", "tv", "hellinger2", "chi2", "cross_entropy", "entropy_p",
    "entropy_q", "same_top" (1 where the largest entries are at the same index, the first of equal
    ones), "top_p" (largest probability of P), "topk_overlap:K" (share of the K largest in common),
    and with `targets`, integers of the shape of the batch, "nll_p", "nll_q" and "delta_prob"
    (q - p of the target).

    `p` and `q` may also be `LogitSource` objects, such as `klfast.LinearLogits`, which are read a
    few rows at a time; the results are NumPy arrays then.

    None takes what an evaluation of a quantized model needs: "kl" for the information lost,
    "reverse_kl" for mass that P does not have, "tv" for the largest change in the probability of
    any set of tokens, "same_top" for greedy decoding, and the three of the targets if there are
    any. Rows that `where` drops may have any target. Raises IndexError with the first target that
    is out of range, and ValueError with the nearest name for an unknown metric.
    """
    if metrics is None:
        metrics = DEFAULT_METRICS + (() if targets is None else TARGET_METRICS)
    names = tuple(dict.fromkeys((metrics,) if isinstance(metrics, str) else metrics))
    if hasattr(p, "read") or hasattr(q, "read"):
        return _compare_sources(p, q, names, targets, options)
    if not names:
        raise ValueError("metrics is empty; accepted: None, or at least one name")
    parsed = [parse_metric(name) for name in names]
    for name, (operation, _) in zip(names, parsed, strict=True):
        if operation.tokens and targets is None:
            raise ValueError(f"metric {name!r} needs targets, which is None; accepted: integers")
    settings = check_options("compare", options, CompareOptions)
    batch = prepare({"p": p, "q": q}, settings, None if targets is None else ("targets", targets))
    for name, (operation, parameters) in zip(names, parsed, strict=True):
        if operation.name == "topk_overlap" and parameters[0] > batch.p.width:
            raise ValueError(
                f"metric {name!r}: k is {parameters[0]:g}; accepted: 1 to {batch.p.width}, the "
                "vocabulary"
            )
    dtype, _ = target_of(batch, batch.shape)
    assert batch.q is not None  # two arrays were given
    wanted = [(operation.name, parameters) for operation, parameters in parsed]
    if batch.place.device != "cpu":
        results = _device.evaluate(batch, wanted, dtype)
    else:
        results = [batch.empty_values() for _ in parsed]
        if not batch.idle:
            results = batch.backend.compare(wanted, batch.p, batch.q, batch.rows, batch.tokens)
        if batch.keep is not None:
            for values in results:
                values[~batch.keep] = np.nan
        results = [
            finish(batch, values, operation.logarithmic, dtype)
            for values, (operation, _) in zip(results, parsed, strict=True)
        ]
    return Comparison(
        dict(zip(names, results, strict=True)),
        batch.shape,
        batch.p.width,
        settings.reduction,
    )


def _compare_sources(
    p: Any, q: Any, names: tuple[str, ...], targets: Any, options: Mapping[str, Any]
) -> Comparison:
    """The same of sources, which are read in blocks."""
    from ._job import Job
    from ._sources import as_source

    settings = check_options("compare", options, CompareOptions)
    if settings.axis != -1:
        raise ValueError(f"axis is {settings.axis}; accepted, of a LogitSource: -1")
    where = None if settings.where is None else np.asarray(settings.where)
    base, test = as_source(p, "p"), as_source(q, "q")
    lead = base.shape[:-1]
    if where is not None and (where.dtype != np.bool_ or where.shape != lead):
        raise ValueError(
            f"where has shape {where.shape} and dtype {where.dtype}; accepted: boolean, {lead}"
        )
    keep = None if where is None else where.reshape(-1)
    same = ("temperature", "input", "vocab_size", "backend")
    known = {name: getattr(settings, name) for name in same}
    (evaluation,) = Job(base, [test], targets, where=keep, metrics=names, **known).run()
    kept, _ = evaluation.stored()
    dtype = np.dtype(settings.dtype or ("f8" if "float64" in (base.dtype, test.dtype) else "f4"))
    found: dict[str, Any] = {}
    for name in names:
        values: Any = kept[name]
        if parse_metric(name)[0].logarithmic:
            values = values / settings.unit
        if settings.reduction == "none":
            rows = np.full(math.prod(lead), np.nan)
            rows[slice(None) if keep is None else keep] = values
            values = rows.reshape(lead)
        elif settings.reduction == "sum":
            values = values.sum()
        else:
            values = values.sum() / len(values) if len(values) else np.float64(np.nan)
        found[name] = values.astype(dtype)
    width = settings.vocab_size or base.shape[-1]
    return Comparison(found, lead, width, settings.reduction)

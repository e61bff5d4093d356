"""The evaluation job: two sets of logits of any size, compared row by row, and its statistics."""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._arrays import FLOATS
from ._machine import machine, versions
from ._operations import DEFAULT_METRICS, TARGET_METRICS, parse_metric
from ._sources import ArraySource, LogitSource, SourceError, open_logits, open_targets

Logits: TypeAlias = "str | os.PathLike[str] | LogitSource | Any"
Progress: TypeAlias = Callable[[int, int], None]

# Both inputs' bytes in one chunk: far above the cost of a call, far below a laptop's memory, and
# often enough for a progress bar.
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Statistics:
    """One measure over the rows that count.

    ``standard_error`` is s / sqrt(n), with s the sample standard deviation (n - 1); it takes rows
    as independent. For a measure that is 0 or 1 this is the binomial sqrt(p (1 - p) / (n - 1)).
    Quantiles interpolate linearly at f (n - 1). ``infinite`` counts the rows where the measure is
    infinite: they make the mean infinite too, and the error NaN.
    """

    mean: float
    standard_error: float
    min: float
    median: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float
    infinite: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Statistics:
        """Summarize ``values``, which hold no NaN; of no values everything is NaN."""
        mean, error = _mean_and_error(values)
        ordered = np.sort(values)
        return cls(
            mean=mean,
            standard_error=error,
            min=_quantile(ordered, 0.0),
            median=_quantile(ordered, 0.5),
            p90=_quantile(ordered, 0.9),
            p95=_quantile(ordered, 0.95),
            p99=_quantile(ordered, 0.99),
            p99_9=_quantile(ordered, 0.999),
            max=_quantile(ordered, 1.0),
            infinite=int(np.isinf(values).sum()),
        )


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexities exp(mean nll) of both models on the targets, and their ratio.

    The error of the ratio comes from the differences nll_q - nll_p of each row, so what both
    models find hard alike does not count; errors of exponentials are exp(mean) times the error of
    the mean.
    """

    base: float
    base_error: float
    test: float
    test_error: float
    ratio: float
    ratio_error: float
    log_ratio: float
    log_ratio_error: float

    @classmethod
    def of(cls, nll_p: NDArray[np.float64], nll_q: NDArray[np.float64]) -> Perplexity:
        """From the negative log-likelihoods of the targets, one a row."""
        base, base_error = _exp_with_error(*_mean_and_error(nll_p))
        test, test_error = _exp_with_error(*_mean_and_error(nll_q))
        with np.errstate(invalid="ignore"):
            log_ratio, log_ratio_error = _mean_and_error(nll_q - nll_p)
        ratio, ratio_error = _exp_with_error(log_ratio, log_ratio_error)
        return cls(base, base_error, test, test_error, ratio, ratio_error,
                   log_ratio, log_ratio_error)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WorstRow:
    """One of the rows where the first measure is largest, with all measures of it."""

    row: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of an evaluation over the rows that hold no NaN."""

    rows: int
    nan_rows: int
    measures: dict[str, Statistics]
    perplexity: Perplexity | None
    worst_rows: tuple[WorstRow, ...]

    def value(self, name: str) -> float:
        """Look up one statistic by its dotted name.

        ``"kl.mean"`` or ``"renyi:2.p99_9"``: a measure and a field of `Statistics`;
        ``"perplexity.ratio"``: a field of `Perplexity`; or ``"nan_rows"``. Raises ValueError for
        anything else, naming the nearest there is.
        """
        check_statistic(name, tuple(self.measures))
        if name == "nan_rows":
            return self.nan_rows
        part, _, statistic = name.rpartition(".")
        owner = self.perplexity if part == "perplexity" else self.measures[part]
        return float(getattr(owner, statistic))

    def violations(
        self,
        above: Mapping[str, float] | None = None,
        below: Mapping[str, float] | None = None,
    ) -> list[str]:
        """Say which statistics lie above (or below) their limits, one line each.

        A statistic that is NaN violates every limit: it shows nothing to be in order.
        """
        lines = []
        for side, limits in (("above", above or {}), ("below", below or {})):
            for name, limit in limits.items():
                value = self.value(name)
                kept = value <= limit if side == "above" else value >= limit
                if not kept:
                    how = "is not a number; it may not be" if math.isnan(value) else "is"
                    lines.append(f"{name} = {value:.9g} {how} {side} {limit:.9g}")
        return lines


@dataclass(frozen=True)
class Evaluation:
    """Every measure of every row of two sets of logits, and what they amount to.

    Attributes
    ----------
    columns
        One float64 array a measure, one value a row (nats, natural logarithm).
    nan_rows
        Numbers of the rows in which a measure is NaN, because the row of logits holds NaN or
        +inf, or is -inf throughout. They are in `columns` and left out of all statistics.
    base, test
        What was compared: name, shape and dtype of each.
    settings
        The arguments that the values depend on.
    seconds
        How long the comparison took.
    """

    columns: dict[str, NDArray[np.float64]]
    base: dict[str, Any]
    test: dict[str, Any]
    settings: dict[str, Any]
    seconds: float
    nan_rows: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        nan = np.logical_or.reduce([np.isnan(column) for column in self.columns.values()])
        object.__setattr__(self, "nan_rows", np.flatnonzero(nan))

    @property
    def rows(self) -> int:
        """How many rows were compared, those that hold NaN included."""
        return len(next(iter(self.columns.values())))

    def summary(self, worst: int = 5) -> Summary:
        """Statistics over the rows without NaN, and the ``worst`` rows by the first measure."""
        valid = np.delete(np.arange(self.rows), self.nan_rows)
        kept = {name: column[valid] for name, column in self.columns.items()}
        perplexity = None
        if "nll_p" in kept and "nll_q" in kept:
            perplexity = Perplexity.of(kept["nll_p"], kept["nll_q"])
        order = np.argsort(-next(iter(kept.values())), kind="stable")[:worst]
        return Summary(
            rows=self.rows,
            nan_rows=len(self.nan_rows),
            measures={name: Statistics.of(values) for name, values in kept.items()},
            perplexity=perplexity,
            worst_rows=tuple(
                WorstRow(int(valid[i]), {name: float(values[i]) for name, values in kept.items()})
                for i in order
            ),
        )

    def to_dict(self, worst: int = 5, columns: bool = False) -> dict[str, Any]:
        """Everything as plain Python numbers, strings, lists and dicts, ready for ``json.dump``.

        Numbers keep full precision; what JSON cannot say is a string, "NaN", "Infinity" or
        "-Infinity", which ``float()`` understands. ``columns=True`` adds every value of every row.
        """
        summary = self.summary(worst)
        result: dict[str, Any] = {
            "base": self.base,
            "test": self.test,
            "settings": self.settings,
            "rows": summary.rows,
            "nan_rows": self.nan_rows.tolist(),
            "measures": {name: asdict(each) for name, each in summary.measures.items()},
            "perplexity": asdict(summary.perplexity) if summary.perplexity else None,
            "worst_rows": [asdict(each) for each in summary.worst_rows],
            "seconds": self.seconds,
            "versions": versions(),
            "machine": machine(),
        }
        if columns:
            result["columns"] = {name: values.tolist() for name, values in self.columns.items()}
        plain: dict[str, Any] = plain_json(result)
        return plain

    def __str__(self) -> str:
        """Return the table that the command line prints."""
        from ._report import table

        return table(self, self.summary())


def evaluate(
    base: Logits,
    test: Logits,
    targets: Any = None,
    *,
    metrics: Sequence[str] | None = None,
    temperature: float | tuple[float, float] = 1.0,
    input: Literal["logits", "log_probs", "probs"] = "logits",
    vocab_size: int | None = None,
    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto",
    key: str | None = None,
    chunk_rows: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare two models' logits, row by row, in chunks: files may be larger than memory.

    Parameters
    ----------
    base, test
        Logits of the original model (P) and of the one under test (Q), of the same shape
        ``(..., V)``: the path of a ``.npy``, ``.npz`` or ``.safetensors`` file, a `LogitSource`,
        or an array on the host. Leading axes are flattened, and rows numbered from 0.
    targets
        The token that really followed each row: integers of shape ``(...)`` or ``(rows,)``, as
        an array or the path of a file. Adds the measures nll_p, nll_q and delta_prob, and the
        perplexities.
    metrics
        Measures, as for `klfast.compare`. The first one decides which rows are the worst. None
        is ``("kl", "reverse_kl", "tv", "same_top")``.
    temperature, input, vocab_size, backend
        As for `klfast.compare`.
    key
        Name of the array, in files that hold several. By default ``logits``, or the only one.
    chunk_rows
        Rows read at a time. None takes about 64 MiB of both inputs together.
    progress
        Called after every chunk with the number of rows done and of all rows.

    Returns
    -------
    Evaluation
        Per-row columns in float64 and nats, with ``summary()``, ``to_dict()`` and a table as its
        ``str``.

    Raises
    ------
    SourceError
        If a file or array cannot be used, in one line that names it.
    ValueError
        If shapes differ, targets do not fit, or an argument is not acceptable.
    """
    import klfast

    sources = _source(base, "base", key), _source(test, "test", key)
    width = _common_width(*sources, vocab_size)
    lead = sources[0].shape[:-1]
    rows = math.prod(lead)
    tokens = None if targets is None else _tokens(targets, lead, width)
    names = measures(metrics, tokens is not None)
    if chunk_rows is None:
        row_bytes = sum(source.shape[-1] * FLOATS[source.dtype] for source in sources)
        chunk_rows = max(1, _CHUNK_BYTES // row_bytes)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; accepted: a whole number from 1")

    columns = {name: np.empty(rows) for name in names}
    began = time.perf_counter()
    for start in range(0, rows, chunk_rows):
        stop = min(start + chunk_rows, rows)
        result = klfast.compare(
            sources[0].read(start, stop),
            sources[1].read(start, stop),
            names,
            targets=None if tokens is None else tokens[start:stop],
            temperature=temperature,
            input=input,
            vocab_size=vocab_size,
            dtype=np.float64,
            backend=backend,
        )
        for name, column in columns.items():
            column[start:stop] = result[name]
        if progress is not None:
            progress(stop, rows)
    return Evaluation(
        columns=columns,
        base=_described(sources[0]),
        test=_described(sources[1]),
        settings={
            "metrics": list(names),
            "targets": os.fspath(targets) if isinstance(targets, (str, os.PathLike)) else None,
            "temperature": temperature,
            "input": input,
            "vocab_size": vocab_size,
            "backend": backend,
        },
        seconds=time.perf_counter() - began,
    )


def measures(metrics: Sequence[str] | None, with_targets: bool) -> tuple[str, ...]:
    """Names of the measures an evaluation makes; ValueError for one it cannot make."""
    names = DEFAULT_METRICS if metrics is None else tuple(metrics)
    if not names:
        raise ValueError("metrics is empty; accepted: at least one measure")
    for name in names:
        operation, _ = parse_metric(name)
        if operation.tokens and not with_targets:
            raise ValueError(f"metric {name!r} needs targets")
    return tuple(dict.fromkeys(names + (TARGET_METRICS if with_targets else ())))


def check_statistic(name: str, names: Sequence[str]) -> None:
    """Raise ValueError unless an evaluation of ``names`` has the statistic ``name``."""
    known = [f"{each}.{one.name}" for each in names for one in fields(Statistics)]
    if "nll_p" in names and "nll_q" in names:
        known += [f"perplexity.{one.name}" for one in fields(Perplexity)]
    known.append("nan_rows")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"no statistic is named {name!r}; the nearest is {near[0]!r}")


def plain_json(value: Any) -> Any:
    """Replace numbers that JSON does not have by the strings NaN, Infinity and -Infinity."""
    if isinstance(value, dict):
        return {str(name): plain_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(each) for each in value]
    if isinstance(value, np.generic):
        return plain_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _source(logits: Logits, role: str, key: str | None) -> LogitSource:
    if isinstance(logits, (str, os.PathLike)):
        return open_logits(logits, key)
    if isinstance(logits, LogitSource):
        return logits
    if hasattr(logits, "shape") and hasattr(logits, "dtype"):
        return ArraySource(logits, role)
    raise TypeError(
        f"{role} is of type {type(logits).__name__}; accepted: a path, an array, or a LogitSource"
    )


def _described(source: LogitSource) -> dict[str, Any]:
    return {"name": source.name, "shape": list(source.shape), "dtype": source.dtype}


def _common_width(base: LogitSource, test: LogitSource, vocab_size: int | None) -> int:
    """Check that the shapes agree, and return how many entries of a row are read."""
    if base.shape[:-1] != test.shape[:-1]:
        raise SourceError(
            f"{test.name}: has shape {test.shape}, but {base.name} has {base.shape}; "
            "all axes but the last must be the same"
        )
    widths = base.shape[-1], test.shape[-1]
    if vocab_size is None:
        if widths[0] != widths[1]:
            raise SourceError(
                f"{test.name}: has a vocabulary of {widths[1]}, but {base.name} has {widths[0]}; "
                "if the longer is padded, read the common part with vocab_size"
            )
        return widths[0]
    if not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size is {vocab_size}; accepted: 1 to {min(widths)}")
    return vocab_size


def _tokens(targets: Any, lead: tuple[int, ...], width: int) -> NDArray[np.int64]:
    """Targets, checked, one a row."""
    name = "targets"
    if isinstance(targets, (str, os.PathLike)):
        name, targets = os.fspath(targets), open_targets(targets)
    tokens = np.asarray(targets)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise SourceError(f"{name}: holds {tokens.dtype}; targets must be integers")
    rows = math.prod(lead)
    if tokens.shape not in (lead, (rows,)):
        raise SourceError(f"{name}: has shape {tokens.shape}; the logits have {rows} rows, {lead}")
    tokens = tokens.reshape(-1)
    outside = np.flatnonzero((tokens < 0) | (tokens >= width))
    if outside.size:
        first = int(outside[0])
        raise SourceError(
            f"{name}: target {int(tokens[first])} at row {first} is outside the vocabulary, "
            f"0 to {width - 1}"
        )
    return tokens.astype(np.int64)


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    if values.size == 0:
        return math.nan, math.nan
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(values.mean())
        if values.size == 1:
            return mean, math.nan
        return mean, float(values.std(ddof=1)) / math.sqrt(values.size)


def _exp_with_error(mean: float, error: float) -> tuple[float, float]:
    value = float(np.exp(mean))
    return value, value * error


def _quantile(ordered: NDArray[np.float64], share: float) -> float:
    """Interpolate linearly at ``share * (n - 1)``, as numpy.quantile, but without inf - inf."""
    if ordered.size == 0:
        return math.nan
    position = share * (ordered.size - 1)
    low, high = float(ordered[math.floor(position)]), float(ordered[math.ceil(position)])
    return low if low == high else low + (high - low) * (position - math.floor(position))

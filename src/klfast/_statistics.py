"""Statistics of an evaluation's columns: plain formulas on float64 arrays, one value a row.

Intervals are bootstrapped: whole sequences are drawn where it is known which rows belong together,
because the tokens of one text are alike and single rows would claim more than was measured.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._operations import TARGET_METRICS

Values: TypeAlias = NDArray[np.float64]
Range: TypeAlias = tuple[float, float]

UNKNOWN: Range = (math.nan, math.nan)
#: Bounds of the buckets of the base model's confidence, the probability of its first choice.
CONFIDENCE = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
#: Positions in a sequence are told apart in at most this many buckets of equal width.
POSITIONS = 16
# Draws made at once: large enough for NumPy, 40 MB of temporaries.
_DRAWS = 2_000_000
# From this many clusters on, draws are taken as independent.
_MANY = 50_000


@dataclass(frozen=True, slots=True)
class Resampling:
    """How confidence intervals are made.

    ``resamples`` bootstrap samples (0: no intervals) of the mean, for intervals that hold it with
    probability ``level``; the same ``seed`` gives the same intervals.
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples != 0 and self.resamples < 2:
            raise ValueError(f"bootstrap is {self.resamples}; accepted: 0 or a number from 2")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}; accepted: a number between 0 and 1")

    def intervals(
        self, columns: Mapping[str, Values], sequences: NDArray[np.int64] | None
    ) -> dict[str, Range]:
        """Intervals of the mean of each column: bootstrap, bias-corrected and accelerated.

        Without ``sequences``, one label a row, rows are drawn with replacement, else whole
        sequences; the mean is over the rows drawn. All columns share the draws. A column that
        holds an infinity has no interval (NaN), nor has one of a single row or sequence.
        """
        finite = {name: each for name, each in columns.items() if np.isfinite(each).all()}
        if not self.resamples or not finite:
            return dict.fromkeys(columns, UNKNOWN)
        length = len(next(iter(finite.values())))
        sums, sizes = finite, np.ones(length)
        if sequences is not None:
            _, labels = np.unique(sequences, return_inverse=True)
            sums = {name: np.bincount(labels, each).astype(float) for name, each in finite.items()}
            sizes = np.bincount(labels).astype(np.float64)
        if len(sizes) < 2:
            return dict.fromkeys(columns, UNKNOWN)
        means = _resampled_means(list(sums.values()), sizes, self.resamples, self.seed)
        found = {
            name: _accelerated(means[:, i], each, sizes, self.level)
            for i, (name, each) in enumerate(sums.items())
        }
        return {name: found.get(name, UNKNOWN) for name in columns}


@dataclass(frozen=True, slots=True)
class Statistics:
    """One measure over the rows that count.

    ``standard_error`` is s / sqrt(n), with s the sample standard deviation (n - 1); it takes rows
    as independent. For a measure that is 0 or 1 this is the binomial sqrt(p (1 - p) / (n - 1)).
    ``low`` and ``high`` are the bootstrap confidence interval of the mean. ``rms`` is the root of
    the mean square, with the error 1/2 / rms times that of the mean square. Quantiles interpolate
    linearly at f (n - 1). ``infinite`` counts the rows where the measure is infinite: they make
    the mean infinite too, and errors and interval NaN.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    rms: float
    rms_error: float
    min: float
    p0_1: float
    p1: float
    p5: float
    p10: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float
    infinite: int

    @classmethod
    def of(cls, values: Values, interval: Range = UNKNOWN) -> Statistics:
        """Summarize ``values``, which hold no NaN; of no values everything is NaN."""
        mean, error = mean_and_error(values)
        with np.errstate(over="ignore"):
            square, square_error = mean_and_error(np.square(values))
        rms = math.sqrt(square)
        ordered = np.sort(values)
        return cls(
            mean=mean,
            standard_error=error,
            low=interval[0],
            high=interval[1],
            rms=rms,
            rms_error=0.5 / rms * square_error if rms else 0.0,
            **{name: _quantile(ordered, share) for name, share in QUANTILES.items()},
            infinite=int(np.isinf(values).sum()),
        )


QUANTILES = {
    "min": 0.0, "p0_1": 0.001, "p1": 0.01, "p5": 0.05, "p10": 0.1, "p25": 0.25, "median": 0.5,
    "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999, "max": 1.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexities exp(mean nll) of both models on the targets, their ratio and difference.

    The errors of ratio and difference take into account that both models find the same rows
    hard; that of the ratio comes from the differences nll_q - nll_p of each row. Errors of
    exponentials are exp(mean) times the error of the mean. ``correlation`` is that of nll_p and
    nll_q (Pearson). ``_low`` and ``_high`` are bootstrap confidence intervals.
    """

    base: float
    base_error: float
    base_low: float
    base_high: float
    test: float
    test_error: float
    test_low: float
    test_high: float
    ratio: float
    ratio_error: float
    ratio_low: float
    ratio_high: float
    log_ratio: float
    log_ratio_error: float
    difference: float
    difference_error: float
    correlation: float

    @classmethod
    def of(
        cls, nll_p: Values, nll_q: Values, intervals: Mapping[str, Range] | None = None
    ) -> Perplexity:
        """From the negative log-likelihoods of the targets, one a row.

        ``intervals`` are those of the means of nll_p, nll_q and log_ratio.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            base, base_error = _exp_with_error(*mean_and_error(nll_p))
            test, test_error = _exp_with_error(*mean_and_error(nll_q))
            log_ratio, log_ratio_error = mean_and_error(nll_q - nll_p)
            ratio, ratio_error = _exp_with_error(log_ratio, log_ratio_error)
            covariance = _covariance(nll_p, nll_q)
            variances = _covariance(nll_p, nll_p), _covariance(nll_q, nll_q)
            spread = math.sqrt(variances[0]) * math.sqrt(variances[1])
            shared = covariance / max(len(nll_p), 1) * base * test
            squared = base_error**2 + test_error**2 - 2 * shared

        def interval(name: str) -> Range:
            low, high = (intervals or {}).get(name, UNKNOWN)
            return float(np.exp(low)), float(np.exp(high))

        return cls(
            base, base_error, *interval("nll_p"),
            test, test_error, *interval("nll_q"),
            ratio, ratio_error, *interval("log_ratio"),
            log_ratio, log_ratio_error,
            difference=test - base,
            difference_error=math.sqrt(max(squared, 0.0)) if squared == squared else math.nan,
            correlation=covariance / spread if spread else math.nan,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flips:
    """Rows in which the most probable token is another one, as shares of all rows.

    Where targets are known, a flip is ``lost`` if the base model was right and the test model is
    wrong, ``gained`` the other way round, and else both are ``wrong``; NaN without targets.
    """

    rate: float
    standard_error: float
    lost: float
    gained: float
    wrong: float

    @classmethod
    def of(cls, same_top: Values, kinds: NDArray[np.int8] | None) -> Flips:
        """From the column same_top and the kind of each flip (0: none; 1, 2, 3 in this order)."""
        rate, error = mean_and_error(1.0 - same_top)
        if kinds is None or not len(kinds):
            return cls(rate, error, math.nan, math.nan, math.nan)
        counts = np.bincount(kinds, minlength=4)[1:] / len(kinds)
        return cls(rate, error, *counts.tolist())


@dataclass(frozen=True, slots=True)
class Bucket:
    """A measure over the rows for which something else lies in [lower, upper)."""

    lower: float
    upper: float
    rows: int
    mean: float
    standard_error: float
    median: float


@dataclass(frozen=True, slots=True)
class WorstRow:
    """One of the rows where the first measure is largest, with all measures of it."""

    row: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of an evaluation over the rows that hold no NaN.

    ``sequences`` is their number, None where sequences are not known and intervals take rows as
    independent. ``noise_floor`` estimates the mean KL that storing logits in 16 bits causes by
    itself, None where nothing is known to be stored so. ``by_confidence`` and ``by_position``
    split the first measure by the base model's largest probability (the last bucket includes 1)
    and by the position in the sequence; they are empty where those are unknown.
    """

    rows: int
    nan_rows: int
    sequences: int | None
    resampling: Resampling
    measures: dict[str, Statistics]
    perplexity: Perplexity | None
    flips: Flips | None
    noise_floor: float | None
    by_confidence: tuple[Bucket, ...]
    by_position: tuple[Bucket, ...]
    worst_rows: tuple[WorstRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python numbers, strings, lists and dicts, ready for ``json.dump``.

        Numbers keep full precision; what JSON cannot say is a string, "NaN", "Infinity" or
        "-Infinity", which ``float()`` understands.
        """
        plain: dict[str, Any] = plain_json(asdict(self))
        return plain

    def value(self, name: str) -> float:
        """Look up one statistic by its dotted name.

        ``"kl.mean"`` or ``"renyi:2.p99_9"``: a measure and a field of `Statistics`, of which
        ``high`` is the upper end of the confidence interval; ``"perplexity.ratio"``,
        ``"flips.lost"``: a field of `Perplexity` or `Flips`; ``"nan_rows"``; ``"noise_floor"``.
        Raises ValueError for anything else, naming the nearest there is.
        """
        check_statistic(name, tuple(self.measures))
        if name == "nan_rows":
            return self.nan_rows
        if name == "noise_floor":
            return math.nan if self.noise_floor is None else self.noise_floor
        part, _, statistic = name.rpartition(".")
        parts = {**self.measures, "perplexity": self.perplexity, "flips": self.flips}
        return float(getattr(parts[part], statistic))

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


def plain_json(value: Any) -> Any:
    """Replace numbers that JSON does not have by the strings NaN, Infinity and -Infinity."""
    if isinstance(value, dict):
        return {str(name): plain_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def check_statistic(name: str, names: Sequence[str]) -> None:
    """Raise ValueError unless an evaluation of ``names`` has the statistic ``name``."""
    parts: list[tuple[Sequence[str], Any]] = [(names, Statistics)]
    if "nll_p" in names and "nll_q" in names:
        parts.append((["perplexity"], Perplexity))
    elif name.partition(".")[0] in ("perplexity", *TARGET_METRICS):
        raise ValueError(f"statistic {name!r} needs targets, and there are none")
    if "same_top" in names:
        parts.append((["flips"], Flips))
    known, shown = ["nan_rows", "noise_floor"], ["nan_rows", "noise_floor"]
    for owners, kind in parts:
        own = [each.name for each in fields(kind)]
        known += [f"{owner}.{each}" for owner in owners for each in own]
        one_of = f"{{{','.join(owners)}}}" if len(owners) > 1 else owners[0]
        shown.append(f"{one_of}.{{{','.join(own)}}}")
    if name not in known:
        mean = f"{name}.mean"
        near = [mean] if mean in known else difflib.get_close_matches(name, known, n=1)
        hint = f"the nearest is {near[0]!r}" if near else f"accepted: {', '.join(shown)}"
        raise ValueError(f"no statistic is named {name!r}; {hint}")


def by_confidence(values: Values, top_p: Values) -> tuple[Bucket, ...]:
    """Split ``values`` by the base model's largest probability, in the buckets `CONFIDENCE`."""
    inner = np.digitize(top_p, CONFIDENCE[1:-1])
    return _buckets(values, inner, CONFIDENCE)


def by_position(values: Values, positions: NDArray[np.int64]) -> tuple[Bucket, ...]:
    """Split ``values`` by position, in at most `POSITIONS` buckets of about the same width."""
    end = int(positions.max(initial=-1)) + 1
    edges = np.unique(np.linspace(0, end, min(POSITIONS, end) + 1).astype(np.int64))
    return _buckets(values, np.digitize(positions, edges[1:-1]), edges.tolist())


def _buckets(
    values: Values, labels: NDArray[np.int64], edges: Sequence[float]
) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(lower, upper, len(kept), *mean_and_error(kept), _quantile(np.sort(kept), 0.5))
        for i, (lower, upper) in enumerate(itertools.pairwise(edges))
        for kept in [values[labels == i]]
    )


def positions_of(sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each row, how many rows before it belong to the same sequence."""
    order = np.argsort(sequences, kind="stable")
    ordered = sequences[order]
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    lengths = np.diff(first, append=len(ordered))
    positions = np.empty(len(sequences), np.int64)
    positions[order] = np.arange(len(sequences)) - np.repeat(first, lengths)
    return positions


@dataclass(frozen=True, slots=True)
class Difference:
    """Two candidates on the same rows: how much further from the base the second one is.

    ``difference`` is the mean of (second - first) over the rows where neither is NaN, with its
    bootstrap confidence interval; ``standard_error`` takes rows as independent.
    """

    metric: str
    first: str
    second: str
    rows: int
    first_mean: float
    second_mean: float
    difference: float
    standard_error: float
    low: float
    high: float
    level: float
    verdict: str

    @classmethod
    def of(
        cls,
        metric: str,
        names: tuple[str, str],
        values: tuple[Values, Values],
        sequences: NDArray[np.int64] | None,
        resampling: Resampling,
        higher_is_closer: bool = False,
    ) -> Difference:
        """Compare two columns row by row."""
        if names[0] == names[1]:
            names = f"{names[0]} (first)", f"{names[1]} (second)"
        valid = ~(np.isnan(values[0]) | np.isnan(values[1]))
        first, second = (each[valid] for each in values)
        with np.errstate(invalid="ignore"):
            change = second - first  # both infinite: nothing is known
        error = mean_and_error(change)[1]
        labels = None if sequences is None else sequences[valid]
        low, high = resampling.intervals({"": change}, labels)[""]
        means = mean_and_error(first)[0], mean_and_error(second)[0]
        difference = mean_and_error(change)[0]
        if not change.any() and len(change):
            verdict = f"{names[0]} and {names[1]} have the same {metric} in every row"
        elif not (math.isfinite(low) and math.isfinite(high)):
            verdict = f"whether {names[0]} or {names[1]} is closer to the base cannot be told"
        else:
            told = not low <= 0 <= high
            named = int(told and (difference > 0) == higher_is_closer)  # first, with its mean
            sides = (-high, -low) if told and difference < 0 else (low, high)
            numbers = (
                f"mean {metric} {means[named]:.4g} against {means[1 - named]:.4g}, difference "
                f"{abs(difference) if told else difference:.3g} "
                f"({100 * resampling.level:g} % interval {sides[0]:.3g} to {sides[1]:.3g})"
            )
            verdict = (
                f"{names[named]} is closer to the base than {names[1 - named]}: {numbers}"
                if told
                else f"between {names[0]} and {names[1]} there is no difference beyond noise: "
                f"{numbers}"
            )
        return cls(
            metric, *names, len(change), *means, difference, error, low, high, resampling.level,
            verdict,
        )  # fmt: skip


def mean_and_error(values: Values) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few values."""
    if values.size == 0:
        return math.nan, math.nan
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(values.mean())
        if values.size == 1:
            return mean, math.nan
        return mean, float(values.std(ddof=1)) / math.sqrt(values.size)


def _covariance(x: Values, y: Values) -> float:
    if len(x) < 2:
        return math.nan
    return float(((x - x.mean()) * (y - y.mean())).sum()) / (len(x) - 1)


def _exp_with_error(mean: float, error: float) -> tuple[float, float]:
    value = float(np.exp(mean))
    return value, value * error


def _quantile(ordered: Values, share: float) -> float:
    """Interpolate linearly at ``share * (n - 1)``, as numpy.quantile, but without inf - inf."""
    if ordered.size == 0:
        return math.nan
    position = share * (ordered.size - 1)
    low, high = float(ordered[math.floor(position)]), float(ordered[math.ceil(position)])
    return low if low == high else low + (high - low) * (position - math.floor(position))


def _resampled_means(
    sums: Sequence[Values], sizes: Values, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Means of bootstrap samples, (resamples, columns), of clusters with these sums and sizes."""
    random = np.random.default_rng(seed)
    clusters = len(sizes)
    totals = np.zeros((resamples, 1 + len(sums)))
    if clusters < _MANY:
        columns = np.column_stack([sizes, *sums])
        at_once = max(1, _DRAWS // clusters)
        for start in range(0, resamples, at_once):
            stop = min(start + at_once, resamples)
            drawn = random.integers(0, clusters, (stop - start, clusters))
            drawn += clusters * np.arange(stop - start)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=drawn.size)
            totals[start:stop] = counts.reshape(drawn.shape).astype(np.float64) @ columns
    else:
        # How often each of many is drawn is all but independent of the others: the Poisson
        # bootstrap, which takes the clusters block by block.
        at_once = max(1, _DRAWS // resamples)
        for start in range(0, clusters, at_once):
            block = slice(start, start + at_once)
            columns = np.column_stack([each[block] for each in (sizes, *sums)])
            shape = resamples, len(columns)
            totals += _POISSON[random.integers(0, len(_POISSON), shape, np.uint16)] @ columns
    means: NDArray[np.float64] = totals[:, 1:] / totals[:, :1]
    return means


def _poisson_table() -> NDArray[np.float64]:
    """65536 numbers, of which a random one has the Poisson distribution of mean 1."""
    shares = [math.exp(-1) / math.factorial(k) for k in range(9)]
    ends = np.rint(65536 * np.cumsum(shares)).astype(np.int64)
    return np.repeat(np.arange(9.0), np.diff(ends, prepend=0))


_POISSON = _poisson_table()


def _accelerated(means: Values, sums: Values, sizes: Values, level: float) -> Range:
    """The BCa interval of Efron (1987) of a mean over clusters, from its bootstrap samples."""
    mean = sums.sum() / sizes.sum()
    left_out = (sums.sum() - sums) / (sizes.sum() - sizes)
    influence = left_out.mean() - left_out
    if np.abs(influence).max() <= 1e-14 * abs(mean):
        return float(mean), float(mean)
    normal = NormalDist()
    below = (np.sum(means < mean) + np.sum(means <= mean)) / (2 * len(means))
    bias = normal.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    # Scaled first: third powers of small numbers leave the range.
    scaled = influence / np.abs(influence).max()
    acceleration = (scaled**3).sum() / (6 * (scaled**2).sum() ** 1.5)

    def quantile(share: float) -> float:
        z = bias + normal.inv_cdf(share)
        return float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))))

    return quantile((1 - level) / 2), quantile((1 + level) / 2)

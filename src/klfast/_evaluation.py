"""Every measure of every row of two models' logits, gathered batch by batch, and its statistics."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._arrays import place_of
from ._columns import decode, encode, write_parquet
from ._measuring import Rows, compares, is_similarity, measured, measures, on_host, rounded
from ._pairs import NOISE_ROWS, Block
from ._statistics import (
    Difference,
    Flips,
    Perplexity,
    Resampling,
    Statistics,
    Summary,
    WorstRow,
    by_confidence,
    by_position,
    positions_of,
)

_FORMAT = {"format": "klfast evaluation", "version": 1}
_BOOKKEEPING = ("target", "sequence", "row", "position", "flip")


class Evaluation:
    """An accumulator: every measure of every row of two models' logits, and what they amount to.

    Call `update` with each batch, in a loop of any kind; `merge` joins evaluations that others
    have gathered; `summary` has the statistics, in which every row (token) weighs the same however
    it was batched. `klfast.evaluate` fills one from files of any size.

    Parameters
    ----------
    metrics
        Measures, as for `klfast.compare`; "all" stands for a dozen of them. The first one decides
        which rows are the worst. None is ``("kl", "reverse_kl", "tv", "same_top", "top_p")``. With
        targets, nll_p, nll_q and delta_prob are added.
    temperature, input, vocab_size, backend
        As for `klfast.compare`.

    Attributes
    ----------
    base, test
        What was compared: name, shape and dtype of each.
    settings
        The arguments that the values depend on.
    seconds
        How long the comparison took.

    Examples
    --------
    >>> evaluation = klfast.Evaluation()
    >>> for tokens in batches:
    ...     evaluation.update(base(tokens), test(tokens), following(tokens))
    >>> print(evaluation)
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | None = None,
        *,
        temperature: float | tuple[float, float] = 1.0,
        input: Literal["logits", "log_probs", "probs"] = "logits",
        vocab_size: int | None = None,
        backend: Literal["auto", "reference", "cpu", "cuda"] = "auto",
    ) -> None:
        measures(metrics, with_targets=True)
        self._metrics = metrics if metrics is None or isinstance(metrics, str) else list(metrics)
        self._options: dict[str, Any] = {
            "temperature": temperature, "input": input, "vocab_size": vocab_size,
            "backend": backend,
        }  # fmt: skip
        self.base: dict[str, Any] = {"name": "base", "shape": [], "dtype": ""}
        self.test: dict[str, Any] = {"name": "test", "shape": [], "dtype": ""}
        self.targets_from: str | None = None
        self.seconds = 0.0
        self.stored_noise: float | None = None  # the noise floor, where the format tells it
        self._noise: list[float] = []
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._known: dict[str, str] = {}  # whether rows have targets, and sequences
        self._numbered = 0  # how many sequences were numbered here

    # Gathering

    def update(
        self,
        base: Any,
        test: Any,
        targets: Any = None,
        where: Any = None,
        *,
        sequences: Any = None,
    ) -> None:
        """Add a batch of rows.

        Parameters
        ----------
        base, test
            Logits of shape ``(..., V)``, as arrays of any kind that `klfast.compare` takes, or as
            `LogitSource` objects such as `klfast.LinearLogits`, which are read in blocks.
        targets
            The token that really followed each row, integers of shape ``(...)``: in every update,
            or in none.
        where
            Booleans of shape ``(...)``: rows that are False are neither read nor counted (padding,
            prompts); their targets may be anything.
        sequences
            Which text each row belongs to, integers of shape ``(...)``. If None, logits with two
            or more leading axes are taken as (..., position, V), each of whose texts is one
            sequence of its own; rows of two-dimensional logits belong to no known one. With
            sequences, confidence intervals are made by drawing whole ones.

        Raises
        ------
        ValueError, TypeError, IndexError
            As `klfast.compare`, and if this batch has targets or sequences and others have not,
            or another vocabulary.

        Notes
        -----
        Rows are numbered, and their positions counted, among those that are kept.
        """
        began = time.perf_counter()
        if hasattr(base, "read") or hasattr(test, "read"):
            self._update_from_sources(base, test, targets, where, sequences)
        else:
            self._update(base, test, targets, where, sequences)
        self.seconds += time.perf_counter() - began

    def merge(self, other: Evaluation) -> None:
        """Add all rows of another evaluation after those that are here.

        Both must have the same settings and vocabulary, and targets, sequences and `where` (of
        `klfast.evaluate`) both or neither. Sequences that `update` numbered by itself stay apart;
        equal labels that it was given are one.
        """
        if other is self:
            raise ValueError(
                "cannot merge an evaluation with itself: all its rows would count twice; "
                "accepted: another one"
            )
        for key, value in self._settings().items():
            if other._settings()[key] != value:
                raise ValueError(
                    f"cannot merge: {key} is {value!r} here, and {other._settings()[key]!r} in "
                    "the other evaluation"
                )
        self._check_width(other.base["shape"])
        self._check_known(other._known)
        self._check_columns(other._columns)
        self._known |= other._known
        if other.stored_noise is not None:
            rows = (self.rows if self.stored_noise is not None else 0), other.rows
            total = rows[0] * (self.stored_noise or 0.0) + rows[1] * other.stored_noise
            self.stored_noise = total / max(sum(rows), 1)
        shifts = {"sequence": self._numbered, "row": _rows_given(self.base)}
        for name, parts in other._columns.items():
            shift = shifts.get(name, 0)
            mine = self._columns.setdefault(name, [])
            mine += [part + shift for part in parts] if shift else parts
        self._numbered += other._numbered
        self._noise += other._noise
        self.seconds += other.seconds
        _describe(self.base, other.base)
        _describe(self.test, other.test)

    def keep(
        self, known: Mapping[str, str], columns: Mapping[str, NDArray[Any]], noise: Sequence[float]
    ) -> None:
        """Keep the columns of rows that were measured."""
        self._check_columns(columns)
        self._known = dict(known)
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)
        self._noise += noise

    def _update(self, base: Any, test: Any, targets: Any, where: Any, sequences: Any) -> None:
        for role, each in (("base", base), ("test", test)):
            if not hasattr(each, "shape"):
                place_of(each, role)  # raises
        lead = tuple(base.shape[:-1])
        if tuple(test.shape[:-1]) != lead:
            raise ValueError(
                f"test has shape {tuple(test.shape)}, but base has {tuple(base.shape)}; "
                "all axes but the last must be the same"
            )
        self._check_width(base.shape)
        count = math.prod(lead)
        labels = None
        if sequences is not None:
            labels = on_host(sequences)
            if labels.size != count or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"sequences has {labels.size} entries of {labels.dtype}; accepted: integers "
                    f"of shape {lead}"
                )
            labels = labels.astype(np.int64)
        numbered = count // lead[-1] if sequences is None and len(lead) > 1 and count else 0
        if numbered:
            labels = np.repeat(np.arange(numbered), lead[-1]) + self._numbered
        keep = np.ones(count, np.bool_) if where is None else on_host(where)
        first = np.flatnonzero(keep)[:1].tolist()
        noisy = rounded(base) or rounded(test)
        rows = Rows(Block(base, test), targets, where, labels,
                    noise_at=first if noisy and len(self._noise) < NOISE_ROWS else [])  # fmt: skip
        known = {
            "targets": "absent" if targets is None else "given",
            "sequences": "absent" if labels is None
            else "numbered by update" if self._numbered + numbered else "given",
        }  # fmt: skip
        self._check_known(known)
        self.keep(known, *measured(rows, self._settings()))
        self._numbered += numbered
        width = int(base.shape[-1])
        for mine, array in ((self.base, base), (self.test, test)):
            given = {"shape": [len(keep), width], "dtype": str(array.dtype).removeprefix("torch.")}
            _describe(mine, {"name": mine["name"], **given})

    def _update_from_sources(
        self, base: Any, test: Any, targets: Any, where: Any, sequences: Any
    ) -> None:
        from ._job import Job

        targets, where, sequences = (
            None if each is None else on_host(each) for each in (targets, where, sequences)
        )
        job = Job(
            base, [test], targets, sequences=sequences, where=where, metrics=self._metrics,
            **self._options,
        )  # fmt: skip
        self._check_width(job.base.shape)
        (filled,) = job.evaluations
        if sequences is None and job.sequences is not None:
            filled._numbered = int(job.sequences.max(initial=-1)) + 1
        job.run()
        filled.seconds = 0.0  # the caller has a clock of its own
        for name in ("row", "position"):  # which are counted among the rows that are kept
            filled._columns.pop(name, None)
        filled.base["name"], filled.test["name"] = self.base["name"], self.test["name"]
        self.merge(filled)

    # What was gathered

    @property
    def rows(self) -> int:
        """How many rows were compared, those that hold NaN included."""
        return sum(map(len, next(iter(self._columns.values()), [])))

    @property
    def left_out(self) -> int:
        """How many rows there are that were not compared, because of `where`."""
        return _rows_given(self.base) - self.rows

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the measures, in the order of the columns."""
        if not self._columns:
            return measures(self._metrics, False)
        return tuple(name for name in self._columns if name not in _BOOKKEEPING)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the values depend on."""
        return {"metrics": list(self.metrics), "targets": self.targets_from, **self._options}

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """One array a measure in float64 and nats, one value a row, and what is known of the rows.

        That is, where it is known: ``target`` (the token), ``flip`` (0: the most probable token is
        the same, or NaN; another one: 1, a right answer is lost, 2, one is gained, 3, both are
        wrong), ``sequence`` (a label) and ``position`` (how many rows before it belong to the
        same sequence); and ``row``, as in `row_numbers`, where `klfast.evaluate` left rows out.
        """
        columns, _ = self.stored()
        if "sequence" in columns and "position" not in columns:
            columns["position"] = positions_of(columns["sequence"])
        return columns

    def stored(self) -> tuple[dict[str, NDArray[Any]], list[float]]:
        """The columns that are not derived from others, and the estimates of rounding noise."""
        if not self._columns:
            return {name: np.empty(0) for name in self.metrics}, []
        for name, parts in self._columns.items():
            if len(parts) > 1:
                self._columns[name] = [np.concatenate(parts)]
        return {name: parts[0] for name, parts in self._columns.items()}, self._noise

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """The number of each row in the files, from 0: 0, 1, 2, ... if no rows are left out."""
        columns, _ = self.stored()
        return columns["row"] if "row" in columns else np.arange(self.rows)

    @property
    def nan_rows(self) -> NDArray[np.int64]:
        """Numbers of the rows in which a measure is NaN.

        The row of logits holds NaN or +inf, or is -inf throughout. They are in `columns` and left
        out of all statistics.
        """
        return self.row_numbers[self._has_nan()]

    @property
    def noise_floor(self) -> float | None:
        """Estimate of the mean KL that storing logits in 16 bits causes by itself, in nats.

        From the sizes of the rounding steps, on a sample of the rows, for whichever of the two
        sides is stored in float16 or bfloat16 (or as its file's format tells); else None. A mean
        KL near it says nothing about the models.
        """
        if self.stored_noise is not None:
            return self.stored_noise
        finite = [each for each in self._noise if math.isfinite(each)]
        return math.fsum(finite) / len(finite) if finite else None

    def summary(
        self, worst: int = 5, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
    ) -> Summary:
        """Statistics over the rows without NaN.

        Parameters
        ----------
        worst
            How many rows to list in which the first measure is largest; 0 lists none.
        bootstrap
            Bootstrap samples for the confidence intervals of the means; 0 makes none. Sequences
            are drawn where they are known, else rows.
        level
            Probability with which an interval is to hold the mean.
        seed
            Of the draws: the same seed gives the same intervals.
        """
        resampling = Resampling(bootstrap, level, seed)
        if worst < 0:
            raise ValueError(f"worst is {worst}; accepted: 0 or a positive whole number")
        columns, names = self.columns, self.metrics
        valid = np.flatnonzero(~self._has_nan())
        numbers = self.row_numbers[valid]
        if len(valid) < self.rows:
            columns = {name: column[valid] for name, column in columns.items()}
        kept = {name: columns[name] for name in names}
        sequences = columns.get("sequence")
        averaged = dict(kept)
        targets_known = "nll_p" in kept and "nll_q" in kept
        if targets_known:
            with np.errstate(invalid="ignore"):
                averaged["log_ratio"] = kept["nll_q"] - kept["nll_p"]
        intervals = resampling.intervals(averaged, sequences)
        first = kept[names[0]]
        order = _largest(first, worst)
        return Summary(
            rows=self.rows,
            nan_rows=self.rows - len(valid),
            sequences=None if sequences is None else len(np.unique(sequences)),
            resampling=resampling,
            measures={name: Statistics.of(each, intervals[name]) for name, each in kept.items()},
            perplexity=Perplexity.of(kept["nll_p"], kept["nll_q"], intervals)
            if targets_known else None,
            flips=Flips.of(kept["same_top"], columns.get("flip")) if "same_top" in kept else None,
            noise_floor=self.noise_floor,
            by_confidence=by_confidence(first, kept["top_p"]) if "top_p" in kept else (),
            by_position=by_position(first, columns["position"]) if "position" in columns else (),
            worst_rows=tuple(
                WorstRow(int(numbers[i]), {name: float(values[i]) for name, values in kept.items()})
                for i in order
            ),
        )  # fmt: skip

    def versus(
        self,
        other: Evaluation,
        metric: str | None = None,
        *,
        bootstrap: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> Difference:
        """Compare two candidates, measured on the same rows against the same base, row by row.

        What both find hard alike does not count, so that much smaller differences can be told
        than from two confidence intervals. ``metric`` is a measure of both; None is the first.
        Its ``verdict`` says in words which one is closer to the base, or that noise hides it.
        """
        metric = self.metrics[0] if metric is None else metric
        for each in (self, other):
            if metric not in each.metrics or not compares(metric):
                raise ValueError(
                    f"metric is {metric!r}; accepted, of {each.test['name']}: "
                    f"{', '.join(filter(compares, each.metrics))}"
                )
        if self.rows != other.rows:
            raise ValueError(
                f"{self.test['name']} has {self.rows} rows and {other.test['name']} has "
                f"{other.rows}; accepted: evaluations of the same rows"
            )
        if not np.array_equal(self.row_numbers, other.row_numbers):
            raise ValueError(
                f"{self.test['name']} and {other.test['name']} have other rows of the files; "
                "accepted: evaluations of the same rows"
            )
        columns = self.columns, other.columns
        return Difference.of(
            metric,
            (self.test["name"], other.test["name"]),
            (columns[0][metric], columns[1][metric]),
            columns[0].get("sequence"),
            Resampling(bootstrap, level, seed),
            higher_is_closer=is_similarity(metric),
        )

    # Taking it elsewhere

    def to_dict(self) -> dict[str, Any]:
        """Everything gathered, for `from_dict`, in what ``json.dumps`` takes.

        Columns are text (deflated bytes in base64): no digit is lost, and a row takes about 12
        bytes a measure. For reading, `summary` and `columns` are the better way.
        """
        columns, noise = self.stored()
        return {
            **_FORMAT,
            "metrics": self._metrics,
            "options": self._options,
            "base": self.base,
            "test": self.test,
            "targets_from": self.targets_from,
            "seconds": self.seconds,
            "stored_noise": self.stored_noise,
            "noise": [str(each) for each in noise],
            "known": self._known,
            "numbered": self._numbered,
            "columns": {name: encode(each) for name, each in columns.items()}
            if self._columns else {},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` described; ValueError for anything else."""
        if not isinstance(content, Mapping) or any(
            content.get(key) != value for key, value in _FORMAT.items()
        ):
            raise ValueError("content is not what Evaluation.to_dict() gives, in this version")
        options = dict(content["options"])
        if isinstance(options["temperature"], list):  # JSON has no tuples
            options["temperature"] = tuple(options["temperature"])
        made = cls(content["metrics"], **options)
        made.base, made.test = dict(content["base"]), dict(content["test"])
        made.targets_from = content["targets_from"]
        made.seconds = content["seconds"]
        made.stored_noise = content["stored_noise"]
        made._known = dict(content["known"])
        made._numbered = content["numbered"]
        made._noise = [float(each) for each in content["noise"]]
        made._columns = {name: [decode(each)] for name, each in content["columns"].items()}
        if len({len(parts[0]) for parts in made._columns.values()}) > 1:
            raise ValueError("content has columns of different lengths")
        return made

    def write_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the columns as a Parquet file, all of it or nothing; needs pyarrow."""
        write_parquet(path, [self])

    def __eq__(self, other: object) -> bool:
        """Whether everything that was gathered is the same to the bit, but for the time it took."""
        if not isinstance(other, Evaluation):
            return NotImplemented
        mine, theirs = self.columns, other.columns
        return (
            (self.settings, self.base, self.test) == (other.settings, other.base, other.test)
            and self.noise_floor == other.noise_floor
            and mine.keys() == theirs.keys()
            and all(each.tobytes() == theirs[name].tobytes() for name, each in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """Return the table that the command line prints."""
        from ._report import table

        return table(self, self.summary())

    def __repr__(self) -> str:
        """Say what it holds, without computing anything."""
        return f"<Evaluation of {self.rows} rows by {', '.join(self.metrics)}>"

    # Details

    def _settings(self) -> dict[str, Any]:
        return {"metrics": self._metrics, **self._options}

    def _has_nan(self) -> NDArray[np.bool_]:
        columns, _ = self.stored()
        found: NDArray[np.bool_] = np.logical_or.reduce(
            [np.isnan(columns[name]) for name in self.metrics]
        )
        return found

    def _check_width(self, shape: Sequence[int]) -> None:
        """Raise where more rows have another vocabulary: one that is not cut is not the same."""
        mine = self.base["shape"]
        if mine and shape and mine[-1] != shape[-1] and self._options["vocab_size"] is None:
            raise ValueError(
                f"these rows have a vocabulary of {shape[-1]}, and those before had {mine[-1]}; "
                "accepted: the same for all, or vocab_size, if the longer is padded"
            )

    def _check_known(self, known: Mapping[str, str]) -> None:
        for name, now in known.items():
            before = self._known.get(name, now)
            if before != now:
                raise ValueError(
                    f"{name} are {now} for these rows, and were {before} for the {self.rows} rows "
                    "before; accepted: the same for all"
                )

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        if columns and self._columns and columns.keys() != self._columns.keys():
            raise ValueError(
                f"these rows have the columns {', '.join(columns)}, and those before had "
                f"{', '.join(self._columns)}; accepted: the same for all"
            )


def _describe(mine: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Join what is known of more rows to the description of a side."""
    if not mine["shape"]:
        mine.update(other)
    elif other["shape"]:
        rows = math.prod(mine["shape"][:-1]) + math.prod(other["shape"][:-1])
        mine["shape"] = [rows, mine["shape"][-1]]


def _rows_given(side: Mapping[str, Any]) -> int:
    """How many rows a side has, those that were left out included."""
    return math.prod(side["shape"][:-1]) if side["shape"] else 0


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the largest values, the first of equal ones first."""
    return np.argsort(-values, kind="stable")[:count]

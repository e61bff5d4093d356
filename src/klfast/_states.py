"""Rows whose vocabulary lies in several places: states of the parts, small, that merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _device
from ._arguments import Batch, Settings, check_options, prepare
from ._chain_rule import HEADER, SECOND_PHASE, TOP_RATIO, Measure, merge, needed, value_of
from ._operations import Operation, parse_metric

__all__ = ["RowState", "StateOptions"]

Array = NDArray[np.float64]

#: Measures that are the index of the largest entry.
_INDICES = {"top_index_p": 0, "top_index_q": 1}
_TOKENS = ("nll_p", "nll_q")
#: Rows of states that are merged at a time: temporaries stay in cache.
_MERGED_ROWS = 4096


class StateOptions(TypedDict, total=False):
    """Keywords that say how shards are read."""

    axis: int
    input: Literal["logits", "log_probs", "probs"]
    temperature: float | tuple[float, float]
    where: Any
    backend: Literal["auto", "reference", "cpu", "cuda"]


class RowState:
    """What is known of rows of logits from a part of their vocabulary.

    States of parts merge into that of the whole rows, in any order and any number, whatever their
    widths, and are a few numbers a row, so that a vocabulary may be spread over devices, machines
    or chunks of a file, and only states travel:

        state = klfast.RowState.of(p_shard, q_shard, metrics=("kl", "same_top"), vocab_offset=start)
        whole = state.merge(state_of_another_shard)
        values = whole.finish()  # {"kl": ..., "same_top": ...}

    A state is the numbers in `array`, float64 of shape (rows, columns), which any transport moves,
    and a description of them that is the same everywhere: `state.with_array(received)` makes a
    state of numbers that came from elsewhere. It can be pickled.

    Total variation and Jensen-Shannon take a second look at the shards, when the masses are known:

        sums = whole.partial_sums(p_shard, q_shard)  # (rows, number of such metrics)
        values = whole.finish(sums + sums_of_the_other_shards)

    Exchanging P and Q changes no bit of these two and of the squared Hellinger distance; Jeffreys
    is the sum of two divergences here, each as exact as by itself, and may change in its last
    digits.

    Everything else takes one exchange. KL, Rényi and entropies follow from those within the parts
    and of the parts' masses by the chain rule, where nothing cancels: from however many parts,
    values are as exact as those of whole rows. See docs/scale.md.
    """

    __slots__ = ("array", "metrics", "shape", "temperature", "weights")

    array: Array  #: (rows, columns)
    metrics: tuple[str, ...]  #: the names, in the order of the results
    shape: tuple[int, ...]  #: of the batch
    temperature: tuple[float, ...]  #: of each batch of logits
    weights: bool  #: whether the entries are probabilities, and not logarithms

    def __init__(
        self,
        array: ArrayLike,
        metrics: str | Sequence[str],
        shape: Sequence[int] | None = None,
        temperature: float | Sequence[float] = 1.0,
        weights: bool = False,
    ) -> None:
        """Make a state of numbers that came from elsewhere; `of` makes it of logits.

        Arguments:
            array: as `RowState.array`, shape (rows, columns).
            metrics: as they were given to `of`.
            shape: of the batch; None is (rows,).
            temperature: as it was given to `of`.
            weights: True where `input` was "probs".

        Raises:
            ValueError: for another number of columns than the metrics need, or of rows than shape.
        """
        self.metrics, operations = _parse(metrics)
        sides = _sides(operations)
        values = np.asarray(array, np.float64)
        columns = _columns(operations, sides)
        if values.ndim != 2 or values.shape[1] != len(columns):
            raise ValueError(
                f"array has shape {values.shape}; accepted: (rows, {len(columns)}), with the "
                f"columns {', '.join(columns)}"
            )
        self.shape = (len(values),) if shape is None else tuple(shape)
        if math.prod(self.shape) != len(values):
            raise ValueError(
                f"array has {len(values)} rows; accepted: {math.prod(self.shape)}, for a batch of "
                f"shape {self.shape}"
            )
        self.array = values
        given = np.broadcast_to(np.asarray(temperature, np.float64), sides)
        self.temperature = tuple(given.tolist())
        self.weights = weights

    @classmethod
    def of(
        cls,
        p: Any,
        q: Any = None,
        metrics: str | Sequence[str] = ("kl",),
        *,
        vocab_offset: int = 0,
        targets: Any = None,
        **options: Unpack[StateOptions],
    ) -> RowState:
        """The state of rows of which these are the entries from `vocab_offset` on.

        Arguments:
            p: logits, shape (..., entries), as for the functions of klfast: of any library and
                strides, read in place. There may be no entries at all. Arrays on a GPU are read
                there, and only the numbers of the state come to the host, which waits for them.
            q: the second batch, of the same entries; None where all metrics are of one batch.
            metrics: names as for `compare`, but for "topk_overlap", and of functions of one batch:
                "entropy", "logsumexp", "token_log_probs", "renyi_entropy:A".
            vocab_offset: index in the whole vocabulary of the first entry.
            targets: integers, one a row, that count in the whole vocabulary; needed by "nll_p",
                "nll_q", "delta_prob" and "token_log_probs". They need not be in this shard; one
                that is in no shard has the log-probability -inf.
            options: `axis`, `input`, `temperature`, `where` and `backend`, as for `kl_divergence`.
                Rows that `where` drops are never read and end as NaN.

        Raises:
            TypeError, ValueError: as the functions of klfast; ValueError for a metric that does not
                follow from states.
        """
        names, operations = _parse(metrics)
        sides = _sides(operations)
        arrays = {"p": p} if sides == 1 else {"p": p, "q": q}
        for name, operation in zip(names, operations, strict=True):
            if q is None and sides == 2 and operation[0].rows != "p":
                raise TypeError(f"q is None; accepted: an array, because {name!r} reads it")
            if operation[0].tokens and targets is None:
                raise ValueError(f"metric {name!r} needs targets, which is None")
        settings = check_options("RowState.of", options, StateOptions)
        if isinstance(vocab_offset, bool) or not hasattr(vocab_offset, "__index__"):
            raise TypeError(f"vocab_offset is {vocab_offset!r}; accepted: a whole number from 0")
        measures = _measures(operations)
        # Jeffreys is the sum of two divergences here, each of its own.
        symmetric = any(each.name in (*SECOND_PHASE, "hellinger2") for each, _ in operations)
        # What follows from the masses of a batch alone.
        alone = any(not needed(each.name, parameters) for each, parameters in operations)
        shape, array, temperatures = _read(
            arrays, measures, settings, int(vocab_offset), targets, symmetric, alone
        )
        return cls(array, names, shape, temperatures, settings.input == "probs")

    def with_array(self, array: ArrayLike) -> RowState:
        """A state of other numbers for the same rows and metrics, such as another shard's."""
        return RowState(array, self.metrics, self.shape, self.temperature, self.weights)

    def merge(self, *others: RowState) -> RowState:
        """The state of the parts of all together. The order changes rounding only.

        Raises ValueError where the states are not of the same rows, metrics and temperature.
        """
        _, operations = _parse(self.metrics)
        measures, sides = _measures(operations), _sides(operations)
        temperatures = self._pair_of_temperatures
        arrays = [self.array]
        for other in others:
            if not isinstance(other, RowState):
                raise TypeError(f"a {type(other).__name__} is given; accepted: a RowState")
            for what in ("metrics", "shape", "temperature", "weights"):
                here, there = getattr(self, what), getattr(other, what)
                if here != there:
                    raise ValueError(f"the states have {what} {here} and {there}; accepted: equal")
            arrays.append(other.array)
        # Neighbours first, then pairs of them: fewer roundings than one after the other, and all
        # pairs at once. Rows are independent, so that they may be merged in blocks.
        while len(arrays) > 1:
            pairs = len(arrays) // 2
            first, second = (np.concatenate(arrays[side : 2 * pairs : 2]) for side in (0, 1))
            merged = np.concatenate([
                merge(
                    first[start : start + _MERGED_ROWS], second[start : start + _MERGED_ROWS],
                    sides, measures, temperatures, self.weights,
                )
                for start in range(0, max(1, len(first)), _MERGED_ROWS)
            ])  # fmt: skip
            arrays = [*np.split(merged, pairs), *arrays[2 * pairs :]]
        return self.with_array(arrays[0])

    @property
    def _pair_of_temperatures(self) -> tuple[float, float]:
        return self.temperature[0], self.temperature[-1]

    @property
    def needs_sums(self) -> tuple[str, ...]:
        """The metrics for which `finish` needs the `partial_sums` of all shards."""
        return tuple(name for name in self.metrics if name.partition(":")[0] in SECOND_PHASE)

    def partial_sums(self, p: Any, q: Any, **options: Unpack[StateOptions]) -> Array:
        """A shard's shares of the metrics in `needs_sums`, from the state of the whole rows.

        Those of all shards add up to the values.

        Arguments:
            p: the shard that its state was made of.
            q: that of the second batch.
            options: as for `of`, without the temperature and the kind of entries, which are known.

        Returns:
            float64, shape (rows, number of metrics in `needs_sums`).
        """
        given = dict(options)
        for name in ("temperature", "input"):
            if name in given:
                raise TypeError(f"{name} is given; accepted: the one that the state was made with")
        given["temperature"] = self.temperature
        given["input"] = "probs" if self.weights else "logits"
        settings = check_options("RowState.partial_sums", given, StateOptions)
        parsed = [parse_metric(name) for name in self.needs_sums]
        sums = np.zeros((len(self.array), len(parsed)))
        if not parsed or _is_empty(p, settings.axis):
            return sums
        batch = prepare({"p": p, "q": q}, settings)
        if batch.shape != self.shape:
            raise ValueError(f"p and q are batches of shape {batch.shape}; accepted: {self.shape}")
        wanted = {
            (operation.name, parameters): number
            for number, (operation, parameters) in enumerate(parsed)
            if not parameters or 0.0 < parameters[0] < 1.0
        }
        assert batch.q is not None
        if wanted and not batch.idle:
            header = np.ascontiguousarray(self.array[:, : len(HEADER[2])])
            if batch.place.device == "cpu":
                found = batch.backend.partial_sums(
                    list(wanted), batch.p, batch.q, batch.rows, header
                )
            else:
                found = _device.partial_sums(batch, list(wanted), header)
            for number, values in zip(wanted.values(), found, strict=True):
                sums[:, number] = values
        return sums

    def finish(self, sums: ArrayLike | None = None, *, base: float | None = None) -> dict[str, Any]:
        """The values of the metrics, if this is the state of whole rows.

        Arguments:
            sums: what the `partial_sums` of all shards add up to, if the state `needs_sums`.
            base: base of the logarithm, as for `kl_divergence`.

        Returns:
            For each metric a float64 NumPy array of the shape of the batch. Rows that hold NaN or
            +inf, or that are -inf in all their parts, give NaN.
        """
        unit = check_options("RowState.finish", {"base": base}, _FinishOptions).unit
        wanted = self.needs_sums
        if wanted and sums is None:
            raise ValueError(
                f"sums is None; accepted: what the partial_sums of all shards add up to, because "
                f"{', '.join(wanted)} follow from them"
            )
        added = np.zeros((len(self.array), len(wanted))) if sums is None else np.asarray(sums)
        if added.shape != (len(self.array), len(wanted)):
            raise ValueError(
                f"sums has shape {added.shape}; accepted: {(len(self.array), len(wanted))}"
            )
        names, operations = _parse(self.metrics)
        header, measures = HEADER[_sides(operations)], _measures(operations)
        columns = dict(zip(header, self.array.T, strict=False))
        found = dict(zip(measures, self.array.T[len(header) :], strict=True))
        results = {}
        with np.errstate(all="ignore"):
            proper = {
                side: np.isfinite(columns[f"max_{side}"])
                for side in "pq" if f"max_{side}" in columns
            }  # fmt: skip
            for name, (operation, parameters) in zip(names, operations, strict=True):
                if name in wanted:
                    _, largest = operation.bounds(parameters, 1)
                    values = np.clip(added[:, wanted.index(name)], 0.0, largest)
                else:
                    values = value_of(
                        operation.name, parameters, columns, found, self._pair_of_temperatures,
                        self.weights,
                    )  # fmt: skip
                valid = np.logical_and.reduce([proper[side] for side in operation.rows])
                values = np.where(valid, values, np.nan)
                if operation.logarithmic:
                    values = values / unit
                results[name] = values.reshape(self.shape)
        return results

    def __eq__(self, other: object) -> bool:
        """Whether two states are of the same rows, part and metrics, to the bit."""
        return isinstance(other, RowState) and all(
            np.array_equal(here, there, equal_nan=True) if what == "array" else here == there
            for what in self.__slots__
            for here, there in [(getattr(self, what), getattr(other, what))]
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RowState of {len(self.array)} rows: {', '.join(self.metrics)}"


class _FinishOptions(TypedDict, total=False):
    base: float | None


_Parsed = Sequence[tuple[Operation, tuple[float, ...]]]


def _parse(metrics: str | Iterable[str]) -> tuple[tuple[str, ...], _Parsed]:
    names = tuple(dict.fromkeys((metrics,) if isinstance(metrics, str) else metrics))
    if not names:
        raise ValueError("metrics is empty; accepted: at least one name")
    operations = [parse_metric(name, single=True) for name in names]
    for name, (operation, _) in zip(names, operations, strict=True):
        if operation.name == "topk_overlap":
            raise ValueError(f"metric {name!r} does not follow from states of parts of a row")
    return names, operations


def _sides(operations: _Parsed) -> int:
    """How many batches these metrics read."""
    return 2 if any("q" in operation.rows for operation, _ in operations) else 1


def _measures(operations: _Parsed) -> tuple[Measure, ...]:
    found = (
        measure for operation in operations for measure in needed(operation[0].name, operation[1])
    )
    return tuple(dict.fromkeys(found))


def _columns(operations: _Parsed, sides: int) -> tuple[str, ...]:
    measures = (
        ":".join([each.name, *map(repr, each.parameters)]) for each in _measures(operations)
    )
    return (*HEADER[sides], *measures)


def _is_empty(x: Any, axis: int) -> bool:
    """Whether a shard has no entries."""
    shape = getattr(x, "shape", None)
    return shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 0


def _read(
    arrays: dict[str, Any],
    measures: tuple[Measure, ...],
    settings: Settings,
    offset: int,
    targets: Any,
    symmetric: bool,
    alone: bool,
) -> tuple[tuple[int, ...], Array, tuple[float, ...]]:
    """Shape of the batch, numbers of the state, and temperatures."""
    sides = len(arrays)
    count = len(HEADER[sides])
    empty = _is_empty(arrays["p"], settings.axis)
    if empty:
        # As of one entry that has no mass; which rows are dropped, others say.
        settings, targets = replace(settings, where=None), None
        arrays = {name: _one_entry(x, name, settings) for name, x in arrays.items()}
    batch = prepare(arrays, settings)
    temperatures = tuple(each.temperature for each in (batch.p, batch.q) if each is not None)
    state = np.full((batch.p.count, count + len(measures)), np.nan)
    if batch.idle:
        return batch.shape, state, temperatures
    local, inside = _local_tokens(targets, batch, offset)
    asked = [each for each in measures if each.name not in _INDICES]
    metrics = [(each.name, each.parameters) for each in asked]
    if batch.place.device == "cpu":
        found, ratio, values = batch.backend.shard(
            metrics, batch.p, batch.q, batch.rows, local, symmetric, alone
        )
    else:
        found, ratio, values = _device.shard(batch, metrics, local)
    for number, side in enumerate(found):
        state[:, 2 * number : 2 * number + 2] = side[:, :2]
    nothing = [side[:, 0] == -np.inf for side in found]
    one_sided = np.logical_or.reduce(nothing)
    if ratio is not None:
        state[:, 4] = np.where(one_sided, 0.0, ratio)
    known = dict(zip(asked, values, strict=True))
    for number, measure in enumerate(measures, start=count):
        if measure.name in _INDICES:
            index = found[_INDICES[measure.name]][:, 2]
            state[:, number] = np.where(index < 0.0, np.inf, index + offset)
            continue
        value = known[measure]
        if measure.name in _TOKENS:
            empty_side = nothing["pq".index(measure.name[-1])]
            value = np.where(inside & ~empty_side, value, np.inf)
        elif measure in TOP_RATIO:
            missing = (value == 0.0) & (settings.input == "probs")
            value = np.where(missing | nothing[TOP_RATIO.index(measure)], -np.inf, value)
            if measure == TOP_RATIO[0]:
                value = np.where(nothing[1], found[0][:, 0], value)
        else:
            without = {"entropy_p": nothing[0], "renyi_entropy": nothing[0]}.get(measure.name)
            if measure.name == "entropy_q":
                without = nothing[1]
            # A part without mass has a weight of 0 in all that it is merged with.
            value = np.where(one_sided if without is None else without, 0.0, value)
        state[:, number] = value
    if batch.keep is not None:
        keep = batch.keep
        if batch.place.device != "cpu":
            with _device.on(batch.place):
                keep = _device.fetched(keep, batch.shape).ravel()
        state[~keep] = np.nan
    return batch.shape, state, temperatures


def _one_entry(x: Any, name: str, settings: Settings) -> Any:
    """An array of the batch's shape with one entry a row: nothing."""
    shape = list(x.shape)
    shape[settings.axis] = 1
    return np.full(shape, 0.0 if settings.input == "probs" else -np.inf, np.float32)


def _local_tokens(
    targets: Any, batch: Batch, offset: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Targets as they count here, and which of them are here."""
    if targets is None:
        nowhere = np.zeros(batch.p.count, np.int64)
        return nowhere, nowhere > 0
    tokens = batch.integers("targets", targets)
    local = tokens - offset
    inside = (local >= 0) & (local < batch.p.width)
    return np.where(inside, local, 0), inside

"""The evaluation job: the base's logits read once, for any number of candidates, of any size."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ._arrays import FLOATS
from ._checkpoint import Checkpoint, Part, identity
from ._evaluation import Evaluation
from ._linear import BLOCK_BYTES, BLOCK_ROWS, BLOCK_UNIT, LinearLogits, in_step
from ._measuring import Rows, measured, measures
from ._missing import completed
from ._pairs import NOISE_ROWS, FlooredPair, Pair, Stored, check_floored
from ._sources import (
    ArraySource,
    Logits,
    LogitSource,
    ShardedSource,
    SourceError,
    as_source,
    check_column,
    open_column,
)
from ._statistics import positions_of
from .llama_cpp import BaseLogits, check_same_text

Progress: TypeAlias = Callable[[int, int], None]
#: What was read of both sides of a pair.
Read: TypeAlias = "tuple[Any, Any]"
#: The columns of chunks as they are done, each with its first row, or why there are none; in lists
#: of those that were done together.
Measured: TypeAlias = Generator[list[tuple[int, Part | SourceError]], None, None]

# All inputs' bytes in one chunk: far above the cost of a call, far below a laptop's memory, and
# often enough for a progress bar. The kernels cut fewer rows than these along the vocabulary, which
# takes half as long again: long rows may have more bytes.
_CHUNK_BYTES = 64 * 2**20
_CHUNK_ROWS = 64
_MOST_BYTES = 256 * 2**20
# Touched for each this many bytes, a mapped file is read ahead: less than what is read at once.
_READ_AHEAD = 64 * 2**10
# Samples of the bootstrap, and what Python and the libraries need.
_FIXED_BYTES = 200 * 2**20


class Job:
    """An evaluation of one or more candidates: opened and checked, and not yet run.

    Arguments are those of `evaluate`. `rows` is what there is to do, `row_bytes` what is read of
    each, and `memory` the most bytes that will be needed beside mapped files.
    """

    def __init__(
        self,
        base: Logits,
        tests: Sequence[Logits],
        targets: Any = None,
        *,
        sequences: Any = None,
        where: Any = None,
        ignore_index: int | None = None,
        metrics: str | Sequence[str] | None = None,
        temperature: float | tuple[float, float] = 1.0,
        input: Literal["logits", "log_probs", "probs"] = "logits",
        vocab_size: int | None = None,
        backend: Literal["auto", "reference", "cpu", "cuda"] = "auto",
        key: str | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        if not tests:
            raise ValueError("test is empty; accepted: at least one candidate")
        roles = ["test"] if len(tests) == 1 else [f"test {i + 1}" for i in range(len(tests))]
        given = [(base, "base"), *zip(tests, roles, strict=True)]
        self.base, *self.tests = completed([as_source(*each, key) for each in given])
        self.settings: dict[str, Any] = {
            "metrics": metrics, "temperature": temperature, "input": input,
            "vocab_size": vocab_size, "backend": backend,
        }  # fmt: skip
        known = [each for each in (self.base, *self.tests) if isinstance(each, BaseLogits)]
        if known:
            check_floored(self.settings)
            for test in self.tests:
                check_same_text(self.base, test)
        for test in self.tests:
            width = _common_width(self.base, test, vocab_size)
        lead = self.base.shape[:-1]
        self.rows = math.prod(lead)
        self.targets_from = None
        targets_given = targets
        if targets is None:
            targets = known[0].targets if known else None
            self.targets_from = known[0].name if known else None
        elif isinstance(targets, (str, os.PathLike)):
            self.targets_from = os.fspath(targets)
        self.where = None if where is None else _column(where, "where", lead)[1]
        if ignore_index is not None and not isinstance(ignore_index, (int, np.integer)):
            raise TypeError(f"ignore_index is {ignore_index!r}; accepted: None, or a whole number")
        self.targets = None
        if targets is not None:
            name, tokens = _column(targets, "targets", lead)
            if ignore_index is not None:
                wanted = tokens != ignore_index
                self.where = wanted if self.where is None else self.where & wanted
            self.targets = _checked_tokens(name, tokens.astype(np.int64), width, self.where)
        elif ignore_index is not None:
            raise ValueError(
                f"ignore_index is {ignore_index}, but there are no targets; name them with targets "
                "(--targets)"
            )
        self.sequences = _labels(sequences, known[0].sequences if known else None, lead)
        #: Numbers of the rows to compare, and the place of every row in its sequence, where rows
        #: are left out: what is left does not tell.
        self.kept = np.arange(self.rows) if self.where is None else np.flatnonzero(self.where)
        self._positions = (
            None if self.where is None or self.sequences is None else positions_of(self.sequences)
        )
        sources = (self.base, *self.tests)
        #: Products take all cores for themselves: nothing is read ahead beside them.
        self.multiplies = any(isinstance(each, LinearLogits) for each in sources)
        self._mapped = [each for each in sources if isinstance(each, (ArraySource, ShardedSource))]
        self.pairs = self._pairs(backend)
        self.row_bytes = sum(map(_stored_bytes, sources))
        if chunk_rows is None:
            chunk_rows = self._best_rows()
        elif chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}; accepted: a whole number from 1")
        self.chunk_rows = chunk_rows
        #: What another process makes the same job of, if it is given by paths.
        self.given: tuple[Any, Sequence[Any], dict[str, Any], dict[str, Any]] = (
            base, tests, {"targets": targets_given, "sequences": sequences, "where": where},
            {**self.settings, "key": key, "chunk_rows": chunk_rows, "ignore_index": ignore_index},
        )  # fmt: skip
        self.names = measures(metrics, self.targets is not None)
        self.evaluations = [self._started(number) for number in range(len(self.tests))]
        self.done = 0
        self._one_at_a_time = threading.Lock()
        rounded = {"float16", "bfloat16"} & {each.dtype for each in sources}
        self._noise_rows = (
            _sample(self.kept) if rounded and input == "logits" else np.empty(0, np.int64)
        )

    @property
    def memory(self) -> int:
        """The most bytes that will be needed, mapped files aside."""
        # One chunk is read while another is worked on.
        width = self.base.shape[-1]
        sources = self.base, *self.tests
        made = [each for each in sources if not getattr(each, "mapped", False)]
        rows = sum(
            (1 if isinstance(each, LinearLogits) else 2) * each.shape[-1] * FLOATS[each.dtype]
            for each in made
        )
        rows += sum(2 * 4 * (width + 1) for each in self.pairs if isinstance(each, FlooredPair))
        read = self.chunk_rows * rows + sum(getattr(each, "memory", 0) for each in made)
        # Columns are joined at the end, and summarized from a copy. Which rows they are of is one,
        # and their positions another, where some are left out.
        number = len(self.names) + (3 if self.where is None else 5)
        columns = 2 * 8 * self.rows * len(self.tests) * number
        return _FIXED_BYTES + read + columns

    def run(
        self,
        progress: Progress | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 10.0,
        dask: str | None = None,
    ) -> list[Evaluation]:
        """Do it, and return one evaluation a candidate.

        Ranges of rows whose files cannot be read are left out, and named in the SourceError that is
        raised when everything else is done, and kept if there is a checkpoint.
        """
        saved = None
        parts: list[tuple[int, int, Part]] = []
        if checkpoint is not None:
            saved = Checkpoint(Path(checkpoint), self.identity(), resume)
            parts = list(saved.parts())
        covered = {row for start, stop, _ in parts for row in range(start, stop, self.chunk_rows)}
        starts = [row for row in self._chunks() if row not in covered]
        left = sum(min(self.chunk_rows, self.rows - start) for start in starts)
        self.done = self.rows - left
        if progress is not None and self.done:
            progress(self.done, self.rows)
        if dask is None:
            running = self._measured(starts)
        else:
            from ._cluster import measured_on

            running = measured_on(dask, self, starts)
            checkpoint_seconds = 0.0  # a range may have taken a worker long
        unsaved: list[tuple[int, int, Part]] = []
        failed: dict[int, SourceError] = {}
        saved_at = time.perf_counter()
        try:
            for together in running:
                for start, found in together:
                    stop = min(start + self.chunk_rows, self.rows)
                    part = _doubt(start, stop, failed.values()) or found
                    if isinstance(part, SourceError):
                        failed[start] = part
                        if saved is not None and part.file is not None:
                            saved.note_unreadable(part.file)
                        unsaved, _ = _without(unsaved, part)
                        parts, dropped = _without(parts, part)
                        self.done -= sum(last - first for first, last, _ in dropped)
                        failed |= {row: part for first, last, _ in dropped
                                   for row in range(first, last, self.chunk_rows)}  # fmt: skip
                        if dropped and saved is not None:
                            saved.drop(*part.doubtful, parts)
                    else:
                        parts.append((start, stop, part))
                        unsaved.append(parts[-1])
                        self.done += stop - start
                    if progress is not None:
                        progress(self.done, self.rows)
                if saved is not None and time.perf_counter() - saved_at >= checkpoint_seconds:
                    saved.put(unsaved)
                    unsaved = []
                    saved_at = time.perf_counter()
        finally:
            running.close()
            if saved is not None:
                saved.put(unsaved)
        if failed:
            kept = "" if saved is None else f"; what is done is kept in {saved.folder}"
            reasons = dict.fromkeys(str(failed[start]) for start in sorted(failed))
            first, *rest = reasons
            also = f", and {len(rest)} more such as this: {rest[0]}" if rest else ""
            raise SourceError(
                f"{first}{also}; {self.done} of {self.rows} rows are done, {len(failed)} ranges of "
                f"rows failed, the first at row {min(failed)}{kept}"
            )
        for _, _, part in sorted(parts, key=lambda each: each[:2]):
            self._take(part)
        return self.evaluations

    def _chunks(self) -> Sequence[int]:
        """The first row of every chunk that has rows to compare: at least one, if there is one."""
        chunks = range(0, self.rows, self.chunk_rows)
        if self.where is None:
            return chunks
        numbers = np.unique(self.kept // self.chunk_rows)
        return [chunks[number] for number in numbers] or chunks[:1]

    def _measured(self, starts: Sequence[int]) -> Measured:
        """The columns of these chunks, each with its first row.

        While they are worked on the next are read: what a disk or one core has to do for them.
        What takes all cores comes when they are asked for, and may overwrite those before.
        """
        left = iter(starts)
        lap = time.perf_counter()
        with ThreadPoolExecutor(1, "klfast-read") as reader:

            def ahead() -> list[tuple[int, Future[list[Read] | SourceError]]]:
                return [(s, reader.submit(self._available, s)) for s in itertools.islice(left, 1)]

            following = ahead()
            while following:
                start, reading = following.pop()
                read = reading.result()
                if not self.multiplies:
                    following = ahead()
                found: Part | SourceError
                try:
                    if isinstance(read, SourceError):
                        raise read
                    found = self._columns(start, self._rows(start, read), lap)
                except SourceError as error:
                    found = error
                lap = time.perf_counter()
                del reading, read  # before there are others
                yield [(start, found)]
                following = following or ahead()

    def _available(self, start: int) -> list[Read] | SourceError:
        try:
            return self._read(start)
        except SourceError as error:
            return error

    def _read(self, start: int) -> list[Read]:
        """A chunk of the base and of each candidate."""
        stop = min(start + self.chunk_rows, self.rows)
        found = [each.read(start, stop) for each in self.pairs]
        keep = None if self.where is None else self.where[start:stop]
        for array in itertools.chain(*found):
            _touch(array, keep)
        return found

    def _rows(self, start: int, read: Sequence[Read]) -> Iterator[Rows]:
        """What was read, ready to be compared, one candidate after the other."""
        stop = min(start + self.chunk_rows, self.rows)
        part = slice(start, stop)
        noisy = self._noise_rows[(start <= self._noise_rows) & (self._noise_rows < stop)] - start
        for pair, both in zip(self.pairs, read, strict=True):
            yield Rows(
                pair.block(start, both),
                targets=None if self.targets is None else self.targets[part],
                where=None if self.where is None else self.where[part],
                sequences=None if self.sequences is None else self.sequences[part],
                numbers=None if self.where is None else np.arange(start, stop),
                positions=None if self._positions is None else self._positions[part],
                noise_at=() if pair.noise_floor is not None else noisy.tolist(),
            )

    def _pairs(self, backend: str) -> list[Pair | FlooredPair]:
        """The base with each candidate; plain ones share what is read of the base."""
        base, *tests = in_step([self.base, *self.tests])
        shared = _Shared(base) if len(tests) > 1 else base
        pairs: list[Pair | FlooredPair] = []
        for test in tests:
            if isinstance(base, BaseLogits) or isinstance(test, BaseLogits):
                assert self.targets is not None  # such a file has them
                side = base if isinstance(base, BaseLogits) else shared
                pairs.append(FlooredPair(side, test, self.targets, _sample(self.kept), backend))
            else:
                pairs.append(Pair(shared, test))
        return pairs

    def _best_rows(self) -> int:
        """How many rows of all sides make a chunk."""
        sources = self.base, *self.tests
        logits = sum(each.shape[-1] * FLOATS[each.dtype] for each in sources)
        most = max(_CHUNK_BYTES // logits, min(_CHUNK_ROWS, _MOST_BYTES // logits))
        if self.multiplies:
            most = min(BLOCK_ROWS, BLOCK_BYTES // logits)
            most -= most % BLOCK_UNIT if most > BLOCK_UNIT else 0
        unit: int = max(getattr(each, "unit_rows", 1) for each in sources)
        rows = unit * max(1, most // unit)
        lengths = {each.shard_rows for each in sources if isinstance(each, ShardedSource)} - {0}
        if unit > 1 or self.multiplies or not lengths:
            return rows
        # Rows of two shards are copied to lie together: a few more, if that avoids it.
        return next(
            (more for more in range(rows, 2 * rows + 1)
             if all(length % more == 0 or more % length == 0 for length in lengths)),
            rows,
        )  # fmt: skip

    def _started(self, number: int) -> Evaluation:
        evaluation = Evaluation(**self.settings)
        evaluation.base = _described(self.base)
        evaluation.test = _described(self.tests[number])
        evaluation.targets_from = self.targets_from
        evaluation.stored_noise = self.pairs[number].noise_floor
        return evaluation

    def measured(self, starts: Sequence[int]) -> list[Part | SourceError]:
        """The columns of the chunks that begin with these rows, as a checkpoint keeps them.

        Any thread may ask; each waits for the others, for sources read into memory of their own.
        Keeps nothing in memory: what is resident of mapped files would count as a worker's. Starts
        no thread: a worker is told how many it may have; of mapped files the system is asked to
        read the next chunk meanwhile.
        """
        parts: list[Part | SourceError] = []
        with self._one_at_a_time:
            for start, following in zip(starts, [*starts[1:], self.rows], strict=True):
                began = time.perf_counter()
                rows, ahead = (
                    (first, min(first + self.chunk_rows, self.rows)) for first in (start, following)
                )
                try:
                    read = self._read(start)
                    for source in self._mapped:
                        source.read_ahead(*ahead)
                    part = self._columns(start, self._rows(start, read), began)
                except SourceError as error:
                    parts.append(error)
                    continue
                for source in self._mapped:
                    source.release(*rows)
                known = sum(part[f"{number}/seconds"] for number in range(len(self.tests)))
                last = f"{len(self.tests) - 1}/seconds"
                part[last] = part[last] + (time.perf_counter() - began - known)
                parts.append(part)
        return parts

    def _columns(self, start: int, blocks: Iterable[Rows], began: float) -> Part:
        part: Part = {}
        for number, rows in enumerate(blocks):
            columns, noise = measured(rows, self.settings)
            part |= {f"{number}/{name}": column for name, column in columns.items()}
            part[f"{number}/noise"] = np.array(noise)
            began, before = time.perf_counter(), began
            part[f"{number}/seconds"] = np.array(began - before)
        # A file that was written to meanwhile may have held anything.
        for source in self._mapped:
            source.check(start, min(start + self.chunk_rows, self.rows))
        return part

    def _take(self, part: Part) -> None:
        """Take over the columns of rows that follow those that are there."""
        known = {
            "targets": "absent" if self.targets is None else "given",
            "sequences": "absent" if self.sequences is None else "given",
        }
        for number, evaluation in enumerate(self.evaluations):
            own = {
                name.partition("/")[2]: column
                for name, column in part.items()
                if name.partition("/")[0] == str(number)
            }
            evaluation.seconds += float(own.pop("seconds"))
            noise = own.pop("noise").tolist()
            evaluation.keep(known, own, noise)

    def identity(self) -> dict[str, Any]:
        """What makes this job the one it is."""
        from . import __version__

        return {
            "klfast": __version__,
            "base": identity(self.base),
            "test": [identity(test) for test in self.tests],
            **{key: _digest(each) for key, each in (("where", self.where),
                                                    ("targets", self.targets),
                                                    ("sequences", self.sequences))},
            **self.settings,
            "metrics": list(self.names),
            "chunk_rows": self.chunk_rows,
        }  # fmt: skip


_Ranges: TypeAlias = "list[tuple[int, int, Part]]"


def _doubt(start: int, stop: int, errors: Iterable[SourceError]) -> SourceError | None:
    """The error by which nothing is to be believed of these rows."""
    for error in errors:
        first, last = error.doubtful
        if start < last and first < stop:
            return error
    return None


def _without(parts: _Ranges, error: SourceError) -> tuple[_Ranges, _Ranges]:
    """Ranges that an error leaves as they are, and those of which nothing is to be believed."""
    dropped = [each for each in parts if _doubt(each[0], each[1], [error])]
    gone = {each[0] for each in dropped}
    return [each for each in parts if each[0] not in gone], dropped


class JobOptions(TypedDict, total=False):
    """Keywords of `evaluate` that decide what is computed."""

    sequences: Any
    where: Any
    ignore_index: int | None
    metrics: str | Sequence[str] | None
    temperature: float | tuple[float, float]
    input: Literal["logits", "log_probs", "probs"]
    vocab_size: int | None
    backend: Literal["auto", "reference", "cpu", "cuda"]
    key: str | None
    chunk_rows: int | None


class RunOptions(TypedDict, total=False):
    """Keywords of `evaluate` that decide how it runs."""

    progress: Progress | None
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    checkpoint_seconds: float
    dask: str | None


class EvaluateOptions(JobOptions, RunOptions, total=False):
    """Keywords of `evaluate`."""


@overload
def evaluate(
    base: Logits,
    test: list[Logits] | tuple[Logits, ...],
    targets: Any = None,
    **options: Unpack[EvaluateOptions],
) -> list[Evaluation]: ...
@overload
def evaluate(
    base: Logits, test: Logits, targets: Any = None, **options: Unpack[EvaluateOptions]
) -> Evaluation: ...
def evaluate(
    base: Logits, test: Any, targets: Any = None, **options: Unpack[EvaluateOptions]
) -> Evaluation | list[Evaluation]:
    """Compare models' logits, row by row, in chunks: files may be larger than memory.

    Parameters
    ----------
    base, test
        Logits of the original model (P) and of the one under test (Q), of the same shape
        ``(..., V)``: a path that `klfast.open_logits` takes, a `LogitSource`, or an array. Leading
        axes are flattened, and rows numbered from 0. ``test`` may be a list or tuple of several
        candidates, for which the base is read once.
    targets
        The token that really followed each row: integers of shape ``(...)`` or ``(rows,)``, as
        an array or the path of a file; None takes those that a file of logits holds itself. Adds
        the measures nll_p, nll_q and delta_prob, and the perplexities.
    sequences
        Which text each row belongs to, as targets are given; None takes what the files say: in
        logits of shape (..., position, V) each text is one sequence. Confidence intervals are
        then made by drawing whole sequences.
    where
        Booleans, given as targets are: rows that are False, such as padding or prompts, are not
        counted, and not read where files are mapped or a whole chunk is False; their targets may
        be anything. Rows keep their numbers and their positions in the sequences.
    ignore_index
        Rows with this target are left out as well; -100 is what losses of PyTorch ignore.
    metrics
        Measures, as for `klfast.compare`; "all" stands for a dozen of them. The first one decides
        which rows are the worst. None is ``("kl", "reverse_kl", "tv", "same_top", "top_p")``.
    temperature, input, vocab_size, backend
        As for `klfast.compare`.
    key
        Name of the array, in files that hold several. By default ``logits``, or the only one.
    chunk_rows
        Rows read at a time. None takes about 64 MiB of all inputs together.
    progress
        Called after every chunk with the number of rows done and of all rows.
    checkpoint, checkpoint_seconds
        A folder in which to keep what is done, and how often to (10 s; also when interrupted).
    resume
        Whether to go on with what the folder holds; the result is the same to the bit. Refused if
        files (name, size, time of change, shape, dtype) or settings are not the same; arrays in
        memory are known by name, shape and dtype only.
    dask
        Address of a Dask scheduler whose workers share the work, or "local" for a cluster on this
        machine; its dashboard's address is printed to stderr. All inputs must be paths, which
        workers see under the same names. Rows whose files cannot be read are left out, and named
        when everything else is done. Results are the same bits as without.

    Returns
    -------
    Evaluation, or a list with one for each candidate
        Per-row columns in float64 and nats, with ``summary()``, ``to_dict()`` and a table as its
        ``str``.

    Raises
    ------
    SourceError
        If a file or array or checkpoint cannot be used, in one line that names it.
    ValueError
        If shapes differ, targets do not fit, or an argument is not acceptable.

    Notes
    -----
    Do not make mapped files shorter meanwhile: see `klfast.open_logits`. `klfast compare`, which is
    a process of its own, survives that, and so does a job on a cluster.
    """
    several = isinstance(test, (list, tuple))
    asked: dict[str, Any] = {**options}
    running = {name: asked.pop(name) for name in RunOptions.__annotations__ if name in asked}
    found = Job(base, test if several else [test], targets, **asked).run(**running)
    return found if several else found[0]


class _Shared:
    """A source that several pairs read in step: it remembers the rows that were read last."""

    def __init__(self, source: LogitSource) -> None:
        self._source = source
        self._last: tuple[tuple[int, int], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, start: int, stop: int) -> Any:
        if self._last is None or self._last[0] != (start, stop):
            self._last = None  # let go of them before there are others
            self._last = (start, stop), self._source.read(start, stop)
        return self._last[1]


def _described(source: LogitSource) -> dict[str, Any]:
    kind = getattr(source, "kind", source.dtype)
    return {"name": source.name, "shape": list(source.shape), "dtype": kind}


def _stored_bytes(source: LogitSource) -> int:
    """Bytes that are read of each row."""
    known: int = getattr(source, "row_bytes", source.shape[-1] * FLOATS[source.dtype])
    return known


def _digest(column: NDArray[Any] | None) -> str | None:
    return None if column is None else hashlib.sha256(column.tobytes()).hexdigest()


def _sample(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Some rows of these, spread evenly: of them the effect of 16 bits is estimated."""
    places = np.linspace(0, len(rows) - 1, min(NOISE_ROWS, len(rows)))
    return rows[np.unique(places.astype(np.int64))]


def _touch(rows: Any, keep: NDArray[np.bool_] | None) -> None:
    """Have the pages of a mapped file, of the rows to keep, read from disk now."""
    array = rows.words if isinstance(rows, Stored) else rows
    if isinstance(array, np.ndarray) and array.strides[-1:] == (array.itemsize,):
        pages = array[:, :: _READ_AHEAD // array.itemsize]
        (pages if keep is None else pages[keep]).max(initial=0)


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
                "if the longer is padded, read the common part with vocab_size (--vocab-size)"
            )
        return widths[0]
    if not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size is {vocab_size}; accepted: 1 to {min(widths)}")
    return vocab_size


def _checked_tokens(
    name: str, tokens: NDArray[np.int64], width: int, where: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """Targets, if they are of the vocabulary; those of rows that ``where`` drops become 0."""
    if where is not None:
        tokens = np.where(where, tokens, 0)
    outside = np.flatnonzero((tokens < 0) | (tokens >= width))
    if outside.size:
        first = int(outside[0])
        hint = (
            f"; leave such rows out with ignore_index={tokens[first]} (--ignore-index "
            f"{tokens[first]}), or with where (--where)"
        )
        raise SourceError(
            f"{name}: target {int(tokens[first])} at row {first} is outside the vocabulary, "
            f"0 to {width - 1}" + hint * bool(tokens[first] < 0)
        )
    return tokens


def _labels(given: Any, own: Any, lead: tuple[int, ...]) -> NDArray[np.int64] | None:
    """The sequence of each row: as given, as the file says, or as the shape of the logits does."""
    if given is not None or own is not None:
        return _column(own if given is None else given, "sequences", lead)[1].astype(np.int64)
    if len(lead) < 2:
        return None
    return np.repeat(np.arange(math.prod(lead[:-1])), lead[-1])


def _column(given: Any, what: str, lead: tuple[int, ...]) -> tuple[str, NDArray[Any]]:
    """What a file or an array has of each row, flat, and what to call it."""
    name = what
    if isinstance(given, (str, os.PathLike)):
        name, given = os.fspath(given), open_column(given, what)
    array = np.asarray(given)
    check_column(name, array.dtype, what)
    rows = math.prod(lead)
    if array.shape not in (lead, (rows,)):
        raise SourceError(f"{name}: has shape {array.shape}; the logits have {rows} rows, {lead}")
    return name, array.reshape(-1)

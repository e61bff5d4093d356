"""Rows in the memory of the host, sent to the device in chunks while it computes on others.

Rows go through two pieces of pinned memory, each with memory of the same size on the device, so
that one is filled and sent while the other is computed on. However large the arrays are, no more
memory is taken than these four pieces, or what two pairs of rows need.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from klfast._arrays import FLOATS, STORAGE, Rows, View, memory
from klfast._dispatch import Result

from . import launches

__all__ = ["gradients_of", "log_softmax", "stream", "values_of"]

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]

#: Bytes of rows that are sent at a time.
CHUNK = 64 << 20
#: Rows on the device begin at multiples of this, so that vectors of both begin at the same entries.
PITCH = 64

TO_DEVICE, TO_HOST = 1, 2  # CUDA's numbers


class _Array(NamedTuple):
    """A batch of rows on the host, and what a chunk of it is on the device."""

    rows: Rows
    repeated: bool  # one row, against many of the other batch
    pitch: int  # bytes from a row to the next, on the device

    @classmethod
    def of(cls, rows: Rows) -> _Array:
        repeated = rows.row_stride == 0 and rows.offsets is None
        pitch = -(-rows.width * FLOATS[rows.dtype] // PITCH) * PITCH
        return cls(rows, repeated, pitch)

    def bytes_of(self, count: int) -> int:
        return self.pitch * (1 if self.repeated else count)

    def on_device(self, address: int, count: int) -> Rows:
        """The rows of a chunk, as kernels find them."""
        return replace(
            self.rows, owner=None, address=address, count=count,
            stride=FLOATS[self.rows.dtype], row_stride=0 if self.repeated else self.pitch,
            offsets=None, axes=(),
        )  # fmt: skip

    def table(self, buffer: NDArray[np.uint8], count: int) -> NDArray[Any]:
        """The rows in a piece of memory that is laid out as on the device."""
        stored = buffer[: self.bytes_of(count)].view(STORAGE[self.rows.dtype])
        return stored.reshape(-1, self.pitch // FLOATS[self.rows.dtype])[:, : self.rows.width]


def _some_rows(rows: Rows, numbers: Numbers, writable: bool = False) -> list[NDArray[Any]]:
    """Views of these rows on the host: one of all, where they lie at one stride."""
    first, last = int(numbers[0]), int(numbers[-1])
    if rows.offsets is None and last - first == len(numbers) - 1:
        places = [(rows.address + first * rows.row_stride, len(numbers))]
    elif rows.offsets is None:
        places = [(rows.address + int(number) * rows.row_stride, 1) for number in numbers]
    else:
        places = [(rows.address + int(offset), 1) for offset in rows.offsets[numbers]]
    return [
        memory(
            View(
                rows.owner, address, rows.dtype, (count, rows.width),
                (rows.row_stride, rows.stride),
            ),
            writable,
        )
        for address, count in places
    ]  # fmt: skip


class _Piece:
    """Pinned memory, its like on the device, and how far the work on it has come."""

    def __init__(self, size: int, result_size: int) -> None:
        self.pinned = [cupy.cuda.alloc_pinned_memory(each) for each in (size, result_size)]
        self.device = [cupy.cuda.alloc(each) for each in (size, result_size)]
        self.host = [
            np.frombuffer(pinned, np.uint8, each)
            for pinned, each in zip(self.pinned, (size, result_size), strict=True)
        ]
        self.sent, self.done = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self.store: Callable[[], None] | None = None  # takes the results, when they are there

    def collect(self) -> None:
        """Wait for the results of the chunk, and take them."""
        if self.store is not None:
            self.done.synchronize()
            self.store()
            self.store = None


_of_thread = threading.local()


def _streams(device: int) -> tuple[Any, Any]:
    """Two streams of this thread, one to copy and one to compute.

    They are kept, because CuPy's pool keeps the memory that a stream has used for that stream.
    """
    kept: dict[int, tuple[Any, Any]] = _of_thread.__dict__.setdefault("streams", {})
    if device not in kept:
        kept[device] = (
            cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
        )  # fmt: skip
    return kept[device]


def stream(
    batches: Sequence[Rows],
    numbers: Numbers | None,
    words: NDArray[Any] | None,
    result_bytes: int,
    queue: Callable[[list[Rows], Any, int], None],
    store: Callable[[Numbers, NDArray[np.uint8]], None],
) -> None:
    """Send rows to the device, and have what is queued for each chunk write its results there.

    ``numbers`` says which rows, None all. ``words`` are 8 bytes a row that are sent with it, such
    as its token. ``queue`` gets the rows on the device, a pointer to their words and the address of
    the results, which take ``result_bytes`` a row; ``store`` takes these from the host's memory.
    """
    if numbers is None:
        numbers = np.arange(batches[0].count)
    arrays = [_Array.of(each) for each in batches]
    row_bytes = result_bytes + 8 + sum(array.pitch for array in arrays if not array.repeated)
    at_a_time = min(len(numbers), max(1, CHUNK // row_bytes))
    size = 8 * at_a_time + PITCH + sum(array.bytes_of(at_a_time) for array in arrays)
    copying, computing = _streams(cupy.cuda.Device().id)
    copy = cupy.cuda.runtime.memcpyAsync
    try:
        with computing:
            pieces = [_Piece(size, result_bytes * at_a_time) for _ in range(2)]
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(f"no room for {size} bytes of pinned memory: {error}") from error
    try:
        for index, start in enumerate(range(0, len(numbers), at_a_time)):
            some = numbers[start : start + at_a_time]
            piece = pieces[index % 2]
            piece.collect()
            (pinned, results_on_host), count = piece.host, len(some)
            (here, results), position = (pointer.ptr for pointer in piece.device), 0
            on_device = []
            for array in arrays:
                on_device.append(array.on_device(here + position, count))
                table = array.table(pinned[position:], count)
                at = 0
                for rows in _some_rows(array.rows, some[:1] if array.repeated else some):
                    table[at : at + len(rows)] = rows
                    at += len(rows)
                position += array.bytes_of(count)
            words_here = None
            if words is not None:
                words_here = piece.device[0] + position
                pinned[position : position + 8 * count] = words[some].view(np.uint8)
                position += 8 * count
            copy(here, piece.pinned[0].ptr, position, TO_DEVICE, copying.ptr)
            piece.sent.record(copying)
            computing.wait_event(piece.sent)
            length = result_bytes * count
            with computing:
                queue(on_device, words_here, results)
                copy(piece.pinned[1].ptr, results, length, TO_HOST, computing.ptr)
            piece.done.record(computing)

            def take(some: Numbers = some, found: Any = results_on_host[:length]) -> None:
                store(some, found)

            piece.store = take
        for piece in pieces:
            piece.collect()
    finally:
        # Pinned memory goes back to its pool, and must not be in use any more.
        copying.synchronize()
        computing.synchronize()


def values_of(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    tokens: Numbers | None,
) -> list[Values]:
    """Values of each of some operations; those of rows that are not in ``rows`` are undefined."""
    found = [np.empty(p.count) for _ in metrics]

    def queue(on_device: list[Rows], tokens_here: Any, results: int) -> None:
        first, second = on_device[0], on_device[1] if q is not None else None
        outs = []
        for index in range(len(metrics)):
            out = replace(
                first, address=results + 8 * index * first.count, dtype="float64", row_stride=8
            )
            outs.append(Result(out))
        launches.evaluate(metrics, first, second, None, tokens_here, outs)

    def store(some: Numbers, stored: NDArray[np.uint8]) -> None:
        for values, found_here in zip(
            found, stored.view(np.float64).reshape(len(found), -1), strict=True
        ):
            values[some] = found_here

    batches = [each for each in (p, q) if each is not None]
    stream(batches, rows, tokens, 8 * len(metrics), queue, store)
    return found


def gradients_of(
    metric: tuple[str, tuple[float, ...]],
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    values: Values,
    scale: Values,
    into: Mapping[str, Rows],
) -> None:
    """Write values of an operation, and its gradients times ``scale`` into memory of the host."""
    targets = {side: _Array.of(each) for side, each in into.items()}

    def places(count: int) -> dict[str, int]:
        """Where in the results of a chunk the gradients begin, before the values."""
        found, position = {}, 0
        for side, target in targets.items():
            found[side] = position
            position += target.pitch * count
        return found | {"": position}

    def queue(on_device: list[Rows], scales: Any, address: int) -> None:
        first, second = on_device[0], on_device[1] if q is not None else None
        at = places(first.count)
        out = replace(first, address=address + at[""], dtype="float64", row_stride=8)
        gradients = {
            side: target.on_device(address + at[side], first.count)
            for side, target in targets.items()
        }
        launches.differentiate(metric, first, second, None, Result(out), scales, gradients)

    def store(some: Numbers, stored: NDArray[np.uint8]) -> None:
        at = places(len(some))
        values[some] = stored[at[""] :].view(np.float64)
        for side, target in targets.items():
            _scatter(target.table(stored[at[side] :], len(some)), into[side], some)

    batches = [each for each in (p, q) if each is not None]
    size = 8 + sum(target.pitch for target in targets.values())
    stream(batches, rows, scale, size, queue, store)


def _scatter(table: NDArray[Any], out: Rows, numbers: Numbers) -> None:
    """Copy rows to those of these numbers, on the host."""
    at = 0
    for target in _some_rows(out, numbers, writable=True):
        target[...] = table[at : at + len(target)]
        at += len(target)


def log_softmax(x: Rows, rows: Numbers | None, out: Rows) -> None:
    """Write the log-probabilities of every entry into the memory of ``out``, on the host."""
    results = _Array.of(out)

    def queue(on_device: list[Rows], tokens_here: Any, address: int) -> None:
        (source,) = on_device
        launches.log_softmax(source, None, results.on_device(address, source.count))

    def store(some: Numbers, stored: NDArray[np.uint8]) -> None:
        _scatter(results.table(stored, len(some)), out, some)

    stream([x], rows, None, results.pitch, queue, store)

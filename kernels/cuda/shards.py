"""What is known of rows that are parts of wider ones: states of shards, and their shares of sums.

The numbers come to the host, where states are merged; rows stay where they are, or are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from klfast._arrays import Rows
from klfast._dispatch import Result

from ..plans import ENTRIES
from . import launches, streaming

__all__ = [
    "partial_sums",
    "partial_sums_on_device",
    "queue_states",
    "queue_sums",
    "shard",
    "shard_on_device",
]

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]
Metrics = Sequence[tuple[str, tuple[float, ...]]]
#: Sides by columns, the logarithm of the ratio, and values, as `Backend.shard` says.
Shard = tuple[list[Values], Values | None, list[Values]]

#: Columns of the kernel ``shards``, of one batch and of two.
COLUMNS = {1: 3, 2: 9}
RATIO, TOP_RATIO = 6, 7
#: Its phases.
SUMS = {"tv": 1, "js": 2}


def _launch(p: Rows, q: Rows | None, where: Any, phase: int, out: int, columns: int,
            parameter: float, whole: Rows | None = None) -> None:  # fmt: skip
    """Queue the kernel, with a block a row."""
    work = launches.Work(p, q, where, None)
    work.read("pq")
    call = work.call
    call["phase"], call["values"], call["columns"] = phase, out, columns
    call["parameters"][0] = parameter
    if whole is not None:
        call["into_p"] = work.describe(whole)
    work.launch("shards", p.count)


def queue_states(
    metrics: Metrics, p: Rows, q: Rows | None, where: Any, tokens: Any, out: int
) -> None:
    """Queue columns of the kernel, and one after the other values of the metrics."""
    sides = 1 if q is None else 2
    _launch(p, q, where, 0, out, COLUMNS[sides], sides)
    out += 8 * COLUMNS[sides] * p.count
    cells = Rows(None, out, "float64", p.count, 1, 8, 8, None, "logits", 1.0)
    asked = [metric for metric in metrics if metric[0] not in ENTRIES]
    results = [Result(replace(cells, address=out + 8 * i * p.count)) for i in range(len(asked))]
    if asked:
        launches.evaluate(asked, p, q, where, tokens, results)


def _taken(metrics: Metrics, sides: int, numbers: NDArray[np.uint8]) -> Shard:
    """What was queued, as it came back."""
    count = numbers.nbytes // 8
    asked = [name for name, _ in metrics if name not in ENTRIES]
    rows = count // (COLUMNS[sides] + len(asked))
    stored = numbers.view(np.float64)
    table = stored[: rows * COLUMNS[sides]].reshape(rows, -1)
    left = iter(stored[table.size :].reshape(len(asked), rows))
    values = [
        table[:, TOP_RATIO + ENTRIES[name]] if name in ENTRIES else next(left)
        for name, _ in metrics
    ]
    ratio = table[:, RATIO] if sides == 2 else None
    return [table[:, 3 * side : 3 * side + 3] for side in range(sides)], ratio, values


def _fetched(size: int, queue: Callable[[int], None]) -> NDArray[np.uint8]:
    """Bytes that work on the current stream writes to the device; waits for them."""
    there, here = cupy.cuda.alloc(size), cupy.cuda.alloc_pinned_memory(size)
    stream = cupy.cuda.get_current_stream()
    queue(there.ptr)
    cupy.cuda.runtime.memcpyAsync(here.ptr, there.ptr, size, streaming.TO_HOST, stream.ptr)
    stream.synchronize()
    return np.frombuffer(here, np.uint8, size).copy()


def _size(metrics: Metrics, sides: int) -> int:
    """Bytes of a row's numbers."""
    return 8 * (COLUMNS[sides] + sum(name not in ENTRIES for name, _ in metrics))


def shard_on_device(metrics: Metrics, p: Rows, q: Rows | None, where: Any, tokens: Any) -> Shard:
    """As `Backend.shard`, of rows on the current device; waits for the current stream."""
    sides = 1 if q is None else 2
    found = _fetched(
        _size(metrics, sides) * p.count,
        lambda out: queue_states(metrics, p, q, where, tokens, out),
    )
    return _taken(metrics, sides, found)


def shard(
    metrics: Metrics,
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    tokens: Numbers | None,
    symmetric: bool = False,
    alone: bool = True,
) -> Shard:
    """As `Backend.shard`, always symmetric, and with each L on its own."""
    sides = 1 if q is None else 2
    masses = [np.full((p.count, 3), np.nan) for _ in range(sides)]
    ratio = np.full(p.count, np.nan)
    values = [np.full(p.count, np.nan) for _ in metrics]

    def queue(on_device: list[Rows], tokens_here: Any, out: int) -> None:
        queue_states(
            metrics, on_device[0], on_device[1] if sides == 2 else None, None, tokens_here, out
        )

    def store(some: Numbers, stored: NDArray[np.uint8]) -> None:
        found = _taken(metrics, sides, stored)
        for into, each in zip((*masses, *values), (*found[0], *found[2]), strict=True):
            into[some] = each
        if found[1] is not None:
            ratio[some] = found[1]

    batches = [batch for batch in (p, q) if batch is not None]
    streaming.stream(batches, rows, tokens, _size(metrics, sides), queue, store)
    return masses, ratio if sides == 2 else None, values


def queue_sums(metrics: Metrics, p: Rows, q: Rows, whole: Rows, where: Any, out: int) -> None:
    """Queue, one after the other, shares in the sums over rows whose normalizers are ``whole``."""
    for index, (name, parameters) in enumerate(metrics):
        weight = parameters[0] if parameters else 0.0
        _launch(p, q, where, SUMS[name], out + 8 * index * p.count, 1, weight, whole)


def _whole(normalizers: Values, address: int) -> Rows:
    count, width = normalizers.shape
    row = 8 * width
    return Rows(normalizers, address, "float64", count, width, 8, row, None, "logits", 1.0)


def partial_sums_on_device(
    metrics: Metrics, p: Rows, q: Rows, where: Any, normalizers: Values
) -> list[Values]:
    """As `Backend.partial_sums`, of rows on the current device; waits for the current stream."""
    there = cupy.asarray(normalizers)
    whole = _whole(normalizers, there.data.ptr)
    found = _fetched(
        8 * len(metrics) * p.count, lambda out: queue_sums(metrics, p, q, whole, where, out)
    )
    return list(found.view(np.float64).reshape(len(metrics), p.count))


def partial_sums(
    metrics: Metrics, p: Rows, q: Rows, rows: Numbers | None, normalizers: Values
) -> list[Values]:
    """As `Backend.partial_sums`."""
    results = [np.full(p.count, np.nan) for _ in metrics]

    def queue(on_device: list[Rows], tokens_here: Any, out: int) -> None:
        first, second, whole = on_device
        queue_sums(metrics, first, second, whole, None, out)

    def store(some: Numbers, stored: NDArray[np.uint8]) -> None:
        table = stored.view(np.float64).reshape(len(metrics), -1)
        for into, each in zip(results, table, strict=True):
            into[some] = each

    batches = [p, q, _whole(normalizers, normalizers.ctypes.data)]
    streaming.stream(batches, rows, None, 8 * len(metrics), queue, store)
    return results

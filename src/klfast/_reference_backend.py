"""The backend that runs `klfast.reference`: slow, never wrong, and nothing to compile."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference
from ._arrays import Rows, View, decode, encode, memory
from ._operations import OPERATIONS

__all__ = [
    "available",
    "compare",
    "explain",
    "get_num_threads",
    "gradient",
    "info",
    "log_softmax",
    "partial_sums",
    "run",
    "set_num_threads",
    "shard",
    "warmup",
]

# Rows are taken in blocks, since the reference needs a dozen float64 temporaries of their size.
BLOCK_ENTRIES = 1 << 19

Numbers = NDArray[np.int64]


def available() -> str | None:
    """Return why this backend cannot be used: it always can."""
    return None


def run(
    name: str,
    p: Rows,
    q: Rows | None,
    parameters: tuple[float, ...],
    rows: Numbers | None,
    out: NDArray[np.float64],
    tokens: Numbers | None = None,
) -> None:
    """Write one value a row, in float64 and nats, for the row numbers in `rows` (None: all)."""
    operation = OPERATIONS[name]
    given = {"p": p} if q is None else {"p": p, "q": q}
    inputs = [given[letter] for letter in operation.rows]
    temperatures = tuple(each.temperature for each in inputs)
    for numbers in _blocks(p, rows):
        arguments: list[NDArray[Any]] = [_load(each, numbers) for each in inputs]
        if operation.tokens and tokens is not None:
            arguments.append(tokens[numbers])
        out[numbers] = operation.reference(
            *arguments,
            *(int(value) if parameter.whole else value
              for parameter, value in zip(operation.parameters, parameters, strict=True)),
            temperature=temperatures if len(inputs) > 1 else temperatures[0],
            input=p.input,
        )  # fmt: skip


def log_softmax(x: Rows, rows: Numbers | None, out: Rows) -> None:
    """Write the log-probabilities of every entry into the memory of `out`, in its dtype."""
    for numbers in _blocks(x, rows):
        values = reference.log_softmax(_load(x, numbers), temperature=x.temperature, input=x.input)
        for number, row in zip(numbers, encode(values, out.dtype), strict=True):
            _row(out, int(number), writable=True)[...] = row


def compare(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows,
    rows: Numbers | None,
    tokens: Numbers | None,
) -> list[NDArray[np.float64]]:
    """Return one array of values a metric; rows that are not in `rows` hold anything."""
    results = [np.empty(p.count) for _ in metrics]
    for (name, parameters), out in zip(metrics, results, strict=True):
        run(name, p, q, parameters, rows, out, tokens)
    return results


def gradient(
    name: str,
    p: Rows,
    q: Rows | None,
    parameters: tuple[float, ...],
    rows: Numbers | None,
    out: NDArray[np.float64],
    scale: NDArray[np.float64],
    into_p: Rows | None,
    into_q: Rows | None,
) -> None:
    """Write values into `out` and scaled gradients into the memory of `into_p` and `into_q`.

    That memory may be the logits' own: a block of rows is read whole before it is written.
    """
    temperature = p.temperature if q is None else (p.temperature, q.temperature)
    for numbers in _blocks(p, rows):
        first, second = _load(p, numbers), None if q is None else _load(q, numbers)
        run(name, p, q, parameters, numbers, out)
        factor = scale[numbers][:, None]
        for wrt, into in (("p", into_p), ("q", into_q)):
            if into is None:
                continue
            gradient = reference.gradient(
                name, first, second, *parameters, wrt=wrt, temperature=temperature
            )
            scaled = np.where(factor == 0.0, 0.0, gradient * factor)
            for number, row in zip(numbers, encode(scaled, into.dtype), strict=True):
                _row(into, int(number), writable=True)[...] = row


def shard(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows | None,
    rows: Numbers | None,
    tokens: Numbers | None,
    symmetric: bool = False,
    alone: bool = True,
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64] | None, list[NDArray[np.float64]]]:
    """Return largest entry, log-sum and index of each batch, their log-ratio, and values."""
    batches = [p] if q is None else [p, q]
    sides = [np.full((p.count, 3), np.nan) for _ in batches]
    ratio = None if q is None else np.full(p.count, np.nan)
    for numbers in _blocks(p, rows):
        loaded = [_load(batch, numbers) for batch in batches]
        for batch, side, x in zip(batches, sides, loaded, strict=True):
            side[numbers] = reference.masses(x, temperature=batch.temperature, input=batch.input)
        if ratio is not None:
            temperature = (batches[0].temperature, batches[1].temperature)
            ratio[numbers] = reference.log_ratio(*loaded, temperature=temperature, input=p.input)
    values = [np.full(p.count, np.nan) for _ in metrics]
    for (name, parameters), out in zip(metrics, values, strict=True):
        if name in ("top_ratio_p", "top_ratio_q"):
            _top_ratio(p, q, rows, "pq".index(name[-1]), out)
            continue
        function = "renyi" if name == "log_power" else name
        run(function, p, q, parameters, rows, out, tokens)
    return sides, ratio, values


def _top_ratio(
    p: Rows, q: Rows | None, rows: Numbers | None, side: int, out: NDArray[np.float64]
) -> None:
    """Write the entry of one side where log(p/q) is largest."""
    assert q is not None
    temperature = (p.temperature, q.temperature)
    for numbers in _blocks(p, rows):
        pair = _load(p, numbers), _load(q, numbers)
        index = reference.top_ratio(*pair, temperature=temperature, input=p.input)
        found = np.isfinite(index)
        out[numbers[found]] = pair[side][found, index[found].astype(np.int64)]


def partial_sums(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows,
    rows: Numbers | None,
    normalizers: NDArray[np.float64],
) -> list[NDArray[np.float64]]:
    """Return the shares of these rows in the sums of whole rows that have these normalizers."""
    results = [np.full(p.count, np.nan) for _ in metrics]
    temperature = (p.temperature, q.temperature)
    for numbers in _blocks(p, rows):
        x, y, whole = _load(p, numbers), _load(q, numbers), normalizers[numbers]
        for (name, parameters), out in zip(metrics, results, strict=True):
            out[numbers] = reference.partial_sum(
                name, x, y, whole, *parameters, temperature=temperature, input=p.input
            )
    return results


def explain(name: str, p: Rows, q: Rows | None) -> dict[str, object]:
    """Return what `run` would do."""
    function = OPERATIONS[name.partition(":")[0]].function
    return {"kernel": f"klfast.reference.{function}", "arithmetic": "float64 NumPy", "threads": 1}


def set_num_threads(count: int) -> None:
    """Accept 1 thread, which is what this backend uses."""
    if count != 1:
        raise ValueError(f"threads is {count}; the reference backend runs on 1")


def get_num_threads() -> int:
    """Return 1."""
    return 1


def warmup(names: Sequence[str], dtypes: Sequence[str]) -> None:
    """Do nothing: there is nothing to compile."""


def info() -> dict[str, object]:
    """Return what `klfast info` shows of this backend."""
    return {"threads": 1, "arithmetic": "float64 NumPy"}


def _blocks(p: Rows, rows: Numbers | None) -> Iterator[Numbers]:
    numbers = np.arange(p.count) if rows is None else rows
    step = max(1, BLOCK_ENTRIES // p.width)
    for start in range(0, len(numbers), step):
        yield numbers[start : start + step]


def _load(rows: Rows, numbers: Numbers) -> NDArray[np.float64]:
    stored = np.stack([_row(rows, int(number)) for number in numbers])
    return decode(stored, rows.dtype)


def _row(rows: Rows, number: int, writable: bool = False) -> NDArray[np.generic]:
    step = number * rows.row_stride if rows.offsets is None else int(rows.offsets[number])
    view = View(rows.owner, rows.address + step, rows.dtype, (rows.width,), (rows.stride,))
    return memory(view, writable)

"""The public functions on Dask arrays: lazily, block by block, and without moving logits.

Rows in one block are read where they are. Where the vocabulary is in several blocks, each becomes
a state of a few numbers a row, and the states merge in a tree (`klfast.RowState`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from ._compare import Comparison, compare
from ._operations import OPERATIONS
from ._states import RowState

__all__ = ["call"]

#: Arguments with one entry a row.
_A_ROW = ("tokens", "targets", "where")
#: Names of axes for Dask, beside the numbers of those of the batch: the vocabulary, the columns of
#: a state, sums, metrics.
_V, _C, _S, _M = range(100, 104)


def call(function: Callable[..., Any], names: Sequence[str], operation: str | None,
         given: tuple[Any, ...], keywords: dict[str, Any]) -> Any:  # fmt: skip
    """What `function`, of the operation of this name, is on Dask arrays; None if it takes none.

    `names` are those of the arguments that are logits.
    """
    known = operation is not None or function.__name__ in ("compare", "log_softmax")
    if not known:
        return None
    bound = inspect.signature(function).bind(*given, **keywords)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if arguments.pop("out", None) is not None:
        raise TypeError("out is given with Dask arrays, which are lazy; accepted: None")
    logits = {name: da.asarray(arguments.pop(name)) for name in names}
    axis, size = arguments.pop("axis"), arguments.pop("vocab_size")
    reduction = arguments.pop("reduction", "none")
    rows = {
        name: da.asarray(arguments.pop(name))
        for name in _A_ROW if arguments.get(name) is not None
    }  # fmt: skip
    options = {name: value for name, value in arguments.items() if name not in _A_ROW}

    # On no rows at all: checks every argument as always, and shows what comes out.
    nothing = {name: _nothing(x, axis) for name, x in logits.items()}
    none = {name: np.zeros((), x.dtype) for name, x in rows.items()}
    shared = {"axis": axis, "vocab_size": size, **options}
    if function.__name__ != "log_softmax":
        shared["reduction"] = reduction
    sample = function(**nothing, **none, **shared)

    # The vocabulary to the end, cut to its size, and everything in blocks of the same rows.
    most = max(x.ndim for x in logits.values())
    counted = axis - most if axis >= 0 else axis
    logits = {name: da.moveaxis(x, counted, -1)[..., :size] for name, x in logits.items()}
    logits, rows = _aligned(logits, rows)
    split = any(x.numblocks[-1] > 1 for x in logits.values())
    if function.__name__ == "log_softmax":
        dtype = sample.dtype
        found = _log_softmax(function, logits["x"], rows, options | {"dtype": dtype}, split)
        return da.moveaxis(found, -1, counted)

    metrics, single = _metrics(function, operation, arguments, sample)
    first = sample[metrics[0]] if isinstance(sample, Comparison) else sample
    dtype = (first[0] if isinstance(first, tuple) else first).dtype
    # A sum is taken in float64.
    computed = dtype if reduction == "none" else np.dtype(np.float64)
    options |= {"dtype": computed}
    whole_rows = [name for name in metrics if name.startswith("topk_overlap")]
    if split and whole_rows != list(metrics):
        columns = dict(zip(
            (name for name in metrics if name not in whole_rows),
            _merged([each for each in metrics if each not in whole_rows], logits, rows, options),
            strict=True,
        ))  # fmt: skip
    else:
        columns, whole_rows = {}, list(metrics)
    if whole_rows:
        together = {name: x.rechunk({x.ndim - 1: -1}) for name, x in logits.items()}
        block = partial(_block, function, tuple(whole_rows), options)
        table = _blockwise(block, together, rows, len(whole_rows), computed)
        columns |= {name: table[..., number] for number, name in enumerate(whole_rows)}
    values = {name: _reduced(columns[name], rows.get("where"), reduction, dtype)
              for name in metrics}  # fmt: skip
    if isinstance(sample, Comparison):
        some = next(iter(columns.values()))
        return Comparison(values, some.shape, sample.vocab_size, reduction)
    results = tuple(values.values())
    return results[0] if single else results


def _nothing(x: Any, axis: int) -> NDArray[Any]:
    """An array of the same dtype and vocabulary with no rows."""
    if not x.ndim or not -x.ndim <= axis < x.ndim:
        return np.empty(x.shape, x.dtype)
    shape = [0] * x.ndim
    shape[axis] = x.shape[axis]
    return np.empty(shape, x.dtype)


def _aligned(logits: dict[str, Any], rows: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same arrays, broadcast, in blocks that fit each other: some are cut, and none joined."""
    shapes = [x.shape[:-1] for x in logits.values()]
    if not all(map(_same_shape, shapes, shapes[:1] * 2)):
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError:
            given = " and ".join(str(x.shape) for x in logits.values())
            raise ValueError(
                f"{' and '.join(logits)} have shapes {given}; accepted: batch axes that broadcast"
            ) from None
        logits = {
            name: da.broadcast_to(x, (*shape, x.shape[-1])) for name, x in logits.items()
        }  # fmt: skip
    batch = next(iter(logits.values())).shape[:-1]
    for name, x in rows.items():
        if not _same_shape(x.shape, batch):
            try:
                rows = rows | {name: da.broadcast_to(x, batch)}
            except ValueError:
                raise ValueError(
                    f"{name} has shape {x.shape}; accepted: {batch}, one entry a row, or what "
                    "broadcasts to it"
                ) from None
    _, arrays = da.core.unify_chunks(*_labelled(logits, rows))
    return (
        dict(zip(logits, arrays, strict=False)),
        dict(zip(rows, arrays[len(logits) :], strict=True)),
    )


def _same_shape(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether they are equal; lengths that are not known (NaN) are taken to be."""
    return len(one) == len(other) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True)
    )


def _labelled(logits: dict[str, Any], rows: dict[str, Any]) -> list[Any]:
    """Arrays, each followed by the names of its axes, as Dask's blockwise takes them."""
    letters = tuple(range(_depth(logits)))
    pairs: list[Any] = []
    for x in logits.values():
        pairs += [x, (*letters, _V)]
    for x in rows.values():
        pairs += [x, letters]
    return pairs


def _depth(logits: dict[str, Any]) -> int:
    """The number of batch axes."""
    depth: int = next(iter(logits.values())).ndim - 1
    return depth


def _metrics(
    function: Callable[..., Any], operation: str | None, arguments: dict[str, Any], sample: Any
) -> tuple[tuple[str, ...], bool]:
    """The names of what is computed, and whether it is one thing."""
    if isinstance(sample, Comparison):
        return sample.metrics, False
    assert operation is not None
    if arguments.get("return_entropy"):
        return (operation, "entropy"), False
    parameters = (arguments[each.name] for each in OPERATIONS[operation].parameters)
    return (":".join([operation, *(repr(float(each)) for each in parameters)]),), True


def _blockwise(
    block: Callable[..., Any], logits: dict[str, Any], rows: dict[str, Any], columns: int,
    dtype: Any, **more: Any,
) -> Any:  # fmt: skip
    """``block(names, *arrays)`` for the rows of each block: an array of shape (..., columns)."""
    most = _depth(logits)
    letters, pairs = tuple(range(most)), _labelled(logits, rows)
    names = (*logits, *rows)
    meta = np.empty((0,) * (most + 1), dtype)
    return da.blockwise(
        partial(block, names), (*letters, _C), *pairs, new_axes={_C: columns}, dtype=dtype,
        meta=meta, concatenate=True, align_arrays=False, **more,
    )  # fmt: skip


def _block(
    function: Callable[..., Any], metrics: tuple[str, ...], options: dict[str, Any],
    names: tuple[str, ...], *arrays: Any,
) -> Any:  # fmt: skip
    given = dict(zip(names, arrays, strict=True))
    if function is compare:
        found = compare(**given, **(options | {"metrics": metrics}))
        return np.stack([np.asarray(found[name]) for name in metrics], axis=-1)
    result = function(**given, **options)
    return np.stack(result if isinstance(result, tuple) else (result,), axis=-1)


# Vocabularies in several blocks


def _reading(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("input", "temperature", "backend")}


def _states(metrics: Sequence[str], logits: dict[str, Any], rows: dict[str, Any],
            options: dict[str, Any]) -> tuple[Any, RowState]:  # fmt: skip
    """The states of whole rows, shape (..., columns), and one of no rows that describes them."""
    most = _depth(logits)
    # A single state of nothing says how many columns there are.
    nothing = [np.empty((0, 1), x.dtype) for x in logits.values()]
    targets = np.zeros(0, np.int64) if {"tokens", "targets"} & set(rows) else None
    second = nothing[1] if len(nothing) > 1 else None
    pattern = RowState.of(nothing[0], second, metrics, targets=targets, **_reading(options))
    columns = pattern.array.shape[1]
    widths = next(iter(logits.values())).chunks[-1]
    starts = da.from_array(np.cumsum([0, *widths[:-1]]), chunks=1)
    letters = tuple(range(most))
    pairs = [starts, (_V,), *_labelled(logits, rows)]
    block = partial(_state_block, tuple(metrics), _reading(options), (*logits, *rows), columns)
    states = da.blockwise(
        block, (*letters, _V, _C), *pairs, new_axes={_C: columns},
        adjust_chunks={_V: (1,) * len(widths)}, dtype=np.float64,
        meta=np.empty((0,) * (most + 2)), align_arrays=False,
    )  # fmt: skip
    join = partial(_join, pattern)
    whole = da.reduction(
        states, chunk=_as_it_is, combine=join, aggregate=join, axis=most, concatenate=True,
        split_every=8, dtype=np.float64, meta=np.empty((0,) * (most + 1)), keepdims=False,
    )  # fmt: skip
    return whole, pattern


def _as_it_is(x: Any, axis: Any, keepdims: bool) -> Any:
    return x


def _state_block(
    metrics: tuple[str, ...], options: dict[str, Any], names: tuple[str, ...], columns: int,
    start: Any, *arrays: Any,
) -> Any:  # fmt: skip
    given = dict(zip(names, arrays, strict=True))
    targets = given.pop("tokens", given.pop("targets", None))
    where = given.pop("where", None)
    first, *others = given.values()
    state = RowState.of(
        first, others[0] if others else None, metrics, vocab_offset=int(start[0]),
        targets=targets, where=where, **options,
    )  # fmt: skip
    return state.array.reshape(*state.shape, 1, columns)


def _join(pattern: RowState, x: Any, axis: Any, keepdims: bool) -> Any:
    """Merge states along the last axis but one."""
    first, *rest = (_of(pattern, x[..., number, :]) for number in range(x.shape[-2]))
    merged = first.merge(*rest).array.reshape(*x.shape[:-2], x.shape[-1])
    return merged[..., None, :] if keepdims else merged


def _of(pattern: RowState, x: Any) -> RowState:
    return RowState(
        x.reshape(-1, x.shape[-1]), pattern.metrics, x.shape[:-1], pattern.temperature,
        pattern.weights,
    )  # fmt: skip


def _merged(metrics: Sequence[str], logits: dict[str, Any], rows: dict[str, Any],
            options: dict[str, Any]) -> list[Any]:  # fmt: skip
    """One array a metric, by way of states."""
    whole, pattern = _states(metrics, logits, rows, options)
    most = whole.ndim - 1
    letters = tuple(range(most))
    pairs: list[Any] = [whole, (*letters, _C)]
    dtype = options["dtype"]
    if pattern.needs_sums:
        count = len(pattern.needs_sums)
        keep = {name: x for name, x in rows.items() if name == "where"}
        parts = [whole, (*letters, _C), *_labelled(logits, keep)]
        widths = next(iter(logits.values())).chunks[-1]
        block = partial(_sums_block, pattern, options["backend"], (*logits, *keep))
        sums = da.blockwise(
            block, (*letters, _V, _S), *parts, new_axes={_S: count}, concatenate=True,
            adjust_chunks={_V: (1,) * len(widths)}, dtype=np.float64,
            meta=np.empty((0,) * (most + 2)), align_arrays=False,
        )  # fmt: skip
        pairs += [sums.sum(axis=most), (*letters, _S)]
    block = partial(_finish_block, pattern, options.get("base"), dtype)
    table = da.blockwise(
        block, (*letters, _M), *pairs, new_axes={_M: len(metrics)}, concatenate=True,
        dtype=dtype, meta=np.empty((0,) * (most + 1), dtype), align_arrays=False,
    )  # fmt: skip
    return [table[..., number] for number in range(len(metrics))]


def _sums_block(
    pattern: RowState, backend: str, names: tuple[str, ...], whole: Any, *arrays: Any
) -> Any:
    given = dict(zip(names, arrays, strict=True))
    state = _of(pattern, whole)
    options = {name: given.pop(name) for name in ("where",) if name in given}
    found = state.partial_sums(*given.values(), backend=backend, **options)  # type: ignore[arg-type]
    return found.reshape(*state.shape, 1, -1)


def _finish_block(
    pattern: RowState, base: float | None, dtype: Any, whole: Any, sums: Any = None
) -> Any:
    state = _of(pattern, whole)
    flat = None if sums is None else sums.reshape(-1, sums.shape[-1])
    values = state.finish(flat, base=base)
    with np.errstate(all="ignore"):
        return np.stack([values[name] for name in pattern.metrics], axis=-1).astype(dtype)


def _log_softmax(
    function: Callable[..., Any], x: Any, rows: dict[str, Any], options: dict[str, Any], split: bool
) -> Any:
    most = x.ndim - 1
    letters = tuple(range(most))
    pairs: list[Any] = [x, (*letters, _V)]
    names = ["x"]
    if split:
        whole, _ = _states(("logsumexp",), {"x": x}, rows, options)
        pairs += [whole, (*letters, _C)]
        names.append("whole")
    elif "where" in rows:
        names.append("where")
        pairs += [rows["where"], letters]
    return da.blockwise(
        partial(_log_softmax_block, function, options, tuple(names)), (*letters, _V), *pairs,
        concatenate=True, dtype=options["dtype"], align_arrays=False,
        meta=np.empty((0,) * x.ndim, options["dtype"]),
    )  # fmt: skip


def _log_softmax_block(
    function: Callable[..., Any], options: dict[str, Any], names: tuple[str, ...], *arrays: Any
) -> Any:
    given = dict(zip(names, arrays, strict=True))
    whole = given.pop("whole", None)
    if whole is None:
        return function(**given, **options)
    entries = given["x"].astype(np.float64)
    with np.errstate(all="ignore"):
        largest, log_sum = whole[..., :1], whole[..., 1:2]
        if options["input"] == "probs":
            below = np.log(entries) - np.log(largest)
        else:
            below = entries - largest
        values = below / options["temperature"] - log_sum
        values = np.where(np.isfinite(largest), values, np.nan)
        base = options.get("base")
        return (values / (1.0 if base is None else math.log(base))).astype(options["dtype"])


def _reduced(values: Any, where: Any, reduction: str, dtype: Any) -> Any:
    if reduction == "none":
        return values
    count = math.prod(values.shape)
    if where is not None:
        keep = da.broadcast_to(where, values.shape)
        values, count = da.where(keep, values, 0.0), keep.sum()
    total = values.sum()
    with np.errstate(all="ignore"):
        if reduction == "mean":
            total = total / count if where is not None or count else total * np.nan
    return total.astype(dtype)

"""Calls on arrays of a GPU: their results are made there, and nothing waits for them.

CuPy launches the kernels, also on PyTorch's tensors. Everything is queued on the stream that is
current in the library of the arrays, and memory that is needed until it is done is that library's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import STORAGE, Place, Rows, View, numpy_bfloat16, rows_of, view_of
from ._dispatch import Result
from ._operations import OPERATIONS

if TYPE_CHECKING:
    from ._arguments import Batch

__all__ = [
    "differentiate",
    "empty",
    "evaluate",
    "fetched",
    "log_softmax",
    "on",
    "one_a_row",
    "partial_sums",
    "shard",
    "workspace",
]


class _Stream:
    """Another library's stream, as CuPy takes it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@contextmanager
def on(place: Place) -> Iterator[None]:
    """Have CuPy work on this device, on the stream that the library of the arrays works on."""
    if place.device == "cpu":
        yield
        return
    cupy = import_module("cupy")
    number = int(place.device.partition(":")[2])
    with cupy.cuda.Device(number):
        if place.kind == "CuPy":
            yield
            return
        pointer = sys.modules["torch"].cuda.current_stream(number).cuda_stream
        if pointer == 0:
            stream = cupy.cuda.Stream(null=True)
        elif hasattr(cupy.cuda.Stream, "from_external"):
            stream = cupy.cuda.Stream.from_external(_Stream(pointer))
        else:  # before CuPy 14
            stream = cupy.cuda.ExternalStream(pointer, number)
        with stream:
            yield


@contextmanager
def workspace(place: Place) -> Iterator[None]:
    """Have CuPy take memory that lasts no longer than a call from where CUDA graphs may have it.

    Its own pool may have to ask the driver for more, which must not happen while a stream is
    captured. PyTorch's has memory for its graphs; for a graph of CuPy's the driver allocates, as
    part of the graph.
    """
    cuda = import_module("cupy").cuda
    if place.kind == "PyTorch":
        with cuda.using_allocator(_torch_memory):
            yield
    elif cuda.get_current_stream().is_capturing():
        with cuda.using_allocator(cuda.malloc_async):
            yield
    else:
        yield


def _torch_memory(size: int) -> Any:
    """Memory of PyTorch's on the current device, as CuPy's allocators give it."""
    cuda = import_module("cupy").cuda
    number: int = cuda.Device().id
    tensor = _torch_empty((size,), "uint8", sys.modules["torch"].device("cuda", number))
    return cuda.MemoryPointer(cuda.UnownedMemory(tensor.data_ptr(), size, tensor, number), 0)


def _torch_empty(shape: tuple[int, ...], dtype: str, device: Any) -> Any:
    torch = sys.modules["torch"]
    try:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


def one_a_row(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Entries of `dtype` in the order of rows, as CuPy's array on the current device.

    `x`, of the device or of NumPy, broadcasts to `shape`.
    """
    cupy = import_module("cupy")
    if isinstance(x, np.ndarray):
        return cupy.asarray(np.ascontiguousarray(np.broadcast_to(x, shape), dtype))
    return cupy.ascontiguousarray(cupy.broadcast_to(cupy.asarray(x), shape), dtype)


def fetched(x: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array that broadcasts to `shape`, on the host: waits for the device if it is there."""
    if not isinstance(x, np.ndarray):
        x = x.get() if hasattr(x, "get") else x.cpu().numpy()
    return np.broadcast_to(x, shape)


def empty(place: Place, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of the library, on the device, that `like` is of."""
    if place.kind == "PyTorch":
        return _torch_empty(shape, dtype, like.device)
    wanted = numpy_bfloat16() if dtype == "bfloat16" else STORAGE[dtype]
    return import_module("cupy").empty(shape, wanted)


def _result_of(
    batch: Batch, name: str, dtype: str, target: View | None = None
) -> tuple[Any, Result]:
    """The array that the result of an operation goes to, and how the backend sees it."""
    settings, place = batch.settings, batch.place
    shape = batch.shape if settings.reduction == "none" else ()
    array = settings.out if target else empty(place, batch.like, shape, dtype)
    view = target or view_of(array, place, "out")
    cells = View(view.owner, view.address, dtype, (*shape, 1), (*view.strides, 0))
    rows = rows_of(cells, -1, shape, 1, "logits", 1.0, on_host=False)
    unit = settings.unit if OPERATIONS[name].logarithmic else 1.0
    return array, Result(rows, unit, settings.reduction)


def evaluate(
    batch: Batch,
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    dtype: str,
    target: View | None = None,
) -> list[Any]:
    """The results of some operations; the one of them goes to `target` where it is given."""
    with on(batch.place):
        found = [_result_of(batch, name, dtype, target) for name, _ in metrics]
        arrays, results = zip(*found, strict=True)
        where, tokens = (None if x is None else x.data for x in (batch.keep, batch.tokens))
        with workspace(batch.place):
            batch.backend.evaluate(metrics, batch.p, batch.q, where, tokens, results)
    return list(arrays)


def differentiate(
    batch: Batch,
    metric: tuple[str, tuple[float, ...]],
    dtype: str,
    scale: Any,
    into: Mapping[str, Rows],
) -> Any:
    """The values of an operation, whose gradients are written into rows of the logits' width.

    `scale`, of the device or of NumPy, is None or broadcasts to one number a row.
    """
    place = batch.place
    with on(place):
        array, result = _result_of(batch, metric[0], dtype)
        with workspace(place):
            if place.kind == "PyTorch" and scale is not None and not isinstance(scale, np.ndarray):
                scale = scale.detach().double()  # bfloat16 is unknown to CuPy
            factors = None if scale is None else one_a_row(scale, batch.shape, np.float64)
            where = None if batch.keep is None else batch.keep.data
            batch.backend.differentiate(
                metric, batch.p, batch.q, where, result,
                None if factors is None else factors.data, into,
            )  # fmt: skip
    return array


def shard(
    batch: Batch, metrics: Sequence[tuple[str, tuple[float, ...]]], tokens: NDArray[np.int64]
) -> Any:
    """What is known of rows that are parts of wider ones, on the host: waits for it."""
    with on(batch.place), workspace(batch.place):
        where = None if batch.keep is None else batch.keep.data
        there = one_a_row(tokens.reshape(batch.shape), batch.shape, np.int64)
        return batch.backend.shard_on_device(metrics, batch.p, batch.q, where, there.data)


def partial_sums(
    batch: Batch,
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    normalizers: NDArray[np.float64],
) -> list[NDArray[np.float64]]:
    """The shares of these rows in sums over whole rows, on the host: waits for them."""
    assert batch.q is not None
    with on(batch.place), workspace(batch.place):
        where = None if batch.keep is None else batch.keep.data
        return batch.backend.partial_sums_on_device(metrics, batch.p, batch.q, where, normalizers)


def log_softmax(batch: Batch, shape: tuple[int, ...], dtype: str, target: View | None) -> Any:
    """The array of log-probabilities, of `shape`."""
    settings, place = batch.settings, batch.place
    with on(place):
        array = settings.out if target else empty(place, batch.like, shape, dtype)
        view = target or view_of(array, place, "out")
        into = rows_of(
            view, batch.axis, batch.shape, batch.p.width, "log_probs", 1.0, on_host=False
        )
        where = None if batch.keep is None else batch.keep.data
        with workspace(place):
            batch.backend.normalize(batch.p, where, into)
        if settings.base is not None:
            array /= settings.unit
    return array

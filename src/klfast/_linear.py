"""Logits as hidden states times an output head: made while they are compared, never stored.

A head is multiplied panel by panel. A product of n states with a panel reads it once, and the BLAS
copies it once into the order that it works in, however small n is: 4 D bytes of each entry's
weights for 2 D n operations. On two cores with AVX-512 a product took as long as n + 42 rows do at
280 GFLOP/s: 256 states run at 0.86 of the speed of many, 64 at 0.60. So a job makes as many rows
at a time as memory allows, and sources with the same head are multiplied together.

Panels are small enough to be converted from 16 bits, and their logits finished, in cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

from ._arrays import FLOATS, dtype_name
from ._dispatch import get_num_threads
from ._sources import LogitSource

#: Logits that a job makes at a time, of all its sources together, and of each in rows. A product
#: of rows that are no multiple of the unit took up to a tenth longer.
BLOCK_BYTES = 320 * 2**20
BLOCK_ROWS = 512
BLOCK_UNIT = 64
# Panels, in the dtype of the product. Smaller ones than the first are slower; of those that are
# converted, the second are still in the cache when they are multiplied.
_PANEL_BYTES = 64 * 2**20
_CONVERTED_BYTES = 8 * 2**20
# Rows. OpenBLAS gives equal rows that are a multiple of these apart the same bits, and not others.
_TILE = 16


class LinearLogits:
    """Rows of logits ``softcap * tanh(x / softcap)`` with ``x = scale * hidden @ weight.T + bias``.

    A source like a file of logits: `klfast.compare`, `klfast.evaluate` and
    `klfast.Evaluation.update` take it wherever they take an array. A few hundred rows at a time
    are multiplied by the BLAS of the arrays' library, in float32 whatever they are stored in
    (float64 if one of them is), compared at once, and forgotten: a state of 4096 entries stands in
    for a row of 128 256. Two sides with the same head are multiplied in one product.

    Parameters
    ----------
    hidden
        States before the output head, ``(..., D)``: an array of NumPy, PyTorch, JAX or CuPy in
        float16, bfloat16, float32 or float64. Memory-mapped ones are read as they are needed.
    weight
        The head, ``(V, D)``, on the same device. In 16 bits it is converted by parts of 8 MiB.
    bias
        ``(V,)``, or None.
    scale
        A number that multiplies ``hidden @ weight.T``, or None (some models divide logits).
    softcap
        A bound c > 0 on the size of logits, or None.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, a dtype is none of these, or softcap is not a positive number.

    Examples
    --------
    >>> base = klfast.LinearLogits(base_states, head)
    >>> test = klfast.LinearLogits(test_states, head)
    >>> klfast.compare(base, test, "kl")["kl"]
    """

    def __init__(
        self,
        hidden: Any,
        weight: Any,
        bias: Any = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        self.name = "LinearLogits"
        dtypes = [dtype_name(x.dtype, name) for name, x in (("hidden", hidden), ("weight", weight))]
        shapes = tuple(hidden.shape), tuple(weight.shape)
        if len(shapes[1]) != 2 or not shapes[0] or shapes[0][-1] != shapes[1][1]:
            raise ValueError(
                f"weight has shape {shapes[1]}, but hidden has {shapes[0]}; accepted: (V, D) "
                "where hidden has (..., D)"
            )
        if shapes[1][0] == 0:
            raise ValueError(f"weight has shape {shapes[1]}; accepted: at least one row")
        if bias is not None:
            dtypes.append(dtype_name(bias.dtype, "bias"))
            if tuple(bias.shape) != shapes[1][:1]:
                raise ValueError(
                    f"bias has shape {tuple(bias.shape)}; accepted: {shapes[1][:1]}, as weight says"
                )
        for name, number in (("scale", scale), ("softcap", softcap)):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} is {number}; accepted: a finite number, or None")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap is {softcap}; accepted: a positive number, or None")
        self.shape = (*(int(n) for n in shapes[0][:-1]), int(shapes[1][0]))
        self.dtype = "float64" if "float64" in dtypes else "float32"
        self.kind = f"{dtypes[0]} states of {shapes[0][-1]} x {dtypes[1]} head"
        self.row_bytes = shapes[0][-1] * FLOATS[dtypes[0]]
        # States are widened, scaled and joined.
        states = 3 * BLOCK_ROWS * shapes[0][-1] * FLOATS[self.dtype]
        self._converts = dtypes[1] != self.dtype
        self.memory = states + (_CONVERTED_BYTES if self._converts else 0)
        self._hidden = _detached(hidden).reshape(-1, shapes[0][-1])
        self._weight = _detached(weight)
        self._bias = None if bias is None else _widened(_detached(bias), self.dtype)
        self._scale, self._softcap = scale, softcap

    def read(self, start: int, stop: int) -> Any:
        """Logits of rows ``start`` to ``stop``, of the kind and on the device of the arrays."""
        return _Product([self]).read(0, start, stop)

    def shares_head(self, other: LinearLogits) -> bool:
        """Whether one product makes the logits of both, but for what `finish` does."""
        mine, others = self._weight, other._weight
        same = mine is others or (
            isinstance(mine, np.ndarray)
            and isinstance(others, np.ndarray)
            and mine.__array_interface__ == others.__array_interface__
        )
        return same and self.dtype == other.dtype

    def states(self, start: int, stop: int) -> Any:
        """The states of these rows, widened and scaled."""
        states = _widened(self._hidden[start:stop], self.dtype)
        return states if self._scale is None else states * self._scale

    def panels(self) -> Iterator[tuple[slice, Any]]:
        """Parts of the vocabulary, and their weights as they are stored."""
        width, states = self._weight.shape
        size = _CONVERTED_BYTES if self._converts else _PANEL_BYTES
        rows = max(1, size // (max(1, states) * FLOATS[self.dtype]))
        for start in range(0, width, rows):
            part = slice(start, min(start + rows, width))
            yield part, self._weight[part]

    @property
    def finishes(self) -> bool:
        """Whether `finish` does anything."""
        return self._bias is not None or self._softcap is not None

    def finish(self, part: slice, logits: Any) -> Any:
        """Add the bias to logits of a part of the vocabulary, in place, and bound them."""
        if self._bias is not None:
            logits += self._bias[part]
        if self._softcap is not None:
            logits /= self._softcap
            if isinstance(logits, np.ndarray):
                np.tanh(logits, out=logits)
            elif hasattr(logits, "tanh_"):
                logits.tanh_()
            else:
                logits = logits.__array_namespace__().tanh(logits)
            logits *= self._softcap
        return logits


def in_step(sources: Sequence[LogitSource]) -> list[LogitSource]:
    """The same sources for a job that reads all of them chunk after chunk, one after the other.

    Those with the same head are multiplied together, and rows are overwritten by the next ones.
    """
    products: list[_Product] = []
    found: list[LogitSource] = []
    for each in sources:
        if not isinstance(each, LinearLogits):
            found.append(each)
            continue
        product = next((one for one in products if one.takes(each)), None)
        if product is None:
            product = _Product([])
            products.append(product)
        found.append(product.member(each))
    return found


class _Product:
    """Sources with the same head, whose rows are made together, in memory that is used again."""

    def __init__(self, members: list[LinearLogits]) -> None:
        self._members = members
        self._range: tuple[int, int] | None = None
        self._made: list[Any] = []  # the rows of this range
        self._logits: Any = None
        self._panel: Any = None

    def takes(self, source: LinearLogits) -> bool:
        return self._members[0].shares_head(source)

    def member(self, source: LinearLogits) -> LogitSource:
        self._members.append(source)
        return _Member(source, self, len(self._members) - 1)

    def read(self, number: int, start: int, stop: int) -> Any:
        """Rows of one member."""
        if self._range != (start, stop):
            self._range, self._made = None, []  # let go of them before there are others
            self._made = self._multiply(start, stop)
            self._range = start, stop
        return self._made[number]

    def _multiply(self, start: int, stop: int) -> list[Any]:
        first, own = self._members[0], [each.states(start, stop) for each in self._members]
        library = _library(own[0])
        if library is None:
            return list(map(_without_out, self._members, own))
        # All begin with a whole tile of the product, so that equal states have equal logits.
        count = stop - start if len(own) == 1 else -(-(stop - start) // _TILE) * _TILE
        states = own[0]
        if len(own) > 1:
            states = _empty(states, (len(own) * count, states.shape[1]), first.dtype)
            states[:] = 0
            for number, each in enumerate(own):
                states[number * count : number * count + stop - start] = each
        if self._logits is None or len(self._logits) < len(states):
            self._logits = _empty(states, (len(states), first.shape[-1]), first.dtype)
        logits = self._logits[: len(states)]
        rows = [logits[i * count : i * count + stop - start] for i in range(len(own))]
        with ThreadPoolExecutor(get_num_threads(), "klfast-linear") as helpers:
            for part, stored in first.panels():
                panel = self._widened(stored, helpers)
                library.matmul(states, panel.T, out=logits[:, part])
                for each, found in zip(self._members, rows, strict=True):
                    if each.finishes:
                        _shared_out(helpers, functools.partial(each.finish, part), found[:, part])
        return rows

    def _widened(self, stored: Any, helpers: Executor) -> Any:
        """A panel in the dtype of the product."""
        dtype = self._members[0].dtype
        if dtype_name(stored.dtype, "weight") == dtype:
            return stored
        if self._panel is None:  # the first is the largest
            self._panel = _empty(stored, stored.shape, dtype)
        panel = self._panel[: len(stored)]
        together = isinstance(stored, np.ndarray) and stored.strides[1] == stored.itemsize == 2
        if together and stored.dtype.isnative and dtype == "float32" and _compiled():
            _compiled().to_float32(stored, panel)
        else:
            _shared_out(helpers, _widen, stored, panel)
        return panel


class _Member:
    """One source of several that are multiplied together."""

    def __init__(self, source: LinearLogits, product: _Product, number: int) -> None:
        self._product, self._number = product, number
        self.name, self.shape, self.dtype = source.name, source.shape, source.dtype

    def read(self, start: int, stop: int) -> Any:
        return self._product.read(self._number, start, stop)


def _without_out(source: LinearLogits, states: Any) -> Any:
    """Logits in a library whose arrays cannot be written to."""
    parts = [
        source.finish(part, states @ _widened(stored, source.dtype).T)
        for part, stored in source.panels()
    ]
    return parts[0] if len(parts) == 1 else states.__array_namespace__().concat(parts, axis=-1)


def _detached(array: Any) -> Any:
    return array.detach() if hasattr(array, "detach") else array


def _widened(array: Any, dtype: str) -> Any:
    """The array in float32 or float64; not a copy if it is so already."""
    if hasattr(array, "detach"):
        return array.double() if dtype == "float64" else array.float()
    return array.astype(dtype, copy=False)


def _widen(array: Any, out: Any) -> None:
    """Write the array where it becomes float32 or float64."""
    out[...] = array


@functools.cache
def _compiled() -> Any:
    """The CPU kernels, or None where they cannot be used."""
    from . import backends

    return import_module("klfast.kernels.cpu") if backends()["cpu"] else None


def _shared_out(helpers: Executor, work: Callable[..., Any], *arrays: Any) -> None:
    """Do the work on parts of the rows, in this thread and in others that find the time.

    Right after a product the threads of the BLAS still look out for the next one, and a thread
    that had to be waited for would come late. Other libraries than NumPy have threads of their own.
    """
    if not isinstance(arrays[0], np.ndarray):
        work(*arrays)
        return
    threads = get_num_threads()
    parts = iter(list(zip(*(np.array_split(each, 2 * threads) for each in arrays), strict=True)))

    def take() -> None:
        for part in parts:
            work(*part)

    others = [helpers.submit(take) for _ in range(threads - 1)]
    take()
    for each in others:
        each.result()


def _library(array: Any) -> Any:
    """The module whose functions write where they are told to; None where there is none."""
    if isinstance(array, np.ndarray):
        return np
    return import_module("torch") if hasattr(array, "new_empty") else None


def _empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    return like.new_empty(shape, dtype=getattr(_library(like), dtype))

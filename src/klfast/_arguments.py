"""The keywords that all functions share: their checks, and results made as they ask for.

Everything is checked before anything is computed. A message names the argument, what was given
and what is accepted.
"""

import difflib
import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from ._arrays import (
    Place,
    Rows,
    View,
    dtype_name,
    encode,
    host_array,
    memory,
    place_of,
    rows_of,
    view_of,
    wrap,
)
from ._device import fetched, on, workspace
from ._device import one_a_row as on_device
from ._dispatch import Backend, select

__all__ = [
    "Batch",
    "CompareOptions",
    "ElementOptions",
    "Options",
    "Settings",
    "check_options",
    "finish",
    "number",
    "one_a_row",
    "out_view",
    "prepare",
    "result_shape",
    "target_of",
    "temperatures",
]

INPUTS = ("logits", "log_probs", "probs")
REDUCTIONS = ("none", "mean", "sum")


class _SharedOptions(TypedDict, total=False):
    axis: int
    input: Literal["logits", "log_probs", "probs"]
    temperature: float | tuple[float, float]
    base: float | None
    where: Any
    vocab_size: int | None
    dtype: Any
    backend: Literal["auto", "reference", "cpu", "cuda"]
    validate: bool


class ElementOptions(_SharedOptions, total=False):
    """Keywords of a function with one value an entry."""

    out: Any


class CompareOptions(_SharedOptions, total=False):
    """Keywords of a function with many results."""

    reduction: Literal["none", "mean", "sum"]


class Options(ElementOptions, CompareOptions, total=False):
    """Keywords of a function with one value a row."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The keywords of one call, with the defaults for those that were not given."""

    axis: int = -1
    input: str = "logits"
    temperature: Any = 1.0
    base: float | None = None
    where: Any = None
    vocab_size: int | None = None
    reduction: str = "none"
    dtype: Any = None
    out: Any = None
    backend: str = "auto"
    validate: bool = False

    @property
    def unit(self) -> float:
        """The unit of results that are logarithms, in nats."""
        return 1.0 if self.base is None else math.log(self.base)


DEFAULTS = {field.name: field.default for field in fields(Settings)}
_DEFAULT = Settings()


@functools.cache
def _accepted(options: type) -> tuple[str, ...]:
    return tuple(name for name in DEFAULTS if name in options.__annotations__)


def check_options(function: str, options: Mapping[str, Any], accepted: type) -> Settings:
    """The settings of a call of `function`, which takes the keywords of `accepted`."""
    if not options:
        return _DEFAULT
    names = _accepted(accepted)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}{hint}; accepted: "
                f"{', '.join(names)}"
            )
    settings = Settings(**options)
    _one_of("input", settings.input, INPUTS)
    _one_of("reduction", settings.reduction, REDUCTIONS)
    if settings.base is not None and not 1 < number("base", settings.base) < math.inf:
        raise ValueError(f"base is {settings.base!r}; accepted: None (nats) or a number above 1")
    return settings


@dataclass(slots=True, eq=False)
class Batch:
    """Checked arguments of a call, as a backend takes them."""

    like: Any  # the first array, whose library and device the result gets
    place: Place
    backend: Backend
    shape: tuple[int, ...]  # of the batch
    axis: int  # negative
    widest: str  # the result dtype, unless another is asked for
    p: Rows
    q: Rows | None
    keep: Any  # booleans, one a row, of NumPy or on the device; None is all
    rows: NDArray[np.int64] | None  # on the host, the row numbers that are kept; None is all
    tokens: Any  # int64 numbers, one a row, of NumPy or on the device
    settings: Settings

    @property
    def idle(self) -> bool:
        """Whether there is no row to read."""
        return self.p.count == 0 or (self.rows is not None and len(self.rows) == 0)

    def integers(self, argument: str, x: Any) -> NDArray[np.int64]:
        """An argument with one whole number a row, on the host."""
        given = one_a_row(argument, x, self.shape, self.place, ("int", "uint"), "integers")
        with on(self.place):
            return fetched(given, self.shape).astype(np.int64).ravel()

    def empty_values(self) -> NDArray[np.float64]:
        """Room for one value a row, which holds NaN where rows are not kept."""
        return np.empty(self.p.count) if self.rows is None else np.full(self.p.count, np.nan)


def prepare(
    arrays: Mapping[str, Any], settings: Settings, tokens: tuple[str, Any] | None = None
) -> Batch:
    """Check the arrays of a call, one or two by name, and the keywords that concern them."""
    places = [place_of(x, name) for name, x in arrays.items()]
    place = places[0]
    if places.count(place) < len(places):
        given = ", ".join(f"{name} is {each}" for name, each in zip(arrays, places, strict=True))
        raise TypeError(f"{given}; accepted: arrays of one library on one device")
    on_host = place.device == "cpu"
    if not on_host:
        select(settings.backend, place.device)  # raises before memory is asked for
    views = [view_of(x, place, name) for name, x in arrays.items()]
    shapes = tuple([view.shape for view in views])
    axis = _index("axis", settings.axis, "a whole number")
    vocab_size = settings.vocab_size
    if vocab_size is not None:
        vocab_size = _index("vocab_size", vocab_size, "None, or a whole number from 1")
    axis, width, shape = _layout(tuple(arrays), shapes, axis, vocab_size)
    divisors = temperatures(settings.temperature, len(views))
    rows = [
        rows_of(view, axis, shape, width, settings.input, temperature, on_host)
        for view, temperature in zip(views, divisors, strict=True)
    ]
    keep = None
    if settings.where is not None:
        keep = one_a_row("where", settings.where, shape, place, ("bool",), "boolean")
    numbers = None
    if tokens is not None:
        numbers = _tokens(*tokens, shape, width, keep, place, settings.validate)
    kept = None
    if not on_host and (keep is not None or numbers is not None):
        with on(place), workspace(place):
            if keep is not None:
                keep = on_device(keep, shape, np.bool_)
            if numbers is not None:
                numbers = on_device(numbers, shape, np.int64)
    elif on_host:
        keep = None if keep is None or keep.all() else keep.ravel()
        kept = None if keep is None else np.flatnonzero(keep)
        numbers = None if numbers is None else numbers.ravel()
    return Batch(
        like=next(iter(arrays.values())),
        place=place,
        backend=select(settings.backend, place.device),
        shape=shape,
        axis=axis,
        widest="float64" if "float64" in [each.dtype for each in rows] else "float32",
        p=rows[0],
        q=rows[1] if len(rows) > 1 else None,
        keep=keep,
        rows=kept,
        tokens=numbers,
        settings=settings,
    )


def target_of(batch: Batch, shape: tuple[int, ...]) -> tuple[str, View | None]:
    """The dtype of a result of this shape, and the memory of `out` if it was given."""
    settings, place = batch.settings, batch.place
    dtype = None if settings.dtype is None else dtype_name(settings.dtype, "dtype")
    out = settings.out
    if out is None:
        dtype = dtype or batch.widest
        if dtype == "float64" and place.kind == "JAX" and not _jax_has_float64():
            raise ValueError(
                "dtype is float64, which JAX has switched off; accepted: another dtype, or set "
                "jax.config.update('jax_enable_x64', True)"
            )
        return dtype, None
    view = out_view(out, place, shape)
    if dtype not in (None, view.dtype):
        raise TypeError(f"out has dtype {view.dtype}; accepted: {dtype}, as given by dtype=")
    return view.dtype, view


def out_view(out: Any, place: Place, shape: tuple[int, ...]) -> View:
    """The memory of `out`, if a result of this shape can be written into it."""
    given = place_of(out, "out")
    if given != place or place.kind not in ("NumPy", "PyTorch", "CuPy"):
        raise TypeError(
            f"out is {given}, and the inputs are {place}; accepted: None, "
            "or, for NumPy, PyTorch and CuPy, an array of the same library on the same device"
        )
    view = view_of(out, place, "out")
    if view.shape != shape:
        raise ValueError(f"out has shape {view.shape}; accepted: {shape}")
    if place.kind == "NumPy" and not out.flags.writeable:
        raise ValueError("out is read-only; accepted: an array that can be written to")
    if place.kind == "PyTorch" and out.requires_grad:
        raise ValueError("out requires a gradient; accepted: a tensor that does not (out.detach())")
    if any(n > 1 and step == 0 for n, step in zip(view.shape, view.strides, strict=True)):
        raise ValueError("out repeats the same memory along an axis; accepted: one that does not")
    return view


def finish(
    batch: Batch,
    values: NDArray[np.float64],
    logarithmic: bool,
    dtype: str,
    target: View | None = None,
) -> Any:
    """One value a row, in nats, as the result that the settings ask for."""
    settings = batch.settings
    if settings.base is not None or settings.reduction != "none":
        with np.errstate(all="ignore"):  # infinities and NaN are results like others
            if logarithmic:
                values = values / settings.unit
            if settings.reduction != "none":
                kept = values if batch.rows is None else values[batch.rows]
                values = np.add.reduce(kept)
                if settings.reduction == "mean":
                    values = values / len(kept)
    stored = encode(np.asarray(values).reshape(result_shape(batch)), dtype)
    if target is None:
        return wrap(stored, dtype, batch.place, batch.like)
    memory(target, writable=True)[...] = stored
    return settings.out


def result_shape(batch: Batch) -> tuple[int, ...]:
    """The shape of a result with one value a row, after the reduction."""
    return batch.shape if batch.settings.reduction == "none" else ()


def _one_of(argument: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{argument} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def number(argument: str, value: Any) -> float:
    """A keyword's value as a number; TypeError names the keyword."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{argument} is {value!r}, of type {type(value).__name__}; accepted: a number"
        ) from None


def _index(argument: str, value: Any, accepted: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{argument} is {value!r}, of type {type(value).__name__}; accepted: {accepted}"
        )
    return operator.index(value)


@functools.lru_cache(1024)
def _layout(
    names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], axis: int, vocab_size: int | None
) -> tuple[int, int, tuple[int, ...]]:
    """The vocabulary axis, the entries of a row that are read, and the shape of the batch."""
    counted = _axis(names, shapes, axis)
    width = _width(names, [shape[counted] for shape in shapes], vocab_size)
    batches = [_without(shape, counted) for shape in shapes]
    try:
        return counted, width, np.broadcast_shapes(*batches)
    except ValueError:
        raise ValueError(
            f"{' and '.join(names)} have shapes {' and '.join(map(str, shapes))}; accepted: batch "
            f"axes (all but axis {axis}) that broadcast, and these are "
            f"{' and '.join(map(str, batches))}"
        ) from None


def _axis(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], axis: int) -> int:
    """The vocabulary axis, counted from the end, which arrays of different ranks have in common."""
    for name, shape in zip(names, shapes, strict=True):
        if not shape:
            raise ValueError(f"{name} is a single number, of shape (); accepted: shape (..., V)")
    most = max(map(len, shapes))
    counted = axis - most if axis >= 0 else axis
    for name, shape in zip(names, shapes, strict=True):
        if not -len(shape) <= counted < 0:
            raise ValueError(
                f"axis is {axis}, and {name} has shape {shape}; accepted: -{len(shape)} "
                f"to {most - 1}, where 0 and above count in the result of broadcasting"
            )
    return counted


def _width(arrays: tuple[str, ...], widths: list[int], vocab_size: int | None) -> int:
    names, given = " and ".join(arrays), " and ".join(map(str, widths))
    smallest = min(widths)
    if smallest == 0:
        raise ValueError(f"{names}: vocabulary of {given} entries; accepted: at least 1")
    if vocab_size is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"{names} have vocabularies of {given} entries; accepted: the same number, or "
                f"vocab_size={smallest} to read only the first {smallest} of each"
            )
        return smallest
    if not 1 <= vocab_size <= smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, and {names} hold {given} entries; accepted: None, or a "
            f"whole number from 1 to {smallest}"
        )
    return vocab_size


def temperatures(temperature: Any, count: int) -> tuple[float, ...]:
    """One of each of `count` batches, of a number or a pair."""
    pair = isinstance(temperature, (tuple, list))
    given = tuple(temperature) if pair else (temperature,) * count
    values = tuple([number("temperature", each) for each in given])
    if len(given) != count or (pair and count == 1) or not all(0 < v < math.inf for v in values):
        accepted = "a number above 0" + ", or a pair of them" * (count == 2)
        raise ValueError(f"temperature is {temperature!r}; accepted: {accepted}")
    return values


def one_a_row(
    argument: str, x: Any, shape: tuple[int, ...], place: Place, kinds: tuple[str, ...], named: str
) -> Any:
    """An argument with one entry a row: broadcast to the batch, or on a device as it is.

    The name of its dtype, of NumPy, CuPy or PyTorch, begins with one of `kinds`.
    """
    array = host_array(x, argument, place)
    kind = getattr(array.dtype, "name", None) or str(array.dtype).removeprefix("torch.")
    if not kind.startswith(kinds):
        raise TypeError(f"{argument} has dtype {array.dtype}; accepted: {named}")
    on_host = isinstance(array, np.ndarray)
    try:
        broadcast = np.broadcast_to(array if on_host else np.empty(array.shape, bool), shape)
    except ValueError:
        raise ValueError(
            f"{argument} has shape {tuple(array.shape)}; accepted: {shape}, one entry a row, or "
            "what broadcasts to it"
        ) from None
    return broadcast if on_host else array


def _tokens(
    argument: str,
    tokens: Any,
    shape: tuple[int, ...],
    width: int,
    keep: Any,
    place: Place,
    validate: bool,
) -> Any:
    given = one_a_row(argument, tokens, shape, place, ("int", "uint"), "integers")
    on_host = isinstance(given, np.ndarray)
    if validate or (on_host and (keep is None or isinstance(keep, np.ndarray))):
        with on(place):
            known = fetched(given, shape), None if keep is None else fetched(keep, shape)
        _check_tokens(argument, *known, width)
    return given.astype(np.int64) if on_host else given


def _check_tokens(
    argument: str, tokens: NDArray[Any], keep: NDArray[np.bool_] | None, width: int
) -> None:
    # Rows that are not kept may hold anything, such as the -100 of many data sets.
    bad = (tokens < 0) | (tokens >= width)
    if keep is not None:
        bad &= keep
    if bad.any():
        first = tuple(int(each) for each in np.argwhere(bad)[0])
        where = f"[{', '.join(map(str, first))}]" if first else ""
        raise IndexError(
            f"{argument}{where} is {tokens[first]}; accepted: 0 to {width - 1}, the vocabulary"
        )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    position = len(shape) + axis
    return shape[:position] + shape[position + 1 :]


def _jax_has_float64() -> bool:
    import jax  # the inputs are arrays of it

    return bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)

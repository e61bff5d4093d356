"""Values and their gradients with respect to the logits, in one fused call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from . import _device
from ._api import documented
from ._arguments import (
    Batch,
    check_options,
    finish,
    one_a_row,
    out_view,
    prepare,
    target_of,
)
from ._arrays import Rows, View, empty, memory, overlap, rows_of, view_of, wrap
from ._operations import DIFFERENTIABLE, Operation

__all__ = ["GradientOptions", "ValueAndGradient", "differentiable", "value_and_grad"]


#: How the names of dtypes begin that real numbers have.
REAL = ("float", "bfloat", "int", "uint")


class GradientOptions(TypedDict, total=False):
    """Keywords of a function with values and gradients."""

    axis: int
    temperature: float | tuple[float, float]
    base: float | None
    where: Any
    vocab_size: int | None
    dtype: Any
    backend: Literal["auto", "reference", "cpu", "cuda"]


class ValueAndGradient(NamedTuple):
    """One value a row, and its gradient: of the logits' shape, or a pair of them."""

    value: Any
    gradient: Any


def differentiable(name: str) -> tuple[Operation, tuple[float, ...]]:
    """The operation and parameters of "kl", "renyi:2", "js" ...; ValueError for any other."""
    family, *given = str(name).split(":")
    operation = DIFFERENTIABLE.get(family)
    if operation is None:
        raise ValueError(f"{name!r} has no gradient here; accepted: {', '.join(DIFFERENTIABLE)}")
    values = []
    for position, parameter in enumerate(operation.parameters):
        value = given[position] if position < len(given) else parameter.default
        if value is None:
            raise ValueError(f"{name!r} lacks {parameter.name}; accepted: '{family}:NUMBER'")
        values.append(parameter.check(value))
    if len(given) > len(values):
        raise ValueError(f"{name!r}: {family!r} takes {len(values) or 'no'} parameter")
    return operation, tuple(values)


@documented(
    GradientOptions,
    returns="value, one a row as the function of the same name gives it, and gradient: an array "
    "of the\nshape, dtype and library of the logits (a pair of them for wrt='both'). It is exactly "
    "0 outside\nthe support, in rows that `where` drops and beyond vocab_size; NaN in rows that "
    "hold NaN or +inf\nor only -inf; and 0 with respect to P where the value is infinite, which "
    "has no derivative.",
)
def value_and_grad(
    name: str,
    p: Any,
    q: Any = None,
    *,
    wrt: Literal["p", "q", "both"] | None = None,
    grad_scale: Any = None,
    out: Any = None,
    **options: Unpack[GradientOptions],
) -> ValueAndGradient:
    """Value of each row, and its gradient with respect to the raw logits.

    `name` is "kl", "reverse_kl", "jeffreys", "js" or "js:WEIGHT", "renyi:ORDER", "alpha:ORDER",
    "tsallis:ORDER", "tv", "hellinger2", "chi2", "cross_entropy" or, of one batch, "entropy".
    `wrt` says whose logits: "q" (the default of two batches), "p" or "both". `grad_scale`, a number
    or one a row, multiplies the gradient and not the value, so that means, masks and the gradient
    of what follows cost nothing; a scale of 0 gives exactly 0. `out` is memory for the gradient (a
    pair for "both"), which may be the very logits it belongs to: no second array of their size is
    needed then. The temperature is that of the loss: gradients are those of the raw logits.
    """
    operation, parameters = differentiable(name)
    if (q is None) != (operation.arity == 1):
        given = "None" if q is None else "an array"
        raise TypeError(f"q is {given}, and {name!r} reads {operation.arity} batches of logits")
    wrt = wrt or ("p" if q is None else "q")
    accepted = ("p",) if q is None else ("q", "p", "both")
    if wrt not in accepted:
        raise ValueError(f"wrt is {wrt!r}; accepted: {', '.join(map(repr, accepted))}")
    arrays = {"p": p} if q is None else {"p": p, "q": q}
    batch = prepare(arrays, check_options("value_and_grad", options, GradientOptions))
    dtype, _ = target_of(batch, batch.shape)
    sides = ("p", "q") if wrt == "both" else (wrt,)
    outs = _outs(out, len(sides))
    targets = [_target(side, arrays, given, batch) for side, given in zip(sides, outs, strict=True)]
    if len(targets) == 2 and overlap(targets[0].view, targets[1].view):
        raise ValueError("out: both gradients share memory; accepted: memory of its own for each")
    if batch.place.device != "cpu":
        value = _device.differentiate(
            batch, (operation.name, parameters), dtype, _given_scale(grad_scale, batch),
            {target.side: target.rows for target in targets},
        )  # fmt: skip
        return ValueAndGradient(value, _alone(tuple(target.out for target in targets)))
    scale = _scale(grad_scale, batch)
    if operation.logarithmic:
        scale = scale / batch.settings.unit
    values = batch.empty_values()
    if not batch.idle:
        into = {target.side: target.rows for target in targets}
        batch.backend.gradient(
            operation.name, batch.p, batch.q, parameters, batch.rows, values, scale,
            into.get("p"), into.get("q"),
        )  # fmt: skip
    gradients = tuple(target.result(batch) for target in targets)
    value = finish(batch, values, operation.logarithmic, dtype)
    return ValueAndGradient(value, _alone(gradients))


def _alone(gradients: tuple[Any, ...]) -> Any:
    return gradients[0] if len(gradients) == 1 else gradients


def _outs(out: Any, count: int) -> tuple[Any, ...]:
    """Memory for each gradient, or None."""
    if count == 1 or out is None:
        return (out,) * count
    if not isinstance(out, tuple | list) or len(out) != count:
        raise TypeError(
            f"out is of type {type(out).__name__}; accepted with wrt='both': None, or a pair, of "
            "which each may be None"
        )
    return tuple(out)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the gradient of one side goes."""

    side: str
    like: Any
    view: View
    stored: NDArray[Any] | None  # new memory; None where the user gave it
    out: Any
    rows: Rows

    def result(self, batch: Batch) -> Any:
        """The gradient as the user gets it, with zeros where nothing was computed."""
        width = self.view.shape[batch.axis]
        table = np.moveaxis(memory(self.view, writable=True), batch.axis, -1)
        if width > batch.p.width:
            table[..., batch.p.width :] = 0
        if batch.keep is not None:
            table[~batch.keep.reshape(batch.shape)] = 0
        if self.stored is None:
            return self.out
        return wrap(self.stored, self.view.dtype, batch.place, self.like)


def _target(side: str, arrays: Mapping[str, Any], out: Any, batch: Batch) -> _Target:
    array = arrays[side]
    source = view_of(array, batch.place, side)
    axis = batch.axis
    batch_shape = source.shape[:axis] + source.shape[axis:][1:]
    if batch_shape != batch.shape:
        raise ValueError(
            f"{side} has shape {source.shape}, whose rows are repeated to {batch.shape}; accepted: "
            "with respect to a batch of the full shape only (np.broadcast_to(...).copy())"
        )
    on_host, stored = batch.place.device == "cpu", None
    if out is not None:
        view = _checked_out(side, arrays, out, source, batch)
    elif on_host:
        stored, view = empty(source.shape, source.dtype)
    else:
        with _device.on(batch.place):
            out = _device.empty(batch.place, array, source.shape, source.dtype)
        view = view_of(out, batch.place, "out")
    # The host fills in what is beyond the width; a device writes all of it.
    width = batch.p.width if on_host else source.shape[axis]
    rows = rows_of(view, axis, batch.shape, width, "logits", 1.0, on_host)
    return _Target(side, array, view, stored, out, rows)


def _checked_out(
    side: str, arrays: Mapping[str, Any], out: Any, source: View, batch: Batch
) -> View:
    view = out_view(out, batch.place, source.shape)
    for name, array in arrays.items():
        given = view_of(array, batch.place, name)
        itself = (view.address, view.strides, view.dtype) == (
            given.address, given.strides, given.dtype,
        )  # fmt: skip
        if overlap(view, given) and not (itself and name == side):
            raise ValueError(
                f"out overlaps {name} without being it; accepted: memory of its own, or {side} "
                "itself"
            )
    return view


def _scale(grad_scale: Any, batch: Batch) -> NDArray[np.float64]:
    """One factor a row: of the gradient, and of its unit."""
    given = _given_scale(grad_scale, batch)
    if given is None:
        return np.ones(batch.p.count)
    return np.broadcast_to(given, batch.shape).astype(np.float64).reshape(-1)


def _given_scale(grad_scale: Any, batch: Batch) -> Any:
    """What broadcasts to one real number a row, or None."""
    if grad_scale is None:
        return None
    # host_array takes all other numbers.
    given = np.array(grad_scale) if isinstance(grad_scale, float) else grad_scale
    return one_a_row("grad_scale", given, batch.shape, batch.place, REAL, "real numbers")

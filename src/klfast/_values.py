"""Arrays of any library as float64 NumPy values, and results as arrays of the same library.

For the functions whose arguments are not rows of logits: parameters, samples, scores, measures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import (
    FLOATS,
    Place,
    Rows,
    View,
    decode,
    encode,
    memory,
    place_of,
    rows_of,
    view_of,
    wrap,
)
from ._dispatch import select

__all__ = ["Given", "check_axis", "check_batches", "given", "plain_rows"]

Values = NDArray[np.float64]

NUMBERS = (bool, int, float, list, tuple, np.generic)
HERE = Place("NumPy", "cpu")


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of one call: of one library, on the host."""

    views: dict[str, View]
    place: Place
    like: Any  # the first array, whose library and device results get
    dtype: str  # of results: float64 if an argument is, else float32; numbers follow the arrays

    def values(self) -> list[Values]:
        """Return the arguments in their order, converted exactly to float64."""
        return [decode(memory(view), view.dtype) for view in self.views.values()]

    def arrays(self) -> list[NDArray[Any]]:
        """Return the arguments as NumPy arrays in place; bfloat16 as float32 of the same values."""
        return [
            decode(memory(view), view.dtype).astype(np.float32)
            if view.dtype == "bfloat16"
            else memory(view)
            for view in self.views.values()
        ]

    def result(self, values: NDArray[Any], dtype: str | None = None) -> Any:
        """Return float64 values, rounded once, as the same kind of array as the arguments.

        Values that a kernel has rounded to float32 are taken as they are.
        """
        dtype = dtype or self.dtype
        rounded = dtype == "float32" and values.dtype == np.float32
        stored = values if rounded else encode(np.asarray(values, np.float64), dtype)
        return wrap(stored, dtype, self.place, self.like)


def given(arguments: Mapping[str, Any]) -> Given:
    """Check arguments by name; numbers and lists go with arrays of any library, in float64.

    TypeError for what is no array of floating-point numbers, or of two libraries or devices.
    """
    plain = {
        name: np.asarray(x, np.float64) for name, x in arguments.items() if isinstance(x, NUMBERS)
    }
    arrays = {name: x for name, x in arguments.items() if name not in plain} or plain
    places = {name: place_of(x, name) for name, x in arrays.items()}
    place = next(iter(places.values()))
    if any(each != place for each in places.values()):
        text = ", ".join(f"{name} is {each}" for name, each in places.items())
        raise TypeError(f"{text}; accepted: arrays of one library on one device")
    if place.device != "cpu":
        select("auto", place.device)  # raises: nothing reads that memory
    views = {
        name: view_of(plain[name], HERE, name)
        if name in plain
        else view_of(arrays[name], place, name)
        for name in arguments
    }
    wide = any(views[name].dtype == "float64" for name in arrays)
    return Given(views, place, next(iter(arrays.values())), "float64" if wide else "float32")


def check_axis(name: str, shape: tuple[int, ...], least: int = 1) -> None:
    """Raise ValueError where an array lacks its last axes, or one of them is empty."""
    if len(shape) < least or 0 in shape[len(shape) - least :]:
        axes = ", ".join(["...", *["n"] * least])
        raise ValueError(f"{name} has shape {shape}; accepted: shape ({axes}) with n from 1")


def check_batches(**shapes: tuple[int, ...]) -> None:
    """Raise ValueError where the batch axes of arguments, by name, do not broadcast."""
    try:
        np.broadcast_shapes(*shapes.values())
    except ValueError:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"batch axes are {text}; accepted: what broadcasts") from None


def plain_rows(view: View, shape: tuple[int, ...], width: int) -> Rows | None:
    """The rows of the last axis, broadcast to a batch, as kernels without offsets read them.

    None where they do not lie like that.
    """
    if not view.shape or view.shape[-1] != width or width == 0:
        return None
    rows = rows_of(view, -1, shape, width, "logits", 1.0)
    straight = rows.stride == FLOATS[view.dtype] or width == 1
    return rows if straight and rows.offsets is None else None

"""What the tests of kernels that read pairs of rows share."""

from __future__ import annotations

from typing import Any

import numpy as np
from distributions import Cases
from measures import assert_right
from numpy.typing import NDArray

from klfast._operations import OPERATIONS

#: The headers of these kernels, and of those that keep their rows.
HEADERS = ("device.cuh", "rows.cuh", "team.cuh", "mathematics.cuh", "pairs.cuh")
KEEPING = (*HEADERS, "terms.cuh", "resident.cuh", "measures.cuh")
Values = NDArray[np.float64]


def placed(x: Any, skew: int = 0) -> Any:
    """A copy whose rows begin so many entries after a multiple of 64 bytes, the first one, and the
    others wherever their length leads; bfloat16 as its bits."""
    x = x.view(np.uint16) if x.dtype == "bfloat16" else x
    count, width = x.shape
    room = np.zeros((count * width + skew + 64) * x.itemsize, np.uint8)
    start = -room.ctypes.data % 64 + skew * x.itemsize
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def unfinished(values: Values) -> NDArray[np.bool_]:
    """Which rows a kernel has left to the float64 kernel."""
    return np.equal(values.view(np.uint64), 0x7FF8000000C0FFEE)


def assert_right_or_unfinished(
    measure: str, parameters: tuple[float, ...], found: Cases, values: Values
) -> None:
    operation = OPERATIONS[measure]
    truth = operation.reference(found.p, found.q, *parameters)
    left = unfinished(values)
    assert_right(operation, found, np.where(left, truth, values), truth)
    assert not np.any(values < 0)
    # What is no distribution, and what is infinite, is for that kernel.
    assert np.all(left[~np.isfinite(truth)])


#: What float32 is enough for: as in practice, at the least.
USUAL = ("identical", "near by", "near, q moved by 100", "base and", "the same mask in both, near")
UNUSUAL = ("scale 60", "1e-07, scale 1")


def should_finish(found: Cases) -> list[int]:
    """Rows that are not to be left, of those that are long enough to have sums."""
    if found.p.shape[-1] < 64:
        return []
    return [
        number
        for number, name in enumerate(found.names)
        if name.startswith(USUAL) and not name.endswith(UNUSUAL)
    ]

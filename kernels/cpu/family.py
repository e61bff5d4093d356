"""Calls of the kernels outside the operation table: Gaussians, counts, samples, many against many.

What comes in are rows of one dtype that lie in memory as the kernels read them; what goes out are
float64 values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import Rows, Values, _address, _cut, _launch
from .native import kernel

__all__ = ["gaussian_kl"]

_kernel = functools.cache(kernel)


def gaussian_kl(
    rows: Sequence[Rows], scales: Values | None, into: Sequence[NDArray[Any]]
) -> Values:
    """KL divergence of each row; of mean and log-variance of P, and of Q unless that is standard.

    ``into`` are contiguous arrays of the dtype of the rows for the gradients with respect to
    each, times ``scales``, one a row; empty for values alone.
    """
    first = rows[0]
    n, width = first.count, first.width
    chunk, parts, part_width = _cut(n, width)
    out = np.empty((n, parts))
    counter = np.zeros(1, np.int64)
    function = _kernel(
        "gaussian", (first.dtype, len(rows) == 2, bool(into)), "q" * 20
    )
    places = [(each.address, each.row_stride) for each in rows] + [(0, 0)] * (4 - len(rows))
    targets = [_address(each) for each in into] + [0] * (4 - len(into))
    _launch(
        function,
        (
            *(number for place in places for number in place),
            width, n, _address(counter), chunk, parts, part_width, _address(out), _address(scales),
            *targets,
        ),
        n * width * len(rows),
        alone=False,
    )  # fmt: skip
    return out.sum(1)

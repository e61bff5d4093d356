"""Pairs of rows of logits that bring out errors: the inputs that several tests share.

Everything is deterministic. Rows are made in float64 and then rounded to the dtype asked for, so
that a test must take the rounded rows, exactly converted, as the truth.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

INF = math.inf
DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
#: Entries that the CPU kernels sum in one go: the first and the last of them are masked.
TILE = 2048
EXAMPLES = Path(__file__).parent.parent / "examples" / "data"

Row = NDArray[np.float64]


class Cases(NamedTuple):
    """Two batches, and what each of their rows shows."""

    names: tuple[str, ...]
    p: Any  # (rows, V)
    q: Any


def rounded(x: Row, dtype: str) -> Any:
    """The entries in ``dtype``; what is finite stays finite."""
    kind = DTYPES[dtype]
    with np.errstate(over="ignore"):
        result = x.astype(kind)
    largest = ml_dtypes.finfo(kind).max
    beyond = np.isfinite(x) & ~np.isfinite(result)
    return np.where(beyond, np.where(x > 0, largest, -largest), result).astype(kind)


def _rows(width: int, dtype_p: str, dtype_q: str) -> dict[str, tuple[Row, Row]]:
    rng = np.random.default_rng(width)
    x, y, noise = rng.normal(size=(3, width))
    at = np.arange(width)
    middle = at == width // 2
    pairs: dict[str, tuple[Row, Row]] = {"identical": (x, x)}

    for scale in (1.0, 5.0, 50.0, 70.0, 90.0):
        pairs[f"independent, scale {scale:g}"] = x * scale, y * scale
    for scale in (0.01, 1.0, 60.0):
        base = rounded(x * scale, dtype_p).astype(np.float64)
        for step in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            pairs[f"near by {step}, scale {scale:g}"] = base, base + noise * step
        up = np.nextafter(rounded(base, dtype_q), DTYPES[dtype_q](INF)).astype(np.float64)
        pairs[f"one ulp at one entry, scale {scale:g}"] = base, np.where(middle, up, base)
        pairs[f"one ulp at the top, scale {scale:g}"] = (
            base,
            np.where(at == base.argmax(), up, base),
        )
    for constant in (100.0, -3e4):
        pairs[f"near, q moved by {constant:g}"] = x, x + noise * 1e-3 + constant
    pairs["both moved by 1e4"] = x + 1e4, y + 1e4
    pairs["equal but for a constant"] = np.round(x), np.round(x) + 64
    pairs["ties"] = np.round(x), np.round(y)
    pairs["all ties"] = np.zeros(width), np.full(width, 3.0)

    pairs["one-hot, the same"] = middle * 200.0, middle * 210.0
    pairs["one-hot, another"] = middle * 200.0, np.roll(middle, 1) * 200.0
    pairs["one-hot and its complement"] = middle * 50.0, ~middle * 50.0
    gap = math.log(1e9 * width)
    for place, index in {"start": 0, "middle": width // 2, "end": width - 1}.items():
        top = (at == index) * (gap - x)  # p = 1 - 1e-9
        pairs[f"nearly all at the {place} of both"] = x + top, x + top + noise * 1e-3
        pairs[f"nearly all at the {place} of p"] = x + top, y
        pairs[f"nearly all at the {place} of q"] = y, x + top

    mask = np.where(y > 0, -INF, 0.0)
    mask[x.argmax()] = 0.0
    other = np.where(noise > 0, -INF, 0.0)
    other[x.argmax()] = 0.0
    first, last = np.where(at < TILE, -INF, 0.0), np.where(at >= width - TILE, -INF, 0.0)
    first[-1] = last[0] = 0.0
    pairs["the same mask in both, near"] = x + mask, x + noise * 1e-4 + mask
    pairs["the same mask in both, independent"] = x + mask, y * 3 + mask
    pairs["mask in p"] = x + mask, y
    pairs["mask in q"] = x, y + mask
    pairs["masks in both"] = x + mask, y + other
    pairs["first tile masked in both"] = x + first, x + noise * 0.01 + first
    pairs["first tile masked in p"] = x + first, y
    pairs["first tile masked in q"] = x, y + first
    pairs["last tile masked in both"] = x + last, x + noise * 0.01 + last
    pairs["last tile masked in p"] = x + last, y
    pairs["disjoint supports"] = np.where(at % 2, -INF, x), np.where(at % 2, y, -INF)
    pairs["only one entry left"] = np.where(middle, 3.0, -INF), np.where(middle, 7.0, -INF)
    pairs["all of p masked"] = np.full(width, -INF), y
    pairs["all of q masked"] = x, np.full(width, -INF)

    climb = np.linspace(-1.0, 1.0, width)
    pairs["climbing"] = x + 40 * climb, x + 40 * climb + 0.01 * noise
    pairs["falling"] = x - 40 * climb, x - 40 * climb + 0.01 * noise
    pairs["climbing and falling"] = x + 20 * climb, y - 20 * climb
    pairs["log-ratio drifts by 1e-3"] = x, x + 1e-3 * climb
    pairs["log-ratio drifts by 6"] = x, x + 6 * climb
    pairs["log-ratio jumps in the last quarter"] = x, x + 8.0 * (at > width * 3 // 4)
    pairs["far apart where p is small"] = x - 60 * (at % 3 == 1), x - 60 * (at % 3 == 2)
    pairs["rare entries vanish from q"] = x - 10 * (at % 7 == 1), x - 150 * (at % 7 == 1)
    pairs["rare entries vanish from p"] = x - 150 * (at % 7 == 1), x - 10 * (at % 7 == 1)
    pairs["exponents beyond float32"] = 300 * x, 300 * x + noise
    largest = float(min(ml_dtypes.finfo(DTYPES[name]).max for name in (dtype_p, dtype_q)))
    pairs["the largest numbers"] = np.where(at % 2, largest, -largest), np.full(width, largest)
    pairs["far below a largest number"] = np.where(middle, largest, x), np.where(middle, largest, y)
    pairs["the smallest number"] = np.full(width, -largest), y
    pairs["subnormal numbers"] = x * 1e-7, y * 1e-7
    return pairs


@cache
def cases(
    width: int, dtype_p: str = "float32", dtype_q: str | None = None, one_in: int = 1
) -> Cases:
    """Every kind of pair of rows of this width, or one in so many: which ones the width decides."""
    dtype_q = dtype_q or dtype_p
    pairs = _rows(width, dtype_p, dtype_q)
    names = tuple(pairs)[width % one_in :: one_in]
    p = np.stack([rounded(pairs[name][0], dtype_p) for name in names])
    q = np.stack([rounded(pairs[name][1], dtype_q) for name in names])
    for batch in (p, q):
        batch.flags.writeable = False
    return Cases(names, p, q)


def real_logits(test: str) -> Cases:
    """Next-token logits of a small language model, and of the same after quantization."""
    p, q = np.load(EXAMPLES / "base.npy"), np.load(EXAMPLES / f"{test}.npy")
    return Cases(tuple(f"base and {test}, row {row}" for row in range(len(p))), p, q)

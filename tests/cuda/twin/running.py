"""One kernel on NumPy arrays, for whoever writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .compiler import SEED, compile_text

KERNELS = Path(__file__).parents[3] / "kernels" / "cuda"
BASE = ("device.cuh", "rows.cuh", "team.cuh")
SOURCES = (*BASE, "mathematics.cuh", "finish.cuh")
#: Of this kernel alone.
MORE_SOURCES = {"exact": ("exact.cuh",)}

ROWS = np.dtype(
    [
        ("data", "u8"),
        ("offsets", "u8"),
        ("row_stride", "i8"),
        ("stride", "i8"),
        ("inverse_temperature", "f8"),
        ("dtype", "i4"),
        ("probabilities", "i4"),
    ],
    align=True,
)
CALL = np.dtype(
    [
        ("p", ROWS),
        ("q", ROWS),
        ("width", "i8"),
        ("count", "i8"),
        ("where", "u8"),
        ("tokens", "u8"),
        ("values", "u8"),
        ("columns", "i8"),
        ("parameters", "f8", (16,)),
        ("out", "u8"),
        ("out_offsets", "u8"),
        ("out_stride", "i8"),
        ("out_dtype", "i4"),
        ("phase", "i4"),
        ("resident", "i8"),
        ("parts", "i8"),
        ("part_width", "i8"),
        ("states", "u8"),
        ("arrived", "u8"),
        ("into_p", ROWS),
        ("into_q", ROWS),
        ("scales", "u8"),
    ],
    align=True,
)
CODES = {"float16": 0, "bfloat16": 1, "uint16": 1, "float32": 2, "float64": 3}


def kernel_text(sources: Sequence[str], defines: Mapping[str, object]) -> str:
    """Files of kernels/cuda, or texts of their own, behind the definitions."""
    parts = [f"#define {name} {value}\n" for name, value in defines.items()]
    for number, source in enumerate(sources):
        if "\n" in source:
            parts.append(f'#line 1 "text {number}"\n{source}\n')
        elif (KERNELS / source).exists() or source.endswith(".cu"):
            parts.append(f'#line 1 "{source}"\n{(KERNELS / source).read_text()}\n')
    return re.sub(r"^#(pragma once|include).*$", "", "".join(parts), flags=re.MULTILINE)


def describe(x: NDArray[Any], temperature: float = 1.0, probabilities: bool = False) -> Any:
    """The struct Rows of a matrix; uint16 are the bits of bfloat16."""
    row = np.zeros((), ROWS)
    row["data"] = x.__array_interface__["data"][0]
    row["row_stride"], row["stride"] = x.strides
    row["inverse_temperature"] = 1 / temperature
    row["dtype"] = CODES[x.dtype.name]
    row["probabilities"] = probabilities
    return row


def run_kernel(
    kernel: str,
    p: NDArray[Any] | None = None,
    q: NDArray[Any] | None = None,
    defines: Mapping[str, object] | None = None,
    *,
    columns: int = 1,
    values: NDArray[np.float64] | None = None,
    grid: int | None = None,
    shared: int = 0,
    parameters: Sequence[float] = (),
    temperatures: tuple[float, float] = (1.0, 1.0),
    probabilities: tuple[bool, bool] = (False, False),
    state: int = 0,
    seed: int = SEED,
    sources: Sequence[str] = SOURCES,
    **fields: Any,
) -> NDArray[np.float64]:
    """Run ``kernels/cuda/<kernel>.cu``, or a text that holds one; return its (rows, columns).

    `values` is the matrix that the kernel reads or writes, if not a new one full of NaN; `shared`
    are bytes of dynamic shared memory beyond the team's scratch; `state` float64 numbers of state
    a part; `seed` another order of blocks and threads; `sources` go before the kernel. Other
    `fields` are those of Call, arrays for pointers. DTYPE_*, THREADS, TEAM, CLUSTER and BLOCKS have
    defaults; None takes one out.
    """
    definitions: dict[str, object] = {"THREADS": 256, "CLUSTER": 1, "BLOCKS": 1}
    for name, x in (("DTYPE_P", p), ("DTYPE_Q", q)):
        if x is not None:
            definitions[name] = CODES[x.dtype.name]
    definitions.update(defines or {})
    definitions.setdefault("TEAM", definitions["THREADS"])
    definitions = {name: value for name, value in definitions.items() if value is not None}
    threads, team, cluster = (int(str(definitions[n])) for n in ("THREADS", "TEAM", "CLUSTER"))

    call = np.zeros((), CALL)
    for name, x, temperature, as_probabilities in zip(
        "pq", (p, q), temperatures, probabilities, strict=True
    ):
        if x is not None:
            call[name] = describe(x, temperature, as_probabilities)
            call["count"], call["width"] = x.shape
    for name in ("count", "width", "parts"):
        call[name] = fields.pop(name, call[name])
    call["parts"] = max(call["parts"], 1)
    count, parts = int(call["count"]), int(call["parts"])
    call["part_width"] = 64 * math.ceil(int(call["width"]) / parts / 64)
    if values is None:
        values = np.full((count, columns), np.nan)
    call["columns"] = values.shape[1]
    call["parameters"][: len(parameters)] = parameters
    arrays = {
        "values": values,
        "states": np.full((count * parts, max(state, 1)), np.nan),
        "arrived": np.zeros(count, np.uint32),
    }
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        else:
            call[name] = value
    for name, array in arrays.items():
        call[name] = array.__array_interface__["data"][0]

    files = [*sources, *MORE_SOURCES.get(kernel, ()), kernel if "\n" in kernel else f"{kernel}.cu"]
    program = compile_text(kernel_text(files, definitions))
    scratch = 0 if team == 32 else 64 * threads // 32
    items = math.ceil(count * parts / (threads // team))
    blocks = cluster * items if grid is None else grid
    program.launch(blocks, threads, scratch + shared, call.__array_interface__["data"][0], seed)
    return values


def at_offsets(monkeypatch: pytest.MonkeyPatch, offsets: NDArray[np.int64]) -> None:
    """Have kernels find rows at these offsets, in bytes."""
    plain = describe

    def described(*arguments: Any) -> Any:
        rows = plain(*arguments)
        rows["offsets"] = offsets.ctypes.data
        return rows

    monkeypatch.setitem(globals(), "describe", described)

"""klfast on the twin: the package ``cupy`` of this folder in the place of CuPy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klfast import _dispatch

FOLDER = str(Path(__file__).parent)


def _is_replaced(name: str) -> bool:
    return f"{name}.".startswith(("cupy.", "klfast.kernels.cuda."))


@contextmanager
def installed(capability: str = "90", **attributes: int) -> Iterator[Any]:
    """The fake `cupy`, which klfast finds until the end; `attributes` are those of the device.

    AssertionError at the end if a kernel wrote beyond its memory.
    """
    before = {name: module for name, module in sys.modules.items() if _is_replaced(name)}
    selected = dict(_dispatch._selected)
    for name in before:
        del sys.modules[name]
    kernels = importlib.import_module("klfast.kernels")
    backend = kernels.__dict__.pop("cuda", None)
    _dispatch._selected.clear()
    sys.path.insert(0, FOLDER)
    try:
        cupy = importlib.import_module("cupy")
    finally:
        sys.path.remove(FOLDER)
    cupy.cuda.device.capability = capability
    cupy.cuda.device.attributes.update(attributes)
    try:
        yield cupy
        assert not cupy.cuda.memory.faults, cupy.cuda.memory.faults
    finally:
        for name in [name for name in sys.modules if _is_replaced(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        kernels.__dict__.pop("cuda", None)
        if backend is not None:
            kernels.__dict__["cuda"] = backend
        _dispatch._selected.clear()
        _dispatch._selected.update(selected)

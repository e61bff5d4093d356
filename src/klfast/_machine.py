"""What this installation consists of and runs on, for reports and for ``klfast info``."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ._dispatch import load
from .errors import BackendUnavailable

PACKAGES = (
    "numpy", "numba", "llvmlite", "ml_dtypes", "safetensors", "rich", "scipy", "torch", "jax",
    "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Versions of klfast, Python and the packages klfast works with; None where not installed."""
    found: dict[str, str | None] = {"klfast": _own_version(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Operating system, processor, and the number of cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


def info() -> dict[str, Any]:
    """Everything to know about this installation, as ``klfast info`` prints it.

    Returns
    -------
    dict
        ``versions`` (of klfast, Python and every package klfast works with, None where it is
        missing), ``machine`` (platform, processor, cores), ``backends`` (of each whether it is
        usable, and why not) and ``cpu`` (threads, vector width and cache location of the compiled
        CPU backend; empty where it cannot be used).
    """
    import klfast

    backends = {name: str(status) for name, status in klfast.backends().items()}
    cpu: dict[str, Any] = {}
    with suppress(BackendUnavailable):  # `backends` already says why
        cpu = dict(load("cpu").info())
    return {"versions": versions(), "machine": machine(), "backends": backends, "cpu": cpu}


def _own_version() -> str:
    import klfast

    return klfast.__version__


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()

"""The CPU backend: Numba kernels on explicit vectors, run by a few threads.

A call is planned as one or more kernel runs (a *step*), which write one value a row - or
``STATISTICS`` values - and a function that makes the result of them:

======================  ====================================================================
``one_pass``            KL, Rényi and what follows from it, cross-entropy: float32, one read
``two_phase``           JS, total variation, Hellinger, Jeffreys: float32;
                        for ``compare`` several of them, both KL and the largest entries together
``affinity``            squared Hellinger, where it is wanted alone: float32, one read
``single_pass``         entropy, log-sum-exp, token log-probabilities, argmax: float32
``exact``               all of them, and the rest, in float64, for any input
``top_k``               overlap of the largest entries
======================  ====================================================================

Gradients are those of ``fused_gradients``, in float32, or of ``exact_gradients``.  ``runs`` runs a
kernel; ``values``, ``states`` and ``differentiation`` say which ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klfast._arrays import Rows

from ..plans import EXAMPLE, LOG_SOFTMAX, Step, exact_operation, plan_of, plans_of
from . import native
from .differentiation import gradient
from .runs import (
    AT_A_TIME,
    WORTH_A_THREAD,
    Values,
    address,
    compiled,
    cut,
    in_one_read,
    is_fast,
    launch,
)
from .states import partial_sums, shard
from .threads import get_num_threads, set_num_threads
from .values import compare, joint_names, log_softmax, run, taken_together

__all__ = [
    "available",
    "compare",
    "explain",
    "get_num_threads",
    "gradient",
    "info",
    "log_softmax",
    "partial_sums",
    "read_bytes",
    "run",
    "set_num_threads",
    "shard",
    "warmup",
]


def explain(name: str, p: Rows, q: Rows | None) -> dict[str, object]:
    """What ``run`` would do with these arrays."""
    if name == "log_softmax":
        steps: tuple[Step, ...] = (LOG_SOFTMAX,)
    else:
        operation = name.partition(":")
        parameters = (float(operation[2]),) if operation[2] else EXAMPLE.get(name, ())
        steps = plan_of(operation[0], parameters).steps
    entries = p.count * p.width * (1 if q is None else 2)
    workers = get_num_threads()
    if entries < 2 * WORTH_A_THREAD:
        workers = 1
    _, parts, _ = cut(p.count, p.width)
    described = []
    for step in steps:
        pair = len(step.rows) == 2
        fast = step.module not in ("exact", "top_k") and is_fast(p, q if pair else None)
        module = step.module if fast or step.module == "top_k" else "exact"
        if fast and in_one_read(step):
            module = "affinity"
        described.append(
            {
                "kernel": f"{module}.{step.operation}",
                "arithmetic": "float32 vectors, float64 sums" if fast else "float64",
                "passes": _PASSES[module],
                "parts_of_a_row": parts if fast else 1,
            }
        )
    return {"steps": described, "threads": min(workers, max(1, entries // WORTH_A_THREAD))}


#: Times that a row is read: from main memory once, then from cache.
_PASSES = {"one_pass": 1, "affinity": 1, "single_pass": 1, "two_phase": 2, "exact": 3, "top_k": 1}


def read_bytes(array: NDArray[Any]) -> None:
    """Read a contiguous array once with all threads, as fast as memory allows."""
    function = compiled("read")
    space = np.zeros(2, np.int64)
    launch(
        function,
        (array.ctypes.data, array.nbytes, address(space), address(space) + 8, 0),
        array.nbytes // 4,
        alone=False,
    )


def available() -> str | None:
    """Why this backend cannot be used, or None."""
    missing = [name for name in ("numba", "llvmlite") if find_spec(name) is None]
    return f"{' and '.join(missing)} cannot be found" if missing else None


def warmup(names: Sequence[str], dtypes: Sequence[str]) -> None:
    """Compile, or load from the cache, the kernels of these operations."""
    metrics = [(name, EXAMPLE.get(name, ())) for name in names]
    if "js" in names:  # other weights have a kernel of their own
        metrics.append(("js", (0.25,)))
    floats = [dtype for dtype in dtypes if dtype != "float64"]
    # Alone, and together in ``compare``.
    if together := taken_together(step for plan in plans_of(metrics) for step in plan.steps):
        joint = ",".join(joint_names(together))
        for pair in itertools.product(floats, repeat=2):
            compiled("two_phase", joint, *pair, False)
    for plan in (*(plan_of(*metric) for metric in metrics), *plans_of(metrics)):
        for step in plan.steps:
            module = "top_k" if step.module == "top_k" else "exact"
            compiled(module, exact_operation(step))
            if step.module in ("exact", "top_k"):
                continue
            for types in itertools.product(floats, repeat=len(step.rows)):
                if in_one_read(step):
                    compiled("affinity", *types)
                for last in ((False,), (True,)) if len(types) == 2 else ((),):
                    compiled(step.module, step.operation, *types, *last)


def info() -> dict[str, object]:
    """Threads, vector width and where compiled kernels are kept."""
    directory = native.cache_directory()
    return {
        "threads": get_num_threads(),
        "processor": native.processor(),
        "vector_bits": native.vector_bits(),
        "cache": "none: no folder can be written to" if directory is None else str(directory),
    }


def to_float32(source: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Write a float16 or bfloat16 array (n, D), of entries that lie together, as float32."""
    rows, width = source.shape
    counter = np.zeros(1, np.int64)
    function = compiled("widen", source.dtype.name)
    chunk = max(1, AT_A_TIME // max(1, width))
    arguments = (
        source.ctypes.data, source.strides[0], out.ctypes.data, out.strides[0], width, rows,
        address(counter), chunk,
    )  # fmt: skip
    launch(function, arguments, rows * width, alone=False)


def join_floors(
    sides: Sequence[tuple[NDArray[Any], Values]], rows: Sequence[NDArray[np.float32]]
) -> Values:
    """Decode rows of both sides into ``rows``, with `LEFT_OUT` where either is at its floor.

    Each side is its words, uint16 (n, V), or log-probabilities, float32 (n, V), of any stride
    between rows, and three numbers a row, as kernels/cpu/floors.py has them. ``rows`` are two
    float32 arrays (n, V or more); those of log-probabilities may be the very ones. Returns seven
    numbers a row and side, (n, 2, 7), see there.
    """
    (p, of_p), (q, of_q) = sides
    n, width = p.shape
    parameters = np.ascontiguousarray(np.stack([of_p, of_q], 1), np.float64)
    results = np.empty((n, 2, 7))
    counter = np.zeros(1, np.int64)
    function = compiled("floors", p.dtype.name, q.dtype.name)
    arguments = (
        p.ctypes.data, p.strides[0], q.ctypes.data, q.strides[0], width, n, address(counter),
        address(parameters), rows[0].ctypes.data, rows[1].ctypes.data, rows[0].strides[0],
        address(results),
    )  # fmt: skip
    launch(function, arguments, 2 * n * width, alone=False)
    return results

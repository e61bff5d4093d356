"""The CUDA backend: kernels that CuPy compiles and launches.

Plans are those of the CPU backend. A step is a launch of a kernel, which writes its columns into a
matrix of float64 values, one row of it for each row of logits:

======================  ====================================================================
``one_pass``            KL, Rényi and what follows from it, cross-entropy: one read
``two_phase``           all measures of a pair of rows, up to eight at once: one read
``single_pass``         entropy, log-sum-exp, token log-probabilities, argmax: one read
``exact``               all of them, and the rest, in float64, for any input
``gradients``           the value of a pair, and gradients with respect to the logits: one read
``exact_gradients``     gradients in float64, for any input
``top_k``               overlap of the largest entries
``shards``              what is known of rows that are parts of wider ones, in float64
``finish``              the results, from the values
======================  ====================================================================

Float32 kernels mark the rows that they could not finish to full accuracy; ``exact`` is always
launched behind them, finds the marks, and does those. So the host never waits and reads nothing
back: calls only queue work on the current stream, and CUDA graphs can capture them. Memory that a
call needs beside its results comes from CuPy's pool, and goes back there in the order of the
stream. How rows are cut depends on their shape and on the device alone: the same call gives the
same bits.

``evaluate``, ``differentiate``, ``normalize`` and what ends in ``_on_device`` are for rows on a
device; the functions of the same names as in other backends are for rows on the host, which are
streamed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cupy
import numpy as np
from numpy.typing import NDArray

from klfast._arrays import FLOATS, Rows
from klfast._dispatch import Result
from klfast._operations import DIFFERENTIABLE

from ..plans import EXAMPLE, LOG_SOFTMAX, exact_operation, plan_of
from . import launches, loader, streaming
from .launches import differentiate, evaluate
from .launches import log_softmax as normalize
from .shards import partial_sums, partial_sums_on_device, shard, shard_on_device
from .streaming import log_softmax

__all__ = [
    "available",
    "compare",
    "differentiate",
    "evaluate",
    "explain",
    "gradient",
    "info",
    "log_softmax",
    "normalize",
    "partial_sums",
    "partial_sums_on_device",
    "run",
    "shard",
    "shard_on_device",
    "warmup",
]

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]


def available() -> str | None:
    """Why this backend cannot be used, or None."""
    runtime = cupy.cuda.runtime
    try:
        reasons = [loader.why_not(number) for number in range(runtime.getDeviceCount())]
        if None in reasons:
            return None
        reason = ", ".join(filter(None, reasons)) or "there is no CUDA device"
    except runtime.CUDARuntimeError as error:
        reason = str(error)
    return f"{reason} (CuPy {cupy.__version__}, {_versions()})"


def _versions() -> str:
    """Of the driver and of the runtime, of which the driver must not be the older one."""
    found = []
    for name in ("driver", "runtime"):
        try:
            number = getattr(cupy.cuda.runtime, f"{name}GetVersion")()
        except cupy.cuda.runtime.CUDARuntimeError:
            number = 0
        version = f"CUDA {number // 1000}.{number % 1000 // 10}" if number else "none"
        found.append(f"{name}: {version}")
    return ", ".join(found)


def run(
    name: str,
    p: Rows,
    q: Rows | None,
    parameters: tuple[float, ...],
    rows: Numbers | None,
    out: Values,
    tokens: Numbers | None = None,
) -> None:
    """Write one value a row, in float64 and nats, for the row numbers in ``rows`` (None: all)."""
    (values,) = streaming.values_of([(name, parameters)], p, q, rows, tokens)
    keep = slice(None) if rows is None else rows
    out[keep] = values[keep]


def compare(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows,
    rows: Numbers | None,
    tokens: Numbers | None,
) -> list[Values]:
    """Values of many operations; those of rows that are not in ``rows`` are undefined."""
    return streaming.values_of(metrics, p, q, rows, tokens)


def gradient(
    name: str,
    p: Rows,
    q: Rows | None,
    parameters: tuple[float, ...],
    rows: Numbers | None,
    out: Values,
    scale: Values,
    into_p: Rows | None,
    into_q: Rows | None,
) -> None:
    """Write values, and gradients with respect to the logits times ``scale``, one a row."""
    into = {side: each for side, each in (("p", into_p), ("q", into_q)) if each is not None}
    streaming.gradients_of((name, parameters), p, q, rows, out, scale, into)


def explain(name: str, p: Rows, q: Rows | None) -> dict[str, object]:
    """What a call with these arrays would launch."""
    device = cupy.cuda.Device().id
    operation, _, parameter = name.partition(":")
    metric = operation, (float(parameter),) if parameter else EXAMPLE.get(operation, ())
    steps = (LOG_SOFTMAX,) if name == "log_softmax" else plan_of(*metric).steps
    described = []
    for launch in launches.schedule(steps, p, q):
        cut = launches.cut(device, p.count, p.width)
        exact = launch.module in ("exact", "top_k")
        names = [exact_operation(step) if exact else step.operation for step in launch.steps]
        each: dict[str, object] = {
            "kernel": ".".join([launch.module, *names]),
            "arithmetic": "float64" if launch.module == "exact" else "float32, sums in float64",
            "passes": _PASSES[launch.module],
            "parts_of_a_row": 1 if exact else cut.parts,
        }
        if launch.module == "two_phase":
            assert q is not None
            shape = launches.shape_of(launch.steps)
            each |= _residence(
                device, p, q, shape, launches.cut(device, p.count, p.width, shape[0])
            )
        described.append(each)
    explained: dict[str, object] = {"steps": described, "device": f"cuda:{device}"}
    if operation in DIFFERENTIABLE:
        explained["value_and_gradient"] = _gradient(metric, p, q)
    return explained


def _residence(
    device: int, p: Rows, q: Rows, shape: tuple[int, int], parts: launches.Cut
) -> dict[str, object]:
    """Where a kernel that reads a pair of rows again finds it."""
    at = launches.residence(device, p, q, shape, parts)
    where = launches.second_read(device, p, q, at)
    return {"blocks_of_a_cluster": at.cluster, "second_read": where}


def _gradient(metric: tuple[str, tuple[float, ...]], p: Rows, q: Rows | None) -> dict[str, object]:
    """What gradients with respect to these rows, of their layout, would launch."""
    other = p if q is None else q
    slope = launches.slope_of(*metric)
    plan = launches.plan_with_gradient(metric, q)
    if not launches.is_kept(slope, plan, p, q, {"p": p, "q": other}):
        kernel = f"exact_gradients.{slope.operation}"
        return {"kernel": kernel, "arithmetic": "float64", "passes": _PASSES["exact"] + 1}
    shape = launches.GRADIENT_SHAPE
    return {
        "kernel": f"gradients.{slope.operation}",
        "arithmetic": "float32, sums in float64",
        "passes": 1,
        **_residence(cupy.cuda.Device().id, p, other, shape, launches.whole(p.width, shape[0])),
    }


#: Times that a row is read from the memory of the device, at most.
_PASSES = {"one_pass": 1, "single_pass": 1, "two_phase": 1, "exact": 3, "top_k": 3}

#: Lengths of the rows to warm up with: a warp's work, and a block's.
WARM_WIDTHS = (1024, 128 << 10)


def warmup(names: Sequence[str], dtypes: Sequence[str]) -> None:
    """Compile, or load from CuPy's cache, the kernels of these operations for the current device.

    They compute on zeros: each operation alone, and all of them at once as in ``compare``.
    """
    metrics = [(name, EXAMPLE.get(name, ())) for name in names]
    zeros = cupy.cuda.alloc(8 * max(WARM_WIDTHS))
    stream = cupy.cuda.get_current_stream()
    cupy.cuda.runtime.memsetAsync(zeros.ptr, 0, 8 * max(WARM_WIDTHS), stream.ptr)
    count = 4 * loader.machine(cupy.cuda.Device().id).multiprocessors
    for width, types in itertools.product(WARM_WIDTHS, itertools.product(dtypes, repeat=2)):
        p, q = (
            Rows(zeros, zeros.ptr, dtype, count, width, FLOATS[dtype], 0, None, "logits", 1.0)
            for dtype in types
        )
        outs = [_results(count) for _ in metrics]
        for metric, out in zip(metrics, outs, strict=True):
            evaluate([metric], p, q, None, None, [out])
        evaluate(metrics, p, q, None, None, outs)
    stream.synchronize()


def _results(count: int) -> Result:
    """Memory for results that nobody wants."""
    memory = cupy.cuda.alloc(8 * count)
    return Result(Rows(memory, memory.ptr, "float64", count, 1, 8, 8, None, "logits", 1.0))


def info() -> dict[str, object]:
    """The devices, and versions of what runs them."""
    devices = []
    for number in range(cupy.cuda.runtime.getDeviceCount()):
        device = cupy.cuda.Device(number)
        capability = device.compute_capability
        multiprocessors = device.attributes["MultiProcessorCount"]
        devices.append(
            f"compute capability {capability[:-1]}.{capability[-1]}, "
            f"{multiprocessors} multiprocessors"
        )
    return {"devices": devices, "cupy": cupy.__version__, "versions": _versions()}

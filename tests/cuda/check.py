"""``python tests/cuda/check.py``: compile every CUDA kernel, and report what of a device it takes.

No GPU is needed. The compiler is NVRTC, which is what CuPy calls, from PyPI (``nvidia-cuda-nvrtc``)
or from where the linker finds it; or else nvcc. Which kernels there are is not written down here:
the calls of the host side are made, for many shapes and dtypes, and what they would have compiled
is. The report goes to ``kernels/cuda/RESOURCES.md``. Exit status 1 if a kernel does not compile,
or needs local memory, as it does when it runs out of registers.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import functools
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from klfast.kernels.plans import EXAMPLE
from twin import installed
from twin.compiler import cache_directory

from klfast._arrays import FLOATS, Rows
from klfast._operations import DEFAULT_METRICS, DIFFERENTIABLE, OPERATIONS, parse_metric
from klfast._report import grid

REPORT = Path(__file__).parents[2] / "kernels" / "cuda" / "RESOURCES.md"
#: Of what kernels are compiled for (A100; H100 and H200; B200): multiprocessors, and the bytes of
#: shared memory of a block and of a multiprocessor.
DEVICES = {
    "sm_80": (108, 163 << 10, 164 << 10),
    "sm_90": (132, 227 << 10, 228 << 10),
    "sm_100": (148, 227 << 10, 228 << 10),
}
#: As CuPy has it, and a report.
OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")
#: What CuPy adds where NVRTC is of CUDA 12 or later; nvcc has no such option.
OF_NVRTC = "--device-as-default-execution-space"
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")

#: Definitions that say what a kernel computes; of the others there are variants.
OF_INTEREST = re.compile("OPERATION_|TERMS$|DTYPE_|TO_")
DTYPES = {str(code): name for code, name in enumerate(FLOATS)}


class Request(NamedTuple):
    """A kernel that CuPy was to compile."""

    name: str
    source: str
    shared: int  # bytes of shared memory that a launch asks for, at most

    @property
    def definitions(self) -> dict[str, str]:
        """What its text begins with."""
        return dict(re.findall(r"^#define (\w+) (.*)$", self.source.partition("#line")[0], re.M))


class Compiled(NamedTuple):
    """What the compiler says of a kernel on one architecture; if it failed, only the log."""

    registers: int
    local: int  # bytes of local memory a thread: the stack, and spilled registers
    seconds: float
    log: str
    failed: bool

    @property
    def bad(self) -> bool:
        """Whether it does not compile, or needs local memory."""
        return self.failed or self.local > 0


# --- what is asked for ----------------------------------------------------------------------


class Case(NamedTuple):
    """Shape and types of a pair of batches; rows of the second begin `skew` entries later."""

    dtype_p: str
    dtype_q: str
    rows: int = 8192
    width: int = 128_256
    skew: int = 0


FLOAT32 = Case("float32", "float32")
#: The operation whose gradient with respect to Q alone is written while its value is summed.
FUSED = "kl"
#: All types, and of one the lengths that a warp or a block works on, few rows, and skewed ones.
CASES = (
    *(Case(dtype, dtype) for dtype in FLOATS),
    Case("bfloat16", "float32"),
    FLOAT32._replace(width=1000),
    FLOAT32._replace(rows=1),
    FLOAT32._replace(skew=1),
)


def requests(architecture: str, cases: Sequence[Case] = CASES) -> list[Request]:
    """Every kernel that calls of these shapes and dtypes need: operations, gradients, `compare`."""
    found: dict[tuple[str, str], int] = {}

    class Module:
        """In the place of CuPy's RawModule, and of the function that it gives."""

        max_dynamic_shared_size_bytes = 48 << 10

        def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
            assert set(options) < set(OPTIONS)
            self.code = code

        def get_function(self, name: str) -> Module:
            self.key = name, self.code
            return self

        def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
            found[self.key] = max(found.get(self.key, 0), shared_mem)

    multiprocessors, block, together = DEVICES[architecture]
    metrics = [(name, EXAMPLE.get(name, ())) for name in OPERATIONS]
    default = [(each.name, values) for each, values in map(parse_metric, DEFAULT_METRICS)]
    # Values of parameters that have kernels of their own.
    others = [("renyi", (0.0,)), ("renyi", (math.inf,)), ("js", (0.3,))]
    groups = [[metric] for metric in (*metrics, *others)] + [default, metrics]
    with installed(
        architecture.removeprefix("sm_"), MultiProcessorCount=multiprocessors,
        MaxSharedMemoryPerBlockOptin=block, MaxSharedMemoryPerMultiprocessor=together,
    ):  # fmt: skip
        launches = import_module("klfast.kernels.cuda.launches")
        shards = import_module("klfast.kernels.cuda.shards")
        with patch("cupy.RawModule", Module):
            for case in cases:
                count, width = case.rows, case.width
                p = _rows(case.dtype_p, count, width)
                q = _rows(case.dtype_q, count, width, case.skew)
                for group in groups:
                    one = len(group) == 1 and OPERATIONS[group[0][0]].rows == "p"
                    second = None if one else q
                    results = [launches.Result(_rows("float32", count, 1))] * len(group)
                    launches.evaluate(group, p, second, None, None, results)
                launches.log_softmax(p, None, _rows("float32", count, width))
                shards.queue_states([], p, q, None, None, 0)
                whole = _rows("float64", count, 5)
                shards.queue_sums([("tv", ()), ("js", (0.5,))], p, q, whole, None, 0)
                result = launches.Result(_rows("float32", count, 1))
                every = [(name, EXAMPLE.get(name, ())) for name in DIFFERENTIABLE] + others
                for metric, sides in product(every, ("pq", "q")):
                    name, _ = metric
                    if sides == "q" and name != FUSED:
                        continue
                    second, given = (None, {"p": p}) if name == "entropy" else (q, {"p": p, "q": q})
                    into = {side: given[side] for side in sides if side in given}
                    launches.differentiate(metric, p, second, None, result, None, into)
    return [Request(*key, shared) for key, shared in found.items()]


def _rows(dtype: str, count: int, width: int, skew: int = 0) -> Rows:
    size = FLOATS[dtype]
    axes = ((2, 0), (count, size * width)) if skew and count > 1 else ()
    return Rows(
        None, (1 << 20) + size * skew, dtype, count, width, size, size * width, None, "logits",
        1.0, axes,
    )  # fmt: skip


# --- compiling ------------------------------------------------------------------------------


def compiler() -> str | None:
    """The version of NVIDIA's compiler, or None if there is none."""
    if (nvrtc := _nvrtc()) is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"
    if shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
        (release,) = re.findall(r"release ([\d.]+)", said.stdout)
        return f"nvcc {release}"
    return None


@functools.cache
def _nvrtc() -> Any:
    """The library, or None."""
    for package in NVRTC:
        try:
            found = [str(f.locate()) for f in files(package) or () if "libnvrtc.so" in f.name]
        except PackageNotFoundError:
            continue
        if found:
            return ctypes.CDLL(min(found, key=len))
    name = ctypes.util.find_library("nvrtc")
    return ctypes.CDLL(name) if name else None


def compile_for(architecture: str, source: str) -> Compiled:
    """Compile a kernel, or read what came of it the last time."""
    version = compiler()
    key = "\0".join([source, architecture, *OPTIONS, OF_NVRTC, str(version)])
    path = cache_directory() / f"nvidia-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return Compiled(**json.loads(path.read_text()))
    begin = time.perf_counter()
    failed, log = (_with_nvcc if _nvrtc() is None else _with_nvrtc)(architecture, source)
    seconds = time.perf_counter() - begin
    numbers = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"(?s:.*?)Used (\d+) registers",
        log,
    )
    if failed or numbers is None:
        return Compiled(0, 0, seconds, log, True)
    stack, stores, loads, registers = map(int, numbers.groups())
    result = Compiled(registers, max(stack, stores, loads), seconds, log, False)
    path.write_text(json.dumps(result._asdict()))
    return result


def _with_nvrtc(architecture: str, source: str) -> tuple[bool, str]:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    failed = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"klfast.cu", 0, None, None
    )
    assert not failed
    options = [option.encode() for option in (*OPTIONS, OF_NVRTC, f"-arch={architecture}")]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return bool(failed), log.value.decode()


def _with_nvcc(architecture: str, source: str) -> tuple[bool, str]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "klfast.cu"
        path.write_text(source)
        done = subprocess.run(
            ["nvcc", "-cubin", *OPTIONS, f"-arch={architecture}", path, "-o", path.with_suffix("")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return done.returncode != 0, done.stdout + done.stderr


# --- the report -----------------------------------------------------------------------------


def main() -> None:
    """Compile everything, print and write the report, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=REPORT, help="the file to write")
    options = parser.parse_args()
    version = compiler()
    if version is None:
        sys.exit("no compiler: pip install nvidia-cuda-nvrtc")
    wanted = {(name, each) for name in DEVICES for each in requests(name)}
    work = sorted(wanted, key=lambda each: each[1][:2])
    with ProcessPoolExecutor(options.jobs) as pool:
        compiled = list(
            pool.map(compile_for, *zip(*((a, each.source) for a, each in work), strict=True))
        )
    results = [(*each, result) for each, result in zip(work, compiled, strict=True)]
    table = report(results)
    print("\n".join(grid(table, left=3)))
    seconds = [result.seconds for result in compiled]
    print(
        f"\n{len(results)} kernels, {version}; seconds to compile one: median "
        f"{statistics.median(seconds):.2f}, at most {max(seconds):.2f}"
    )
    options.out.write_text(_markdown(version, table), encoding="utf-8")
    bad = [(name, each, result) for name, each, result in results if result.bad]
    for architecture, each, result in bad:
        print(f"\n{each.name} {each.definitions} for {architecture}:\n{result.log}")
    if bad:
        sys.exit(f"{len(bad)} kernels do not compile, or need local memory")


def report(results: Sequence[tuple[str, Request, Compiled]]) -> list[list[str]]:
    """A table: kernels of one purpose in a line, with the registers and local memory of each."""
    lines: dict[tuple[str, str, str], dict[str, list[Compiled]]] = {}
    shared = defaultdict(list)
    for architecture, each, result in results:
        lines.setdefault(_purpose(each), defaultdict(list))[architecture].append(result)
        shared[_purpose(each)].append(each.shared)
    rows = [["kernel", "computes", "dtypes", *DEVICES, "shared", "local"]]
    for purpose, by_architecture in sorted(lines.items()):
        every = [each for found in by_architecture.values() for each in found]
        rows.append([
            *purpose,
            *(_span(each.registers for each in by_architecture.get(a, [])) for a in DEVICES),
            _span(shared[purpose]),
            "FAILED" if any(each.failed for each in every) else _span(each.local for each in every),
        ])  # fmt: skip
    return rows


def _purpose(request: Request) -> tuple[str, str, str]:
    given = {key: value for key, value in request.definitions.items() if OF_INTEREST.match(key)}
    dtypes = [DTYPES[given.pop(key)] for key in ("DTYPE_P", "DTYPE_Q") if key in given]
    terms = given.pop("TERMS", "").split(",")
    if len(terms) > 3:
        terms = [f"{len(terms)} terms"]
    to = [side for side in "PQ" if given.pop(f"TO_{side}", "0") == "1"]
    if to:
        terms.append("wrt " + "".join(to))
    names = [key.removeprefix("OPERATION_") for key in given]
    return request.name, " ".join([*names, *terms]).lower().strip(), "/".join(dtypes) or "any"


def _span(values: Iterable[int]) -> str:
    found = sorted(values)
    if not found:
        return ""
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _markdown(version: str, table: list[list[str]]) -> str:
    head, *rows = table
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return (
        "# What the CUDA kernels take of a device\n\n"
        f"Written by `make cuda-check` with {version}: registers a thread by architecture, bytes\n"
        "of shared memory that launches ask for a block, and bytes of local memory a thread\n"
        "(spilled registers, and the stack), over the variants of each kernel (threads,\n"
        "alignment, clusters).\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()

"""The CUDA sources of this folder as kernels: compiled by CuPy when first used, kept on disk by it.

A kernel is a text: its definitions (data types, threads, what it computes), the headers and its
``.cu`` file, one after another. No file includes another, because CuPy's cache on disk knows a
kernel by its text.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import Any, NamedTuple

import cupy

from klfast.errors import BackendUnavailable

__all__ = ["Kernel", "Machine", "kernel", "machine", "source", "why_not"]

#: What a device must be for copies to shared memory that go on by themselves, and conversions.
CAPABILITY = 80

HEADERS = ("device.cuh", "rows.cuh", "team.cuh", "mathematics.cuh")
#: Headers that only some kernels need.
MORE_HEADERS = {
    "one_pass": ("pairs.cuh",),
    "two_phase": ("pairs.cuh", "terms.cuh", "resident.cuh", "measures.cuh"),
    "gradients": ("pairs.cuh", "terms.cuh", "resident.cuh", "measures.cuh", "slopes.cuh"),
    "exact": ("exact.cuh",),
    "exact_gradients": ("exact.cuh",),
    "shards": ("exact.cuh",),
    "finish": ("finish.cuh",),
}


class Machine(NamedTuple):
    """What kernels are cut to on one device."""

    multiprocessors: int
    shared: int  # bytes that a block can have
    shared_together: int  # bytes that the blocks on a multiprocessor can have
    cache: int  # bytes of L2
    clusters: bool  # whether blocks can share their memory


def why_not(device: int) -> str | None:
    """Why a device cannot run the kernels, or None."""
    capability: str = cupy.cuda.Device(device).compute_capability
    if int(capability) >= CAPABILITY:
        return None
    found = f"{capability[:-1]}.{capability[-1]}"
    return f"cuda:{device} has compute capability {found}; accepted: 8.0 or later"


@functools.cache
def machine(device: int) -> Machine:
    """Describe a device; BackendUnavailable where it cannot run the kernels."""
    reason = why_not(device)
    if reason is not None:
        raise BackendUnavailable(f"backend 'cuda' cannot be used: {reason}")
    found = cupy.cuda.Device(device)
    attributes = found.attributes
    return Machine(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        attributes["L2CacheSize"],
        int(found.compute_capability) >= 90,
    )


@functools.cache
def _text(name: str) -> str:
    """A file, without what the compiler has no use for when files are put together."""
    text = files(__package__).joinpath(name).read_text("utf-8")
    return f'#line 1 "{name}"\n' + re.sub(r"^#pragma once$", "", text, flags=re.MULTILINE) + "\n"


def source(name: str, definitions: tuple[tuple[str, object], ...]) -> str:
    """Everything that the compiler gets to see of a kernel."""
    defines = "".join(f"#define {key} {value}\n" for key, value in definitions)
    headers = HEADERS + MORE_HEADERS.get(name, ())
    return defines + "".join(map(_text, (*headers, f"{name}.cu")))


class Kernel:
    """A compiled kernel on the device that it was compiled for."""

    def __init__(self, name: str, definitions: tuple[tuple[str, object], ...]) -> None:
        given = dict(definitions)
        threads, team = int(str(given["THREADS"])), int(str(given["TEAM"]))
        module = cupy.RawModule(code=source(name, definitions), options=("-std=c++17",))
        try:
            self._function = module.get_function(name)
            # Asking for it compiles the kernel. More than this must be asked for.
            self._shared: int = self._function.max_dynamic_shared_size_bytes
        except cupy.cuda.compiler.CompileException as error:
            raise RuntimeError(f"the CUDA kernel {name} does not compile:\n{error}") from error
        self._threads = threads
        self._scratch = 0 if team == 32 else 2 * threads  # bytes that team.cuh begins with

    def launch(self, blocks: int, call: Any, shared: int = 0) -> None:
        """Queue it on the current stream, with so much shared memory beside the teams' own."""
        shared += self._scratch
        if shared > self._shared:
            self._function.max_dynamic_shared_size_bytes = self._shared = shared
        self._function((blocks,), (self._threads,), (call,), shared_mem=shared)


@functools.cache
def kernel(device: int, name: str, definitions: tuple[tuple[str, object], ...]) -> Kernel:
    """A kernel for the current device, whose number this is."""
    return Kernel(name, definitions)

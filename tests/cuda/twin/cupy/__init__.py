"""What klfast uses of CuPy, on a device whose memory is the host's and whose kernels are the twin.

`launches` lists what ran. `cuda.stream.deferred` makes streams as lazy as they may be: nothing
runs before somebody waits for it.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any, NamedTuple

import numpy as np

from twin.compiler import SEED, CompileError, LaunchError, Program, compile_text

from . import cuda

__version__ = "14.0.0"


class Launch(NamedTuple):
    """One launch of a kernel."""

    name: str
    grid: int
    block: int
    shared: int
    stream: int
    call: Any  # a copy of the argument


launches: list[Launch] = []
order_seed = SEED  # what draws the order of blocks and threads; 0: ascending


class ndarray:  # noqa: N801
    """An array on the device."""

    def __init__(self, view: np.ndarray[Any, Any], memory: cuda.memory.MemoryPointer) -> None:
        self._view = view
        self._memory = memory
        self.dtype = view.dtype
        self.shape = view.shape
        self.strides = view.strides
        self.ndim = view.ndim
        self.size = view.size
        self.itemsize = view.itemsize
        self.nbytes = view.nbytes
        self.flags = view.flags

    @property
    def data(self) -> cuda.memory.MemoryPointer:
        offset = self._view.__array_interface__["data"][0] - self._memory.ptr if self.size else 0
        return self._memory + offset

    @property
    def device(self) -> cuda.Device:
        return cuda.Device(0)

    @property
    def T(self) -> ndarray:  # noqa: N802
        return ndarray(self._view.T, self._memory)

    def __getitem__(self, index: Any) -> ndarray:
        places = index if isinstance(index, tuple) else (index,)
        if not any(place is ... for place in places):
            places = (*places, ...)  # for a view, even of one entry
        return ndarray(self._view[places], self._memory)

    def reshape(self, *shape: Any) -> ndarray:
        return ndarray(self._view.reshape(*shape), self._memory)

    def transpose(self, *axes: int) -> ndarray:
        return ndarray(self._view.transpose(*axes), self._memory)

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self._view.view(dtype), self._memory)

    def get(self) -> np.ndarray[Any, Any]:
        cuda.get_current_stream().synchronize()
        return self._view.copy()

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __itruediv__(self, other: float) -> ndarray:
        def divide() -> None:
            self._view[...] = self._view / other

        cuda.get_current_stream()._submit(divide)
        return self

    def __float__(self) -> float:
        return float(self.get())

    def __len__(self) -> int:
        return len(self._view)

    def __array__(self, *arguments: Any, **keywords: Any) -> None:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "strides": None if self._view.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "stream": 1,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: Any = None, **keywords: Any) -> Any:
        brain = self.dtype.name == "bfloat16"
        capsule = (self._view.view(np.uint16) if brain else self._view).__dlpack__()
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        address = pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(address + 8).value = 2
        if brain:
            ctypes.c_uint8.from_address(address + 20).value = 4
        return capsule


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """New device memory; full of NaN here."""
    length = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = cuda.alloc(length)
    if not length:
        return ndarray(np.empty(shape, dtype), memory)
    return ndarray(memory.lend()[:length].view(dtype).reshape(shape), memory)


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """Copy to the device."""
    if isinstance(x, ndarray):
        return x
    host = np.asarray(x, dtype)
    result = empty(host.shape, host.dtype)
    result._view[...] = host
    return result


array = asarray


def broadcast_to(x: ndarray, shape: Any) -> ndarray:
    """A view with strides of 0."""
    return ndarray(np.broadcast_to(x._view, shape), x._memory)


def ascontiguousarray(x: ndarray, dtype: Any = None) -> ndarray:
    """The array itself, or a copy that is made on the device."""
    if x.flags.c_contiguous and dtype in (None, x.dtype):
        return x
    result = empty(x.shape, dtype or x.dtype)

    def copy() -> None:
        result._view[...] = x._view

    cuda.get_current_stream()._submit(copy)
    return result


def asnumpy(x: Any) -> np.ndarray[Any, Any]:
    """Copy to the host."""
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


class RawKernel:
    """A kernel as CuPy launches it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.name = program.name
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self.attributes = {
            "binary_version": int(cuda.device.capability),
            "local_size_bytes": 0,
            "max_threads_per_block": 1024,
            "num_regs": 32,
            "shared_size_bytes": 0,
        }

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, *, shared_mem: int = 0
    ) -> None:
        (argument,) = args
        if not isinstance(argument, np.ndarray) or argument.shape or not argument.dtype.names:
            raise TypeError("the one argument of these kernels is a NumPy struct")
        for what, size in (("grid", grid), ("block", block)):
            if any(n != 1 for n in size[1:]) or not 1 <= size[0] < 2**31:
                raise cuda.runtime.CUDARuntimeError(f"invalid {what} {size}")
        limit = min(self.max_dynamic_shared_size_bytes, cuda.device.attributes[_OPT_IN])
        if shared_mem > limit:
            raise cuda.runtime.CUDARuntimeError(f"{shared_mem} bytes of shared memory of {limit}")
        for name, pointer in _pointers(argument, ""):
            if pointer and not cuda.memory.on_device(pointer):
                raise cuda.runtime.CUDARuntimeError(f"{name} = {pointer:#x} is no device memory")
        call = argument.copy()
        stream = cuda.get_current_stream()
        launches.append(Launch(self.name, grid[0], block[0], shared_mem, stream.ptr, call))

        def launch() -> None:
            address = call.__array_interface__["data"][0]
            try:
                self._program.launch(grid[0], block[0], shared_mem, address, order_seed)
            except LaunchError as error:
                raise cuda.runtime.CUDARuntimeError(str(error)) from None

        stream._submit(launch)


_OPT_IN = "MaxSharedMemoryPerBlockOptin"
_POINTERS = {
    *("data", "offsets", "where", "tokens", "values", "out", "out_offsets", "states", "arrived"),
    "scales",
}


def _pointers(struct: Any, prefix: str) -> list[tuple[str, int]]:
    found = []
    for name in struct.dtype.names:
        if struct.dtype[name].names:
            found += _pointers(struct[name], f"{prefix}{name}.")
        elif name in _POINTERS:
            found.append((prefix + name, int(struct[name])))
    return found


class RawModule:
    """A text with one kernel, compiled when that is asked for."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        if backend != "nvrtc":
            raise ValueError(f"backend is {backend!r}")
        self._code = code
        self._options = options

    @functools.cached_property
    def _program(self) -> Program:
        found = (re.fullmatch(r"(?:-D|--define-macro=)(\w+)(?:=(.*))?", o) for o in self._options)
        defines = [f"#define {m[1]} {'1' if m[2] is None else m[2]}\n" for m in found if m]
        code = "".join(defines) + self._code
        cluster = re.search(r"^#define CLUSTER (\d+)", code, re.MULTILINE)
        try:
            if cluster and int(cluster[1]) > 1 and int(cuda.device.capability) < 90:
                raise CompileError("__cluster_dims__ needs sm_90")
            return compile_text(code)
        except CompileError as error:
            raise cuda.compiler.CompileException(
                error.log, self._code, "klfast.cu", self._options
            ) from None

    def get_function(self, name: str) -> RawKernel:
        if name != self._program.name:
            raise cuda.runtime.CUDARuntimeError(f"named symbol not found: {name}")
        return RawKernel(self._program)

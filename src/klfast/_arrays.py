"""Arrays of any library as views of their memory, and results as arrays of the same library.

A library is looked at only if the user has imported it: nothing here imports one.
"""

import ctypes
import functools
import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOATS",
    "Place",
    "Rows",
    "View",
    "address_of",
    "decode",
    "dtype_name",
    "empty",
    "encode",
    "host_array",
    "memory",
    "overlap",
    "place_of",
    "plain_rows",
    "rows_of",
    "view_of",
    "wrap",
]

FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # name -> bytes
ACCEPTED = "NumPy, PyTorch, JAX or CuPy arrays, and anything with __dlpack__"
# NumPy itself has no bfloat16: its bits travel as uint16.
STORAGE = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in FLOATS}
# Keyed by dtype because reading dtype.name costs a microsecond. Other byte orders are not in it.
NATIVE = {np.dtype(name): name for name in FLOATS if name != "bfloat16"}

HOST_DEVICES = {1, 3, 11}  # DLPack's CPU, and host memory pinned for CUDA or ROCm
CUDA_DEVICES = {2, 13}  # DLPack's CUDA, and CUDA managed memory
# Name of a capsule -> bytes before the tensor in it.
DLPACK_CAPSULES = {b"dltensor_versioned": 32, b"dltensor": 0}
DLPACK_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


@dataclass(slots=True, eq=False)
class Rows:
    """A batch of rows in memory, as backends see it. Never changed once made."""

    owner: object  # keeps the memory alive
    address: int  # of the first entry of row 0
    dtype: str  # "float16", "bfloat16", "float32" or "float64"
    count: int  # rows, after the batch axes are broadcast
    width: int  # entries of a row that are read
    stride: int  # bytes from an entry to the next
    row_stride: int  # bytes from a row to the next; 0 where one row is repeated
    offsets: NDArray[np.int64] | None  # bytes from row 0 to each row, if no one stride gives them
    input: str  # "logits", "log_probs" or "probs"
    temperature: float
    # Of these (length, bytes) axes of the batch: all that is known of the offsets on a device.
    axes: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True, eq=False)
class View:
    """Where an array lies in memory, whatever library it belongs to."""

    owner: object
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes


class Place(NamedTuple):
    """The library an array belongs to, and the device it lives on: "cpu", "cuda:0", ..."""

    kind: str
    device: str

    def __str__(self) -> str:
        return f"a {self.kind} array on {self.device}"


NUMPY = Place("NumPy", "cpu")


@functools.cache
def _torch_name(constant: Any) -> str:
    return str(constant).removeprefix("torch.")


@functools.cache
def _torch_place(device: Any) -> Place:
    return Place("PyTorch", str(device))


class Memory:
    """Lends the memory of a view to NumPy, writable or not, with strides of any sign."""

    def __init__(self, view: View, writable: bool) -> None:
        self.owner = view.owner
        self.__array_interface__ = {
            "version": 3,
            "data": (view.address, not writable),
            "typestr": STORAGE[view.dtype].str,
            "shape": view.shape,
            "strides": view.strides,
        }


class _DLTensor(ctypes.Structure):
    """The C structure in a DLPack capsule."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def address_of(array: NDArray[Any]) -> int:
    """Where the first entry of a NumPy array lies."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # read-only, with gaps, empty, or of a dtype of its own
        address: int = array.__array_interface__["data"][0]  # takes four times as long
        return address


def plain_rows(x: Any, place: Place) -> Rows | None:
    """Rows of logits of a C-contiguous array or tensor on the host; None where it is not that.

    This is the way of small calls, where the checks of `view_of` would cost more than the kernel.
    """
    if place == NUMPY:
        dtype = NATIVE.get(x.dtype, "")
        plain = x.flags.c_contiguous
    elif place == ("PyTorch", "cpu"):
        dtype = _torch_name(x.dtype)
        plain = _torch_name(x.layout) == "strided" and x.is_contiguous()
        plain = plain and not (x.is_neg() or x.requires_grad)
    else:
        return None
    *batch, width = x.shape or (0,)
    count = math.prod(batch)
    if not plain or dtype not in FLOATS or not count * width:
        return None
    size = FLOATS[dtype]
    address = address_of(x) if place == NUMPY else x.data_ptr()
    if address % size:
        return None
    return Rows(x, address, dtype, count, width, size, width * size, None, "logits", 1.0)


def place_of(x: Any, argument: str) -> Place:
    """Whose array `x` is and where it lives; TypeError where it is none that can be read."""
    if type(x) is np.ndarray:
        return NUMPY
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{argument} is a NumPy masked array, whose mask would be lost; accepted: "
                f"{ACCEPTED} (pass {argument}.data, and the rows to keep as where=)"
            )
        return NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _torch_place(x.device)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{argument} is being traced by a JAX transformation such as jax.jit; accepted: "
                "JAX arrays that hold values"
            )
        if len(x.devices()) > 1:
            raise TypeError(
                f"{argument} is a JAX array spread over {len(x.devices())} devices; accepted: "
                "JAX arrays on one device"
            )
    elif not (hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")):
        raise TypeError(
            f"{argument} is of type {type(x).__name__}; accepted: {ACCEPTED}{_way(x, argument)}"
        )
    library = type(x).__module__.partition(".")[0]
    kind = {"jaxlib": "JAX", "cupy": "CuPy"}.get(library, library)
    device, number = x.__dlpack_device__()
    if int(device) in HOST_DEVICES:
        return Place(kind, "cpu")
    name = "cuda" if int(device) in CUDA_DEVICES else f"DLPack device type {int(device)}"
    return Place(kind, f"{name}:{int(number)}")


def _way(x: Any, argument: str) -> str:
    """How to come from what many hand over first to an accepted array, in brackets."""
    if isinstance(x, list | tuple) and argument != "out":
        return f" (np.asarray({argument}, np.float64))"
    if hasattr(x, "logits"):  # what models of transformers give
        return f" ({argument}.logits)"
    if hasattr(x, "to_numpy"):  # tables of pandas, Polars and others
        return f" ({argument}.to_numpy())"
    return ""


def view_of(x: Any, place: Place, argument: str) -> View:
    """The memory of the array `x`, never a copy.

    TypeError for a dtype, byte order or layout that cannot be read, ValueError for unaligned data.
    """
    if place.kind == "NumPy":
        view = _numpy_view(x, argument)
    elif place.kind == "PyTorch":
        view = _torch_view(x, argument)
    elif place.device == "cpu":
        view = _dlpack_view(x, argument)
    elif place.kind == "CuPy":
        dtype = _float_name(NATIVE.get(x.dtype) or x.dtype.name, argument)
        view = View(x, x.data.ptr, dtype, x.shape, x.strides)
    else:
        raise TypeError(f"{argument} is {place}; accepted there: CuPy arrays and PyTorch tensors")
    size = FLOATS[view.dtype]
    bits = view.address  # any bit below a size, which is a power of 2, is one too many
    for step, length in zip(view.strides, view.shape, strict=True):
        if length > 1:
            bits |= step
    if bits % size and math.prod(view.shape):
        raise ValueError(
            f"{argument} has {view.dtype} entries at addresses that are not multiples of {size}, "
            "as in packed records; accepted: aligned arrays (np.require(x, requirements='A'))"
        )
    return view


def _numpy_view(x: NDArray[Any], argument: str) -> View:
    dtype = NATIVE.get(x.dtype)
    if dtype is None:
        if not x.dtype.isnative:
            raise TypeError(
                f"{argument} has dtype {x.dtype.str}, not in the byte order of this machine; "
                f"accepted: native {', '.join(FLOATS)} (x.astype(x.dtype.newbyteorder('=')))"
            )
        dtype = _float_name(x.dtype.name, argument)
    return View(x, address_of(x), dtype, x.shape, x.strides)


def _torch_view(x: Any, argument: str) -> View:
    dtype = _float_name(_torch_name(x.dtype), argument)
    if _torch_name(x.layout) != "strided" or x.is_neg():
        raise TypeError(
            f"{argument} is a PyTorch tensor that is sparse, or not yet materialized; accepted: "
            "strided tensors (x.to_dense(), x.resolve_neg())"
        )
    size = FLOATS[dtype]
    strides = tuple([step * size for step in x.stride()])
    return View(x, x.data_ptr(), dtype, tuple(x.shape), strides)


def _dlpack_view(x: Any, argument: str) -> View:
    if hasattr(x, "block_until_ready"):  # JAX computes behind the caller's back
        x.block_until_ready()
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except TypeError:  # an exporter of the first protocol, which has no such argument
        capsule = x.__dlpack__()
    # Never renamed to "used_...", the capsule frees the tensor when it is itself freed.
    name = next(name for name in DLPACK_CAPSULES if _capsule_is_valid(capsule, name))
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, name) + DLPACK_CAPSULES[name])
    code = DLPACK_CODES.get(tensor.code, f"DLPack type {tensor.code} of bits ")
    dtype = _float_name(f"{code}{tensor.bits}" + f"x{tensor.lanes}" * (tensor.lanes > 1), argument)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        steps = tuple(tensor.strides[: tensor.ndim])
    else:  # C-contiguous
        steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(tensor.ndim))
    address = (tensor.data or 0) + tensor.byte_offset
    return View(capsule, address, dtype, shape, tuple(step * FLOATS[dtype] for step in steps))


def _float_name(name: str, argument: str) -> str:
    if name not in FLOATS:
        raise TypeError(f"{argument} has dtype {name}; accepted: {', '.join(FLOATS)}")
    return name


def rows_of(
    view: View,
    axis: int,
    shape: tuple[int, ...],
    width: int,
    input: str,
    temperature: float,
    on_host: bool = True,
) -> Rows:
    """The first `width` entries along `axis` (negative) of every row, broadcast to `shape`.

    The host's rows get their offsets; a device makes its own.
    """
    row_stride, axes = _batch_axes(view.shape, view.strides, axis, shape)
    offsets = None
    if axes and on_host:
        offsets = np.zeros(1, np.int64)
        for length, step in axes:
            offsets = np.add.outer(offsets, np.arange(length, dtype=np.int64) * step).ravel()
    return Rows(
        view.owner, view.address, view.dtype, math.prod(shape), width, view.strides[axis],
        row_stride, offsets, input, temperature, axes,
    )  # fmt: skip


@functools.lru_cache(1024)
def _batch_axes(
    own: tuple[int, ...], strides: tuple[int, ...], axis: int, shape: tuple[int, ...]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Bytes from a row to the next in a batch of this shape; or 0, and the axes they lie along."""
    position = len(own) + axis
    lengths = own[:position] + own[position + 1 :]
    steps = strides[:position] + strides[position + 1 :]
    missing = len(shape) - len(lengths)
    steps = (0,) * missing + tuple(
        0 if length == 1 else step for length, step in zip(lengths, steps, strict=True)
    )
    # Neighbouring axes that follow each other in memory are one axis.
    merged: list[tuple[int, int]] = []
    for length, step in zip(shape, steps, strict=True):
        if length == 1:
            continue
        if merged and merged[-1][1] == step * length:
            merged[-1] = (merged[-1][0] * length, step)
        else:
            merged.append((length, step))
    if len(merged) > 1 and 0 not in shape:
        return 0, tuple(merged)
    return (merged[-1][1] if merged else 0), ()


def memory(view: View, writable: bool = False) -> NDArray[Any]:
    """The memory of a view as a NumPy array; bfloat16 as its bits, in uint16."""
    return np.asarray(Memory(view, writable))


def empty(shape: tuple[int, ...], dtype: str) -> tuple[NDArray[Any], View]:
    """New memory as `memory` gives it, and its view."""
    stored = np.empty(shape, STORAGE[dtype])
    address = stored.__array_interface__["data"][0]
    return stored, View(stored, address, dtype, shape, stored.strides)


def overlap(one: View, other: View) -> bool:
    """Whether two views share memory."""
    return np.shares_memory(memory(one), memory(other))


def decode(stored: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """Entries as `memory` gives them, converted exactly to float64."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def encode(values: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Round float64 values once to `dtype`, to nearest even; bfloat16 as its bits, in uint16."""
    with np.errstate(all="ignore"):  # a value above the range becomes an infinity, as in hardware
        if dtype != "bfloat16":
            return values.astype(dtype)
        # First to 8 significant bits within float64, then to float32 which holds those exactly.
        bits = np.array(values, np.float64).view(np.uint64)
        bits += 0xFFF_FFFF_FFFF + ((bits >> 45) & 1)
        bits &= np.uint64(0xFFFF_E000_0000_0000)
        single = bits.view(np.float64).astype(np.float32).view(np.uint32)
        # Below the normal range of float32 fewer bits are left: round there again.
        single += 0x7FFF + ((single >> 16) & 1)
        return np.where(np.isnan(values), 0x7FC0, single >> 16).astype(np.uint16)


def wrap(stored: NDArray[Any], dtype: str, place: Place, like: Any) -> Any:
    """Entries as `encode` gives them, as an array of the library and on the device of `like`.

    Where there are no axes, NumPy gets a scalar, as NumPy's own reductions give.
    """
    if place.kind == "PyTorch":
        torch = sys.modules["torch"]
        tensor = torch.from_numpy(stored)
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    if dtype == "bfloat16":
        stored = stored.view(numpy_bfloat16())
    if place.kind == "JAX":
        return sys.modules["jax"].device_put(stored, like.device)
    if place.kind != "NumPy" and hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().from_dlpack(stored)
    return stored[()]


def numpy_bfloat16() -> np.dtype[Any]:
    """NumPy's bfloat16, which the package ml_dtypes defines."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise TypeError(
            "dtype is bfloat16, which NumPy has through ml_dtypes (pip install ml_dtypes)"
        ) from None
    dtype: np.dtype[Any] = np.dtype(bfloat16)
    return dtype


def dtype_name(dtype: Any, argument: str) -> str:
    """The name of a result dtype given as text, or as a dtype of NumPy, PyTorch or JAX."""
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
    return _float_name(name, argument)


def host_array(x: Any, argument: str, place: Place) -> Any:
    """An array with one entry a row, such as targets, as NumPy sees it, or as it is on a device.

    It is a number, a list, a NumPy array, or of the library and device of the logits (`place`).
    """
    if isinstance(x, bool | int | list | tuple | np.generic):
        return np.asarray(x)
    given = place_of(x, argument)
    if given == place and place.device != "cpu":
        return x
    if given.device != "cpu" or given.kind not in ("NumPy", place.kind):
        raise TypeError(f"{argument} is {given}, and the logits are {place}; accepted: the same")
    if given.kind == "PyTorch":
        return np.asarray(x.detach())
    return np.asarray(x) if hasattr(x, "__array__") else np.from_dlpack(x)

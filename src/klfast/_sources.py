"""Logits wherever they are, read as rows: arrays, and ``.npy``, ``.npz``, ``.safetensors`` files.

A file is memory-mapped where its format allows it, so that opening one costs nothing and files
larger than memory work; a compressed ``.npz`` member is decompressed as its rows are asked for.
Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ._arrays import dtype_name

SUFFIXES = (".npy", ".npz", ".safetensors")

_INSTALL = 'pip install "klfast[eval]"'
_SAFETENSORS_DTYPES = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "bfloat16", "BOOL": "?",
    "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


class SourceError(ValueError):
    """A file or array cannot serve as logits or targets; one line says which, and why."""


@runtime_checkable
class LogitSource(Protocol):
    """Rows of logits, wherever they come from.

    An evaluation reads rows in order, a chunk at a time, and asks for nothing else.
    """

    @property
    def name(self) -> str:
        """What messages and reports call this source, for example the file's path."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., V)``: rows are numbered along the flattened leading axes."""

    @property
    def dtype(self) -> str:
        """Name of the dtype: float16, bfloat16, float32 or float64."""

    def read(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` as an array of shape ``(stop - start, V)``."""


class ArraySource:
    """Rows of an array that is in memory or memory-mapped: views of it, wherever that is possible.

    ``array`` is a NumPy array or of any other kind that `klfast.compare` takes; its last axis is
    the vocabulary.
    """

    def __init__(self, array: Any, name: str) -> None:
        self.name = name
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = _checked_dtype(name, self.shape, array.dtype)
        # A reshape of a NumPy array that is not contiguous would copy the whole of it.
        self._gather = (
            isinstance(array, np.ndarray) and array.ndim > 2 and not array.flags.c_contiguous
        )
        self._array = array if self._gather else array.reshape(-1, self.shape[-1])

    def read(self, start: int, stop: int) -> Any:
        if self._gather:
            index = np.unravel_index(np.arange(start, stop), self.shape[:-1])
            rows = self._array[index]
        else:
            rows = self._array[start:stop]
        if isinstance(rows, np.ndarray) and not (rows.flags.aligned and rows.dtype.isnative):
            # Members of an .npz begin at any byte, and files may be of the other byte order.
            return rows.astype(rows.dtype.newbyteorder("="))
        return rows


class CompressedSource:
    """Rows of a compressed ``.npz`` member, decompressed as they are read.

    Needs the memory of one chunk. Reading in order decompresses the member once; going back
    starts over.
    """

    def __init__(self, array: _CompressedArray, name: str) -> None:
        self.name = name
        self.shape = array.shape
        self.dtype = _checked_dtype(name, array.shape, array.dtype)
        self._array = array

    def read(self, start: int, stop: int) -> NDArray[Any]:
        width = self.shape[-1]
        with _reasons_named(self.name):
            return self._array.entries(start * width, stop * width).reshape(stop - start, width)


def open_logits(path: str | os.PathLike[str], key: str | None = None) -> LogitSource:
    """Open a file of logits without reading it.

    Parameters
    ----------
    path
        A ``.npy``, ``.npz`` or ``.safetensors`` file of float16, bfloat16 (``.safetensors``
        only), float32 or float64 numbers, of shape ``(..., V)``: leading axes are flattened.
    key
        Name of the array in an ``.npz`` or ``.safetensors`` file. By default the only one, or
        the one named ``logits``.

    Raises
    ------
    SourceError
        If the file is missing, unreadable, empty, truncated, pickled, or holds something else.
        The message is one line that begins with the file's name.
    """
    name = os.fspath(path)
    with _reasons_named(name):
        array = _open_array(Path(path), key, "logits")
    if isinstance(array, _CompressedArray):
        return CompressedSource(array, name)
    return ArraySource(array, name)


def open_targets(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The integers in a file of targets; the array must be the file's only one or ``targets``.

    Raises `SourceError` as `open_logits` does.
    """
    name = os.fspath(path)
    with _reasons_named(name):
        array = _open_array(Path(path), None, "targets")
        if not np.issubdtype(array.dtype, np.integer):
            raise SourceError(f"{name}: holds {array.dtype.name}; targets must be integers")
        if isinstance(array, _CompressedArray):
            return array.entries(0, math.prod(array.shape)).reshape(array.shape)
        return array


def _checked_dtype(name: str, shape: tuple[int, ...], dtype: Any) -> str:
    """Name of the dtype, if it and the shape can be those of logits."""
    try:
        known = dtype_name(dtype, f"{name}:")
    except TypeError as error:
        raise SourceError(str(error)) from error
    if not shape:
        raise SourceError(f"{name}: holds a single number; logits must have a vocabulary axis")
    if shape[-1] == 0:
        raise SourceError(f"{name}: has shape {shape}; the vocabulary is empty")
    return known


@contextmanager
def _reasons_named(name: str) -> Iterator[None]:
    """Whatever goes wrong with a file becomes one line that names it."""
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror or error}") from error
    except Exception as error:  # the parsers meet damage with exceptions of a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{name}: cannot be read ({reason})") from error


def _open_array(path: Path, key: str | None, usual: str) -> NDArray[Any] | _CompressedArray:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SourceError(f"{path}: unknown kind of file; accepted are {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise SourceError(f"{path}: is empty (0 bytes)")
    if suffix == ".npz":
        return _open_npz(path, key, usual)
    if suffix == ".safetensors":
        return _open_safetensors(path, key, usual)
    if key is not None:
        raise SourceError(f"{path}: a .npy file holds one array and no names, so no {key!r}")
    with path.open("rb") as file:
        return _map_npy(path, file, 0, path.stat().st_size)


def _choose(path: Path, names: Sequence[str], key: str | None, usual: str) -> str:
    if not names:
        raise SourceError(f"{path}: holds no array")
    if key is None:
        if len(names) == 1:
            return names[0]
        key = usual
    if key not in names:
        shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
        raise SourceError(f"{path}: holds no array named {key!r}; there are: {shown}")
    return key


# .npy and .npz


def _npy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether Fortran order, and dtype, leaving ``file`` at the first byte of data."""
    magic = file.read(len(np.lib.format.MAGIC_PREFIX) + 2)
    if magic[:1] == b"\x80":
        raise SourceError(f"{path}: is a pickle, which is never loaded; save it with numpy.save")
    if not magic.startswith(np.lib.format.MAGIC_PREFIX):
        raise SourceError(f"{path}: does not begin like a .npy file")
    version = tuple(magic[len(np.lib.format.MAGIC_PREFIX) :])
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(file)
    else:
        raise SourceError(f"{path}: has .npy format version {version}; 1.0 and 2.0 can be read")
    shape, fortran, dtype = header
    if dtype.hasobject:
        raise SourceError(f"{path}: holds pickled Python objects, which are never loaded")
    if min(shape, default=0) < 0:
        raise SourceError(f"{path}: is damaged: its header says shape {shape}")
    return shape, fortran, dtype


def _map_npy(path: Path, file: IO[bytes], start: int, size: int) -> NDArray[Any]:
    """Memory-map the .npy file that lies in ``size`` bytes of ``file`` from ``start`` on."""
    file.seek(start)
    shape, fortran, dtype = _npy_header(path, file)
    offset = file.tell()
    return _map(path, dtype, offset, shape, start + size - offset, "F" if fortran else "C")


def _map(
    path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...], there: int, order: str
) -> NDArray[Any]:
    promised = math.prod(shape) * dtype.itemsize
    if there < promised:
        raise SourceError(f"{path}: is truncated: {promised} bytes promised, {there} there")
    if promised == 0:
        return np.empty(shape, dtype)
    mapped = np.memmap(path, np.uint8, "r", offset, (promised,))
    # The map stays alive as the base of this plain array.
    return np.ndarray(shape, dtype, mapped, order="F" if order == "F" else "C")


class _CompressedArray:
    """A compressed .npz member: shape, dtype, and its entries in the order they are stored."""

    def __init__(self, path: Path, member: IO[bytes]) -> None:
        weakref.finalize(self, member.close)
        self.shape, fortran, self.dtype = _npy_header(path, member)
        if fortran and len(self.shape) > 1:
            raise SourceError(
                f"{path}: is compressed in Fortran order, so no row lies together; "
                "save it in C order or uncompressed (numpy.savez)"
            )
        self._member = member
        self._offset = member.tell()

    def entries(self, start: int, stop: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        # Going forward reads on; going back makes zipfile decompress from the beginning.
        self._member.seek(self._offset + start * size)
        wanted = (stop - start) * size
        data = self._member.read(wanted)
        if len(data) < wanted:
            raise EOFError(f"truncated: {wanted} bytes expected, {len(data)} there")
        values = np.frombuffer(data, self.dtype)
        return values.astype(self.dtype.newbyteorder("="), copy=False)


def _open_npz(path: Path, key: str | None, usual: str) -> NDArray[Any] | _CompressedArray:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{path}: is truncated or not an .npz file ({error})") from error
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        member = archive.getinfo(_choose(path, names, key, usual) + ".npy")
        if member.flag_bits & 1:
            raise SourceError(f"{path}: is encrypted")
        if member.compress_type != zipfile.ZIP_STORED:
            # An open member keeps the file open after its archive is closed.
            return _CompressedArray(path, archive.open(member))
    with path.open("rb") as file:
        # The local header repeats the name and may carry extra fields of another length than
        # those in the directory: only it says where the data begins.
        file.seek(member.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise SourceError(f"{path}: is damaged: no zip entry where its directory says")
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        start = member.header_offset + 30 + name_length + extra_length
        return _map_npy(path, file, start, min(member.file_size, path.stat().st_size - start))


# .safetensors


def _open_safetensors(path: Path, key: str | None, usual: str) -> NDArray[Any]:
    """Memory-map one tensor.

    The safetensors package checks the header, but copies what it reads into new memory. Its
    header says where a tensor's bytes lie, and those are mapped here instead.
    """
    safetensors = _import("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="numpy") as checked:
            name = _choose(path, sorted(checked.keys()), key, usual)
    except safetensors.SafetensorError as error:
        raise SourceError(f"{path}: is truncated or not a .safetensors file ({error})") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[name]
    code = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if code is None:
        raise SourceError(f"{path}: {name!r} holds {entry['dtype']}, which cannot be read")
    dtype = np.dtype(_import("ml_dtypes", path).bfloat16 if code == "bfloat16" else code)
    begin, end = entry["data_offsets"]
    return _map(path, dtype, 8 + length + begin, tuple(entry["shape"]), end - begin, "C")


def _import(package: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SourceError(f"{path}: reading it needs the package {package}: {_INSTALL}") from error

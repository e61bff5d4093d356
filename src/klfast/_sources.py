"""Logits wherever they are, read as rows: arrays, files, folders of files.

A file is memory-mapped where its format allows it, so that opening one costs nothing and files
larger than memory work; a compressed ``.npz`` member and Zarr chunks are decompressed as their
rows are asked for. Nothing is ever unpickled.
"""

from __future__ import annotations

import glob
import importlib
import itertools
import json
import math
import mmap
import os
import re
import struct
import weakref
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ._arrays import dtype_name

SUFFIXES = (".npy", ".npz", ".safetensors")

_INDEX = ".index.json"
# A Zarr chunk of more than this is not held at once.
_BAND_BYTES = 256 * 2**20

_SAFETENSORS_DTYPES = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "bfloat16", "BOOL": "?",
    "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


class SourceError(ValueError):
    """A file or array cannot serve as logits or targets; one line says which, and why.

    `file` is the name of the file, where it is known that one cannot be read, and `doubtful` the
    rows of which nothing is to be believed then, from the first to the one after the last.
    """

    file: str | None = None
    doubtful: tuple[int, int] = (0, 0)


class _NoLogitsError(SourceError):
    """An array of something else."""


_SHARDS = (
    "read as shards, which must be alike; name some of them with a quoted pattern, such as "
    "'base-*.npy'"
)


@runtime_checkable
class LogitSource(Protocol):
    """Rows of logits, wherever they come from.

    An evaluation reads rows in order, a chunk at a time. These may be there too: ``unit_rows``,
    how many rows are best read at a time, or a multiple of it; ``row_bytes``, read for each;
    ``memory``, bytes held beside the rows; ``files``, what a checkpoint is to watch.
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


Logits: TypeAlias = "str | os.PathLike[str] | LogitSource | Any"


class ArraySource:
    """Rows of an array that is in memory or memory-mapped: views of it, wherever that is possible.

    ``array`` is a NumPy array or of any other kind that `klfast.compare` takes; its last axis is
    the vocabulary.
    """

    mapped = True  # nothing is held beside the array itself

    def __init__(self, array: Any, name: str, file: _Opened | None = None) -> None:
        self.name = name
        self._file = file
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = _checked_dtype(name, self.shape, array.dtype)
        # A reshape of a NumPy array that is not contiguous would copy the whole of it.
        self._gather = (
            isinstance(array, np.ndarray) and array.ndim > 2 and not array.flags.c_contiguous
        )
        self._array = array if self._gather else array.reshape(-1, self.shape[-1])

    def read_ahead(self, start: int, stop: int) -> None:
        """Have the system read these rows of a mapped file, and do not wait for it."""
        self._advise("MADV_WILLNEED", start, stop)

    def release(self, start: int, stop: int) -> None:
        """Give the pages of these rows of a mapped file back, which count as this process's."""
        self._advise("MADV_DONTNEED", start, stop)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        mapped: Any = self._array
        while mapped is not None and not isinstance(mapped, mmap.mmap):
            mapped = getattr(mapped, "base", None)
        if mapped is None or start == stop or not hasattr(mmap, advice):  # as on Windows
            return
        first, last = np.lib.array_utils.byte_bounds(self._array[start:stop])
        begin = np.frombuffer(mapped, np.uint8).ctypes.data
        # Rows beside these lose a page at either end, and have it mapped again.
        page = (first - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(getattr(mmap, advice), page, last - begin - page)

    def check(self, start: int, stop: int) -> None:
        """Raise if the file is not what was mapped: rows read meanwhile may be anything."""
        if self._file is not None:
            self._file.check()

    def read(self, start: int, stop: int) -> Any:
        self.check(start, stop)
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
        try:
            with _reasons_named(self.name):
                return self._array.entries(start * width, stop * width).reshape(stop - start, width)
        except SourceError as error:
            # Before damage shows, what is decompressed may be wrong.
            error.doubtful = 0, math.prod(self.shape[:-1])
            raise


class _Opened:
    """A file as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._state()

    def _state(self) -> tuple[int, int, int]:
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raise if it has changed since."""
        with _reasons_named(str(self._path)):
            now = self._state()
            if now[1] < self._known[1]:
                raise SourceError(
                    f"{self._path}: was truncated while it was read: {self._known[1]} bytes "
                    f"before, {now[1]} now"
                )
            if now != self._known:
                raise SourceError(f"{self._path}: has changed since it was opened")


class MissingSource:
    """Rows of a shard that cannot be read, where it is known how many there are."""

    def __init__(self, reason: SourceError, shape: tuple[int, ...], dtype: str) -> None:
        self.name = str(reason.file)
        self.shape, self.dtype = shape, dtype
        self._reason = reason

    def read(self, start: int, stop: int) -> NDArray[Any]:
        error = SourceError(*self._reason.args)
        error.file = self._reason.file
        raise error


Entry: TypeAlias = "LogitSource | SourceError"
Entries: TypeAlias = Mapping[str, Entry]


class ShardedSource:
    """Rows of several sources, one after the other."""

    def __init__(
        self,
        shards: Sequence[LogitSource],
        name: str,
        files: Sequence[Path],
        entries: Entries = MappingProxyType({}),
    ) -> None:
        #: Shards by name, with those that cannot be read, whose rows are left out.
        self.entries = entries
        self.name = name
        self.files = tuple(map(str, files))
        first = shards[0]
        self.dtype = first.dtype
        for each in shards:
            if (each.dtype, each.shape[-1]) != (first.dtype, first.shape[-1]):
                raise SourceError(
                    f"{each.name}: has rows of {each.shape[-1]} {each.dtype}, but {first.name} of "
                    f"{first.shape[-1]} {first.dtype}; all files of {name} are {_SHARDS}"
                )
            if hasattr(each, "targets"):
                raise SourceError(f"{each.name}: a file of llama.cpp is compared by itself")
        counts = [math.prod(each.shape[:-1]) for each in shards]
        alike = len({(len(each.shape), each.shape[1:]) for each in shards}) == 1
        self.shape = (
            (sum(each.shape[0] for each in shards), *first.shape[1:])
            if alike and len(first.shape) > 1
            else (sum(counts), first.shape[-1])
        )
        self.mapped = all(isinstance(each, (ArraySource, MissingSource)) for each in shards)
        self.shards = tuple(shards)
        #: The rows of every shard, of which the last may have fewer; 0 where they differ.
        self.shard_rows = counts[0] if {*counts[:-1]} == {max(counts)} else 0
        self._starts = list(itertools.accumulate(counts, initial=0))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[LogitSource, int, int, int]]:
        """The shards that hold these rows: where each begins, and its rows, first and last."""
        # The last one of those that begin there: others have no rows.
        holder = bisect_right(self._starts, start, hi=len(self.shards)) - 1
        for number in range(holder, len(self.shards)):
            begin, end = self._starts[number : number + 2]
            if begin >= stop:
                return
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield self.shards[number], begin, first - begin, last - begin

    def read(self, start: int, stop: int) -> NDArray[Any]:
        parts = []
        for shard, begin, *rows in self._parts(start, stop):
            try:
                parts.append(shard.read(*rows))
            except SourceError as error:
                first, last = error.doubtful
                error.doubtful = begin + first, begin + last
                raise
        if len(parts) == 1:
            found: NDArray[Any] = parts[0]  # not copied
            return found
        return np.concatenate(parts) if parts else self.shards[0].read(0, 0)

    def read_ahead(self, start: int, stop: int) -> None:
        """Have the system read these rows of mapped files, and do not wait for it."""
        for shard, _, *rows in self._parts(start, stop):
            if isinstance(shard, ArraySource):
                shard.read_ahead(*rows)

    def release(self, start: int, stop: int) -> None:
        """Give the pages of these rows of mapped files back, which count as this process's."""
        for shard, _, *rows in self._parts(start, stop):
            if isinstance(shard, ArraySource):
                shard.release(*rows)

    def check(self, start: int, stop: int) -> None:
        """Raise if a file with some of these rows is not what it was."""
        for shard, _, *rows in self._parts(start, stop):
            if isinstance(shard, ArraySource):
                shard.check(*rows)


class ZarrSource:
    """Rows of a Zarr array, whose chunks are decompressed as they are read."""

    def __init__(self, array: Any, name: str) -> None:
        self.name = name
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = _checked_dtype(name, self.shape, array.dtype)
        self._array = array
        self._inner = math.prod(self.shape[1:-1])  # rows under one index of the first axis
        band = array.chunks[0] * self._inner if len(self.shape) > 1 else 1
        # Read by whole chunks, each is decompressed once, if they are not too large for that.
        size = band * self.shape[-1] * array.dtype.itemsize
        self.unit_rows = max(1, band) if size <= _BAND_BYTES else 1

    def read(self, start: int, stop: int) -> NDArray[Any]:
        width = self.shape[-1]
        with _reasons_named(self.name):
            if len(self.shape) == 1:
                return np.asarray(self._array[...]).reshape(1, width)[start:stop]
            if start == stop:
                return np.empty((0, width), self._array.dtype)
            first, last = start // self._inner, -(-stop // self._inner)
            rows = np.asarray(self._array[first:last]).reshape(-1, width)
            part = rows[start - first * self._inner : stop - first * self._inner]
            return part.astype(part.dtype.newbyteorder("="), copy=False)


def open_logits(path: str | os.PathLike[str], key: str | None = None) -> LogitSource:
    """Open logits in files, without reading them.

    Parameters
    ----------
    path
        One of these, of float16, bfloat16 (``.safetensors`` only), float32 or float64 numbers of
        shape ``(..., V)``, whose leading axes are flattened:

        - a ``.npy``, ``.npz`` or ``.safetensors`` file;
        - the ``.index.json`` of ``.safetensors`` files: the array that ``key`` names, or all of
          them, one after the other;
        - a Zarr array, or a group that holds one (needs the package zarr);
        - a base-logits file of llama.cpp, which is known by its first bytes (`BaseLogits` of
          `klfast.llama_cpp`);
        - a folder of such files, or a pattern such as ``logits-*.npy``: their rows one after the
          other, with 10 after 9 in the order of names.
    key
        Name of the array, in what holds several. By default the only one, or the one named
        ``logits``.

    Raises
    ------
    SourceError
        If a file is missing, unreadable, empty, truncated, pickled, or holds something else.
        The message is one line that begins with the file's name.

    Notes
    -----
    Files that are not compressed are memory-mapped. One that another program makes shorter, before
    rows that are gone are read, is a SourceError; in the very moment in which they are read it ends
    the process by SIGBUS, as with every memory map: only a signal handler, which is the process's
    own, could prevent that.
    """
    source = open_available(path, key)
    if isinstance(source, ShardedSource):
        for each in source.entries.values():
            if isinstance(each, SourceError):
                raise each
    return source


def open_available(path: str | os.PathLike[str], key: str | None = None) -> LogitSource:
    """As `open_logits`; of shards those that can be read."""
    name = os.fspath(path)
    if not name:
        raise SourceError("the name of a file of logits is empty")
    place = Path(path)
    with _reasons_named(name):
        if place.is_dir():
            if any((place / each).exists() for each in ("zarr.json", ".zarray", ".zgroup")):
                return ZarrSource(_open_zarr(place, key), name)
            return _open_shards(sorted(place.iterdir(), key=_natural), name, key)
        if not place.exists() and any(sign in name for sign in "*?["):
            found = sorted(map(Path, glob.glob(name)), key=_natural)  # noqa: PTH207 - may be absolute
            if not found:
                raise SourceError(f"{name}: matches no file")
            return _open_shards(found, name, key)
        if name.endswith(_INDEX):
            return _open_index(place, key)
        if place.suffix.lower() not in SUFFIXES and _begins_like_llama(place):
            from .llama_cpp import BaseLogits

            if key is not None:
                raise SourceError(f"{name}: holds one array and no names, so no {key!r}")
            return BaseLogits(path)
        file = _Opened(place)
        array = _open_array(place, key, "logits")
    if isinstance(array, _CompressedArray):
        return CompressedSource(array, name)
    return ArraySource(array, name, file)


def as_source(logits: Logits, role: str, key: str | None = None) -> LogitSource:
    """Logits of any kind as something to read rows from; ``role`` names an array."""
    if isinstance(logits, (str, os.PathLike)):
        name = os.fspath(logits)
        if name.endswith(".json") and not name.endswith(".index.json"):
            from ._heads import open_description

            return open_description(logits)
        return open_available(logits, key)
    if isinstance(logits, LogitSource):
        return logits
    if hasattr(logits, "shape") and hasattr(logits, "dtype"):
        return ArraySource(logits, role)
    raise TypeError(
        f"{role} is of type {type(logits).__name__}; accepted: a path, an array, or a LogitSource"
    )


def open_column(path: str | os.PathLike[str], what: str = "targets") -> NDArray[Any]:
    """What a file has of each row; the array must be the file's only one or have this name.

    ``where`` must be booleans, everything else integers. Raises `SourceError` as `open_logits`
    does.
    """
    name = os.fspath(path)
    with _reasons_named(name):
        array = _open_array(Path(path), None, what)
        check_column(name, array.dtype, what)
        if isinstance(array, _CompressedArray):
            return array.entries(0, math.prod(array.shape)).reshape(array.shape)
        return array


def check_column(name: str, dtype: np.dtype[Any], what: str) -> None:
    """Raise SourceError unless a column of this dtype can be what it is said to be."""
    kind, said = (np.bool_, "booleans") if what == "where" else (np.integer, "integers")
    if not np.issubdtype(dtype, kind):
        raise SourceError(f"{name}: holds {dtype.name}; {what} must be {said}")


def _checked_dtype(name: str, shape: tuple[int, ...], dtype: Any) -> str:
    """Name of the dtype, if it and the shape can be those of logits."""
    try:
        known = dtype_name(dtype, f"{name}:")
    except TypeError as error:
        raise _NoLogitsError(str(error)) from error
    if not shape:
        raise _NoLogitsError(f"{name}: holds a single number; logits must have a vocabulary axis")
    if shape[-1] == 0:
        raise _NoLogitsError(f"{name}: has shape {shape}; the vocabulary is empty")
    return known


@contextmanager
def _reasons_named(name: str) -> Iterator[None]:
    """Whatever goes wrong with a file becomes one line that names it."""
    try:
        try:
            yield
        except SourceError:
            raise
        except OSError as error:
            raise SourceError(f"{name}: {error.strerror or error}") from error
        except Exception as error:  # the parsers meet damage with exceptions of a dozen kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SourceError(f"{name}: cannot be read ({reason})") from error
    except SourceError as error:
        error.file = error.file or name
        raise


def _open_array(path: Path, key: str | None, usual: str) -> NDArray[Any] | _CompressedArray:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        if not path.stat().st_size:  # and whether it is there
            raise SourceError(f"{path}: is empty (0 bytes)")
        raise SourceError(
            f"{path}: unknown kind of file; accepted are {', '.join(SUFFIXES)}, .index.json, Zarr, "
            "and base-logits files of llama.cpp"
        )
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
    given = key is not None
    if key is None:
        if len(names) == 1:
            return names[0]
        key = usual
    if key not in names:
        shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
        hint = "; choose one with key (--key)" if usual == "logits" and not given else ""
        raise SourceError(f"{path}: holds no array named {key!r}; there are: {shown}{hint}")
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


def _import(package: str, path: Path, extra: str = "eval") -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SourceError(
            f'{path}: reading it needs the package {package}: pip install "klfast[{extra}]"'
        ) from error


# Several files


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key of a name in which numbers count as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _open_shards(files: Sequence[Path], name: str, key: str | None) -> LogitSource:
    """The rows of all files; a folder may hold other files too."""
    indices = [each for each in files if each.name.endswith(_INDEX)]
    if len(indices) == 1:
        return _open_index(indices[0], key)
    files = [each for each in files if each.suffix.lower() in SUFFIXES]
    if not files:
        raise SourceError(f"{name}: holds no {', '.join(SUFFIXES)} file")
    entries: dict[str, Entry] = {}
    for each in files:
        try:
            entries[str(each)] = open_logits(each, key)
        except _NoLogitsError as error:  # whole, and nothing that could be lost
            raise SourceError(f"{error}; all files of {name} are {_SHARDS}") from error
        except SourceError as error:
            entries[str(each)] = error
    return _sharded(entries, name, files)


def _sharded(entries: Entries, name: str, files: Sequence[Path]) -> ShardedSource:
    """A source of those that can be read; if none can, the first reason why is raised."""
    shards = [each for each in entries.values() if not isinstance(each, SourceError)]
    if not shards:
        raise next(each for each in entries.values() if isinstance(each, SourceError))
    return ShardedSource(shards, name, files, entries)


def _open_index(path: Path, key: str | None) -> LogitSource:
    """Arrays of ``.safetensors`` files by their index, of the kind that transformers writes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(each, str) for each in places.values()):
        raise SourceError(f"{path}: has no weight_map, which says what file an array is in")
    for each in places.values():
        if Path(each).name != each:
            raise SourceError(f"{path}: names {each!r}, which is not a file beside it")
    if key is None and "logits" not in places:
        names = sorted(places, key=lambda name: _natural(Path(name)))
        if not names:
            raise SourceError(f"{path}: holds no array")
    else:
        names = [_choose(path, sorted(places), key, "logits")]
    files = [path.parent / places[each] for each in names]
    entries: dict[str, Entry] = {}
    for file, each in zip(files, names, strict=True):
        try:
            entries[each] = open_logits(file, each)
        except SourceError as error:
            entries[each] = error
    source = _sharded(entries, os.fspath(path), list(dict.fromkeys([path, *files])))
    if len(names) == 1:
        source.shape = source.shards[0].shape
    return source


def _begins_like_llama(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"_logits_"


def _open_zarr(path: Path, key: str | None) -> Any:
    zarr = _import("zarr", path, "zarr")
    opened = zarr.open(path, mode="r")
    if hasattr(opened, "arrays"):
        arrays = dict(opened.arrays())
        opened = arrays[_choose(path, sorted(arrays), key, "logits")]
    elif key is not None:
        raise SourceError(f"{path}: is one array and has no names, so no {key!r}")
    if opened.dtype.hasobject or "pickle" in json.dumps(opened.metadata.to_dict(), default=repr):
        raise SourceError(f"{path}: holds pickled Python objects, which are never loaded")
    return opened

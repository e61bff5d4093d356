"""Memory of the device: pages of the host with an unreadable one behind, full of NaN at first."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .stream import when_idle

GAP = 0xE5  # what lies between the end of an allocation and the next multiple of 512 bytes
limit: int | None = None  # bytes in all before OutOfMemoryError
used = 0
faults: list[str] = []  # what was found wrong when memory was freed

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OutOfMemoryError(MemoryError):
    """The device has no more memory."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes, "
            f"limit set to: {limit:,} bytes)."
        )


class Memory:
    """One allocation."""

    def __init__(self, size: int, kind: str) -> None:
        global used
        if kind == "device" and limit is not None and used + size > limit:
            raise OutOfMemoryError(size, used, limit)
        self.size = size
        self.kind = kind
        self._room = -(-size // 512) * 512
        pages = -(-self._room // mmap.PAGESIZE) * mmap.PAGESIZE
        self._length = pages + mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = _libc.mmap(None, self._length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise OutOfMemoryError(size, used)
        self._start: int = start
        _libc.mprotect(start + pages, mmap.PAGESIZE, 0)  # not to be read
        self.ptr: int = start + pages - self._room
        ctypes.memset(self.ptr, 0xFF, size)
        ctypes.memset(self.ptr + size, GAP, self._room - size)
        used += size if kind == "device" else 0
        _live[self.ptr] = self.size, kind

    def __del__(self) -> None:
        if hasattr(self, "ptr"):
            when_idle(_Freeing(self))


class _Freeing:
    """What is left of an allocation, until everything queued before has run."""

    def __init__(self, memory: Memory) -> None:
        self.__dict__.update(memory.__dict__)

    def __call__(self) -> None:
        global used
        gap = ctypes.string_at(self.ptr + self.size, self._room - self.size)
        if gap.strip(bytes([GAP])):
            faults.append(f"a kernel wrote beyond an allocation of {self.size} bytes")
        used -= self.size if self.kind == "device" else 0
        del _live[self.ptr]
        _libc.munmap(self._start, self._length)

    _start: int
    _length: int
    _room: int
    ptr: int
    size: int
    kind: str


_live: dict[int, tuple[int, str]] = {}


def _kind(address: int, size: int) -> str | None:
    for start, (length, kind) in list(_live.items()):
        if start <= address and address + size <= start + length:
            return kind
    return None


def on_device(address: int, size: int = 1) -> bool:
    """Whether a kernel may read there: memory of the device, or pinned."""
    return _kind(address, size) is not None


def pinned(address: int, size: int = 1) -> bool:
    return _kind(address, size) == "pinned"


class MemoryPointer:
    """An address, and what keeps it alive."""

    def __init__(self, mem: Memory | UnownedMemory | None, offset: int) -> None:
        self.mem = mem
        self.ptr = mem.ptr + offset if mem else 0

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr + offset - self.mem.ptr if self.mem else 0)

    def lend(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """All of it as NumPy sees it: for the twin itself."""
        assert self.mem is not None
        return np.asarray(_Lent(self, self.mem.ptr + self.mem.size - self.ptr))


class _Lent:
    def __init__(self, owner: MemoryPointer, size: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (owner.ptr, False),
            "typestr": "|u1",
            "shape": (size,),
        }


class UnownedMemory:
    """Memory of somebody else."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr = ptr
        self.size = size
        self._owner = owner


def _malloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size, "device") if size else None, 0)


def pool(size: int) -> MemoryPointer:
    """What CuPy's pool gives."""
    return _malloc(size)


def malloc_async(size: int) -> MemoryPointer:
    """Memory in the order of the stream, which a captured graph allocates itself."""
    return _malloc(size)


_current = threading.local()


def alloc(size: int) -> MemoryPointer:
    found: MemoryPointer = (getattr(_current, "allocator", None) or pool)(size)
    return found


@contextmanager
def using_allocator(allocator: Any) -> Iterator[None]:
    before = getattr(_current, "allocator", None)
    _current.allocator = allocator
    try:
        yield
    finally:
        _current.allocator = before


def alloc_pinned_memory(size: int) -> Any:
    """An object with `ptr` and the buffer protocol; longer than asked for, as the pool gives."""
    memory = Memory(-(-max(size, 1) // 512) * 512, "pinned")
    pointer: Any = type("PinnedMemoryPointer", (ctypes.c_ubyte * memory.size,), {})
    pointer = pointer.from_address(memory.ptr)
    pointer.mem = memory
    pointer.ptr = memory.ptr
    return pointer

"""Calls of the CUDA runtime."""

from __future__ import annotations

import ctypes
from functools import partial

memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = range(4)  # noqa: N816
device_count = 1  # or an exception to raise


class CUDARuntimeError(RuntimeError):
    """A call failed."""

    def __init__(self, status: object) -> None:
        super().__init__(f"cudaErrorTwin: {status}")
        self.status = status


def getDeviceCount() -> int:  # noqa: N802
    return device_count


def driverGetVersion() -> int:  # noqa: N802
    return 13000


def runtimeGetVersion() -> int:  # noqa: N802
    return 13000


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
    """Copy; memory of the host that is not pinned is done with when this returns."""
    from . import memory
    from .stream import queue_of

    lazy = True
    for what, address, there in (("dst", dst, kind in (1, 3)), ("src", src, kind in (2, 3))):
        if there and not memory.on_device(address, size):
            raise CUDARuntimeError(f"{what} = {address:#x}, {size} bytes: no device memory")
        if not there and memory.on_device(address) and not memory.pinned(address):
            raise CUDARuntimeError(f"{what} = {address:#x} is device memory")
        lazy = lazy and (there or memory.pinned(address, size))
    queue = queue_of(stream)
    queue.submit(partial(ctypes.memmove, dst, src, size))
    if not lazy:
        queue.drain()


def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:  # noqa: N802
    from . import memory
    from .stream import queue_of

    if not memory.on_device(ptr, size):
        raise CUDARuntimeError(f"ptr = {ptr:#x}, {size} bytes: no device memory")
    queue_of(stream).submit(partial(ctypes.memset, ptr, value, size))

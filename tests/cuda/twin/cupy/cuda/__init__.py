"""The device, its memory and its streams."""

from . import compiler, device, memory, runtime, stream
from .device import Device
from .memory import (
    MemoryPointer,
    UnownedMemory,
    alloc,
    alloc_pinned_memory,
    malloc_async,
    using_allocator,
)
from .stream import Event, ExternalStream, Stream, get_current_stream

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "MemoryPointer",
    "Stream",
    "UnownedMemory",
    "alloc",
    "alloc_pinned_memory",
    "compiler",
    "device",
    "get_current_stream",
    "malloc_async",
    "memory",
    "runtime",
    "stream",
    "using_allocator",
]

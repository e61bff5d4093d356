"""The device, its memory and its streams."""

from . import compiler, device, memory, runtime, stream
from .device import Device
from .memory import alloc, alloc_pinned_memory
from .stream import Event, ExternalStream, Stream, get_current_stream

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "Stream",
    "alloc",
    "alloc_pinned_memory",
    "compiler",
    "device",
    "get_current_stream",
    "memory",
    "runtime",
    "stream",
]

"""The one device, like a small H100; tests may change what it says of itself."""

from __future__ import annotations

from .runtime import CUDARuntimeError

capability = "90"
attributes = {
    "ClockRate": 1_980_000,
    "L2CacheSize": 1 << 20,
    "MaxSharedMemoryPerBlock": 49152,
    "MaxSharedMemoryPerBlockOptin": 232448,
    "MaxSharedMemoryPerMultiprocessor": 233472,
    "MaxThreadsPerBlock": 1024,
    "MaxThreadsPerMultiProcessor": 2048,
    "MultiProcessorCount": 4,
    "ReservedSharedMemoryPerBlock": 1024,
    "WarpSize": 32,
}


class Device:
    """A device by number."""

    def __init__(self, device: int | None = None) -> None:
        if device not in (None, 0):
            raise CUDARuntimeError(f"invalid device ordinal {device}")
        self.id = 0

    @property
    def attributes(self) -> dict[str, int]:
        return dict(attributes)

    @property
    def compute_capability(self) -> str:
        return capability

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0

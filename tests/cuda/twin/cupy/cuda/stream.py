"""Streams that run at once, or as late as they may: when somebody waits."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

deferred = False


class Queue:
    """What a stream has yet to do."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()

    def submit(self, work: Callable[[], object]) -> None:
        self.waiting.append(work)
        if not deferred:
            self.drain()

    def drain(self, last: Callable[[], object] | None = None) -> None:
        """Do everything, or what comes up to `last`."""
        while self.waiting:
            work = self.waiting.popleft()
            work()
            if work is last:
                break
        _free()


_queues: dict[int, Queue] = {}
_unused: list[Callable[[], object]] = []
_numbers = itertools.count(0x1000, 0x10)
_current = threading.local()


def queue_of(stream: int) -> Queue:
    return _queues.setdefault(stream, Queue())


def when_idle(free: Callable[[], object]) -> None:
    """Free memory once nothing that was queued can use it."""
    _unused.append(free)
    _free()


def _free() -> None:
    if not any(queue.waiting for queue in _queues.values()):
        while _unused:
            _unused.pop()()


class Event:
    """A point in the work of a stream."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self._recorded: tuple[Queue, Callable[[], object]] | None = None

    @property
    def done(self) -> bool:
        return self._recorded is None or self._recorded[1] not in self._recorded[0].waiting

    def record(self, stream: Stream | None = None) -> None:
        queue = queue_of((stream or get_current_stream()).ptr)

        def mark() -> None:
            pass

        self._recorded = queue, mark
        queue.submit(mark)

    def synchronize(self) -> None:
        if self._recorded is not None and not self.done:
            self._recorded[0].drain(self._recorded[1])


class Stream:
    """A stream; also the base of others."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else next(_numbers)
        self.device_id = 0
        self._before: list[Stream] = []

    @staticmethod
    def from_external(obj: Any) -> Stream:
        """The stream of an object with the method ``__cuda_stream__``."""
        stream = Stream(null=True)
        _version, stream.ptr = obj.__cuda_stream__()
        return stream

    def _submit(self, work: Callable[[], object]) -> None:
        queue_of(self.ptr).submit(work)

    def synchronize(self) -> None:
        queue_of(self.ptr).drain()

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        recorded = event._recorded

        def wait() -> None:
            if recorded is not None and recorded[1] in recorded[0].waiting:
                recorded[0].drain(recorded[1])

        self._submit(wait)

    def is_capturing(self) -> bool:
        """There are no graphs."""
        return False

    def use(self) -> Stream:
        _current.stream = self
        return self

    def __enter__(self) -> Stream:
        self._before.append(get_current_stream())
        return self.use()

    def __exit__(self, *arguments: object) -> None:
        self._before.pop().use()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr


class ExternalStream(Stream):
    """A stream that another library made, as CuPy before version 14 has it."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)
        super().__init__(null=True)
        self.ptr = ptr


_null = Stream(null=True)


def get_current_stream(device_id: int = -1) -> Any:
    return getattr(_current, "stream", _null)

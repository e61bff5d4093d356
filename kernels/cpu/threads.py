"""A few threads that run kernels side by side.

Numba's thread layers are not used: one of them ends the process when two Python threads
enter it at once, another one after a fork.  Kernels release the GIL and take their work
from a shared counter, so plain Python threads are all that is needed.  The caller works
too; helpers that wake up late find the counter exhausted and do nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

_limit: int | None = None
_pool: tuple[int, int, SimpleQueue[_Job]] | None = None  # (process, helpers, queue)
_lock = threading.Lock()


class _Job:
    """One parallel call: ``work`` is run by the caller and by every helper that joins."""

    __slots__ = ("closed", "error", "idle", "lock", "running", "work")

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.lock = threading.Lock()
        self.running = 0
        self.closed = False
        self.error: BaseException | None = None
        self.idle = threading.Lock()

    def join(self) -> None:
        with self.lock:
            if self.closed:
                return
            if self.running == 0:
                self.idle.acquire()
            self.running += 1
        try:
            self.work()
        except BaseException as error:  # handed to the caller
            self.error = error
        finally:
            with self.lock:
                self.running -= 1
                if self.running == 0:
                    self.idle.release()


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_num_threads(n: int | None) -> None:
    """Use ``n`` threads from now on; None: one per core that this process may use."""
    global _limit
    _limit = n


def get_num_threads() -> int:
    return _limit or available_cores()


def _serve(queue: SimpleQueue[_Job]) -> None:
    while True:
        queue.get().join()


def _queue(helpers: int) -> SimpleQueue[_Job]:
    """The helpers' queue.  A forked child has none of its parent's threads: it starts its own."""
    global _pool, _lock
    process = os.getpid()
    if _pool is None or _pool[0] != process or _pool[1] < helpers:
        if _pool is not None and _pool[0] != process:
            _lock = threading.Lock()  # the parent may have held it at the fork
            _pool = None
        with _lock:
            have, queue = (_pool[1], _pool[2]) if _pool is not None else (0, SimpleQueue())
            for number in range(have, helpers):
                threading.Thread(
                    target=_serve, args=(queue,), name=f"klfast-{number}", daemon=True
                ).start()
            _pool = (process, max(helpers, have), queue)
    return _pool[2]


def run(work: Callable[[], None], threads: int) -> None:
    """Run ``work`` in this thread and in up to ``threads - 1`` others; wait for all of them.

    ``work`` must share its tasks out itself, so that it may be run any number of times.
    """
    if threads <= 1:
        work()
        return
    job = _Job(work)
    queue = _queue(threads - 1)
    for _ in range(threads - 1):
        queue.put(job)
    try:
        work()
    finally:
        with job.lock:
            job.closed = True
        with job.idle:  # helpers that have begun
            pass
    if job.error is not None:
        raise job.error

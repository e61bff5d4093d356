"""A few threads that run kernels side by side.

Numba's thread layers are not used: one of them ends the process when two Python threads
enter it at once, another one after a fork.  Kernels release the GIL and take their work
from a shared counter, so plain Python threads are all that is needed.  The caller works
too; helpers that wake up late find the counter exhausted and do nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

_limit: int | None = None


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

    def close(self) -> None:
        """Let nobody join any more, and wait for those that have.

        They write into memory of the caller, so that even what a signal handler raises here
        has to wait for them.
        """
        interruption: BaseException | None = None
        waiting = True
        while waiting:
            try:
                with self.lock:
                    self.closed = True
                with self.idle:
                    waiting = False
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption


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


class _Pool:
    """The threads that help, started when they are first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size = 0
        self.queue: SimpleQueue[_Job] = SimpleQueue()

    def offer(self, job: _Job, helpers: int) -> None:
        """Put the job where that many threads find it."""
        if self.size < helpers:
            # RuntimeError: no more threads are to be had, and fewer will do.
            with contextlib.suppress(RuntimeError), self.lock:
                while self.size < helpers:
                    name = f"klfast-{self.size}"
                    threading.Thread(
                        target=_serve, args=(self.queue,), name=name, daemon=True
                    ).start()
                    self.size += 1
        for _ in range(min(helpers, self.size)):
            self.queue.put(job)


_pool = _Pool()


def _start_anew() -> None:
    """A forked child has none of its parent's threads, and a lock may have been held."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def run(work: Callable[[], None], threads: int) -> None:
    """Run ``work`` in this thread and in up to ``threads - 1`` others; wait for all of them.

    ``work`` must share its tasks out itself, so that it may be run any number of times.
    """
    if threads <= 1:
        work()
        return
    job = _Job(work)
    try:
        _pool.offer(job, threads - 1)
        work()
    finally:
        job.close()
    if job.error is not None:
        raise job.error

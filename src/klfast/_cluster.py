"""An evaluation job on a Dask cluster: ranges of rows, read and measured wherever a worker is free.

A task is some ranges of rows and depends on nothing but files, so that it may run twice: what a
lost worker was at is done again by another one. The ranges are those of the job on one machine, and
the columns that come back are joined in their order, so that the result is the same to the bit.
Every worker needs the files under the same names.

A task costs the scheduler, the client and the worker about ten milliseconds between them, and a
range of rows may take less. So tasks are of many ranges as long as there is much to do, and of one
in the end, when what counts is that all workers finish together (guided self-scheduling,
Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._checkpoint import Part, identity
from ._sources import SourceError

if TYPE_CHECKING:
    from ._job import Job, Measured

__all__ = ["measured_on"]

#: How long a scheduler has to answer, and how long one may be away that was there.
CONNECT_SECONDS = 20
AWAY_SECONDS = 300
#: The most that is read for a task, in bytes: what is done again where a worker is lost.
TASK_BYTES = 4 * 2**30


def measured_on(address: str, job: Job, starts: Sequence[int]) -> Measured:
    """The columns of these chunks, task by task as they are done.

    By the cluster whose scheduler has this address, or by a new "local" one. Where the connection
    to it is lost, what was not done is handed in again as soon as there is another.
    """
    arguments = _portable(job)
    with _cluster(address) as scheduler:
        left, patience = list(starts), float(CONNECT_SECONDS)
        while left:
            with _client(scheduler, address, patience) as client:
                patience = float(AWAY_SECONDS)
                most = max(1, TASK_BYTES // (job.chunk_rows * job.row_bytes))
                tasks = _tasks(left, most, _threads(client))
                futures = client.map(_measured, tasks, arguments=arguments, pure=False)
                at = dict(zip(futures, tasks, strict=True))
                left = []
                done = import_module("distributed").as_completed(futures)
                for future in done:
                    ranges = at.pop(future)
                    found = _outcome(future)
                    if found is None:
                        left += ranges
                    elif not isinstance(found, SourceError):
                        yield list(zip(ranges, found, strict=True))
                    elif len(ranges) == 1:
                        yield [(ranges[0], found)]
                    else:  # one of them may be to blame
                        single = [[each] for each in ranges]
                        again = client.map(_measured, single, arguments=arguments, pure=False)
                        at |= dict(zip(again, single, strict=True))
                        done.update(again)
                    future.release()
                left.sort()


def _tasks(ranges: Sequence[int], most: int, threads: int) -> list[Sequence[int]]:
    """Ranges of rows shared out to tasks: half of what is left to each thread, or ``most``."""
    tasks, first = [], 0
    while first < len(ranges):
        count = min(most, -(-(len(ranges) - first) // (2 * threads)))
        tasks.append(ranges[first : first + count])
        first += count
    return tasks


def _outcome(future: Any) -> list[Part | SourceError] | SourceError | None:
    """What came of a task, or why nothing did; None where the connection to it was lost."""
    try:
        parts: list[Part | SourceError] = pickle.loads(future.result())
    except import_module("distributed").CancelledError:
        return None
    except Exception as error:  # whatever a worker met
        return error if isinstance(error, SourceError) else SourceError(_reason(error))
    return parts


def _threads(client: Any) -> int:
    """How many threads there are to do the work; says so, and where to look on."""
    workers: dict[str, dict[str, int]] = client.scheduler_info(n_workers=-1)["workers"]
    where = f"klfast: dashboard at {client.dashboard_link}, {len(workers)} workers"
    print(where, file=sys.stderr)
    return max(1, sum(each["nthreads"] for each in workers.values()))


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """What a client connects to."""
    try:
        distributed = import_module("distributed")
    except ImportError:
        raise SourceError('--dask needs the extra "dask": pip install "klfast[dask]"') from None
    if address != "local":
        yield address
        return
    from .kernels.cpu.threads import available_cores

    with distributed.LocalCluster(
        n_workers=available_cores(), threads_per_worker=1, dashboard_address=":0"
    ) as cluster:
        yield cluster


@contextlib.contextmanager
def _client(scheduler: Any, address: str, patience: float) -> Iterator[Any]:
    """A client, of a scheduler that has so many seconds to be there."""
    until = time.monotonic() + patience
    while True:
        try:
            client = import_module("distributed").Client(scheduler, timeout=CONNECT_SECONDS)
            break
        except (OSError, TimeoutError, ValueError) as error:
            if isinstance(error, ValueError) or time.monotonic() > until:
                raise SourceError(
                    f"--dask {address}: cannot be reached ({_reason(error)})"
                ) from None
            time.sleep(1.0)
    with client:
        yield client


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _portable(job: Job) -> str:
    """What a worker makes the same job of, in JSON: names of files, and which files they are."""
    base, tests, columns, options = job.given
    named = {}
    for what, each in (("base", base), *((f"test {i + 1}", x) for i, x in enumerate(tests)),
                       *columns.items()):  # fmt: skip
        if each is not None and not isinstance(each, (str, os.PathLike)):
            raise SourceError(f"{what} is of type {type(each).__name__}; a cluster needs paths")
        named[what] = None if each is None else str(Path(each).absolute())
    files = [identity(source)["files"] for source in (job.base, *job.tests)]
    files += [_state(each) for what in columns if (each := named[what]) is not None]
    return json.dumps(
        {"named": named, "tests": len(tests), "options": options, "files": files}, sort_keys=True
    )


def _state(path: str) -> list[int]:
    """Size and time of change of a file, by which it is known to have changed."""
    found = Path(path).stat()
    return [found.st_size, found.st_mtime_ns]


@lru_cache(maxsize=1)
def _opened(arguments: str) -> Job:
    """The job, kept open for a worker's next task; the key holds sizes and times of the files."""
    from ._job import Job

    given = json.loads(arguments)
    named, options = given["named"], given["options"]
    tests = [named[f"test {number + 1}"] for number in range(given["tests"])]
    temperature = options["temperature"]
    options["temperature"] = tuple(temperature) if isinstance(temperature, list) else temperature
    columns = {name: named[name] for name in ("targets", "sequences", "where")}
    return Job(named["base"], tests, **columns, **options)


def _measured(starts: Sequence[int], arguments: str) -> bytes:
    """The columns of some ranges of rows, pickled.

    Dask would send each array in frames of its own, which takes it 0.1 ms for every one.
    """
    import klfast

    worker = import_module("distributed").get_worker()
    klfast.set_num_threads(worker.state.nthreads)
    return pickle.dumps(_opened(arguments).measured(starts), pickle.HIGHEST_PROTOCOL)

"""How much faster two Dask workers are than one, what scheduling takes, and what memory allows.

Run ``python benchmarks/workers.py``: an evaluation job over shards of 1 GB by one worker and by
two, in turns, each worker with one thread; beside it the speed at which one process, and two at a
time, read the same bytes and do nothing else. There is only one cluster at a time: idle workers
and a second scheduler take time of the cores, too. Shards are four files again and again, so that
they stay in memory (4 GB). Prints Markdown. ``--folder`` keeps the files for the next run, and says
which file system they are on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from distributed import Client, LocalCluster

import klfast

#: Files that shards are made of.
DIFFERENT = 4


def written(folder: Path, rows: int, vocab: int, count: int) -> tuple[Path, Path]:
    """Folders of shards of a base and a candidate, made where they are not there.

    They are a few files again and again: two workers do not read the same one at a time.
    """
    base, test = folder / "p", folder / "q"
    if not base.exists():
        base.mkdir()
        test.mkdir()
        random = np.random.default_rng(0)
        for number in range(DIFFERENT):
            p = 4 * random.standard_normal((rows, vocab), np.float32)
            np.save(base / f"{number}.npy", p)
            p += np.float32(0.3) * random.standard_normal(p.shape, np.float32)
            np.save(test / f"{number}.npy", p)
        for number in range(DIFFERENT, count):
            for each in (base, test):
                (each / f"{number}.npy").symlink_to(each / f"{number % DIFFERENT}.npy")
    return base, test


def read_speed(files: Sequence[Path]) -> float:
    """Bytes a second at which one thread of this process reads mapped files, the second time."""
    from klfast.kernels.cpu import read_bytes

    klfast.set_num_threads(1)
    maps = [np.load(file, mmap_mode="r") for file in files]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        for each in maps:
            read_bytes(each)
        seconds.append(time.perf_counter() - start)
    return float(sum(each.nbytes for each in maps) / min(seconds[1:]))


class Turn(NamedTuple):
    """What one cluster does."""

    seconds: float  # of a job
    tasks: float  # of all its tasks together
    read: float  # bytes a second that all workers read at the same time


def measured(workers: int, base: Path, test: Path, metrics: Any) -> Turn:
    """A job by a new cluster of workers with one thread each, which know the kernels."""
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        contextlib.redirect_stderr(io.StringIO()),  # the dashboard's address
    ):  # fmt: skip
        address = cluster.scheduler_address
        with Client(address) as client:
            client.wait_for_workers(workers)
            # One task a worker: they read at the same time.
            names = list(client.scheduler_info(n_workers=-1)["workers"])
            reading = [
                client.submit(
                    read_speed, [side / f"{i}.npy" for side in (base, test)], workers=[name]
                )
                for i, name in enumerate(names)
            ]
            read = sum(client.gather(reading))
        first = [f"{side}/[0-{DIFFERENT - 1}].npy" for side in (base, test)]
        sides: Any
        for sides in (first, (base, test)):
            start = time.perf_counter()
            found = klfast.evaluate(*sides, metrics=metrics, dask=address)
            seconds = time.perf_counter() - start
    return Turn(seconds, found.seconds, read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="of a shard")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", default="kl", help="separated by commas; default: evaluate's")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    metrics = None if options.metrics == "default" else options.metrics.split(",")
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            memory = Path("/dev/shm")
            place = memory if memory.is_dir() else None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        pair = written(folder, options.rows, options.vocab, options.shards)
        turns = [
            [measured(workers, *pair, metrics) for workers in (1, 2)] for _ in range(options.rounds)
        ]
    gigabytes = 2 * options.rows * options.vocab * 4 * options.shards / 1e9
    print("| workers | job | measured | times one | beside tasks | plain read | times one |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for workers, each in enumerate(zip(*turns, strict=True), start=1):
        seconds = statistics.median(turn.seconds for turn in each)
        times = statistics.median(turn[0].seconds / turn[workers - 1].seconds for turn in turns)
        idle = statistics.median(1.0 - turn.tasks / workers / turn.seconds for turn in each)
        read = statistics.median(turn.read for turn in each)
        more = statistics.median(turn[workers - 1].read / turn[0].read for turn in turns)
        print(
            f"| {workers} | {seconds:.2f} s | {gigabytes / seconds:.1f} GB/s | {times:.2f} "
            f"| {100 * idle:.1f} % | {read / 1e9:.1f} GB/s | {more:.2f} |"
        )


if __name__ == "__main__":
    main()

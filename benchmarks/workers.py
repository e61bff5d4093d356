"""How much faster two Dask workers are than one, what scheduling takes, and what memory allows.

Run ``python benchmarks/workers.py``: an evaluation job over shards of 1 GB by one worker and by
two, in turns, each worker with one thread; beside it the speed at which one process, and two at a
time, read the same bytes and do nothing else. Shards are four files again and again, so that they
stay in memory (4 GB). Prints Markdown. ``--folder`` keeps the files for the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a cluster of workers with one thread each."""
    with LocalCluster(
        n_workers=workers, threads_per_worker=1, dashboard_address=None
    ) as started:  # fmt: skip
        yield started.scheduler_address


def job(address: str, base: Path, test: Path, rows: int, metrics: Any) -> tuple[float, float]:
    """Seconds that a job takes, and those that its tasks take."""
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # the dashboard's address
        found = klfast.evaluate(base, test, metrics=metrics, chunk_rows=rows, dask=address)
    return time.perf_counter() - start, found.seconds


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
        size = options.rows, options.vocab, options.shards
        pair = written(folder, *size)
        addresses = [stack.enter_context(cluster(workers)) for workers in (1, 2)]
        reading = []
        for workers, address in enumerate(addresses, start=1):
            with Client(address) as client:
                client.wait_for_workers(workers)
                # One task a worker: they read at the same time.
                names = list(client.scheduler_info(n_workers=-1)["workers"])
                tasks = [
                    client.submit(read_speed, [side / f"{i}.npy" for side in pair], workers=[name])
                    for i, name in enumerate(names)
                ]
                reading.append(sum(client.gather(tasks)))
        jobs = [[job(each, *pair, options.rows, metrics) for each in addresses]
                for _ in range(options.rounds + 1)][1:]  # fmt: skip
    gigabytes = 2 * options.rows * options.vocab * 4 * options.shards / 1e9
    one, two = (
        (statistics.median(turn[i][0] for turn in jobs), i + 1) for i in range(2)
    )  # fmt: skip
    print("| workers | job | measured | times one | beside tasks | plain read | times one |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seconds, workers in (one, two):
        ratio = statistics.median(turn[0][0] / turn[workers - 1][0] for turn in jobs)
        idle = statistics.median(
            1.0 - turn[workers - 1][1] / workers / turn[workers - 1][0] for turn in jobs
        )
        read = reading[workers - 1]
        print(
            f"| {workers} | {seconds:.2f} s | {gigabytes / seconds:.1f} GB/s | {ratio:.2f} "
            f"| {100 * idle:.1f} % | {read / 1e9:.1f} GB/s | {read / reading[0]:.2f} |"
        )


if __name__ == "__main__":
    main()

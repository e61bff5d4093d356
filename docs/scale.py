"""Simulates evaluations on many machines and sharded vocabularies, from rates measured here.

`python docs/scale.py` measures, simulates, and prints the tables of docs/scale.md. Figures of
hardware that is not here are those of data sheets, and marked so.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import klfast

#: The job: rows, vocabulary, bytes of a logit in bfloat16, two models.
ROWS, VOCABULARY, BYTES = 10**9, 262144, 2
ROW = 2 * BYTES * VOCABULARY
#: Numbers of a row that a job keeps: its columns, in float64.
COLUMNS = 5

#: From data sheets, in bytes a second and seconds; nothing of this was measured here.
NETWORK = 12.5e9  # a port of 100 Gbit/s
OBJECT_STORE = 100e9  # what a whole cluster may read from a store of 100 GB/s
DISK = 7e9  # an NVMe drive of PCIe 4.0, one in every worker
DEVICE_MEMORY = 3.35e12  # NVIDIA H100 SXM
NVLINK = 450e9  # of an H100, in one direction
NODE_LINK = 50e9  # a port of 400 Gbit/s, between nodes of 8 devices
LATENCY = 20e-6  # of a collective operation; a round number, no data sheet's


@dataclass(frozen=True)
class Rates:
    """What this machine does."""

    kl: float  # bytes of both rows a second and core: the kernel, in bfloat16
    state: float  # the same of RowState.of
    merge: float  # seconds a row and pair of states
    task: float  # seconds that a scheduler spends on a task, one after the other


def median(call: Callable[[], object], times: int = 7) -> float:
    """Seconds that a call takes."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measured() -> Rates:
    """Measure, in bfloat16 and rows of the width of one of eight shards."""
    import dask
    from distributed import Client, LocalCluster
    from ml_dtypes import bfloat16

    rng = np.random.default_rng(0)
    p = (3.0 * rng.normal(size=(256, VOCABULARY // 8))).astype(np.float32)
    q = (p + 0.05 * rng.normal(size=p.shape)).astype(bfloat16)
    p = p.astype(bfloat16)
    size = 2 * BYTES * p.size
    threads = klfast.get_num_threads()
    klfast.set_num_threads(1)
    kl = size / median(lambda: klfast.kl_divergence(p, q))
    of = size / median(lambda: klfast.RowState.of(p, q, "kl"))
    klfast.set_num_threads(threads)
    many = np.repeat(klfast.RowState.of(p, q, "kl").array, 4, axis=0)
    states = [klfast.RowState(many, "kl")] * 64
    merge = median(lambda: states[0].merge(*states[1:])) / (63 * len(many))
    tasks = 3000
    with (
        dask.config.set({"distributed.worker.daemon": False}),
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.gather(client.map(abs, range(100)))
        start = time.perf_counter()
        client.gather(client.map(abs, range(1000, 1000 + tasks)))
        task = (time.perf_counter() - start) / tasks
    return Rates(kl, of, merge, task)


def job(
    rates: Rates, workers: int, cores: int, shard: float, disks: bool, seed: int = 0
) -> dict[str, float]:
    """Seconds of the job, event by event: a scheduler hands shards to workers as they are free.

    Workers differ: each by 10 %, each shard by 5 %, and one shard in a thousand takes ten times as
    long, as where a disk is slow. Reading and computing overlap.
    """
    rng = np.random.default_rng(seed)
    shards = round(ROWS * ROW / shard)
    compute = shard / (rates.kl * cores)
    read = shard / (DISK if disks else min(NETWORK, OBJECT_STORE / workers))
    usual = max(compute, read)
    speed = rng.normal(1.0, 0.1, workers).clip(0.5)
    size = rng.normal(1.0, 0.05, shards).clip(0.5)
    size[rng.random(shards) < 1e-3] *= 10.0
    free = [(0.0, number) for number in range(workers)]
    heapq.heapify(free)
    scheduler = last = 0.0
    for each in size:
        at, number = heapq.heappop(free)
        scheduler = max(scheduler + rates.task, at)
        end = scheduler + usual * each * speed[number]
        last = max(last, end)
        heapq.heappush(free, (end, number))
    ideal = shards * usual / workers
    return {
        "shards": shards, "compute": compute, "read": read, "total": last, "ideal": ideal,
        "scheduler": shards * rates.task, "result": ROWS * COLUMNS * 8,
    }  # fmt: skip


def sharded(rates: Rates, devices: int, rows: int, columns: int = 6) -> dict[str, float]:
    """Seconds of one call on a vocabulary over so many devices, all bounded from below."""
    read = rows * ROW / devices / DEVICE_MEMORY
    sent = 8 * columns * rows * (devices - 1)  # what each device receives in an all-gather
    link = NVLINK if devices <= 8 else NODE_LINK
    return {
        "read": read, "sent": sent, "exchange": sent / link + LATENCY,
        "logits": rows * ROW / devices * (devices - 1) / link,
        "host": rows * (devices - 1) * rates.merge,
    }  # fmt: skip


def duration(seconds: float) -> str:
    """A time in the unit that fits."""
    for limit, unit, name in ((1e-3, 1e-6, "us"), (1.0, 1e-3, "ms"), (120, 1, "s"),
                              (7200, 60, "min")):  # fmt: skip
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 3600:.3g} h"


def volume(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def main() -> None:
    """Print everything."""
    rates = measured()
    print(f"KL kernel, bfloat16      {volume(rates.kl)}/s and core")
    print(f"RowState.of, bfloat16    {volume(rates.state)}/s and core")
    print(f"merge of two states      {1e9 * rates.merge:.0f} ns a row")
    print(f"a task of Dask           {duration(rates.task)}")
    print(f"\nthe job: {volume(ROWS * ROW)} of logits, {volume(ROWS * COLUMNS * 8)} of columns\n")
    print("| logits | workers of 32 cores | a task | tasks | reading for it | computing | "
          "the job | lower bound | scheduler busy |")  # fmt: skip
    print("| --- " * 9 + "|")
    for disks, workers, shard in itertools.product(
        (False, True), (100, 300, 1000), (1e9, 4e9, 16e9)
    ):  # fmt: skip
        found = job(rates, workers, 32, shard, disks)
        cells = (
                "own disks" if disks else "one store", workers, volume(shard),
                f"{found['shards']:.0f}", duration(found["read"]),
                duration(found["compute"]), duration(found["total"]), duration(found["ideal"]),
                f"{100 * found['scheduler'] / found['total']:.0f} %",
            )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")
    print()
    print("| devices | rows | reading (at least) | received by each | all-gather (at least) | "
          "merging on the host | gathering logits instead |")  # fmt: skip
    print("| --- " * 7 + "|")
    for devices in (8, 16, 64):
        for rows in (64, 8192):
            one = sharded(rates, devices, rows)
            columns = (
                devices, rows, duration(one["read"]), volume(one["sent"]),
                duration(one["exchange"]), duration(one["host"]), duration(one["logits"]),
            )  # fmt: skip
            print("| " + " | ".join(map(str, columns)) + " |")


if __name__ == "__main__":
    main()

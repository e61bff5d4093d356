"""What an evaluation job costs beyond its kernels, and how much memory beyond the mapped files.

Run ``python benchmarks/evaluation.py``: job and bare work take turns, and the medians of their
times and ratios are printed as Markdown. Bare work is `klfast.compare` with the same metrics on
chunks of arrays in memory for float32 files; the whole job on float32 arrays in memory for files of
llama.cpp; NumPy's float32 products for output heads. The float32 files hold 1000 rows and are read
again and again, so that they stay in memory: 1 GB for 10 000 rows of 128256.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import klfast
from klfast import llama_cpp

FILE_ROWS = 1000
#: Of output heads.
DTYPES = ("float32", "bfloat16", "float16")
#: Rows of one matrix product: more gain a tenth at best, and take more memory.
PRODUCT_ROWS = 256
STATUS = Path("/proc/self/status")


class Watch:
    """The peak of the process's own memory, mapped files aside, above what it was before."""

    def __enter__(self) -> Watch:
        self.before = self.peak = _anonymous()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, _anonymous())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    @property
    def megabytes(self) -> float:
        return (self.peak - self.before) / 1e6


def _anonymous() -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("the kernel does not tell the memory of a process")


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(bare: Callable[[], Any], job: Callable[[], Any], rounds: int) -> tuple[float, ...]:
    """Median times of both, and the median of bare / job."""
    times = [(timed(bare), timed(job)) for _ in range(rounds + 1)][1:]
    return (
        statistics.median(each[0] for each in times),
        statistics.median(each[1] for each in times),
        statistics.median(each[0] / each[1] for each in times),
    )


def shards(folder: Path, rows: np.ndarray[Any, Any], count: int) -> Path:
    """A folder that holds the same file again and again."""
    folder.mkdir()
    np.save(folder / "0.npy", rows)
    for number in range(1, count):
        (folder / f"{number}.npy").symlink_to(folder / "0.npy")
    return folder


def files(folder: Path, rows: int, vocab: int, rounds: int) -> str:
    """A job on float32 files, and `klfast.compare` on the same memory."""
    random = np.random.default_rng(0)
    p = 4 * random.standard_normal((min(rows, FILE_ROWS), vocab), np.float32)
    q = p + np.float32(0.3) * random.standard_normal(p.shape, np.float32)
    targets = random.integers(0, vocab, rows)
    count = max(1, rows // FILE_ROWS)
    base, test = shards(folder / "p", p, count), shards(folder / "q", q, count)
    del p, q
    maps = [np.load(each / "0.npy", mmap_mode="r") for each in (base, test)]
    chunk = 64
    names = klfast.evaluate(maps[0][:1], maps[1][:1], targets[:1]).metrics

    def bare() -> None:
        for _ in range(count):
            for start in range(0, len(maps[0]), chunk):
                part = slice(start, min(start + chunk, len(maps[0])))
                klfast.compare(maps[0][part], maps[1][part], names, targets[part])

    def job() -> None:
        klfast.evaluate(base, test, targets)

    kernels, whole, ratio = in_turns(bare, job, rounds)
    with Watch() as watch:
        job()
    gigabytes = 2 * rows * vocab * 4 / 1e9
    return (
        f"| float32 files, {rows} x {vocab} | {kernels:.2f} s | {whole:.2f} s "
        f"({gigabytes / whole:.1f} GB/s) | {ratio:.2f} | {watch.megabytes:.0f} MB |"
    )


def llama(folder: Path, rows: int, vocab: int, rounds: int) -> str:
    """The same job on 16-bit files of llama.cpp, against float32 arrays in memory."""
    random = np.random.default_rng(1)
    rows = min(rows, FILE_ROWS) // 255 * 255 or 255
    names = [folder / "p.kld", folder / "q.kld"]
    p = 3 * random.standard_normal((rows, vocab), np.float32)
    q = p + np.float32(0.3) * random.standard_normal(p.shape, np.float32)
    tokens = random.integers(0, vocab, rows // 255 * 512)
    for name, each in zip(names, (p, q), strict=True):
        np.save(folder / "rows.npy", each)
        llama_cpp.convert(folder / "rows.npy", name, tokens=tokens, context=512)
    (folder / "rows.npy").unlink()
    targets = tokens.reshape(-1, 512)[:, 257:].ravel()

    def bare() -> None:
        klfast.evaluate(p, q, targets)

    def job() -> None:
        klfast.evaluate(*names)

    arrays, whole, ratio = in_turns(bare, job, rounds)
    with Watch() as watch:
        job()
    return (
        f"| llama.cpp files, {rows} x {vocab} | {arrays:.2f} s | {whole:.2f} s "
        f"| {ratio:.2f} | {watch.megabytes:.0f} MB |"
    )


def heads(rows: int, width: int, vocab: int, rounds: int, dtype: str, count: int) -> str:
    """`klfast.LinearLogits` with one head for both sides or two, and the matrix products alone."""
    random = np.random.default_rng(2)
    weight = random.standard_normal((vocab, width), np.float32)
    weight /= np.float32(np.sqrt(width))
    states = random.standard_normal((rows, width), np.float32)
    other = states + np.float32(0.1) * random.standard_normal(states.shape, np.float32)
    stored: Any = weight
    if dtype != "float32":
        stored = weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    second = stored if count == 1 else stored.copy()
    sides = klfast.LinearLogits(states, stored), klfast.LinearLogits(other, second)

    def bare() -> None:
        for start in range(0, rows, PRODUCT_ROWS):
            for each in (states, other):
                each[start : start + PRODUCT_ROWS] @ weight.T

    def job() -> None:
        klfast.evaluate(*sides, metrics=["kl", "same_top", "top_p"])

    products, whole, ratio = in_turns(bare, job, rounds)
    with Watch() as watch:
        job()
    which = "one head" if count == 1 else "two heads"
    return (
        f"| {which}, {dtype}, {vocab} x {width}, {rows} rows | {products:.2f} s | {whole:.2f} s "
        f"| {ratio:.2f} | {watch.megabytes:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="of the float32 files")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--width", type=int, default=2048, help="entries of a hidden state")
    parser.add_argument("--states", type=int, default=640, help="rows of hidden states")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("files", "llama", *DTYPES))
    parser.add_argument("--folder", help="where to write the files of logits")
    options = parser.parse_args()
    size = options.rows, options.vocab, options.rounds
    print("| job | bare work | job | bare / job | memory |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only in (None, "files"):
            print(files(Path(folder), *size), flush=True)
        if options.only in (None, "llama"):
            print(llama(Path(folder), *size), flush=True)
    for dtype in DTYPES:
        if options.only in (None, dtype):
            for count in (1, 2):
                shape = options.states, options.width, options.vocab, options.rounds
                print(heads(*shape, dtype, count), flush=True)


if __name__ == "__main__":
    main()

"""Checkpoints: a job that was killed goes on and ends with the same bits, or says why it cannot."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import klfast
from klfast import Evaluation, SourceError, evaluate
from klfast._job import Job

RANDOM = np.random.default_rng(8)
BASE = 3 * RANDOM.standard_normal((40, 60)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
OTHER = BASE + 0.6 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
TARGETS = RANDOM.integers(0, 60, 40)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a base, in 16 bits, and two candidates."""
    monkeypatch.chdir(tmp_path)
    np.save("base.npy", BASE.reshape(8, 5, 60).astype(np.float16))
    np.save("a.npy", TEST.reshape(8, 5, 60))
    np.save("b.npy", OTHER.reshape(8, 5, 60))
    np.save("targets.npy", TARGETS)
    return tmp_path


def job(**options: Any) -> list[Evaluation]:
    """The job that these tests interrupt."""
    given = {"chunk_rows": 3, "checkpoint": "kept", "checkpoint_seconds": 0.0, **options}
    found: list[Evaluation] = evaluate("base.npy", ["a.npy", "b.npy"], "targets.npy", **given)
    return found


class StopError(Exception):
    """What interrupts a job."""


def stop_after(rows: int, kind: type[BaseException] = StopError, **options: Any) -> None:
    def progress(done: int, total: int) -> None:
        if done >= rows:
            raise kind

    with pytest.raises(kind):
        job(progress=progress, **options)


def same(found: list[Evaluation], expected: list[Evaluation]) -> bool:
    return found == expected and [each.summary() for each in found] == [
        each.summary() for each in expected
    ]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_interrupted_at_every_chunk(files: Path, seconds: float) -> None:
    expected = job(checkpoint=None)
    for rows in range(3, 40, 3):
        folder = f"kept{rows}"
        stop_after(rows, KeyboardInterrupt, checkpoint=folder, checkpoint_seconds=seconds)
        seen: list[tuple[int, int]] = []
        found = job(checkpoint=folder, resume=True, progress=lambda *done: seen.append(done))  # noqa: B023
        assert seen[0] == (rows, 40)  # nothing is done twice
        assert same(found, expected)
        assert found[0].noise_floor == expected[0].noise_floor is not None


def test_interrupted_with_rows_left_out(files: Path) -> None:
    keep = (np.arange(40) % 7 > 2) & (np.arange(40) // 9 != 2)
    expected = job(checkpoint=None, where=keep)
    for rows in (9, 30):
        stop_after(rows, resume=True, where=keep)
    with pytest.raises(SourceError, match="belongs to another job: where was"):
        job(resume=True, where=~keep)
    assert same(job(resume=True, where=keep), expected)
    assert expected[0].row_numbers.tolist() == np.flatnonzero(keep).tolist()


def test_interrupted_again_and_again(files: Path) -> None:
    for rows in (3, 12, 15, 39):
        stop_after(rows, resume=True)
    assert same(job(resume=True), job(checkpoint=None))
    reads: list[int] = []
    assert same(job(resume=True, progress=lambda done, _: reads.append(done)), job(checkpoint=None))
    assert reads == [40]  # a finished job has nothing to do


def test_interrupted_within_a_chunk(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, calls = klfast.compare, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # the first candidate has this chunk, the second has not
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(klfast, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job()
    assert same(job(resume=True), job(checkpoint=None))


def test_time_spent_adds_up(files: Path) -> None:
    stop_after(15)
    found = job(resume=True)
    spent = [np.load(path)["0/seconds"] for path in sorted(Path("kept").glob("rows-*"))]
    assert found[0].seconds == pytest.approx(float(sum(spent)))


def test_unfinished_files_do_not_count(files: Path) -> None:
    stop_after(9)
    (Path("kept") / ".rows-000000000009-000000000012.npz.7.tmp").write_bytes(b"half of")
    assert same(job(resume=True, chunk_rows=3), job(checkpoint=None))
    assert not list(Path("kept").glob(".*"))


def test_rows_after_a_gap_are_not_done_again(files: Path) -> None:
    job()
    times = {path: path.stat().st_mtime_ns for path in Path("kept").glob("rows-*")}
    lost = sorted(times)[3]
    lost.unlink()
    seen: list[int] = []
    found = job(resume=True, progress=lambda done, _: seen.append(done))
    assert same(found, job(checkpoint=None))
    assert seen == [37, 40]
    assert {path for path in times if times[path] != path.stat().st_mtime_ns} == {lost}


def rewrite() -> None:
    np.save("a.npy", OTHER.reshape(8, 5, 60))
    os.utime("a.npy", (0, 0))


def touch() -> None:
    os.utime("base.npy", (0, 0))


def tokens() -> None:
    np.save("targets.npy", TARGETS[::-1])


def another_version() -> None:
    content = json.loads(Path("kept/job.json").read_text())
    Path("kept/job.json").write_text(json.dumps({**content, "klfast": "0.0.1"}))


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (rewrite, {}, "a.npy has changed since"),
        (touch, {}, "base.npy has changed since"),
        (tokens, {}, "targets was "),
        (another_version, {}, 'klfast was "0.0.1", and is "'),
        (None, {"temperature": 2.0}, "temperature was 1.0, and is 2.0"),
        (None, {"metrics": ["kl"]}, 'metrics was ["kl", "reverse_kl"'),
        (None, {"chunk_rows": 4}, "chunk_rows was 3, and is 4"),
        (None, {"sequences": np.zeros(40, int)}, "sequences was "),
    ],
)
def test_another_job_is_refused(files: Path, change: Any, options: Any, reason: str) -> None:
    stop_after(9)
    if change is not None:
        change()
    with pytest.raises(SourceError, match=r"kept: belongs to another job: ") as caught:
        job(resume=True, **options)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_refusals(files: Path) -> None:
    stop_after(9)
    with pytest.raises(SourceError, match="kept: holds a checkpoint; continue it with --resume"):
        job()
    part = next(Path("kept").glob("rows-000000000000-*"))
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=rf"{part.name}: is damaged .*; delete it"):
        job(resume=True)
    Path("kept/job.json").write_text("{")
    with pytest.raises(SourceError, match=r"job\.json: cannot be read"):
        job(resume=True)
    Path("kept/job.json").write_text("[]")
    with pytest.raises(SourceError, match=r"job\.json: is not the checkpoint of"):
        job(resume=True)
    Path("kept/job.json").unlink()
    with pytest.raises(SourceError, match=r"kept: holds rows but no job\.json"):
        job(resume=True)
    with pytest.raises(SourceError, match=r"a\.npy: is not a folder"):
        job(checkpoint="a.npy")


def test_pickles_are_never_loaded(files: Path) -> None:
    stop_after(9)
    part = next(Path("kept").glob("rows-000000000000-*"))
    np.savez(part, kl=np.array([{}], object))
    with pytest.raises(SourceError, match=r"is damaged .*allow_pickle"):
        job(resume=True)


def test_resume_begins_where_there_is_nothing(files: Path) -> None:
    assert same(job(resume=True), job(checkpoint=None))


def test_a_disk_that_is_full_loses_nothing(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            job()
    assert not list(Path("kept").glob(".*"))
    assert same(job(resume=True), job(checkpoint=None))


# Killed, as a process


COMMAND = [
    sys.executable, "-m", "klfast", "compare", "base.npy", "a.npy", "b.npy", "--targets",
    "targets.npy", "--chunk-rows", "2", "--checkpoint", "kept", "--checkpoint-every", "0",
]  # fmt: skip


def larger() -> None:
    """Inputs that take a process a second or so."""
    random = np.random.default_rng(2)
    base = 3 * random.standard_normal((100, 8, 4096)).astype(np.float32)
    np.save("base.npy", base.astype(np.float16))
    for name, scale in (("a", 0.1), ("b", 0.2)):
        noise = random.standard_normal(base.shape).astype(np.float32)
        np.save(f"{name}.npy", base + np.float32(scale) * noise)
    np.save("targets.npy", random.integers(0, 4096, 800))


def kept_rows() -> int:
    ends = [re.findall(r"\d+", path.name)[1] for path in Path("kept").glob("rows-*.npz")]
    return max(map(int, ends), default=0)


@pytest.mark.slow
def test_killed_at_ten_random_moments(files: Path) -> None:
    larger()
    chunks = {"chunk_rows": 2}
    expected = job(checkpoint=None, **chunks)
    moments = random.Random(4)
    killed = 0
    for _ in range(200):
        before = kept_rows()
        process = subprocess.Popen([*COMMAND, "--resume"], stdout=subprocess.DEVNULL)
        wanted = before + moments.randrange(1, 80)
        while process.poll() is None and kept_rows() < wanted:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        killed += 1
        assert kept_rows() >= before
        if killed == 10:
            break
    assert killed == 10
    assert 0 < kept_rows() < 800
    arguments = ["--resume", "--json", "o.json", "--columns", "--parquet", "o.parquet"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = job(resume=True, **chunks)
    assert same(found, expected)
    for each, candidate in zip(expected, json.loads(Path("o.json").read_text())["candidates"],
                               strict=True):  # fmt: skip
        assert candidate["columns"]["kl"] == each.columns["kl"].tolist()
        assert candidate["measures"] == each.summary().to_dict()["measures"]


@pytest.mark.slow
def test_interrupted_from_the_keyboard(files: Path) -> None:
    larger()
    # What runs in the background of a shell script inherits that SIGINT is to be ignored.
    heard = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('klfast', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", heard, *COMMAND[3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and kept_rows() < 20:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (130, "", 1)
    assert f"interrupted; {kept_rows()} of 800 rows are kept in kept; go on with: klfast" in err
    command = err.split("go on with: klfast ")[1].split()
    assert command == [*COMMAND[3:], "--resume"]
    done = subprocess.run([sys.executable, "-m", "klfast", *command], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert same(job(resume=True, chunk_rows=2), job(checkpoint=None, chunk_rows=2))


def test_memory_is_bounded_by_the_chunk(files: Path) -> None:
    small, large = (Job(np.zeros((n, 50)), [np.zeros((n, 50))]) for n in (100, 100_000))
    assert large.memory - small.memory < 99_900 * 8 * 20


@pytest.mark.parametrize(
    ("width", "candidates", "rows"),
    [(32000, 1, 262), (262144, 1, 64), (128256, 3, 64), (10**7, 1, 3)],
)
def test_rows_of_a_chunk(width: int, candidates: int, rows: int) -> None:
    """64 MiB of them, but more of long rows: kernels are slower with fewer than 64."""
    logits = np.broadcast_to(np.float32(0), (10**4, width))
    assert Job(logits, [logits] * candidates).chunk_rows == rows

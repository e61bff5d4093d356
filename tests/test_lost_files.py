"""Files that are missing, damaged or cut off: named in the end, when all else is done and kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from klfast.kernels.cpu.faults import zeros_beyond_files

import klfast
from klfast import Evaluation, SourceError

RANDOM = np.random.default_rng(8)
BASE = 3 * RANDOM.standard_normal((60, 300)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and a candidate as files, and as three shards."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("base", BASE), ("test", TEST)):
        np.save(f"{name}.npy", rows)
        for number in range(3):
            np.save(f"{name}-{number}.npy", rows[20 * number : 20 * number + 20])
            shard = f"{name}-{number}.npz"
            np.savez_compressed(shard, logits=rows[20 * number : 20 * number + 20])
    return tmp_path


def job(base: str = "base.npy", test: str = "test-*.npy", **options: Any) -> Evaluation:
    found: Evaluation = klfast.evaluate(base, test, chunk_rows=4, checkpoint="kept", **options)
    return found


def kept() -> list[int]:
    """First rows of what is kept, range by range."""
    found: list[int] = []
    for path in Path("kept").glob("rows-*"):
        _, start, stop = path.stem.split("-")
        found += range(int(start), int(stop), 4)
    return sorted(found)


def cut(name: str, size: int = 1000) -> Callable[[], None]:
    def cut_off() -> None:
        Path(name).write_bytes(Path(name).read_bytes()[:size])

    return cut_off


def overwrite(name: str) -> Callable[[], None]:
    def overwritten() -> None:
        whole = Path(name).read_bytes()
        middle = len(whole) // 2
        Path(name).write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])

    return overwritten


MIDDLE = list(range(20, 40, 4))


@pytest.mark.parametrize(
    ("base", "test", "damage", "reason", "lost"),
    [
        ("base.npy", "test-*.npy", cut("test-1.npy"), "test-1.npy: is truncated", MIDDLE),
        ("base.npy", "test-*.npy", cut("test-1.npy", 5), "test-1.npy: does not begin", MIDDLE),
        ("base-*.npy", "test-*.npy", Path("test-1.npy").unlink,
         "test-1.npy: is missing, and base-1.npy is there", MIDDLE),
        ("base-*.npy", "test-*.npy", Path("test-2.npy").unlink,
         "test-2.npy: is missing, and base-2.npy is there", list(range(40, 60, 4))),
        ("base-*.npz", "test-*.npy", Path("base-0.npz").unlink,
         "base-0.npz: is missing, and test-0.npy is there", list(range(0, 20, 4))),
        ("base.npy", "test-*.npy", Path("test-1.npy").unlink,
         "test-1.npy: is missing, and base.npy has 60 rows", MIDDLE),
        ("base-*.npy", "test.npy", Path("base-1.npy").unlink,
         "base-1.npy: is missing, and test.npy has 60 rows", MIDDLE),
        ("base.npy", "test-*.npz", overwrite("test-1.npz"), "test-1.npz: cannot be read", MIDDLE),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("files")
def test_shards(base: str, test: str, damage: Any, reason: str, lost: list[int]) -> None:
    whole = klfast.evaluate(base, test, chunk_rows=4)
    name = reason.partition(":")[0]
    content = Path(name).read_bytes()
    damage()
    with pytest.raises(SourceError) as caught:
        job(base, test)
    message = str(caught.value)
    assert message.startswith(reason), message
    assert "what is done is kept in kept" in message
    assert "\n" not in message
    missing = sorted(set(range(0, 60, 4)) - set(kept()))
    assert missing == lost
    with pytest.raises(SourceError, match="ranges of rows failed"):
        job(base, test, resume=True)
    Path(name).write_bytes(content)
    done: list[int] = []
    again = job(base, test, resume=True, progress=lambda rows, _: done.append(rows))
    assert again == whole
    assert again.summary() == whole.summary()
    assert len(done) == 1 + len(missing)


@pytest.mark.usefixtures("files")
def test_other_files_may_not_change_meanwhile() -> None:
    cut("test-1.npy")()
    with pytest.raises(SourceError, match=r"test-1\.npy: is truncated"):
        job()
    np.save("test-1.npy", TEST[20:40])
    np.save("test-2.npy", TEST[:20])
    with pytest.raises(SourceError, match=r"kept: belongs to another job: test-2\.npy has changed"):
        job(resume=True)


@pytest.mark.parametrize("numbers", [(0, 1), (0, 9), (1, 2)])
@pytest.mark.usefixtures("files")
def test_rows_that_no_number_is_left_out_for(numbers: tuple[int, int]) -> None:
    """What is missing then cannot be named."""
    names = [f"test-{number}.npy" for number in range(3)]
    Path(names[1]).rename("spare-0.npy")
    Path(names[2]).rename("spare-1.npy")
    Path(names[0]).unlink()
    for spare, number in enumerate(numbers):
        Path(f"spare-{spare}.npy").rename(f"test-{number}.npy")
    with pytest.raises(SourceError, match=r"has shape \(40, 300\), but base\.npy has \(60, 300\)"):
        job("base.npy")


@pytest.mark.usefixtures("files")
def test_without_a_hint_of_its_length() -> None:
    cut("test-1.npy", 5)()
    cut("test-2.npy", 5)()
    with pytest.raises(SourceError, match=r"test-1\.npy: does not begin like a \.npy file$"):
        job("base.npy", "test-[12].npy")
    np.save("test-0.npy", TEST[:7])
    with pytest.raises(SourceError, match=r"test-1\.npy: does not begin like a \.npy file$"):
        job("base.npy")
    with pytest.raises(SourceError, match=r"test-1\.npy: does not begin like a \.npy file$"):
        klfast.open_logits("test-*.npy")


@pytest.mark.usefixtures("files")
def test_a_file_that_is_cut_off_while_it_is_read() -> None:
    whole = klfast.evaluate("base.npy", "test.npy", chunk_rows=4)
    content = Path("test.npy").read_bytes()

    def truncate(rows: int, total: int) -> None:
        if rows == 20:
            with Path("test.npy").open("r+b") as file:
                file.truncate(40000)

    # The next rows are being read already, as in the command.
    with (
        zeros_beyond_files(),
        pytest.raises(SourceError, match=r"test\.npy: was truncated while it was read") as caught,
    ):
        job(test="test.npy", progress=truncate)
    assert "; 20 of 60 rows are done, 10 ranges of rows failed" in str(caught.value)
    assert kept() == list(range(0, 20, 4))
    Path("test.npy").write_bytes(content)
    assert job(test="test.npy", resume=True) == whole


@pytest.mark.usefixtures("files")
def test_a_file_that_is_written_to_while_it_is_read() -> None:
    def write(rows: int, total: int) -> None:
        if rows == 20:
            np.save("test.npy", TEST + 1)

    with (
        zeros_beyond_files(),
        pytest.raises(SourceError, match=r"test\.npy: has changed since it was opened"),
    ):
        job(test="test.npy", progress=write)
    assert kept() == list(range(0, 20, 4))


#: A file is cut off between the check and the kernel: its pages are gone when that reads them.
CUT_OFF = """
import os
import klfast, klfast.cli
compare = klfast.compare

def late(*arguments, **options):
    if late.calls == 5:
        os.truncate("test.npy", 128)
    late.calls += 1
    return compare(*arguments, **options)

late.calls = 0
klfast.compare = late
raise SystemExit(klfast.cli.main(["compare", "base.npy", "test.npy", "--chunk-rows", "4",
                                  "--checkpoint", "kept"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the handler knows Linux's signals")
@pytest.mark.usefixtures("files")
def test_pages_that_are_gone_do_not_kill_the_command() -> None:
    content = Path("test.npy").read_bytes()
    done = subprocess.run([sys.executable, "-c", CUT_OFF], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("klfast: test.npy: was truncated while it was read"), done.stderr
    assert done.stderr.count("\n") == 1
    assert kept() == list(range(0, 20, 4))
    Path("test.npy").write_bytes(content)
    whole = klfast.evaluate("base.npy", "test.npy", chunk_rows=4)
    assert job(test="test.npy", resume=True) == whole

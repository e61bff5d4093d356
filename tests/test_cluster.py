"""Evaluation jobs on a Dask cluster: the same bits, whatever happens to workers and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import klfast

distributed = pytest.importorskip("distributed")

RANDOM = np.random.default_rng(8)
BASE = 3 * RANDOM.standard_normal((60, 300)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Base and test, 16 bits and compressed shards, and targets."""
    monkeypatch.chdir(tmp_path)
    np.save("base.npy", BASE.astype(np.float16))
    for number in range(3):
        np.savez_compressed(f"test-{number}.npz", logits=TEST[20 * number : 20 * number + 20])
    np.save("targets.npy", RANDOM.integers(0, 300, 60))
    return tmp_path


def run(program: str) -> None:
    """In a process of its own, which starts others."""
    Path("program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_a_worker_that_is_killed_and_a_shard_that_is_damaged() -> None:
    run(
        """
import os, signal
import numpy as np
import klfast
from distributed import Client, LocalCluster
from pathlib import Path

def job(**options):
    return klfast.evaluate("base.npy", "test-*.npz", "targets.npy", chunk_rows=4, **options)

if __name__ == "__main__":
    alone = job()
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        with Client(address) as client:
            pids = list(client.run(os.getpid).values())
        for keep in (np.arange(60) % 7 < 3, np.arange(60) > 40):
            np.save("where.npy", keep)
            part = job(where="where.npy")
            assert job(where="where.npy", dask=address) == part
            assert part.row_numbers.tolist() == np.flatnonzero(keep).tolist()
        try:
            job(where=keep, dask=address)
        except klfast.SourceError as error:
            assert str(error) == "where is of type ndarray; a cluster needs paths", error
        else:
            raise AssertionError("no error")
        seen = []

        def progress(done, total):
            if not seen:
                os.kill(pids[0], signal.SIGKILL)
            seen.append((done, total))

        together = job(dask=address, progress=progress)
        assert together == alone, "other bits"
        assert together.summary() == alone.summary()
        assert seen[-1] == (60, 60)

        whole = Path("test-1.npz").read_bytes()
        middle = len(whole) // 2
        Path("test-1.npz").write_bytes(whole[:middle] + bytes(64) + whole[middle + 64:])
        try:
            job(dask=address, checkpoint="kept")
        except klfast.SourceError as error:
            assert "test-1.npz" in str(error) and "ranges of rows failed" in str(error), error
        else:
            raise AssertionError("no error")
        parts = [path.stem.split("-") for path in Path("kept").glob("rows-*")]
        kept = [row for _, first, last in parts for row in range(int(first), int(last))]
        assert sorted(kept) == [*range(20), *range(40, 60)], kept
        Path("test-1.npz").write_bytes(whole)
        seen = [0]
        assert job(dask=address, checkpoint="kept", resume=True, progress=progress) == alone
        assert len(seen) == 7, seen

        # A worker that reads where a file has been cut off is killed by SIGBUS; the other one may
        # see it in time.
        def cut_off():
            compare = klfast.compare

            def late(*arguments, **options):
                os.truncate("base.npy", 0)
                return compare(*arguments, **options)

            klfast.compare = late

        with Client(address) as client:
            client.run(os.chdir, os.getcwd())
            client.run(cut_off)
            before = set(client.run(os.getpid).values())
        try:
            job(dask=address, checkpoint="cut off")
        except klfast.SourceError as error:
            known = "base.npy: is empty (0 bytes)", "base.npy: was truncated while it was read"
            assert any(each in str(error) for each in known), error
        else:
            raise AssertionError("no error")
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
            assert before != set(client.run(os.getpid).values())
"""
    )


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_a_scheduler_that_is_away_for_seconds() -> None:
    run(
        """
import os, signal, socket, subprocess, sys, threading, time
import klfast
from distributed import Client

class Wire:
    "Forwards connections to a port; when it is cut it closes them, and takes none for a while."

    def __init__(self, port):
        self.target, self.sockets, self.up = port, [], True
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp://127.0.0.1:%d" % self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            here, _ = self.server.accept()
            if not self.up:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [here, there]
            for pair in ((here, there), (there, here)):
                threading.Thread(target=self.forward, args=pair, daemon=True).start()

    def forward(self, source, to):
        try:
            while data := source.recv(1 << 16):
                to.sendall(data)
        except OSError:
            pass
        self.close(source, to)

    def close(self, *sockets):
        for each in sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self):
        self.up = False
        self.close(*self.sockets)
        time.sleep(2)
        self.up = True

def start(*command):
    return subprocess.Popen([sys.executable, "-m", "dask", *command, "--no-dashboard"])

def job(**options):
    return klfast.evaluate("base.npy", "test-*.npz", "targets.npy", chunk_rows=1, **options)

if __name__ == "__main__":
    alone = job()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", str(port))
    workers = [start("worker", "tcp://127.0.0.1:%d" % port, "--nthreads", "1") for _ in range(2)]
    try:
        with Client("tcp://127.0.0.1:%d" % port, timeout=30) as client:
            client.wait_for_workers(2, timeout=60)
        wire = Wire(port)
        happened = []

        def progress(done, total):
            if done == 10:
                happened.append("stopped")
                scheduler.send_signal(signal.SIGSTOP)
                threading.Timer(2, scheduler.send_signal, [signal.SIGCONT]).start()
            if done == 30 and "cut" not in happened:
                happened.append("cut")
                threading.Thread(target=wire.cut).start()
                time.sleep(0.5)

        together = job(dask=wire.address, progress=progress, checkpoint="kept")
        assert happened == ["stopped", "cut"], happened
        assert together == alone, "other bits"
        assert together.summary() == alone.summary()
    finally:
        for each in (*workers, scheduler):
            each.send_signal(signal.SIGCONT)
            each.terminate()
        for each in (*workers, scheduler):
            each.wait(20)
"""
    )


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_what_is_done_is_not_done_again(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        sys.executable, "-m", "klfast", "compare", "base.npy", "test-*.npz", "--chunk-rows", "4",
        "--targets", "targets.npy", "--checkpoint", "kept", "--dask", "local", "--resume",
        "--json",
    ]  # fmt: skip
    first = subprocess.run([*arguments, "one.json"], capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert "dashboard at http" in first.stderr
    kept = {path: path.stat().st_mtime_ns for path in Path("kept").glob("rows-*")}
    lost = sorted(kept)[-1]  # the last task is of one range
    lost.unlink()
    again = subprocess.run([*arguments, "two.json"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    now = {path: path.stat().st_mtime_ns for path in Path("kept").glob("rows-*")}
    assert [path for path in now if now[path] != kept[path]] == [lost]
    alone = klfast.evaluate("base.npy", "test-*.npz", "targets.npy", chunk_rows=4)
    assert first.stdout.splitlines()[4:] == again.stdout.splitlines()[4:]
    assert f"{alone.summary().value('kl.mean'):.4g}" in first.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klfast._cluster.CONNECT_SECONDS", 1)
    with pytest.raises(klfast.SourceError, match="cannot be reached"):
        klfast.evaluate("base.npy", "test-*.npz", dask="tcp://127.0.0.1:9")


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_tasks_become_smaller_toward_the_end(threads: int, most: int) -> None:
    from klfast._cluster import _tasks

    ranges = list(range(0, 300, 3))
    tasks = _tasks(ranges, most, threads)
    assert [row for task in tasks for row in task] == ranges
    sizes = [len(task) for task in tasks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == min(most, -(-100 // (2 * threads)))
    assert sizes[-1] == 1


@pytest.mark.usefixtures("files")
def test_of_a_task_that_fails_every_other_range_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may end a worker, or fail in a way that nobody thought of."""
    from klfast._cluster import measured_on
    from klfast._job import Job

    job = Job("base.npy", ["test-*.npz"], chunk_rows=4)
    whole = Job.measured

    def failing(self: Job, starts: list[int]) -> list[object]:
        if 8 in starts:
            raise MemoryError("no more of it")
        return [*whole(self, starts)]

    monkeypatch.setattr(Job, "measured", failing)
    monkeypatch.setattr("klfast.kernels.cpu.threads._limit", None)  # which the worker sets
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:  # fmt: skip
        (failed,) = [
            (start, found)
            for together in measured_on(cluster.scheduler_address, job, range(0, 60, 4))
            for start, found in together
            if isinstance(found, klfast.SourceError)
        ]
    assert failed[0] == 8
    assert str(failed[1]) == "no more of it"


def test_arrays_in_memory_cannot_be_sent() -> None:
    from klfast._cluster import _portable
    from klfast._job import Job

    with pytest.raises(klfast.SourceError, match="base is of type ndarray; a cluster needs paths"):
        _portable(Job(BASE, [TEST]))

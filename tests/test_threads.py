"""Threads change no bit, whoever uses them; what goes wrong in one reaches the caller."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from klfast.kernels.cpu import threads
from numpy.typing import NDArray
from processes import python

import klfast


@pytest.fixture(autouse=True)
def _number_of_threads() -> Iterator[None]:
    yield
    threads.set_num_threads(None)


def _batch(n: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(n)
    p = rng.normal(scale=3.0, size=(n, width)).astype(np.float32)
    q = (p + rng.normal(scale=0.5, size=p.shape)).astype(np.float32)
    q[n // 2, 7] = -np.inf  # a row for the float64 kernel
    return p, q


#: Rows that are cut along the vocabulary (an odd number of parts); many rows; few short ones.
BATCHES = [_batch(3, 150_001), _batch(300, 3000), _batch(64, 40_000), _batch(4, 50)]
CALLS: dict[str, Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]] = {
    "kl": klfast.kl_divergence,
    "js": klfast.js_divergence,
    "renyi": lambda p, q: klfast.renyi_divergence(p, q, 2.0),
    "cross_entropy": klfast.cross_entropy,
    "entropy": lambda p, q: klfast.entropy(p),
    "log_softmax": lambda p, q: klfast.log_softmax(q),
    "float64": lambda p, q: klfast.kl_divergence(p[:, :9000].astype("d"), q[:, :9000]),
    "compare": lambda p, q: np.stack([*klfast.compare(p, q, ("kl", "tv", "same_top")).values()]),
}


def _bits(name: str) -> list[bytes]:
    return [np.asarray(CALLS[name](p, q)).tobytes() for p, q in BATCHES]


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    klfast.set_num_threads(1)
    expected = _bits(name)
    for number in (2, 3, 8):
        klfast.set_num_threads(number)
        assert klfast.get_num_threads() == number
        assert _bits(name) == expected


def test_eight_callers_at_once_get_the_bits_of_one() -> None:
    klfast.set_num_threads(1)
    expected = {name: _bits(name) for name in CALLS}
    klfast.set_num_threads(3)
    gate = threading.Barrier(8)

    def caller(number: int) -> None:
        names = list(CALLS)
        gate.wait()
        for name in names[number:] + names[:number]:
            assert _bits(name) == expected[name]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller, range(8)))


def _layers() -> list[object]:
    layers: list[object] = []
    for layer, module in (("workqueue", "workqueue"), ("omp", "omppool"), ("tbb", "tbbpool")):
        try:
            importlib.import_module(f"numba.np.ufunc.{module}")
            layers.append(layer)
        except ImportError as error:
            layers.append(pytest.param(layer, marks=pytest.mark.skip(reason=str(error))))
    return layers


@pytest.mark.slow
@pytest.mark.parametrize("layer", _layers())
def test_beside_parallel_numba_code(layer: str) -> None:
    """One thread runs Numba's parallel loops (not all layers bear two) and calls, seven call."""
    code = """
        import threading
        import numba
        import numpy as np
        import klfast

        @numba.njit(parallel=True)
        def total(x):
            s = 0.0
            for i in numba.prange(x.size):
                s += x[i]
            return s

        rng = np.random.default_rng(0)
        p, q = rng.normal(size=(2, 5, 100_000)).astype("f")
        x = np.ones(100_000)
        klfast.set_num_threads(1)
        expected = klfast.kl_divergence(p, q).tobytes()
        klfast.set_num_threads(3)
        assert total(x) == x.size
        wrong = []

        def call():
            for _ in range(20):
                if klfast.kl_divergence(p, q).tobytes() != expected:
                    wrong.append(1)

        callers = [threading.Thread(target=call) for _ in range(7)]
        for caller in callers:
            caller.start()
        while any(caller.is_alive() for caller in callers):
            if total(x) != x.size or klfast.kl_divergence(p, q).tobytes() != expected:
                wrong.append(2)
        assert not wrong, wrong
        print(numba.threading_layer())
    """
    env = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    assert python(code, env=env).strip() == layer


# --- the pool ----------------------------------------------------------------------------


class Work:
    """Work that helpers take part in for certain: the caller waits until one has begun."""

    def __init__(self, *, seconds: float = 0.0, error: BaseException | None = None) -> None:
        self.caller = threading.get_ident()
        self.began = threading.Event()
        self.ended = False
        self.seconds = seconds
        self.error = error

    def __call__(self) -> None:
        if threading.get_ident() == self.caller:
            assert self.began.wait(30)
            return
        self.began.set()
        time.sleep(self.seconds)
        self.ended = True
        if self.error is not None:
            raise self.error


def test_the_caller_waits_for_helpers() -> None:
    work = Work(seconds=0.05)
    threads.run(work, 2)
    assert work.ended


def test_an_error_in_a_helper_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError, match="helper"):
        threads.run(Work(error=ZeroDivisionError("helper")), 2)
    threads.run(Work(), 2)  # the helper is still there


def test_an_error_of_the_caller_waits_for_helpers() -> None:
    work = Work(seconds=0.05)

    def failing() -> None:
        work()
        if threading.get_ident() == work.caller:
            raise ZeroDivisionError("caller")

    with pytest.raises(ZeroDivisionError, match="caller"):
        threads.run(failing, 2)
    assert work.ended


def test_no_more_threads_than_are_asked_for() -> None:
    seen = set()

    def work() -> None:
        seen.add(threading.get_ident())
        time.sleep(0.002)

    threads.run(Work(), 4)
    for _ in range(20):
        seen.clear()
        threads.run(work, 2)
        assert 1 <= len(seen) <= 2


def test_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    klfast.set_num_threads(4)
    p, q = BATCHES[0]
    assert np.isfinite(klfast.kl_divergence(p, q)).any()
    assert threads._pool.queue.empty()


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """A function that lets the main thread be interrupted, as by the keyboard, in a while."""
    if sys.platform == "win32":
        pytest.skip("no timer signals on Windows")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)

    def after(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield after
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


def test_an_interruption_waits_for_helpers(alarm: Callable[[float], None]) -> None:
    """They write into memory that the caller gives up when it is interrupted."""
    work = Work(seconds=0.2)
    alarm(0.05)
    with pytest.raises(KeyboardInterrupt):
        threads.run(work, 2)
    assert work.ended


def test_after_an_interruption_all_is_well(alarm: Callable[[float], None]) -> None:
    klfast.set_num_threads(2)
    p, q = BATCHES[1]
    expected = klfast.kl_divergence(p, q).tobytes()

    def call_on_and_on() -> None:
        while True:
            klfast.kl_divergence(p, q)

    for number in range(10):
        alarm(0.003 + 0.001 * number)
        with pytest.raises(KeyboardInterrupt):
            call_on_and_on()
    assert klfast.kl_divergence(p, q).tobytes() == expected

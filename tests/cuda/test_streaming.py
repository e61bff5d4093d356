"""Arrays of the host on the device: in pieces, overlapping, and never more memory than these."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from distributions import cases
from measures import tokens_of

import klfast
from klfast import reference


@pytest.fixture(autouse=True)
def small_chunks(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time."""
    monkeypatch.setattr(import_module("klfast.kernels.cuda.streaming"), "CHUNK", 5000)


@pytest.fixture(params=[False, True], ids=["prompt", "late"])
def late(request: pytest.FixtureRequest, device: Any) -> None:
    """Streams of the twin that do nothing before somebody waits for them."""
    if request.param and not hasattr(device.cuda.stream, "deferred"):
        pytest.skip("only the twin's streams can be made to wait")
    if hasattr(device.cuda.stream, "deferred"):
        device.cuda.stream.deferred = request.param


@pytest.mark.usefixtures("late")
class TestStreams:
    def test_values(self) -> None:
        _, p, q = cases(150, "float32", "bfloat16")
        got = klfast.kl_divergence(p, q, backend="cuda", dtype="float64")
        np.testing.assert_allclose(got, reference.kl_divergence(p, q), rtol=2e-6, atol=1e-17)

    def test_metrics_targets_and_dropped_rows(self) -> None:
        _, p, q = cases(150, "float32", one_in=2)
        tokens = tokens_of(p)
        where = np.arange(len(p)) % 4 != 1
        tokens[~where] = -100
        got = klfast.compare(
            p, q, ["nll_q", "same_top"], tokens, where=where, backend="cuda", dtype="float64"
        )
        truth = reference.nll(q[where], tokens[where])
        np.testing.assert_allclose(got["nll_q"][where], truth, rtol=2e-6, atol=1e-11)
        truth = reference.same_top(p[where], q[where])
        np.testing.assert_array_equal(got["same_top"][where], truth)
        for values in got.values():
            assert np.isnan(values[~where]).all()

    def test_one_row_against_many_and_every_pair(self) -> None:
        _, p, q = cases(150, "float64", one_in=5)
        truth = reference.kl_divergence(p[:, None], q)
        for first, second, expected in ((p[:, None], q, truth), (p[2], q, truth[2])):
            got = klfast.kl_divergence(first, second, backend="cuda")
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-30)

    def test_any_strides(self) -> None:
        _, p, q = cases(150, "float64", one_in=5)
        truth = reference.kl_divergence(p, q)
        strange = np.repeat(p, 3, axis=-1)[::-1, ::-3][::-1, ::-1]
        for first, second, axis in ((strange, q, -1), (np.asfortranarray(p), q, -1), (p.T, q.T, 0)):
            got = klfast.kl_divergence(first, second, axis=axis, backend="cuda")
            np.testing.assert_allclose(got, truth, rtol=1e-12, atol=1e-30)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_log_softmax(self, dtype: str) -> None:
        x = np.random.default_rng(0).normal(size=(3, 7, 110)).astype(np.float32)
        where = np.arange(21).reshape(3, 7) % 5 != 0
        got = klfast.log_softmax(x, where=where, dtype=dtype, backend="cuda", vocab_size=100)
        expected = reference.log_softmax(x[..., :100])
        rtol = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)
        np.testing.assert_allclose(got.astype(np.float64)[where], expected[where], rtol=rtol)
        assert np.isnan(got[~where].astype(np.float64)).all()
        out = np.zeros((100, 3, 7), dtype="float32").transpose(1, 2, 0)
        klfast.log_softmax(x, out=out, backend="cuda", vocab_size=100)
        np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_no_more_memory_than_a_few_chunks(twin: Any) -> None:
    x = np.random.default_rng(0).normal(size=(40, 900)).astype(np.float32)
    largest = 0
    allocate = twin.cuda.alloc

    def watch(size: int) -> Any:
        nonlocal largest
        pointer = allocate(size)
        largest = max(largest, twin.cuda.memory.used)
        return pointer

    twin.cuda.alloc = watch
    klfast.entropy(x, backend="cuda")
    assert 0 < largest < 4 * 5000
    assert len(twin.launches) == 2 * 40  # a chunk is one row


def test_memory_that_runs_out_is_an_error_and_the_next_call_works(twin: Any) -> None:
    x = np.random.default_rng(0).normal(size=(40, 90)).astype(np.float32)
    twin.cuda.memory.limit = 2000
    with pytest.raises(MemoryError, match="Out of memory"):
        klfast.entropy(x, backend="cuda")
    twin.cuda.memory.limit = None
    np.testing.assert_allclose(klfast.entropy(x, backend="cuda"), reference.entropy(x), rtol=1e-6)


def test_neither_device_nor_stream_of_the_user_is_changed(twin: Any) -> None:
    x = np.zeros((4, 90), np.float32)
    stream = twin.cuda.Stream(non_blocking=True)
    with stream:
        klfast.entropy(x, backend="cuda")
        assert twin.cuda.get_current_stream() == stream
    assert stream.ptr not in {launch.stream for launch in twin.launches}

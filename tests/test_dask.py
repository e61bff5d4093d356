"""Dask arrays: lazily, block by block, the same values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import python

import klfast

da = pytest.importorskip("dask.array")

RNG = np.random.default_rng(0)
P = RNG.normal(size=(6, 7, 500)).astype(np.float32)
Q = (P + 0.1 * RNG.normal(size=P.shape)).astype(np.float32)
TOKENS = RNG.integers(500, size=(6, 7))
KEEP = RNG.random((6, 7)) < 0.7
#: Whole rows; rows cut into 5 blocks; all rows in one block, cut.
CHUNKS = [(2, 3, 500), (2, 3, 123), (6, 7, 100)]
chunked = pytest.mark.parametrize("chunks", CHUNKS)


def lazy(chunks: Any) -> tuple[Any, Any]:
    return da.from_array(P, chunks=chunks), da.from_array(Q, chunks=chunks)


def assert_same(found: Any, value: Any) -> None:
    """Of a Dask array: dtype, shape and values are those of the NumPy array."""
    assert isinstance(found, da.Array)
    computed = found.compute(scheduler="synchronous")
    assert found.dtype == computed.dtype == value.dtype
    assert found.shape == computed.shape == value.shape
    np.testing.assert_allclose(computed, value, rtol=3e-6, atol=1e-7)


@chunked
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": KEEP},
        {"where": KEEP, "reduction": "mean"},
        {"reduction": "sum"},
        {"base": 2, "temperature": 2.0},
        {"dtype": "float64"},
        {"vocab_size": 300},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_keywords(chunks: Any, options: dict[str, Any]) -> None:
    p, q = lazy(chunks)
    for function in (klfast.kl_divergence, klfast.js_divergence, klfast.total_variation):
        assert_same(function(p, q, **options), function(P, Q, **options))


@chunked
def test_every_function(chunks: Any) -> None:
    p, q = lazy(chunks)
    for name in ("jeffreys_divergence", "squared_hellinger", "chi2_divergence", "cross_entropy"):
        assert_same(getattr(klfast, name)(p, q), getattr(klfast, name)(P, Q))
    for name in ("renyi_divergence", "alpha_divergence", "tsallis_divergence"):
        assert_same(getattr(klfast, name)(p, q, 2), getattr(klfast, name)(P, Q, 2))
    assert_same(klfast.js_divergence(p, q, weight=0.2), klfast.js_divergence(P, Q, weight=0.2))
    assert_same(klfast.entropy(p), klfast.entropy(P))
    assert_same(klfast.renyi_entropy(p, 2), klfast.renyi_entropy(P, 2))
    assert_same(klfast.logsumexp(p), klfast.logsumexp(P))
    assert_same(klfast.token_log_probs(p, TOKENS), klfast.token_log_probs(P, TOKENS))
    pair = klfast.token_log_probs(p, TOKENS, return_entropy=True)
    for found, value in zip(
        pair, klfast.token_log_probs(P, TOKENS, return_entropy=True), strict=True
    ):
        assert_same(found, value)
    for options in ({}, {"where": KEEP}, {"base": 2, "temperature": 0.5, "vocab_size": 200}):
        assert_same(klfast.log_softmax(p, **options), klfast.log_softmax(P, **options))


@chunked
def test_compare(chunks: Any) -> None:
    metrics = ("kl", "js", "tv", "same_top", "topk_overlap:5", "nll_p", "delta_prob", "renyi:2")
    p, q = lazy(chunks)
    tokens = da.from_array(TOKENS, chunks=4)
    found = klfast.compare(p, q, metrics, targets=tokens)
    whole = klfast.compare(P, Q, metrics, targets=TOKENS)
    assert found.metrics == metrics
    assert (found.shape, found.vocab_size) == (whole.shape, whole.vocab_size)
    for name in metrics:
        assert_same(found[name], whole[name])
    found = klfast.compare(p, q, where=KEEP, reduction="mean")
    for name, value in klfast.compare(P, Q, where=KEEP, reduction="mean").items():
        assert_same(found[name], value)


@chunked
def test_axes_and_broadcasting(chunks: Any) -> None:
    p, q = lazy(chunks)
    kl = klfast.kl_divergence(P, Q)
    turned = [x.transpose(0, 2, 1) for x in (p, q)]
    assert_same(klfast.kl_divergence(*turned, axis=1), kl)
    assert_same(klfast.kl_divergence(*turned, axis=-2), kl)
    assert_same(klfast.log_softmax(turned[0], axis=1), klfast.log_softmax(P).transpose(0, 2, 1))
    assert_same(klfast.kl_divergence(p[:1], q), klfast.kl_divergence(P[:1], Q))
    assert_same(klfast.kl_divergence(p, q[2]), klfast.kl_divergence(P, Q[2]))
    assert_same(klfast.kl_divergence(p, Q), kl)


def test_blocks_that_do_not_fit_are_cut_and_not_joined() -> None:
    p, q = da.from_array(P, chunks=(2, 7, 200)), da.from_array(Q, chunks=(3, 7, 150))
    found = klfast.kl_divergence(p, q)
    assert_same(found, klfast.kl_divergence(P, Q))
    assert found.chunks[0] == (2, 1, 1, 2)


def test_chunks_of_rows_stay_what_they_are_and_nothing_is_read_before_it_must() -> None:
    def read(block_id: Any = None) -> Any:
        raise AssertionError("read")

    p = da.map_blocks(read, chunks=((2, 4), (500,)), dtype=np.float16, meta=np.empty((0, 0), "f2"))
    found = klfast.kl_divergence(p, p)
    assert (found.chunks, found.dtype) == (((2, 4),), np.float32)
    assert type(found._meta) is np.ndarray
    with pytest.raises(AssertionError, match="read"):
        found.compute(scheduler="synchronous")


@chunked
def test_rows_of_unknown_number(chunks: Any) -> None:
    some = np.arange(6) % 2 == 0
    unknown = da.from_array(some, chunks=2)
    p, q = (x[unknown] for x in lazy(chunks))
    found = klfast.kl_divergence(p, q).compute(scheduler="synchronous")
    np.testing.assert_allclose(found, klfast.kl_divergence(P[some], Q[some]), rtol=3e-6)


@chunked
def test_xarray(chunks: Any) -> None:
    xarray = pytest.importorskip("xarray")
    p, q = (xarray.DataArray(x, dims=("text", "place", "token")) for x in lazy(chunks))
    found = xarray.apply_ufunc(
        klfast.kl_divergence, p, q, input_core_dims=[["token"], ["token"]], dask="allowed"
    )
    assert found.dims == ("text", "place")
    assert_same(found.data, klfast.kl_divergence(P, Q))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"out": np.zeros((6, 7))}, TypeError, "out is given with Dask arrays"),
        ({"vocab_size": 1000}, ValueError, "vocab_size is 1000"),
        ({"alpha": 1}, TypeError, "unexpected keyword argument 'alpha'"),
        ({"where": np.ones((6, 7))}, TypeError, "where has dtype float64"),
        ({"where": np.ones((5, 7), bool)}, ValueError, "where has shape (5, 7)"),
        ({"axis": 5}, ValueError, "axis is 5"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    p, q = lazy((2, 3, 123))
    with pytest.raises(error) as caught:
        klfast.kl_divergence(p, q, **options)
    assert message in str(caught.value)


def test_arrays_that_do_not_fit_are_refused() -> None:
    p, q = lazy((2, 3, 123))
    with pytest.raises(ValueError, match="vocabularies of 500 and 400 entries"):
        klfast.kl_divergence(p, q[..., :400])
    with pytest.raises(ValueError, match="p and q have shapes"):
        klfast.kl_divergence(p, q[:4])
    with pytest.raises(TypeError, match="p is of type Array"):
        klfast.value_and_grad("kl", p, q)


def test_dask_is_not_imported_unasked() -> None:
    python(
        """
        import sys
        import numpy as np
        import klfast
        klfast.kl_divergence(np.zeros((2, 3), "f"), np.zeros((2, 3), "f"))
        assert not [name for name in sys.modules if name.partition(".")[0] == "dask"]
        """
    )


#: Whoever reads block 2 for the first time is killed: a worker on a machine that is lost.
CLUSTER = """
import os, signal, sys
from pathlib import Path
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster
import klfast

def read(block_id=None):
    number = block_id[0] * 3 + block_id[1]
    first = Path(sys.argv[1])
    if number == 2 and not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return np.random.default_rng(number).normal(size=(5, 4000)).astype("f")

if __name__ == "__main__":
    chunks = ((5,) * 4, (4000,) * 3)
    p = da.map_blocks(read, chunks=chunks, dtype="f", meta=np.empty((0, 0), "f"))
    q = p * np.float32(1.01)
    metrics = ("kl", "js", "same_top")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster):
            found = da.compute(*klfast.compare(p, q, metrics).values())
    assert Path(sys.argv[1]).exists()
    x, y = (each.compute(scheduler="synchronous") for each in (p, q))
    whole = klfast.compare(x, y, metrics)
    for name, values in zip(metrics, found):
        np.testing.assert_allclose(values, whole[name], rtol=3e-6)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    program = tmp_path / "program.py"
    program.write_text(CLUSTER)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "killed")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

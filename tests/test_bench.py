"""The benchmark: every contender computes the same, and is timed as often as it should be."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import klfast
from klfast import _bench, _peers, cli
from klfast._bench import OWN, READ, bench, random_inputs, take_turns

ROOT = Path(__file__).parents[1]
MEASURES = tuple(_peers._numpy_measures())
# torch.compile takes a compiler and seconds, and compiles what torch eager runs.
QUICK_PEERS = tuple(peer for peer in _peers.PEERS if peer.name != "torch.compile")


def check(peer: _peers.Peer, dtype: str, measures: tuple[str, ...]) -> None:
    if not peer.available():
        pytest.skip(f"{peer.package} is not installed")
    given = random_inputs(4, 300, dtype)
    for measure in measures:
        run = _bench.peer_run(peer, measure, given)
        assert run is not None
        found = np.asarray(run(), np.float64)
        np.testing.assert_allclose(
            found, _bench.true_values(measure, given), rtol=1e-3, err_msg=measure
        )


@pytest.mark.parametrize("peer", QUICK_PEERS, ids=lambda peer: peer.name)
def test_peers_compute_the_same(peer: _peers.Peer) -> None:
    check(peer, "float32", MEASURES)


@pytest.mark.parametrize("peer", QUICK_PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_peers_widen(peer: _peers.Peer, dtype: str) -> None:
    check(peer, dtype, ("kl", "logsumexp", "token_log_probs"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # PyTorch's deprecations are its own
def test_torch_compile_computes_the_same() -> None:
    (peer,) = set(_peers.PEERS) - set(QUICK_PEERS)
    check(peer, "float32", ("kl", "compare"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("measure", [*MEASURES, "topk_overlap:5", "top_p", "alpha:0.5"])
def test_klfast_computes_the_same(measure: str, dtype: str) -> None:
    given = random_inputs(4, 300, dtype)
    result = _bench.own_run(measure, given)()
    assert _bench.largest_error(result, _bench.true_values(measure, given)) < 2e-6


def test_true_values_are_those_of_the_measure() -> None:
    """Given by hand, since every contender is held against them."""
    given = random_inputs(5, 7)
    kl = klfast.reference.kl_divergence
    np.testing.assert_array_equal(
        _bench.true_values("reverse_kl", given), kl(given.q[:4], given.p[:4])
    )
    np.testing.assert_array_equal(
        _bench.true_values("entropy_q", given), klfast.reference.entropy(given.q[:4])
    )
    np.testing.assert_array_equal(
        _bench.true_values("token_log_probs", given),
        klfast.reference.token_log_probs(given.p[:4], given.tokens[:4]),
    )
    np.testing.assert_array_equal(
        _bench.true_values("compare", given)[:, 0], kl(given.p[:4], given.q[:4])
    )


def test_inputs() -> None:
    given = random_inputs(50, 1001, "float32")
    assert given.p.shape == given.q.shape == (50, 1001)
    assert np.std(given.p) == pytest.approx(3, rel=0.02)
    assert np.std(given.q - given.p) == pytest.approx(0.3, rel=0.02)
    assert (given.tokens.shape, given.tokens.min() >= 0, given.tokens.max() < 1001) == (
        (50,), True, True,
    )  # fmt: skip
    assert not np.shares_memory(given.p, given.q)
    for array in (given.p, given.q):  # a plain read of the memory reads them
        assert np.shares_memory(array, given.memory)
    np.testing.assert_array_equal(given.p, random_inputs(50, 1001).p)


def test_read_all_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "klfast.kernels.cpu", None)
    _bench.read_run("kl", random_inputs(2, 10))()


def test_bench() -> None:
    done: list[tuple[int, int]] = []
    timings = bench(
        3, 100, metrics=("kl", "entropy", "compare"), rounds=3, peers=["numpy"],
        progress=lambda *numbers: done.append(numbers),
    )  # fmt: skip
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [(each.metric, each.contender) for each in timings] == [
        (metric, name)
        for metric in ("kl", "entropy", "compare")
        for name in (READ, OWN, "numpy")
    ]  # fmt: skip
    for each in timings:
        assert each.failure is None
        assert each.rounds == 3
        assert each.seconds is not None
        assert each.seconds > 0
        assert (each.error is None) == (each.contender == READ)
        assert each.error is None or each.error < (2e-6 if each.contender == OWN else 1e-3)
        assert each.contender != READ or each.of_read == 1
        assert each.contender != OWN or each.slower == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows, vocab, rounds are 0, 131072, 5"),
        ({"rounds": 0}, "rounds are 256, 131072, 0"),
        ({"metrics": ("nll_p",)}, "'nll_p' needs targets"),
        ({"metrics": ("lk",)}, "did you mean 'kl'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"peers": ["mxnet"]}, "peer 'mxnet' is unknown; accepted: numpy, scipy"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(**arguments)


def _logging(order: list[str], name: str, seconds: float) -> _bench.Run:
    def call() -> None:
        order.append(name)
        time.sleep(seconds)

    return call


def test_turns() -> None:
    order: list[str] = []
    runs = {"a": _logging(order, "a", 0.021), "slow": _logging(order, "slow", 0.2)}
    times = take_turns(runs, 4, patience=0.15)
    assert order == ["a", "slow", "a", "slow", "a", "a"]
    assert [len(each) for each in times.values()] == [4, 2]
    assert min(times["slow"]) >= 0.2


def test_a_short_turn_does_not_count_what_comes_first() -> None:
    """Its first calls pay for what the contender before has left in the caches."""
    order: list[str] = []

    def call() -> None:
        time.sleep(0.004 if len(order) > 2 else 0.015)
        order.append("short")

    (seconds,) = take_turns({"short": call}, 1)["short"]
    assert len(order) == 5  # one to know how long it takes, two untimed, two timed
    assert seconds < 0.015


def test_short_turns_are_repeated() -> None:
    calls: list[None] = []
    times = take_turns({"short": lambda: calls.append(None)}, 1)
    assert len(calls) > 100
    assert times["short"][0] < 1e-4


def test_ratio_pairs_rounds() -> None:
    """A slow contender's rounds are those that the others had with it, the first ones."""
    assert _bench.ratio([2.0, 6.0], [1.0, 2.0, 50.0]) == 2.5


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("klfast._bench.PEERS", QUICK_PEERS)
    file = tmp_path / "o.json"
    arguments = ["bench", "--rows", "4", "--vocab", "1000", "--rounds", "1"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "two inputs of 4 x 1000 float32" in out
    timings = json.loads(file.read_text())["timings"]
    available = [peer.name for peer in QUICK_PEERS if peer.available()]
    assert [(each["metric"], each["contender"]) for each in timings] == [
        (metric, name)
        for metric in _bench.DEFAULT_BENCH_METRICS
        for name in (READ, OWN, *available)
    ]


@pytest.mark.slow
def test_make_bench(tmp_path: Path) -> None:
    """All of benchmarks/run.py, on next to nothing."""
    pytest.importorskip("matplotlib")
    arguments = ["--shapes", "2x300,1x50", "--only", "entropy,kl", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", *arguments, "--out", tmp_path],
        cwd=tmp_path,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},  # compiling would take most of the time
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "RESULTS.md", "results.json", "roofline.png",
    ]  # fmt: skip
    timings = json.loads((tmp_path / "results.json").read_text())["timings"]
    assert {(each["rows"], each["vocab"]) for each in timings} == {(2, 300), (1, 50)}
    assert {(each["metric"], each["dtype"]) for each in timings} == {
        ("kl", "float32"), ("kl", "bfloat16"), ("kl", "float16"), ("entropy", "float32"),
    }  # fmt: skip
    for text in (done.stdout, (tmp_path / "RESULTS.md").read_text()):
        for word in ("2 x 300", "1 x 50", "bfloat16", "numpy", "read speed"):
            assert word in text

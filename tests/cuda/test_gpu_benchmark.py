"""benchmarks/gpu.py, with next to nothing in the place of the GPU: that all of it runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import klfast

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


class Event:
    """Every call takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which takes the CPU for a GPU."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    facts = SimpleNamespace(
        name="Twin", multi_processor_count=4, total_memory=1 << 30, L2_cache_size=1 << 20
    )
    graph = type("Graph", (), {"replay": lambda self: None})
    fakes: dict[str, Any] = {
        "is_available": lambda: True, "synchronize": lambda: None, "empty_cache": lambda: None,
        "get_device_properties": lambda number: facts, "Event": Event, "CUDAGraph": graph,
        "Stream": object, "stream": nullcontext, "graph": lambda graph, stream: nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(klfast, "backends", lambda: {"cuda": True})
    return module


def run(gpu: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    arguments = [
        "gpu.py", "--quick", "--out", str(folder), "--peers", "torch eager", "--jobs", "0", *more
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    return json.loads((folder / "gpu.json").read_text())


def test_every_measure_is_timed_and_checked(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_cases", lambda options: iter([
        (3, 1000, "float32", "flat", gpu.MEASURES), (80, 300, "bfloat16", "peaked", gpu.MEASURES),
    ]))  # fmt: skip
    content = run(gpu, tmp_path, monkeypatch)
    timings = content["timings"]
    assert {t["measure"] for t in timings} == set(gpu.MEASURES)
    assert not [t for t in timings if t["failure"]]
    assert all(t["error"] < 2e-6 for t in timings if t["contender"] == "klfast")
    assert all(
        t["gradient_error"] <= gpu.GRADIENT_TOLERANCE[t["dtype"]]
        for t in timings
        if t["contender"] == "klfast" and t["measure"].endswith(gpu.GRADIENT) and t["rows"] > 64
    )
    assert sum(t["gradient_error"] is not None for t in timings) == 2 * len(gpu.GRADIENTS)
    assert {t["contender"] for t in timings} == {"klfast", "torch eager"}
    assert all(t["seconds"] > 0 and t["of_bound"] > 0 for t in timings)
    assert "Twin, 4 multiprocessors" in content["about"]["device"]
    assert "| klfast" not in (tmp_path / "GPU.md").read_text()
    assert "kl and gradient" in capsys.readouterr().out


def test_what_is_wrong_is_an_error(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu, "_cases", lambda options: iter([(80, 300, "float32", "flat", ("kl", "tv"))])
    )
    monkeypatch.setattr(klfast, "kl_divergence", lambda p, q: p[..., 0] * 0)
    with pytest.raises(SystemExit, match="klfast is wrong:\nkl of 80 x 300 float32: off by 1"):
        run(gpu, tmp_path, monkeypatch)


def test_wrong_gradients_are_an_error(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu, "_cases", lambda options: iter([(80, 300, "float32", "flat", ("kl and gradient",))])
    )
    right = klfast.value_and_grad

    def twice(*arguments: Any) -> Any:
        value, gradient = right(*arguments)
        return value, 2 * gradient

    monkeypatch.setattr(klfast, "value_and_grad", twice)
    with pytest.raises(
        SystemExit, match=r"kl and gradient of 80 x 300 float32: gradient off by (0\.99|1)"
    ):
        run(gpu, tmp_path, monkeypatch)


def test_what_was_measured_is_written_however_a_run_ends(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """klfast at every case, before its peers at any; errors that JSON has no number for."""
    cases = [(80, width, "float32", "flat", ("kl", "tv")) for width in (100, 200)]
    monkeypatch.setattr(gpu, "_cases", lambda options: iter(cases))

    def peer(measure: str) -> Any:
        if measure == "tv":
            raise KeyboardInterrupt
        return lambda p, q: p[..., 0] * float("inf")

    monkeypatch.setattr(gpu, "TORCH", (SimpleNamespace(name="torch eager", measure=peer),))
    with pytest.raises(KeyboardInterrupt):
        run(gpu, tmp_path, monkeypatch)
    timings = json.loads((tmp_path / "gpu.json").read_text())["timings"]
    assert [(t["contender"], t["vocab"]) for t in timings] == [
        ("klfast", v) for v in (100, 100, 200, 200)
    ]
    monkeypatch.setattr(
        gpu, "_cases", lambda options: iter([(80, 100, "float32", "flat", ("kl",))])
    )
    assert [t["error"] for t in run(gpu, tmp_path, monkeypatch)["timings"]][1] == "inf"
    monkeypatch.setattr(gpu, "_cases", lambda options: iter(cases))
    assert len(run(gpu, tmp_path, monkeypatch, "--minutes", "0")["timings"]) == 2
    assert "ended after 0 minutes" in capsys.readouterr().out


def test_each_measure_of_each_data_is_called_to_compile(gpu: Any) -> None:
    for data, measure in (("flat", "kl and gradient"), ("peaked", "entropy"), ("apart", "renyi:2")):
        assert gpu._call_once((600, 50, "bfloat16", data, measure)) is None
    assert "no measure" in gpu._call_once((600, 50, "float32", "flat", "no measure"))


def test_every_peer_has_its_measures(gpu: Any) -> None:
    measures = set(gpu.MEASURES)
    for table in (gpu.LIGER, gpu.SPECULATORS, gpu.QUACK):
        assert table.keys() <= measures
    for measure in gpu.MEASURES:
        options = SimpleNamespace(peers=None)
        names = gpu._contenders(measure, options)
        assert {"klfast", "torch eager", "torch.compile"} <= names.keys()


def test_without_a_gpu_it_says_so(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch sees no CUDA device"):
        run(gpu, tmp_path, monkeypatch)

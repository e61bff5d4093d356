"""Which backend runs a call, what happens without it, and what can be asked."""

import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_arrays import Exporter

import klfast
from klfast import _dispatch, _reference_backend
from klfast._operations import OPERATIONS

P = np.zeros((2, 5), np.float32)


@pytest.fixture(autouse=True)
def fresh_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees a backend that another selected, or a warning that was already given."""
    monkeypatch.setattr(_dispatch, "_selected", {})


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, reason: str | None) -> Any:
    """Install a compiled backend that says `reason` of itself, and records calls otherwise."""
    module = ModuleType(f"klfast.kernels.{name}")
    calls: list[Any] = []

    def run(*arguments: Any) -> None:
        calls.append(arguments)
        arguments[5].fill(0.25)

    members = SimpleNamespace(
        available=lambda: reason,
        run=run,
        set_num_threads=calls.append,
        get_num_threads=lambda: 3,
        warmup=lambda *arguments: calls.append(arguments),
        explain=lambda name, p, q: {"kernel": f"{name}_float32", "passes": 1, "threads": 3},
        calls=calls,
    )
    vars(module).update(vars(members))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return members


def test_auto_takes_the_compiled_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pretend(monkeypatch, "cpu", None)
    assert klfast.kl_divergence(P, P).tolist() == [0.25, 0.25]
    assert klfast.kl_divergence(P, P, backend="cpu").tolist() == [0.25, 0.25]
    assert len(cpu.calls) == 2
    assert klfast.kl_divergence(P, P, backend="reference").tolist() == [0, 0]


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu", "the cache directory is on fire")
    with pytest.warns(RuntimeWarning, match=r"'cpu' cannot be used: the cache .* on fire"):
        assert klfast.kl_divergence(P, P).tolist() == [0, 0]
    # Warnings are errors here: there is no second one.
    assert klfast.entropy(P).shape == (2,)
    assert klfast.compare(P, P)["kl"].tolist() == [0, 0]


def test_a_named_backend_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu", "the cache directory is on fire")
    for call in (
        lambda: klfast.kl_divergence(P, P, backend="cpu"),
        lambda: klfast.warmup("kl", backend="cpu"),
        lambda: klfast.set_num_threads(2),
        klfast.get_num_threads,
    ):
        with pytest.raises(klfast.BackendUnavailable, match=r"'cpu' cannot be used: .* on fire"):
            call()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), "numba is not installed"),
        (ImportError("Numba needs NumPy 2.9 or less"), "ImportError: Numba needs NumPy"),
        (OSError("libLLVM.so: cannot open"), "OSError: libLLVM.so"),
    ],
)
def test_why_a_backend_cannot_be_imported(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> Any:
        if name == "klfast.kernels.cpu":
            raise error
        return _reference_backend

    monkeypatch.setattr(_dispatch, "import_module", import_module)
    with pytest.raises(klfast.BackendUnavailable, match=reason):
        klfast.kl_divergence(P, P, backend="cpu")
    status = klfast.backends()["cpu"]
    assert not status
    assert not status.usable
    assert reason in str(status.reason)
    assert reason in repr(status)
    with pytest.warns(RuntimeWarning, match=reason):
        klfast.kl_divergence(P, P)


def test_the_extra_that_a_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'cupy'", name="cupy")

    monkeypatch.setattr(_dispatch, "import_module", import_module)
    with pytest.raises(klfast.BackendUnavailable, match=r'"klfast\[cuda12\]" or "klfast\[cuda13'):
        _dispatch.load("cuda")


def test_backends_names_all_and_why_not() -> None:
    statuses = klfast.backends()
    assert list(statuses) == ["cpu", "cuda", "reference"]
    assert statuses["reference"]
    assert statuses["reference"].reason is None
    assert repr(statuses["reference"]) == "usable"
    for status in statuses.values():
        assert status.usable == (status.reason is None)
        assert status.reason is None or f"not usable: {status.reason}" == repr(status)


def test_arrays_on_a_gpu_are_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", "there is no CUDA driver")
    x = Exporter(P, (2, 0))
    with pytest.raises(
        klfast.BackendUnavailable, match=r"arrays are on cuda:0, .* no CUDA driver; move them"
    ):
        klfast.kl_divergence(x, x)
    names: tuple[Any, ...] = ("cpu", "reference")
    for name in names:
        if name == "cpu":
            pretend(monkeypatch, "cpu", None)
        with pytest.raises(
            klfast.BackendUnavailable, match=f"{name!r} reads memory of cpu, and .* on cuda:0"
        ):
            klfast.kl_divergence(x, x, backend=name)


def test_cuda_by_name() -> None:
    status = klfast.backends()["cuda"]
    with pytest.raises(klfast.BackendUnavailable, match="backend 'cuda'") as caught:
        klfast.kl_divergence(P, P, backend="cuda")
    assert status.reason is None or status.reason in str(caught.value)


def test_arrays_on_the_host_go_to_a_gpu_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = pretend(monkeypatch, "cuda", None), pretend(monkeypatch, "cpu", None)
    klfast.kl_divergence(P, P)
    assert (len(cuda.calls), len(cpu.calls)) == (0, 1)
    klfast.kl_divergence(P, P, backend="cuda")
    assert (len(cuda.calls), len(cpu.calls)) == (1, 1)


def test_other_devices() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, 5, device="meta")
    with pytest.raises(klfast.BackendUnavailable, match="no backend reads arrays on meta"):
        klfast.kl_divergence(x, x)
    opencl = Exporter(P, (4, 0))
    with pytest.raises(klfast.BackendUnavailable, match="on DLPack device type 4:0"):
        klfast.kl_divergence(opencl, opencl)


def test_the_compiled_backend_is_not_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pretend(monkeypatch, "cpu", None)
    assert klfast.kl_divergence(P[:0], P[:0]).shape == (0,)
    assert np.isnan(klfast.kl_divergence(P, P, where=False)).all()
    assert cpu.calls == []


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pretend(monkeypatch, "cpu", None)
    klfast.set_num_threads(2)
    klfast.set_num_threads(np.int64(4))  # type: ignore[arg-type]
    assert cpu.calls == [2, 4]
    assert klfast.get_num_threads() == 3


def test_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pretend(monkeypatch, "cpu", None)
    klfast.warmup()
    klfast.warmup("kl")
    klfast.warmup(("renyi", "renyi:2", "entropy", "js:0.1"), (np.float16, "bfloat16"))
    klfast.warmup("kl", np.float64)
    assert cpu.calls == [
        (tuple(OPERATIONS), ("float32",)),
        (("kl",), ("float32",)),
        (("renyi", "entropy", "js"), ("float16", "bfloat16")),
        (("kl",), ("float64",)),
    ]
    klfast.warmup(backend="reference")


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu", None)
    q = np.broadcast_to(np.float16(0), (3, 2, 5))
    explanation = klfast.explain(P, q, "kl", where=[True, False])
    assert explanation.to_dict() == {
        "metric": "kl",
        "rows": 3,
        "vocabulary": 5,
        "input_bytes": 3 * 5 * (4 + 2),
        "backend": "cpu",
        "kernel": "kl_float32",
        "passes": 1,
        "threads": 3,
    }
    assert explanation["passes"] == 1
    lines = repr(explanation).splitlines()
    assert lines[0].split() == ["metric", "kl"]
    assert len(lines) == 8


def test_explain_of_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operation in OPERATIONS.items():
        q = None if operation.rows == "p" else P
        explanation = klfast.explain(P, q, name, backend="reference")
        assert explanation["backend"] == "reference"
        assert explanation["kernel"] == f"klfast.reference.{operation.function}"
    assert klfast.explain(P, P, "renyi:2", backend="reference")["metric"] == "renyi:2"


def test_the_reference_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = np.random.default_rng(3).normal(size=(2, 7, 5))
    whole = klfast.kl_divergence(p, q, backend="reference")
    softmax = klfast.log_softmax(p, backend="reference")
    monkeypatch.setattr(_reference_backend, "BLOCK_ENTRIES", 11)
    np.testing.assert_array_equal(klfast.kl_divergence(p, q, backend="reference"), whole)
    np.testing.assert_array_equal(klfast.log_softmax(p, backend="reference"), softmax)
    with pytest.raises(ValueError, match="the reference backend runs on 1"):
        _reference_backend.set_num_threads(2)


def test_the_fallback_changes_no_global_state(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu", "no compiler")
    filters, errors = list(warnings.filters), np.geterr()
    with pytest.warns(RuntimeWarning):
        klfast.kl_divergence(P, P)
    assert list(warnings.filters) == filters
    assert np.geterr() == errors

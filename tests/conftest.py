"""What the tests share."""

import gc
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from twin import compiler, installed

import klfast
from klfast import _dispatch
from klfast._arrays import Rows

MUCH_FOR_THE_TWIN = {
    "test_peaked_logits_of_a_large_vocabulary",
    "test_no_row_of_close_models_is_negative",
    "test_the_first_tile_is_all_masked",
}


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what lives to the end: it would go through it all again."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none and nobody has asked for it.

    What is much work for the twin is slow.
    """
    for item in items:
        if item.name.partition("[")[0] in MUCH_FOR_THE_TWIN and "[twin" in item.name:
            item.add_marker(pytest.mark.slow)
    if "gpu" in config.option.markexpr or klfast.backends()["cuda"]:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_header() -> str:
    """Say why tests that need a GPU are not there."""
    status = klfast.backends()["cuda"]
    return f"tests marked gpu: {status.reason or 'run'}"


@pytest.fixture(
    params=["reference", "cpu", "twin", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that takes host memory, by name: "cuda" on a device and on its twin."""
    name: str = request.param
    if name == "twin":
        with twin_installed():
            yield "cuda"
        return
    skip_unless_usable(name)
    yield name


@pytest.fixture(params=["twin", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy, or what the twin has in its place."""
    if request.param == "twin":
        with twin_installed() as cupy:
            yield cupy
        return
    skip_unless_usable("cuda")
    yield import_module("cupy")


@pytest.fixture
def twin(device: Any) -> Any:
    """Only the twin, for what a device does not show."""
    if not hasattr(device, "launches"):
        pytest.skip("only the twin shows this")
    return device


def twin_installed() -> Any:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return installed()


def skip_unless_usable(name: str) -> None:
    status = klfast.backends()[name]
    if not status:
        pytest.skip(f"{name}: {status.reason}")


@pytest.fixture
def pair() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two batches of logits, shape (3, 4, 50)."""
    rng = np.random.default_rng(7)
    p = rng.normal(size=(3, 4, 50)).astype(np.float32)
    return p, (p + 0.3 * rng.normal(size=p.shape)).astype(np.float32)


class Recorder:
    """A backend that computes nothing and keeps what it was given."""

    __name__ = "klfast.kernels.cpu"

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.calls: list[dict[str, Any]] = []

    def run(
        self,
        name: str,
        p: Rows,
        q: Rows | None,
        parameters: tuple[float, ...],
        rows: NDArray[np.int64] | None,
        out: NDArray[np.float64],
        tokens: NDArray[np.int64] | None = None,
    ) -> None:
        self.calls.append(
            {"name": name, "p": p, "q": q, "parameters": parameters, "rows": rows, "tokens": tokens}
        )
        out[slice(None) if rows is None else rows] = self.value


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    """Put a `Recorder` in the place of the CPU backend."""

    def install(value: float = 1.0) -> Recorder:
        backend = Recorder(value)
        monkeypatch.setitem(_dispatch._selected, ("auto", "cpu"), backend)
        return backend

    return install

"""What the tests share."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import klfast
from klfast import _dispatch
from klfast._arrays import Rows


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what lives to the end: it would go through it all again."""
    gc.freeze()


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that reads host memory, by name."""
    name: str = request.param
    status = klfast.backends()[name]
    if not status:
        pytest.skip(f"{name}: {status.reason}")
    return name


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

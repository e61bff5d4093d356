"""The squared Hellinger distance in one read: c, tiles, parts of rows, and rows that it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from klfast.kernels.cpu import runs
from numpy.typing import NDArray

import klfast
from klfast import reference

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


def _pair(width: int, rows: int, scale: float, distance: float) -> Pair:
    rng = np.random.default_rng(width)
    p = scale * rng.normal(size=(rows, width)).astype(np.float32)
    return p, p + np.float32(distance) * rng.normal(size=p.shape).astype(np.float32)


def _check(p: NDArray[Any], q: NDArray[Any]) -> None:
    found = klfast.squared_hellinger(p, q, dtype=np.float64)
    np.testing.assert_allclose(found, reference.squared_hellinger(p, q), rtol=2e-6, atol=1e-17)
    np.testing.assert_array_equal(found, klfast.squared_hellinger(q, p, dtype=np.float64))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are run."""
    names: list[str] = []
    compiled = runs.compiled

    def recorded(module: str, *arguments: str | bool) -> Any:
        names.append(module)
        return compiled(module, *arguments)

    monkeypatch.setattr(runs, "compiled", recorded)
    return names


@pytest.mark.parametrize("distance", [1e-5, 1e-3, 0.3, 2.0])
@pytest.mark.parametrize("width", [5000, 80001])  # whole, and in three parts
def test_ordinary_rows_are_read_once(modules: list[str], width: int, distance: float) -> None:
    _check(*_pair(width, 3, 2.0, distance))
    assert set(modules) == {"affinity"}


def test_rows_without_much_in_common_are_read_once(modules: list[str]) -> None:
    p, q = _pair(70000, 3, 3.0, 0.1)
    q[0] = q[0, ::-1]
    q[1, 1::3] = -np.inf
    p[2, ::2] = -np.inf
    _check(p, q)
    assert set(modules) == {"affinity"}


@pytest.mark.parametrize("at", [0, 2047, 2048, 40000, 79999])
@pytest.mark.parametrize("height", [8.0, 14.0, 30.0])
def test_a_top_anywhere_and_elsewhere_than_the_mean(at: int, height: float) -> None:
    p, q = _pair(80000, 3, 1.0, 1e-3)
    p[:, at] += height
    q[:, at] += height + np.array([0.0, 0.5, -3.0], np.float32)
    _check(p, q)


def test_a_mean_that_drifts_and_constants_between_rows() -> None:
    p, q = _pair(80000, 4, 1.0, 1e-2)
    q[0] += np.linspace(-0.5, 0.5, 80000, dtype=np.float32)
    q[1] += np.repeat(np.array([0.0, 3.0], np.float32), 40000)
    q[2] += np.float32(12.3)
    q[3] += np.float32(123.4)
    _check(p, q)


def test_references_that_move_far_apart() -> None:
    p, q = _pair(80000, 2, 1.0, 0.1)
    p[:, 50000] = 90.0
    q[0, 60000] = 90.0
    q[1, 5] = -300.0
    _check(p, q)


def test_what_is_not_a_number_stays_so() -> None:
    p, _ = _pair(5000, 4, 1.0, 1.0)
    p[0, 7] = np.nan
    p[1, 4999] = np.inf
    p[2] = -np.inf
    assert np.isnan(klfast.squared_hellinger(p, p.copy())[:3]).all()
    assert klfast.squared_hellinger(p, p.copy())[3] == 0.0

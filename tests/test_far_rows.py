"""Rows that have little to do with each other are as exact as close ones, and as fast."""

from typing import Any

import numpy as np
import pytest
from klfast.kernels.cpu import runs

import klfast

FUNCTIONS: dict[str, tuple[Any, dict[str, float]]] = {
    "kl": (klfast.kl_divergence, {}),
    "cross_entropy": (klfast.cross_entropy, {}),
    "chi2": (klfast.chi2_divergence, {}),
    "js": (klfast.js_divergence, {}),
    "tv": (klfast.total_variation, {}),
    "renyi:0.5": (klfast.renyi_divergence, {"alpha": 0.5}),
    "renyi:4": (klfast.renyi_divergence, {"alpha": 4.0}),
    "alpha:5": (klfast.alpha_divergence, {"alpha": 5.0}),
}

KINDS = ["uniform", "unrelated", "one far entry", "rare in p alone", "below the normal range"]


def rows(kind: str, n: int, width: int, spread: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    p, q = (spread * rng.standard_normal((2, n, width))).astype(np.float32)
    if kind == "uniform":
        q = np.zeros((1, width), np.float32)
    elif kind == "rare in p alone":  # exponents whose whole part is larger than their constant
        q = p.copy()
        q[:, 1::7] -= np.float32(3.0)
        p[:, 1::7] -= rng.uniform(10, 60, (n, 1)).astype(np.float32)
    elif kind == "one far entry":  # that has next to nothing of P and much of Q
        q = p + (0.3 * rng.standard_normal((n, width))).astype(np.float32)
        q[np.arange(n), p.argmin(1)] += rng.uniform(5, 50, n).astype(np.float32)
    elif kind == "below the normal range":  # probabilities of 1e-35 and less, in close rows
        p[:, 1::3] -= rng.uniform(80, 400, p[:, 1::3].shape).astype(np.float32)
        q = p + (1e-3 * rng.standard_normal((n, width))).astype(np.float32)
    return p, q


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_far_rows_are_exact(name: str, kind: str, spread: float) -> None:
    function, options = FUNCTIONS[name]
    for n, width in ((60, 7), (60, 300), (4, 5000)):
        p, q = rows(kind, n, width, spread)
        for a, b in ((p, q), (q, p)):
            found = function(a, b, dtype=np.float64, **options)
            wide = function(a.astype(np.float64), b.astype(np.float64), **options)
            np.testing.assert_allclose(found, wide, rtol=2e-6, atol=1e-17)


def test_where_one_symbol_decides_a_high_order() -> None:
    # The constant guessed from the maxima leaves 1 + C, whose logarithm is taken, next to nothing.
    p = (0.5 * np.random.default_rng(0).standard_normal((500, 1000))).astype(np.float32)
    u = np.zeros((1, 1000), np.float32)
    found = klfast.alpha_divergence(p, u, alpha=5.0, dtype=np.float64)
    wide = klfast.alpha_divergence(p.astype(np.float64), u.astype(np.float64), alpha=5.0)
    np.testing.assert_allclose(found, wide, rtol=1e-6)


def left_to_float64(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the float64 kernel is given, as calls are made."""
    left: list[int] = []
    exact = runs.run_exact

    def counted(step: Any, p: Any, q: Any, numbers: Any, *rest: Any) -> None:
        left.append(p.count if numbers is None else len(numbers))
        exact(step, p, q, numbers, *rest)

    monkeypatch.setattr(runs, "run_exact", counted)
    return left


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize(("n", "width"), [(40, 300), (20, 20000), (2, 150000)])
def test_sums_far_apart_do_not_need_float64(
    scale: float, n: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the largest entries, the sums of P and Q are up to 30 times as far apart."""
    left = left_to_float64(monkeypatch)
    rng = np.random.default_rng(0)
    p = (scale * rng.standard_normal((n, width))).astype(np.float32)
    q = (p + 2.0 * rng.standard_normal((n, width))).astype(np.float32)
    for function in (klfast.total_variation, klfast.js_divergence):
        found = function(p, q, dtype=np.float64)
        assert np.array_equal(found, function(q, p, dtype=np.float64))
        assert sum(left) == 0
        wide = function(p.astype(np.float64), q.astype(np.float64))
        np.testing.assert_allclose(found, wide, rtol=2e-6)
        left.clear()


@pytest.mark.parametrize("name", ["kl", "chi2", "renyi:0.5"])
def test_uniform_rows_do_not_need_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_to_float64(monkeypatch)
    function, options = FUNCTIONS[name]
    p, u = rows("uniform", 40, 5000, 2.0)
    function(p, u, **options)
    function(u, p, **options)
    assert sum(left) <= 4

"""Blocks of entries whose log-ratios are small take other formulas than the rest of a row.

Where one way of computing goes over into the other must not show: neither in a row of both kinds of
blocks, nor at the largest log-ratio of the shorter way, nor where a block turns out to be far only
at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import klfast
from klfast import reference

WIDTH = 5 * 2048 + 700
BLOCK = 512
METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "kl": reference.kl_divergence,
    "reverse_kl": lambda p, q: reference.kl_divergence(q, p),
    "tv": reference.total_variation,
    "hellinger2": reference.squared_hellinger,
    "js": reference.js_divergence,
    "js:0.1": lambda p, q: reference.js_divergence(p, q, weight=0.1),
    "jeffreys": reference.jeffreys_divergence,
    "renyi:2": lambda p, q: reference.renyi_divergence(p, q, alpha=2.0),
    "renyi:0.7": lambda p, q: reference.renyi_divergence(p, q, alpha=0.7),
    "cross_entropy": reference.cross_entropy,
}


def _rows() -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    random = np.random.default_rng(4)
    x = (3 * random.standard_normal(WIDTH)).astype(np.float32)
    noise = random.standard_normal(WIDTH)
    number = np.arange(WIDTH) // BLOCK
    place = np.arange(WIDTH) % BLOCK
    sign = np.where(np.arange(WIDTH) % 2 == 0, 1.0, -1.0)
    masked = np.where(number % 3 == 1, -np.inf, 0.0)
    differences = {
        "near": 0.1 * noise,
        "far": 4.0 * noise,
        "every second block far": np.where(number % 2 == 1, 4.0, 0.1) * noise,
        "far at the end of a block": 0.05 * noise + np.where(place == BLOCK - 1, 6.0, 0.0),
        "far in the first block": np.where(number == 0, 3.0, 0.01) * noise,
        "far in the last block": np.where(number == number[-1], 3.0, 0.01) * noise,
        "as far as the shorter way goes": sign * 3.5 * math.log(2.0),
        "just as far in one pass": sign * 2.5 * math.log(2.0),
        "a little less": sign * 2.499 * math.log(2.0),
        "masked in blocks": 0.2 * noise,
        "shifted": 0.1 * noise + 5.0,
    }
    rows = {name: (x, (x + d).astype(np.float32)) for name, d in differences.items()}
    p, q = rows["masked in blocks"]
    rows["masked in blocks"] = (p + masked).astype(np.float32), (q + masked).astype(np.float32)
    return rows


@pytest.fixture(scope="module")
def pair() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rows = _rows().values()
    return np.stack([p for p, _ in rows]), np.stack([q for _, q in rows])


def test_every_measure_of_rows_of_both_kinds_of_blocks(pair: Any) -> None:
    p, q = pair
    single = {name: klfast.compare(p, q, name, dtype=np.float64)[name] for name in METRICS}
    together = klfast.compare(p, q, list(METRICS), dtype=np.float64)
    for name, truth in METRICS.items():
        for found in (single[name], together[name]):
            np.testing.assert_allclose(found, truth(p, q), rtol=2e-6, atol=0, err_msg=name)


@pytest.mark.parametrize("weight", [1e-3, 0.3, 0.9])
def test_one_weight_of_jensen_shannon_is_taken_together(pair: Any, weight: float) -> None:
    p, q = pair
    names = ["kl", f"js:{weight}", "js:0.01", "same_top"]
    found = klfast.compare(p, q, names, dtype=np.float64)
    for name, each in ((names[1], weight), ("js:0.01", 0.01)):
        truth = reference.js_divergence(p, q, weight=each)
        np.testing.assert_allclose(found[name], truth, rtol=2e-6, atol=0)


def test_exchanged_rows_give_the_same_bits_together_too(pair: Any) -> None:
    p, q = pair
    names = ("kl", "reverse_kl", "tv", "hellinger2", "js", "jeffreys", "same_top")
    there, back = klfast.compare(p, q, names), klfast.compare(q, p, names)
    for name in ("tv", "hellinger2", "js", "jeffreys", "same_top"):
        np.testing.assert_array_equal(there[name], back[name], name)


def test_identical_rows_are_at_no_distance_together_too(pair: Any) -> None:
    p, _ = pair
    for name, values in klfast.compare(p, p.copy()).items():
        assert (values == (1 if name == "same_top" else 0)).all(), name


def test_the_first_of_equal_tops_counts_together_too() -> None:
    p = np.zeros((2, 3000), np.float32)
    q = p.copy()
    p[:, [2100, 2900]] = 3.0
    q[:, 2100] = 3.0
    q[1, 5] = 3.0
    assert klfast.compare(p, q)["same_top"].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_tops_are_found_in_every_tile_together_too(dtype: Any) -> None:
    places = [0, 2047, 2048, 4095, 4100, 6143, 6144, 6149]
    p = np.full((len(places), 6150), -1.0, dtype)
    p[:, :2040] = -np.inf  # nothing of the first tile but its end
    q = p.copy()
    for row, place in enumerate(places):
        p[row, place] = 2.0
        q[row, place] = 3.0
    other = np.roll(q, 1, axis=0)
    assert (klfast.compare(p, q)["same_top"] == 1).all()
    found = klfast.compare(p[2:], other[2:], ["kl", "tv", "same_top"])["same_top"]
    assert (found == 0).all()


def test_rows_that_only_float64_can_do_together_with_others(pair: Any) -> None:
    p, q = (each.copy() for each in pair)
    p[1, 7] = np.nan
    q[2, 8] = -np.inf
    p[3] = -np.inf
    p[4, 9] = -np.inf
    result = klfast.compare(p, q, dtype=np.float64)
    assert np.isnan([result[name][[1, 3]] for name in result.metrics]).all()
    assert result["kl"][2] == np.inf
    assert result["reverse_kl"][4] == np.inf
    for name in ("kl", "reverse_kl", "tv"):
        kept = [0, 5, 6] + ([4] if name == "kl" else [2] if name == "reverse_kl" else [2, 4])
        truth = METRICS[name](p[kept], q[kept])
        np.testing.assert_allclose(result[name][kept], truth, rtol=2e-6, atol=0, err_msg=name)


ONE_READ = ("kl", "reverse_kl", "renyi:2", "renyi:0.7", "cross_entropy")


def _bfloat16(random: np.random.Generator, rows: int, width: int) -> tuple[Any, Any]:
    p = 2 * random.standard_normal((rows, width))
    q = p + 0.2 * random.standard_normal((rows, width))
    return p.astype(ml_dtypes.bfloat16), q.astype(ml_dtypes.bfloat16)


def _check_one_read(p: Any, q: Any, message: str) -> None:
    wide = p.astype(np.float64), q.astype(np.float64)
    for name in ONE_READ:
        found = klfast.compare(p, q, name, dtype=np.float64)[name]
        truth = METRICS[name](*wide)
        np.testing.assert_allclose(found, truth, rtol=2e-6, atol=0, err_msg=f"{name} {message}")


@pytest.mark.parametrize("width", [31, 33, 80, 128, 1000, 2048 + 97])
def test_bfloat16_with_the_top_at_every_place_of_a_vector(width: int) -> None:
    # Entries of even and of odd number are taken apart; the top is left out of the sums.
    places = sorted({*range(min(width, 66)), *range(max(0, width - 40), width)})
    p, q = _bfloat16(np.random.default_rng(width), len(places), width)
    p[range(len(places)), places] = 12.0
    q[range(len(places)), places] = 12.25
    _check_one_read(p, q, f"width {width}")


def test_bfloat16_where_even_and_odd_entries_have_little_in_common() -> None:
    # Tops, differences and masks of one kind of them only.
    p, q = _bfloat16(np.random.default_rng(7), 6, 3 * 2048 + 40)
    p[0, ::2], q[0, ::2] = -30, -30
    p[1, 1::2], q[1, 1::2] = -30, -30
    q[2, ::2] = p[2, ::2]
    q[3, 1::2] = p[3, 1::2]
    p[4, ::2], q[4, ::2] = -np.inf, -np.inf
    p[5, 1::2], q[5, 1::2] = -np.inf, -np.inf
    _check_one_read(p, q, "")


@pytest.mark.parametrize("odd", [0, 1])
def test_bfloat16_what_is_not_a_distribution_is_seen_at_even_and_odd_places(odd: int) -> None:
    p, q = _bfloat16(np.random.default_rng(8), 5, 5000)
    p[0, 3000 + odd] = np.nan
    p[1, 4998 + odd] = np.inf
    q[2, 3000 + odd] = np.nan
    q[3, 3000 + odd] = -np.inf
    q[4, 3000 + odd] = np.inf
    found = klfast.kl_divergence(p, q)
    assert np.isnan(found[[0, 1, 2, 4]]).all()
    assert found[3] == np.inf

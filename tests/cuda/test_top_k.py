"""The overlap of the largest entries: exactly the reference's, whatever the ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from distributions import cases
from numpy.typing import NDArray
from twin import compiler, run_kernel

from klfast import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

DEFINES = {"DTYPE_P": None, "DTYPE_Q": None}


def top_k(p: Any, q: Any, k: int, threads: int = 64, **how: Any) -> NDArray[np.float64]:
    p, q = (x.view(np.uint16) if x.dtype == "bfloat16" else x for x in (p, q))
    defines = {**DEFINES, "THREADS": threads}
    shared = 8 * threads
    return run_kernel("top_k", p, q, defines, parameters=[k], shared=shared, **how)[:, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("width", [193, 1003])
def test_every_kind_of_row(width: int, dtype: str) -> None:
    names, p, q = cases(width, dtype)
    for k in (1, 2, 10, 64, 65, width // 2, width - 1, width):
        got, truth = top_k(p, q, k), reference.topk_overlap(p, q, k)
        wrong = (got != truth) & ~(np.isnan(got) & np.isnan(truth))
        assert not np.any(wrong), [k, [name for name, w in zip(names, wrong, strict=True) if w]]


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33])
@pytest.mark.parametrize("threads", [32, 64])
def test_short_rows_full_of_ties(width: int, threads: int) -> None:
    rng = np.random.default_rng(width)
    p, q = rng.integers(-1, 2, size=(2, 20, width)).astype(np.float32)
    p[:10][p[:10] == 0] = -0.0
    for k in range(1, width + 1):
        truth = reference.topk_overlap(p, q.astype(np.float64), k)
        np.testing.assert_array_equal(top_k(p, q.astype(np.float64), k, threads), truth)


def test_numbers_that_differ_in_their_last_bit_or_are_subnormal() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(-40, 40, size=(2, 30, 300))
    for kind, integer in (("float64", "int64"), ("float32", "int32"), ("float16", "int16")):
        size = np.abs(bits).astype(integer)
        for base in (0.0, 1.0):
            values = (size + np.array(base, kind).view(integer)).view(kind)
            p, q = np.where(bits < 0, -values, values)
            for k in (1, 7, 150):
                np.testing.assert_array_equal(top_k(p, q, k), reference.topk_overlap(p, q, k))


def test_probabilities() -> None:
    p, q = np.random.default_rng(2).random(size=(2, 6, 100))
    p[:, ::2] = 0
    p[1] = 0
    q[2, 5], q[3, 5], q[4, 5] = -0.1, math.nan, math.inf
    for k in (1, 5, 60, 100):
        got = top_k(p, q, k, probabilities=(True, True))
        np.testing.assert_array_equal(got, reference.topk_overlap(p, q, k, input="probs"))
    assert np.array_equal(np.isnan(got), [0, 1, 1, 1, 1, 0])


def test_any_layout_rows_left_out_and_a_small_grid() -> None:
    p, q = np.random.default_rng(3).normal(size=(2, 90, 11))
    p, q = p.T, q[::-1].T
    where = np.arange(11) % 3 != 0
    truth = np.where(where, reference.topk_overlap(p, q, 20), math.nan)
    for grid in (1, 4, 11):
        got = top_k(p, q, 20, grid=grid, where=where.astype(np.uint8), seed=grid)
        np.testing.assert_array_equal(got, truth)

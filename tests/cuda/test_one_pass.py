"""KL, both ways round or one, Renyi and cross-entropy in one read: against the reference."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from distributions import Cases, cases, real_logits
from pairs import (
    HEADERS,
    Values,
    assert_right_or_unfinished,
    placed,
    should_finish,
    unfinished,
)
from twin import compiler, run_kernel

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

THREADS, RING, STATE = 64, 5, 12
#: An operation of the kernel with its parameter, and that of the table with its parameters.
OPERATIONS: list[tuple[str, float, str, tuple[float, ...]]] = [
    ("kl", 0.0, "kl", ()),
    ("kl_both", 0.0, "kl", ()),
    ("cross_entropy", 0.0, "cross_entropy", ()),
    ("renyi", 1.0, "renyi", (2.0,)),
    ("renyi", -0.5, "renyi", (0.5,)),
    ("renyi", 1e-6, "renyi", (1 + 1e-6,)),
    ("renyi", 19.0, "renyi", (20.0,)),
]


def one_pass(
    operation: str, p: Any, q: Any, parameter: float = 0.0, skew: int = 0, **how: Any
) -> Values:
    """The columns of every row."""
    p, q = placed(p, skew), placed(q, skew)
    sizes = p.itemsize, q.itemsize
    defines = {f"OPERATION_{operation}": 1, "THREADS": THREADS, **how.pop("defines", {})}
    return run_kernel(
        "one_pass", p, q, defines, columns=2 if operation == "kl_both" else 1, sources=HEADERS,
        parameters=(parameter, 40.0), shared=RING * THREADS * 16 * sum(sizes) // min(sizes), **how,
    )  # fmt: skip


def check(operation: tuple[str, float, str, tuple[float, ...]], found: Cases, **how: Any) -> Values:
    """Values are right, or left to the float64 kernel where that is to be expected."""
    name, parameter, measure, parameters = operation
    values = one_pass(name, found.p, found.q, parameter, **how)
    for column, case in enumerate((found, found._replace(p=found.q, q=found.p))):
        if column < values.shape[1]:
            assert_right_or_unfinished(measure, parameters, case, values[:, column].copy())
    if parameter < 10:
        left = unfinished(values[:, 0].copy())[should_finish(found)]
        assert not left.any(), np.array(found.names)[should_finish(found)][left]
    if measure != "cross_entropy" and found.p.dtype == found.q.dtype:
        assert not np.any(values[[name == "identical" for name in found.names]])
    return values


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_float32(operation: tuple[str, float, str, tuple[float, ...]]) -> None:
    for width in (1, 2, 5, 64, 257, 2049):
        check(operation, cases(width, "float32", one_in=1 if width > 200 else 5))
    check(operation, cases(3000, "float32", one_in=2), parts=3, state=STATE)


@pytest.mark.parametrize("operation", [OPERATIONS[0], OPERATIONS[3]], ids=str)
def test_narrow_types(operation: tuple[str, float, str, tuple[float, ...]]) -> None:
    for width in (7, 65, 1031):
        check(operation, cases(width, "bfloat16", one_in=1 if width > 200 else 5))


@pytest.mark.parametrize(
    ("operation", "dtypes"),
    [(OPERATIONS[1], ("float16", "float16")), (OPERATIONS[2], ("bfloat16", "float32"))],
    ids=str,
)
def test_other_types(
    operation: tuple[str, float, str, tuple[float, ...]], dtypes: tuple[str, str]
) -> None:
    for width in (9, 1031):
        check(operation, cases(width, *dtypes, one_in=1 if width > 200 else 5))
        check(operation, cases(width, *dtypes, one_in=7), parts=2, state=STATE, skew=5)


@pytest.mark.parametrize("test", ["int8", "int4"])
def test_real_logits(test: str) -> None:
    found = real_logits(test)
    found = Cases(
        found.names[::3], found.p[::3].astype(np.float32), found.q[::3].astype(np.float32)
    )
    for operation in OPERATIONS[:5]:
        check(operation, found)


def test_any_alignment() -> None:
    """The same value wherever rows begin; only which thread adds what is another."""
    p, q = np.random.default_rng(3).normal(size=(2, 3, 301)).astype(np.float32)
    values = [one_pass("kl", p, q, skew=skew) for skew in range(4)]
    values.append(
        run_kernel(
            "one_pass",
            placed(p, 1),
            placed(q, 2),
            {"OPERATION_kl": 1, "THREADS": THREADS, "ALIGNED": 0},
            sources=HEADERS,
            parameters=(0.0, 40.0),
            shared=RING * THREADS * 32,
        )
    )
    np.testing.assert_allclose(values, np.broadcast_to(values[0], (5, 3, 1)), rtol=3e-7)


def test_short_rows_are_the_work_of_a_warp() -> None:
    for width in (1, 3, 31, 257):
        check(OPERATIONS[0], cases(width, "float32", one_in=3), defines={"TEAM": 32}, skew=1)


def test_any_order_of_threads_gives_the_same_bits() -> None:
    found = cases(900, "float32", one_in=4)
    for how in ({}, {"parts": 4, "state": STATE}, {"grid": 2}):
        once, again = (one_pass("kl_both", *found[1:], seed=seed, **how) for seed in (0, 5))
        np.testing.assert_array_equal(once.view(np.uint64), again.view(np.uint64))


def test_equal_rows_of_different_types() -> None:
    p = np.random.default_rng(4).normal(size=(3, 200)).astype(ml_dtypes.bfloat16)
    assert not np.any(one_pass("kl", p, p.astype(np.float32)))


def test_a_difference_below_the_range_of_float32_is_seen() -> None:
    p = np.zeros((2, 300), np.float32)
    p[:, 7] = 250.0
    q = p.copy()
    q[1, 100] = 1.0
    values = one_pass("kl", p, q)[:, 0]
    assert values[0] == 0
    assert unfinished(values)[1]


def test_rows_that_are_not_to_be_read() -> None:
    p, q = np.random.default_rng(5).normal(size=(2, 5, 200)).astype(np.float32)
    where = np.array([1, 0, 1, 0, 1], np.uint8)
    for how in ({}, {"parts": 2, "state": STATE}):
        values = one_pass("kl", p, q, where=where, **how)[:, 0]
        assert np.array_equal(np.isnan(values), where == 0)
        assert not unfinished(values).any()


def test_what_is_no_distribution_is_left() -> None:
    p, q = np.random.default_rng(6).normal(size=(2, 8, 400)).astype(np.float32)
    p[0, 3] = q[1, 399] = math.nan
    p[2, 0] = q[3, 150] = math.inf
    p[4] = q[5] = -math.inf
    p[6, 100] = q[7, 100] = -math.inf  # distributions, of different supports
    for operation in ("kl", "kl_both"):
        for how in ({}, {"parts": 2, "state": STATE}):
            assert unfinished(one_pass(operation, p, q, **how)).all()


def test_orders_beyond_the_limit_are_left() -> None:
    """Where the log-ratio is as large as this, terms vanish below the range of float32."""
    p, q = np.random.default_rng(7).normal(size=(2, 1, 300)).astype(np.float32)
    q[0, 5] -= 25.0
    assert not unfinished(one_pass("renyi", p, q, 1.0)).any()
    assert unfinished(one_pass("renyi", p, q, 2.0)).all()

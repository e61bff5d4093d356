"""The float64 kernel against the reference: every operation, any input, rows that others left."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from distributions import Cases, cases
from measures import assert_right, tokens_of
from numpy.typing import NDArray
from twin import compiler, run_kernel
from twin.running import at_offsets

from klfast import reference
from klfast._operations import OPERATIONS

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

#: What a kernel leaves where it could not finish a row.
UNFINISHED = np.array(0x7FF8000000C0FFEE, np.uint64).view(np.float64)
#: Operations that are one kernel, which is told the number.
DIVERGENCES = ("kl", "cross_entropy", "tv", "hellinger2", "jeffreys")
Values = NDArray[np.float64]


def exact(operation: str, p: Any, q: Any = None, parameter: float = 0.0, **how: Any) -> Values:
    """One column of each row, or all where there are several."""
    if operation in DIVERGENCES:
        operation, parameter = "divergence", float(DIVERGENCES.index(operation))
    defines = {f"OPERATION_{operation}": 1, "DTYPE_P": None, "DTYPE_Q": None, "THREADS": 32}
    numbers = [parameter, *[0.0] * 11, float(how.pop("out_step", 0))]
    p, q = (x.view(np.uint16) if x is not None and x.dtype == "bfloat16" else x for x in (p, q))
    columns = 5 if operation == "statistics" else 1
    values = run_kernel("exact", p, q, defines, parameters=numbers, columns=columns, **how)
    return values if columns > 1 else values[:, 0]


def surprise(columns: Values) -> Values:
    return np.log1p(columns[:, 1])


def entropy(columns: Values) -> Values:
    value = surprise(columns) + columns[:, 2] / (1 + columns[:, 1])
    return np.where(np.isnan(columns[:, 0]), math.nan, value)


#: The operation of the table that each operation of the kernel is, with its parameter.
PAIRS: list[tuple[str, float, str, tuple[float, ...]]] = [
    ("kl", 0.0, "kl", ()),
    ("cross_entropy", 0.0, "cross_entropy", ()),
    ("tv", 0.0, "tv", ()),
    ("hellinger2", 0.0, "hellinger2", ()),
    ("jeffreys", 0.0, "jeffreys", ()),
    ("js", 0.5, "js", (0.5,)),
    ("js", 0.1, "js", (0.1,)),
    ("js", 1e-6, "js", (1e-6,)),
    ("renyi", 1.0, "renyi", (2.0,)),
    ("renyi", 1e-6, "renyi", (1 + 1e-6,)),
    ("renyi", -0.5, "renyi", (0.5,)),
    ("renyi", 19.0, "renyi", (20.0,)),
    ("renyi_0", 0.0, "renyi", (0.0,)),
    ("renyi_inf", 0.0, "renyi", (math.inf,)),
]
SYMMETRIC = {("tv", 0.0), ("hellinger2", 0.0), ("jeffreys", 0.0), ("js", 0.5)}


def check(pair: tuple[str, float, str, tuple[float, ...]], found: Cases, **options: Any) -> None:
    """The kernel agrees with the reference; ``options`` are those of the reference."""
    name, parameter, measure, parameters = pair
    how: dict[str, Any] = {"probabilities": (options.get("input") == "probs",) * 2}
    how["temperatures"] = options.get("temperature", (1.0, 1.0))
    got = exact(name, found.p, found.q, parameter, **how)
    truth = OPERATIONS[measure].reference(found.p, found.q, *parameters, **options)
    assert_right(OPERATIONS[measure], found, got, truth, **options)
    assert not np.any(got < 0)
    same_temperature = how["temperatures"][0] == how["temperatures"][1]
    if measure != "cross_entropy" and same_temperature:
        assert not np.any(got[[name == "identical" for name in found.names]])
    if (name, parameter) in SYMMETRIC and same_temperature:
        np.testing.assert_array_equal(exact(name, found.q, found.p, parameter, **how), got)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pairs(pair: Any, dtype: str) -> None:
    check(pair, cases(193, dtype))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_long_rows_of_two_types(pair: Any) -> None:
    check(pair, cases(2051, "float32", "float64", one_in=6))


@pytest.mark.parametrize("temperature", [(0.5, 0.5), (0.7, 0.7), (1.0, 3.0)])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_temperature(pair: Any, temperature: tuple[float, float]) -> None:
    check(pair, cases(130, "float64", one_in=2), temperature=temperature)


def weights(x: Any) -> Any:
    """Probabilities that are not normalized."""
    with np.errstate(all="ignore"):
        x = x.astype(np.float64)
        top = np.max(x, axis=-1, keepdims=True)
        return np.exp(np.where(np.isfinite(top), x - top, x)) * 3.0


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_probabilities(pair: Any) -> None:
    names, p, q = cases(130, "float64", one_in=2)
    p, q = weights(p), weights(q)
    p[3, 5], p[4, 7], q[5, 3] = math.inf, -1e-300, math.nan
    check(pair, Cases(names, p, q), input="probs")


@pytest.mark.parametrize("width", [1, 2, 31, 33])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_short_rows(pair: Any, width: int) -> None:
    rng = np.random.default_rng(width)
    p, q = rng.normal(size=(2, 5, width))
    check(pair, Cases(("",) * 5, p, q))


def test_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries apart, backwards, and rows at offsets of their own."""
    p, q = np.random.default_rng(3).normal(size=(2, 7, 40))
    truth = exact("js", p, q, 0.5)
    apart, backwards = np.zeros((40, 14)), p[:, ::-1].copy()
    apart[:, ::2] = q.T
    got = exact("js", backwards[:, ::-1], apart.T[::2], 0.5)
    np.testing.assert_array_equal(got, truth)

    order = np.array([3, 0, 6, 1, 5, 2, 4])
    at_offsets(monkeypatch, order * p.strides[0])
    got = exact("js", p, q, 0.5)
    monkeypatch.undo()
    np.testing.assert_array_equal(got, exact("js", p[order], q[order], 0.5))


def test_only_marked_rows_in_one_column() -> None:
    """More rows than a block has threads; nothing else changes."""
    rng = np.random.default_rng(5)
    p, q = rng.normal(size=(2, 150, 20))
    values = rng.normal(size=(150, 3))
    values[:, 0] = UNFINISHED
    marked = rng.random(150) < 0.3
    marked[0] = marked[149] = True
    values[marked, 2] = UNFINISHED
    values[~marked, 2][:3] = math.nan
    before = values.copy()
    numbers = [0.0] * 15 + [2.0]
    defines = {"OPERATION_divergence": 1, "DTYPE_P": None, "DTYPE_Q": None, "THREADS": 64}
    for grid in (1, 3, 150):
        values[:] = before
        run_kernel("exact", p, q, defines, values=values, parameters=numbers, phase=1, grid=grid)
        truth = reference.kl_divergence(p, q)
        np.testing.assert_allclose(values[marked, 2], truth[marked], rtol=1e-13)
        values[marked, 2] = before[marked, 2]
        np.testing.assert_array_equal(values.view(np.int64), before.view(np.int64))


def test_rows_that_are_not_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = np.random.default_rng(6).normal(size=(2, 5, 20))
    where = np.array([1, 0, 1, 1, 0], np.uint8)
    truth = np.where(where, reference.kl_divergence(p, q), math.nan)
    offsets = np.arange(5) * p.strides[0]
    at_offsets(monkeypatch, np.where(where, offsets, 1 << 46))  # where nobody can read
    np.testing.assert_allclose(exact("kl", p, q, where=where), truth, rtol=1e-13)
    columns = exact("statistics", p, where=where, tokens=np.full(5, 3))
    assert np.array_equal(np.isnan(columns[:, 0]), where == 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_statistics(dtype: str, temperature: float) -> None:
    found = cases(193, dtype)
    tokens = tokens_of(found.p)
    columns = exact("statistics", found.p, tokens=tokens, temperatures=(temperature, 1.0))
    good = ~np.isnan(columns[:, 0])
    options: dict[str, Any] = {"temperature": temperature}
    results = {
        "entropy": (entropy(columns), reference.entropy(found.p, **options)),
        "logsumexp": (columns[:, 0] + surprise(columns), reference.logsumexp(found.p, **options)),
        "token_log_probs": (
            columns[:, 4] - surprise(columns),
            reference.token_log_probs(found.p, tokens, **options),
        ),
    }
    for name, (got, truth) in results.items():
        assert_right(OPERATIONS[name], Cases(found.names, found.p, found.p), got, truth, **options)
    first = np.argmax(found.p.astype(np.float64), axis=-1)
    np.testing.assert_array_equal(columns[good, 3], first[good])


def test_tokens_out_of_range_are_not_read() -> None:
    p = np.random.default_rng(7).normal(size=(4, 9))
    tokens = np.array([-1, 9, 1 << 60, 8])
    columns = exact("statistics", p, tokens=tokens)
    assert np.array_equal(np.isnan(columns[:, 4]), [True, True, True, False])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1 - 1e-6, 1 + 1e-6, 1.5, 2.0, 20.0, math.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_renyi_entropy(dtype: str, alpha: float) -> None:
    found = cases(193, dtype)
    got = exact("renyi_entropy", found.p, parameter=alpha)
    truth = reference.renyi_entropy(found.p, alpha)
    assert_right(OPERATIONS["renyi_entropy"], found, got, truth)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_log_softmax(dtype: str) -> None:
    found = cases(193, "float64", one_in=2)
    out = np.zeros((len(found.p), 2 * 193), dtype)
    where = np.ones(len(found.p), np.uint8)
    where[1] = 0
    run_kernel(
        "exact", found.p, None,
        {"OPERATION_log_softmax": 1, "DTYPE_P": None, "DTYPE_Q": None, "THREADS": 32},
        parameters=[0.0] * 12 + [2.0 * out.itemsize], where=where,
        out=out, out_stride=out.strides[0],
        out_dtype={"float16": 0, "float32": 2, "float64": 3}[dtype],
    )  # fmt: skip
    truth = reference.log_softmax(found.p)
    truth[1] = math.nan
    assert not np.any(out[:, 1::2])
    with np.errstate(over="ignore"):
        if dtype == "float64":
            np.testing.assert_allclose(out[:, ::2], truth, rtol=1e-13, atol=1e-30)
        else:
            close = float(np.finfo(dtype).eps)
            np.testing.assert_allclose(out[:, ::2], truth.astype(dtype), rtol=close, atol=0)

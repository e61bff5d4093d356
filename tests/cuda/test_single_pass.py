"""Statistics, argmax and log_softmax of one row, in one read: against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from distributions import Cases, cases, real_logits
from measures import assert_right, tokens_of
from numpy.typing import NDArray
from twin import compiler, run_kernel
from twin.running import at_offsets

from klfast import reference
from klfast._operations import OPERATIONS

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

Values = NDArray[np.float64]
CODES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}


def stored(x: Any) -> Any:
    return x.view(np.uint16) if x.dtype == "bfloat16" else x


def single_pass(operation: str, p: Any, temperature: float = 1.0, **how: Any) -> Values:
    """The columns of every row."""
    defines = {f"OPERATION_{operation}": 1, "THREADS": 64, "ALIGNED": 0, **how.pop("defines", {})}
    return run_kernel(
        "single_pass", stored(p), None, defines, columns=5,
        temperatures=(temperature, temperature), **how,
    )  # fmt: skip


def check(found: Cases, columns: Values, tokens: Any, temperature: float = 1.0) -> None:
    """Statistics are right: what follows from them is what the reference has."""
    p, options = found.p, dict[str, Any](temperature=temperature)
    m, s, u, index, token = columns.T
    surprise = np.log1p(s)
    results = {
        "entropy": (surprise + u / (1 + s), reference.entropy(p, **options)),
        "logsumexp": (m + surprise, reference.logsumexp(p, **options)),
        "token_log_probs": (token - surprise, reference.token_log_probs(p, tokens, **options)),
    }
    for name, (got, truth) in results.items():
        assert_right(OPERATIONS[name], Cases(found.names, p, p), got, truth, **options)
    good = ~np.isnan(m)
    np.testing.assert_array_equal(index[good], np.argmax(p.astype(np.float64), axis=-1)[good])


@pytest.mark.parametrize("team", [32, 64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("width", [193, 3001])
def test_statistics(width: int, dtype: str, team: int) -> None:
    for batch in ("p", "q"):
        names, *rows = cases(width, dtype)
        p = rows[batch == "q"]
        tokens = tokens_of(p)
        columns = single_pass("statistics", p, tokens=tokens, defines={"TEAM": team})
        check(Cases(names, p, p), columns, tokens)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0, 1e-3])
def test_temperature(temperature: float) -> None:
    found = cases(500, "float32")
    tokens = tokens_of(found.p)
    columns = single_pass("statistics", found.p, temperature, tokens=tokens)
    check(found, columns, tokens, temperature)


def test_real_logits() -> None:
    found = real_logits("int4")
    tokens = tokens_of(found.p)
    check(found, single_pass("statistics", found.p, tokens=tokens), tokens)


@pytest.mark.parametrize("width", [*range(1, 20), 64, 65, 256, 257, 513])
def test_short_rows(width: int) -> None:
    p = np.random.default_rng(width).normal(size=(6, width)).astype(np.float32)
    tokens = tokens_of(p)
    for dtype in ("float32", "float16"):
        rows = p.astype(dtype)
        columns = single_pass("statistics", rows, tokens=tokens, defines={"TEAM": 32})
        check(Cases(("",) * 6, rows, rows), columns, tokens)


@pytest.mark.parametrize("skew", range(8))
def test_aligned_rows(skew: int) -> None:
    """Rows that begin anywhere after a multiple of 16 bytes, all of them alike."""
    memory = np.random.default_rng(skew).normal(size=(4, 640)).astype(np.float16)
    assert memory.ctypes.data % 16 == 0
    p = memory[:, skew : skew + 601 - skew % 3]
    tokens = tokens_of(p)
    columns = single_pass("statistics", p, tokens=tokens, defines={"ALIGNED": 1})
    check(Cases(("",) * 4, p, p), columns, tokens)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts(parts: int) -> None:
    found = cases(2051, "bfloat16")
    tokens = tokens_of(found.p)
    whole = {}
    for seed in (0, 1):
        columns = single_pass("statistics", found.p, tokens=tokens, parts=parts, state=4, seed=seed)
        check(found, columns, tokens)
        whole[seed] = columns
    np.testing.assert_array_equal(whole[0], whole[1])


def test_the_first_of_equal_entries_and_no_sums() -> None:
    for width in (193, 2051):
        for dtype in ("bfloat16", "float32"):
            found = cases(width, dtype)
            columns = single_pass("top", found.p)
            truth = reference.logsumexp(found.p)
            assert np.array_equal(np.isnan(columns[:, 0]), np.isnan(truth))
            good = ~np.isnan(truth)
            first = np.argmax(found.p.astype(np.float64), axis=-1)
            np.testing.assert_array_equal(columns[good, 3], first[good])
            parts = single_pass("top", found.p, parts=3, state=4)
            np.testing.assert_array_equal(parts, columns)


@pytest.mark.parametrize("operation", ["statistics", "top"])
def test_rows_that_are_no_distributions(operation: str) -> None:
    p = np.random.default_rng(1).normal(size=(7, 700)).astype(np.float32)
    p[0, 3] = p[1, 699] = math.nan
    p[2, 0] = p[3, 650] = math.inf
    p[4] = -math.inf
    p[5, :690] = -math.inf
    for options in ({}, {"parts": 3, "state": 4}):
        columns = single_pass(operation, p, **options)
        assert np.array_equal(np.isnan(columns[:, 0]), [1, 1, 1, 1, 1, 0, 0])


def test_tokens_out_of_range_are_not_read() -> None:
    p = np.random.default_rng(7).normal(size=(4, 9)).astype(np.float32)
    columns = single_pass("statistics", p, tokens=np.array([-1, 9, 1 << 60, 8]))
    assert np.array_equal(np.isnan(columns[:, 4]), [True, True, True, False])


def test_rows_that_are_not_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.random.default_rng(6).normal(size=(5, 200)).astype(np.float32)
    where = np.array([1, 0, 1, 1, 0], np.uint8)
    offsets = np.where(where, np.arange(5) * p.strides[0], 1 << 46)  # where nobody can read
    at_offsets(monkeypatch, offsets)
    for options in ({}, {"parts": 2, "state": 4}, {"defines": {"TEAM": 32}}):
        columns = single_pass("statistics", p, where=where, **options)
        assert np.array_equal(np.isnan(columns[:, :4]), np.repeat(where[:, None] == 0, 4, 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("resident", "team"), [(0, 64), (512, 64), (256, 32)])
def test_log_softmax(dtype: str, out_dtype: str, resident: int, team: int) -> None:
    found = cases(1003, dtype, one_in=2)
    got = log_softmax(found.p, out_dtype, resident=resident, defines={"TEAM": team})
    truth = reference.log_softmax(found.p)
    # What rounding to the type takes away, or what S may be off in float32.
    relative = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(out_dtype, 1e-6) * 1.01
    absolute = {"float16": 2.0**-24}.get(out_dtype, 1e-37)
    largest = {"float16": 65504.0, "float64": math.inf}.get(out_dtype, 3.3e38)
    with np.errstate(invalid="ignore"):
        right = np.abs(got - truth) <= relative * np.abs(truth) + absolute
    right |= (got == -math.inf) & (truth < -largest)
    assert np.all(right | (got == truth) | (np.isnan(got) & np.isnan(truth)))


def log_softmax(p: Any, out_dtype: str, step: int = 1, **how: Any) -> Values:
    storage = {"bfloat16": "uint16"}.get(out_dtype, out_dtype)
    out = np.zeros((len(p), p.shape[1] * step), storage)
    shared = how.get("resident", 0) * stored(p).itemsize
    teams = 64 // how.get("defines", {}).get("TEAM", 64)
    single_pass(
        "log_softmax", p, out=out, out_stride=out.strides[0], out_dtype=CODES[out_dtype],
        parameters=[0.0] * 12 + [float(step * out.itemsize)], shared=shared * teams, **how,
    )  # fmt: skip
    if out_dtype == "bfloat16":
        out = (out.astype(np.uint32) << 16).view(np.float32)
    assert not np.any(np.delete(out, np.s_[::step], axis=1))
    return out[:, ::step].astype(np.float64)


def test_log_softmax_anywhere() -> None:
    p = np.random.default_rng(2).normal(size=(3, 300)).astype(np.float16)
    truth = reference.log_softmax(p)
    for options in ({"step": 3}, {"parts": 2, "state": 4}, {"defines": {"ALIGNED": 1}}):
        np.testing.assert_allclose(log_softmax(p, "float32", **options), truth, rtol=5e-7)
    where = np.array([1, 0, 1], np.uint8)
    got = log_softmax(p, "float32", where=where)
    assert np.array_equal(np.isnan(got).all(axis=1), where == 0)

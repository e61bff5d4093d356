"""From the values of rows to results: the formulas, rounding, units, sums and means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from distributions import cases
from measures import tokens_of
from numpy.typing import NDArray
from twin import compiler, run_kernel

from klfast import reference
from klfast._arrays import STORAGE, encode

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

SAME, SCALED, POWER, INFINITE_POWER, ZERO, ENTROPY = range(6)
LOGSUMEXP, TOP_P, TOKEN, NLL, SAME_TOP, DELTA_PROB = range(6, 12)
SUM, MEAN = 1, 2
CODES = {"float16": 0, "uint16": 1, "float32": 2, "float64": 3}
Values = NDArray[np.float64]


def finish(
    code: int,
    values: Any,
    *parameters: float,
    second: int = 0,
    unit: float = 1.0,
    dtype: str = "float64",
    phase: int = 0,
    out: Any = None,
    **how: Any,
) -> Any:
    """What the kernel makes of the columns of every row."""
    values = np.asarray(values, np.float64)
    values = values.reshape(len(values), -1).copy()
    if out is None:
        out = np.zeros(1 if phase else len(values), dtype)
    run_kernel(
        "finish", None, None, {"THREADS": 64}, values=values, phase=phase,
        parameters=[*parameters, *[0.0] * (12 - len(parameters)), code, second, unit],
        grid=1 if phase else 2, count=len(values), out=out, out_stride=out.itemsize,
        out_dtype=CODES[dtype], **how,
    )  # fmt: skip
    return out


def statistics(p: Any, tokens: Any) -> Values:
    with np.errstate(all="ignore"):
        x = np.asarray(p, np.float64)
        top = np.argmax(x, axis=-1)
        rows = np.arange(len(x))
        below = x - x[rows, top][:, None]
        e = np.exp(below)
        e[rows, top] = 0
        u = np.where(e > 0, -below * e, 0).sum(axis=-1)
        m = np.where(np.isfinite(x[rows, top]), x[rows, top], math.nan)
        return np.stack([m, e.sum(axis=-1), u, top, below[rows, tokens]], axis=-1)


def test_formulas_of_one_and_two_rows() -> None:
    _, p, q = cases(193, "float32")
    tokens = tokens_of(p)
    both = np.concatenate([statistics(p, tokens), statistics(q, tokens)], axis=1)
    expected = {
        ENTROPY: reference.entropy(p),
        LOGSUMEXP: reference.logsumexp(p),
        TOP_P: reference.top_p(p),
        TOKEN: reference.token_log_probs(p, tokens),
        NLL: reference.nll(p, tokens),
        SAME_TOP: reference.same_top(p, q),
        DELTA_PROB: reference.delta_prob(p, q, tokens),
    }
    for code, truth in expected.items():
        absolute = 1e-15 if code in (LOGSUMEXP, DELTA_PROB) else 1e-100
        got = finish(code, both, second=5)
        np.testing.assert_allclose(got, truth, rtol=1e-12, atol=absolute)


def test_formulas_of_a_value() -> None:
    values = np.array([0.0, 1e-300, 1e-9, 0.3, 40.0, math.inf, math.nan])
    np.testing.assert_array_equal(finish(SAME, values), values)
    np.testing.assert_array_equal(finish(SCALED, values, 0.25), 0.25 * values)
    zero = np.where(np.isnan(values), math.nan, 0.0)
    np.testing.assert_array_equal(finish(ZERO, values), zero)
    infinite = np.where(values > 0, math.inf, values)
    np.testing.assert_array_equal(finish(INFINITE_POWER, values), infinite)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1 + 1e-9, 1.5, 2.0, 5.0])
def test_powers(alpha: float) -> None:
    """The alpha-divergence from the Renyi divergence of order alpha, or of 1 - alpha of (Q, P)."""
    _, p, q = cases(193, "float64")
    swapped = alpha < 0.5
    values = reference.renyi_divergence(q, p, 1 - alpha) if swapped else (
        reference.renyi_divergence(p, q, alpha)
    )  # fmt: skip
    factor = alpha / (1 - alpha) if swapped else 1.0
    got = finish(POWER, values, alpha - 1, factor, 1 / alpha)
    truth = reference.alpha_divergence(p, q, alpha)
    with np.errstate(all="ignore"):
        close = 1e-13 * np.maximum(1.0, np.log(truth))
        right = (np.abs(got - truth) <= close * truth) | (got == truth) | (truth > 1e300)
    assert np.all(right | (np.isnan(got) & np.isnan(truth)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_are_rounded_once(dtype: str) -> None:
    values = np.random.default_rng(1).normal(size=3000) ** 9 * 100
    values[:4] = math.inf, math.nan, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-8 + 2.0**-40
    for unit in (1.0, math.log(2)):
        got = finish(SAME, values, dtype=STORAGE[dtype].name, unit=unit)
        np.testing.assert_array_equal(got, encode(values / unit, dtype))


def test_sum_mean_and_rows_left_out() -> None:
    values = np.random.default_rng(2).normal(size=500)
    where = np.arange(500) % 7 > 0
    values[~where] = math.nan
    keep = where.astype(np.uint8)
    np.testing.assert_array_equal(finish(SAME, values, where=keep), values)
    total = finish(SAME, values, where=keep, phase=SUM, unit=2.0)
    np.testing.assert_allclose(total, [np.sum(values[where]) / 2], rtol=1e-13)
    mean = finish(SAME, values, where=keep, phase=MEAN, dtype="float32")
    np.testing.assert_allclose(mean, [np.mean(values[where])], rtol=1e-7)
    none = np.zeros(500, np.uint8)
    assert finish(SAME, values, where=none, phase=SUM) == 0
    assert np.isnan(finish(SAME, values, where=none, phase=MEAN))
    assert np.isnan(finish(SAME, values, phase=SUM))


def test_results_at_offsets() -> None:
    values = np.arange(5.0)
    out = np.zeros(10)
    places = np.array([9, 0, 4, 2, 6])
    finish(SAME, values, out=out, out_offsets=places * 8)
    np.testing.assert_array_equal(out[places], values)

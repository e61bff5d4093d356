"""The float32 functions of the kernels, against float64 ones of exactly the same arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from twin import compiler, run_kernel

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

Values = NDArray[np.float64]
LOG_2 = np.log(2.0)
#: One of the functions below for every entry of p.
KERNEL = """
DEVICE double value(const Call& call, float t)
{
    switch (call.phase) {
    case 0: return phi(t);
    case 1: return Power(t).psi;
    case 2: return Power(t).whole;
    case 3: return Power(t).less_1;
    case 4: return one_minus_exp2(t);
    case 5: return t > 2.0f ? js_far(t) : js_near(t);
    case 6: return exp2_exactly(t, 1.0f, 0.0f);
    case 7: return Exponential(double_of(t)).whole;
    case 8: return Exponential(double_of(t)).less_1;
    case 9: return Exponential(double_of(t)).tail;
    case 10: return near_phi(t) * t * t;
    case 11: return near_psi(t) * t * t;
    case 12: return near_difference<false>(t * t) * t;
    case 13: return near_difference<true>(t * t) * t;
    case 14: return near_skewness(t * t) * t * t * t;
    case 15: return near_hellinger2(t * t) * t * t;
    default: return near_js(t * t) * t * t;
    }
}

KERNEL(THREADS, BLOCKS) functions(const Call call)
{
    const float* arguments = reinterpret_cast<const float*>(call.p.data);
    for (int64 i = thread_index(); i < call.width; i += THREADS)
        call.values[i] = value(call, arguments[i]);
}
"""


def less(t: Values) -> Values:
    """(exp(t) - 1 - t)/t**2, from a series where that cancels."""
    t = np.asarray(t)
    series = np.zeros_like(t)
    for k in range(20, 1, -1):
        series = series * t / (k + 1) + 1.0 if k < 20 else np.ones_like(t)
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = (np.expm1(t) - t) / t**2
    return np.where(np.abs(t) < 0.5, series / 2, plain)


def tail(t: Values) -> Values:
    """exp(t) - 1 - t."""
    return less(t) * t**2


def psi(t: Values) -> Values:
    """1 - exp(t) + t exp(t), which is exp(t) times the tail of -t."""
    value: Values = np.exp(t) * tail(-t)
    return value


def js(tau: Values) -> Values:
    """[(1+g)(log 2 - log1p(g)) - g T]/2, or with r = tanh(T/2) a sum of even powers of it."""
    natural = tau * LOG_2
    g, r = np.exp(-natural), np.tanh(natural / 2)
    plain = ((1 + g) * (LOG_2 - np.log1p(g)) - g * natural) / 2
    series = sum(r ** (2 * n) / (n * (2 * n - 1)) for n in range(12, 0, -1))
    value: Values = np.where(tau < 0.3, (1 + g) / 4 * series, plain)
    return value


def skewness(t: Values) -> Values:
    """2 sinh(T/2) - T cosh(T/2), and its series where that cancels."""
    natural = t * LOG_2
    plain = 2 * np.sinh(natural / 2) - natural * np.cosh(natural / 2)
    series = -(natural**3) / 12 * (1 + natural**2 / 40)
    value: Values = np.where(abs(t) < 0.01, series, plain)
    return value


def arguments(smallest: float, largest: float, signs: tuple[float, ...]) -> NDArray[np.float32]:
    """Of every size, and those around which reductions change over."""
    sizes = np.geomspace(smallest, largest, 3000)
    halves = np.arange(0.5, min(largest, 12.0), 0.5)
    around = np.concatenate([halves, np.nextafter(halves.astype(np.float32), np.float32(0))])
    sizes = np.concatenate([sizes, around[around <= largest]])
    return np.concatenate([sign * sizes for sign in signs]).astype(np.float32)


FUNCTIONS: dict[str, tuple[int, float, float, tuple[float, ...], Callable[[Values], Values], float]]
FUNCTIONS = {
    "phi": (0, 1e-12, 120, (1, -1), lambda t: tail(t * LOG_2) / LOG_2, 1e-6),
    "psi": (1, 1e-12, 120, (1, -1), lambda t: psi(t * LOG_2) / LOG_2, 1e-6),
    "exp2": (2, 1e-12, 120, (1, -1), np.exp2, 3e-7),
    "exp2 - 1": (3, 1e-12, 120, (1, -1), lambda t: np.expm1(t * LOG_2) / LOG_2, 4e-7),
    "one_minus_exp2": (4, 1e-30, 126, (1,), lambda t: -np.expm1(-t * LOG_2), 3e-7),
    "js": (5, 1e-12, 126, (1,), js, 4e-7),
    "exp2_exactly": (6, 1e-6, 120, (1, -1), np.exp2, 3e-7),
    "exp": (7, 1e-12, 600, (1, -1), np.exp, 1e-15),
    "exp - 1": (8, 1e-12, 600, (1, -1), np.expm1, 1e-15),
    "exp - 1 - t": (9, 1e-12, 600, (1, -1), tail, 2e-15),
    "near phi": (10, 1e-12, 1.75, (1, -1), lambda t: tail(t * LOG_2) / LOG_2, 4e-7),
    "near psi": (11, 1e-12, 1.75, (1, -1), lambda t: psi(t * LOG_2) / LOG_2, 4e-7),
    "near difference": (12, 1e-12, 3, (1, -1), lambda t: 2 * np.sinh(t * LOG_2 / 2), 3e-7),
    "near difference over log 2": (
        13,
        1e-12,
        3,
        (1, -1),
        lambda t: 2 * np.sinh(t * LOG_2 / 2) / LOG_2,
        3e-7,
    ),
    "near skewness": (14, 1e-6, 3, (1, -1), lambda t: skewness(t) / LOG_2, 5e-7),
    "near hellinger2": (15, 1e-12, 3, (1, -1), lambda t: 4 * np.sinh(t * LOG_2 / 4) ** 2, 4e-7),
    "near js": (16, 1e-12, 3, (1,), lambda t: js(t) * np.exp2(t / 2), 4e-7),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name: str) -> None:
    number, smallest, largest, signs, truth, allowed = FUNCTIONS[name]
    t = arguments(smallest, largest, signs)
    got = run_kernel(KERNEL, t[None], None, phase=number, columns=t.size, defines={"THREADS": 32})
    expected = truth(t.astype(np.float64))
    error = np.abs(got[0] - expected) / np.abs(expected)
    assert error.max() <= allowed, (t[error.argmax()], got[0][error.argmax()], error.max())


def test_what_is_equal_is_exactly_0() -> None:
    for number in (0, 1, 3, 4, 5, *range(10, 17)):
        assert not run_kernel(
            KERNEL, np.zeros((1, 2), np.float32), None, phase=number, columns=2,
            defines={"THREADS": 32},
        ).any()  # fmt: skip

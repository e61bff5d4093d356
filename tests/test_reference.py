"""The float64 reference against mpmath at 60 digits, SciPy, and the rules for infinities."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats

from klfast import reference

INF, NAN = math.inf, math.nan

ALPHAS = (0.0, 1e-12, 0.01, 0.499, 0.5, 0.99, 1 - 1e-6, 1.0, 1 + 1e-12, 1.01, 2.0, 1e3, INF)
WEIGHTS = (0.0, 1e-12, 0.1, 0.5, 1 - 1e-6, 1.0)

PLAIN = ["kl_divergence", "jeffreys_divergence", "total_variation", "squared_hellinger"]
PLAIN += ["chi2_divergence", "cross_entropy"]
WITH_ALPHA = ("renyi_divergence", "alpha_divergence", "tsallis_divergence")
DIVERGENCES: list[tuple[str, tuple[float, ...]]] = [(name, ()) for name in PLAIN]
DIVERGENCES += [("js_divergence", (weight,)) for weight in WEIGHTS]
DIVERGENCES += [(name, (alpha,)) for name in WITH_ALPHA for alpha in ALPHAS]
TRUE_DIVERGENCES = [entry for entry in DIVERGENCES if entry[0] != "cross_entropy"]
SYMMETRIC = [("jeffreys_divergence", ()), ("js_divergence", (0.5,)), ("total_variation", ())]
SYMMETRIC += [("squared_hellinger", ())]
ENTROPIES: list[tuple[str, tuple[float, ...]]] = [("entropy", ())]
ENTROPIES += [("renyi_entropy", (alpha,)) for alpha in ALPHAS]


def label(value: object) -> str:
    return str(value)


def call(name: str, *args: Any, **options: Any) -> Any:
    """A function of the reference, which must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function: Callable[..., Any] = getattr(reference, name)
        return function(*args, **options)


def logit_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(20240917)
    pairs = {}
    for width in (2, 3, 17, 300):
        x, y, noise = rng.normal(size=(3, width))
        for scale in (1, 5, 50, 90):
            pairs[f"independent, scale {scale}, {width}"] = x * scale, y * scale
        for scale in (1, 90):
            for step in (1e-10, 1e-7, 1e-5, 1e-3, 1e-2):
                pairs[f"near by {step}, scale {scale}, {width}"] = (
                    x * scale,
                    x * scale + noise * step,
                )
        pairs[f"offset, {width}"] = x + 1e3, y - 500
        pairs[f"near after an offset, {width}"] = x + 1e3, x + noise * 1e-6 - 500
        first = np.arange(width) == 0
        pairs[f"one entry moved, the others hardly, {width}"] = x, x + noise * 1e-9 + first * 0.01
        for top in (25, 50):  # p = 1 - 1e-10, 1 - 1e-21
            pairs[f"top {top}, {width}"] = x + first * top, x + first * top + noise * 1e-3
        pairs[f"ties, {width}"] = np.round(x), np.round(y)
        # one-hot logits, and masks in the first row, the second, both, and all but one
        pairs[f"one-hot and its complement, {width}"] = first * 1e4, ~first * 1e4
        mask_x, mask_y = np.where(y > 0, -INF, 0.0), np.where(noise > 0, -INF, 0.0)
        mask_x[np.argmax(x)] = mask_y[np.argmax(x)] = 0.0
        pairs[f"mask in p, {width}"] = x + mask_x, y
        pairs[f"mask in q, {width}"] = x, y + mask_y
        pairs[f"the same mask in both, {width}"] = x + mask_x, x + noise * 1e-4 + mask_x
        pairs[f"masks in both, {width}"] = x + mask_x, y + mask_y
        pairs[f"disjoint, {width}"] = np.where(first, 0.0, -INF), np.where(first, -INF, y)
        pairs[f"one entry each, {width}"] = np.where(first, 3.0, -INF), np.where(first, 7.0, -INF)
    pairs["width 1"] = np.array([3.0]), np.array([-8.0])
    pairs["equal"] = np.arange(5.0), np.arange(5.0)
    return pairs


def weight_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(7)
    pairs = {}
    for width in (2, 3, 17, 300):
        w, v = rng.dirichlet(np.ones(width), size=2)
        noise = 1 + 1e-9 * rng.normal(size=width)
        some = np.where(rng.random(width) < 0.5, 0.0, w)
        some[0] = 0.5
        pairs[f"independent, {width}"] = w, v
        pairs[f"peaked, {width}"] = w**20, v**20
        pairs[f"near, {width}"] = w, w * noise
        pairs[f"near, but for a factor, {width}"] = w, w * noise * 3.7
        pairs[f"large and small sums, {width}"] = w * 1e300, v * 1e-300
        pairs[f"zeros in p, {width}"] = some, v
        pairs[f"zeros in q, {width}"] = w, some
        pairs[f"zeros in both, {width}"] = some, some * noise
    half = np.nextafter(0.5, 0)
    pairs["next to one half"] = np.array([half, 1 - half]), np.array([1 - half, half])
    return pairs


LOGITS, PROBS = logit_pairs(), weight_pairs()


def assert_exact(got: float, exact: Any, what: str) -> None:
    """1e-13 relative; exp(t) cannot be closer than t is, so huge results get their logarithm's."""
    if not math.isfinite(float(exact)):
        assert got == float(exact), what
        return
    digits = 1e-13 * max(1.0, float(oracle.mp.log(abs(exact) + 1)) / 100)
    assert abs(oracle.mp.mpf(got) - exact) <= digits * abs(exact) + 1e-34, (what, got, exact)


# Against mpmath


@pytest.mark.parametrize("temperature", [1.0, (0.7, 0.7000001)], ids=label)
@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=label)
def test_divergences_of_logits(
    name: str, parameters: tuple[float, ...], temperature: float | tuple[float, float]
) -> None:
    t_p, t_q = np.broadcast_to(temperature, 2).tolist()
    for case, (x, y) in LOGITS.items():
        p, q = oracle.softmax(tuple(x.tolist()), t_p), oracle.softmax(tuple(y.tolist()), t_q)
        exact = getattr(oracle, name)(p, q, *parameters)
        if abs(exact) < 1e300 or exact == INF:  # alpha-divergences leave the range of float64
            got = call(name, x, y, *parameters, temperature=temperature)
            assert_exact(float(got), exact, case)


@pytest.mark.parametrize("temperature", [1.0, 0.9], ids=label)
@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=label)
def test_divergences_of_probs(name: str, parameters: tuple[float, ...], temperature: float) -> None:
    for case, (w, v) in PROBS.items():
        p = oracle.normalized(tuple(w.tolist()), temperature)
        q = oracle.normalized(tuple(v.tolist()), temperature)
        exact = getattr(oracle, name)(p, q, *parameters)
        if abs(exact) < 1e300 or exact == INF:
            got = call(name, w, v, *parameters, input="probs", temperature=temperature)
            assert_exact(float(got), exact, case)


@pytest.mark.parametrize(("name", "parameters"), ENTROPIES, ids=label)
def test_entropies(name: str, parameters: tuple[float, ...]) -> None:
    for case, (x, _) in LOGITS.items():
        exact = getattr(oracle, name)(oracle.softmax(tuple(x.tolist()), 1.3), *parameters)
        assert_exact(float(call(name, x, *parameters, temperature=1.3)), exact, case)
    for case, (w, _) in PROBS.items():
        exact = getattr(oracle, name)(oracle.normalized(tuple(w.tolist())), *parameters)
        assert_exact(float(call(name, w, *parameters, input="probs")), exact, case)


def test_log_softmax_and_logsumexp() -> None:
    for case, (x, _) in LOGITS.items():
        exact = oracle.softmax(tuple(x.tolist()), 1.3).log
        for got, log_p in zip(call("log_softmax", x, temperature=1.3), exact, strict=True):
            assert_exact(float(got), log_p, case)
        total = float(oracle.logsumexp(x.tolist(), 1.3))
        scale = np.max(np.abs(x[np.isfinite(x)])) + math.log(x.size)
        assert abs(call("logsumexp", x, temperature=1.3) - total) <= 1e-15 * scale, case


@pytest.mark.parametrize("gap", [math.log(1e9), math.log(1e20), 700.0])
def test_log_prob_of_a_nearly_certain_token_keeps_its_digits(gap: float) -> None:
    x = np.array([0.0, gap, -1.0])
    p = oracle.softmax(tuple(x.tolist()))
    assert_exact(float(call("token_log_probs", x, 1)), p.log[1], "token_log_probs")
    assert_exact(float(call("nll", x, 1)), -p.log[1], "nll")
    assert_exact(float(call("entropy", x)), oracle.entropy(p), "entropy")
    assert call("token_log_probs", x, 1) < 0


@pytest.mark.parametrize("name", ["kl_divergence", "total_variation"])
def test_wide_rows(name: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=32000) * 3
    y = x + 1e-6 * rng.normal(size=32000)
    p, q = oracle.softmax(tuple(x.tolist())), oracle.softmax(tuple(y.tolist()))
    assert_exact(float(call(name, x, y)), getattr(oracle, name)(p, q), name)


# Against SciPy, where it is accurate


def test_scipy() -> None:
    x, y = np.random.default_rng(5).normal(size=(2, 7, 1000)) * 2
    p, q = scipy.special.softmax(x, axis=-1), scipy.special.softmax(y, axis=-1)

    def close(got: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(got, expected, rtol=1e-12)

    close(call("kl_divergence", x, y), scipy.special.rel_entr(p, q).sum(axis=-1))
    close(call("kl_divergence", p, q, input="probs"), scipy.stats.entropy(p, q, axis=-1))
    close(call("entropy", x), scipy.stats.entropy(p, axis=-1))
    close(call("js_divergence", x, y), scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2)
    close(call("logsumexp", x), scipy.special.logsumexp(x, axis=-1))
    close(call("log_softmax", x), scipy.special.log_softmax(x, axis=-1))
    close(call("log_softmax", x.T, axis=0), scipy.special.log_softmax(x.T, axis=0))


def test_js_with_a_subnormal_probability() -> None:
    assert call("js_divergence", [0.0, 1.0], [5e-324, 1.0], input="probs") <= 1e-323


# Limits


@pytest.mark.parametrize("name", WITH_ALPHA)
def test_alpha_is_continuous_at_one(name: str) -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 50))
    kl = call("kl_divergence", x, y)
    for step in 10.0 ** -np.arange(2, 17):
        for alpha in (1 - step, 1 + step):
            assert call(name, x, y, alpha) == pytest.approx(kl, rel=3 * step + 1e-13)


def test_alpha_divergence_is_continuous_at_zero() -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 50))
    for step in (1e-3, 1e-9, 1e-15, 1e-300):
        expected = call("alpha_divergence", x, y, 0.0)
        assert call("alpha_divergence", x, y, step) == pytest.approx(expected, rel=3 * step + 1e-13)
    assert call("alpha_divergence", x, y, 0.0) == call("kl_divergence", y, x)


def test_js_over_its_weights_tends_to_kl() -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 50))
    for w in (1e-6, 1e-12, 1e-300):
        forward = call("js_divergence", x, y, w) / (w * (1 - w))
        assert forward == pytest.approx(call("kl_divergence", x, y), rel=10 * w + 1e-12)
    w = 1 - 2**-30
    backward = call("js_divergence", x, y, w) / (w * (1 - w))
    assert backward == pytest.approx(call("kl_divergence", y, x), rel=1e-8)
    assert call("js_divergence", x, y, 0) == call("js_divergence", x, y, 1) == 0


def test_renyi_does_not_decrease_in_alpha() -> None:
    for case, (x, y) in LOGITS.items():
        values = [float(call("renyi_divergence", x, y, alpha)) for alpha in ALPHAS]
        for low, high in pairwise(values):
            assert low <= high * (1 + 1e-13), (case, values)


def test_renyi_special_orders() -> None:
    x, y = np.array([1.0, -INF, 0.0, 2.0]), np.array([0.5, 1.0, 1.0, -1.0])
    q = scipy.special.softmax(y)
    log_ratio = call("log_softmax", x) - call("log_softmax", y)
    coefficient = np.sqrt(scipy.special.softmax(x) * q).sum()
    assert call("renyi_divergence", x, y, 0) == pytest.approx(-math.log(1 - q[1]), rel=1e-14)
    assert call("renyi_divergence", x, y, 0.5) == pytest.approx(-2 * math.log(coefficient))
    assert call("renyi_divergence", x, y, INF) == pytest.approx(log_ratio.max(), rel=1e-14)
    assert call("renyi_divergence", x, y, 1e300) == pytest.approx(log_ratio.max(), rel=1e-14)


# Laws


@pytest.mark.parametrize(("name", "parameters"), TRUE_DIVERGENCES, ids=label)
def test_zero_for_identical_rows(name: str, parameters: tuple[float, ...]) -> None:
    rows = [x for pair in LOGITS.values() for x in pair]
    for x in rows:
        value = call(name, x, x.copy(), *parameters)
        assert value == 0
        assert not np.signbit(value)
    x = np.random.default_rng(8).normal(size=300).astype(ml_dtypes.bfloat16)
    assert call(name, x, x.astype(np.float32), *parameters) == 0
    for w in (w for pair in PROBS.values() for w in pair):
        assert call(name, w, w, *parameters, input="probs") == 0


@pytest.mark.parametrize(("name", "parameters"), SYMMETRIC, ids=label)
def test_symmetric_to_the_bit(name: str, parameters: tuple[float, ...]) -> None:
    for temperature in ((1.0, 1.0), (0.7, 1.4)):
        for kind, cases in (("logits", LOGITS), ("probs", PROBS)):
            for case, (x, y) in cases.items():
                one = call(name, x, y, *parameters, temperature=temperature, input=kind)
                other = call(name, y, x, *parameters, temperature=temperature[::-1], input=kind)
                assert one == other, case


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=label)
def test_shift_and_permutation(name: str, parameters: tuple[float, ...]) -> None:
    rng = np.random.default_rng(9)
    x, y = np.round(rng.normal(size=(2, 300)), 3) * 2.0**10 // 1 / 2.0**10
    value = call(name, x, y, *parameters)
    np.testing.assert_allclose(call(name, x + 64, y - 32, *parameters), value, rtol=1e-15)
    order = rng.permutation(300)
    np.testing.assert_allclose(call(name, x[order], y[order], *parameters), value, rtol=1e-13)


def test_upper_bounds_are_reached_and_kept() -> None:
    for case in (case for case in LOGITS if case.startswith("disjoint")):
        x, y = LOGITS[case]
        assert call("total_variation", x, y) == pytest.approx(1, rel=1e-15)
        assert call("squared_hellinger", x, y) == pytest.approx(1, rel=1e-15)
        assert math.log(2) - 1e-15 < call("js_divergence", x, y) <= math.log(2)
        assert call("js_divergence", x, y, 0.1) == pytest.approx(0.3250829733914482, rel=1e-15)


# Infinities, NaN, masks


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=label)
def test_invalid_rows_are_nan_and_the_others_untouched(
    name: str, parameters: tuple[float, ...]
) -> None:
    good = np.array([0.0, 1.0, 2.0])
    rows = np.array([good, [NAN, 1, 2], [INF, 1, 2], [-INF, -INF, -INF], [0, INF, -INF], good])
    other = np.array([0.5, 1.0, 1.0])
    expected = call(name, good, other, *parameters)
    np.testing.assert_array_equal(
        call(name, rows, other, *parameters), [expected, NAN, NAN, NAN, NAN, expected]
    )
    assert np.isnan(call(name, other, rows, *parameters)[1:5]).all()
    weights = np.array([[1, 2, 0], [NAN, 1, 1], [INF, 1, 1], [0, 0, 0], [-1e-9, 1, 1]])
    expected = call(name, weights[0], other, *parameters, input="probs")
    np.testing.assert_array_equal(
        call(name, weights, other, *parameters, input="probs"), [expected, NAN, NAN, NAN, NAN]
    )


@pytest.mark.parametrize("row", [[NAN, 1, 2], [INF, 1, 2], [-INF, -INF, -INF]], ids=label)
def test_single_row_functions_of_invalid_rows(row: list[float]) -> None:
    for name in ("entropy", "logsumexp", "top_p"):
        assert math.isnan(call(name, row)), name
    assert math.isnan(call("renyi_entropy", row, 2.0))
    assert np.isnan(call("log_softmax", row)).all()
    for name in ("token_log_probs", "nll"):
        assert math.isnan(call(name, row, 1)), name
    other = [1.0, 2.0, 3.0]
    assert math.isnan(call("same_top", row, other))
    assert math.isnan(call("topk_overlap", row, other, 2))
    assert math.isnan(call("delta_prob", row, other, 1))


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_where_only_q_is_zero(kind: str) -> None:
    x, y = np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.0, -INF])
    if kind == "probs":
        x, y = np.exp(x), np.exp(y)
    names = ("kl_divergence", "jeffreys_divergence", "chi2_divergence", "cross_entropy")
    infinite: list[tuple[str, tuple[float, ...]]] = [(name, ()) for name in names]
    infinite += [(name, (alpha,)) for name in WITH_ALPHA for alpha in (1.0, 1.5, INF)]
    for name, parameters in infinite:
        assert call(name, x, y, *parameters, input=kind) == INF, name
    third, two_thirds = 1 / 3, 2 / 3
    js = 0.5 * third * math.log(2) + 0.5 * (
        two_thirds * math.log(third / (5 / 12)) + math.log(0.5 / (5 / 12))
    )
    assert call("js_divergence", x, y, input=kind) == pytest.approx(js, rel=1e-14)
    assert call("total_variation", x, y, input=kind) == pytest.approx(third, rel=1e-14)
    hellinger = call("squared_hellinger", x, y, input=kind)
    assert hellinger == pytest.approx(1 - math.sqrt(two_thirds), rel=1e-14)
    renyi = call("renyi_divergence", x, y, 0.5, input=kind)
    assert renyi == pytest.approx(-math.log(two_thirds), rel=1e-14)
    # and where only p is zero
    assert call("kl_divergence", y, x, input=kind) == pytest.approx(math.log(1.5), rel=1e-14)
    assert call("chi2_divergence", y, x, input=kind) == pytest.approx(0.5, rel=1e-14)


def test_an_entry_whose_p_underflows_is_a_finite_logit() -> None:
    x, y = np.array([0.0, -2000.0]), np.array([0.0, -5000.0])
    assert call("kl_divergence", x, y) == 0
    assert call("kl_divergence", y, x) == 0
    assert call("js_divergence", x, y) == 0
    assert call("renyi_divergence", x, y, 2) == pytest.approx(1000 - 0.0, rel=1e-14)
    assert call("renyi_divergence", x, y, INF) == 3000
    assert call("kl_divergence", x, [0.0, -INF]) == INF


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=label
)
def test_largest_logits(dtype: type) -> None:
    largest = float(ml_dtypes.finfo(dtype).max)
    x: np.ndarray = np.array([largest, -largest, 0, largest], dtype=dtype)
    y: np.ndarray = np.array([-largest, largest, 0, largest], dtype=dtype)
    for name, parameters in DIVERGENCES:
        for first, second in ((x, y), (y, x), (x, x[::-1]), (x, x)):
            assert call(name, first, second, *parameters) >= 0, (name, parameters)
    assert call("js_divergence", x, y) == pytest.approx(0.5 * math.log(2))
    assert call("total_variation", x, y) == 0.5
    assert call("entropy", x) == pytest.approx(math.log(2))
    assert call("logsumexp", x) == pytest.approx(largest, rel=1e-4)
    if dtype is not np.float64:  # there the answer, the difference of two, is out of range
        assert call("kl_divergence", x, y) == pytest.approx(largest, rel=1e-4)


# Shapes and the measures of `compare`


def test_batch_axes_broadcast_and_any_axis_may_be_the_vocabulary() -> None:
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(4, 1, 9)), rng.normal(size=(3, 9))
    value = call("kl_divergence", x, y)
    assert value.shape == (4, 3)
    assert value.dtype == np.float64
    assert value[2, 1] == call("kl_divergence", x[2, 0], y[1])
    moved = call("kl_divergence", np.moveaxis(x, -1, 1), np.moveaxis(y, -1, 0), axis=1)
    np.testing.assert_array_equal(moved, value)
    assert call("kl_divergence", x[:0], y).shape == (0, 3)
    assert call("entropy", np.moveaxis(x, -1, 0), axis=0).shape == (4, 1)
    tokens = rng.integers(9, size=(4, 3))
    log_p = call("token_log_probs", x, tokens)
    assert log_p.shape == (4, 3)
    assert log_p[2, 1] == call("log_softmax", x)[2, 0, tokens[2, 1]]


def test_inputs_are_not_written_to() -> None:
    x, y = np.random.default_rng(11).normal(size=(2, 3, 5))
    x.flags.writeable = y.flags.writeable = False
    for name, parameters in DIVERGENCES:
        call(name, x, y, *parameters)
        call(name, x**2, y**2, *parameters, input="probs")


def test_log_probs_are_normalized_again() -> None:
    x, y = np.random.default_rng(12).normal(size=(2, 40))
    log_p, log_q = call("log_softmax", x), call("log_softmax", y) + 3
    assert call("js_divergence", log_p, log_q, input="log_probs") == pytest.approx(
        float(call("js_divergence", x, y)), rel=1e-13
    )


def test_ties_go_to_the_first_index() -> None:
    assert call("same_top", [1.0, 3.0, 3.0], [0.0, 2.0, 1.0]) == 1
    assert call("same_top", [1.0, 3.0, 3.0], [0.0, 1.0, 2.0]) == 0
    assert call("topk_overlap", [5.0, 1.0, 1.0, 1.0], [1.0, 1.0, 5.0, 1.0], 2) == 0.5
    assert call("topk_overlap", [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], 2) == 1


def test_top_p_and_delta_prob() -> None:
    x, y = [0.0, 1.0, -INF], [0.0, 1.0 + 1e-9, 0.0]
    assert call("top_p", x) == pytest.approx(math.e / (1 + math.e), rel=1e-15)
    change = call("delta_prob", [x] * 3, y, [0, 1, 2])
    np.testing.assert_allclose(change, scipy.special.softmax(y) - scipy.special.softmax(x))
    p, q = oracle.softmax((0.0, 1.0)), oracle.softmax((0.0, 1.0 + 1e-9))
    change = call("delta_prob", [0.0, 1.0], [0.0, 1.0 + 1e-9], 1)
    assert_exact(float(change), q.p[1] - p.p[1], "delta_prob")

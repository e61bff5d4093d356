"""Estimates of KL from sampled tokens, and from the largest entries of each row."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from klfast import reference
from klfast.estimators import AdaptiveController, kl_from_topk, sampled_kl


@pytest.mark.parametrize("r", [0.0, 1e-9, -1e-5, 0.019, 0.021, -0.3, 5.0, -30.0])
def test_estimators_are_their_formulas(r: float) -> None:
    log_p = np.float64(-1.5)
    log_q = log_p - r
    with mp.workdps(40):
        exact = mp.mpf(float(log_p)) - mp.mpf(float(log_q))
        truths = {"k1": exact, "k2": exact**2 / 2, "k3": mp.exp(-exact) - 1 + exact}
        slopes = {"k1": mp.mpf(1), "k2": exact, "k3": 1 - mp.exp(-exact)}
    for name, truth in truths.items():
        value, gradient = sampled_kl(log_p, log_q, name)  # type: ignore[arg-type]
        assert value == pytest.approx(float(truth), rel=1e-12, abs=1e-300)
        assert gradient == pytest.approx(float(slopes[name]), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_mean_over_samples_of_p_is_the_divergence(estimator: Any) -> None:
    rng = np.random.default_rng(3)
    p = rng.normal(size=50)
    q = p + 0.05 * rng.normal(size=50)
    log_p, log_q = reference.log_softmax(p), reference.log_softmax(q)
    value, _ = sampled_kl(log_p, log_q, estimator)
    mean = float(np.sum(np.exp(log_p) * value))
    # k2 is biased by the third order of log(p/q).
    assert mean == pytest.approx(float(reference.kl_divergence(p, q)), rel=5e-2)
    if estimator != "k2":
        assert mean == pytest.approx(float(reference.kl_divergence(p, q)), rel=1e-11)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_gradients_are_finite_at_any_ratio(estimator: Any, dtype: Any) -> None:
    """OpenRLHF#1335, verl#891: exp(r) - 1 - r with abs(r) = 100 overflowed.

    A clip after it had a gradient of NaN.
    """
    log_p = np.array([-100.0, -0.0, -math.inf, -0.0, -math.inf, -1e30], dtype)
    log_q = np.array([-0.0, -100.0, -0.0, -math.inf, -math.inf, -0.0], dtype)
    for options in ({}, {"clip_log_ratio": 20.0}, {"clip": 10.0}):
        value, gradient = sampled_kl(log_p, log_q, estimator, **options)
        assert value.dtype == gradient.dtype == dtype
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()
        assert value[4] == 0.0
        if "clip" in options:
            assert np.abs(value).max() <= 10.0


def test_clips_are_those_of_verl() -> None:
    log_p, log_q = np.array([-40.0, -25.0, -0.1]), np.array([-0.5, -1.0, -0.2])
    ratio = np.clip(log_q - log_p, -20, 20)
    verl = np.clip(np.exp(ratio) - ratio - 1, -10, 10)
    value, gradient = sampled_kl(log_p, log_q, clip_log_ratio=20, clip=10)
    np.testing.assert_allclose(value, verl, rtol=1e-14)
    assert gradient[0] == gradient[1] == 0.0
    assert gradient[2] == pytest.approx(1 - math.exp(-0.1))


def test_gradient_is_the_central_difference() -> None:
    log_p, log_q, h = np.linspace(-5, 0, 23), np.linspace(-1, -3, 23), 1e-6
    for name in ("k1", "k2", "k3"):
        above, below = (sampled_kl(log_p + s * h, log_q, name).value for s in (1, -1))
        gradient = sampled_kl(log_p, log_q, name).gradient
        np.testing.assert_allclose(gradient, (above - below) / (2 * h), rtol=1e-5, atol=1e-8)


def test_bad_arguments_of_the_estimators_are_named() -> None:
    with pytest.raises(ValueError, match="estimator is 'k4'"):
        sampled_kl(0.0, 0.0, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip is 0"):
        sampled_kl(0.0, 0.0, clip=0)


def test_controller_follows_its_formula() -> None:
    controller = AdaptiveController(0.2, target=6.0, horizon=10000)
    assert controller.update(12.0, 256) == pytest.approx(0.2 * (1 + 0.2 * 256 / 10000))
    before = controller.coefficient
    assert controller.update(5.7, 100) == pytest.approx(before * (1 - 0.05 * 100 / 10000))
    with pytest.raises(ValueError, match="divergence is nan"):
        controller.update(math.nan, 1)
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveController(0.1, target=0, horizon=1)


def largest(log_p: Any, k: int) -> tuple[Any, Any]:
    ids = np.argsort(-log_p, axis=-1, kind="stable")[..., :k]
    return ids, np.take_along_axis(log_p, ids, -1)


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(1, 40),
    k_p=st.integers(1, 40),
    k_q=st.integers(1, 40),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    noise=st.sampled_from([0.0, 1e-4, 0.3, 3.0]),
)
def test_bounds_contain_the_divergence_of_the_whole_rows(
    seed: int, vocab: int, k_p: int, k_q: int, spread: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    p = spread * rng.normal(size=(3, vocab))
    q = p + noise * rng.normal(size=(3, vocab))
    log_p, log_q = reference.log_softmax(p), reference.log_softmax(q)
    found = kl_from_topk(
        *largest(log_p, min(k_p, vocab)), *largest(log_q, min(k_q, vocab)), vocab,
        floor=float(log_q.min()),
    )  # fmt: skip
    truth = reference.kl_divergence(p, q)
    assert (found.estimate >= 0).all()
    assert (found.lower >= found.estimate).all()
    assert (found.lower <= truth + 1e-12).all()
    assert (found.upper >= truth - 1e-12).all()
    if min(k_p, k_q) >= vocab:
        np.testing.assert_allclose(found.estimate, truth, atol=1e-13)
        np.testing.assert_allclose(found.upper, truth, atol=1e-12)


def test_top_k_alone_is_not_negative_where_the_plain_sum_is() -> None:
    """verl#7856: the sum over the given tokens was negative in 415 of 467 training steps."""
    p_ids, q_ids = [3, 1], [3, 1]
    p_log, q_log = np.log([0.5, 0.2]), np.log([0.6, 0.25])
    plain = float(np.sum(np.exp(p_log) * (p_log - q_log)))
    found = kl_from_topk(p_ids, p_log, q_ids, q_log, 100)
    assert plain < 0
    expected = plain + 0.3 * math.log(0.3 / 0.15)
    assert float(found.estimate) == pytest.approx(expected)
    assert found.upper == math.inf


def test_a_token_missing_from_q_raises_the_lower_bound() -> None:
    found = kl_from_topk([0, 1], np.log([0.6, 0.3]), [0, 2], np.log([0.6, 0.05]), 10)
    # Token 1 has at most 0.05 under Q; the other 0.1 of P has the other 0.35 of Q.
    expected = 0.3 * math.log(0.3 / 0.05) + 0.1 * math.log(0.1 / 0.35)
    assert float(found.lower) == pytest.approx(expected)
    assert float(found.estimate) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_ids": [1.0, 2.0]}, "p_ids has dtype float64"),
        ({"p_ids": [1, 1]}, "p_ids repeats a token"),
        ({"q_ids": [1, 5]}, "q_ids reach from 1 to 5"),
        ({"q_logprobs": [0.1, -1.0]}, "q_logprobs holds NaN or a number above 0"),
        ({"p_logprobs": [-0.1, -0.1]}, "p_logprobs add up to"),
        ({"p_logprobs": [-1.0]}, r"shapes \(2,\) and \(1,\)"),
        ({"q_ids": [[0, 1]], "q_logprobs": [[-1.0, -2.0]]}, "the same batch axes"),
    ],
)
def test_bad_arguments_of_topk_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "p_ids": [0, 1], "p_logprobs": [-1.0, -2.0], "q_ids": [0, 2], "q_logprobs": [-1.0, -2.0],
        "vocab_size": 5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kl_from_topk(**(arguments | change))

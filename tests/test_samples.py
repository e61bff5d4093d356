"""Estimates from samples and from critics, against distributions whose divergence is known."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klfast import estimators, gaussian
from klfast._dispatch import compiled
from klfast.estimators import (
    _samples,
    donsker_varadhan,
    infonce,
    knn_kl,
    monte_carlo_kl,
    nwj,
    sampled_kl,
)


def log_normal(x: Any, mean: Any, deviation: float = 1.0) -> Any:
    return -0.5 * ((x - mean) / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 40), (2, 70001)])
def test_monte_carlo_is_mean_and_standard_error(estimator: Any, dtype: Any, shape: Any) -> None:
    rng = np.random.default_rng(0)
    log_p = rng.normal(size=shape).astype(dtype)
    log_q = (log_p + 0.1 + 0.3 * rng.normal(size=shape)).astype(dtype)
    each = sampled_kl(log_p.astype(np.float64), log_q.astype(np.float64), estimator).value
    found = monte_carlo_kl(log_p, log_q, estimator)
    np.testing.assert_allclose(found.value, each.mean(-1), rtol=1e-11)
    if shape[-1] == 1:
        assert np.isnan(found.standard_error)
    else:
        error = each.std(-1, ddof=1) / math.sqrt(shape[-1])
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_monte_carlo_is_within_its_error_of_the_truth(estimator: Any) -> None:
    x = np.random.default_rng(1).normal(size=(50, 20000))
    found = monte_carlo_kl(log_normal(x, 0.0), log_normal(x, 0.5, 1.2), estimator)
    truth = gaussian.kl_divergence([0.0], [0.0], [0.5], [2 * math.log(1.2)])
    score = (found.value - truth) / found.standard_error
    assert abs(score.mean()) < 0.6  # 4 standard errors of 50 scores
    assert 0.6 < score.std() < 1.4


def test_a_large_mean_does_not_hide_the_spread() -> None:
    r = 1e6 + 1e-3 * np.random.default_rng(2).normal(size=100001)
    found = monte_carlo_kl(r, np.zeros_like(r))
    expected = (r - 1e6).std(ddof=1) / math.sqrt(r.size)
    assert found.standard_error == pytest.approx(expected, rel=1e-5)


def test_one_log_probability_may_stand_for_all() -> None:
    log_p = np.random.default_rng(12).normal(size=(3, 50))
    found, whole = monte_carlo_kl(log_p, -2.0), monte_carlo_kl(log_p, np.full(50, -2.0))
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-14)
    np.testing.assert_allclose(found.standard_error, whole.standard_error, rtol=1e-12)


def test_infinite_log_probabilities() -> None:
    inf = math.inf
    found = monte_carlo_kl([[-1.0, -inf], [-1.0, -2.0], [-1.0, math.nan]],
                           [[-1.0, -inf], [-1.0, -inf], [-1.0, -1.0]])  # fmt: skip
    np.testing.assert_array_equal(found.value, [0.0, inf, math.nan])


def test_numpy_gives_what_the_kernel_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    p, q = rng.normal(size=(2, 4, 1000))
    names: tuple[Any, ...] = ("k1", "k2", "k3")
    expected = [monte_carlo_kl(p, q, name) for name in names]
    assert compiled() is not None
    monkeypatch.setattr(_samples, "compiled", lambda: None)
    for name, each in zip(names, expected, strict=True):
        found = monte_carlo_kl(p, q, name)
        np.testing.assert_allclose(found.value, each.value, rtol=1e-11)
        np.testing.assert_allclose(found.standard_error, each.standard_error, rtol=1e-9)


@pytest.mark.parametrize("bias_reduced", [False, True])
def test_neighbours_find_the_divergence_of_gaussians(bias_reduced: bool) -> None:
    rng = np.random.default_rng(4)
    for d, shift in ((1, 0.0), (1, 1.0), (3, 0.7)):
        x, y = rng.normal(size=(4000, d)), shift + rng.normal(size=(5000, d))
        truth = 0.5 * d * shift**2
        assert knn_kl(x, y, bias_reduced=bias_reduced) == pytest.approx(truth, abs=0.08)


def test_bias_reduced_neighbours_are_nearer_the_truth() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2000, 3)), 1.0 + 1.5 * rng.normal(size=(2000, 3))
    truth = float(gaussian.kl_divergence([0.0] * 3, [0.0] * 3, [1.0] * 3, [2 * math.log(1.5)] * 3))
    plain, reduced = knn_kl(x, y), knn_kl(x, y, bias_reduced=True)
    assert abs(reduced - truth) < 0.06
    assert abs(reduced - truth) < abs(plain - truth) + 0.02


def brute_force(x: Any, y: Any, k: int) -> float:
    """The formula, from all distances."""
    own = np.sort(np.linalg.norm(x[:, None] - x, axis=-1), -1)[:, k]
    other = np.sort(np.linalg.norm(x[:, None] - y, axis=-1), -1)[:, k - 1]
    n, d = x.shape
    return float(d * np.log(other / own).mean() + math.log(len(y) / (n - 1)))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(7, 60), d=st.integers(1, 4),
       k=st.integers(1, 5))  # fmt: skip
def test_neighbours_follow_the_formula(seed: int, n: int, d: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n + 3, d))
    assert knn_kl(x, y, k) == pytest.approx(brute_force(x, y, k), rel=1e-9, abs=1e-12)


def bad(value: str) -> Any:
    """A string that no type accepts."""
    return value


X = np.random.default_rng(6).normal(size=(30, 2))


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (np.vstack([X, X[:1]]), X + 1, 5, r"x\[0\] is also another sample of x"),
        (X, np.vstack([X[3:4], X + 1]), 5, r"x\[3\] is also in y"),
        (X, np.vstack([X + 1, X[:1] + 1]), 5, r"y\[0\] is also another sample of y"),
        (X, X[:4] + 1, 5, "k is 5; accepted: a whole number from 1 to 4, with 30 x and 4 y"),
        (X, X[:, :1], 5, "x and y have 2 and 1 dimensions"),
        (X * np.inf, X, 5, "x holds NaN or an infinity"),
        (X, np.zeros((0, 2)), 5, r"y has shape \(0, 2\)"),
        (X, X, 2.5, "k is 2.5"),
    ],
)
def test_samples_that_would_give_a_wrong_result_are_refused(
    x: Any, y: Any, k: Any, message: str
) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        knn_kl(x, y, k)


def test_many_dimensions_warn() -> None:
    x = np.random.default_rng(7).normal(size=(2, 40, 21))
    with pytest.warns(UserWarning, match="knn_kl in 21 dimensions"):
        knn_kl(x[0], x[1])


def test_scipy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match=r'pip install "klfast\[stats\]"'):
        knn_kl(X, X + 1)


# Critics: P is normal with mean 1, Q standard normal, KL = 1/2, log(p/q) = x - 1/2.


def scores(n: int, batch: int = 400, seed: int = 8) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return 0.5 + rng.normal(size=(batch, n)), -0.5 + rng.normal(size=(batch, n))


def test_the_best_critic_reaches_the_divergence() -> None:
    joint, marginal = scores(5000, 100)
    for found in (donsker_varadhan(joint, marginal), nwj(joint + 1, marginal + 1)):
        score = (found.value - 0.5) / found.standard_error
        assert abs(score.mean()) < 0.5
        assert 0.7 < score.std() < 1.3


def test_leaving_one_out_takes_the_bias_away() -> None:
    joint, marginal = scores(40, 20000)
    plain = donsker_varadhan(joint, marginal).value.mean() - 0.5
    corrected = donsker_varadhan(joint, marginal, correct_bias=True).value.mean() - 0.5
    assert plain > 0.015  # about (e - 1) / (2 n)
    assert abs(corrected) < 0.3 * plain


def test_errors_follow_the_delta_method() -> None:
    joint, marginal = scores(300, 3)
    weights = np.exp(marginal)
    relative = weights.var(-1, ddof=1) / weights.mean(-1) ** 2 / 300
    own = joint.var(-1, ddof=1) / 300
    for dtype, rtol in ((np.float64, 1e-10), (np.float32, 1e-5)):
        pair = joint.astype(dtype), marginal.astype(dtype)
        found = donsker_varadhan(*pair)
        np.testing.assert_allclose(found.standard_error, np.sqrt(own + relative), rtol=rtol)
        error = np.sqrt(own + relative * (weights.mean(-1) / math.e) ** 2)
        np.testing.assert_allclose(nwj(*pair).standard_error, error, rtol=rtol)


def test_the_jackknife_is_that_of_its_definition() -> None:
    joint, marginal = (each[0] for each in scores(9, 1))

    def log_mean(x: Any) -> float:
        return float(np.log(np.mean(np.exp(x))))

    without = [log_mean(np.delete(marginal, i)) for i in range(9)]
    expected = joint.mean() - (9 * log_mean(marginal) - 8 * np.mean(without))
    found = donsker_varadhan(joint, marginal, correct_bias=True).value
    assert found == pytest.approx(expected, rel=1e-10)


def test_any_critic_stays_below_the_divergence() -> None:
    x, y = 1 + np.random.default_rng(9).normal(size=(1, 100000)), scores(100000, 1)[1] + 0.5
    for slope in (-1.0, 0.0, 0.5, 2.0):
        bound = donsker_varadhan(slope * x, slope * y)
        assert bound.value < 0.5 + 4 * bound.standard_error
        lower = nwj(slope * x, slope * y)
        assert lower.value <= bound.value + 1e-12


def test_scores_of_any_size_do_not_overflow() -> None:
    found = donsker_varadhan([1e4, 1e4 + 1], [1e4, 1e4 - 1, -1e4])
    assert math.isfinite(found.value)
    shifted = donsker_varadhan([0.0, 1.0], [0.0, -1.0, -2e4])
    assert found.value == pytest.approx(float(shifted.value), rel=1e-12)


def test_infonce_is_at_most_the_logarithm_of_the_batch() -> None:
    rng = np.random.default_rng(10)
    found = infonce(100 * np.eye(8) + rng.normal(size=(5, 8, 8)))
    assert (found.value <= math.log(8)).all()
    np.testing.assert_allclose(found.value, math.log(8), rtol=1e-6)
    s = rng.normal(size=(6, 6))
    expected = np.mean(np.diag(s) - np.log(np.exp(s).mean(1)))
    assert infonce(s).value == pytest.approx(expected, rel=1e-12)


def test_infonce_finds_the_information_of_two_gaussians() -> None:
    rng = np.random.default_rng(11)
    rho, n = 0.8, 600
    x = rng.normal(size=n)
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n)
    s = log_normal(y, 0.0)  # log p(y | x) - log p(y) is the best critic
    critic = log_normal(y[None, :], rho * x[:, None], math.sqrt(1 - rho**2)) - s
    truth = -0.5 * math.log(1 - rho**2)
    found = infonce(critic)
    assert found.value == pytest.approx(truth, abs=4 * float(found.standard_error))


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_same_kind_of_array_comes_back(library: str) -> None:
    module = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[library])
    convert = module.tensor if library == "torch" else module.asarray
    pair = [each.astype(np.float32) for each in scores(30, 4)]
    ours = [convert(each) for each in pair]
    for function in (monte_carlo_kl, donsker_varadhan, nwj):
        for mine, plain in zip(function(*ours), function(*pair), strict=True):
            assert type(mine) is type(ours[0])
            np.testing.assert_allclose(np.asarray(mine), plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: monte_carlo_kl([0.0], [0.0], bad("k4")), ValueError, "estimator is 'k4'"),
        (lambda: monte_carlo_kl([0.0, 1.0], [0.0] * 3), ValueError, "log_p and log_q have shapes"),
        (lambda: monte_carlo_kl(np.zeros(3, np.int64), [0.0] * 3), TypeError, "log_p has dtype"),
        (lambda: donsker_varadhan([], [1.0]), ValueError, r"joint has shape \(0,\)"),
        (lambda: donsker_varadhan([1.0], [1.0], correct_bias=True), ValueError, "marginal has 1"),
        (
            lambda: nwj(np.ones((3, 4)), np.ones((2, 4))),
            ValueError,
            r"batch axes are joint \(3,\), marginal \(2,\)",
        ),
        (lambda: knn_kl(X + 1j, X), TypeError, "x has dtype complex128"),
        (lambda: knn_kl(X, [["a"]]), TypeError, "y has dtype"),
        (lambda: infonce(np.zeros((2, 3))), ValueError, r"scores has shape \(2, 3\)"),
        (lambda: nwj("no", [1.0]), TypeError, "joint is of type str"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_everything_public_is_documented() -> None:
    for name in estimators.__all__:
        assert len(getattr(estimators, name).__doc__ or "") > 60


def test_leaving_out_the_score_that_is_nearly_all_of_the_sum() -> None:
    marginal = np.array([[1000.0, 0.0, 1.0], [3.0, 2.0, -1.0]])
    logsumexp = pytest.importorskip("scipy.special").logsumexp
    log_mean = logsumexp(marginal, axis=1) - math.log(3)
    without = [logsumexp(np.delete(marginal, i, 1), axis=1) - math.log(2) for i in range(3)]
    expected = -(3 * log_mean - 2 * np.mean(without, 0))
    found = donsker_varadhan(np.zeros((2, 4)), marginal, correct_bias=True).value
    np.testing.assert_allclose(found, expected, rtol=1e-12)

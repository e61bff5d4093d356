"""Information measures, closed forms of discrete distributions, and bounds between measures."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

import klfast
from klfast import bounds, closed_forms, information, reference
from klfast.closed_forms import bernoulli_kl, dirichlet_kl, kl_from_uniform, kl_of_uniform
from klfast.information import (
    bits_per_byte,
    bits_per_token,
    calibration_kl,
    conditional_entropy,
    information_bottleneck,
    mutual_information,
    perplexity,
)


def table(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def bad(value: str) -> Any:
    """A string that no type accepts."""
    return value


def entropy_of(p: Any) -> Any:
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0))


def softmax(x: Any) -> Any:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


@pytest.mark.parametrize("input", ["logits", "log_probs", "probs", "counts"])
def test_information_and_conditional_entropy_are_those_of_the_entropies(input: Any) -> None:
    joint = table(7, 5)
    given_as = np.random.default_rng(1).poisson(3.0, (7, 5)) if input == "counts" else joint
    if input == "probs":
        given_as = np.exp(joint)
    p = softmax(joint) if input != "counts" else given_as / given_as.sum()
    both, x, y = entropy_of(p), entropy_of(p.sum(1)), entropy_of(p.sum(0))
    assert mutual_information(given_as, input) == pytest.approx(x + y - both, rel=1e-12)
    assert conditional_entropy(given_as, input) == pytest.approx(both - x, rel=1e-12)
    other = conditional_entropy(given_as, input, given_axis=-1)
    assert other == pytest.approx(both - y, rel=1e-12)


def test_nearly_independent_variables_keep_their_digits() -> None:
    x, y, change = table(30), table(40, seed=1), 1e-6 * table(30, 40, seed=2)
    joint = x[:, None] + y + change
    with mp.workdps(40):
        weights = mp.matrix(30, 40)
        for i in range(30):
            for j in range(40):
                weights[i, j] = mp.exp(mp.mpf(float(joint[i, j])))
        total = mp.fsum(weights)
        across = [mp.fsum(weights[i, :]) / total for i in range(30)]
        down = [mp.fsum(weights[:, j]) / total for j in range(40)]
        truth = mp.fsum(
            weights[i, j] / total * mp.log(weights[i, j] / total / across[i] / down[j])
            for i in range(30) for j in range(40)
        )  # fmt: skip
    assert mutual_information(joint) == pytest.approx(float(truth), rel=1e-7)
    assert float(truth) < 1e-11


def test_batches_zeros_and_other_libraries() -> None:
    joint = table(3, 4, 5).astype(np.float32)
    joint[1, 2] = -np.inf  # an x that never comes
    found = mutual_information(joint)
    assert found.shape == (3,)
    assert found.dtype == np.float32
    assert found[1] == mutual_information(np.delete(joint[1], 2, 0))
    assert conditional_entropy(joint)[1] == conditional_entropy(np.delete(joint[1], 2, 0))
    torch = pytest.importorskip("torch")
    ours = mutual_information(torch.tensor(joint))
    assert type(ours) is torch.Tensor
    np.testing.assert_array_equal(ours.numpy(), found)


def test_the_correction_takes_the_bias_of_counts_away() -> None:
    rng = np.random.default_rng(3)
    p = softmax(table(6, 5, seed=4))
    truth = float(mutual_information(p, "probs"))
    counts = rng.multinomial(400, p.ravel(), size=3000).reshape(-1, 6, 5)
    plain = mutual_information(counts, "counts").mean() - truth
    corrected = mutual_information(counts, "counts", correction="miller_madow").mean() - truth
    assert plain > 0.02
    assert abs(corrected) < 0.15 * plain


def test_the_bottleneck_is_two_informations() -> None:
    joint, encoder = table(6, 4), 3 * table(6, 3, seed=5)
    p = softmax(joint)
    code = np.exp(encoder) / np.exp(encoder).sum(1, keepdims=True)
    found = information_bottleneck(joint, encoder, beta=5.0)
    assert found.rate == pytest.approx(
        float(mutual_information(p.sum(1)[:, None] * code, "probs")), rel=1e-12
    )
    assert found.relevance == pytest.approx(
        float(mutual_information(code.T @ p, "probs")), rel=1e-12
    )
    assert found.objective == pytest.approx(found.rate - 5 * found.relevance)
    assert found.relevance <= min(found.rate, mutual_information(joint))
    counts = np.rint(1000 * p).astype(int)
    assert information_bottleneck(counts, encoder, input="counts").rate == pytest.approx(
        float(found.rate), rel=1e-2
    )


def test_perplexity_and_bits() -> None:
    log_p = np.log([[0.5, 0.25], [0.125, 1.0]])
    assert perplexity(log_p) == pytest.approx(2**1.5)
    assert bits_per_token(log_p) == pytest.approx(1.5)
    assert bits_per_byte(log_p, 12) == pytest.approx(0.5)
    keep = np.array([[True, False], [True, False]])
    assert bits_per_token(log_p, keep) == pytest.approx(2.0)
    assert np.isnan(perplexity(log_p, np.zeros_like(keep)))


def test_calibration_is_the_divergence_of_the_bins() -> None:
    rng = np.random.default_rng(6)
    p = rng.random(20000)
    honest = calibration_kl(p, rng.random(p.size) < p)
    assert honest.kl < 3 * 15 / (2 * p.size)
    boastful = calibration_kl(p, rng.random(p.size) < 0.5 + 0.3 * (p - 0.5))
    assert boastful.kl > 0.05
    assert boastful.count.sum() == p.size
    by_hand = sum(
        n / p.size * (o * math.log(o / c) + (1 - o) * math.log((1 - o) / (1 - c)))
        for n, c, o in zip(boastful.count, boastful.predicted, boastful.observed, strict=True)
    )
    assert boastful.kl == pytest.approx(by_hand, rel=1e-9)
    even = calibration_kl(p, p > 0.5, 10, spacing="quantile")
    assert even.count.min() >= p.size // 10 - 1
    assert calibration_kl([0.9, 1.0], [1, 1], 5).observed[4] == 1.0


def test_the_reliability_diagram_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    axes = calibration_kl([0.2, 0.7, 0.9], [False, True, True]).plot()
    assert axes.get_xlabel() == "predicted probability"
    assert len(axes.collections) == 1


def test_uniform_is_a_row_like_others() -> None:
    p = table(4, 600).astype(np.float32)
    expected = math.log(600) - reference.entropy(p)
    np.testing.assert_allclose(kl_from_uniform(p), expected, rtol=1e-5)
    np.testing.assert_allclose(kl_from_uniform(p.T, axis=0), kl_from_uniform(p), rtol=1e-6)
    np.testing.assert_allclose(kl_from_uniform(np.exp(p), input="probs"), expected, rtol=1e-5)
    close = (1e-5 * p).astype(np.float32)
    np.testing.assert_allclose(
        kl_from_uniform(close), reference.kl_divergence(close, 0 * close), rtol=2e-6
    )
    p[0, 3] = -np.inf
    assert kl_of_uniform(p)[0] == math.inf
    np.testing.assert_allclose(
        kl_of_uniform(p)[1:], reference.kl_divergence(0 * p[1:], p[1:]), rtol=2e-6
    )


@pytest.mark.parametrize("input", ["probs", "logits"])
@pytest.mark.parametrize("distance", [1e-9, 1e-3, 1.0, 30.0])
def test_bernoulli_against_many_digits(input: Any, distance: float) -> None:
    x = np.linspace(-8, 8, 33)
    y = x + distance
    if input == "probs":
        x, y = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(-y))
        x, y = x[y < 1], y[y < 1]
    with mp.workdps(60):
        expected = []
        for a, b in zip(x, y, strict=True):
            p, q = (mp.mpf(float(t)) for t in (a, b))
            if input == "logits":
                p, q = 1 / (1 + mp.exp(-p)), 1 / (1 + mp.exp(-q))
            expected.append(float(p * mp.log(p / q) + (1 - p) * mp.log((1 - p) / (1 - q))))
    np.testing.assert_allclose(bernoulli_kl(x, y, input=input), expected, rtol=1e-9)


def test_bernoulli_at_the_ends() -> None:
    inf = math.inf
    np.testing.assert_allclose(
        bernoulli_kl([0.0, 0.5, 1.0, 1.0, 2.0], [0.5, 1.0, 1.0, 0.0, 0.5]),
        [math.log(2), inf, 0.0, inf, math.nan],
    )
    np.testing.assert_allclose(
        bernoulli_kl([-inf, 0.0, inf, inf], [0.0, inf, inf, -inf], input="logits"),
        [math.log(2), inf, 0.0, inf],
    )


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("distance", [1e-6, 1e-2, 0.4, 3.0])
def test_dirichlet_against_many_digits(scale: float, distance: float) -> None:
    rng = np.random.default_rng(7)
    p = scale * rng.gamma(2.0, size=(3, 6))
    q = p * np.exp(distance * rng.normal(size=p.shape))
    with mp.workdps(60):
        expected = []
        for a, b in zip(p, q, strict=True):
            x, y = ([mp.mpf(float(t)) for t in each] for each in (a, b))
            sx, sy = mp.fsum(x), mp.fsum(y)
            value = (
                mp.loggamma(sx)
                - mp.loggamma(sy)
                + mp.fsum(
                    mp.loggamma(v) - mp.loggamma(u) + (u - v) * (mp.digamma(u) - mp.digamma(sx))
                    for u, v in zip(x, y, strict=True)
                )
            )
            expected.append(float(value))
    np.testing.assert_allclose(dirichlet_kl(p, q), expected, rtol=1e-9)
    assert (dirichlet_kl(p, p) == 0).all()


# Bounds


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from([2, 3, 20, 300]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    distance=st.sampled_from([1e-5, 1e-2, 0.5, 3.0, 12.0]),
)
def test_every_divergence_keeps_within_its_bounds(
    seed: int, width: int, spread: float, distance: float
) -> None:
    rng = np.random.default_rng(seed)
    p = spread * rng.normal(size=(4, width))
    q = p + distance * rng.normal(size=p.shape)
    metrics = ("kl", "reverse_kl", "jeffreys", "js", "js:0.3", "tv", "hellinger2", "chi2",
               "renyi:0.5", "renyi:0.9", "renyi:2", "renyi:inf", "alpha:0.5", "alpha:2",
               "tsallis:0.5", "tsallis:2", "cross_entropy", "entropy_p")  # fmt: skip
    r = klfast.compare(p, q, metrics)

    def at_most(lower: Any, upper: Any) -> None:
        assert (lower <= upper * (1 + 1e-9) + 1e-15).all(), (lower, upper)

    def between(pair: Any, value: Any) -> None:
        at_most(pair[0], value)
        at_most(value, pair[1])

    tv, kl, h2, chi2, js = (r[name] for name in ("tv", "kl", "hellinger2", "chi2", "js"))
    for each in (kl, r["reverse_kl"]):
        at_most(tv, bounds.pinsker(each))
        at_most(tv, bounds.bretagnolle_huber(each))
        at_most(bounds.kl_from_tv(tv), each)
        at_most(bounds.kl_from_hellinger2(h2), each)
        at_most(h2, bounds.hellinger2_from_kl(each))
    at_most(kl, bounds.kl_from_chi2(chi2))
    at_most(kl, bounds.kl_from_tv_and_smallest(tv, np.exp(klfast.log_softmax(q)).min(-1)))
    at_most(2 * bounds.kl_from_tv(tv), r["jeffreys"])
    between(bounds.tv_from_hellinger2(h2), tv)
    at_most(tv, bounds.tv_from_chi2(chi2))
    far = tv < 1 - 1e-9  # TV / (1 - TV) has no digits left beyond
    at_most(bounds.chi2_from_tv(tv)[far], chi2[far])
    between(bounds.js_from_tv(tv), js)
    between(bounds.tv_from_js(js), tv)
    between(bounds.js_from_hellinger2(h2), js)
    at_most(js, 0.25 * r["jeffreys"])
    at_most(r["js:0.3"], 0.21 * r["jeffreys"])
    at_most(bounds.kl_from_hellinger2(h2), r["renyi:0.5"])
    for lower, upper in (("renyi:0.5", "renyi:0.9"), ("renyi:0.9", "kl"), ("kl", "renyi:2"),
                         ("renyi:2", "renyi:inf")):  # fmt: skip
        at_most(r[lower], r[upper])
    np.testing.assert_allclose(r["renyi:2"], bounds.kl_from_chi2(chi2), rtol=1e-9)
    np.testing.assert_allclose(r["alpha:0.5"], 4 * h2, rtol=1e-9)
    np.testing.assert_allclose(r["alpha:2"], 0.5 * chi2, rtol=1e-9)
    np.testing.assert_allclose(r["tsallis:0.5"], 2 * h2, rtol=1e-9)
    np.testing.assert_allclose(r["tsallis:2"], chi2, rtol=1e-9)
    at_most(r["entropy_p"], r["cross_entropy"])


def test_bounds_at_their_ends_and_of_any_array() -> None:
    inf = math.inf
    assert bounds.pinsker(inf) == bounds.bretagnolle_huber(inf) == bounds.tv_from_chi2(inf) == 1
    assert bounds.kl_from_tv(1.0) == bounds.chi2_from_tv(1.0) == inf
    np.testing.assert_allclose(bounds.js_from_tv(1.0), math.log(2))
    np.testing.assert_allclose(bounds.js_from_tv(1e-6)[0], 5e-13, rtol=1e-11)
    torch = pytest.importorskip("torch")
    assert bounds.pinsker(torch.tensor([0.02])).dtype == torch.float32
    both = bounds.kl_from_tv_and_smallest(torch.tensor([0.5]), 0.1)  # a number goes with any array
    np.testing.assert_allclose(both.numpy(), math.log1p(5), rtol=1e-6)
    assert both.dtype == torch.float32
    with pytest.raises(ValueError, match="kl holds -1"):
        bounds.pinsker(-1.0)


@pytest.mark.parametrize("module", [bounds, closed_forms, information])
def test_everything_public_is_documented(module: Any) -> None:
    for name in module.__all__:
        assert len(getattr(module, name).__doc__ or "") > 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mutual_information(np.zeros(3)), r"joint has shape \(3,\)"),
        (lambda: mutual_information(np.zeros((2, 2)), bad("weights")), "input is 'weights'"),
        (lambda: mutual_information([[1, -1]], "counts"), "joint holds a negative count"),
        (lambda: information_bottleneck(np.ones((2, 3, 2)), np.ones((4, 3, 2))), "batch axes are"),
        (lambda: bernoulli_kl([0.5, 0.5], [0.5, 0.5, 0.5]), r"p \(2,\), q \(3,\)"),
        (lambda: dirichlet_kl(np.ones((2, 3)), np.ones((4, 3))), r"p \(2,\), q \(4,\)"),
        (lambda: mutual_information(np.ones((2, 2)), correction="miller_madow"), "is 'logits'"),
        (lambda: conditional_entropy(np.ones((2, 2)), given_axis=0), "given_axis is 0"),
        (lambda: information_bottleneck(np.ones((2, 2)), np.ones((3, 2))), "number of x"),
        (lambda: perplexity([0.5]), "log_probs hold 0.5"),
        (lambda: bits_per_token([-0.5], [1]), "where has dtype int64"),
        (lambda: bits_per_byte([-0.5], 0), "n_bytes is 0"),
        (lambda: calibration_kl([0.5], [2]), "outcomes have dtype"),
        (lambda: calibration_kl([0.5], [1, 0]), r"outcomes have shape \(2,\)"),
        (lambda: calibration_kl([1.5], [1]), "outside"),
        (lambda: calibration_kl([0.5], [1], 0), "bins is 0"),
        (lambda: bernoulli_kl(0.5, 0.5, input=bad("odds")), "input is 'odds'"),
        (lambda: dirichlet_kl([1.0, 2.0], [1.0]), "2 and 1 concentrations"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""Divergences between Gaussians, against mpmath and against their own definitions."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from klfast import gaussian

ORDERS = (1e-3, 0.3, 0.5, 0.999999, 1.0, 1.000001, 1.5, 2.0, 7.0)


def truth_kl(mp_: Any, lp: Any, mq: Any, lq: Any) -> Any:
    return 0.5 * (mp.exp(lp - lq) - 1 - (lp - lq) + (mp_ - mq) ** 2 * mp.exp(-lq))


def truth_renyi(mp_: Any, lp: Any, mq: Any, lq: Any, alpha: float) -> Any:
    if alpha == 1:
        return truth_kl(mp_, lp, mq, lq)
    a = mp.mpf(alpha)
    s = (1 - a) * mp.exp(lp) + a * mp.exp(lq)
    if s <= 0:
        return mp.inf
    log = ((1 - a) * lp + a * lq - mp.log(s)) / (2 * (a - 1))
    return a * (mp_ - mq) ** 2 / (2 * s) + log


def truth_wasserstein2(mp_: Any, lp: Any, mq: Any, lq: Any) -> Any:
    return (mp_ - mq) ** 2 + (mp.exp(lp / 2) - mp.exp(lq / 2)) ** 2


def cases(distance: float, dtype: Any, n: int = 37) -> tuple[Any, ...]:
    rng = np.random.default_rng(11)
    mean, logvar = rng.normal(size=(2, 3, n))
    shift, growth = distance * rng.normal(size=(2, 3, n))
    return tuple(x.astype(dtype) for x in (mean + shift, logvar + growth, mean, logvar))


def summed(truth: Callable[..., Any], arrays: tuple[Any, ...], *more: Any) -> Any:
    """The sum over the last axis in 50 digits, rounded to float64."""
    whole = np.broadcast_arrays(*(np.asarray(a).astype(np.float64) for a in arrays))
    with mp.workdps(50):
        rows = [
            mp.fsum(truth(*map(mp.mpf, map(float, e)), *more) for e in zip(*row, strict=True))
            for row in zip(*(a.reshape(-1, a.shape[-1]) for a in whole), strict=True)
        ]
        return np.array([float(each) for each in rows]).reshape(whole[0].shape[:-1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("distance", [1e-6, 1e-2, 1.0, 6.0])
def test_kl_is_exact_however_close(distance: float, dtype: Any) -> None:
    arrays = cases(distance, dtype)
    tolerance = 1e-13 if dtype is np.float64 else 1e-6
    np.testing.assert_allclose(
        gaussian.kl_divergence(*arrays), summed(truth_kl, arrays), rtol=tolerance
    )
    zero = np.zeros(1)
    np.testing.assert_allclose(
        gaussian.kl_divergence(*arrays[:2]),
        summed(truth_kl, (*arrays[:2], zero, zero)),
        rtol=tolerance,
    )


def test_float32_does_not_cancel_next_to_the_prior() -> None:
    """The textbook form is lost in its own rounding here, and negative in places."""
    logvar = np.full((1, 300), 3e-4, np.float32)
    mean = np.zeros_like(logvar)
    textbook = -0.5 * (1 + logvar - mean**2 - np.exp(logvar)).sum()
    zero = np.zeros(1)
    expected = summed(truth_kl, (mean, logvar, zero, zero))
    np.testing.assert_allclose(gaussian.kl_divergence(mean, logvar), expected, rtol=2e-7)
    assert abs(textbook / expected[0] - 1) > 0.1


@pytest.mark.parametrize(
    "parameters",
    [(3.0, 80.0, 1.0, -80.0), (1e30, 0.0, -1e30, 70.0), (1e-25, -85.0, 0.0, -85.0),
     (0.0, -3e38, 0.0, 0.0), (0.0, 0.0, 0.0, -600.0), (2.0, -95.0, 1.0, 5.0)],
)  # fmt: skip
def test_values_beyond_float32_are_computed_in_float64(parameters: tuple[float, ...]) -> None:
    arrays = tuple(np.full((2, 5), x, np.float32) for x in parameters)
    given64 = tuple(a.astype(np.float64) for a in arrays)
    expected = summed(truth_kl, arrays)
    np.testing.assert_allclose(gaussian.kl_divergence(*given64), expected, rtol=1e-12)
    with np.errstate(over="ignore"):
        rounded = expected.astype(np.float32)
    np.testing.assert_allclose(gaussian.kl_divergence(*arrays), rounded, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 1), (5, 16), (3, 700), (2, 40000), (0, 4), (6,)])
def test_every_shape_takes_the_same_formula(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=shape).astype(dtype) for _ in range(4)]
    plain = summed_plainly(*(x.astype(np.float64) for x in arrays))
    np.testing.assert_allclose(gaussian.kl_divergence(*arrays), plain, rtol=2e-6)
    np.testing.assert_allclose(
        gaussian.value_and_grad(*arrays).value, gaussian.kl_divergence(*arrays), rtol=1e-6
    )


@pytest.mark.parametrize("width", [1, 32, 50, 600])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_is_what_it_is_alone(width: int, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=(37, width)).astype(dtype) for _ in range(4)]
    arrays[1][[3, 36], 0], arrays[3][[3, 36], 0] = 89.0, 0.5  # beyond what float32 terms hold
    arrays[0][20], arrays[1][20] = arrays[2][20], arrays[3][20]
    whole = gaussian.kl_divergence(*arrays)
    assert whole.dtype == dtype
    alone = [gaussian.kl_divergence(*(a[i] for a in arrays)) for i in range(37)]
    np.testing.assert_array_equal(whole, alone)
    expected = summed_plainly(*(a.astype(np.float64) for a in arrays))
    np.testing.assert_allclose(whole, expected, rtol=2e-6 if dtype is np.float32 else 1e-12)


def summed_plainly(a: Any, b: Any, c: Any, d: Any) -> Any:
    return 0.5 * (np.exp(b - d) - 1 - (b - d) + (a - c) ** 2 * np.exp(-d)).sum(-1)


def test_batches_broadcast_and_strides_are_read() -> None:
    rng = np.random.default_rng(4)
    mean, logvar = rng.normal(size=(2, 6, 1, 8)).astype(np.float32)
    mean_q, logvar_q = rng.normal(size=(2, 5, 8))
    whole = np.broadcast_arrays(mean, logvar, mean_q, logvar_q)
    expected = gaussian.kl_divergence(*(a.astype(np.float64) for a in whole))
    assert expected.shape == (6, 5)
    np.testing.assert_allclose(
        gaussian.kl_divergence(mean, logvar, mean_q, logvar_q), expected, rtol=1e-13
    )
    transposed = np.asfortranarray(mean[:, 0])
    np.testing.assert_array_equal(
        gaussian.kl_divergence(transposed, logvar[:, 0]),
        gaussian.kl_divergence(mean[:, 0], logvar[:, 0]),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_are_the_derivatives(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    for distance in (1e-3, 1.0):
        arrays = cases(distance, dtype)
        leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
        a, b, c, d = leaves
        scale = np.array([1.0, -2.0, 0.5])
        plain = 0.5 * (torch.exp(b - d) - 1 - (b - d) + (a - c) ** 2 * torch.exp(-d)).sum(-1)
        (plain * torch.tensor(scale)).sum().backward()
        _, gradients = gaussian.value_and_grad(*arrays, grad_scale=scale)
        for mine, leaf in zip(gradients, leaves, strict=True):
            assert mine.dtype == dtype
            np.testing.assert_allclose(
                mine, leaf.grad, rtol=2e-6 if dtype is np.float32 else 1e-11, atol=1e-12
            )


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gradients_are_written_where_asked(library: str) -> None:
    module = pytest.importorskip(library)
    convert = module.asarray if library == "numpy" else module.tensor
    arrays = cases(0.5, np.float32)
    ours = [convert(a) for a in arrays]
    out = [module.zeros_like(each) for each in ours]
    _, gradients = gaussian.value_and_grad(*ours, out=out)
    for mine, given_out, expected in zip(
        gradients, out, gaussian.value_and_grad(*arrays).gradients, strict=True
    ):
        assert mine is given_out
        np.testing.assert_array_equal(np.asarray(mine), expected)
    for bad, message in (
        (out[:2], "out has 2 arrays"),
        ([*out[:3], ours[0]], "out overlaps an argument"),
        ([*out[:3], out[0]], "out overlaps an argument, or itself"),
        ([*out[:3], out[0].T], "out has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussian.value_and_grad(*ours, out=bad)


def test_gradients_beyond_float32_are_computed_in_float64() -> None:
    arrays = [np.full((2, 3), x, np.float32) for x in (0.0, 95.0, 0.0, 0.0)]
    _, gradients = gaussian.value_and_grad(*arrays, grad_scale=1e-20)
    np.testing.assert_allclose(gradients[1], 0.5e-20 * math.exp(95.0), rtol=1e-6)
    np.testing.assert_array_equal(gradients[0], 0.0)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_same_kind_of_array_comes_back(library: str) -> None:
    module = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[library])
    convert = module.tensor if library == "torch" else module.asarray
    arrays = cases(0.5, np.float32)
    ours = [convert(a) for a in arrays]
    result = gaussian.kl_divergence(*ours)
    assert type(result) is type(ours[0])
    np.testing.assert_array_equal(np.asarray(result), gaussian.kl_divergence(*arrays))
    _, gradients = gaussian.value_and_grad(*ours)
    assert all(type(each) is type(ours[0]) for each in gradients)
    if library == "torch":
        narrow = [each.bfloat16() for each in ours]
        widened = [each.float().numpy() for each in narrow]
        np.testing.assert_array_equal(
            gaussian.kl_divergence(*narrow).numpy(), gaussian.kl_divergence(*widened)
        )
        assert gaussian.value_and_grad(*narrow).gradients[0].dtype == module.bfloat16


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize("distance", [1e-6, 1e-2, 1.0, 6.0])
def test_renyi_is_exact_however_close(alpha: float, distance: float) -> None:
    arrays = cases(distance, np.float64)
    np.testing.assert_allclose(
        gaussian.renyi_divergence(*arrays, alpha=alpha),
        summed(truth_renyi, arrays, alpha),
        rtol=2e-11 if distance > 1e-3 else 1e-9,
    )


@pytest.mark.parametrize("distance", [1e-6, 1e-2, 1.0, 6.0])
def test_hellinger_and_wasserstein_are_exact_however_close(distance: float) -> None:
    arrays = cases(distance, np.float64)
    half = 0.5 * summed(truth_renyi, arrays, 0.5)
    np.testing.assert_allclose(gaussian.bhattacharyya_distance(*arrays), half, rtol=1e-12)
    np.testing.assert_allclose(gaussian.squared_hellinger(*arrays), -np.expm1(-half), rtol=1e-12)
    np.testing.assert_allclose(
        gaussian.wasserstein_distance(*arrays) ** 2, summed(truth_wasserstein2, arrays), rtol=1e-12
    )


def covariances(n: int, distance: float) -> tuple[Any, ...]:
    rng = np.random.default_rng(5)
    factor = rng.normal(size=(4, n, n))
    change = distance * rng.normal(size=(4, n, n))
    cov_q = factor @ np.swapaxes(factor, -1, -2) + np.eye(n)
    cov_p = cov_q + change @ np.swapaxes(change, -1, -2)
    mean_q = rng.normal(size=(4, n))
    return mean_q + distance * rng.normal(size=(4, n)), cov_p, mean_q, cov_q


@pytest.mark.parametrize("distance", [1e-5, 1e-2, 1.0])
def test_full_covariance_against_many_digits(distance: float) -> None:
    arrays = covariances(5, distance)
    with mp.workdps(50):
        for i in range(4):
            m1, c1, m2, c2 = (mp.matrix(a[i].tolist()) for a in arrays)
            inverse = c2**-1
            trace = sum((inverse * c1)[j, j] for j in range(5))
            d = m1 - m2
            kl = (trace - 5 - mp.log(mp.det(c1) / mp.det(c2)) + (d.T * inverse * d)[0]) / 2
            middle = (c1 + c2) / 2
            b = (d.T * middle**-1 * d)[0] / 8 + mp.log(
                mp.det(middle) / mp.sqrt(mp.det(c1) * mp.det(c2))
            ) / 2
            one = [a[i] for a in arrays]
            assert gaussian.kl_divergence_full(*one) == pytest.approx(float(kl), rel=1e-9)
            assert gaussian.bhattacharyya_distance_full(*one) == pytest.approx(float(b), rel=1e-9)
            if distance == 1.0:
                root = mp.sqrtm(c2)
                total = sum((c1 + c2 - 2 * mp.sqrtm(root * c1 * root))[j, j] for j in range(5))
                w2 = mp.sqrt((d.T * d)[0] + total)
                assert gaussian.wasserstein_distance_full(*one) == pytest.approx(float(w2))


def test_full_covariance_is_the_diagonal_one_where_it_is_diagonal() -> None:
    mean_p, logvar_p, mean_q, logvar_q = cases(1.0, np.float64, 6)
    full = [np.exp(v)[..., None] * np.eye(6) for v in (logvar_p, logvar_q)]
    diagonal = (mean_p, logvar_p, mean_q, logvar_q)
    whole = (mean_p, full[0], mean_q, full[1])
    for name in ("kl_divergence", "bhattacharyya_distance", "squared_hellinger",
                 "wasserstein_distance"):  # fmt: skip
        np.testing.assert_allclose(
            getattr(gaussian, name + "_full")(*whole),
            getattr(gaussian, name)(*diagonal),
            rtol=1e-10,
        )
    np.testing.assert_allclose(
        gaussian.renyi_divergence_full(*whole, alpha=0.3),
        gaussian.renyi_divergence(*diagonal, alpha=0.3),
        rtol=1e-10,
    )


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    spread=st.sampled_from([1e-20, 1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_laws(seed: int, n: int, spread: float, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    a, b, c, d = (spread * rng.normal(size=(4, n))).astype(dtype)
    functions: list[Callable[..., Any]] = [
        gaussian.kl_divergence, gaussian.reverse_kl_divergence, gaussian.squared_hellinger,
        gaussian.bhattacharyya_distance, gaussian.wasserstein_distance,
        lambda *x: gaussian.renyi_divergence(*x, alpha=0.4),
        lambda *x: gaussian.renyi_divergence(*x, alpha=3.0),
    ]  # fmt: skip
    for function in functions:
        assert function(a, b, c, d) >= 0
        assert function(a, b, a, b) == 0
    assert gaussian.squared_hellinger(a, b, c, d) <= 1
    assert gaussian.reverse_kl_divergence(a, b, c, d) == pytest.approx(
        float(gaussian.kl_divergence(c, d, a, b)), rel=1e-5
    )
    orders = [float(gaussian.renyi_divergence(a, b, c, d, alpha=each)) for each in ORDERS]
    for lower, upper in itertools.pairwise(orders):
        assert lower <= upper * (1 + 1e-6)


def test_equal_covariances_give_exactly_zero() -> None:
    mean, cov, _, _ = covariances(4, 1.0)
    for name in gaussian.__all__:
        if name.endswith("_full"):
            options = {"alpha": 2.0} if "renyi" in name else {}
            assert (getattr(gaussian, name)(mean, cov, mean, cov, **options) == 0).all()


def test_diffusion_terms_are_the_divergences_of_the_two_posteriors() -> None:
    rng = np.random.default_rng(8)
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    x_0, predicted = rng.normal(size=(2, 4, 9))
    x_t = rng.normal(size=(4, 9))
    steps = np.array([2, 10, 500, 1000])
    i = steps - 1

    def posterior(x: Any) -> tuple[Any, Any]:
        mean = (np.sqrt(kept[i - 1]) * betas[i] / (1 - kept[i]))[:, None] * x + (
            np.sqrt(1 - betas[i]) * (1 - kept[i - 1]) / (1 - kept[i])
        )[:, None] * x_t
        variance = (1 - kept[i - 1]) / (1 - kept[i]) * betas[i]
        return mean, np.broadcast_to(np.log(variance)[:, None], mean.shape)

    q, p = posterior(x_0), posterior(predicted)
    np.testing.assert_allclose(
        gaussian.diffusion_kl(x_0, predicted, betas, steps), gaussian.kl_divergence(*q, *p),
        rtol=1e-9,
    )  # fmt: skip
    learned = np.log(betas[i])[:, None]
    np.testing.assert_allclose(
        gaussian.diffusion_kl(x_0, predicted, betas, steps, learned),
        gaussian.kl_divergence(*q, p[0], np.broadcast_to(learned, x_0.shape)),
        rtol=1e-9,
    )
    prior = gaussian.diffusion_prior_kl(x_0, betas)
    expected = gaussian.kl_divergence(
        np.sqrt(kept[-1]) * x_0, np.full(x_0.shape, np.log(1 - kept[-1]))
    )
    np.testing.assert_allclose(prior, expected, rtol=1e-9)


ONE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaussian.kl_divergence(ONE, ONE, ONE), TypeError, "logvar_q is None"),
        (lambda: gaussian.kl_divergence(ONE, ONE[:, :2]), ValueError, "logvar_p"),
        (lambda: gaussian.kl_divergence(ONE.astype(int), ONE), TypeError, "mean_p has dtype int64"),
        (lambda: gaussian.kl_divergence(1.0, 0.0), ValueError, r"mean_p has shape \(\)"),
        (lambda: gaussian.value_and_grad(ONE, ONE[:1]), ValueError, "one shape and dtype"),
        (lambda: gaussian.value_and_grad(ONE, ONE, grad_scale=ONE), ValueError, "grad_scale has"),
        (lambda: gaussian.renyi_divergence(ONE, ONE, alpha=0), ValueError, "alpha is 0"),
        (lambda: gaussian.kl_divergence_full(ONE, np.eye(2), ONE, np.eye(3)), ValueError, "cov_p"),
        (lambda: gaussian.kl_divergence_full(ONE, np.eye(3), ONE, -np.eye(3)), ValueError,
         "cov_q is not positive definite"),
        (lambda: gaussian.kl_divergence_full(ONE, np.triu(np.ones((3, 3))), ONE, np.eye(3)),
         ValueError, "cov_p is not symmetric"),
        (lambda: gaussian.kl_divergence_full(ONE, np.stack(3 * [np.eye(3)]), ONE, np.eye(3)),
         ValueError, r"batch axes are mean_p \(2,\), cov_p \(3,\)"),
        (lambda: gaussian.diffusion_kl(ONE, ONE, [0.1, 0.2], 1), ValueError, "steps are 1"),
        (lambda: gaussian.diffusion_kl(ONE, ONE, [0.1, 2.0], 2), ValueError, "betas have"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_not_a_number_stays_in_its_row() -> None:
    mean, logvar = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    mean[0, 1], logvar[1, 2] = np.nan, np.inf
    result = gaussian.kl_divergence(mean, logvar)
    assert np.isnan(result[:2]).all()
    assert result[2] == 0


@pytest.mark.parametrize("name", [each for each in gaussian.__all__ if each.endswith("_full")])
def test_not_a_number_in_a_covariance_stays_in_its_row(name: str) -> None:
    mean_p, cov_p, mean_q, cov_q = covariances(3, 1.0)
    options = {"alpha": 2.0} if "renyi" in name else {}
    expected = getattr(gaussian, name)(mean_p, cov_p, mean_q, cov_q, **options)
    cov_p, cov_q = cov_p.copy(), cov_q.copy()
    cov_p[0, 1, 2], cov_q[2, 0, 0] = np.nan, np.inf
    found = getattr(gaussian, name)(mean_p, cov_p, mean_q, cov_q, **options)
    assert np.isnan(found[[0, 2]]).all()
    np.testing.assert_allclose(found[[1, 3]], expected[[1, 3]], rtol=1e-12)


def test_torch_differentiates_it_also_when_compiled() -> None:
    torch = pytest.importorskip("torch")
    from klfast.torch import gaussian_kl_divergence

    arrays = cases(0.5, np.float32)
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]

    def loss(a: Any, b: Any, c: Any, d: Any) -> Any:
        return 2.0 * gaussian_kl_divergence(a, b, c, d, reduction="mean")

    expected = gaussian.value_and_grad(*arrays, grad_scale=2.0 / 3.0)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        for leaf in leaves:
            leaf.grad = None
        value = function(*leaves)
        value.backward()
        assert float(value.detach()) == pytest.approx(2 * float(expected.value.mean()), rel=1e-6)
        for leaf, gradient in zip(leaves, expected.gradients, strict=True):
            np.testing.assert_allclose(leaf.grad, gradient, rtol=1e-6)
    mean, logvar = (leaf.detach().requires_grad_() for leaf in leaves[:2])
    gaussian_kl_divergence(mean, logvar.detach(), reduction="sum").backward()
    np.testing.assert_allclose(mean.grad, arrays[0], rtol=1e-6)
    assert logvar.grad is None
    with pytest.raises(ValueError, match="accepted: one shape and dtype"):
        gaussian_kl_divergence(mean, logvar[:1])


@pytest.mark.parametrize("shape", [(37, 5), (16, 32), (33, 16), (1, 512), (20, 513), (300, 40)])
def test_narrow_rows_are_summed_sixteen_at_a_time(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, *shape)).astype(np.float32)
    mean[0], logvar[0] = 0.0, 0.0  # the prior itself
    logvar[-1, 1] = 95.0  # beyond float32
    wide = gaussian.kl_divergence(mean.astype(np.float64), logvar.astype(np.float64))
    with np.errstate(over="ignore"):
        expected = wide.astype(np.float32)
    np.testing.assert_allclose(gaussian.kl_divergence(mean, logvar), expected, rtol=1e-6)

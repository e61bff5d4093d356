"""Values with gradients: the reference against differences, the kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from distributions import cases
from hypothesis import given, settings
from hypothesis import strategies as st

import klfast
from klfast import reference
from klfast._gradients import differentiable, value_and_grad

NAMES = (
    "kl", "reverse_kl", "jeffreys", "js", "js:0.2", "renyi:0.2", "renyi:0.5", "renyi:1", "renyi:2",
    "renyi:1.000001", "alpha:0", "alpha:0.3", "alpha:1", "alpha:3", "tsallis:2.5", "tv",
    "hellinger2", "chi2", "cross_entropy", "entropy",
)  # fmt: skip
EXTREME = ("renyi:0", "renyi:inf", "js:0", "tsallis:0.5")
Array = Any


def rows_of(name: str, p: Array, q: Array) -> tuple[Array, ...]:
    return (p,) if name == "entropy" else (p, q)


def sides_of(name: str) -> str:
    return "p" if name == "entropy" else "pq"


def both(name: str, p: Array, q: Array, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    wrt: Any = "p" if name == "entropy" else "both"
    value, gradient = value_and_grad(name, *rows_of(name, p, q), wrt=wrt, **options)
    return value, gradient if wrt == "both" else (gradient,)


def true_value(name: str, p: Array, q: Array, temperature: Any = 1.0) -> Array:
    operation, parameters = differentiable(name)
    given = [{"p": p, "q": q}[side] for side in operation.rows]
    pair = isinstance(temperature, tuple) and operation.rows == "qp"
    return operation.reference(
        *given, *parameters, temperature=temperature[::-1] if pair else temperature
    )


def true_gradient(name: str, p: Array, q: Array, wrt: str, **options: Any) -> Array:
    operation, parameters = differentiable(name)
    return reference.gradient(operation.name, *rows_of(name, p, q), *parameters, wrt=wrt, **options)


def logits(noise: float, rows: int = 20, width: int = 1003) -> tuple[Array, Array]:
    rng = np.random.default_rng(int(1e6 * noise))
    p = 3.0 * rng.normal(size=(rows, width))
    # No entry stays as it is: where p = q, total variation has no derivative.
    change = rng.choice([-1.0, 1.0], size=p.shape) * rng.uniform(0.5, 1.5, size=p.shape)
    return p, p + noise * change + 0.3


def strange_rows(noise: float, dtype: str, rows: int = 12, width: int = 103) -> tuple[Any, Any]:
    """Rows with masks, on one side or both, NaN, all -inf, equal, and with a large entry."""
    p, q = (x.astype(dtype) for x in logits(noise, rows=rows, width=width))
    p[3, :7] = q[3, :7] = -np.inf
    p[5, 6] = q[4, 5] = -np.inf
    p[6, 7] = np.nan
    q[8] = -np.inf
    q[9] = p[9]
    p[10, 17], q[10, 17] = 40.0, 40.1
    return p, q


@pytest.mark.parametrize("name", [*NAMES, *EXTREME])
def test_reference_is_the_central_difference(name: str) -> None:
    p, q = logits(0.5, rows=3, width=6)
    temperature = 1.5 if name == "entropy" else (1.5, 0.7)
    for wrt in sides_of(name):
        found = true_gradient(name, p, q, wrt, temperature=temperature)
        expected = np.empty_like(p)
        for j in range(p.shape[-1]):
            step = np.zeros(p.shape[-1])
            step[j] = 1e-6
            ends = [
                true_value(name, p + s * step, q, temperature)
                if wrt == "p"
                else true_value(name, p, q + s * step, temperature)
                for s in (1.0, -1.0)
            ]
            expected[:, j] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(found, expected, atol=2e-8 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["kl", "jeffreys", "js", "renyi:2", "tv", "hellinger2", "entropy"])
def test_reference_and_kernels_agree_with_autograd_of_the_definition(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    p, q = (x.astype(dtype) for x in logits(0.3, rows=4, width=50))
    tensors = [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (p, q)]
    a, b = (torch.log_softmax(x, -1) for x in tensors)
    m = torch.logaddexp(a, b) - math.log(2)
    definition: dict[str, Any] = {
        "kl": lambda: (a.exp() * (a - b)).sum(),
        "jeffreys": lambda: ((a.exp() - b.exp()) * (a - b)).sum(),
        "js": lambda: (a.exp() * (a - m) + b.exp() * (b - m)).sum() / 2,
        "renyi:2": lambda: (2 * a - b).logsumexp(-1).sum(),
        "tv": lambda: (a.exp() - b.exp()).abs().sum() / 2,
        "hellinger2": lambda: ((a / 2).exp() - (b / 2).exp()).square().sum() / 2,
        "entropy": lambda: -(a.exp() * a).sum(),
    }
    loss: Any = definition[name]()
    loss.backward()
    _, gradients = both(name, p, q)
    for tensor, gradient in zip(tensors, gradients, strict=False):
        expected = tensor.grad.numpy()
        scale = np.abs(expected).max(-1, keepdims=True)
        assert gradient.dtype == dtype
        assert (
            np.abs(gradient - expected) <= (1e-5 if dtype == "float32" else 1e-12) * scale
        ).all()


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_the_reference(name: str, noise: float) -> None:
    p, q = strange_rows(noise, "float32", rows=20, width=1003)
    value, gradients = both(name, p, q, temperature=1.5)
    truth = true_value(name, p, q, 1.5)
    np.testing.assert_allclose(value, truth, rtol=3e-6, atol=1e-11)
    for wrt, gradient in zip("pq", gradients, strict=False):
        expected = true_gradient(name, p, q, wrt, temperature=1.5)
        nan = np.isnan(expected)
        assert (np.isnan(gradient) == nan).all()
        assert np.isfinite(gradient[~nan]).all()
        side = {"p": p, "q": q}[wrt]
        assert (gradient[~nan & (side == -np.inf)] == 0.0).all()
        scale = np.abs(np.where(nan, 0.0, expected)).max(-1, keepdims=True)
        error = np.abs(np.where(nan, 0.0, gradient - expected))
        assert (error <= 1e-5 * scale + 1e-11).all(), (error / (scale + 1e-300)).max()
        if name not in ("cross_entropy", "entropy"):
            assert (gradient[9] == 0.0).all()  # the rows are equal


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("kl", "float16"), ("kl", "bfloat16"), ("js", "float16"), ("tv", "bfloat16"),
        ("renyi:2", "float16"), ("entropy", "bfloat16"),
    ],
)  # fmt: skip
def test_gradients_of_narrow_logits_are_rounded_once(name: str, dtype: str) -> None:
    from klfast._arrays import decode, encode

    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    p, q = (x.astype(kind) for x in logits(0.1, rows=3, width=77))
    _, gradients = both(name, p, q)
    for wrt, gradient in zip("pq", gradients, strict=False):
        assert gradient.dtype == kind
        expected = true_gradient(name, p, q, wrt)
        rounded = decode(encode(expected, dtype), dtype)
        # One unit in the last place, where float32's error crosses a boundary.
        error = np.abs(gradient.astype(np.float64) - rounded)
        unit = 2.0**-10 if dtype == "float16" else 2.0**-7
        assert (error <= unit * np.abs(rounded) + 2.0**-24).all()
        assert (error == 0).mean() > 0.98


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scale_where_and_vocab_size(backend: Any) -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=6, width=60))
    p[5] = np.nan
    where = np.array([True, False, True, True, True, True])
    scale = np.array([1.0, 2.0, -0.5, 0.0, 3.0, 0.0])
    value, gradient = value_and_grad(
        "kl", p, q, grad_scale=scale, where=where, vocab_size=50, base=2, backend=backend
    )
    assert np.isnan(value[[1, 5]]).all()
    expected = true_gradient("kl", p[:, :50], q[:, :50], "q") * scale[:, None] / math.log(2)
    expected[[1, 3, 5]] = 0.0  # a scale of 0 gives 0, whatever the row holds
    np.testing.assert_allclose(gradient[:, :50], expected, atol=1e-8)
    assert (gradient[[1, 3, 5]] == 0.0).all()
    assert (gradient[:, 50:] == 0.0).all()
    np.testing.assert_allclose(
        value[:5:2], klfast.kl_divergence(p[:, :50], q[:, :50], base=2)[:5:2], rtol=1e-6
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["kl", "js", "jeffreys", "renyi:2", "entropy"])
def test_gradients_may_overwrite_the_logits(name: str, backend: Any) -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=5, width=300))
    q[2, 3] = -np.inf  # a row that the float32 kernel leaves to float64
    value, apart = both(name, p, q, backend=backend)
    p_own, q_own = p.copy(), q.copy()
    out = p_own if name == "entropy" else (p_own, q_own)
    again, inside = both(name, p_own, q_own, out=out, backend=backend)
    np.testing.assert_array_equal(again, value)
    assert inside[0] is p_own
    for one, other in zip(inside, apart, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("width", [517, 3000])
@pytest.mark.parametrize(
    "name",
    [
        "kl", "reverse_kl", "jeffreys", "js", "js:0.1", "js:0.999", "js:1e-6", "renyi:0.5",
        "renyi:2", "renyi:15", "renyi:0.999999", "alpha:0.5", "tsallis:2", "tv", "hellinger2",
        "chi2", "cross_entropy", "entropy",
    ],
)  # fmt: skip
def test_gradients_of_every_kind_of_row(name: str, width: int) -> None:
    """Also where one token has nearly all the mass, and where rows have hardly one in common."""
    names, p, q = cases(width)
    _, gradients = both(name, p, q)
    for wrt, found in zip("pq", gradients, strict=False):
        expected = true_gradient(name, p, q, wrt)
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), nan)
        assert (found[({"p": p, "q": q}[wrt] == -np.inf) & ~nan] == 0).all()
        largest = np.where(nan, 0.0, np.abs(expected)).max(-1)
        with np.errstate(all="ignore"):  # chi-squared of rows that are far apart
            error = np.where(nan | (np.abs(expected) > 3e38), 0.0, np.abs(found - expected)).max(-1)
        wrong = np.flatnonzero(error > 1e-5 * largest + 1e-11)
        assert not wrong.size, [(names[row], error[row], largest[row]) for row in wrong]


FUSED = (
    "kl", "reverse_kl", "jeffreys", "js", "js:0.1", "js:0.9", "js:0.002", "js:1e-5", "js:0.99999",
    "renyi:0.3", "renyi:0.5", "renyi:2", "alpha:0.5", "tsallis:2", "tv",
    "hellinger2", "chi2", "cross_entropy", "entropy",
)  # fmt: skip


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
def test_ordinary_rows_are_done_by_one_kernel(noise: float, monkeypatch: Any) -> None:
    differentiation = pytest.importorskip("klfast.kernels.cpu.differentiation")
    rng = np.random.default_rng(7)
    p = (2.0 * rng.normal(size=(6, 4099))).astype(np.float32)
    q = (p + noise * rng.normal(size=p.shape)).astype(np.float32)
    p[2, 100:3000] = q[2, 100:3000] = -np.inf

    def refuse(*_: Any) -> None:
        raise AssertionError("rows were left to float64")

    monkeypatch.setattr(differentiation, "_exact_gradient", refuse)
    for name in FUSED:
        value, gradients = both(name, p, q)
        np.testing.assert_allclose(value, true_value(name, p, q), rtol=1e-6)
        for wrt, found in zip("pq", gradients, strict=False):
            expected = true_gradient(name, p, q, wrt)
            largest = np.abs(expected).max(-1, keepdims=True)
            assert (np.abs(found - expected) <= 2e-6 * largest).all(), (name, wrt)
            assert (found[2, 100:3000] == 0.0).all()


@pytest.mark.parametrize("noise", [3.0, None])
def test_far_rows_are_done_by_one_kernel(noise: float | None, monkeypatch: Any) -> None:
    """KL is 4.5 to 9 nats: constants of the first pass alone would not do."""
    differentiation = pytest.importorskip("klfast.kernels.cpu.differentiation")
    rng = np.random.default_rng(11)
    p, q = rng.normal(size=(2, 6, 4099)).astype(np.float32) * np.float32(3.0)
    if noise is not None:
        p *= np.float32(2 / 3)
        q = p + np.float32(noise / 3) * q
    p[2, 100:3000] = q[2, 100:3000] = -np.inf

    def refuse(*_: Any) -> None:
        raise AssertionError("rows were left to float64")

    monkeypatch.setattr(differentiation, "_exact_gradient", refuse)
    for name in ("js", "js:0.1", "js:0.01", "tv", "hellinger2"):
        value, gradients = both(name, p, q)
        np.testing.assert_allclose(value, true_value(name, p, q), rtol=2e-6)
        for wrt, found in zip("pq", gradients, strict=True):
            expected = true_gradient(name, p, q, wrt)
            largest = np.abs(expected).max(-1, keepdims=True)
            assert (np.abs(found - expected) <= 5e-6 * largest).all(), (name, wrt)
            assert (found[2, 100:3000] == 0.0).all()


@pytest.mark.parametrize("name", ["js", "js:0.1", "js:0.001", "js:1e-5", "js:0.999", "tv"])
def test_gradients_where_one_row_has_lost_part_of_the_other(name: str) -> None:
    """Those of entries that are nearly gone are the largest: q = p + (q - p) has none of them."""
    rng = np.random.default_rng(5)
    p = rng.normal(size=(40, 520)).astype(np.float32)
    q = p + (1e-3 * rng.uniform(0, 1, (40, 1)) * rng.normal(size=p.shape)).astype(np.float32)
    share, jump = rng.uniform(0.2, 0.9, (40, 1)), rng.uniform(3, 14, (40, 1))
    q += (jump * (np.arange(520) > 520 * share)).astype(np.float32)
    for first, second in ((p, q), (q, p)):
        _, gradients = both(name, first, second)
        for wrt, found in zip("pq", gradients, strict=True):
            expected = true_gradient(name, first, second, wrt)
            largest = np.abs(expected).max(-1, keepdims=True)
            assert (np.abs(found - expected) <= 1e-5 * largest).all(), wrt


@pytest.mark.parametrize("independent", [False, True])
def test_no_row_needs_the_reference(independent: bool, monkeypatch: Any) -> None:
    """Float64 logits, of every measure: compiled, and as exact as the reference."""
    from klfast import _reference_backend

    def refuse(*_: Any) -> None:
        raise AssertionError("rows were left to the reference")

    monkeypatch.setattr(_reference_backend, "gradient", refuse)
    p, q = logits(0.3, rows=6, width=1030)
    q = q[::-1].copy() if independent else q
    p[1, :9] = q[1, :9] = -np.inf
    p[2, 3] = q[3, 4] = p[4, 5] = q[4, 6] = -np.inf
    scale = np.array([1.0, 2.0, -1.0, 1.0, 0.5, 0.0])
    for name in (*NAMES, *EXTREME, "js:1e-6", "js:0.999999", "renyi:300"):
        value, gradients = both(name, p, q, temperature=1.5, grad_scale=scale)
        np.testing.assert_allclose(value, true_value(name, p, q, 1.5), rtol=1e-12, atol=1e-15)
        for wrt, found in zip("pq", gradients, strict=False):
            expected = true_gradient(name, p, q, wrt, temperature=1.5) * scale[:, None]
            largest = np.abs(expected).max(-1, keepdims=True)
            error = np.abs(found - expected) - 1e-12 * largest
            assert (error <= 1e-15).all(), (name, wrt, error.max(-1))


@pytest.mark.parametrize("name", ["js", "tv", "hellinger2", "jeffreys"])
def test_symmetric_divergences_have_symmetric_gradients_to_the_bit(name: str) -> None:
    rng = np.random.default_rng(7)
    p = (2.0 * rng.normal(size=(6, 4099))).astype(np.float32)
    q = (p + 0.1 * rng.normal(size=p.shape)).astype(np.float32)
    for first, second in ((p, q), (p, q.astype(np.float16))):
        value, (of_first, of_second) = both(name, first, second)
        exchanged, (again_second, again_first) = both(name, second, first)
        np.testing.assert_array_equal(value, exchanged)
        np.testing.assert_array_equal(of_first, again_first)
        np.testing.assert_array_equal(of_second, again_second)


@pytest.mark.parametrize("name", ["kl", "tv"])
def test_gradients_do_not_depend_on_threads_or_on_where_they_go(name: str) -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=40, width=9001))
    before = klfast.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            klfast.set_num_threads(n)
            found.append(both(name, p, q))
            copies = p.copy(), q.copy()
            found.append(both(name, *copies, out=copies))
    finally:
        klfast.set_num_threads(before)
    for value, gradients in found[1:]:
        np.testing.assert_array_equal(value, found[0][0])
        for one, other in zip(gradients, found[0][1], strict=True):
            np.testing.assert_array_equal(one, other)


def test_gradient_of_total_variation_where_most_entries_are_equal() -> None:
    """They have no derivative, and no share in it: only where p and q differ is there one."""
    rng = np.random.default_rng(3)
    p = (2.0 * rng.normal(size=(4, 1000))).astype(np.float32)
    q = p.copy()
    q[:, :2] = p[:, 1::-1]
    _, gradients = both("tv", p, q)
    for wrt, found in zip("pq", gradients, strict=True):
        expected = true_gradient("tv", p, q, wrt)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_value_is_that_of_the_function_to_the_bit() -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2))
    np.testing.assert_array_equal(value_and_grad("kl", p, q).value, klfast.kl_divergence(p, q))
    np.testing.assert_array_equal(
        value_and_grad("alpha:3", p, q).value, klfast.alpha_divergence(p, q, 3)
    )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 70),
    name=st.sampled_from(NAMES),
    shift=st.floats(-50, 50),
    sharp=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_entries_add_up_to_zero_and_a_constant_changes_nothing(
    seed: int, width: int, name: str, shift: float, sharp: float
) -> None:
    rng = np.random.default_rng(seed)
    p = sharp * rng.normal(size=(2, width))
    q = p + rng.normal(size=p.shape)
    _, gradients = both(name, p.astype(np.float32), q.astype(np.float32))
    _, shifted = both(name, p.astype(np.float32), (q + shift).astype(np.float32))
    for one, other in zip(gradients, shifted, strict=True):
        size = float(np.abs(one).max()) + 1e-30
        assert np.abs(one.astype(np.float64).sum(-1)).max() <= 1e-4 * size + 1e-12
        # The sum of logit and constant is rounded to float32.
        assert np.abs(one - other).max() <= 1e-3 * size + 1e-4


def test_torch_and_strided_arrays() -> None:
    torch = pytest.importorskip("torch")
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=4, width=30))
    expected = value_and_grad("js", p, q)
    value, gradient = value_and_grad("js", torch.from_numpy(p), torch.from_numpy(q))
    assert isinstance(gradient, torch.Tensor)
    np.testing.assert_array_equal(gradient.numpy(), expected.gradient)
    np.testing.assert_array_equal(value.numpy(), expected.value)
    wide = np.zeros((30, 4, 2), np.float32)
    wide[..., 0] = q.T
    value, gradient = value_and_grad("js", np.ascontiguousarray(p.T), wide[..., 0], axis=0)
    assert gradient.shape == (30, 4)
    exact = value_and_grad("js", p, q, backend="reference")
    np.testing.assert_allclose(gradient, exact.gradient.T, rtol=3e-7)  # float64, rounded once


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("k1", 0, 0), {}, ValueError, "'k1' has no gradient here; accepted: kl, reverse_kl"),
        (("renyi", 0, 0), {}, ValueError, "'renyi' lacks alpha"),
        (("renyi:-1", 0, 0), {}, ValueError, "alpha is -1"),
        (("kl:2", 0, 0), {}, ValueError, "takes no parameter"),
        (("kl", 0), {}, TypeError, "q is None, and 'kl' reads 2 batches"),
        (("entropy", 0, 0), {}, TypeError, "q is an array, and 'entropy' reads 1 batch"),
        (("kl", 0, 0), {"wrt": "x"}, ValueError, "wrt is 'x'; accepted: 'q', 'p', 'both'"),
        (("kl", 0, 0), {"reduction": "mean"}, TypeError, "unexpected keyword argument 'reduction'"),
        (("kl", 0, 1), {}, ValueError, "q has shape (1, 8), whose rows are repeated to (3,)"),
        (("kl", 0, 0), {"grad_scale": [1.0, 2.0]}, ValueError, "grad_scale has shape (2,)"),
        (("kl", 0, 0), {"grad_scale": "a"}, TypeError, "grad_scale is of type str"),
        (("kl", 0, 0), {"out": np.zeros((3, 7), np.float32)}, ValueError, "out has shape (3, 7)"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arrays = [np.zeros((3, 8), np.float32), np.ones((1, 8), np.float32)]
    name, *which = arguments
    with pytest.raises(error) as raised:
        value_and_grad(name, *(arrays[i].copy() for i in which), **options)
    assert message in str(raised.value)


def test_outs_of_both_gradients_are_a_pair_apart() -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=4, width=30))
    memory = np.empty((5, 30), np.float32)
    for outs in ((memory[:4], memory[:4]), (memory[:4], memory[1:])):
        with pytest.raises(ValueError, match="out: both gradients share memory"):
            value_and_grad("kl", p, q, wrt="both", out=outs)
    for wrong in (memory[:4], (memory[:4],) * 3):
        with pytest.raises(TypeError, match=r"accepted with wrt='both': None, or a pair"):
            value_and_grad("kl", p, q, wrt="both", out=wrong)
    _, (found, own) = value_and_grad("kl", p, q, wrt="both", out=(None, memory[:4]))
    assert own.base is memory
    np.testing.assert_array_equal(found, value_and_grad("kl", p, q, wrt="p").gradient)


def test_out_that_overlaps_another_row_is_refused() -> None:
    memory = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    p, q = memory[:3], memory[1:]
    with pytest.raises(ValueError, match="out overlaps p without being it"):
        value_and_grad("kl", p, q, out=p)

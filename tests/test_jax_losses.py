"""klfast.jax: values and derivatives under jit, grad and vmap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import klfast.jax as losses  # noqa: E402 (it imports JAX)
from klfast import reference  # noqa: E402

jnp = jax.numpy
NAMES: list[tuple[str, str, tuple[float, ...]]] = [
    ("kl_divergence", "kl", ()),
    ("jeffreys_divergence", "jeffreys", ()),
    ("js_divergence", "js", (0.5,)),
    ("renyi_divergence", "renyi", (2.0,)),
    ("alpha_divergence", "alpha", (0.3,)),
    ("tsallis_divergence", "tsallis", (1.5,)),
    ("total_variation", "tv", ()),
    ("squared_hellinger", "hellinger2", ()),
    ("chi2_divergence", "chi2", ()),
    ("cross_entropy", "cross_entropy", ()),
]


def logits(*shape: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    p = rng.normal(size=shape).astype(np.float32)
    return p, (p + 0.5 * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize(("name", "operation", "parameters"), NAMES)
def test_gradients_under_jit(name: str, operation: str, parameters: tuple[float, ...]) -> None:
    p, q = logits(4, 33)
    scale = np.arange(1.0, 5.0, dtype=np.float32)
    given = () if name == "js_divergence" else parameters

    def loss(x: Any, y: Any) -> Any:
        return (getattr(losses, name)(x, y, *given, temperature=1.5) * scale).sum()

    both = jax.jit(jax.grad(loss, (0, 1)))(p, q)
    for number, wrt in enumerate("pq"):
        expected = reference.gradient(operation, p, q, *parameters, wrt=wrt, temperature=1.5)
        np.testing.assert_allclose(both[number], expected * scale[:, None], atol=2e-6)
        if name == "kl_divergence":  # each side is a kernel of its own
            found = jax.jit(jax.grad(loss, number))(p, q)
            np.testing.assert_allclose(found, expected * scale[:, None], atol=2e-6)


def test_vmap_is_the_batch() -> None:
    p, q = logits(4, 33)
    batch = losses.kl_divergence(p, q)
    np.testing.assert_array_equal(jax.vmap(losses.kl_divergence)(p, q), batch)
    one = jax.vmap(losses.kl_divergence, (None, 0))(p[0], q)
    np.testing.assert_array_equal(one, losses.kl_divergence(p[:1], q))
    gradient = jax.grad(lambda y: losses.kl_divergence(p, y).sum())(q)
    by_row = jax.vmap(jax.grad(lambda y, x: losses.kl_divergence(x, y)))(q, p)
    np.testing.assert_array_equal(by_row, gradient)


def test_repeated_rows_add_up_their_gradient() -> None:
    p, q = logits(4, 33)
    found = jax.grad(lambda x: losses.js_divergence(x, q).sum())(p[0])
    by_row = [reference.gradient("js", p[:1], y[None], 0.5, wrt="p")[0] for y in q]
    expected = np.sum(by_row, 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_entropy_and_bfloat16() -> None:
    p, _ = logits(4, 33)
    found = jax.grad(lambda x: losses.entropy(x).mean())(p)
    np.testing.assert_allclose(found, reference.gradient("entropy", p, wrt="p") / 4, atol=1e-7)
    narrow = jnp.asarray(p, jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda x: losses.entropy(x).mean())(narrow)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16


def test_bad_arguments_are_named() -> None:
    p, q = logits(4, 33)
    with pytest.raises(ValueError, match="alpha is -1"):
        losses.renyi_divergence(p, q, -1.0)
    compiled = jax.jit(losses.kl_divergence, static_argnames="temperature")
    for function in (losses.kl_divergence, compiled):
        with pytest.raises(ValueError, match="p and q have vocabularies of 33 and 32 entries"):
            function(p, q[:, :32])
        with pytest.raises(ValueError, match="batch axes"):
            function(p, q[:3])
        with pytest.raises(TypeError, match="p has dtype int32; accepted: float16"):
            function(p.astype(np.int32), q)
        with pytest.raises(ValueError, match=r"p has shape \(\); accepted: \(\.\.\., V\)"):
            function(p[0, 0], q)
        with pytest.raises(ValueError, match="temperature is 0"):
            function(p, q, temperature=0.0)
    with pytest.raises(
        ValueError, match=r"temperature is \(1.0, 2.0\); accepted: a number above 0"
    ):
        losses.entropy(p, temperature=(1.0, 2.0))  # type: ignore[arg-type]


def test_parameters_may_be_numbers_of_numpy_and_jax() -> None:
    p, q = logits(4, 33)
    expected = losses.renyi_divergence(p, q, 2.0)
    orders: list[Any] = [2, np.float32(2), jnp.float32(2)]
    for two in orders:
        np.testing.assert_array_equal(losses.renyi_divergence(p, q, two), expected)


def test_vmap_over_any_axis_of_batches() -> None:
    p, q = logits(3, 4, 33)
    expected = losses.js_divergence(p, q, weight=0.2)
    batches = jax.vmap(lambda x, y: losses.js_divergence(x, y, weight=0.2), (2, 1), 1)
    found = batches(np.moveaxis(p, 0, 2), np.moveaxis(q, 0, 1))
    np.testing.assert_array_equal(found, expected.T)

    def total(y: Any) -> Any:  # every batch of P against the same Q
        return jax.vmap(losses.kl_divergence, (0, None))(p, y).sum()

    truth = sum(reference.gradient("kl", each, q[0]) for each in p)
    np.testing.assert_allclose(jax.grad(total)(q[0]), truth, atol=1e-6)

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

    for number, wrt in enumerate("pq"):
        found = jax.jit(jax.grad(loss, number))(p, q)
        expected = reference.gradient(operation, p, q, *parameters, wrt=wrt, temperature=1.5)
        np.testing.assert_allclose(found, expected * scale[:, None], atol=2e-6)
    both = jax.grad(loss, (0, 1))(p, q)
    np.testing.assert_allclose(both[1], expected * scale[:, None], atol=2e-6)


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

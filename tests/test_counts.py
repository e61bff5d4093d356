"""Divergences and entropies from counts."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klfast import reference
from klfast.estimators import _counts, entropy_from_counts, kl_from_counts

METHODS: tuple[Any, ...] = ("plugin", "laplace", "miller_madow")


def tables(n: int = 4, width: int = 53, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.poisson(1.5, size=(n, width)), 1 + rng.poisson(4.0, size=(n, width))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 8, 53, 3000])
def test_the_plugin_is_the_divergence_of_the_frequencies(dtype: Any, width: int) -> None:
    p, q = tables(3, width)
    p[:, 0] += 1
    expected = reference.kl_divergence(p, q, input="probs")
    np.testing.assert_allclose(
        kl_from_counts(p.astype(dtype), q.astype(dtype)), expected, rtol=1e-13, atol=1e-16
    )
    np.testing.assert_allclose(
        kl_from_counts(p.astype(dtype), q, "laplace", smoothing=0.5),
        reference.kl_divergence(p + 0.5, q + 0.5, input="probs"),
        rtol=1e-13, atol=1e-16,
    )  # fmt: skip


def test_counts_that_differ_by_one_in_a_billion_do_not_cancel() -> None:
    p = np.full((1, 1000), 10**9)
    q = p.copy()
    q[0, ::2] += 1
    x = 0.5e-9  # half of the symbols are this much above the mean, half below
    assert float(kl_from_counts(p, q)[0]) == pytest.approx(x * x / 2, rel=1e-6)
    assert kl_from_counts(p, 3 * p)[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_sparse_and_dense_counts_give_the_same(method: Any) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    p, q = tables(5, 200, 1)
    q[:, 50:120] = 0
    p[:, 100:] = 0
    for unseen in ("infinite", "drop"):
        dense = kl_from_counts(p, q, method, unseen=unseen)
        for kind in (sparse.csr_array, sparse.coo_matrix):
            found = kl_from_counts(kind(p), kind(q), method, unseen=unseen)
            np.testing.assert_allclose(found, dense, rtol=1e-12)
    np.testing.assert_allclose(
        entropy_from_counts(sparse.csr_array(p), method), entropy_from_counts(p, method), rtol=1e-13
    )


def test_sparse_matrices_may_repeat_an_entry_or_store_a_zero() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    odd = sparse.csr_array(([2, 3, 0, 4], [1, 1, 2, 3], [0, 4]), shape=(1, 5))
    plain = np.array([[0, 5, 0, 4, 0]])
    q = np.array([[1, 2, 3, 4, 5]])
    for method in METHODS:
        assert entropy_from_counts(odd, method) == entropy_from_counts(plain, method)
        np.testing.assert_allclose(
            kl_from_counts(odd, sparse.csr_array(q), method),
            kl_from_counts(plain, q, method),
            rtol=1e-13,
        )


@pytest.mark.parametrize("method", METHODS)
def test_numpy_gives_what_the_kernel_gives(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = tables()
    q[:, 3] = 0
    expected = [kl_from_counts(p, q, method, unseen=u) for u in ("infinite", "drop")]
    monkeypatch.setattr(_counts, "compiled", lambda: None)
    choices: tuple[Any, ...] = ("infinite", "drop")
    for unseen, each in zip(choices, expected, strict=True):
        found = kl_from_counts(p, q, method, unseen=unseen)
        np.testing.assert_allclose(found, each, rtol=1e-12)


def test_symbols_that_q_lacks_are_treated_as_chosen() -> None:
    p, q = np.array([3, 1, 4]), np.array([2, 0, 5])
    assert kl_from_counts(p, q) == math.inf
    assert kl_from_counts(p, q, "miller_madow") == math.inf
    assert kl_from_counts(p, q, unseen="drop") == pytest.approx(
        float(reference.kl_divergence([3.0, 4.0], [2.0, 5.0], input="probs"))
    )
    assert kl_from_counts(p, q, "laplace", unseen="error") == pytest.approx(
        float(reference.kl_divergence(p + 1.0, q + 1.0, input="probs"))
    )
    with pytest.raises(ValueError, match="row 0 of p has 1 symbols that q has not"):
        kl_from_counts(p, q, unseen="error")
    assert np.isfinite(kl_from_counts(q, p))


def test_miller_madow_takes_the_bias_away() -> None:
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.full(30, 5.0), size=2)
    truth = float(reference.kl_divergence(p, q, input="probs"))
    counts_p = rng.multinomial(300, p, size=4000)
    counts_q = rng.multinomial(500, q, size=4000)
    seen = (counts_q > 0).all(-1)
    plain, corrected = (
        kl_from_counts(counts_p[seen], counts_q[seen], method).mean() - truth
        for method in ("plugin", "miller_madow")
    )
    assert plain > 0.06
    assert abs(corrected) < 0.15 * plain
    entropy = float(reference.entropy(p, input="probs"))
    plain, corrected = (
        entropy_from_counts(counts_p, method).mean() - entropy
        for method in ("plugin", "miller_madow")
    )
    assert plain < -0.03
    assert abs(corrected) < 0.15 * -plain


@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_entropy_is_that_of_the_frequencies(smoothing: float) -> None:
    p, _ = tables()
    np.testing.assert_allclose(
        entropy_from_counts(p), reference.entropy(p, input="probs"), rtol=1e-13
    )
    np.testing.assert_allclose(
        entropy_from_counts(p, "laplace", smoothing=smoothing),
        reference.entropy(p + smoothing, input="probs"),
        rtol=1e-13,
    )
    assert entropy_from_counts([0, 7, 0]) == 0


@settings(deadline=None, max_examples=100)
@given(
    counts=st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), min_size=1),
    factor=st.integers(1, 1000),
)
def test_laws(counts: list[tuple[int, int]], factor: int) -> None:
    p, q = np.array(counts).T
    if not (p.any() and q.any()):
        return
    for method in ("plugin", "laplace"):
        value = kl_from_counts(p, q, method)
        assert value >= 0
        assert kl_from_counts(p, p, method) == 0
    assert kl_from_counts(p, factor * p) == 0
    assert 0 <= entropy_from_counts(p) <= math.log(len(p)) * (1 + 1e-12)


def test_batches_broadcast_and_empty_rows_are_nan() -> None:
    p, q = tables(6)
    p = p.reshape(2, 3, -1)
    found = kl_from_counts(p, q[0])
    assert found.shape == (2, 3)
    np.testing.assert_array_equal(found[1, 2], kl_from_counts(p[1, 2], q[0]))
    p[0, 1] = 0
    assert np.isnan(kl_from_counts(p, q[0])[0, 1])
    assert np.isnan(entropy_from_counts(p)[0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": [1, -1]}, "a negative number"),
        ({"q": [1.0, math.nan]}, "NaN"),
        ({"q": [1, 2, 3]}, r"shapes \(2,\) and \(3,\)"),
        ({"p": ["a", "b"]}, "p has dtype"),
        ({"method": "jeffreys"}, "method is 'jeffreys'"),
        ({"unseen": "zero"}, "unseen is 'zero'"),
        ({"method": "laplace", "smoothing": 0}, "smoothing is 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"p": [1, 2], "q": [3, 4]} | change
    with pytest.raises(ValueError, match=message):
        kl_from_counts(**arguments)


def test_counts_of_very_different_sizes_keep_their_digits() -> None:
    p, q = np.array([10**12, 1]), np.array([1, 10**12])
    a, b = 10**12 / (10**12 + 1), 1 / (10**12 + 1)
    expected = a * math.log(1e12) - b * math.log(1e12)
    assert kl_from_counts(p, q) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("method", METHODS)
def test_small_counts_of_long_rows_are_looked_up_as_they_are_computed(
    dtype: Any, method: Any
) -> None:
    p, q = tables(3, 10_007)
    p[0, 5::9], q[1, 3::700] = 0, 0
    p[1, ::50], q[0, 7::40], p[2, 11], q[2, 12] = 47, 48, 10**9, 10**6
    for unseen in ("infinite", "drop"):
        # Numbers that are not integers are not looked up.
        expected = kl_from_counts(p.astype(np.float64), q.astype(np.float64), method, unseen=unseen)
        found = kl_from_counts(p.astype(dtype), q.astype(dtype), method, unseen=unseen)
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    if method == "plugin":
        np.testing.assert_allclose(
            kl_from_counts(p, q + 1), reference.kl_divergence(p, q + 1, input="probs"), rtol=1e-13
        )
    assert kl_from_counts(p.astype(dtype), p.astype(dtype))[0] == 0


def test_a_negative_count_of_a_long_row_is_refused() -> None:
    p, q = tables(1, 10_007)
    p[0, 40] = -(10**9)
    with pytest.raises(ValueError, match="a negative number"):
        kl_from_counts(p, q)

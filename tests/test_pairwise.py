"""All pairs are what the function of two rows gives for each of them."""

from typing import Any

import numpy as np
import pytest

import klfast
from klfast import _pairwise

METRICS = (
    "kl", "reverse_kl", "cross_entropy", "jeffreys", "js", "js:0.2", "renyi:0", "renyi:0.3",
    "renyi:0.5", "renyi:1", "renyi:2", "renyi:inf", "alpha:0.5", "tsallis:1.5", "chi2",
    "hellinger2", "tv",
)  # fmt: skip


def logits(n: int, width: int, seed: int = 0, spread: float = 2.0) -> Any:
    return spread * np.random.default_rng(seed).normal(size=(n, width))


def one_by_one(p: Any, q: Any, metric: str, **options: Any) -> Any:
    """The float64 reference of every pair."""
    shape = (len(p), len(q), p.shape[-1])
    wide = [np.asarray(a).astype(np.float64) for a in (p, q)]
    rows = np.broadcast_to(wide[0][:, None], shape), np.broadcast_to(wide[1][None], shape)
    return klfast.compare(*rows, metric, backend="reference", **options)[metric]


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [(metric, dtype) for metric in METRICS for dtype in (np.float32, np.float64)]
    + [("kl", np.float16), ("tv", np.float16)],
)
def test_every_metric_is_that_of_its_pairs(metric: str, dtype: Any) -> None:
    p, q = logits(9, 333).astype(dtype), logits(7, 333, 1).astype(dtype)
    q[3] = p[2]
    q[4] = p[5] + (1e-3 * logits(1, 333, 2)[0]).astype(dtype)
    found = klfast.pairwise(p, q, metric)
    assert found.shape == (9, 7)
    assert found.dtype == (np.float64 if dtype is np.float64 else np.float32)
    rtol = 1e-11 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(found, one_by_one(p, q, metric), rtol=rtol, atol=1e-17)
    assert (found >= 0).all()
    if metric != "cross_entropy":
        assert found[2, 3] == 0


@pytest.mark.parametrize("metric", ["kl", "jeffreys", "js", "tv", "renyi:2"])
def test_a_batch_against_itself(metric: str) -> None:
    p = logits(14, 4200).astype(np.float32)
    found = klfast.pairwise(p, metric=metric)
    np.testing.assert_allclose(found, one_by_one(p, p, metric), rtol=1e-5)
    assert (np.diag(found) == 0).all()
    if metric in ("js", "tv"):
        np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize(("n", "m"), [(1, 66), (66, 3), (257, 258)])
@pytest.mark.parametrize("metric", ["kl", "cross_entropy", "renyi:0.5", "chi2"])
def test_masked_entries_of_one_row_among_many(metric: str, n: int, m: int) -> None:
    p, q = (logits(k, 40, seed).astype(np.float32) for k, seed in ((n, 3), (m, 4)))
    p[:, :10] = q[:, :10] = -np.inf  # in no support
    p[0, 20] = q[-1, 30] = -np.inf
    expected = one_by_one(p, q, metric)
    # A masked entry of q is outside the support of every p, one of p is not.
    assert np.isinf(expected[:, -1]).all() == (metric != "renyi:0.5")
    assert np.isfinite(expected[:, :-1]).all()
    np.testing.assert_allclose(klfast.pairwise(p, q, metric), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_masked_entries(metric: str) -> None:
    p, q = (logits(6, 100, seed).astype(np.float32) for seed in (3, 4))
    p[:, :10] = q[:, :10] = -np.inf  # in no support
    p[0, 20] = -np.inf
    q[1, 30] = -np.inf
    np.testing.assert_allclose(
        klfast.pairwise(p, q, metric), one_by_one(p, q, metric), rtol=1e-5, atol=1e-17
    )


@pytest.mark.parametrize("metric", ["kl", "js", "tv", "chi2"])
def test_rows_that_are_no_distributions_are_nan(metric: str) -> None:
    p, q = (logits(6, 64, seed).astype(np.float32) for seed in (5, 6))
    p[1, 3], q[2] = np.nan, -np.inf
    found = klfast.pairwise(p, q, metric)
    bad = np.zeros((6, 6), np.bool_)
    bad[1], bad[:, 2] = True, True
    np.testing.assert_array_equal(np.isnan(found), bad)


def test_options_are_those_of_the_functions() -> None:
    p, q = (logits(6, 80, seed) for seed in (7, 8))
    every: tuple[dict[str, Any], ...] = (
        {"temperature": 0.5}, {"temperature": (2.0, 0.7)}, {"vocab_size": 50}, {"base": 2},
        {"input": "log_probs"},
    )  # fmt: skip
    for options in every:
        for metric in ("kl", "js", "renyi:0.5"):
            np.testing.assert_allclose(
                klfast.pairwise(p.astype(np.float32), q.astype(np.float32), metric, **options),
                one_by_one(p.astype(np.float32), q.astype(np.float32), metric, **options),
                rtol=1e-5,
            )
    weights = np.exp(p), np.exp(q)
    np.testing.assert_allclose(
        klfast.pairwise(weights[0], weights[1], "js", input="probs"),
        one_by_one(p, q, "js"),
        rtol=1e-11,
    )
    narrow = tuple(w.astype(np.float32) for w in weights)
    np.testing.assert_allclose(
        klfast.pairwise(narrow[0], narrow[1], "tv", input="probs"),
        one_by_one(p, q, "tv"),
        rtol=1e-5,
    )
    assert klfast.pairwise(p, q, dtype="float16").dtype == np.float16


def test_large_logits_and_far_rows() -> None:
    p, q = (logits(6, 64, seed, 300.0).astype(np.float32) + 1e5 for seed in (1, 2))
    for metric in ("kl", "js", "tv", "renyi:0.5", "renyi:3"):
        np.testing.assert_allclose(
            klfast.pairwise(p, q, metric), one_by_one(p, q, metric), rtol=1e-5
        )


@pytest.mark.parametrize("metric", ["kl", "cross_entropy", "jeffreys", "renyi:0.5", "chi2"])
@pytest.mark.parametrize("start", [-np.inf, -1e4, -25.0, 25.0], ids=lambda start: f"{start:g}")
def test_the_first_entries_may_say_nothing_of_the_row(metric: str, start: float) -> None:
    width = _pairwise.SAMPLE + 600
    p, q = (logits(6, width, seed).astype(np.float32) for seed in (12, 13))
    p[1:4, : _pairwise.SAMPLE] += start
    q[2:5, : _pairwise.SAMPLE] += start
    q[0] = p[0] + np.float32(0.3) * logits(1, width, 14)[0].astype(np.float32)
    np.testing.assert_allclose(klfast.pairwise(p, q, metric), one_by_one(p, q, metric), rtol=1e-5)


def test_sure_rows_that_differ_little() -> None:
    p, q = (logits(6, 1100, seed, 0.5).astype(np.float32) for seed in (15, 16))
    p[:, 700] = q[:, 700] = np.linspace(8.0, 20.0, 6)  # all but one entry are improbable
    for metric in ("kl", "cross_entropy", "jeffreys"):
        np.testing.assert_allclose(
            klfast.pairwise(p, q, metric), one_by_one(p, q, metric), rtol=1e-5
        )


def test_strided_rows_are_read_in_place() -> None:
    p = np.asfortranarray(logits(12, 90).astype(np.float32))[::2, ::3]
    for metric in ("kl", "tv"):
        np.testing.assert_allclose(
            klfast.pairwise(p, metric=metric), one_by_one(p, p, metric), rtol=1e-5, atol=1e-17
        )


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_same_kind_of_array_comes_back(library: str) -> None:
    module = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[library])
    p, q = (logits(6, 64, seed).astype(np.float32) for seed in (1, 2))
    convert = module.tensor if library == "torch" else module.asarray
    found = klfast.pairwise(convert(p), convert(q), "js")
    assert type(found) is type(convert(p))
    np.testing.assert_array_equal(np.asarray(found), klfast.pairwise(p, q, "js"))


def test_disjoint_supports_reach_the_bounds_and_no_more() -> None:
    p = np.full((12, 600), -np.inf, np.float32)
    for i in range(12):
        p[i, 50 * i : 50 * i + 50] = logits(1, 50, i)[0]
    apart = ~np.eye(12, dtype=bool)
    for metric, bound in (("js", np.log(2)), ("tv", 1.0), ("hellinger2", 1.0), ("kl", np.inf)):
        values = klfast.pairwise(p, metric=metric, dtype="float64")[apart]
        np.testing.assert_allclose(values, bound, rtol=1e-6)
        assert (values <= bound).all()


def test_close_pairs_are_as_exact_as_two_rows() -> None:
    p = logits(8, 3000).astype(np.float32)
    q = p + 1e-4 * logits(8, 3000, 9).astype(np.float32)
    for metric in ("kl", "js", "tv", "chi2", "hellinger2"):
        np.testing.assert_allclose(
            np.diag(klfast.pairwise(p, q, metric)),
            np.diag(one_by_one(p, q, metric)),
            rtol=2e-6,
        )


def test_no_bit_depends_on_the_number_of_threads() -> None:
    p = logits(70, 9000).astype(np.float32)
    before = klfast.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            klfast.set_num_threads(count)
            found.append([klfast.pairwise(p, metric=metric) for metric in ("js", "tv")])
    finally:
        klfast.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_kernels_numpy_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = (logits(6, 70, seed).astype(np.float32) for seed in (1, 2))
    expected = {metric: klfast.pairwise(p, q, metric) for metric in METRICS}
    monkeypatch.setattr(_pairwise, "compiled", lambda: None)
    for metric, values in expected.items():
        np.testing.assert_allclose(klfast.pairwise(p, q, metric), values, rtol=1e-5)


def test_as_a_metric_of_other_libraries() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    p = logits(12, 60).astype(np.float32)
    p[6:] = p[:6] + 0.1 * logits(6, 60, 3).astype(np.float32)
    expected = klfast.pairwise(p, metric="js")
    np.testing.assert_allclose(
        distance.cdist(p, p, klfast.js_divergence), expected, rtol=1e-5, atol=1e-15
    )
    cluster = pytest.importorskip("sklearn.cluster")
    labels = cluster.DBSCAN(eps=0.3, min_samples=2, metric="precomputed").fit(
        np.sqrt(expected)
    ).labels_  # fmt: skip
    np.testing.assert_array_equal(labels[:6], labels[6:])
    assert len(set(labels)) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "entropy_p"}, ValueError, "metric is 'entropy_p'"),
        ({"metric": "kll"}, ValueError, "did you mean 'kl'"),
        ({"p": np.zeros((2, 3, 4))}, ValueError, r"p has shape \(2, 3, 4\)"),
        ({"q": np.zeros((5, 4))}, ValueError, "vocabularies of 3 and 4"),
        ({"q": [[1.0]]}, TypeError, "q is of type list"),
        ({"temperature": 0}, ValueError, "temperature is 0"),
        ({"where": None}, TypeError, "unexpected keyword argument 'where'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: Any, message: str) -> None:
    arguments: dict[str, Any] = {"p": np.zeros((6, 3)), "q": np.zeros((6, 3))} | change
    with pytest.raises(error, match=message):
        klfast.pairwise(**arguments)


@pytest.mark.parametrize("metric", ["kl", "jeffreys", "renyi:0.5", "js"])
@pytest.mark.parametrize(
    "shape",
    [
        (5, 70, 4099),
        (37, 161, 600),
        (260, 17, 33),
        # Tables of both sides: in one part and in several.
        (258, 270, 4099),
        (257, 273, 600),
        (273, 257, 33),
        # A table of the few rows alone, in several parts.
        (1, 70, 65600),
        (70, 2, 65600),
        (256, 65, 4099),
    ],
)
def test_panels_that_are_not_full(metric: str, shape: tuple[int, int, int]) -> None:
    n, m, width = shape
    p, q = (logits(k, width, seed).astype(np.float32) for k, seed in ((n, 0), (m, 1)))
    found = klfast.pairwise(p, q, metric)
    wide = klfast.pairwise(p.astype(np.float64), q.astype(np.float64), metric)
    np.testing.assert_allclose(found, wide, rtol=1e-5)
    some = np.ix_([0, n - 1], [0, m // 2, m - 1])
    np.testing.assert_allclose(
        found[some], one_by_one(p[some[0][:, 0]], q[some[1][0]], metric), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("metric", "shape"),
    [("kl", (257, 260)), ("js", (90, 150)), ("kl", (40, 150)), ("kl", (150, 4))],
)
def test_threads_do_not_change_a_bit(metric: str, shape: tuple[int, int]) -> None:
    n, m = shape
    p, q = (logits(k, 5000, seed).astype(np.float32) for k, seed in ((n, 0), (m, 1)))
    threads = klfast.get_num_threads()
    try:
        klfast.set_num_threads(1)
        alone = klfast.pairwise(p, q, metric)
        klfast.set_num_threads(3)
        np.testing.assert_array_equal(klfast.pairwise(p, q, metric), alone)
    finally:
        klfast.set_num_threads(threads)

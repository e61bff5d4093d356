"""Bugs that users of other projects reported, each as a test that it does not happen here.

Beside each test stands where it was reported. What it must be instead comes from the float64
reference, or is known beforehand.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributions import rounded

import klfast
from klfast import reference

INF = math.inf
LOG_2 = math.log(2.0)
PLAIN = (
    "kl_divergence", "jeffreys_divergence", "js_divergence", "total_variation",
    "squared_hellinger", "chi2_divergence",
)  # fmt: skip
WITH_ORDER = ("renyi_divergence", "alpha_divergence", "tsallis_divergence")
DIVERGENCES: list[tuple[str, dict[str, float]]] = [(name, {}) for name in PLAIN]
DIVERGENCES += [("js_divergence", {"weight": weight}) for weight in (0.0, 0.1, 1.0)]
DIVERGENCES += [(name, {"alpha": alpha}) for name in WITH_ORDER for alpha in (0.0, 0.5, 1.0, 2.0)]
DIVERGENCES += [("renyi_divergence", {"alpha": INF})]
every_divergence = pytest.mark.parametrize(
    ("name", "parameters"), DIVERGENCES, ids=lambda each: str(each)
)


def call(name: str, *arrays: Any, **options: Any) -> Any:
    return getattr(klfast, name)(*arrays, **{"dtype": "float64", **options})


def truth(name: str, *arrays: Any, **options: Any) -> Any:
    return getattr(reference, name)(*arrays, **options)


# 1. pytorch#32520, pytorch#80488: a small negative KL of identical rows
@every_divergence
def test_identical_rows_are_at_distance_zero(
    name: str, parameters: dict[str, float], backend: str
) -> None:
    rows = [np.array([1, 2, 3.0]), np.array([5, 5, 5.0]), np.random.default_rng(1).normal(size=999)]
    for row in rows:
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            x = rounded(row, dtype)
            value = call(name, x, x.copy(), **parameters, backend=backend)
            assert value == 0
            assert not np.signbit(value)  # which would be printed
            wide = x.astype(np.float64)
            assert call(name, x, wide, **parameters, backend=backend) == 0


# 2. EasyDeL#267: identical bfloat16 rows of 248320 read +0.0248
def test_identical_bfloat16_rows_of_a_large_vocabulary(backend: str) -> None:
    x = rounded(np.random.default_rng(2).normal(size=(2, 248320)) * 8, "bfloat16")
    for name in PLAIN:
        np.testing.assert_array_equal(call(name, x, x.copy(), backend=backend), 0.0)


# 3. EasyDeL#267: wrong for logits of 50 to 70 and such a vocabulary
@pytest.mark.parametrize("scale", [50, 70])
def test_peaked_logits_of_a_large_vocabulary(scale: float, backend: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, size=(2, 250000)) * scale
    y = x + rng.normal(size=x.shape)
    for dtype in ("bfloat16", "float32"):
        p, q = rounded(x, dtype), rounded(y, dtype)
        for name in PLAIN:
            got = call(name, p, q, backend=backend)
            np.testing.assert_allclose(got, truth(name, p, q), rtol=2e-6)


# 4. ms-swift#10156: JS of float32 against bfloat16 read -1.70e-4, and is +5.09e-4
def test_js_of_mixed_dtypes(backend: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(8, 4000)).astype(np.float32) * 4
    y = rounded(x + 0.03 * rng.normal(size=x.shape), "bfloat16")
    for p, q in ((x, y), (y, x)):
        got = call("js_divergence", p, q, weight=0.5, backend=backend)
        assert (got > 0).all()
        np.testing.assert_allclose(got, truth("js_divergence", p, q), rtol=2e-6)


# 5. Liger-Kernel#1453, Liger-Kernel#769: NaN where both log-probabilities are below -104
@every_divergence
def test_log_probs_that_underflow_in_both_rows(
    name: str, parameters: dict[str, float], backend: str
) -> None:
    p = np.array([0.0, -105.0, -110.0, -1e4], np.float32)
    q = np.array([-1e-3, -115.0, -104.5, -2e4], np.float32)
    for input_kind in ("logits", "log_probs"):
        got = call(name, p, q, **parameters, input=input_kind, backend=backend)
        expected = truth(name, p, q, **parameters)
        assert math.isfinite(got) or expected == INF
        assert got == pytest.approx(expected, rel=2e-6, abs=1e-17)


# 6. heretic#346, heretic#348: NaN where the same tokens are -inf in both rows
@every_divergence
def test_the_same_tokens_masked_in_both_rows(
    name: str, parameters: dict[str, float], backend: str
) -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 5000)).astype(np.float32)
    x[::3] = y[::3] = -INF
    keep = np.arange(5000) % 3 != 0
    got = call(name, x, y, **parameters, backend=backend)
    assert got == pytest.approx(truth(name, x[keep], y[keep], **parameters), rel=2e-6)


# 7. torchmetrics#1029: p > 0 where q = 0
def test_a_token_that_q_excludes(backend: str) -> None:
    p, q = np.array([[0.0, 1.0, 2.0]], np.float32), np.array([[0.0, 1.0, -INF]], np.float32)
    for name in ("kl_divergence", "chi2_divergence", "jeffreys_divergence", "cross_entropy"):
        assert call(name, p, q, backend=backend) == INF
    for alpha in (1.0, 2.0, INF):
        assert call("renyi_divergence", p, q, alpha, backend=backend) == INF
    bounds = {"js_divergence": LOG_2, "total_variation": 1.0, "squared_hellinger": 1.0}
    for name, bound in bounds.items():
        got = call(name, p, q, backend=backend)
        assert 0 < got < bound
        assert got == pytest.approx(truth(name, p, q), rel=2e-6)
    assert math.isfinite(call("renyi_divergence", p, q, 0.5, backend=backend)[0])
    assert math.isfinite(call("kl_divergence", q, p, backend=backend)[0])


# 8. optax#1786: NaN for a one-hot target
def test_a_one_hot_target(backend: str) -> None:
    target = np.full(100, -INF, np.float32)
    target[17] = 0.0
    y = np.random.default_rng(8).normal(size=100).astype(np.float32)
    surprise = -truth("token_log_probs", y, 17)
    assert call("kl_divergence", target, y, backend=backend) == pytest.approx(surprise, rel=2e-6)
    assert call("cross_entropy", target, y, backend=backend) == pytest.approx(surprise, rel=2e-6)
    assert call("entropy", target, backend=backend) == 0
    assert call("kl_divergence", target, target, backend=backend) == 0
    one_hot = np.exp(target)
    got = call("kl_divergence", one_hot, np.exp(y), input="probs", backend=backend)
    assert got == pytest.approx(truth("kl_divergence", one_hot, np.exp(y), input="probs"), rel=2e-6)


# 8, the gradient
@pytest.mark.parametrize("backend", ["reference", "cpu"])  # on a GPU: tests/cuda
@pytest.mark.parametrize("name", ["kl", "jeffreys", "js", "renyi:2", "tv", "cross_entropy"])
def test_gradients_of_a_one_hot_target(name: str, backend: Any) -> None:
    target = np.full((2, 100), -INF, np.float32)
    target[:, 17] = 0.0
    y = np.random.default_rng(8).normal(size=target.shape).astype(np.float32)
    y[1, 40:] = -INF  # in both
    _, (of_p, of_q) = klfast.value_and_grad(name, target, y, wrt="both", backend=backend)
    assert np.isfinite(of_p).all()
    assert np.isfinite(of_q).all()
    assert (of_p[target == -INF] == 0).all()
    assert (of_q[y == -INF] == 0).all()
    if name in ("kl", "cross_entropy"):
        expected = np.exp(reference.log_softmax(y)) - np.exp(target.astype(np.float64))
        np.testing.assert_allclose(of_q, expected, rtol=1e-5, atol=1e-9)


# 9. scipy#20083: the square root of JS is NaN for these two
def test_js_of_close_probabilities_has_a_root(backend: str) -> None:
    p = np.array([0.027501475, 0.055202297], np.float32)
    q = np.array([0.027537677, 0.055334348], np.float32)
    got = call("js_divergence", p, q, input="probs", backend=backend)
    assert got > 0
    assert math.sqrt(got) == pytest.approx(
        math.sqrt(truth("js_divergence", p, q, input="probs")), rel=2e-6
    )


# 10. scipy#20779: NaN next to one half
def test_js_of_probabilities_next_to_one_half(backend: str) -> None:
    half = np.nextafter(0.5, 0)
    p, q = np.array([half, 1 - half]), np.array([1 - half, half])
    got = call("js_divergence", p, q, input="probs", backend=backend)
    assert got == call("js_divergence", q, p, input="probs", backend=backend)
    assert 0 < got < 1e-30


# 11. scipy#19436: JS is inf for the smallest probability there is
def test_js_of_a_subnormal_probability(backend: str) -> None:
    p, q = np.array([0.0, 1.0]), np.array([5e-324, 1.0])
    got = call("js_divergence", p, q, input="probs", backend=backend)
    assert 0 <= got <= 1e-300


# 12. ReDEeP#2: JS above log 2
def test_js_of_disjoint_supports_is_log_2(backend: str) -> None:
    rng = np.random.default_rng(12)
    for width in (2, 7, 1000, 40000):
        odd = np.arange(width) % 2 == 1
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            x, y = (rounded(row, dtype) for row in rng.normal(size=(2, width)))
            x[odd], y[~odd] = -INF, -INF
            got = call("js_divergence", x, y, backend=backend)
            assert got <= LOG_2
            assert got == pytest.approx(LOG_2, rel=1e-13 if dtype == "float64" else 2e-6)
            near = call(
                "js_divergence", np.where(odd, -99, x), np.where(odd, y, -99), backend=backend
            )
            assert near <= LOG_2


# 13. pytorch#85786, pytorch#111484, pytorch#90793: offsets of 32 bits
@pytest.mark.parametrize("entries", [2**31, 2**32])
def test_rows_beyond_32_bit_offsets(entries: int, backend: str, tmp_path: Path) -> None:
    """The last rows of a sparse file that is larger than any 32-bit count of entries or bytes."""
    width = 131072
    count = entries // width + 3
    memory = sparse_file(tmp_path / "logits", count * width)
    p = np.frombuffer(memory, np.float16).reshape(count, width)
    x, y = np.random.default_rng(13).normal(size=(2, width)).astype(np.float16)
    p[-1], p[-2] = x, y
    keep = np.arange(count) >= count - 2
    for q in (x, np.broadcast_to(x, p.shape)):
        got = call("kl_divergence", p, q, where=keep, backend=backend)
        assert got[-1] == 0
        assert got[-2] == pytest.approx(truth("kl_divergence", y, x), rel=2e-6)
        assert np.isnan(got[:-2]).all()
    got = call("token_log_probs", p, np.arange(count), where=keep, backend=backend)
    assert got[-1] == pytest.approx(truth("token_log_probs", x, count - 1), rel=2e-6)
    tail = p[:: count - 1]  # a stride of more than 2**32 bytes
    got = call("entropy", tail, backend=backend)
    assert got[0] == pytest.approx(math.log(width), rel=2e-6)
    assert got[1] == pytest.approx(truth("entropy", x), rel=2e-6)


def sparse_file(path: Path, entries: int) -> mmap.mmap:
    """A new file of float16 zeros, of which no page exists before it is written to."""
    with path.open("w+b") as file:
        file.truncate(2 * entries)
        return mmap.mmap(file.fileno(), 0)


# 13, the other way: one row that many rows share, 2**32 entries of a view without memory
def test_the_last_of_many_broadcast_rows(backend: str) -> None:
    width, count = 65536, 2**16 + 1
    x, y = np.random.default_rng(13).normal(size=(2, width)).astype(np.float32)
    keep = np.arange(count) == count - 1
    p, q = np.broadcast_to(x, (count, width)), np.broadcast_to(y, (count, width))
    got = call("kl_divergence", p, q, where=keep, backend=backend)
    assert got[-1] == pytest.approx(truth("kl_divergence", x, y), rel=2e-6)


# 14. trl#6252, and code in Liger-Kernel: zeros for the missing tokens add mass that is not there
def test_vocabularies_of_different_length(backend: Any) -> None:
    rng = np.random.default_rng(14)
    p = rng.normal(size=(2, 151936)).astype(np.float32)
    q = rng.normal(size=(2, 152064)).astype(np.float32)
    with pytest.raises(ValueError, match=r"(?s)151936.*152064"):
        klfast.kl_divergence(p, q, backend=backend)
    got = call("kl_divergence", p, q, vocab_size=151936, backend=backend)
    np.testing.assert_allclose(got, truth("kl_divergence", p, q[:, :151936]), rtol=2e-6)


# 15. pytorch#51910: no row left by the mask, or none at all
def test_no_row_at_all(backend: str) -> None:
    full, empty = np.zeros((3, 5), np.float32), np.zeros((0, 5), np.float32)
    nothing = np.zeros(3, bool)
    for rows, where in ((full, nothing), (empty, None)):
        options = {"where": where, "backend": backend}
        assert math.isnan(call("kl_divergence", rows, rows, reduction="mean", **options))
        assert call("kl_divergence", rows, rows, reduction="sum", **options) == 0
        values = call("kl_divergence", rows, rows, **options)
        assert values.shape == (len(rows),)
        assert np.isnan(values).all()


# 16. Online softmax: -inf - (-inf) where the first tile is masked
@every_divergence
@pytest.mark.parametrize("width", [4096, 70000])
def test_the_first_tile_is_all_masked(
    width: int, name: str, parameters: dict[str, float], backend: str
) -> None:
    x, y = np.random.default_rng(16).normal(size=(2, width)).astype(np.float32)
    for masked in (2048, 2049, width - 1):
        p, q = x.copy(), y.copy()
        p[:masked] = q[:masked] = -INF
        got = call(name, p, q, **parameters, backend=backend)
        expected = truth(name, x[masked:], y[masked:], **parameters)
        assert got == pytest.approx(expected, rel=2e-6, abs=1e-17)
        got = call("js_divergence", p, y, backend=backend)
        assert got == pytest.approx(truth("js_divergence", p, y), rel=2e-6)


# 18. Liger-Kernel's JSD, dit: jumps where alpha goes to 1, or the weight to 0 or 1
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_jump_at_the_ends_of_a_parameter(dtype: str, backend: str) -> None:
    x, y = (rounded(row, dtype) for row in np.random.default_rng(18).normal(size=(2, 3000)))
    kl, reverse = truth("kl_divergence", x, y), truth("kl_divergence", y, x)
    exact = 2e-13 if dtype == "float64" else 2e-6
    for step in (1e-2, 1e-4, 1e-6, 1e-9, 1e-12):
        for alpha in (1 - step, 1 + step):
            for name in WITH_ORDER:
                got = call(name, x, y, alpha, backend=backend)
                assert got == pytest.approx(kl, rel=10 * step + exact)
        got = call("alpha_divergence", x, y, step, backend=backend)
        assert got == pytest.approx(reverse, rel=10 * step + exact)
        js = call("js_divergence", x, y, weight=step, backend=backend)
        assert js / step == pytest.approx(kl, rel=10 * step + exact)
        js = call("js_divergence", y, x, weight=1 - step, backend=backend)
        assert js / (1 - (1 - step)) == pytest.approx(kl, rel=10 * step + exact)


# Found here: NaN, where the reciprocal of the order is so small that its square is 0
def test_orders_up_to_the_largest_number(backend: str) -> None:
    x, y = np.random.default_rng(18).normal(size=(2, 3000))
    for alpha in (1e100, 1e200, 1e300):
        for name in ("alpha_divergence", "tsallis_divergence"):
            assert call(name, x, y, alpha, backend=backend) == INF
            assert call(name, x, x.copy(), alpha, backend=backend) == 0
        got = call("renyi_divergence", x, y, alpha, backend=backend)
        assert got == pytest.approx(truth("renyi_divergence", x, y, INF), rel=1e-13)


# 19. exllamav3: a KL below 6e-8 becomes 0
@pytest.mark.parametrize("step", [1e-4, 1e-5, 1e-6, 1e-7])
def test_a_small_divergence_is_not_flushed(step: float, backend: str) -> None:
    rng = np.random.default_rng(19)
    x = 0.5 * rng.normal(size=(4, 32000)).astype(np.float32)
    y = (x + step * rng.normal(size=x.shape)).astype(np.float32)
    got = call("kl_divergence", x, y, backend=backend)
    expected = truth("kl_divergence", x, y)
    assert (expected < 6e-8).all()
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-17)
    assert (got > 0).all()


# 20. pytorch#2259, pytorch#57459: which one is P, and what a mean is the mean of
@pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # they warn of their own mean
def test_direction_and_mean_against_torch(backend: Any) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    p, q = torch.from_numpy(np.random.default_rng(20).normal(size=(2, 6, 50)))
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    kl_div = torch.nn.functional.kl_div  # (input, target) is (log Q, P)

    def theirs(reduction: str) -> float:
        return float(kl_div(log_q, log_p, reduction=reduction, log_target=True))

    def ours(reduction: Any) -> float:
        return float(klfast.kl_divergence(p, q, reduction=reduction, backend=backend))

    assert ours("sum") == pytest.approx(theirs("sum"), rel=1e-12)
    assert ours("mean") == pytest.approx(theirs("batchmean"), rel=1e-12)
    assert ours("mean") == pytest.approx(theirs("mean") * 50, rel=1e-12)
    rows = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(klfast.kl_divergence(p, q, backend=backend), rows, rtol=1e-12)
    backwards = float(kl_div(log_p, log_q, reduction="sum", log_target=True))
    assert ours("sum") != pytest.approx(backwards, rel=1e-3)


# 21. llm-compressor#2659: a masked mean that is the mean of the means of unequal sequences
def test_a_masked_mean_weighs_every_token_alike(backend: str) -> None:
    x, y = np.random.default_rng(21).normal(size=(2, 3, 10, 40))
    lengths = np.array([1, 4, 10])
    mask = np.arange(10) < lengths[:, None]
    rows = truth("kl_divergence", x, y)
    options: dict[str, Any] = {"where": mask, "reduction": "mean", "backend": backend}
    assert call("kl_divergence", x, y, **options) == pytest.approx(rows[mask].mean(), rel=1e-12)
    compared = klfast.compare(x, y, ("kl", "tv"), **options)
    assert compared["kl"] == pytest.approx(rows[mask].mean(), rel=1e-12)
    of_means = np.mean([rows[i, :n].mean() for i, n in enumerate(lengths)])
    assert abs(of_means - rows[mask].mean()) > 1e-3


# 24. ik_llama.cpp#817: the smallest KL is printed as -0.000423
def test_no_row_of_close_models_is_negative(backend: Any) -> None:
    rng = np.random.default_rng(24)
    x = (rng.normal(size=(300, 1000)) * np.linspace(0.1, 30, 300)[:, None]).astype(np.float16)
    bits = x.view(np.uint16)
    y = np.where(rng.random(x.shape) < 0.01, bits ^ 1, bits).view(np.float16)  # a few last bits
    for metric in ("kl", "reverse_kl", "jeffreys", "js", "renyi:2", "tv", "hellinger2", "chi2"):
        values = klfast.compare(x, y, metric, backend=backend)[metric]
        assert (values >= 0).all()
        assert values.min() >= 0

"""States of parts of rows merge into what the whole rows give."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from distributions import Cases, cases, real_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import MEASURES, assert_right, expected, tokens_of
from numpy.typing import NDArray

import klfast
from klfast import RowState

OPERATIONS = [each.values for each in MEASURES if each.values[0].name != "topk_overlap"]


def named(operation: Any, parameters: tuple[float, ...]) -> str:
    return ":".join([operation.name, *map(repr, parameters)])


NAMES = [named(*each) for each in OPERATIONS]


def merged(
    p: Any, q: Any, cuts: list[int], metrics: Any = NAMES, targets: Any = None, **options: Any
) -> dict[str, NDArray[np.float64]]:
    """Values by way of the states of the parts that these places cut the rows into."""
    places = [0, *sorted(cuts), p.shape[-1]]
    parts = [slice(*ends) for ends in itertools.pairwise(places)]
    whole, *rest = [
        RowState.of(
            p[..., part], q[..., part], metrics, vocab_offset=part.start, targets=targets, **options
        )
        for part in parts
    ]
    whole = whole.merge(*rest)
    again = {name: options[name] for name in ("axis", "where", "backend") if name in options}
    shares = [whole.partial_sums(p[..., part], q[..., part], **again) for part in parts]
    return whole.finish(sum(shares[1:], shares[0]))


def check(found: Cases, cuts: list[int], metrics: list[str] = NAMES, **how: Any) -> None:
    tokens = tokens_of(found.p)
    got = merged(found.p, found.q, cuts, metrics, targets=tokens, **how)
    how.pop("backend", None)
    for name, (operation, parameters) in zip(NAMES, OPERATIONS, strict=True):
        if name in got:
            truth = expected(operation, parameters, found.p, found.q, tokens, **how)
            assert_right(operation, found, got[name], truth, tokens=tokens, **how)


# Accuracy


@pytest.mark.parametrize(
    ("dtype_p", "dtype_q"),
    [
        ("float32", "float32"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float16", "float32", marks=pytest.mark.slow),
        ("float64", "float64"),
        ("float32", "float64"),
    ],
)
def test_every_kind_of_row(dtype_p: str, dtype_q: str) -> None:
    check(cases(517, dtype_p, dtype_q), [0, 100, 258, 259, 500])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kind_of_row_in_numpy(dtype: str) -> None:
    check(cases(517, dtype), [0, 100, 258, 259, 500], backend="reference")


@pytest.mark.parametrize("width", [1, 2, 7])
def test_parts_of_one_entry(width: int) -> None:
    check(cases(width), list(range(width)))


@pytest.mark.parametrize(("width", "cuts"), [(6145, [0, 2048, 3000]), (98304, [50000, 98304])])
def test_rows_wider_than_a_tile_and_than_what_a_thread_takes(width: int, cuts: list[int]) -> None:
    check(cases(width, one_in=13), cuts)


@pytest.mark.parametrize(
    "metrics",
    [["kl"], ["reverse_kl"], ["kl", "reverse_kl", "same_top"], ["kl", "nll_p"], ["renyi:0.5"],
     ["renyi:0.1"], ["chi2", "entropy_q"], ["kl", "top_p", "renyi_entropy:inf"]],
)  # fmt: skip
def test_a_few_metrics(metrics: list[str]) -> None:
    """Normalizers that the kernel of a pair leaves are as good as those of the rows alone."""
    check(cases(517), [0, 100, 258, 259, 500], metrics)
    check(cases(517, one_in=5), [200, 300], metrics, temperature=0.7)


def test_few_wide_rows() -> None:
    """Rows of which threads take parts, whose largest entries are looked for in the end."""
    rng = np.random.default_rng(4)
    p = (3.0 * rng.normal(size=(3, 40000))).astype("f")
    q = (p + 0.2 * rng.normal(size=p.shape)).astype("f")
    state = RowState.of(p, q, ["kl", "same_top"])
    np.testing.assert_array_equal(state.array[:, [0, 2]], np.stack([p.max(-1), q.max(-1)], -1))
    np.testing.assert_array_equal(state.array[:, -2:], np.stack([p.argmax(-1), q.argmax(-1)], -1))
    np.testing.assert_allclose(
        state.array[:, [0, 2]] + state.array[:, [1, 3]],
        np.stack([klfast.logsumexp(x, backend="reference", dtype="float64") for x in (p, q)], -1),
        rtol=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_many_parts_are_merged_as_pairs_are(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cases(517, one_in=7)
    places = np.linspace(0, 517, count + 1).astype(int)
    parts = [
        RowState.of(found.p[:, a:b], found.q[:, a:b], ["kl", "chi2", "same_top"], vocab_offset=a)
        for a, b in itertools.pairwise(places.tolist())
    ]
    states = parts
    while len(states) > 1:
        pairs = [one.merge(other) for one, other in zip(states[::2], states[1::2], strict=False)]
        states = pairs + states[len(states) // 2 * 2 :]
    assert parts[0].merge(*parts[1:]) == states[0]
    monkeypatch.setattr("klfast._states._MERGED_ROWS", 5)
    assert parts[0].merge(*parts[1:]) == states[0]


def test_temperature() -> None:
    check(cases(517, one_in=3), [200, 300], temperature=0.7)


def test_a_temperature_for_each() -> None:
    found = cases(517, one_in=3)
    got = merged(
        found.p, found.q, [200, 300], ["kl", "reverse_kl", "js", "tv"], temperature=(0.7, 3)
    )
    truth = klfast.compare(
        found.p, found.q, ["kl", "reverse_kl", "js", "tv"], temperature=(0.7, 3.0),
        backend="reference", dtype="float64",
    )  # fmt: skip
    for name in truth:
        np.testing.assert_allclose(got[name], truth[name], rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_probabilities(backend: str) -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(300, 0.3), size=8)
    q = p * np.exp(1e-4 * rng.normal(size=p.shape))
    p[:, 50:60] = q[:, 50:60] = 0.0
    q[0, 70] = 0.0
    metrics = ["kl", "js", "tv", "renyi:2", "hellinger2", "entropy_q", "same_top", "logsumexp"]
    got = merged(p, 3.0 * q, [55, 58, 200], metrics, input="probs", backend=backend)
    pair = klfast.compare(p, 3.0 * q, metrics[:-1], input="probs", backend="reference")
    for name in pair:
        np.testing.assert_allclose(got[name], pair[name], rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(
        got["logsumexp"], klfast.logsumexp(p, input="probs", backend="reference"), atol=1e-14
    )


@pytest.mark.parametrize("test", ["int8", "int4"])
def test_real_logits(test: str) -> None:
    names, p, q = real_logits(test)
    check(Cases(names[::6], p[::6], q[::6]), [3000 * step for step in range(1, 10)])


def test_identical_rows_are_at_a_distance_of_0() -> None:
    rng = np.random.default_rng(0)
    p = (rng.normal(size=(20, 999)) * rng.choice([0.1, 5.0, 60.0], size=(20, 1))).astype("f")
    distances = [
        name for name, (operation, _) in zip(NAMES, OPERATIONS, strict=True)
        if operation.differentiable and operation.arity == 2 and operation.name != "cross_entropy"
    ]  # fmt: skip
    got = merged(p, p.copy(), [0, 10, 11, 500], distances)
    for name in distances:
        assert (got[name] == 0.0).all(), name


@pytest.mark.parametrize(
    ("seed", "parts", "dtype", "step", "masked", "metric"),
    [
        pytest.param(412144840, 3, "float64", 10.0, 0.97, "renyi:20.0", id="S of a part overflows"),
        pytest.param(51236509, 20, "float32", 10.0, 0.0, "renyi:2.0", id="S of a part is large"),
        pytest.param(385875830, 20, "float64", 1e-5, 0.3, "renyi:inf", id="parts far from close"),
    ],
)
def test_rows_that_once_were_wrong(
    seed: int, parts: int, dtype: str, step: float, masked: float, metric: str
) -> None:
    rng = np.random.default_rng(seed)
    p, q = far_apart(rng, dtype, step, 70.0, masked)
    cuts = rng.integers(0, 401, size=parts - 1).tolist()
    check(Cases(("p masked", "one", "two"), p, q), cuts, [metric])


def test_rows_beyond_what_float32_holds() -> None:
    p = 200.0 + np.random.default_rng(0).normal(size=(3, 90)).astype("f")
    check(Cases(("a", "b", "c"), p, p + p[::-1] / 5e4), [40], ["tv"], temperature=0.01)


# Any cut and any order


def far_apart(rng: Any, dtype: str, step: float, scale: float, masked: float) -> Any:
    """Two batches of three rows whose entries may be masked, in the first row of P alone."""
    x = rng.normal(size=(3, 400)) * scale
    y = x + step * rng.normal(size=x.shape)
    mask = rng.random(x.shape) < masked
    x[mask], y[1:][mask[1:]] = -np.inf, -np.inf
    x[:, 7] = y[:, 7] = 0.0
    return x.astype(dtype), y.astype(dtype)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 400), max_size=63),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([1e-5, 0.1, 10.0]),
    st.sampled_from([1.0, 10.0, 70.0]),
    st.sampled_from([0.0, 0.3, 0.97]),
    st.one_of(st.just(NAMES), st.lists(st.sampled_from(NAMES), min_size=1, max_size=9)),
    st.randoms(use_true_random=False),
)
def test_any_cut_and_any_order(
    seed: int, cuts: list[int], dtype: str, step: float, scale: float, masked: float,
    names: list[str], random: Any,
) -> None:  # fmt: skip
    # What else is asked for decides how some things are computed.
    rng = np.random.default_rng(seed)
    p, q = far_apart(rng, dtype, step, scale, masked)
    tokens = tokens_of(p)
    places = [0, *sorted(cuts), 400]
    parts = [slice(*ends) for ends in itertools.pairwise(places)]
    states = [
        RowState.of(p[:, part], q[:, part], names, vocab_offset=part.start, targets=tokens)
        for part in parts
    ]
    random.shuffle(states)
    whole = states.pop()
    for state in states:
        whole = state.merge(whole) if random.random() < 0.5 else whole.merge(state)
    got = whole.finish(sum(whole.partial_sums(p[:, part], q[:, part]) for part in parts))
    found = Cases(("p masked", "one", "two"), p, q)
    for name, (operation, parameters) in zip(NAMES, OPERATIONS, strict=True):
        if name in got:
            truth = expected(operation, parameters, p, q, tokens)
            assert_right(operation, found, got[name], truth, tokens=tokens)


@pytest.mark.parametrize("metrics", [["tv"], ["js"], ["hellinger2"], ["kl", "js", "tv"]], ids=str)
@pytest.mark.parametrize("step", [1e-4, 0.1, 3.0])
def test_exchanging_the_arguments_changes_no_bit(metrics: list[str], step: float) -> None:
    rng = np.random.default_rng(0)
    x = (3.0 * rng.normal(size=(40, 900))).astype("f")
    y = (x + step * rng.normal(size=x.shape)).astype("f")
    x[3, :200] = y[3, :200] = y[4, 300:] = -np.inf
    there, back = (merged(*pair, [300, 301], metrics) for pair in ((x, y), (y, x)))
    for name in set(metrics) - {"kl"}:
        np.testing.assert_array_equal(there[name], back[name])


# How it is used


def test_a_state_is_an_array_that_travels() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.normal(size=(2, 4, 5, 60)).astype("f")
    first = RowState.of(p[..., :20], q[..., :20], ("kl", "js"))
    second = RowState.of(p[..., 20:], q[..., 20:], ("kl", "js"))
    assert first.array.shape == (20, 6)
    assert first.array.dtype == np.float64
    assert pickle.loads(pickle.dumps(first)) == first
    sent = second.array.tobytes()
    whole = first.merge(first.with_array(np.frombuffer(sent).reshape(20, 6)))
    assert whole == RowState(whole.array, ("kl", "js"), (4, 5))
    assert whole.needs_sums == ("js",)
    sums = [whole.partial_sums(p[..., part], q[..., part]) for part in (slice(20), slice(20, 60))]
    got = whole.finish(sums[0] + sums[1], base=2)
    assert got["kl"].shape == (4, 5)
    truth = klfast.compare(p, q, ("kl", "js"), base=2)
    for name in truth:
        np.testing.assert_allclose(got[name], truth[name], rtol=1e-6)


def test_one_batch() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 60)).astype("f")
    metrics = ("entropy", "logsumexp", "top_p", "token_log_probs", "renyi_entropy:inf")
    parts = [
        RowState.of(x[:, a:b], metrics=metrics, vocab_offset=a, targets=[5, 30, 59])
        for a, b in ((0, 31), (31, 60))
    ]
    got = parts[0].merge(parts[1]).finish()
    np.testing.assert_allclose(got["entropy"], klfast.entropy(x), rtol=1e-6)
    np.testing.assert_allclose(got["logsumexp"], klfast.logsumexp(x), rtol=1e-6)
    np.testing.assert_allclose(got["renyi_entropy:inf"], -np.log(got["top_p"]), rtol=1e-12)
    tokens = klfast.token_log_probs(x, [5, 30, 59])
    np.testing.assert_allclose(got["token_log_probs"], tokens, rtol=1e-6)


def test_rows_that_are_dropped_are_never_read() -> None:
    p = np.zeros((3, 10), "f")
    p[1] = np.nan
    keep = np.array([True, False, True])
    whole = RowState.of(p[:, :4], p[:, :4], ["kl", "tv"], where=keep).merge(
        RowState.of(p[:, 4:], p[:, 4:], ["kl", "tv"], where=keep)
    )
    sums = whole.partial_sums(p[:, :4], p[:, :4], where=keep)
    got = whole.finish(sums + whole.partial_sums(p[:, 4:], p[:, 4:], where=keep))
    for name in got:
        np.testing.assert_array_equal(got[name], [0.0, np.nan, 0.0])


def test_arrays_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = x + 0.125
    y[:, 0] += 1
    got = merged(x, y, [30], ["kl", "same_top"])
    truth = klfast.compare(x, y, ["kl", "same_top"], dtype="float64")
    for name in truth:
        np.testing.assert_allclose(got[name], truth[name].numpy(), rtol=4e-6)


def test_a_target_in_no_shard_has_no_probability() -> None:
    x = np.zeros((1, 4), "f")
    state = RowState.of(x, x, ["nll_p", "delta_prob"], targets=[9])
    assert state.finish() == {"nll_p": [np.inf], "delta_prob": [0.0]}


X = np.zeros((2, 4), "f")
WRONG: Any = 0.5
ANY: Any = RowState


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RowState.of(X, X, "topk_overlap:3"), ValueError, "does not follow from states"),
        (lambda: RowState.of(X, X, "kll"), ValueError, "did you mean 'kl'"),
        (lambda: RowState.of(X, X, []), ValueError, "metrics is empty"),
        (lambda: RowState.of(X, metrics="kl"), TypeError, "q is None"),
        (lambda: RowState.of(X, X, "nll_p"), ValueError, "needs targets"),
        (lambda: RowState.of(X, X, "nll_p", targets=[0.5, 1]), TypeError, "accepted: integers"),
        (lambda: RowState.of(X, X, vocab_offset=WRONG), TypeError, "vocab_offset is 0.5"),
        (lambda: RowState.of(X, X, temperature=0), ValueError, "temperature is 0"),
        (lambda: ANY.of(X, X, base=2), TypeError, "unexpected keyword argument 'base'"),
        (lambda: RowState.of(X, X).merge(WRONG), TypeError, "accepted: a RowState"),
        (lambda: RowState.of(X, X).merge(RowState.of(X, X, "tv")), ValueError, "metrics"),
        (lambda: RowState.of(X, X).merge(RowState.of(X[:1], X[:1])), ValueError, "shape"),
        (lambda: RowState(np.zeros((2, 3)), "kl"), ValueError, "(rows, 6), with the columns"),
        (lambda: RowState(np.zeros((2, 6)), "kl", (3,)), ValueError, "accepted: 3"),
        (lambda: RowState.of(X, X, "tv").finish(), ValueError, "sums is None"),
        (lambda: RowState.of(X, X, "tv").finish([[0.0]]), ValueError, "sums has shape (1, 1)"),
        (lambda: RowState.of(X, X, "tv").partial_sums(X[:1], X[:1]), ValueError, "accepted: (2,)"),
        (lambda: RowState.of(X, X, "tv").partial_sums(X, X, temperature=1), TypeError, "is given"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)

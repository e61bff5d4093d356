"""The public functions and their keywords, on every backend, against the reference."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import klfast
from klfast._operations import DEFAULT_METRICS, OPERATIONS, TARGET_METRICS, Operation

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]

# One entry for each public function of one value a row, with values for its parameters.
FUNCTIONS = [
    pytest.param(operation, (2.0,) * len(operation.parameters), id=operation.name)
    for operation in OPERATIONS.values()
    if operation.function in klfast.__all__ and operation.rows in ("pq", "p")
    if operation.name not in ("js", "entropy_p")
] + [pytest.param(OPERATIONS["js"], (0.3,), id="js")]


def call(
    operation: Operation, parameters: tuple[float, ...], p: Any, q: Any, **options: Any
) -> Any:
    """Call the public function of an operation."""
    arrays = [p, q][: operation.arity]
    if operation.tokens:
        arrays.append(np.zeros(np.shape(p)[:-1], int))
    named = dict(zip((each.name for each in operation.parameters), parameters, strict=True))
    return getattr(klfast, operation.function)(*arrays, **named, **options)


def expect(
    operation: Operation, parameters: tuple[float, ...], p: Any, q: Any, **options: Any
) -> Any:
    """The same of the reference."""
    arrays = [p, q][: operation.arity]
    if operation.tokens:
        arrays.append(np.zeros(np.shape(p)[:-1], int))
    return operation.reference(*arrays, *parameters, **options)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-11)


@pytest.mark.parametrize(("operation", "parameters"), FUNCTIONS)
class TestEveryFunction:
    def test_value(
        self, operation: Operation, parameters: tuple[float, ...], pair: Pair, backend: Any
    ) -> None:
        got = call(operation, parameters, *pair, backend=backend)
        close(got, expect(operation, parameters, *pair))
        assert got.dtype == np.float32
        assert got.shape == (3, 4)

    def test_temperatures(
        self, operation: Operation, parameters: tuple[float, ...], pair: Pair, backend: Any
    ) -> None:
        for temperature in [0.5, 3] + [(0.5, 2.0)] * (operation.arity == 2):
            got = call(operation, parameters, *pair, temperature=temperature, backend=backend)
            close(got, expect(operation, parameters, *pair, temperature=temperature))

    @pytest.mark.parametrize("kind", ["log_probs", "probs"])
    def test_inputs(
        self,
        operation: Operation,
        parameters: tuple[float, ...],
        kind: str,
        pair: Pair,
        backend: Any,
    ) -> None:
        p, q = (
            klfast.reference.log_softmax(x) if kind == "log_probs" else np.exp(x.astype(float))
            for x in pair
        )
        got = call(operation, parameters, p, q, input=kind, backend=backend)
        np.testing.assert_allclose(
            got, expect(operation, parameters, p, q, input=kind), rtol=1e-12, atol=1e-14
        )

    @pytest.mark.parametrize("base", [2, 10.0])
    def test_base_divides_logarithms_only(
        self,
        operation: Operation,
        parameters: tuple[float, ...],
        base: float,
        pair: Pair,
        backend: Any,
    ) -> None:
        expected = expect(operation, parameters, *pair)
        unit = math.log(base) if operation.logarithmic else 1
        close(call(operation, parameters, *pair, base=base, backend=backend), expected / unit)

    @pytest.mark.parametrize("axis", [0, 1, -2])
    def test_axis_is_only_a_stride(
        self,
        operation: Operation,
        parameters: tuple[float, ...],
        axis: int,
        pair: Pair,
        backend: Any,
    ) -> None:
        p, q = (np.moveaxis(x, -1, axis) for x in pair)
        if operation.tokens:
            got = klfast.token_log_probs(p, np.zeros((3, 4), int), axis=axis, backend=backend)
        else:
            got = call(operation, parameters, p, q, axis=axis, backend=backend)
        close(got, expect(operation, parameters, *pair))

    def test_vocab_size(
        self, operation: Operation, parameters: tuple[float, ...], pair: Pair, backend: Any
    ) -> None:
        p, q = pair
        padded = np.concatenate([q, np.full((3, 4, 14), np.nan, np.float32)], -1)
        first, second = (padded, p) if operation.arity == 1 else (p, padded)
        got = call(operation, parameters, first, second, vocab_size=50, backend=backend)
        close(got, expect(operation, parameters, first[..., :50], second[..., :50]))

    def test_reductions(
        self, operation: Operation, parameters: tuple[float, ...], pair: Pair, backend: Any
    ) -> None:
        expected = expect(operation, parameters, *pair)
        keep = np.arange(12).reshape(3, 4) % 3 == 0
        reductions: tuple[Any, ...] = ("mean", "sum")
        for reduction in reductions:
            reduce = getattr(np, reduction)
            got = call(operation, parameters, *pair, reduction=reduction, backend=backend)
            assert isinstance(got, np.float32)
            close(got, reduce(expected))
            got = call(
                operation, parameters, *pair, reduction=reduction, where=keep, backend=backend
            )
            close(got, reduce(expected[keep]))

    def test_docstring_and_signature_are_complete(
        self, operation: Operation, parameters: tuple[float, ...]
    ) -> None:
        function = getattr(klfast, operation.function)
        text = inspect.getdoc(function) or ""
        for part in (operation.formula, operation.source, "shape (..., V)", "nats", "Raises"):
            assert part in text
        keywords = inspect.signature(function).parameters
        for name in (
            "axis", "input", "temperature", "base", "where", "vocab_size", "reduction", "dtype",
            "out", "backend",
        ):  # fmt: skip
            assert keywords[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert f"{name}: " in text


def test_the_defaults_are_those_of_the_call_without_them(pair: Pair, backend: Any) -> None:
    defaults = {
        name: each.default
        for name, each in inspect.signature(klfast.kl_divergence).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    del defaults["backend"]
    np.testing.assert_array_equal(
        klfast.kl_divergence(*pair, **defaults, backend=backend),
        klfast.kl_divergence(*pair, backend=backend),
    )


@pytest.mark.parametrize("dtypes", [("float16", "float64"), ("float32", "float16")])
def test_mixed_dtypes(dtypes: Any, pair: Pair, backend: Any) -> None:
    p, q = (x.astype(dtype) for x, dtype in zip(pair, dtypes, strict=True))
    got = klfast.kl_divergence(p, q, backend=backend)
    close(got, klfast.reference.kl_divergence(p, q))
    assert got.dtype == (np.float64 if "float64" in dtypes else np.float32)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_direction_and_reductions_are_those_of_torch(pair: Pair, backend: Any) -> None:
    """pytorch#2259, #57459: F.kl_div has its arguments reversed and two kinds of mean."""
    torch = pytest.importorskip("torch")
    p, q = (torch.from_numpy(x.astype(np.float64)).flatten(0, 1) for x in pair)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl_div = torch.nn.functional.kl_div
    rows = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(klfast.kl_divergence(p, q, backend=backend), rows)
    mean = klfast.kl_divergence(p, q, reduction="mean", backend=backend)
    torch.testing.assert_close(mean, kl_div(log_q, log_p, reduction="batchmean", log_target=True))
    torch.testing.assert_close(
        mean / p.shape[-1], kl_div(log_q, log_p, reduction="mean", log_target=True)
    )
    reversed_rows = klfast.kl_divergence(q, p, backend=backend)
    assert (reversed_rows / rows - 1).abs().min() > 1e-4


class TestWhere:
    def test_dropped_rows_are_nan_and_never_read(self, pair: Pair, backend: Any) -> None:
        p, q = (x.copy() for x in pair)
        expected = klfast.kl_divergence(p, q, backend=backend)
        p[1] = np.nan
        where = np.array([[True], [False], [True]])
        got = klfast.kl_divergence(p, q, where=where, backend=backend)
        np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])
        assert np.isnan(got[1]).all()
        mean = klfast.kl_divergence(p, q, where=where, reduction="mean", backend=backend)
        close(mean, expected[[0, 2]].mean(dtype=float))

    def test_the_mean_is_weighted_by_token(self, backend: Any) -> None:
        """llm-compressor#2659: not the mean of the means of sequences of unequal lengths."""
        p = np.zeros((2, 100, 2))
        q = np.zeros((2, 100, 2))
        q[1, :, 0] = 1
        where = np.ones((2, 100), bool)
        where[1, 1:] = False  # one token of the second sequence
        one = klfast.kl_divergence(p[1, 0], q[1, 0], backend=backend)
        got = klfast.kl_divergence(p, q, where=where, reduction="mean", backend=backend)
        assert got == pytest.approx(one / 101, rel=1e-12)

    @pytest.mark.parametrize("empty", ["masked", "zero rows"])
    def test_no_rows(self, empty: str, pair: Pair, backend: Any) -> None:
        """pytorch#51910: NaN and 0, without a warning."""
        p, q = pair
        where = False
        if empty == "zero rows":
            p, q, where = p[:0], q[:0], True
        cases: tuple[tuple[Any, float], ...] = (("mean", np.nan), ("sum", 0.0))
        for reduction, expected in cases:
            got = klfast.kl_divergence(p, q, where=where, reduction=reduction, backend=backend)
            np.testing.assert_equal(got, np.float32(expected))
        assert np.isnan(klfast.kl_divergence(p, q, where=where, backend=backend)).all()

    def test_a_list_or_a_tensor(self, pair: Pair, backend: Any) -> None:
        torch = pytest.importorskip("torch")
        p, q = (torch.from_numpy(x[0]) for x in pair)
        keep = [True, False, True, False]
        for where in (keep, np.array(keep), torch.tensor(keep)):
            got = klfast.kl_divergence(p, q, where=where, backend=backend)
            assert got.isnan().tolist() == [False, True, False, True]

    def test_a_stride_0_mask_costs_a_byte_a_row(self, pair: Pair, recorder: Any) -> None:
        spy = recorder()
        klfast.kl_divergence(*pair, where=np.broadcast_to(True, (3, 4)))
        assert spy.calls[0]["rows"] is None
        klfast.kl_divergence(*pair, where=np.arange(4) == 1)
        assert spy.calls[1]["rows"].tolist() == [1, 5, 9]


class TestOut:
    def test_any_strides_and_returned(self, pair: Pair, backend: Any) -> None:
        room = np.zeros((4, 6), np.float64)
        out = room.T[::-2]
        got = klfast.kl_divergence(*pair, out=out, backend=backend)
        assert got is out
        expected = klfast.kl_divergence(*pair, dtype="float64", backend=backend)
        np.testing.assert_array_equal(out, expected)
        assert (room.T[::2] == 0).all()

    def test_of_a_reduction(self, pair: Pair, backend: Any) -> None:
        out = np.array(0.0)
        assert klfast.kl_divergence(*pair, out=out, reduction="sum", backend=backend) is out
        close(out, klfast.reference.kl_divergence(*pair).sum())

    def test_a_tensor(self, pair: Pair, backend: Any) -> None:
        torch = pytest.importorskip("torch")
        p, q = (torch.from_numpy(x) for x in pair)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            out = torch.zeros(4, 3, dtype=dtype).T
            assert klfast.kl_divergence(p, q, out=out, backend=backend) is out
            expected = klfast.kl_divergence(p, q, dtype=torch.float64, backend=backend)
            torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)

    def test_may_lie_in_the_input(self, pair: Pair, backend: Any) -> None:
        p = pair[0].copy()
        expected = klfast.kl_divergence(p, pair[1], backend=backend)
        klfast.kl_divergence(p, pair[1], out=p[..., 0], backend=backend)
        np.testing.assert_array_equal(p[..., 0], expected)


class TestDtype:
    def test_what_underflows_float32_is_there_in_float64(self, backend: Any) -> None:
        p, q = np.zeros(2, np.float32), np.array([-200, 0], np.float32)
        close(klfast.entropy(q, dtype="float32", backend=backend), 0)
        got = klfast.entropy(q, dtype=np.float64, backend=backend)
        assert got > 0
        assert got.dtype == np.float64
        assert klfast.kl_divergence(p, q, dtype=float, backend=backend).dtype == np.float64

    def test_what_overflows_is_infinite_without_a_warning(self, backend: Any) -> None:
        p, q = np.array([0.0, -500.0]), np.array([-500.0, 0.0])
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert klfast.chi2_divergence(p, q, backend=backend) > 1e200
            assert klfast.chi2_divergence(p, q, dtype="float32", backend=backend) == np.inf
        single = p.astype(np.float32), q.astype(np.float32)
        with np.errstate(all="raise"):
            assert klfast.chi2_divergence(*single, backend=backend) == np.inf


def test_rows_that_hold_nan_or_no_support(pair: Pair, backend: Any) -> None:
    p = pair[0].copy()
    p[0, 0, 3], p[0, 1, 3], p[0, 2] = np.nan, np.inf, -np.inf
    with np.errstate(all="raise"):
        got = klfast.kl_divergence(p, pair[1], backend=backend)
    assert np.isnan(got).tolist() == [[True, True, True, False]] + [[False] * 4] * 2
    np.testing.assert_array_equal(got[1:], klfast.kl_divergence(*pair, backend=backend)[1:])


class TestLogSoftmax:
    def test_axis_temperature_and_vocab_size(self, pair: Pair, backend: Any) -> None:
        x = np.moveaxis(pair[0], -1, 1)
        got = klfast.log_softmax(x, axis=1, temperature=2, vocab_size=30, backend=backend)
        assert got.shape == (3, 30, 4)
        expected = klfast.reference.log_softmax(pair[0][..., :30], temperature=2)
        close(np.moveaxis(got, 1, -1), expected)

    def test_base(self, pair: Pair, backend: Any) -> None:
        x = pair[0].astype(np.float64)
        got = klfast.log_softmax(x, base=2, backend=backend)
        np.testing.assert_allclose(np.exp2(got).sum(-1), 1, rtol=1e-12)

    def test_where_and_out(self, pair: Pair, backend: Any) -> None:
        x = pair[0]
        out = np.zeros((3, 4, 100), np.float64)[..., ::2]
        where = np.arange(4) > 0
        assert klfast.log_softmax(x, out=out, where=where, backend=backend) is out
        assert np.isnan(out[:, 0]).all()
        close(out[:, 1:], klfast.reference.log_softmax(x)[:, 1:])

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_dtypes(self, dtype: str, pair: Pair, backend: Any) -> None:
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(pair[0])
        got = klfast.log_softmax(x, dtype=dtype, backend=backend)
        assert got.dtype == getattr(torch, dtype)
        expected = torch.from_numpy(klfast.reference.log_softmax(pair[0]))
        torch.testing.assert_close(got, expected.to(got.dtype))

    def test_next_to_its_input(self, backend: Any) -> None:
        table = np.random.default_rng(0).normal(size=(4, 20))
        x = table[:, :10].copy()
        klfast.log_softmax(table[:, :10], out=table[:, 10:], backend=backend)
        close(table[:, 10:], klfast.reference.log_softmax(x))

    def test_has_no_reduction(self, pair: Pair) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument 'reduction'"):
            klfast.log_softmax(pair[0], reduction="mean")  # type: ignore[call-arg]


class TestTokens:
    def test_kinds(self, pair: Pair, backend: Any) -> None:
        expected = klfast.reference.log_softmax(pair[0])[..., 7]
        for tokens in (7, [7] * 4, np.uint8(7), np.full((3, 1), 7, np.int16)):
            close(klfast.token_log_probs(pair[0], tokens, backend=backend), expected)
        torch = pytest.importorskip("torch")
        logits = torch.from_numpy(pair[0])
        for tokens in (torch.full((3, 4), 7), np.full((3, 4), 7)):
            close(klfast.token_log_probs(logits, tokens, backend=backend), expected)

    def test_a_token_that_is_almost_certain(self, backend: Any) -> None:
        logits = np.zeros(2, np.float32)
        logits[1] = math.log(1e9)
        got = klfast.token_log_probs(logits, 1, backend=backend)
        assert got == pytest.approx(-math.log1p(math.exp(-float(logits[1]))), rel=2e-6)

    def test_dropped_rows_may_hold_any_token(self, pair: Pair, backend: Any) -> None:
        tokens = np.array([-100, 1, 10**9, 3])
        where = np.array([False, True, False, True])
        got = klfast.token_log_probs(pair[0], tokens, where=where, backend=backend)
        log_p = klfast.reference.log_softmax(pair[0])
        close(got[:, [1, 3]], np.stack([log_p[:, 1, 1], log_p[:, 3, 3]], -1))
        r = klfast.compare(*pair, "nll_p", tokens, where=where, backend=backend)
        np.testing.assert_array_equal(r["nll_p"], -got)


METRICS = (
    "kl", "reverse_kl", "jeffreys", "js", "js:0.3", "renyi:2", "renyi:0.5", "renyi:inf", "alpha:3",
    "tsallis:0.5", "tv", "hellinger2", "chi2", "cross_entropy", "entropy_p", "entropy_q",
    "same_top", "top_p", "topk_overlap:10", "nll_p", "nll_q", "delta_prob",
)  # fmt: skip


def separately(metric: str, p: Any, q: Any, targets: Any) -> Any:
    """What the reference gives for one metric."""
    name, _, parameter = metric.partition(":")
    operation = OPERATIONS[name]
    arrays: list[Any] = [{"p": p, "q": q}[letter] for letter in operation.rows]
    if operation.tokens:
        arrays.append(targets)
    parameters: list[Any] = [each.default for each in operation.parameters]
    if parameter:
        parameters = [int(parameter) if name == "topk_overlap" else float(parameter)]
    return operation.reference(*arrays, *parameters)


class TestCompare:
    def test_every_metric(self, pair: Pair, backend: Any) -> None:
        targets = np.arange(12).reshape(3, 4)
        r = klfast.compare(*pair, METRICS, targets, backend=backend)
        assert r.metrics == METRICS
        for metric in METRICS:
            expected = separately(metric, *pair, targets)
            atol: Any = 1e-11
            if metric == "delta_prob":  # a difference, exact relative to the probabilities
                atol = 2e-7 * np.exp(-np.minimum(r["nll_p"], r["nll_q"]))
            assert (np.abs(r[metric] - expected) <= 2e-6 * np.abs(expected) + atol).all(), metric
            assert r[metric].dtype == np.float32

    def test_every_metric_of_the_table_is_tested(self) -> None:
        table = {each.name for each in OPERATIONS.values() if each.metric}
        assert table == {metric.partition(":")[0] for metric in METRICS}

    def test_defaults(self, pair: Pair, backend: Any) -> None:
        assert klfast.compare(*pair, backend=backend).metrics == DEFAULT_METRICS
        r = klfast.compare(*pair, targets=np.zeros((3, 4), int), backend=backend)
        assert r.metrics == DEFAULT_METRICS + TARGET_METRICS

    def test_is_a_mapping(self, pair: Pair, backend: Any) -> None:
        r = klfast.compare(*pair, ("kl", "tv", "kl"), backend=backend)
        assert list(r) == ["kl", "tv"]
        assert "tv" in r
        assert len(r) == 2
        with pytest.raises(KeyError, match=r"'js' was not computed; there are: \['kl', 'tv'\]"):
            r["js"]
        assert r.to_dict() == {"kl": r["kl"].tolist(), "tv": r["tv"].tolist()}
        assert isinstance(r.to_dict()["kl"][0][0], float)

    def test_one_name(self, pair: Pair, backend: Any) -> None:
        assert klfast.compare(*pair, "renyi:2", backend=backend).metrics == ("renyi:2",)

    def test_reduction_where_base_and_temperature(self, pair: Pair, backend: Any) -> None:
        keep = np.arange(4) != 1
        r = klfast.compare(
            *pair, ("kl", "tv"), reduction="mean", where=keep, base=2, temperature=(1, 2),
            backend=backend,
        )  # fmt: skip
        p, q = (x[:, keep] for x in pair)
        kl = klfast.reference.kl_divergence(p, q, temperature=(1, 2)) / math.log(2)
        close(r["kl"], kl.mean())
        close(r["tv"], klfast.reference.total_variation(p, q, temperature=(1, 2)).mean())
        assert r.to_dict() == {"kl": float(r["kl"]), "tv": float(r["tv"])}

    def test_dropped_rows(self, pair: Pair, backend: Any) -> None:
        r = klfast.compare(*pair, ("kl", "same_top"), where=np.arange(4) > 1, backend=backend)
        for values in r.values():
            assert np.isnan(values).tolist() == [[True, True, False, False]] * 3
        nothing = klfast.compare(*pair, "kl", where=False, backend=backend)
        assert np.isnan(nothing["kl"]).all()

    def test_kind_and_dtype(self, pair: Pair, backend: Any) -> None:
        torch = pytest.importorskip("torch")
        p, q = (torch.from_numpy(x) for x in pair)
        r = klfast.compare(p, q, dtype=torch.float64, backend=backend)
        assert all(x.dtype == torch.float64 for x in r.values())

    def test_prints_as_a_table(self, pair: Pair, backend: Any) -> None:
        p = pair[0].copy()
        p[0, 0, 0] = np.nan
        text = repr(klfast.compare(p, pair[1], ("kl", "entropy_q"), backend=backend))
        lines = text.splitlines()
        assert lines[0] == "Comparison of 12 rows, vocabulary 50"
        assert lines[1].split() == ["mean", "median", "max"]
        assert lines[2].split()[0] == "kl"
        assert lines[-1].strip() == "NaN in 1 rows, left out here"
        text = repr(klfast.compare(*pair, "kl", reduction="sum", backend=backend))
        assert text.splitlines()[1].split() == ["sum"]
        empty = repr(klfast.compare(p[:0], p[:0], "kl", backend=backend))
        assert empty.splitlines()[2].split() == ["kl", "nan", "nan", "nan"]

    def test_ties_of_same_top_go_to_the_first(self, backend: Any) -> None:
        p = np.zeros((2, 9), np.float32)
        q = p.copy()
        q[1, 5] = 1
        r = klfast.compare(p, q, "same_top", backend=backend)
        assert r["same_top"].tolist() == [1, 0]


@pytest.mark.parametrize("convert", [np.asarray, np.asfortranarray])
def test_the_short_way_gives_what_the_long_one_does(
    convert: Callable[[Any], Any], pair: Pair, recorder: Any
) -> None:
    spy = recorder(value=1 / 3)
    for p, q in (pair, [x.astype(np.float64) for x in pair], [x[0, 0] for x in pair]):
        short = klfast.kl_divergence(convert(p), convert(q))
        long = klfast.kl_divergence(convert(p), convert(q), temperature=1)
        assert type(short) is type(long)
        assert short.dtype == long.dtype
        np.testing.assert_array_equal(short, long)
    assert len(spy.calls) == 6


def test_token_log_probs_with_entropy_are_both_functions() -> None:
    rng = np.random.default_rng(0)
    x = 3 * rng.normal(size=(5, 6, 2000)).astype(np.float32)
    tokens = rng.integers(0, 2000, size=(5, 6))
    where = rng.random((5, 6)) < 0.7
    for backend in ("cpu", "reference"):
        log_probs, entropies = klfast.token_log_probs(
            x, tokens, return_entropy=True, where=where, backend=backend, base=2
        )
        np.testing.assert_array_equal(
            log_probs, klfast.token_log_probs(x, tokens, where=where, backend=backend, base=2)
        )
        np.testing.assert_array_equal(
            entropies, klfast.entropy(x, where=where, backend=backend, base=2)
        )
    with pytest.raises(TypeError, match="out is given with return_entropy"):
        klfast.token_log_probs(x, tokens, return_entropy=True, out=np.empty((5, 6)))

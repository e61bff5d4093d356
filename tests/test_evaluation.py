"""The evaluation job: its statistics against an independent computation, its laws, its refusals."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

import klfast
from klfast._evaluation import Perplexity, Statistics, evaluate
from klfast._sources import SourceError

RANDOM = np.random.default_rng(3)
BASE = 3 * RANDOM.standard_normal((40, 60)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
TARGETS = RANDOM.integers(0, 60, 40)
EXAMPLES = Path(__file__).parents[1] / "examples" / "data"


def test_statistics_of_a_sample() -> None:
    values = RANDOM.gamma(0.5, size=1234)
    found = Statistics.of(values)
    assert found.mean == pytest.approx(values.mean(), rel=1e-14)
    assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-12)
    for name, share in {
        "median": 0.5,
        "p90": 0.9,
        "p95": 0.95,
        "p99": 0.99,
        "p99_9": 0.999,
    }.items():
        assert getattr(found, name) == pytest.approx(np.quantile(values, share), rel=1e-14)
    assert (found.min, found.max, found.infinite) == (values.min(), values.max(), 0)


def test_statistics_with_infinities() -> None:
    found = Statistics.of(np.array([1.0, 2.0, 3.0, math.inf, math.inf]))
    assert (found.mean, found.median, found.p99, found.max) == (math.inf, 3.0, math.inf, math.inf)
    assert math.isnan(found.standard_error)
    assert found.infinite == 2


def test_statistics_of_one_and_of_none() -> None:
    one = Statistics.of(np.array([2.0]))
    assert (one.mean, one.median, one.max) == (2.0, 2.0, 2.0)
    assert math.isnan(one.standard_error)
    none = Statistics.of(np.array([]))
    assert math.isnan(none.mean)
    assert math.isnan(none.max)


def test_share_has_the_binomial_error() -> None:
    found = Statistics.of(np.repeat([1.0, 0.0], [30, 10]))
    assert found.mean == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 39), rel=1e-14)


def test_perplexity_and_ratio() -> None:
    nll_p = RANDOM.gamma(2, size=500)
    nll_q = nll_p + 0.05 * RANDOM.standard_normal(500)
    found = Perplexity.of(nll_p, nll_q)
    assert found.base == pytest.approx(np.exp(nll_p.mean()), rel=1e-14)
    assert found.test_error == pytest.approx(found.test * stats.sem(nll_q), rel=1e-12)
    assert found.ratio == pytest.approx(found.test / found.base, rel=1e-12)
    assert found.log_ratio_error == pytest.approx(stats.sem(nll_q - nll_p), rel=1e-12)
    assert found.ratio_error == pytest.approx(found.ratio * found.log_ratio_error, rel=1e-14)


def test_columns_and_summary_match_float64() -> None:
    result = evaluate(BASE, TEST, TARGETS)
    a = special.log_softmax(BASE.astype(np.float64), -1)
    b = special.log_softmax(TEST.astype(np.float64), -1)
    kl = (np.exp(a) * (a - b)).sum(-1)
    rows = np.arange(40)
    np.testing.assert_allclose(result.columns["kl"], kl, rtol=2e-6)
    np.testing.assert_allclose(result.columns["nll_p"], -a[rows, TARGETS], rtol=2e-6)
    summary = result.summary(worst=3)
    assert summary.rows == 40
    assert [each.row for each in summary.worst_rows] == np.argsort(-kl)[:3].tolist()
    assert summary.measures["kl"].mean == pytest.approx(kl.mean(), rel=2e-6)
    same = (BASE.argmax(-1) == TEST.argmax(-1)).mean()
    assert summary.value("same_top.mean") == same
    ratio = np.exp((a - b)[rows, TARGETS].mean())
    assert summary.value("perplexity.ratio") == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(
    ("test", "mean", "largest", "same", "perplexity"),
    [
        ("int8.npy", 3.06967689e-4, 1.37643614e-3, 23 / 24, 4.30968335),
        ("int4.npy", 3.54296804e-2, 1.43989797e-1, 21 / 24, 4.42186418),
    ],
)
def test_known_values_of_the_examples(
    test: str, mean: float, largest: float, same: float, perplexity: float
) -> None:
    result = evaluate(EXAMPLES / "base.npy", EXAMPLES / test, EXAMPLES / "targets.npy")
    summary = result.summary()
    assert summary.value("kl.mean") == pytest.approx(mean, rel=2e-6)
    assert summary.value("kl.max") == pytest.approx(largest, rel=2e-6)
    assert summary.value("same_top.mean") == same
    assert summary.value("perplexity.base") == pytest.approx(4.27202354, rel=2e-6)
    assert summary.value("perplexity.test") == pytest.approx(perplexity, rel=2e-6)


@pytest.mark.parametrize("chunk_rows", [1, 7, 40, 1000])
def test_chunks_change_no_bit(tmp_path: Path, chunk_rows: int) -> None:
    np.save(tmp_path / "base.npy", BASE.reshape(8, 5, 60))
    whole = evaluate(BASE, TEST, TARGETS)
    seen: list[tuple[int, int]] = []
    parts = evaluate(
        tmp_path / "base.npy",
        TEST.reshape(8, 5, 60),
        TARGETS.reshape(8, 5),
        chunk_rows=chunk_rows,
        progress=lambda done, total: seen.append((done, total)),
    )
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(parts.columns[name], column)
    assert seen[-1] == (40, 40)
    assert len(seen) == math.ceil(40 / chunk_rows)


def test_temperature_and_vocabulary_reach_compare() -> None:
    result = evaluate(BASE, TEST, metrics=["kl"], temperature=(2.0, 0.5), vocab_size=50)
    expected = klfast.compare(BASE, TEST, ["kl"], temperature=(2.0, 0.5), vocab_size=50)["kl"]
    np.testing.assert_allclose(result.columns["kl"], expected, rtol=1e-6)


def test_tensors_of_other_libraries() -> None:
    torch = pytest.importorskip("torch")
    base, test = (torch.from_numpy(each).bfloat16() for each in (BASE, TEST))
    result = evaluate(base, test, torch.from_numpy(TARGETS), chunk_rows=7)
    expected = evaluate(base.double().numpy(), test.double().numpy(), TARGETS)
    assert result.base["dtype"] == "bfloat16"
    for name, column in expected.columns.items():
        # A difference of two probabilities is as accurate as they are.
        atol = 2e-6 * np.exp(-result.columns["nll_p"]).max() if name == "delta_prob" else 0.0
        np.testing.assert_allclose(result.columns[name], column, rtol=2e-6, atol=atol)


def test_rows_with_nan_are_left_out_and_counted() -> None:
    base, test = BASE.copy(), TEST.copy()
    base[3, 5] = np.nan
    test[17, 0] = np.inf
    test[30] = -np.inf
    keep = np.delete(np.arange(40), [3, 17, 30])
    result = evaluate(base, test, TARGETS)
    assert result.nan_rows.tolist() == [3, 17, 30]
    summary = result.summary()
    assert summary.nan_rows == 3
    assert summary.measures == evaluate(BASE[keep], TEST[keep], TARGETS[keep]).summary().measures
    assert not {3, 17, 30} & {each.row for each in summary.worst_rows}
    assert "3 rows left out of all statistics: 3, 17, 30" in str(result)


def test_nothing_but_nan() -> None:
    result = evaluate(np.full((2, 5), np.nan), np.zeros((2, 5)))
    summary = result.summary()
    assert (summary.nan_rows, summary.worst_rows) == (2, ())
    assert summary.violations(above={"kl.mean": 1.0}) == [
        "kl.mean = nan is not a number; it may not be above 1"
    ]
    assert "2 rows left out" in str(result)


def test_no_rows() -> None:
    result = evaluate(np.zeros((0, 5)), np.zeros((0, 5)))
    assert result.rows == 0
    assert math.isnan(result.summary().measures["kl"].mean)


def test_infinite_rows_are_said() -> None:
    test = TEST.copy()
    test[2, 4] = -np.inf
    result = evaluate(BASE, test)
    assert result.summary().measures["kl"].infinite == 1
    assert "kl is infinite in 1 of the rows" in str(result)
    assert result.to_dict()["measures"]["kl"]["max"] == "Infinity"


def test_to_dict_is_complete_and_valid_json() -> None:
    result = evaluate(BASE, TEST, TARGETS)
    content = json.loads(json.dumps(result.to_dict(columns=True), allow_nan=False))
    assert content["columns"]["kl"] == result.columns["kl"].tolist()
    assert content["measures"]["kl"]["mean"] == result.summary().measures["kl"].mean
    assert content["base"] == {"name": "base", "shape": [40, 60], "dtype": "float32"}
    assert content["versions"]["klfast"] == klfast.__version__
    assert content["machine"]["cores"] >= 1
    assert content["settings"]["metrics"][0] == "kl"
    assert "columns" not in result.to_dict()


def test_limits() -> None:
    summary = evaluate(BASE, TEST, TARGETS).summary()
    kl = summary.measures["kl"].mean
    assert summary.violations(above={"kl.mean": kl}, below={"kl.mean": kl}) == []
    assert len(summary.violations(above={"kl.mean": 0.9 * kl})) == 1
    assert len(summary.violations(below={"same_top.mean": 1.1})) == 1
    assert summary.violations(above={"nan_rows": 0}) == []
    with pytest.raises(ValueError, match=r"no statistic is named 'kl.man'; the nearest is 'kl.m"):
        summary.violations(above={"kl.man": 1})


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        evaluate(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refusals() -> None:
    assert "has shape (30, 60), but base has (40, 60)" in refusal(BASE, TEST[:30])
    assert "vocabulary of 50, but base has 60" in refusal(BASE, TEST[:, :50])
    assert "vocab_size is 61; accepted: 1 to 60" in refusal(BASE, TEST, vocab_size=61)
    assert "has dtype int64" in refusal(BASE, TEST.astype(np.int64))
    assert "has shape (39,)" in refusal(BASE, TEST, TARGETS[1:])
    wrong = TARGETS.copy()
    wrong[[7, 9]] = [60, -1]
    assert "target 60 at row 7 is outside the vocabulary, 0 to 59" in refusal(BASE, TEST, wrong)
    assert "targets must be integers" in refusal(BASE, TEST, TARGETS / 1)
    assert "metric 'nll_p' needs targets" in refusal(BASE, TEST, metrics=["nll_p"])
    assert "'renyl'" in refusal(BASE, TEST, metrics=["renyl:2"])
    assert "at least one" in refusal(BASE, TEST, metrics=[])
    assert "chunk_rows is 0" in refusal(BASE, TEST, chunk_rows=0)
    with pytest.raises(TypeError, match="base is of type list"):
        evaluate([[1.0]], TEST)


def test_source_that_fails_midway() -> None:
    class Failing:
        name, shape, dtype = "failing", (40, 60), "float32"

        def read(self, start: int, stop: int) -> Any:
            if start >= 20:
                raise SourceError("failing: row 20 is not there")
            return TEST[start:stop]

    with pytest.raises(SourceError, match="row 20 is not there"):
        evaluate(BASE, Failing(), chunk_rows=10)


def test_example_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES.parent / "quantization.py"))
    out = capsys.readouterr().out
    assert out.startswith("int8: KL 0.000307 ± ")
    assert out.splitlines()[-1] == "int4: too far from the original"

"""The evaluation job: its statistics against an independent computation, its laws, its refusals."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import special

import klfast
from klfast import Evaluation, evaluate
from klfast._columns import write_parquet
from klfast._heads import open_head
from klfast._measuring import ALL_METRICS, largest_entry
from klfast._sources import SourceError

RANDOM = np.random.default_rng(3)
BASE = 3 * RANDOM.standard_normal((40, 60)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
TARGETS = RANDOM.integers(0, 60, 40)
TEXTS = BASE.reshape(8, 5, 60), TEST.reshape(8, 5, 60)
TEXT_TARGETS = TARGETS.reshape(8, 5)
EXAMPLES = Path(__file__).parents[1] / "examples" / "data"


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


def test_the_accumulator_takes_tensors() -> None:
    torch = pytest.importorskip("torch")
    base, test = (torch.from_numpy(each).bfloat16() for each in TEXTS)
    keep = torch.from_numpy(RANDOM.random((8, 5)) < 0.7)
    targets = torch.where(keep, torch.from_numpy(TEXT_TARGETS), -100)
    labels = torch.arange(8)[:, None].expand(8, 5)
    evaluation = Evaluation()
    transposed = base.transpose(0, 1).contiguous().transpose(0, 1)  # as a model may return them
    evaluation.update(transposed, test, targets, keep)
    given = Evaluation()
    given.update(base, test, targets, keep, sequences=labels)
    expected = Evaluation()
    mask = keep.numpy()
    rows = [each.double().numpy()[mask] for each in (base, test)]
    expected.update(rows[0], rows[1], TEXT_TARGETS[mask], sequences=labels.numpy()[mask])
    assert evaluation.base == {"name": "base", "shape": [40, 60], "dtype": "bfloat16"}
    assert evaluation.noise_floor is not None
    for each in (evaluation, given):
        assert each.columns.keys() == expected.columns.keys()
        for name, column in expected.columns.items():
            np.testing.assert_allclose(each.columns[name], column, rtol=2e-6, atol=1e-7)


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
    assert result.summary().to_dict()["measures"]["kl"]["max"] == "Infinity"


def test_summary_as_json() -> None:
    summary = evaluate(BASE, TEST, TARGETS).summary()
    content = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert content["measures"]["kl"]["mean"] == summary.measures["kl"].mean
    assert content["perplexity"]["ratio"] == summary.value("perplexity.ratio")
    assert content["by_confidence"][0]["mean"] == "NaN"  # an empty bucket
    assert content["resampling"] == {"resamples": 1000, "level": 0.95, "seed": 0}


def test_limits() -> None:
    summary = evaluate(BASE, TEST, TARGETS).summary()
    kl = summary.measures["kl"].mean
    assert summary.violations(above={"kl.mean": kl}, below={"kl.mean": kl}) == []
    assert len(summary.violations(above={"kl.mean": 0.9 * kl})) == 1
    assert len(summary.violations(below={"same_top.mean": 1.1})) == 1
    assert summary.violations(above={"nan_rows": 0}) == []
    with pytest.raises(ValueError, match=r"no statistic is named 'kl.man'; the nearest is 'kl.m"):
        summary.violations(above={"kl.man": 1})
    without = evaluate(BASE, TEST).summary()
    for name in ("perplexity.ratio", "nll_q.mean"):
        with pytest.raises(ValueError, match=f"{name}' needs targets"):
            without.violations(above={name: 1})


# The accumulator


def filled(*batches: slice, **options: Any) -> Evaluation:
    """An evaluation of these rows of the texts, given batch by batch."""
    evaluation = Evaluation(**options)
    for each in batches:
        evaluation.update(TEXTS[0][each], TEXTS[1][each], TEXT_TARGETS[each])
    return evaluation


def test_batches_change_nothing() -> None:
    whole = filled(slice(None), metrics="all")
    parts = filled(slice(0, 3), slice(3, 4), slice(4, 8), metrics="all")
    assert whole.metrics == (*ALL_METRICS, "nll_p", "nll_q", "delta_prob")
    assert whole == parts
    assert whole.summary() == parts.summary()
    from_job = evaluate(*TEXTS, TEXT_TARGETS, metrics="all")
    assert whole.columns.keys() == from_job.columns.keys()
    for name, column in from_job.columns.items():
        np.testing.assert_array_equal(whole.columns[name], column)
    assert whole.columns["sequence"].tolist() == np.repeat(np.arange(8), 5).tolist()
    assert whole.columns["position"].tolist() == list(range(5)) * 8


def test_every_token_weighs_the_same() -> None:
    evaluation = Evaluation(["kl"])
    evaluation.update(BASE[:1], TEST[:1])
    evaluation.update(BASE[1:], TEST[1:])
    expected = klfast.compare(BASE, TEST, ["kl"], dtype=np.float64)["kl"]
    assert evaluation.summary().value("kl.mean") == pytest.approx(expected.mean(), rel=1e-14)


def test_merge_is_as_if_in_one() -> None:
    first, second = filled(slice(0, 3)), filled(slice(3, 5), slice(5, 8))
    first.merge(second)
    assert first == filled(slice(0, 8))
    empty = Evaluation()
    empty.merge(first)
    empty.merge(Evaluation())
    assert empty == first
    assert second == filled(slice(3, 8))  # untouched


def test_merge_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"cannot merge: temperature is 1\.0 here, and 2\.0 in"):
        filled(slice(0, 3)).merge(filled(slice(0, 3), temperature=2.0))
    other = Evaluation()
    other.update(*TEXTS)
    with pytest.raises(ValueError, match="targets are absent for these rows, and were given"):
        filled(slice(0, 3)).merge(other)


def test_updates_are_all_of_one_kind() -> None:
    evaluation = filled(slice(0, 3))
    before = filled(slice(0, 3))
    with pytest.raises(ValueError, match="targets are absent for these rows, and were given"):
        evaluation.update(*TEXTS)
    with pytest.raises(ValueError, match="sequences are absent for these rows, and were numbered"):
        evaluation.update(BASE, TEST, TARGETS)
    with pytest.raises(IndexError, match="60"):
        evaluation.update(*TEXTS, TEXT_TARGETS * 0 + 60)
    assert evaluation == before  # a refused batch leaves nothing behind
    evaluation.update(TEXTS[0][3:], TEXTS[1][3:], TEXT_TARGETS[3:])
    assert evaluation == filled(slice(0, 8))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"test": TEST[:30]}, "test has shape"),
        ({"sequences": np.zeros(40)}, "accepted: integers of shape"),
        ({"sequences": np.zeros(39, int)}, "accepted: integers of shape"),
        ({"targets": TARGETS[1:]}, "targets"),
        ({"where": np.ones(39, bool)}, "where"),
    ],
)
def test_refused_batches(arguments: dict[str, Any], reason: str) -> None:
    evaluation = Evaluation()
    with pytest.raises((ValueError, TypeError), match=reason):
        evaluation.update(**{"base": BASE, "test": TEST, **arguments})
    assert evaluation.rows == 0


def test_rows_that_where_drops_do_not_count() -> None:
    keep = RANDOM.random((8, 5)) < 0.6
    targets = np.where(keep, TEXT_TARGETS, -1)
    evaluation = Evaluation()
    evaluation.update(*TEXTS, targets, keep)
    whole = filled(slice(None))
    for name in (*whole.metrics, "target", "sequence", "flip"):
        expected = whole.columns[name].reshape(8, 5)[keep]
        np.testing.assert_array_equal(evaluation.columns[name], expected)
    assert evaluation.rows == keep.sum()
    position = np.cumsum(keep, axis=1)[keep] - 1
    np.testing.assert_array_equal(evaluation.columns["position"], position)


#: Rows to keep of the eight texts: no beginnings, one text not at all.
KEEP = (np.arange(5) >= np.array([1, 0, 2, 5, 1, 3, 1, 0])[:, None]) & (np.arange(5) < 4)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_files_without_the_rows_that_are_left_out(
    tmp_path: Path, chunk_rows: int, dtype: type
) -> None:
    base: Any = TEXTS[0].astype(dtype)
    base[0, 2, :] = np.nan
    padded = np.where(KEEP, TEXT_TARGETS, -100)
    for name, array in (("base", base), ("test", TEXTS[1]), ("targets", padded), ("keep", KEEP)):
        np.save(tmp_path / f"{name}.npy", array)
    files = [tmp_path / f"{name}.npy" for name in ("base", "test", "targets")]
    numbers = np.flatnonzero(KEEP)
    alone = evaluate(base[KEEP], TEXTS[1][KEEP], TEXT_TARGETS[KEEP], chunk_rows=chunk_rows,
                     sequences=numbers // 5)  # fmt: skip
    for options in ({"where": tmp_path / "keep.npy"}, {"where": KEEP.ravel()},
                    {"ignore_index": -100}, {"where": KEEP, "ignore_index": -100}):  # fmt: skip
        result = evaluate(*files, chunk_rows=chunk_rows, **options)
        for name, column in alone.columns.items():
            if name != "position":
                np.testing.assert_array_equal(result.columns[name], column)
        assert (result.rows, result.left_out) == (KEEP.sum(), 40 - KEEP.sum())
        assert result.noise_floor == alone.noise_floor
        np.testing.assert_array_equal(result.row_numbers, numbers)
        np.testing.assert_array_equal(result.columns["position"], numbers % 5)
        assert result.nan_rows.tolist() == [2]
        found, expected = result.summary(), alone.summary()
        assert found.measures == expected.measures
        assert found.perplexity == expected.perplexity
        worst = [each.row for each in found.worst_rows]
        assert worst == [numbers[each.row] for each in expected.worst_rows]
    assert f"where {40 - KEEP.sum()} of 40 rows are left out" in str(result)
    part = evaluate(*files, where=KEEP & (np.arange(5) > 1))
    with pytest.raises(ValueError, match="accepted: evaluations of the same rows"):
        result.versus(part)
    shifted = evaluate(*files[:2], where=np.roll(KEEP, 1, 0))
    with pytest.raises(ValueError, match="have other rows of the files; accepted"):
        result.versus(shifted, "kl")


def test_row_numbers_of_what_is_left_out_go_everywhere(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    result = evaluate(*TEXTS, TEXT_TARGETS, where=KEEP)
    result.write_parquet(tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table["row"].to_numpy().tolist() == np.flatnonzero(KEEP).tolist()
    assert table["position"].to_numpy().tolist() == (np.flatnonzero(KEEP) % 5).tolist()
    assert table.column_names.count("row") == 1
    assert Evaluation.from_dict(result.to_dict()) == result
    both = Evaluation()
    for _ in range(2):
        both.merge(result)
    assert both.row_numbers.tolist() == [*np.flatnonzero(KEEP), *np.flatnonzero(KEEP) + 40]
    with pytest.raises(ValueError, match="these rows have the columns"):
        both.merge(evaluate(*TEXTS, TEXT_TARGETS))


def test_chunks_that_are_left_out_are_not_read() -> None:
    reads: list[int] = []

    class Recorded:
        name, dtype, shape = "base", "float32", BASE.shape

        def read(self, start: int, stop: int) -> Any:
            reads.append(start)
            return BASE[start:stop]

    seen: list[tuple[int, int]] = []
    keep = np.isin(np.arange(40), [12, 38])
    result = evaluate(Recorded(), TEST, where=keep, chunk_rows=10,
                      progress=lambda *done: seen.append(done))  # fmt: skip
    assert reads == [10, 30]
    assert seen == [(20, 40), (30, 40), (40, 40)]
    assert result.row_numbers.tolist() == [12, 38]
    nothing = evaluate(BASE, TEST, where=keep & False)
    assert (nothing.rows, nothing.summary().rows, nothing.left_out) == (0, 0, 40)


def test_another_vocabulary_is_refused() -> None:
    evaluation = Evaluation()
    evaluation.update(BASE, TEST)
    before = Evaluation.from_dict(evaluation.to_dict())
    reason = "these rows have a vocabulary of 50, and those before had 60; accepted: the same"
    with pytest.raises(ValueError, match=reason):
        evaluation.update(BASE[:, :50], TEST[:, :50])
    with pytest.raises(ValueError, match=reason):
        evaluation.merge(evaluate(BASE[:, :50], TEST[:, :50]))
    head = klfast.LinearLogits(BASE[:, :8], BASE[:8, :50].T)
    with pytest.raises(ValueError, match=reason):
        evaluation.update(head, head)
    assert evaluation == before
    padded = Evaluation(vocab_size=50)  # the common part of both is the same vocabulary
    padded.update(BASE, TEST)
    padded.update(BASE[:, :50], TEST[:, :50])
    np.testing.assert_array_equal(padded.columns["kl"][:40], padded.columns["kl"][40:])


def test_an_evaluation_is_not_merged_with_itself() -> None:
    evaluation = evaluate(BASE, TEST)
    with pytest.raises(ValueError, match="cannot merge an evaluation with itself"):
        evaluation.merge(evaluation)
    assert evaluation.rows == 40


def test_dictionaries_are_complete() -> None:
    evaluation = filled(slice(0, 3), metrics=["renyi:2", "same_top"], temperature=(1.0, 2.0))
    base = TEXTS[0][3:].copy()
    base[1, 2, 3] = np.nan
    evaluation.update(base.astype(np.float16), TEXTS[1][3:], TEXT_TARGETS[3:])
    content = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    again = Evaluation.from_dict(content)
    assert again == evaluation
    assert again.seconds == evaluation.seconds
    assert again.summary() != filled(slice(0, 3)).summary()
    for each in (evaluation, again):  # also as something to go on with
        each.update(*TEXTS, TEXT_TARGETS)
    assert again == evaluation
    assert again.columns["sequence"].max() == 15
    assert Evaluation.from_dict(Evaluation().to_dict()) == Evaluation()
    with pytest.raises(ValueError, match="is not what"):
        Evaluation.from_dict({"format": "other"})


def test_dictionaries_are_compact() -> None:
    evaluation = Evaluation()
    x = RANDOM.standard_normal((20_000, 8)).astype(np.float32)
    evaluation.update(x, x + 0.1)
    size = len(json.dumps(evaluation.to_dict()))
    assert size < 20_000 * 12 * len(evaluation.metrics)


def test_flips_are_told_apart() -> None:
    order = RANDOM.integers(0, 20, (4, 300)) / 4  # many equal entries: the first one counts
    base = RANDOM.integers(0, 20, (300, 30)).astype(np.float32) / 4
    test = base + (RANDOM.random(base.shape) < 0.1).astype(np.float32)
    targets = np.where(order[0] < 2, base.argmax(1), test.argmax(1))
    targets[:20] = RANDOM.integers(0, 30, 20)
    for kind in (np.float16, np.float32, np.float64):
        result = evaluate(base.astype(kind), test.astype(kind), targets)
        right = [each.argmax(1) == targets for each in (base, test)]
        flipped = base.argmax(1) != test.argmax(1)
        kinds = np.select([~flipped, right[0], right[1]], [0, 1, 2], 3)
        np.testing.assert_array_equal(result.columns["flip"], kinds)
        flips = result.summary().flips
        assert flips is not None
        assert flips.rate == pytest.approx(flipped.mean())
        assert (flips.lost, flips.gained) == ((kinds == 1).mean(), (kinds == 2).mean())
        assert min(np.bincount(kinds, minlength=4)) > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_largest_entry_is_the_first_of_equal_ones(dtype: str) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    for _ in range(200):
        values = RANDOM.choice([-np.inf, -3.5, -1.0, -1e-6, -0.0, 0.0, 1e-6, 2.0, 300.0], 4)
        assert largest_entry(values.astype(kind)) == values.astype(kind).astype("f4").argmax()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_noise_floor_is_what_rounding_does(dtype: str) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    exact = 6 * RANDOM.standard_normal((64, 2000)).astype(np.float32)
    rounded = exact.astype(kind)
    measured = klfast.kl_divergence(exact, rounded, reduction="mean", dtype=np.float64)
    result = evaluate(exact, rounded)
    assert result.noise_floor == pytest.approx(measured, rel=0.25)
    both = evaluate(rounded, rounded)
    assert both.noise_floor == pytest.approx(2 * measured, rel=0.25)
    assert "rounding logits to 16 bits" in str(both)
    warm = evaluate(exact, rounded, temperature=2.0)
    assert warm.noise_floor is not None
    assert result.noise_floor is not None
    assert warm.noise_floor < result.noise_floor
    assert evaluate(exact, exact).noise_floor is None
    assert evaluate(abs(rounded), abs(rounded), input="probs").noise_floor is None


def test_confidence_and_positions_in_the_summary() -> None:
    summary = filled(slice(None)).summary()
    assert summary.sequences == 8
    assert sum(each.rows for each in summary.by_confidence) == 40
    kl = filled(slice(None)).columns["kl"].reshape(8, 5)
    assert [each.mean for each in summary.by_position] == pytest.approx(kl.mean(0).tolist())
    flat = evaluate(BASE, TEST, metrics=["kl"]).summary()
    assert (flat.sequences, flat.by_confidence, flat.by_position) == (None, (), ())


def test_sequences_of_files(tmp_path: Path) -> None:
    labels = np.repeat([5, 3], [15, 25])
    np.save(tmp_path / "labels.npy", labels)
    result = evaluate(BASE, TEST, sequences=tmp_path / "labels.npy")
    assert result.columns["sequence"].tolist() == labels.tolist()
    assert result.summary().sequences == 2
    assert "sequences" in refusal(BASE, TEST, sequences=labels[1:])


def test_several_candidates() -> None:
    worse = (TEST + RANDOM.standard_normal(TEST.shape)).astype(np.float32)
    found = evaluate(BASE, [TEST, worse], TARGETS, chunk_rows=7)
    assert [each.test["name"] for each in found] == ["test 1", "test 2"]
    for each, test in zip(found, (TEST, worse), strict=True):
        alone = evaluate(BASE, test, TARGETS)
        for name, column in alone.columns.items():
            np.testing.assert_array_equal(each.columns[name], column)
    difference = found[0].versus(found[1])
    assert difference.verdict.startswith("test 1 is closer to the base than test 2: mean kl ")
    kl = [each.columns["kl"] for each in found]
    assert difference.difference == pytest.approx((kl[1] - kl[0]).mean())
    assert found[1].versus(found[0], "same_top").verdict.startswith("test 1 is closer")
    for metric in ("js", "top_p", "nll_q"):
        with pytest.raises(ValueError, match="accepted, of test 1: kl, reverse_kl, tv, same_top"):
            found[0].versus(found[1], metric)
    with pytest.raises(ValueError, match="test 1 has 40 rows and test has 10"):
        found[0].versus(evaluate(BASE[:10], TEST[:10]))
    with pytest.raises(ValueError, match="at least one candidate"):
        evaluate(BASE, [])


def test_the_base_is_read_once_and_ahead() -> None:
    reads: list[tuple[str, int, int]] = []

    class Counting:
        dtype = "float32"

        def __init__(self, name: str, rows: Any) -> None:
            self.name, self.rows, self.shape = name, rows, rows.shape

        def read(self, start: int, stop: int) -> Any:
            reads.append((self.name, start, stop))
            return self.rows[start:stop]

    evaluate(Counting("base", BASE), [Counting("a", TEST), Counting("b", TEST)], chunk_rows=15)
    parts = [(0, 15), (15, 30), (30, 40)]
    assert reads == [(name, *part) for part in parts for name in ("base", "a", "b")]
    reads.clear()
    evaluation = Evaluation()
    evaluation.update(Counting("base", BASE), TEST, TARGETS)
    assert reads == [("base", 0, 40)]
    expected = evaluate(BASE, TEST, TARGETS)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(evaluation.columns[name], column)
    keep = np.arange(40) >= 25
    evaluation.update(Counting("base", BASE), TEST, np.where(keep, TARGETS, -1), keep)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(evaluation.columns[name][40:], column[keep])


def linear_files(folder: Path) -> tuple[Any, Any, Any]:
    safetensors = pytest.importorskip("safetensors.numpy")
    states = RANDOM.standard_normal((12, 16)).astype(np.float32)
    weight = RANDOM.standard_normal((60, 16)).astype(np.float32)
    bias = RANDOM.standard_normal(60).astype(np.float32)
    np.save(folder / "states.npy", states)
    np.save(folder / "weight.npy", 0.9 * weight)
    safetensors.save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    content = {"hidden": "states.npy", "weight": {"file": "head.safetensors", "key": "weight"},
               "softcap": 30.0}  # fmt: skip
    (folder / "test.json").write_text(json.dumps(content))
    return states, weight, bias


def test_hidden_states_and_heads(tmp_path: Path) -> None:
    states, weight, bias = linear_files(tmp_path)
    base = open_head(str(tmp_path / "states.npy"), str(tmp_path / "head.safetensors"))
    result = evaluate(base, tmp_path / "test.json", metrics=["kl"])
    p = states @ weight.T + bias
    q = 30 * np.tanh((states @ weight.T) / 30)
    expected = klfast.kl_divergence(p, q, dtype=np.float64)
    np.testing.assert_allclose(result.columns["kl"], expected, rtol=1e-3)
    evaluation = Evaluation(["kl"])
    evaluation.update(base, q)
    np.testing.assert_allclose(evaluation.columns["kl"], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object with hidden and weight"),
        ('{"hidden": "states.npy"}', "must be an object with hidden and weight"),
        ('{"hidden": "states.npy", "weight": 3}', "weight must be the name of a file"),
        ('{"hidden": "s.npy", "weight": "w.npy", "scale": "x"}', "scale is 'x'; accepted"),
        ('{"hidden": "s.npy", "weight": "w.npy", "sclae": 1}', "must be an object"),
    ],
)
def test_descriptions_that_are_wrong(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "test.json").write_text(content)
    message = refusal(BASE, tmp_path / "test.json")
    assert message.startswith(f"{tmp_path / 'test.json'}: ")
    assert reason in message


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    base = BASE.copy()
    base[3, 5] = np.nan
    found = evaluate(base.reshape(8, 5, 60), [each.reshape(8, 5, 60) for each in (TEST, BASE)],
                     TARGETS)  # fmt: skip
    write_parquet(tmp_path / "o.parquet", found)
    table = parquet.read_table(tmp_path / "o.parquet")
    assert table.column_names[:2] == ["candidate", "row"]
    assert table["candidate"].to_pylist() == ["test 1"] * 40 + ["test 2"] * 40
    assert table["row"].to_pylist() == [*range(40), *range(40)]
    for name, column in found[1].columns.items():
        if name != "same_top":
            np.testing.assert_array_equal(table[name].to_numpy()[40:], column)
    same = [None if np.isnan(each) else each == 1 for each in found[0].columns["same_top"]]
    assert table["same_top"].to_pylist()[:40] == same
    assert same[3] is None
    about = json.loads(table.schema.metadata[b"klfast"])
    assert about[0]["settings"]["metrics"] == list(found[0].metrics)
    found[0].write_parquet(tmp_path / "o.parquet")
    assert parquet.read_table(tmp_path / "o.parquet").num_rows == 40
    assert [each.name for each in tmp_path.iterdir()] == ["o.parquet"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'needs the package pyarrow: pip install "klfast\[eval'):
        evaluate(BASE, TEST).write_parquet(tmp_path / "o.parquet")


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
    wrong[:] = -100
    assert "target -100 at row 0 is outside" in refusal(BASE, TEST, wrong)
    assert "leave such rows out with ignore_index=-100 (--ignore-index -100)" in refusal(
        BASE, TEST, wrong
    )
    keep = np.ones((40,), bool)
    assert "where: has shape (39,); the logits have 40 rows" in refusal(BASE, TEST, where=keep[1:])
    assert "where: holds int64; where must be booleans" in refusal(BASE, TEST, where=1 * keep)
    assert "ignore_index is -100, but there are no targets" in refusal(
        BASE, TEST, ignore_index=-100
    )
    assert "target 60 at row 3" in refusal(BASE, TEST, np.where(np.arange(40) == 3, 60, -100),
                                           ignore_index=-100)  # fmt: skip
    assert "targets must be integers" in refusal(BASE, TEST, TARGETS / 1)
    assert "metric 'nll_p' needs targets" in refusal(BASE, TEST, metrics=["nll_p"])
    assert "'renyl'" in refusal(BASE, TEST, metrics=["renyl:2"])
    assert "at least one" in refusal(BASE, TEST, metrics=[])
    assert "chunk_rows is 0" in refusal(BASE, TEST, chunk_rows=0)
    with pytest.raises(TypeError, match="base is of type list"):
        evaluate([[1.0]], TEST)
    with pytest.raises(TypeError, match=r"test is of type SimpleNamespace; .* \(test.logits\)"):
        Evaluation().update(BASE, SimpleNamespace(logits=TEST))


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

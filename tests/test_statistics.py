"""Statistics of columns against SciPy and against the plain formulas, and their laws."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from klfast import Evaluation
from klfast._statistics import (
    CONFIDENCE,
    Difference,
    Flips,
    Perplexity,
    Resampling,
    Statistics,
    by_confidence,
    by_position,
    check_statistic,
    positions_of,
)

RANDOM = np.random.default_rng(3)


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


def test_errors_of_perplexity_take_the_covariance_into_account() -> None:
    nll_p = RANDOM.gamma(2, size=500)
    nll_q = nll_p + 0.05 * RANDOM.standard_normal(500)
    found = Perplexity.of(nll_p, nll_q)
    assert found.correlation == pytest.approx(np.corrcoef(nll_p, nll_q)[0, 1], rel=1e-12)
    assert found.difference == pytest.approx(np.exp(nll_q.mean()) - np.exp(nll_p.mean()))
    gradient = np.array([-found.base, found.test])  # error propagation, with the covariances
    variance = gradient @ np.cov(nll_p, nll_q) @ gradient / 500
    assert found.difference_error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_root_mean_square() -> None:
    values = RANDOM.standard_normal(300)
    found = Statistics.of(values)
    assert found.rms == pytest.approx(math.sqrt((values**2).mean()), rel=1e-13)
    assert found.rms_error == pytest.approx(0.5 / found.rms * stats.sem(values**2), rel=1e-12)
    assert Statistics.of(np.zeros(3)).rms_error == 0


def scipy_interval(values: NDArray[np.float64], resamples: int, level: float) -> tuple[float, ...]:
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, confidence_level=level, method="BCa",
        rng=np.random.default_rng(11),
    )  # fmt: skip
    return tuple(found.confidence_interval)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_intervals_are_those_of_scipy(level: float) -> None:
    values = RANDOM.gamma(0.3, size=200)  # as skewed as divergences are
    ours = Resampling(20_000, level).intervals({"x": values}, None)["x"]
    theirs = scipy_interval(values, 20_000, level)
    width = theirs[1] - theirs[0]
    # Two draws of 20 000: the ends move by about a hundredth of the width.
    np.testing.assert_allclose(ours, theirs, atol=0.04 * width)
    assert ours[0] < values.mean() < ours[1]


def test_intervals_by_sequence_are_those_of_scipy() -> None:
    lengths = RANDOM.integers(1, 30, 60)
    labels = RANDOM.permutation(1000)[:60]
    sequences = np.repeat(labels, lengths)
    values = np.repeat(RANDOM.gamma(2, size=60), lengths) + RANDOM.standard_normal(len(sequences))
    shuffled = RANDOM.permutation(len(values))
    ours = Resampling(20_000).intervals({"x": values[shuffled]}, sequences[shuffled])["x"]
    sums = np.array([values[sequences == each].sum() for each in labels])

    def mean(sums: Any, sizes: Any, axis: int) -> Any:
        return sums.sum(axis=axis) / sizes.sum(axis=axis)

    theirs = stats.bootstrap(
        (sums, lengths.astype(float)), mean, paired=True, n_resamples=20_000, method="BCa",
        rng=np.random.default_rng(11),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=0.04 * (theirs.high - theirs.low))
    by_row = Resampling().intervals({"x": values}, None)["x"]
    assert ours[1] - ours[0] > 2 * (by_row[1] - by_row[0])  # rows of one sequence are alike


def test_sequences_of_one_row_are_rows() -> None:
    values = RANDOM.gamma(1, size=50)
    by_row = Resampling().intervals({"x": values}, None)["x"]
    assert Resampling().intervals({"x": values}, np.arange(50))["x"] == pytest.approx(by_row)


def test_intervals_of_many_rows() -> None:
    values = RANDOM.gamma(0.3, size=60_000)
    low, high = Resampling(2000).intervals({"x": values}, None)["x"]
    error = stats.sem(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(5)
    holds = 0
    for i in range(400):
        low, high = Resampling(400, 0.9, seed=i).intervals({"x": random.gamma(1, size=60)}, None)[
            "x"
        ]
        holds += low <= 1 <= high
    assert 0.84 < holds / 400 < 0.93


def test_the_seed_decides() -> None:
    columns = {"x": RANDOM.gamma(1, size=50)}
    first = Resampling(seed=1).intervals(columns, None)
    assert first == Resampling(seed=1).intervals(columns, None)
    assert first != Resampling(seed=2).intervals(columns, None)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.inf, 2.0]])
def test_where_there_is_no_interval(values: list[float]) -> None:
    found = Resampling().intervals({"x": np.array(values), "y": np.ones(len(values))}, None)
    assert np.isnan(found["x"]).all()


def test_interval_of_equal_values_is_a_point() -> None:
    assert Resampling().intervals({"x": np.full(7, 0.1)}, None)["x"] == pytest.approx((0.1, 0.1))
    assert np.isnan(Resampling(0).intervals({"x": np.arange(7.0)}, None)["x"]).all()


def test_refusals_of_resampling() -> None:
    with pytest.raises(ValueError, match="bootstrap is 1; accepted: 0 or"):
        Resampling(1)
    with pytest.raises(ValueError, match="level is 95"):
        Resampling(level=95)


def test_flips() -> None:
    same = np.array([1.0, 0.0, 0.0, 0.0, 1.0])
    found = Flips.of(same, np.array([0, 1, 1, 3, 0], np.int8))
    assert (found.rate, found.lost, found.gained, found.wrong) == pytest.approx((0.6, 0.4, 0, 0.2))
    assert found.standard_error == pytest.approx(stats.sem(same))
    assert math.isnan(Flips.of(same, None).lost)


def test_buckets_of_confidence() -> None:
    top_p = RANDOM.uniform(0, 1, 500)
    top_p[:2] = 0.5, 1.0
    values = RANDOM.gamma(1, size=500)
    buckets = by_confidence(values, top_p)
    assert sum(each.rows for each in buckets) == 500
    for each in buckets:
        inside = (top_p >= each.lower) & ((top_p < each.upper) | (each.upper == CONFIDENCE[-1]))
        assert each.rows == inside.sum()
        if each.rows > 1:
            assert each.mean == pytest.approx(values[inside].mean())
            assert each.standard_error == pytest.approx(stats.sem(values[inside]))
            assert each.median == pytest.approx(np.median(values[inside]))


def test_positions() -> None:
    sequences = np.array([7, 7, 3, 7, 3, 9, 3])
    assert positions_of(sequences).tolist() == [0, 1, 0, 2, 1, 0, 2]
    assert positions_of(np.array([], np.int64)).tolist() == []
    lowest = np.full(2, np.iinfo(np.int64).min)
    assert positions_of(lowest).tolist() == [0, 1]


def test_buckets_of_position() -> None:
    positions = np.tile(np.arange(100), 3)
    values = positions.astype(float)
    buckets = by_position(values, positions)
    assert len(buckets) == 16
    assert (buckets[0].lower, buckets[-1].upper) == (0, 100)
    for each in buckets:
        assert each.rows == 3 * (each.upper - each.lower)
        assert each.mean == pytest.approx((each.lower + each.upper - 1) / 2)
    assert [each.rows for each in by_position(values[:3], positions[:3])] == [1, 1, 1]


def differ(first: Any, second: Any, **options: Any) -> Difference:
    return Difference.of("kl", ("a", "b"), (np.array(first), np.array(second)), None, Resampling(),
                         **options)  # fmt: skip


def test_a_paired_comparison_sees_what_intervals_do_not() -> None:
    first = RANDOM.gamma(0.3, size=300)
    second = first * 1.02
    found = differ(first, second)
    assert found.difference == pytest.approx((second - first).mean())
    assert found.standard_error == pytest.approx(stats.sem(second - first))
    assert found.low > 0
    assert found.verdict.startswith("a is closer to the base than b: mean kl ")
    apart = [Resampling().intervals({"x": each}, None)["x"] for each in (first, second)]
    assert apart[0][1] > apart[1][0]  # the intervals of the means overlap
    theirs = scipy_interval(second - first, 1000, 0.95)
    np.testing.assert_allclose((found.low, found.high), theirs, atol=0.1 * (theirs[1] - theirs[0]))
    swapped = differ(second, first)  # the closer one comes first, with its mean
    assert swapped.difference == -found.difference
    exchanged = swapped.verdict.replace("b is", "c is").replace("than a", "than b")
    assert exchanged.replace("c is", "a is") == found.verdict


def test_verdicts() -> None:
    noise = RANDOM.standard_normal(200)
    assert "no difference beyond noise" in differ(noise, noise[::-1]).verdict
    assert differ(noise, noise).verdict == "a and b have the same kl in every row"
    assert "cannot be told" in differ([1.0, 2.0, 3.0], [1.0, math.inf, 3.0]).verdict
    assert "cannot be told" in differ([math.inf, 2.0], [math.inf, 3.0]).verdict
    assert "cannot be told" in differ([], []).verdict
    more = differ(np.zeros(50), np.ones(50) + 0.01 * noise[:50], higher_is_closer=True)
    assert more.verdict.startswith("b is closer")
    assert differ([math.nan, 1.0, 2.0], [1.0, math.nan, 3.0]).rows == 1


def test_names_of_statistics() -> None:
    names = Evaluation().metrics
    for name in ("kl.mean", "kl.high", "tv.p0_1", "flips.rate", "nan_rows", "noise_floor"):
        check_statistic(name, names)
    with pytest.raises(ValueError, match=r"'kl\.maen'; the nearest is 'kl\.mean'"):
        check_statistic("kl.maen", names)
    with pytest.raises(ValueError, match=r"'perplexity\.ratio' needs targets"):
        check_statistic("perplexity.ratio", names)

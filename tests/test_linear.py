"""Logits that are made while they are compared: against the plain product in float64."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from klfast.kernels import cpu

import klfast
from klfast import Evaluation, LinearLogits, evaluate
from klfast._heads import open_head
from klfast._job import Job
from klfast._linear import in_step

RANDOM = np.random.default_rng(21)
HIDDEN = RANDOM.standard_normal((3, 5, 32)).astype(np.float32)
WEIGHT = (RANDOM.standard_normal((70, 32)) / 4).astype(np.float32)
BIAS = RANDOM.standard_normal(70).astype(np.float32)
OTHER = HIDDEN + 0.1 * RANDOM.standard_normal(HIDDEN.shape).astype(np.float32)


def exact(
    hidden: Any, weight: Any, bias: Any = None, scale: Any = None, softcap: Any = None
) -> Any:
    """The same in float64."""
    x = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    x *= 1 if scale is None else scale
    x += 0 if bias is None else np.asarray(bias, np.float64)
    return x if softcap is None else softcap * np.tanh(x / softcap)


@pytest.mark.parametrize("blocks", [1, 7, 1000])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": BIAS}, {"scale": 0.25}, {"softcap": 3.0},
     {"bias": BIAS, "scale": 2.0, "softcap": 5.0}],
)  # fmt: skip
def test_logits(
    options: dict[str, Any], dtype: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    for name in ("_PANEL_BYTES", "_CONVERTED_BYTES"):
        monkeypatch.setattr(f"klfast._linear.{name}", blocks * 32 * 4)
    hidden, weight = HIDDEN.astype(kind), WEIGHT.astype(kind)
    source = LinearLogits(hidden, weight, **options)
    assert source.shape == (3, 5, 70)
    assert source.dtype == ("float64" if dtype == "float64" else "float32")
    expected = exact(hidden, weight, **options).reshape(15, 70)
    for start, stop in ((0, 15), (4, 9), (7, 7)):
        found = source.read(start, stop)
        assert found.dtype == source.dtype
        # The states are not rounded again: the error is that of sums in float32.
        np.testing.assert_allclose(found, expected[start:stop], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_compared_like_arrays(kind: str) -> None:
    library: Any = pytest.importorskip("jax.numpy" if kind == "jax" else kind)
    base, test, weight, bias = (library.asarray(x) for x in (HIDDEN, OTHER, WEIGHT, BIAS))
    sources = LinearLogits(base, weight, bias), LinearLogits(test, weight, bias, softcap=20.0)
    arrays = exact(HIDDEN, WEIGHT, BIAS), exact(OTHER, WEIGHT, BIAS, softcap=20.0)
    targets = RANDOM.integers(0, 70, (3, 5))
    keep = RANDOM.random((3, 5)) < 0.7
    cases: list[dict[str, Any]] = [
        {}, {"reduction": "mean", "base": 2}, {"where": keep, "reduction": "sum"},
        {"temperature": 2.0, "vocab_size": 60, "where": keep},
    ]  # fmt: skip
    for options in cases:
        options = {"metrics": ("kl", "nll_q", "same_top"), "targets": targets % 60, **options}
        found, expected = klfast.compare(*sources, **options), klfast.compare(*arrays, **options)
        assert found.metrics == expected.metrics
        assert (found.shape, found.vocab_size) == (expected.shape, expected.vocab_size)
        assert found["kl"].dtype == np.float32
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=1e-6)
    evaluation = Evaluation()
    evaluation.update(*sources, targets, keep)
    job = evaluate(*sources, targets, chunk_rows=4)
    np.testing.assert_array_equal(evaluation.columns["kl"], job.columns["kl"][keep.ravel()])
    assert job.summary().sequences == 3


def test_sequences_of_batches_stay_apart() -> None:
    evaluation = Evaluation()
    base, test = LinearLogits(HIDDEN, WEIGHT), LinearLogits(OTHER, WEIGHT)
    evaluation.update(base, test)
    evaluation.update(base, test)
    assert evaluation.columns["sequence"].tolist() == np.repeat(np.arange(6), 5).tolist()
    arrays = Evaluation()
    for _ in range(2):
        # From one product, as the evaluation makes them: one of other rows rounds differently.
        arrays.update(*(each.read(0, 15).reshape(3, 5, 70) for each in in_step([base, test])))
    for name, column in arrays.columns.items():
        np.testing.assert_array_equal(evaluation.columns[name], column)
    assert evaluation.seconds > 0


def test_a_source_that_fails_midway_leaves_nothing() -> None:
    class Failing:
        name, shape, dtype, unit_rows = "failing", (5000, 2000), "float64", 1

        def read(self, start: int, stop: int) -> Any:
            if start:
                raise OSError("gone")
            return np.zeros((stop - start, 2000))

    evaluation = Evaluation()
    source: Any = Failing()
    with pytest.raises(OSError, match="gone"):
        evaluation.update(source, source)
    assert evaluation == Evaluation()


def test_one_side_may_be_an_array() -> None:
    logits = exact(HIDDEN, WEIGHT).astype(np.float32)
    found = klfast.compare(LinearLogits(HIDDEN, WEIGHT), logits, "kl")["kl"]
    assert found.shape == (3, 5)
    assert found.max() < 1e-11
    with pytest.raises(ValueError, match="axis is 0; accepted, of a LogitSource: -1"):
        klfast.compare(LinearLogits(HIDDEN, WEIGHT), logits, axis=0)
    with pytest.raises(ValueError, match=r"where has shape \(15,\) and dtype bool; accepted"):
        klfast.compare(LinearLogits(HIDDEN, WEIGHT), logits, where=np.ones(15, bool))


def test_rounded_states_keep_float32_sums() -> None:
    """Projecting bfloat16 states must not round the logits to bfloat16 before they are compared."""
    torch = pytest.importorskip("torch")
    hidden, weight = torch.from_numpy(HIDDEN).bfloat16(), torch.from_numpy(WEIGHT).bfloat16()
    expected = exact(hidden.double(), weight.double())
    found = LinearLogits(hidden, weight).read(0, 15)
    np.testing.assert_allclose(found.reshape(3, 5, 70), expected, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_rows() -> None:
    weight, chunk = np.zeros((4000, 8), np.float32), 200 * 4000 * 4
    hidden = RANDOM.standard_normal((8000, 8)).astype(np.float32)
    source = LinearLogits(hidden, weight)
    tracemalloc.start()
    evaluate(source, source, metrics=["kl"], chunk_rows=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two chunks of each side, one being made: of 40.
    assert peak < 6 * chunk


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((HIDDEN, WEIGHT[:, :30]), r"weight has shape \(70, 30\), but hidden has \(3, 5, 32\)"),
        ((HIDDEN, WEIGHT[0]), r"weight has shape \(32,\)"),
        ((HIDDEN, WEIGHT[:0]), "at least one row"),
        ((HIDDEN, WEIGHT, BIAS[1:]), r"bias has shape \(69,\); accepted: \(70,\)"),
        ((HIDDEN, WEIGHT, None, np.inf), "scale is inf; accepted: a finite number"),
        ((HIDDEN, WEIGHT, None, None, 0), "softcap is 0; accepted: a positive number"),
        ((HIDDEN.astype(int), WEIGHT), "int64"),
    ],
)
def test_refusals(arguments: Any, reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=reason):
        LinearLogits(*arguments)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all matrix products of NumPy."""
    made: list[tuple[int, ...]] = []
    matmul = np.matmul

    def noted(x: Any, y: Any, **options: Any) -> Any:
        made.append((*x.shape, y.shape[1]))
        return matmul(x, y, **options)

    monkeypatch.setattr(np, "matmul", noted)
    return made


def test_sides_with_one_head_are_one_product(products: list[tuple[int, ...]]) -> None:
    """Each with its own scale, bias and bound, and every candidate with its own states."""
    base = LinearLogits(HIDDEN, WEIGHT, BIAS, softcap=5.0)
    tests: list[Any] = [
        LinearLogits(OTHER, WEIGHT, scale=2.0),
        LinearLogits(-HIDDEN, WEIGHT[:], BIAS),
    ]
    found = evaluate(base, tests, metrics=["kl", "tv"], chunk_rows=6)
    # Of 6, 6 and 3 rows in whole tiles.
    assert products == [(3 * 16, 32, 70)] * 3
    expected = exact(HIDDEN, WEIGHT, BIAS, softcap=5.0)
    others = exact(OTHER, WEIGHT, scale=2.0), exact(-HIDDEN, WEIGHT, BIAS)
    for evaluation, other in zip(found, others, strict=True):
        for name in ("kl", "tv"):
            values = klfast.compare(expected, other, name)[name].ravel()
            np.testing.assert_allclose(evaluation.columns[name], values, rtol=2e-4)


def test_sides_with_two_heads_are_two_products(products: list[tuple[int, ...]]) -> None:
    base, test = LinearLogits(HIDDEN, WEIGHT), LinearLogits(HIDDEN, WEIGHT.copy())
    wide = LinearLogits(HIDDEN.astype(np.float64), WEIGHT)
    evaluate(base, [test, wide], metrics=["kl"])
    assert products == [(15, 32, 70)] * 3


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_model_and_itself(rows: int) -> None:
    """Equal states have equal logits, wherever they stand in a product: nothing is lost."""
    hidden = RANDOM.standard_normal((rows, 32)).astype(np.float32)
    base, test = LinearLogits(hidden, WEIGHT), LinearLogits(hidden.copy(), WEIGHT)
    assert not klfast.compare(base, test, "kl")["kl"].any()


def test_rows_that_were_read_stay() -> None:
    source = LinearLogits(HIDDEN, WEIGHT)
    first = source.read(0, 5)
    kept = first.copy()
    source.read(5, 10)
    np.testing.assert_array_equal(first, kept)


def test_a_chunk_is_bounded_by_bytes_and_rows() -> None:
    rows = []
    for width, states in ((128256, 1), (70, 4096)):
        weight = np.broadcast_to(np.float32(0), (width, states))
        hidden = np.broadcast_to(np.float32(0), (10**6, states))
        sides = [LinearLogits(hidden, weight), LinearLogits(hidden, weight)]
        rows.append(Job(sides[0], sides[1:]).chunk_rows)
    assert rows == [320, 512]


def test_any_thread_measures() -> None:
    """A worker of a cluster has several threads, and one job."""
    sides = [
        LinearLogits(HIDDEN, WEIGHT),
        LinearLogits(OTHER, WEIGHT),
        LinearLogits(OTHER, -WEIGHT),
    ]
    job = Job(sides[0], sides[1:], metrics=["kl"], chunk_rows=1)
    expected: list[Any] = job.measured(range(15))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(job.measured, [[start] for start in range(15)] * 20))
    for start, (part,) in enumerate(found):
        assert not isinstance(part, klfast.SourceError)
        for name in ("0/kl", "1/kl"):
            np.testing.assert_array_equal(part[name], expected[start % 15][name])


def test_a_file_that_several_sides_name_is_one_head(tmp_path: Path) -> None:
    for name, array in (("p", HIDDEN), ("q", OTHER), ("head", WEIGHT), ("other", WEIGHT)):
        np.save(tmp_path / f"{name}.npy", array)
    p, q, head, other = (str(tmp_path / f"{name}.npy") for name in ("p", "q", "head", "other"))
    sides: list[Any] = [open_head(p, head), open_head(q, head), open_head(q, other)]
    assert sides[0].shares_head(sides[1])
    assert not sides[0].shares_head(sides[2])
    np.save(head, -WEIGHT)  # another one of the same name
    assert not sides[0].shares_head(open_head(p, head))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_becomes_float32(dtype: str) -> None:
    """Subnormal ones, infinities and NaN too; in rows of any width, and any distance apart."""
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    numbers = np.arange(2**16, dtype=np.uint16).view(kind)
    for width in (1, 15, 16, 33, 1000):
        rows = len(numbers) // width
        table = numbers[: rows * width].reshape(rows, width)
        for stored in (table, np.pad(table, ((0, 0), (3, 2)))[:, 3 : 3 + width]):
            found = np.empty((rows, width), np.float32)
            cpu.to_float32(stored, found)
            np.testing.assert_array_equal(found, stored.astype(np.float32))

"""The accuracy that is promised, for every function, dtype and kind of row.

Kernels are held against the float64 reference on the exactly converted inputs. What they return
for dtype="float64" is compared, so that nothing is hidden by the last rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from distributions import DTYPES, Cases, cases, real_logits, rounded
from klfast.kernels.plans import plan_of
from measures import BEYOND, MEASURES, assert_right, check, computed, expected, tokens_of

import klfast
from klfast import reference
from klfast._operations import Operation

PAIRS = [(p, q) for p in DTYPES for q in DTYPES]


def pairs_of(operation: Operation, parameters: tuple[float, ...]) -> list[tuple[str, str]]:
    """Every dtype with itself, and with one other: which one, the kernel decides.

    So each kernel meets each dtype on both sides, and each pair of dtypes meets several kernels.
    A kernel reads P and Q independently of each other, and each further pair is one more to
    compile.
    """
    kernel = plan_of(operation.name, parameters).steps[0]
    names = list(DTYPES)
    shift = 1 + sum(map(ord, kernel.operation)) % 3
    others = [names[(place + shift) % 4] for place in range(4)]
    sides = (names, others) if kernel.rows == "pq" else (others, names)
    return [*zip(names, names, strict=True), *zip(*sides, strict=True)]


def mixed(operation: Operation, parameters: tuple[float, ...]) -> tuple[str, str]:
    """Two dtypes that differ, of those above, which a float32 kernel reads."""
    pairs = pairs_of(operation, parameters)
    return next((p, q) for p, q in pairs if p != q and "float64" not in (p, q))


#: One or two parameters of each function, for rows so wide that the reference takes its time.
FEW_MEASURES = [
    each for each in MEASURES if not each.values[1] or each.values[1][0] in (0.5, 0.9, 2)
]
PAIR_MEASURES = [each for each in MEASURES if each.values[0].arity == 2]
every_measure = pytest.mark.parametrize(("operation", "parameters"), MEASURES)
few_measures = pytest.mark.parametrize(("operation", "parameters"), FEW_MEASURES)


def pair_for(width: int, operation: Operation, parameters: tuple[float, ...]) -> tuple[str, str]:
    """Widths take turns with the dtypes."""
    pairs = pairs_of(operation, parameters)
    return pairs[width * 7 // 2 % len(pairs)]


# Every function, every width, every dtype


@every_measure
def test_every_pair_of_dtypes(operation: Operation, parameters: tuple[float, ...]) -> None:
    for dtypes in pairs_of(operation, parameters):
        check(operation, parameters, cases(517, *dtypes))


@every_measure
def test_every_width_to_300(operation: Operation, parameters: tuple[float, ...]) -> None:
    for width in range(1, 301):
        check(
            operation, parameters, cases(width, *pair_for(width, operation, parameters), one_in=4)
        )


@every_measure
def test_widths_around_a_tile(operation: Operation, parameters: tuple[float, ...]) -> None:
    for width in (1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 6145):
        check(
            operation, parameters, cases(width, *pair_for(width, operation, parameters), one_in=2)
        )


@few_measures
@pytest.mark.parametrize("width", [32767, 32768, 32769, 65535, 65537, 98304])
def test_widths_around_a_part(
    width: int, operation: Operation, parameters: tuple[float, ...]
) -> None:
    check(operation, parameters, cases(width, "float32", one_in=11))


@few_measures
@pytest.mark.parametrize(
    ("width", "dtype"), [(32000, None), (128256, "bfloat16"), (151936, "float32"), (262144, None)]
)
def test_vocabularies_of_language_models(
    width: int, dtype: str | None, operation: Operation, parameters: tuple[float, ...]
) -> None:
    dtypes = mixed(operation, parameters) if dtype is None else (dtype, dtype)
    check(operation, parameters, cases(width, *dtypes, one_in=19))


@pytest.mark.slow
@every_measure
@pytest.mark.parametrize("width", [32767, 65537, 151936])
def test_wide_rows_of_every_kind(
    width: int, operation: Operation, parameters: tuple[float, ...]
) -> None:
    dtypes = pair_for(width, operation, parameters)
    check(operation, parameters, cases(width, *dtypes, one_in=2 if width < 1e5 else 10))


@every_measure
@pytest.mark.parametrize("test", ["int8", "int4"])
def test_real_logits(test: str, operation: Operation, parameters: tuple[float, ...]) -> None:
    names, p, q = real_logits(test)
    check(operation, parameters, Cases(names[::4], p[::4], q[::4]))


def test_reverse_kl_beside_kl_where_q_hardly_has_what_p_has() -> None:
    """The reverse KL of such a row is a small share of the terms of KL that it is summed with."""
    p = np.array([[57.55093, 45.864517, 123.85, 120.21582, 35.691162]], np.float32)
    q = np.array([[46.05071, 35.233406, 138.87283, 117.72908, 32.969456]], np.float32)
    found = klfast.compare(p, q, ("kl", "reverse_kl"), dtype="float64")
    np.testing.assert_allclose(found["kl"], reference.kl_divergence(p, q), rtol=2e-6)
    np.testing.assert_allclose(found["reverse_kl"], reference.kl_divergence(q, p), rtol=2e-6)


# Every way to hand over rows


@few_measures
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_long_rows_are_cut_and_many_are_not(
    dtype: str, operation: Operation, parameters: tuple[float, ...]
) -> None:
    """Rows wider than 32768 are cut where they are fewer than 64, and the parts are merged."""
    found = cases(32768 + 77, dtype, one_in=13)
    times = -(-64 // len(found.names))
    many = Cases(
        found.names * times,
        np.broadcast_to(found.p, (times, *found.p.shape)),
        np.broadcast_to(found.q, (times, *found.q.shape)),
    )
    truth = expected(operation, parameters, found.p, found.q)
    assert_right(operation, found, computed(operation, parameters, found.p, found.q), truth)
    tokens = np.broadcast_to(tokens_of(found.p), (times, len(found.names)))
    got = computed(operation, parameters, many.p, many.q, tokens=tokens)
    for each in got:
        np.testing.assert_array_equal(each, got[0])
    assert_right(operation, found, got[0], truth)


def strided(x: Any, layout: str) -> Any:
    """The same rows, laid out otherwise in memory."""
    if layout == "every third entry":
        return np.repeat(x, 3, axis=-1)[:, ::3]
    if layout == "backwards":
        return np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    if layout == "by columns":
        return np.asfortranarray(x)
    if layout == "with a gap after each row":
        return np.concatenate([x, x], axis=-1)[:, : x.shape[1]]
    records = np.zeros(x.shape, [("a", x.dtype), ("x", x.dtype), ("b", x.dtype)])
    records["x"] = x
    return records["x"]


EQUAL = (("float32", "float32"), ("float64", "float64"))
LAYOUTS = (
    "every third entry", "backwards", "by columns", "with a gap after each row",
    "a field of records",
)  # fmt: skip


@every_measure
def test_strides(operation: Operation, parameters: tuple[float, ...]) -> None:
    for layout in LAYOUTS:
        for dtypes in (*EQUAL, mixed(operation, parameters)):
            found = cases(70, *dtypes)
            p, q = strided(found.p, layout), strided(found.q, layout)
            truth = expected(operation, parameters, found.p, found.q)
            got = computed(operation, parameters, p, q)
            assert_right(operation, found, got, truth)
            got = computed(operation, parameters, p.T, q.T, axis=0, tokens=tokens_of(found.p))
            assert_right(operation, found, got, truth)


@every_measure
def test_strides_of_rows_wider_than_what_is_staged(
    operation: Operation, parameters: tuple[float, ...]
) -> None:
    found = cases(2100, "float32", "float64")
    p, q = strided(found.p, "backwards"), strided(found.q, "by columns")
    truth = expected(operation, parameters, found.p, found.q)
    assert_right(operation, found, computed(operation, parameters, p, q), truth)


@pytest.mark.parametrize(("operation", "parameters"), PAIR_MEASURES)
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_every_row_of_p_against_every_row_of_q(
    dtype: str | None, operation: Operation, parameters: tuple[float, ...]
) -> None:
    """And so broadcasting: each array is repeated along one axis of the batch."""
    dtypes = mixed(operation, parameters) if dtype is None else (dtype, dtype)
    names, p, q = cases(60, *dtypes)
    tokens = np.arange(len(names)) % 60
    got = computed(operation, parameters, p[:, None], q, tokens=tokens)
    truth = expected(operation, parameters, p[:, None], q, tokens=tokens)
    found = Cases(
        tuple(f"{one} (p) against {other} (q)" for one in names for other in names),
        np.repeat(p, len(names), axis=0),
        np.tile(q, (len(names), 1)),
    )
    all_tokens = np.tile(tokens, len(names))
    assert_right(operation, found, got.ravel(), truth.ravel(), tokens=all_tokens)


@pytest.mark.parametrize(("operation", "parameters"), PAIR_MEASURES)
def test_one_row_against_many(operation: Operation, parameters: tuple[float, ...]) -> None:
    """It is not copied, and is what a copy of it would be."""
    names, p, q = cases(90)
    row = names.index("independent, scale 1")
    tokens = tokens_of(p)
    copies = np.repeat(p[row : row + 1], len(names), axis=0)
    for given, copied in (((p[row], q), (copies, q)), ((q, p[row]), (q, copies))):
        np.testing.assert_array_equal(
            computed(operation, parameters, given[0], given[1], tokens=tokens),
            computed(operation, parameters, copied[0], copied[1], tokens=tokens),
        )


@every_measure
@pytest.mark.parametrize("width", [90, 33000])
def test_where_reads_only_the_rows_that_it_keeps(
    width: int, operation: Operation, parameters: tuple[float, ...]
) -> None:
    found = cases(width, one_in=1 if width < 1000 else 8)
    keep = np.arange(len(found.names)) % 3 != 1
    got = computed(operation, parameters, found.p, found.q, where=keep)
    assert np.isnan(got[~keep]).all()
    alone = computed(
        operation, parameters, found.p[keep], found.q[keep], tokens=tokens_of(found.p)[keep]
    )
    np.testing.assert_array_equal(got[keep], alone)


def own_temperature(operation: Operation, temperature: Any) -> Any:
    """Of a pair of temperatures, the one of the only row."""
    if operation.arity == 2 or not isinstance(temperature, tuple):
        return temperature
    return temperature["pq".index(operation.rows)]


@every_measure
@pytest.mark.parametrize("temperature", [0.7, 3.0, 1e-3, (0.7, 1.3)])
def test_temperature(temperature: Any, operation: Operation, parameters: tuple[float, ...]) -> None:
    temperature = own_temperature(operation, temperature)
    for dtypes in (EQUAL[0], mixed(operation, parameters), ("float64", "float32")):
        check(operation, parameters, cases(200, *dtypes), temperature=temperature)


@every_measure
def test_vocab_size(operation: Operation, parameters: tuple[float, ...]) -> None:
    """What is beyond it is not read, and the widths may differ."""
    found = cases(130)
    tokens = tokens_of(found.p)
    p, q = (
        np.pad(x, ((0, 0), (0, n)), constant_values=np.nan)
        for x, n in zip((found.p, found.q), (1, 30), strict=True)
    )
    truth = expected(operation, parameters, found.p, found.q)
    got = computed(operation, parameters, p, q, vocab_size=130, tokens=tokens)
    assert_right(operation, found, got, truth)


@every_measure
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs(dtype: str, operation: Operation, parameters: tuple[float, ...]) -> None:
    """They are logits like others, normalized again."""
    check(operation, parameters, cases(200, dtype), input="log_probs")


@every_measure
@pytest.mark.parametrize("temperature", [1.0, 0.9, (0.9, 1.1)])
def test_probs(temperature: Any, operation: Operation, parameters: tuple[float, ...]) -> None:
    temperature = own_temperature(operation, temperature)
    for dtypes in PAIRS:
        check(operation, parameters, weights(200, *dtypes), input="probs", temperature=temperature)


@cache
def weights(width: int, dtype_p: str, dtype_q: str) -> Cases:
    """Probabilities, also with zeros, not normalized, and rows that are none."""
    rng = np.random.default_rng(width)
    w, v = rng.dirichlet(np.ones(width), size=2)
    noise = rng.normal(size=width)
    zeros = np.where(np.arange(width) % 3 == 1, 0.0, w)
    pairs = {
        "independent": (w, v),
        "peaked": (w**8 * 1e12, v**8 * 1e12),
        "identical": (w, w),
        "near by 1e-2": (w, w * (1 + 1e-2 * noise)),
        "near by 1e-6": (w, w * (1 + 1e-6 * noise)),
        "near, but for a factor": (w, w * (1 + 1e-3 * noise) * 3.7),
        "zeros in p": (zeros, v),
        "zeros in q": (v, zeros),
        "zeros in both": (zeros, zeros * (1 + 1e-3 * noise)),
        "a negative weight": (np.where(noise == noise.max(), -w, w), v),
        "all zeros": (0 * w, v),
    }
    p = np.stack([rounded(x, dtype_p) for x, _ in pairs.values()])
    q = np.stack([rounded(y, dtype_q) for _, y in pairs.values()])
    return Cases(tuple(pairs), p, q)


# What is not one value a row of one function


@pytest.mark.parametrize("width", [1, 90, 2049, 33000])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")], ids="/".join)
def test_compare_has_the_same_values(width: int, dtypes: tuple[str, str]) -> None:
    """In blocks of rows, or row by row where there are few long ones."""
    found = cases(width, *dtypes, one_in=1 if width < 30000 else 8)
    measured = {
        ":".join([operation.name, *map(repr, parameters)]): (operation, parameters)
        for operation, parameters in (each.values for each in FEW_MEASURES)
        if operation.metric and not (operation.name == "topk_overlap" and parameters[0] > width)
    }
    result = klfast.compare(
        found.p,
        found.q,
        list(measured),
        targets=tokens_of(found.p),
        dtype="float64",
        backend="cpu",
    )
    for metric, (operation, parameters) in measured.items():
        truth = expected(operation, parameters, found.p, found.q)
        assert_right(operation, found, result[metric], truth)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 90, 2047, 2048, 2049, 33000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax(dtype: str, width: int) -> None:
    names, p, _ = cases(width, dtype, one_in=1 if width < 1000 else 8)
    truth = reference.log_softmax(p)
    size = np.abs(truth)
    relative, below = (1e-13, 1e-20) if dtype == "float64" else (2e-6, 1e-11)
    for result in ("float32", "float64"):
        got = klfast.log_softmax(p, dtype=result, backend="cpu").astype(np.float64)
        smallest = 1e-20 if dtype == "float64" else 1e-6
        last = 2.0**-24 if result == "float32" else 0.0
        with np.errstate(all="ignore"):
            allowed = np.where(size > smallest, relative * size, below) + last * size
            right = (got == truth) | (np.isnan(got) & np.isnan(truth))
            right |= np.isfinite(truth) & (np.abs(got - truth) <= allowed)
            right |= (size > (3.4e38 if result == "float32" else BEYOND)) & np.isinf(got)
        wrong = [names[row] for row in np.flatnonzero(~right.all(axis=-1))]
        assert not wrong, (result, wrong)


@pytest.mark.parametrize("level", [1e5, -1e5])
def test_logsumexp_of_large_logits(level: float) -> None:
    """Of float32 logits near 1e5 a float64 result is right to far more than their spacing."""
    x = (level + np.random.default_rng(3).standard_normal((2, 3000))).astype(np.float32)
    found = klfast.logsumexp(x, dtype=np.float64)
    np.testing.assert_allclose(found, reference.logsumexp(x), rtol=1e-12)

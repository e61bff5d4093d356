"""Laws that hold for every input, as Hypothesis properties of the compiled kernels.

Those of the reference are in test_reference.py. Values are taken as float64. A law that rounding
may bend is held to twice the error that a value may have.

Examples are the same in every run. KLFAST_EXAMPLES=5000 looks for new ones instead.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from distributions import DTYPES, Cases, rounded
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from measures import MEASURES, assert_right, computed, expected, tokens_of
from numpy.typing import NDArray

import klfast
from klfast import reference
from klfast._operations import OPERATIONS, Operation

INF = math.inf
WANTED = int(os.environ.get("KLFAST_EXAMPLES", "0"))
#: Of these a value is 0 exactly where the rows are equal, and positive elsewhere.
DIVERGENCES = {
    name: OPERATIONS[name]
    for name in (
        "kl", "reverse_kl", "jeffreys", "js", "renyi", "alpha", "tsallis", "tv", "hellinger2",
        "chi2",
    )
}  # fmt: skip
SYMMETRIC = [operation for operation in DIVERGENCES.values() if operation.symmetric]

Row = NDArray[np.float64]


def law(examples: int) -> settings:
    """Check a property on so many examples."""
    return settings(
        max_examples=WANTED or examples, derandomize=not WANTED, deadline=None, database=None
    )


class Pair(NamedTuple):
    """Two rows in their dtypes, each as a batch of one."""

    p: Any
    q: Any

    @property
    def rough(self) -> float:
        """Twice the relative error that a divergence of them may have."""
        return 2e-13 if "float64" in (self.p.dtype, self.q.dtype) else 4e-6


#: Only Q has the first symbol.
ONE_SIDED = Pair(np.array([[-INF, 0.0]], np.float16), np.array([[0.0, 0.0]], np.float16))

dtypes = st.sampled_from(tuple(DTYPES))
#: Two that a float32 kernel reads are the same: test_agreement has the others, and each pair is a
#: kernel more to compile.
dtype_pairs = st.sampled_from(
    [(p, q) for p in DTYPES for q in DTYPES if p == q or "float64" in (p, q)]
)
logits = st.floats(-90, 90, width=32)


@st.composite
def pairs(draw: Any, masks: bool = True, entries: Any = logits, both: Any = dtype_pairs) -> Pair:
    """Rows that are equal, near or unrelated, of which entries may be -inf."""
    width = draw(st.integers(1, 40))
    x = draw(hnp.arrays(np.float64, width, elements=entries))
    kind = draw(st.sampled_from(("near", "other", "equal")))
    if kind == "other":
        y = draw(hnp.arrays(np.float64, width, elements=entries))
    else:
        step = 0.0 if kind == "equal" else 10.0 ** draw(st.integers(-7, 0))
        y = x + step * draw(hnp.arrays(np.float64, width, elements=st.floats(-1, 1, width=16)))
    of_p, of_q = draw(both)
    rows = rounded(x, of_p)[None], rounded(y, of_q)[None]
    if masks:
        for row in rows:
            masked = draw(st.sets(st.integers(0, width - 1), max_size=width - 1))
            row[0, sorted(masked)] = -INF
    return Pair(*rows)


@st.composite
def divergences(draw: Any) -> tuple[Operation, tuple[float, ...]]:
    """A divergence, with any parameter that it accepts."""
    operation = draw(st.sampled_from(tuple(DIVERGENCES.values())))
    if not operation.parameters:
        return operation, ()
    values = {"weight": st.floats(0, 1), "alpha": st.floats(0, 30) | st.sampled_from([0.5, 1.0])}
    return operation, (draw(values[operation.parameters[0].name]),)


def value(name: str, pair: Pair, *parameters: float) -> float:
    return float(computed(OPERATIONS[name], parameters, *pair)[0])


def assert_not_above(smaller: float, larger: float, rough: float) -> None:
    assert smaller <= larger * (1 + rough) + 1e-16


# Signs, zeros and bounds


@law(400)
@given(pairs(), divergences())
@example(Pair(*ONE_SIDED[::-1]), (OPERATIONS["js"], (2e-309,)))
def test_a_divergence_is_not_negative(
    pair: Pair, divergence: tuple[Operation, tuple[float, ...]]
) -> None:
    assert computed(divergence[0], divergence[1], *pair)[0] >= 0


@law(400)
@given(pairs(), divergences(), dtypes)
def test_it_is_0_where_the_rows_are_equal(
    pair: Pair, divergence: tuple[Operation, tuple[float, ...]], dtype: str
) -> None:
    assume(pair.p.dtype == DTYPES[dtype] or "float64" in (pair.p.dtype, dtype))
    same = pair.p.astype(DTYPES[dtype])
    assume((same.astype(np.float64) == pair.p.astype(np.float64)).all())
    assert computed(divergence[0], divergence[1], pair.p, same)[0] == 0
    assert computed(divergence[0], divergence[1], same, pair.p)[0] == 0


@law(300)
@given(pairs())
def test_it_is_not_0_where_they_differ(pair: Pair) -> None:
    truth = float(expected(OPERATIONS["tv"], (), *pair)[0])
    assume(truth > 1e-6)
    for name, operation in DIVERGENCES.items():
        if not operation.parameters:
            assert value(name, pair) > 0


@law(500)
@given(pairs(), st.sampled_from(MEASURES))
def test_bounds(pair: Pair, measure: Any) -> None:
    operation, parameters = measure.values
    width = pair.p.shape[-1]
    assume(operation.name != "topk_overlap" or parameters[0] <= width)
    lower, upper = operation.bounds(parameters, width)
    got = float(computed(operation, parameters, *pair)[0])
    # Rounding may go past the others.
    rough = pair.rough if operation.arity == 2 else 4e-6
    exact = upper in (0.0, 1.0) or (operation.name, parameters) == ("js", (0.5,))
    slack = 0.0 if exact else rough * upper
    assert lower - rough * abs(lower) <= got
    assert got <= upper + (slack if math.isfinite(upper) else 0.0)


# What may be done to the rows


@law(400)
@given(pairs(), st.sampled_from(SYMMETRIC))
def test_exchanging_the_rows_changes_no_bit(pair: Pair, operation: Operation) -> None:
    parameters = tuple(each.default for each in operation.parameters if each.default is not None)
    there = computed(operation, parameters, pair.p, pair.q)
    assert there[0] == computed(operation, parameters, pair.q, pair.p)[0]


@pytest.mark.parametrize("width", [2048, 33000, 70000])
@pytest.mark.parametrize("operation", SYMMETRIC, ids=lambda each: each.name)
def test_exchanging_wide_rows_changes_no_bit(operation: Operation, width: int) -> None:
    parameters = tuple(each.default for each in operation.parameters if each.default is not None)
    rng = np.random.default_rng(width)
    x = rng.normal(size=(3, width)) * np.array([[1], [10], [70]])
    y = x + rng.normal(size=x.shape) * np.array([[1e-5], [0.1], [10]])
    for p in (rounded(x, "float32"), rounded(x, "bfloat16")):
        q = rounded(y, "float32")
        there, back = (computed(operation, parameters, *each) for each in ((p, q), (q, p)))
        np.testing.assert_array_equal(there, back)


@law(200)
@given(pairs(), st.floats(0, 1))
def test_exchanging_the_rows_exchanges_the_weights(pair: Pair, weight: float) -> None:
    assume(1 - (1 - weight) == weight)
    swapped = value("js", Pair(pair.q, pair.p), 1 - weight)
    assert value("js", pair, weight) == pytest.approx(swapped, rel=pair.rough, abs=2e-17)


eighths = st.integers(-400, 400).map(lambda n: n / 8)


@law(300)
@given(
    pairs(entries=eighths, both=st.tuples(*[st.sampled_from(["float32", "float64"])] * 2)),
    divergences(),
    st.integers(-2000, 2000),
    st.integers(-2000, 2000),
)
def test_a_constant_changes_nothing(
    pair: Pair, divergence: tuple[Operation, tuple[float, ...]], for_p: int, for_q: int
) -> None:
    """Eighths stay exact when a whole number is added; differences smaller than that do not."""
    eighth = [(np.round(row.astype(np.float64) * 8) / 8).astype(row.dtype) for row in pair]
    moved = [
        (row + constant).astype(row.dtype)
        for row, constant in zip(eighth, (for_p, for_q), strict=True)
    ]
    got = computed(*divergence, *moved)[0]
    before = computed(*divergence, *eighth)[0]
    growth = max(1.0, math.log(before) / 50) if 1 < before < INF else 1.0
    assert got == pytest.approx(before, rel=pair.rough * growth, abs=2e-17)


@law(300)
@given(pairs(), divergences(), st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(
    pair: Pair, divergence: tuple[Operation, tuple[float, ...]], random: Any
) -> None:
    order = list(range(pair.p.shape[-1]))
    random.shuffle(order)
    before = computed(*divergence, *pair)[0]
    got = computed(*divergence, pair.p[:, order], pair.q[:, order])[0]
    growth = max(1.0, math.log(before) / 50) if 1 < before < INF else 1.0
    below = 2e-11 if divergence[0].name == "tv" else 2e-17
    assert got == pytest.approx(before, rel=pair.rough * growth, abs=below)


# What happens when a parameter changes


@law(200)
@example(ONE_SIDED, [5e-324, 1.0])
@given(pairs(), st.lists(st.floats(0, 50) | st.sampled_from([0.5, 1.0, INF]), min_size=2))
def test_renyi_does_not_decrease_in_alpha(pair: Pair, orders: list[float]) -> None:
    values = [value("renyi", pair, alpha) for alpha in sorted(orders)]
    for low, high in pairwise(values):
        assert_not_above(low, high, pair.rough)


@law(300)
@given(pairs(masks=False), st.integers(-16, -1).map(lambda n: 10.0**n), st.booleans())
def test_orders_near_1_are_near_kl(pair: Pair, step: float, above: bool) -> None:
    """Log-ratios in a range R bound the slope of the Rényi divergence in alpha by R**2 / 8."""
    alpha = 1 + step if above else 1 - step
    d = np.subtract(*(reference.log_softmax(row) for row in pair))
    slack = 1.001 * abs(alpha - 1) * np.ptp(d) ** 2 / 8
    kl = value("kl", pair)
    assert value("renyi", pair, alpha) == pytest.approx(kl, rel=pair.rough, abs=slack + 2e-17)
    if abs(alpha - 1) * max(kl, 1) < 1e-3:
        got = value("tsallis", pair, alpha)
        slack = 2 * slack + abs(alpha - 1) * kl**2
        assert got == pytest.approx(kl, rel=pair.rough, abs=slack + 2e-17)
        slack += 2 * abs(alpha - 1) * kl
        got = value("alpha", pair, alpha)
        assert got == pytest.approx(kl, rel=pair.rough, abs=slack + 2e-17)


@law(300)
@given(pairs(masks=False), st.integers(-300, -1).map(lambda n: 10.0**n))
def test_weights_near_0_and_1(pair: Pair, step: float) -> None:
    """JS is at most w (1 - w) times the Jeffreys divergence, and 0 at both ends."""
    jeffreys = value("jeffreys", pair)
    for weight in (step, 1 - step):
        bound = weight * (1 - weight) * jeffreys
        assert_not_above(value("js", pair, weight), bound, 2 * pair.rough)
    assert value("js", pair, 0.0) == value("js", pair, 1.0) == 0


# Data processing


@law(300)
@given(st.data(), divergences(), dtypes)
def test_merging_two_symbols_increases_nothing(
    data: Any, divergence: tuple[Operation, tuple[float, ...]], dtype: str
) -> None:
    """Whole numbers as weights, so that their sum is exact."""
    width = data.draw(st.integers(2, 20))
    rows = hnp.arrays(np.float64, (2, 1, width), elements=st.integers(0, 100).map(float))
    p, q = data.draw(rows)
    assume(p.any() and q.any())
    i, j = data.draw(st.lists(st.integers(0, width - 1), min_size=2, max_size=2, unique=True))
    fewer = [np.delete(row, j, axis=-1) for row in (p, q)]
    for row, before in zip(fewer, (p, q), strict=True):
        row[0, i - (j < i)] = before[0, i] + before[0, j]
    kind = DTYPES[dtype]
    merged, whole = (
        computed(*divergence, *(row.astype(kind) for row in each), input="probs")[0]
        for each in (fewer, (p, q))
    )
    assert_not_above(merged, whole, 1e-12)


@law(200)
@given(pairs(masks=False, entries=st.floats(-8, 8, width=32)), divergences())
def test_merging_two_logits_increases_nothing(
    pair: Pair, divergence: tuple[Operation, tuple[float, ...]]
) -> None:
    """In float32 and the narrow dtypes; that the merged logit is rounded changes it a little."""
    assume(pair.p.shape[-1] > 1)
    kind = np.float32
    p, q = (row.astype(kind) for row in pair)
    fewer = [row[:, 1:].copy() for row in (p, q)]
    for row, before in zip(fewer, (p, q), strict=True):
        row[0, 0] = np.logaddexp(*before.astype(np.float64)[0, :2])
    operation, (order, *_) = divergence[0], (*divergence[1], 1.0)
    whole = computed(*divergence, p, q)[0]
    merged = computed(*divergence, *fewer)[0]
    # d/dx of the logarithm of any of them is at most about the order times the spread of d.
    slack = 2.0**-24 * 9 * 2 * max(order, 1.0) * (whole + 40) if operation.name != "chi2" else INF
    if operation.name in ("alpha", "tsallis"):
        slack *= whole + 1
    assert merged <= whole * (1 + 4e-6) + slack


# The same rows, otherwise laid out and cut


@law(30)
@given(
    st.integers(32769, 120000),
    st.integers(0, 2**32),
    st.sampled_from([1e-6, 1e-3, 0.1, 5.0]),
    st.sampled_from([1.0, 10.0, 70.0]),
    st.sampled_from(MEASURES),
)
def test_the_parts_of_a_row_make_the_whole(
    width: int, seed: int, step: float, scale: float, measure: Any
) -> None:
    """Few long rows are cut, many are not."""
    operation, parameters = measure.values
    rng = np.random.default_rng(seed)
    x = rng.normal(size=width).astype(np.float32) * np.float32(scale)
    x += np.linspace(0, rng.normal() * 20, width, dtype=np.float32)
    y = (x + step * rng.normal(size=width)).astype(np.float32)
    token = int(rng.integers(width))
    names = ("a row that is cut",)
    cut = computed(operation, parameters, x[None], y[None], tokens=[token])
    many = [np.broadcast_to(row, (64, width)) for row in (x, y)]
    whole = computed(operation, parameters, many[0], many[1], tokens=np.full(64, token))
    assert (whole == whole[0]).all()
    found = Cases(names, x[None], y[None])
    truth = expected(operation, parameters, x[None], y[None], tokens=np.array([token]))
    assert_right(operation, found, cut, truth, tokens=np.array([token]))
    assert_right(operation, found, whole[:1], truth, tokens=np.array([token]))


@law(400)
@given(st.data(), dtype_pairs, st.sampled_from(MEASURES))
def test_any_shape_axis_and_stride(data: Any, both: tuple[str, str], measure: Any) -> None:
    operation, parameters = measure.values
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=9))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    assume(operation.name != "topk_overlap" or parameters[0] <= shape[axis])
    seed = data.draw(st.integers(0, 2**32))
    scale = data.draw(st.sampled_from([0.1, 1.0, 10.0, 80.0]))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * scale
    y = x + rng.normal(size=shape) * data.draw(st.sampled_from([1e-6, 1e-3, 1.0, 30.0]))
    p = data.draw(layouts(rounded(x, both[0])))
    q = data.draw(layouts(rounded(y, both[1])))
    batch = tuple(np.delete(shape, axis))
    tokens = rng.integers(shape[axis], size=batch)
    got = computed(operation, parameters, p, q, tokens=tokens, axis=axis)
    truth = expected(operation, parameters, p, q, tokens=tokens, axis=axis)
    assert got.shape == truth.shape == batch
    flat = (np.moveaxis(each, axis, -1).reshape(-1, shape[axis]) for each in (p, q))
    names = tuple(map(str, range(truth.size)))
    assert_right(operation, Cases(names, *flat), got.ravel(), truth.ravel(), tokens=tokens.ravel())


@st.composite
def layouts(draw: Any, x: Any) -> Any:
    """The same array, of which each axis has a stride of its own, maybe negative."""
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 2, 3, -1, -2])] * x.ndim))
    order = draw(st.permutations(range(x.ndim)))
    memory = np.zeros([n * abs(step) for n, step in zip(x.shape, steps, strict=True)], x.dtype)
    memory = np.ascontiguousarray(memory.transpose(order)).transpose(np.argsort(order))
    view = memory[tuple(slice(None, None, step) for step in steps)]
    view[...] = x
    return view


@pytest.mark.parametrize(("operation", "parameters"), MEASURES)
def test_the_number_of_threads_changes_no_bit(
    operation: Operation, parameters: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(1)
    before = klfast.get_num_threads()
    try:
        for shape in ((2, 150000), (200, 3000)):
            p = rng.normal(size=shape).astype(np.float32)
            q = (p + 0.1 * rng.normal(size=shape)).astype(np.float32)
            values = []
            for threads in (1, 2, 3):
                klfast.set_num_threads(threads)
                values.append(computed(operation, parameters, p, q, tokens=tokens_of(p)))
            for each in values[1:]:
                np.testing.assert_array_equal(each, values[0])
    finally:
        klfast.set_num_threads(before)

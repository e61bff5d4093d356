"""The accuracy that is promised, on a device: from the host's arrays, and from the device's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from distributions import Cases, cases, real_logits
from measures import MEASURES, assert_right, check, computed, expected, tokens_of

import klfast
from klfast import reference
from klfast._operations import Operation

#: One or two parameters of each function: the kernels' own tests have them all.
FEW_MEASURES = [
    each for each in MEASURES if not each.values[1] or each.values[1][0] in (0.5, 0.9, 2)
]
#: One function of each kernel.
FEWER = [each for each in FEW_MEASURES if each.id in ("kl", "js:0.5", "entropy", "renyi:0.9")]
PAIRS = [("float32", "float32"), ("bfloat16", "float16"), ("float64", "float64")]
few_measures = pytest.mark.parametrize(("operation", "parameters"), FEW_MEASURES)
fewer_measures = pytest.mark.parametrize(("operation", "parameters"), FEWER)


def check_there(
    device: Any, operation: Operation, parameters: tuple[float, ...], found: Cases, **how: Any
) -> None:
    """Of arrays on the device."""
    tokens = tokens_of(found.p)
    p, q = (device.asarray(x) for x in (found.p, found.q))
    got = computed(operation, parameters, p, q, tokens, backend="auto", **how)
    truth = expected(operation, parameters, found.p, found.q, tokens, **how)
    assert_right(operation, found, got, truth, **how)


@few_measures
def test_every_pair_of_dtypes(
    device: Any, operation: Operation, parameters: tuple[float, ...]
) -> None:
    for dtypes in PAIRS:
        check(operation, parameters, cases(117, *dtypes, one_in=3), backend="cuda")


@fewer_measures
@pytest.mark.parametrize("width", [1, 2, 31, 33, 2049])
def test_short_and_long_rows(
    width: int, device: Any, operation: Operation, parameters: tuple[float, ...]
) -> None:
    if operation.name == "topk_overlap" and parameters[0] > width:
        return
    found = cases(width, "float32", one_in=5)
    check_there(device, operation, parameters, found)


@fewer_measures
def test_real_logits(device: Any, operation: Operation, parameters: tuple[float, ...]) -> None:
    names, p, q = real_logits("int8")
    check_there(device, operation, parameters, Cases(names[::16], p[::16], q[::16]))


@fewer_measures
def test_few_long_rows_are_cut(
    device: Any, operation: Operation, parameters: tuple[float, ...]
) -> None:
    check_there(device, operation, parameters, cases(9001, "float32", one_in=17))


@fewer_measures
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": (0.7, 1.3)}, {"input": "log_probs"}],
    ids=["temperature", "temperatures", "log_probs"],
)
def test_options(
    options: dict[str, Any], device: Any, operation: Operation, parameters: tuple[float, ...]
) -> None:
    temperature = options.get("temperature")
    if isinstance(temperature, tuple) and operation.arity == 1:
        options = {"temperature": temperature["pq".index(operation.rows)]}
    check_there(device, operation, parameters, cases(90, "float32", one_in=4), **options)


@fewer_measures
def test_rows_that_do_not_begin_at_multiples_of_16_bytes(
    device: Any, operation: Operation, parameters: tuple[float, ...]
) -> None:
    """In both at the same entries, or not."""
    found = cases(67, "float32", one_in=3)
    tokens = tokens_of(found.p)
    truth = expected(operation, parameters, found.p, found.q, tokens)
    for skew_p, skew_q in ((3, 3), (3, 1)):
        p, q = (
            device.asarray(np.pad(x, ((0, 0), (skew, 4 - skew))))[:, skew : skew + 67]
            for x, skew in ((found.p, skew_p), (found.q, skew_q))
        )
        got = computed(operation, parameters, p, q, tokens, backend="auto")
        assert_right(operation, found, got, truth)


@pytest.mark.parametrize(
    ("width", "dtypes"),
    [(90, ("float32", "float32")), (2049, ("bfloat16", "float32"))],
    ids=["90-float32/float32", "2049-bfloat16/float32"],
)
def test_compare_has_the_same_values(width: int, dtypes: tuple[str, str], device: Any) -> None:
    found = cases(width, *dtypes, one_in=1 if width < 1000 else 5)
    measured = {
        ":".join([operation.name, *map(repr, parameters)]): (operation, parameters)
        for operation, parameters in (each.values for each in FEW_MEASURES)
        if operation.metric
    }
    tokens = tokens_of(found.p)
    result = klfast.compare(
        device.asarray(found.p), device.asarray(found.q), list(measured), targets=tokens,
        dtype="float64",
    )  # fmt: skip
    for metric, (operation, parameters) in measured.items():
        truth = expected(operation, parameters, found.p, found.q)
        assert_right(operation, found, result[metric].get(), truth)


@pytest.mark.parametrize("name", ["js", "tv", "hellinger2", "jeffreys"])
def test_symmetric_divergences_have_the_same_bits_both_ways(name: str, device: Any) -> None:
    p, q = (device.asarray(x) for x in cases(130, "float32")[1:])
    one, other = (
        klfast.compare(*pair, name, dtype="float64")[name].get() for pair in ((p, q), (q, p))
    )
    np.testing.assert_array_equal(one, other)


@few_measures
def test_equal_rows_are_exactly_equal(
    device: Any, operation: Operation, parameters: tuple[float, ...]
) -> None:
    if operation.arity == 1 or operation.name in (
        *("cross_entropy", "same_top", "topk_overlap", "delta_prob"),
    ):
        return
    _, p, _ = cases(130, "float16", one_in=2)
    finite = np.isfinite(p.astype(np.float64)).all(axis=-1)
    p = p[finite]
    same = device.asarray(p), device.asarray(p.astype(np.float32))
    got = computed(operation, parameters, *same, tokens_of(p), backend="auto")
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("width", [1, 90, 2049])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_log_softmax(dtype: str, width: int, device: Any) -> None:
    names, p, _ = cases(width, dtype, one_in=1 if width < 1000 else 5)
    truth = reference.log_softmax(p)
    got = klfast.log_softmax(device.asarray(p), dtype="float64").get()
    size = np.abs(truth)
    relative, below, smallest = (1e-13, 1e-20, 1e-20) if dtype == "float64" else (2e-6, 1e-11, 1e-6)
    with np.errstate(all="ignore"):
        allowed = np.where(size > smallest, relative * size, below)
        right = (got == truth) | (np.isnan(got) & np.isnan(truth))
        right |= np.isfinite(truth) & (np.abs(got - truth) <= allowed)
        right |= (size > 1e307) & np.isinf(got)
    assert not [names[row] for row in np.flatnonzero(~right.all(axis=-1))]


def test_how_rows_are_cut(device: Any) -> None:
    """By shape and device alone: few long rows, in parts that all multiprocessors get some of."""
    launches = import_module("klfast.kernels.cuda.launches")
    machine = import_module("klfast.kernels.cuda.loader").machine(0)
    for count in (1, 2, 7, machine.multiprocessors, 10 * machine.multiprocessors):
        for width in (1, 2048, 2049, 5000, 128_256, 1 << 20):
            team, parts, part_width = launches.cut(0, count, width)
            assert team == (32 if width <= 2048 else launches.THREADS)
            assert (parts - 1) * part_width < width <= parts * part_width
            assert parts == 1 or part_width % 64 == 0
            if count >= 2 * machine.multiprocessors:
                assert parts == 1
    assert launches.cut(0, 1, 1 << 20).parts >= 2 * machine.multiprocessors

"""The laws of tests/test_properties.py on a device, and on its twin on few small examples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_properties
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measures import MEASURES, computed
from test_properties import SYMMETRIC, divergences, pairs

from klfast._operations import OPERATIONS

#: All that Hypothesis draws examples for.
LAWS = {
    name.removeprefix("test_"): law
    for name, law in vars(test_properties).items()
    if hasattr(law, "hypothesis")
}

# What the twin computes: of each kernel one operation or two, since each of them takes seconds to
# compile, in float32 and in float64.
NAMES = ("kl", "js", "tv", "renyi")
few_dtypes = st.sampled_from(["float32", "float64"])
few_pairs = pairs(both=few_dtypes.map(lambda name: (name, name)))
few_divergences = divergences().filter(lambda each: each[0].name in NAMES)
few_measures = st.sampled_from([each for each in MEASURES if each.id in ("kl", "tv", "entropy")])
whole = st.integers(-2000, 2000)
FEW: dict[str, tuple[int, tuple[Any, ...]]] = {
    "a_divergence_is_not_negative": (30, (few_pairs, few_divergences)),
    "it_is_0_where_the_rows_are_equal": (30, (few_pairs, few_divergences, few_dtypes)),
    "bounds": (30, (few_pairs, few_measures)),
    "exchanging_the_rows_changes_no_bit": (
        40,
        (few_pairs, st.sampled_from([each for each in SYMMETRIC if each.name in NAMES])),
    ),
    "a_constant_changes_nothing": (
        30,
        (
            pairs(entries=test_properties.eighths, both=few_dtypes.map(lambda name: (name, name))),
            *(few_divergences, whole, whole),
        ),
    ),
    "the_order_of_the_vocabulary_does_not_matter": (
        30,
        (few_pairs, few_divergences, st.randoms(use_true_random=False)),
    ),
    "renyi_does_not_decrease_in_alpha": (
        15,
        (few_pairs, st.lists(st.floats(0.5, 50), min_size=2, max_size=5)),
    ),
    "merging_two_logits_increases_nothing": (
        20,
        (pairs(masks=False, entries=st.floats(-8, 8, width=32)), few_divergences),
    ),
    "any_shape_axis_and_stride": (
        30,
        (st.data(), few_dtypes.map(lambda name: (name, name)), few_measures),
    ),
}


@pytest.fixture
def on_device(device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have laws look at what the device computes."""
    monkeypatch.setattr(test_properties, "computed", partial(computed, backend="cuda"))
    return device


def test_selection() -> None:
    """Laws have the names by which they are selected, and the operations too."""
    assert FEW.keys() <= LAWS.keys()
    assert set(NAMES) <= OPERATIONS.keys()


@pytest.mark.parametrize("name", FEW)
def test_a_law_on_few_examples(name: str, on_device: Any, twin: Any) -> None:
    examples, strategies = FEW[name]
    law: Callable[..., None] = LAWS[name].hypothesis.inner_test
    names = law.__code__.co_varnames[: law.__code__.co_argcount]
    quiet = settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    quiet(given(**dict(zip(names, strategies, strict=True)))(law))()


@pytest.mark.parametrize("device", [pytest.param("real", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("name", LAWS)
def test_every_law(name: str, on_device: Any) -> None:
    LAWS[name]()

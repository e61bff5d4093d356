"""States of parts of rows on a device, and of rows that are streamed to it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from distributions import Cases, cases
from measures import MEASURES, assert_right, expected, tokens_of

import klfast
from klfast import RowState

NAMES = [
    "kl", "reverse_kl", "js:0.5", "js:0.999", "tv", "hellinger2", "jeffreys", "renyi:2.0",
    "renyi:0.5", "renyi:inf", "renyi:0.0", "alpha:20.0", "chi2", "cross_entropy", "entropy_p",
    "renyi_entropy:0.5", "nll_p", "nll_q", "delta_prob", "same_top", "top_p",
]  # fmt: skip
OPERATIONS = {
    ":".join([operation.name, *map(repr, parameters)]): (operation, parameters)
    for operation, parameters in (each.values for each in MEASURES)
}


def merged(put: Any, p: Any, q: Any, cuts: list[int], names: list[str], **how: Any) -> Any:
    """Values by way of states of the parts, which ``put`` moves where they are to be."""
    parts = [slice(*ends) for ends in itertools.pairwise([0, *cuts, p.shape[-1]])]
    shards = [[put(np.ascontiguousarray(x[..., part])) for x in (p, q)] for part in parts]
    tokens: Any = {"targets": tokens_of(p)} if {"nll_p", "nll_q"} & set(names) else {}
    first, *rest = (
        RowState.of(each[0], each[1], names, vocab_offset=part.start, **tokens, **how)
        for each, part in zip(shards, parts, strict=True)
    )
    whole = first.merge(*rest)
    again = {name: how[name] for name in ("where", "backend") if name in how}
    return whole.finish(sum(whole.partial_sums(*each, **again) for each in shards))


def check(got: Any, found: Cases, **how: Any) -> None:
    tokens = tokens_of(found.p)
    for name, values in got.items():
        operation, parameters = OPERATIONS[name]
        truth = expected(operation, parameters, found.p, found.q, tokens, **how)
        assert_right(operation, found, values, truth, tokens=tokens, **how)


#: Those of which the kernels in float32 are soon compiled.
SOME = ["kl", "js:0.5", "tv", "renyi:inf", "entropy_p", "nll_p", "nll_q"]


def test_every_metric(device: Any) -> None:
    found = cases(211, "float64", one_in=2)
    check(merged(device.asarray, found.p, found.q, [0, 40, 41, 150], NAMES), found)


@pytest.mark.parametrize("metrics", [SOME, ["renyi:2.0"], ["tv"]], ids=str)
def test_float32(metrics: list[str], device: Any) -> None:
    found = cases(211, one_in=2)
    check(merged(device.asarray, found.p, found.q, [0, 40, 41, 150], metrics), found)


def test_arrays_that_are_streamed(device: Any) -> None:
    found = cases(211, one_in=3)
    check(merged(np.asarray, found.p, found.q, [0, 90], SOME, backend="cuda"), found)


def test_temperature(device: Any) -> None:
    found = cases(130, "float64", one_in=3)
    got = merged(device.asarray, found.p, found.q, [50], NAMES, temperature=0.7)
    check(got, found, temperature=0.7)


def test_probabilities(device: Any) -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(90, 0.3), size=8)
    q = p * np.exp(1e-4 * rng.normal(size=p.shape))
    p[:, 50:60] = q[:, 50:60] = 0.0
    q[0, 70] = 0.0
    names = ["kl", "js", "tv", "renyi:2", "renyi:inf", "hellinger2", "entropy_q", "same_top"]
    got = merged(device.asarray, p, 3.0 * q, [55, 58], names, input="probs")
    truth = klfast.compare(p, 3.0 * q, names, input="probs", backend="reference")
    for name in names:
        np.testing.assert_allclose(got[name], truth[name], rtol=1e-12, atol=1e-18)


def test_the_numbers_are_those_of_the_host(device: Any) -> None:
    found = cases(100, "float64", one_in=2)
    keep = np.arange(len(found.p)) % 3 > 0
    here = RowState.of(found.p, found.q, NAMES[:6], vocab_offset=7, where=keep)
    p, q = (device.asarray(x) for x in (found.p, found.q))
    there = RowState.of(p, q, NAMES[:6], vocab_offset=7, where=device.asarray(keep))
    assert type(there.array) is np.ndarray
    np.testing.assert_allclose(there.array, here.array, rtol=1e-12, atol=1e-15)
    one = RowState.of(p, metrics=("entropy", "logsumexp")).finish()
    np.testing.assert_allclose(one["entropy"], klfast.entropy(found.p), rtol=1e-12)
    np.testing.assert_allclose(one["logsumexp"], klfast.logsumexp(found.p), rtol=1e-12)
    empty = RowState.of(p[:, :0], q[:, :0], NAMES[:6], vocab_offset=107)
    assert here.merge(empty).array.shape == here.array.shape
    np.testing.assert_allclose(empty.merge(here).array, here.array, rtol=1e-15)

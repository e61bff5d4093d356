"""Every case by pytest-benchmark, one group each: ``pytest benchmarks --benchmark-only``.

A contender runs all its rounds before the next one starts, so noise of the machine can favour
either; ``run.py`` lets them take turns and gives ratios.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from cases import CASES, SHAPES, Shape, text_of

from klfast._bench import (
    OWN,
    READ,
    Inputs,
    Run,
    largest_error,
    own_run,
    peer_run,
    random_inputs,
    read_run,
    true_values,
)
from klfast._peers import PEERS

# The deprecation warnings of PyTorch and JAX are theirs.
pytestmark = pytest.mark.filterwarnings("default")

_PEERS = {peer.name: peer for peer in PEERS}


# Cases of one input follow one another; no two inputs need to be in memory at once.
@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: str) -> Inputs:
    return random_inputs(*shape, dtype)


def _run_of(contender: str, measure: str, given: Inputs) -> Run:
    if contender == READ:
        return read_run(measure, given)
    if contender == OWN:
        return own_run(measure, given)
    peer = _PEERS[contender]
    if not peer.available():
        pytest.skip(f"{peer.package} is not installed")
    run = peer_run(peer, measure, given)
    if run is None:
        pytest.skip(f"{contender} cannot compute {measure}")
    return run


@pytest.mark.parametrize("contender", [READ, OWN, *_PEERS])
@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
def test_speed(benchmark: Any, shape: Shape, case: tuple[str, str], contender: str) -> None:
    measure, dtype = case
    given = _inputs(shape, dtype)
    run = _run_of(contender, measure, given)
    result = run()  # compiles
    benchmark.group = f"{measure}, {dtype}, {text_of(shape)}"
    benchmark.extra_info["bytes"] = given.memory.nbytes
    if contender != READ:
        error = benchmark.extra_info["error"] = largest_error(result, true_values(measure, given))
        assert error < 1e-2  # the same measure, however roughly
    benchmark(run)

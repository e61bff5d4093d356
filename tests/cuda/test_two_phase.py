"""All measures of a pair of rows from one read, alone and together: against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from distributions import Cases, cases, real_logits
from measures import assert_right, tokens_of
from pairs import (
    KEEPING,
    Values,
    assert_right_or_unfinished,
    placed,
    should_finish,
    unfinished,
)
from twin import compiler, run_kernel

from klfast import reference
from klfast._operations import OPERATIONS

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

EXCHANGE, STATE = 768, 64


class Term(NamedTuple):
    """A term of the kernel, and the measure that it is."""

    name: str
    measure: str
    parameters: tuple[float, ...] = ()
    beta: float = 0.0


JS, TV = Term("JS", "js", (0.5,)), Term("TV", "tv")
DIVERGENCES = [
    Term("KL", "kl"),
    Term("REVERSE_KL", "kl"),
    Term("RENYI", "renyi", (2.0,), 1.0),
    Term("RENYI", "renyi", (0.5,), -0.5),
    Term("REVERSE_RENYI", "renyi", (0.7,), -0.3),
    JS,
    TV,
    Term("HELLINGER2", "hellinger2"),
    Term("JEFFREYS", "jeffreys"),
    Term("CROSS_ENTROPY", "cross_entropy"),
]
SYMMETRIC = [
    column
    for column, term in enumerate(DIVERGENCES)
    if term.name in (*("JS", "TV", "HELLINGER2", "JEFFREYS"),)
]
#: Three divergences, and from column 3 on what single rows are described by.
ROWS = [
    DIVERGENCES[0], JS, TV, Term("STATISTICS_P", "p"), Term("STATISTICS_Q", "q"),
    Term("ARGMAX_P", "p"), Term("ARGMAX_Q", "q"),
]  # fmt: skip


def two_phase(
    terms: Sequence[Term],
    p: Any,
    q: Any,
    *,
    threads: int = 64,
    team: int = 64,
    cluster: int = 1,
    resident: int | None = None,
    parts: int = 1,
    skew: int = 0,
    **how: Any,
) -> Values:
    """The columns of every row."""
    p, q = placed(p, skew), placed(q, skew)
    if resident is None:
        resident = 0 if parts > 1 else -(-(-(-p.shape[1] // cluster) + 8) // 8) * 8
    columns = [5 if term.name.startswith(("STATISTICS", "ARGMAX")) else 1 for term in terms]
    options: dict[str, Any] = {
        "columns": sum(columns), "sources": KEEPING, "resident": resident,
        "parameters": [term.beta for term in terms],
        "shared": (resident * (p.itemsize + q.itemsize) + EXCHANGE) * (threads // team),
    }  # fmt: skip
    options["defines"] = {
        "TERMS": ",".join(term.name for term in terms),
        "THREADS": threads, "TEAM": team, "CLUSTER": cluster, **how.pop("defines", {}),
    }  # fmt: skip
    if parts == 1:
        grid = cluster * -(-len(p) * team // threads)
        return run_kernel("two_phase", p, q, grid=grid, **options, **how)
    options |= {
        "values": np.full((len(p), sum(columns)), math.nan), "parts": parts,
        "states": np.full((len(p) * parts, STATE), math.nan),
        "arrived": np.zeros(len(p), np.uint32),
    }  # fmt: skip
    for phase in (1, 2):
        run_kernel("two_phase", p, q, phase=phase, **options, **how)
    values: Values = options["values"]
    return values


def check(terms: Sequence[Term], found: Cases, parts: int = 1, **how: Any) -> Values:
    """Values are right, or left to the float64 kernel where that is to be expected."""
    values = two_phase(terms, found.p, found.q, parts=parts, **how)
    for term, column in zip(terms, values.T, strict=True):
        case = found
        if term.name.startswith("REVERSE"):
            case = found._replace(p=found.q, q=found.p)
        assert_right_or_unfinished(term.measure, term.parameters, case, column.copy())
        rows = should_finish(found)
        if parts > 1 and term == TV:  # which would take a third launch
            rows = [row for row in rows if not found.names[row].startswith("near by 1e-0")]
        left = unfinished(column.copy())[rows]
        assert not left.any(), (term, np.array(found.names)[rows][left])
        if term.measure != "cross_entropy" and found.p.dtype == found.q.dtype:
            assert not np.any(column[[name == "identical" for name in found.names]])
    return values


@pytest.mark.parametrize(
    "dtypes",
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")],
    ids="/".join,
)
def test_every_term(dtypes: tuple[str, str]) -> None:
    for width in (1, 2, 7, 64, 257, 1031):
        check(DIVERGENCES, cases(width, *dtypes, one_in=1 if width > 200 else 7), skew=width % 8)
    check(DIVERGENCES, cases(3000, *dtypes, one_in=5), parts=3)
    check(DIVERGENCES, cases(2049, *dtypes, one_in=5), resident=512)  # the rest is read again


@pytest.mark.parametrize(("term", "dtype"), [(JS, "float32"), (JS, "bfloat16"), (TV, "bfloat16")])
def test_terms_alone(term: Term, dtype: str) -> None:
    check([term], cases(1031, dtype))
    found = real_logits("int8")
    kept = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    check([term], Cases(found.names[::3], found.p[::3].astype(kept), found.q[::3].astype(kept)))


@pytest.mark.parametrize("cluster", [2, 4])
def test_blocks_of_a_cluster_share_a_row(cluster: int) -> None:
    terms = [DIVERGENCES[0], JS, TV]
    for width in (5, 300, 1031):
        check(terms, cases(width, "float32", one_in=3), cluster=cluster, threads=32, team=32)
    found = cases(1031, "float32", one_in=3)
    once, again = (
        two_phase(terms, found.p, found.q, cluster=cluster, threads=32, team=32, seed=seed)
        for seed in (0, 3)
    )
    np.testing.assert_array_equal(once.view(np.uint64), again.view(np.uint64))


def test_short_rows_are_the_work_of_a_warp() -> None:
    for width in (1, 3, 31, 257):
        check([DIVERGENCES[0], JS, TV], cases(width, "float32", one_in=3), team=32, skew=1)


@pytest.mark.parametrize("test", ["int8", "int4"])
def test_real_logits(test: str) -> None:
    found = real_logits(test)
    check(DIVERGENCES, Cases(found.names[::4], found.p[::4], found.q[::4].astype(np.float32)))


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")], ids="/".join)
def test_what_describes_one_row(dtypes: tuple[str, str]) -> None:
    for width, how in ((1031, {}), (3000, {"parts": 3}), (90, {})):
        found = cases(width, *dtypes, one_in=1 if width < 100 else 2)
        tokens = tokens_of(found.p)
        values = two_phase(ROWS, found.p, found.q, tokens=tokens, **how)
        for start, rows in ((3, found.p), (8, found.q)):
            m, s, u, index, token = values[:, start : start + 5].T
            left = unfinished(m.copy())
            surprise = np.log1p(s)
            results = {
                "entropy": (surprise + u / (1 + s), reference.entropy(rows)),
                "logsumexp": (m + surprise, reference.logsumexp(rows)),
                "token_log_probs": (token - surprise, reference.token_log_probs(rows, tokens)),
            }
            case = found._replace(p=rows, q=rows)
            for name, (got, truth) in results.items():
                assert_right(OPERATIONS[name], case, np.where(left, truth, got), truth)
            first = np.argmax(rows.astype(np.float64), axis=-1)
            np.testing.assert_array_equal(index[~left], first[~left])
            done = ~unfinished(values[:, start + 10].copy())
            np.testing.assert_array_equal(values[done, start + 13], first[done])
            assert done.sum() > 30


def test_rows_are_right_where_no_divergence_asks_for_exact_sums() -> None:
    found = cases(90, "bfloat16", "float32")
    values = two_phase(ROWS[3:5], found.p, found.q)
    for start, rows in ((0, found.p), (5, found.q)):
        m, s, u = values[:, start : start + 3].T
        truth = reference.entropy(rows)
        got = np.where(unfinished(m.copy()), truth, np.log1p(s) + u / (1 + s))
        assert_right(OPERATIONS["entropy"], found._replace(p=rows, q=rows), got, truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapped_arguments_give_the_same_bits(dtype: str) -> None:
    for width, how in ((1031, {}), (3000, {"parts": 3})):
        found = cases(width, dtype, one_in=2)
        once = two_phase(DIVERGENCES, found.p, found.q, **how)
        swapped = two_phase(DIVERGENCES, found.q, found.p, **how)
        for column in SYMMETRIC:
            one, other = (values[:, column].copy().view(np.uint64) for values in (once, swapped))
            np.testing.assert_array_equal(one, other)
        again = two_phase(DIVERGENCES, found.p, found.q, seed=9, **how)
        np.testing.assert_array_equal(once.view(np.uint64), again.view(np.uint64))


def test_equal_rows_of_different_types() -> None:
    p = np.random.default_rng(4).normal(size=(3, 200)).astype(np.float16)
    values = two_phase(DIVERGENCES, p, p.astype(np.float32))
    assert not np.any(values[:, :9])


def test_rows_that_are_not_to_be_read_and_that_are_no_distributions() -> None:
    p, q = np.random.default_rng(6).normal(size=(2, 9, 400)).astype(np.float32)
    p[0, 3] = q[1, 399] = math.nan
    p[2, 0] = q[3, 150] = math.inf
    p[4] = q[5] = -math.inf
    p[6, 100] = q[7, 100] = -math.inf  # distributions, of different supports
    where = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0], np.uint8)
    for how in ({}, {"parts": 2}):
        values = two_phase(ROWS, p, q, where=where, **how)
        kl, js = unfinished(values[:, 0].copy()), unfinished(values[:, 1].copy())
        assert kl.tolist() == [True] * 8 + [False]
        assert js.tolist() == [True] * 6 + [False] * 3
        assert np.isnan(values[8, [0, 1, 2, 3, 8, 13, 18]]).all()


def test_a_difference_below_the_range_of_float32_is_seen() -> None:
    p = np.zeros((2, 300), np.float32)
    p[:, 7] = 250.0
    q = p.copy()
    q[1, 100] = 1.0
    values = two_phase(DIVERGENCES, p, q)[:, SYMMETRIC]
    assert not values[0].any()
    assert unfinished(values[1].copy()).all()

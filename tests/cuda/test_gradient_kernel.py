"""Value and gradient from one read, in float32: against the reference."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from distributions import Cases, cases, real_logits
from numpy.typing import NDArray
from pairs import KEEPING, assert_right_or_unfinished, placed, should_finish, unfinished
from twin import compiler, run_kernel
from twin.running import describe

from klfast import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

EXCHANGE = 768
#: Errors that are let pass: half of the smallest number, or what `test_gradients.py` lets.
FLOOR = {"float16": 2.0**-25, "bfloat16": 1e-11, "float32": 1e-11}


class Slope(NamedTuple):
    """A gradient: the kernel's term and beta, the measure that it is, and its factors."""

    term: str
    measure: str
    parameters: tuple[float, ...] = ()
    beta: float = 0.0
    factors: tuple[float, float] = (1.0, 1.0)
    power: float = 0.0


KL, JS = Slope("KL", "kl"), Slope("JS", "js", (0.5,), 0.0, (0.5, 0.5))
SLOPES = [
    KL,
    JS,
    Slope("CROSS_ENTROPY", "cross_entropy"),
    Slope("JEFFREYS", "jeffreys"),
    Slope("TV", "tv"),
    Slope("RENYI", "renyi", (2.0,), 1.0, (2.0, 1.0)),
    Slope("RENYI", "renyi", (0.7,), -0.3, (0.7 / -0.3, 1.0)),
    Slope("HELLINGER2", "hellinger2", (), -0.5, (-0.5, 0.5), 1.0),
]


class Found(NamedTuple):
    value: NDArray[np.float64]
    left: NDArray[np.bool_]  # gradients that are left to the float64 kernel
    gradients: dict[str, Any]


def bits(x: Any) -> Any:
    return x.view(np.uint16) if x.dtype == "bfloat16" else x


def gradients(
    slope: Slope,
    p: Any,
    q: Any,
    wrt: str = "pq",
    *,
    threads: int = 64,
    team: int = 64,
    cluster: int = 1,
    resident: int | None = None,
    skew: int = 0,
    inside: bool = False,
    beyond: int = 0,
    scales: Any = None,
    **how: Any,
) -> Found:
    """What the kernel gives; `inside`: in the place of the logits."""
    rows = {"p": placed(p, skew), "q": placed(q, skew)}
    width = p.shape[1]
    if resident is None:
        resident = -(-(-(-width // cluster) + 8) // 8) * 8
    into = {
        side: rows[side] if inside else placed(np.full((len(p), width + beyond), 7, kind), skew)
        for side, kind in (("p", bits(p).dtype), ("q", bits(q).dtype))
    }
    extra: dict[str, Any] = {} if scales is None else {"scales": np.asarray(scales, np.float64)}
    values = run_kernel(
        "gradients", rows["p"], rows["q"], columns=2, sources=(*KEEPING, "slopes.cuh"),
        resident=resident, grid=cluster * -(-len(p) * team // threads),
        parameters=[
            slope.beta, *slope.factors, slope.power, 0.0,
            *(into[side].shape[1] if side in wrt else 0 for side in "pq"),
        ],
        shared=(resident * (p.dtype.itemsize + q.dtype.itemsize) + EXCHANGE) * (threads // team),
        defines={
            "TERMS": slope.term, "TO_P": int("p" in wrt), "TO_Q": int("q" in wrt),
            "THREADS": threads, "TEAM": team, "CLUSTER": cluster, **how.pop("defines", {}),
        },
        into_p=describe(into["p"])[()], into_q=describe(into["q"])[()],
        **extra, **how,
    )  # fmt: skip
    left = unfinished(values[:, 1].copy())
    found = {side: into[side].view({"p": p, "q": q}[side].dtype) for side in wrt}
    if inside:  # what is left is as it was
        for side in wrt:
            before = placed({"p": p, "q": q}[side])
            np.testing.assert_array_equal(into[side][left], before[left])
    return Found(values[:, 0], left, found)


def check(slope: Slope, found: Cases, wrt: str = "pq", **how: Any) -> Found:
    """Right to 1e-5 of the row's largest entry, or left where that is to be expected."""
    got = gradients(slope, found.p, found.q, wrt, **how)
    assert_right_or_unfinished(slope.measure, slope.parameters, found, got.value.copy())
    assert not np.any(unfinished(got.value.copy()) & ~got.left)
    rows = {"p": found.p, "q": found.q}
    for side in wrt:
        with np.errstate(all="ignore"):
            exact = reference.gradient(
                slope.measure, *(x.astype(np.float64) for x in (found.p, found.q)),
                *slope.parameters, wrt=side,
            )  # fmt: skip
        width, kind = found.p.shape[1], rows[side].dtype
        gradient = got.gradients[side].astype(np.float64)
        if not how.get("inside"):
            assert not gradient[:, width:].any()
        done = ~got.left
        largest = np.abs(exact[done]).max(-1, keepdims=True)
        unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(kind.name, 0.0)
        error = np.abs(gradient[done, :width] - exact[done])
        allowed = 1e-5 * largest + unit * np.abs(exact[done]) + FLOOR[kind.name]
        wrong = np.flatnonzero((error > allowed).any(-1))
        assert not wrong.size, [np.array(found.names)[done][row] for row in wrong]
        assert not gradient[done, :width][rows[side][done].astype(np.float32) == -np.inf].any()
    left = [found.names[row] for row in should_finish(found) if got.left[row]]
    assert not left
    return got


@pytest.mark.parametrize("slope", SLOPES, ids=lambda slope: f"{slope.term}{slope.beta:g}")
def test_every_gradient(slope: Slope) -> None:
    for width in (1, 2, 5, 64, 257, 1031):
        check(slope, cases(width, "float32", one_in=1 if width == 257 else 5), skew=width % 4)
    check(slope, real(4), inside=True)
    # What is not kept is read again, and written once.
    for inside in (False, True):
        check(slope, cases(1031, "float32", one_in=5), resident=256, inside=inside)


def real(one_in: int) -> Cases:
    names, p, q = real_logits("int8")
    return Cases(names[::one_in], p[::one_in].astype(np.float32), q[::one_in].astype(np.float32))


@pytest.mark.parametrize("wrt", ["p", "q"])
def test_one_side_over_the_logits(wrt: str) -> None:
    """That with respect to Q is written while the value is summed."""
    for width in (3, 64, 257, 1031):
        check(KL, cases(width, "float32", one_in=3), wrt, inside=True, skew=width % 4)
    apart = gradients(KL, *real(4)[1:], wrt, seed=3)
    again = gradients(KL, *real(4)[1:], wrt, inside=True)
    np.testing.assert_array_equal(apart.gradients[wrt], again.gradients[wrt])
    check(KL, cases(1031, "float32", one_in=5), wrt, resident=256, inside=True)


@pytest.mark.parametrize(
    ("slope", "wrt", "dtypes"),
    [
        (KL, "q", ("bfloat16", "bfloat16")), (KL, "pq", ("float16", "float32")),
        (JS, "pq", ("bfloat16", "float16")),
    ],
    ids=["KL-bfloat16", "KL-float16/float32", "JS-bfloat16/float16"],
)  # fmt: skip
def test_narrow_and_mixed_logits(slope: Slope, wrt: str, dtypes: tuple[str, str]) -> None:
    for width in (7, 64, 515):
        check(slope, cases(width, *dtypes, one_in=3), wrt, skew=width % 8, inside=width != 64)


@pytest.mark.parametrize(("slope", "wrt"), [(KL, "q"), (JS, "pq")], ids=["KL", "JS"])
def test_blocks_of_a_cluster_and_warps(slope: Slope, wrt: str) -> None:
    for width in (5, 300, 1031):
        found = cases(width, "float32", one_in=4)
        check(slope, found, wrt, cluster=4, threads=32, team=32, inside=True)
        if slope == KL:
            check(slope, found, wrt, threads=64, team=32, beyond=3)


def test_rows_of_different_alignment() -> None:
    found = cases(257, "float32", one_in=4)
    check(KL, found, "q", defines={"ALIGNED": 0}, skew=3, inside=True)


def test_scales_and_rows_that_are_not_read() -> None:
    p, q = np.random.default_rng(3).normal(size=(2, 6, 130)).astype(np.float32)
    q[4, 7] = math.nan
    where = np.array([1, 0, 1, 1, 1, 1], np.uint8)
    scales = np.array([1.0, 1.0, 0.0, -2.5, 1.0, 1e36])
    got = gradients(KL, p, q, scales=scales, where=where, beyond=5)
    assert got.left.tolist() == [False, False, False, False, True, True]
    assert np.isnan(got.value[1])
    for side in "pq":
        exact = reference.gradient("kl", *(x.astype(np.float64) for x in (p, q)), wrt=side)
        found = got.gradients[side]
        assert not found[1:3].any()
        np.testing.assert_allclose(
            found[[0, 3], :130], exact[[0, 3]] * scales[[0, 3], None], atol=1e-6
        )
        assert not found[:, 130:].any()

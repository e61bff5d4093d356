"""klfast beside other libraries, on this machine and on shapes of one's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._arrays import FLOATS
from ._operations import parse_metric
from ._peers import PEERS

DEFAULT_BENCH_METRICS = ("kl", "js", "tv")

_CHECKED_ROWS = 4  # compared with the float64 reference, which is slow


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast one contender computes one measure.

    ``seconds`` is the median over the rounds; ``of_read`` the median time of a plain read of the
    same bytes divided by it (1 is the speed of memory); ``error`` the largest relative error of
    the first rows against the float64 reference. All three are None where the contender failed,
    and ``failure`` says how.
    """

    metric: str
    contender: str
    seconds: float | None
    of_read: float | None
    error: float | None
    failure: str | None = None


def bench(
    rows: int = 256,
    vocab: int = 131072,
    dtype: str = "float32",
    metrics: Sequence[str] = DEFAULT_BENCH_METRICS,
    *,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Timing]:
    """Time measures of random logits with klfast and with every other library installed.

    The logits are Gaussian with standard deviation 3, those of Q off by a tenth of that. Each
    contender runs once untimed, to compile and to be checked; then all take turns, so that
    whatever else the machine does meets them alike.

    Parameters
    ----------
    rows, vocab, dtype
        Shape of each of the two inputs, and one of float16, bfloat16, float32, float64.
    metrics
        Measures, as for `klfast.compare`, of those that need no targets.
    rounds
        Timed runs of each contender; the median counts.
    progress
        Called after every metric with the number done and of all.

    Returns
    -------
    list of Timing
        For every metric: the plain read first, then klfast, then the libraries.
    """
    if rows < 1 or vocab < 1 or rounds < 1:
        raise ValueError(f"rows, vocab, rounds are {rows}, {vocab}, {rounds}; accepted: from 1")
    for metric in metrics:
        if parse_metric(metric)[0].tokens:
            raise ValueError(f"metric {metric!r} needs targets, which a benchmark has not")
    p, q = _logits(rows, vocab, dtype)
    timings = []
    for done, metric in enumerate(metrics, 1):
        timings += _time(metric, p, q, rounds)
        if progress is not None:
            progress(done, len(metrics))
    return timings


def read_all(*arrays: NDArray[Any]) -> None:
    """Read every byte and do as little as possible with it: what memory can do at best."""
    try:
        from klfast.kernels.cpu import read_bytes
    except ImportError:
        for array in arrays:
            np.bitwise_or.reduce(array.view(np.uint16), axis=None)
    else:
        for array in arrays:
            read_bytes(array)


def _logits(rows: int, vocab: int, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(FLOATS)}")
    kind: Any = dtype
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ValueError(
                'dtype bfloat16 needs the package ml_dtypes: pip install "klfast[eval]"'
            ) from error
        kind = ml_dtypes.bfloat16
    random = np.random.default_rng(0)
    p, q = np.empty((rows, vocab), kind), np.empty((rows, vocab), kind)
    for row in range(rows):  # one row at a time: no temporary of the size of the input
        x = 3 * random.standard_normal(vocab, np.float32)
        p[row] = x
        q[row] = x + 0.3 * random.standard_normal(vocab, np.float32)
    return p, q


def _time(metric: str, p: NDArray[Any], q: NDArray[Any], rounds: int) -> list[Timing]:
    truth = _values(metric, p[:_CHECKED_ROWS], q[:_CHECKED_ROWS], "reference")
    runs: dict[str, Callable[[], Any]] = {
        "plain read": lambda: read_all(p, q),
        "klfast": lambda: _values(metric, p, q, "auto"),
    }
    errors: dict[str, float] = {"klfast": _error(runs["klfast"](), truth)}
    failures: dict[str, str] = {}
    read_all(p, q)
    for peer in PEERS:
        if not peer.available():
            continue
        try:
            if (run := _bound(peer.array, peer.measure(metric), p, q)) is None:
                continue
            errors[peer.name] = _error(np.asarray(run(), np.float64), truth)
            runs[peer.name] = run
        except Exception as error:  # a peer that fails, however it does, is part of the result
            failures[peer.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each) for name, each in times.items()}
    read = medians["plain read"]
    return [
        Timing(metric, name, each, read / each, errors.get(name)) for name, each in medians.items()
    ] + [Timing(metric, name, None, None, None, reason) for name, reason in failures.items()]


def _bound(
    convert: Callable[[NDArray[Any]], Any],
    measure: Callable[[Any, Any], Any] | None,
    p: NDArray[Any],
    q: NDArray[Any],
) -> Callable[[], Any] | None:
    """A peer's measure of its own arrays; None where it has none or cannot hold the dtype."""
    if measure is None:
        return None
    x, y = convert(p), convert(q)
    if not str(x.dtype).endswith(p.dtype.name):  # JAX makes float32 of float64
        return None
    return lambda: measure(x, y)


def _values(
    metric: str, p: NDArray[Any], q: NDArray[Any], backend: Literal["auto", "reference"]
) -> NDArray[np.float64]:
    import klfast

    result = klfast.compare(p, q, (metric,), dtype=np.float64, backend=backend)
    return np.asarray(result[metric], np.float64)


def _error(values: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(values[: len(truth)] - truth) / np.abs(truth)
    return float(np.max(errors, where=truth != 0, initial=0.0))

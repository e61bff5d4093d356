"""klfast beside other libraries, on this machine and on shapes of one's own."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import FLOATS
from ._operations import OPERATIONS, Operation, parse_metric
from ._peers import COMPARE, PEERS, Peer

DEFAULT_BENCH_METRICS = ("kl", "js", "tv")
READ = "plain read"
OWN = "klfast"

Run = Callable[[], Any]

_CHECKED_ROWS = 4  # compared with the float64 reference, which is slow
# A turn that is over sooner is repeated, and timed only after as many calls again: the first ones
# find in the caches what the contender before has left there, and who comes after one that writes
# much would pay for it (half of the time of a call of 5 ms). What fits in the caches is then
# measured from there, for every contender.
_SHORT_TURN = 20e-3
# Before a turn: threads of the contender before stop waiting for more work and give up the cores.
_PAUSE = 2e-3
# Between the two inputs: without it, entries of one index would meet in one cache set.
_APART = 4096 + 64


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast one contender computes one measure.

    ``seconds`` is the median over the rounds. ``of_read`` is the speed beside a plain read of the
    same bytes (1 is the speed of memory) and ``slower`` the time beside klfast's: medians of the
    ratios within each round. ``error`` is the largest relative error of the first rows against
    the float64 reference, and ``rounds`` how often the contender was timed. Where it failed,
    ``failure`` says how and the others are None.
    """

    metric: str
    contender: str
    seconds: float | None
    of_read: float | None
    error: float | None
    failure: str | None = None
    slower: float | None = None
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random logits of two models, and a token for each row."""

    p: NDArray[Any]
    q: NDArray[Any]
    tokens: NDArray[np.int64]
    memory: NDArray[np.uint8]  # p and q, and little else

    def read_by(self, operation: Operation | None) -> tuple[NDArray[Any], ...]:
        """Return the arrays that a measure reads, P before Q; None is `compare`."""
        if operation is None:
            return self.p, self.q
        letters = {"p": self.p, "q": self.q}
        arrays = tuple(letters[letter] for letter in sorted(operation.rows))
        return (*arrays, self.tokens) if operation.tokens else arrays


def bench(
    rows: int = 256,
    vocab: int = 131072,
    dtype: str = "float32",
    metrics: Sequence[str] = DEFAULT_BENCH_METRICS,
    *,
    rounds: int = 5,
    patience: float = math.inf,
    peers: Sequence[str] | None = None,
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
        Measures: those of `klfast.compare` that need no targets, other operations such as
        "logsumexp" or "token_log_probs", and "compare" for its default metrics together.
    rounds
        Timed turns of each contender; the median counts.
    patience
        Seconds after which a contender takes no more turns, once it has had two.
    peers
        Names of the libraries to compare with; None is all that are installed.
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
        operation, _ = _parsed(metric)
        if operation is not None and operation.tokens and operation.metric:
            raise ValueError(f"metric {metric!r} needs targets, which a benchmark has not")
    known = [peer.name for peer in PEERS]
    for name in () if peers is None else peers:
        if name not in known:
            raise ValueError(f"peer {name!r} is unknown; accepted: {', '.join(known)}")
    chosen = [peer for peer in PEERS if peers is None or peer.name in peers]
    given = random_inputs(rows, vocab, dtype)
    timings = []
    for done, metric in enumerate(metrics, 1):
        timings += _time(metric, given, chosen, rounds, patience)
        if progress is not None:
            progress(done, len(metrics))
    return timings


def random_inputs(rows: int, vocab: int, dtype: str = "float32") -> Inputs:
    """Gaussian logits of standard deviation 3, and others off by 0.3; the same at every call."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(FLOATS)}")
    kind: Any = np.dtype(dtype) if dtype != "bfloat16" else _bfloat16()
    size = rows * vocab * kind.itemsize
    memory = np.zeros(2 * size + _APART, np.uint8)
    p, q = (
        memory[start : start + size].view(kind).reshape(rows, vocab) for start in (0, size + _APART)
    )
    random = np.random.default_rng(0)
    for row in range(rows):  # one row at a time: no temporary of the size of the input
        x = 3 * random.standard_normal(vocab, np.float32)
        p[row] = x
        q[row] = x + 0.3 * random.standard_normal(vocab, np.float32)
    return Inputs(p, q, random.integers(0, vocab, rows), memory)


def own_run(measure: str, given: Inputs, **options: Any) -> Run:
    """Return the call of klfast's public function for a measure."""
    import klfast

    operation, parameters = _parsed(measure)
    if operation is None:
        return lambda: klfast.compare(given.p, given.q, **options)
    function = getattr(klfast, operation.function, None)
    if function is None:  # one of the metrics that only `compare` has
        return lambda: klfast.compare(given.p, given.q, measure, **options)[measure]
    arrays = given.read_by(operation)
    if operation.rows == "qp":
        arrays = arrays[::-1]
    names = [parameter.name for parameter in operation.parameters]
    keywords = dict(zip(names, parameters, strict=False)) | options
    return lambda: function(*arrays, **keywords)


def read_run(measure: str, given: Inputs) -> Run:
    """Return a plain read of the bytes that a measure reads: what memory can do at best."""
    operation, _ = _parsed(measure)
    single = operation is not None and operation.arity == 1
    array = given.p.view(np.uint8) if single else given.memory
    return lambda: read_all(array)


def read_all(array: NDArray[Any]) -> None:
    """Read every byte and do as little as possible with it."""
    try:
        from klfast.kernels.cpu import read_bytes
    except ImportError:
        np.bitwise_or.reduce(array, axis=None)
    else:
        read_bytes(array)


def peer_run(peer: Peer, measure: str, given: Inputs) -> Run | None:
    """Return a peer's measure of its own arrays; None where it has none or lacks the dtype."""
    function = peer.measure(measure)
    if function is None:
        return None
    arrays = [peer.array(array) for array in given.read_by(_parsed(measure)[0])]
    if not str(arrays[0].dtype).endswith(given.p.dtype.name):  # JAX makes float32 of float64
        return None
    return lambda: function(*arrays)


def true_values(measure: str, given: Inputs) -> NDArray[np.float64]:
    """Return a measure of the first rows, by the float64 reference."""
    n = _CHECKED_ROWS
    first = Inputs(given.p[:n], given.q[:n], given.tokens[:n], given.memory)
    return _values(own_run(measure, first, dtype=np.float64, backend="reference")())


def largest_error(result: Any, truth: NDArray[np.float64]) -> float:
    """Return the largest relative error of the first rows."""
    values = _values(result)[: len(truth)]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(values - truth) / np.abs(truth)
    return float(np.max(errors, where=truth != 0, initial=0.0))


def take_turns(
    runs: Mapping[str, Run], rounds: int, patience: float = math.inf, pause: float = _PAUSE
) -> dict[str, list[float]]:
    """Time contenders in turns: seconds of a call, for each round that a contender was in.

    One that has used up its ``patience``, in seconds, is left out after the second round. Before
    each turn there is a ``pause``, in seconds too.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    shortest = dict.fromkeys(runs, math.inf)
    for number in range(rounds):
        for name, run in runs.items():
            if number >= 2 and spent[name] > patience:
                continue
            time.sleep(pause)
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            spent[name] += seconds
            shortest[name] = min(seconds, shortest[name])
            if shortest[name] < _SHORT_TURN:
                calls = math.ceil(_SHORT_TURN / shortest[name])
                for _ in range(calls):
                    run()
                began = time.perf_counter()
                for _ in range(calls):
                    run()
                seconds = (time.perf_counter() - began) / calls
            times[name].append(seconds)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios within each round that both were in."""
    return statistics.median(a / b for a, b in zip(over, under, strict=False))


def _parsed(measure: str) -> tuple[Operation | None, tuple[float, ...]]:
    """Find a measure in the operation table; None is `compare` with its default metrics."""
    if measure == COMPARE:
        return None, ()
    if measure in OPERATIONS and not OPERATIONS[measure].metric:
        return OPERATIONS[measure], ()
    return parse_metric(measure)


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ValueError(
            'dtype bfloat16 needs the package ml_dtypes: pip install "klfast[eval]"'
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def _time(
    measure: str, given: Inputs, peers: Sequence[Peer], rounds: int, patience: float
) -> list[Timing]:
    truth = true_values(measure, given)
    runs = {READ: read_run(measure, given), OWN: own_run(measure, given)}
    runs[READ]()
    errors = {OWN: largest_error(runs[OWN](), truth)}
    failures: dict[str, str] = {}
    for peer in peers:
        if not peer.available():
            continue
        try:
            if (run := peer_run(peer, measure, given)) is None:
                continue
            errors[peer.name] = largest_error(run(), truth)
            runs[peer.name] = run
        except Exception as error:  # a peer that fails, however it does, is part of the result
            reason = str(error).strip().partition("\n")[0]
            failures[peer.name] = f"{type(error).__name__}: {reason}"

    times = take_turns(runs, rounds, patience)
    return [
        Timing(
            measure,
            name,
            statistics.median(each),
            ratio(times[READ], each),
            errors.get(name),
            slower=ratio(each, times[OWN]),
            rounds=len(each),
        )
        for name, each in times.items()
    ] + [Timing(measure, name, None, None, None, reason) for name, reason in failures.items()]


def _values(result: Any) -> NDArray[np.float64]:
    """One value a row, or with several measures one column each."""
    if isinstance(result, Mapping):
        result = np.stack([np.asarray(values) for values in result.values()], -1)
    return np.asarray(result, np.float64)

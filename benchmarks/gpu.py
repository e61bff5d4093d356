"""``python benchmarks/gpu.py``: klfast on a CUDA device beside PyTorch and fused Triton kernels.

One command compiles the kernels, in several processes, checks values and gradients against the
float64 reference, times them, prints a table, and writes ``gpu.json`` and ``GPU.md`` where
``--out`` says (default: beside itself, for a complete run): klfast at all cases first, then its
peers, and again after every case, so that what a run has measured is there however it ends.
``--minutes`` ends it in time. Times are medians of CUDA events over inputs several times the L2
cache, and shares are of the bandwidth of a device-to-device copy, bytes read plus bytes written,
measured in the same run. Few rows are timed as replays of a CUDA graph, over inputs that take
turns, and their shares are of the time of one launch of an empty kernel plus that of the copy.

Peers are whatever is installed of PyTorch (eager and compiled), Liger-Kernel (whose kernels begin
at log-probabilities: the log-softmax before them is timed with them), speculators (its fused
losses from logits) and quack-kernels (softmax: the mark for reading one row once). Values with
gradients are of the forward and the backward pass together, with respect to Q; of entropy to P.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import klfast
from klfast._arrays import FLOATS
from klfast._machine import versions
from klfast._operations import OPERATIONS, Operation, parse_metric
from klfast._peers import COMPARE, PEERS
from klfast._report import grid, write_json

HERE = Path(__file__).resolve().parent
VOCABULARIES = (32000, 128256, 151936, 262144)
ROWS = 8192
#: Rows that are the work of a block, or of a cluster of them, as many more are.
NOT_CUT = 512
FEW_ROWS = (1, 4, 16, 64)
FEW_ROWS_VOCABULARY = 128256
DTYPES = ("float32", "bfloat16", "float16")
GRADIENT = " and gradient"
GRADIENTS = ("kl", "js", "cross_entropy", "entropy", "renyi:2", "tv", "hellinger2")
MEASURES = (
    "kl", "cross_entropy", "entropy", "logsumexp", "renyi:2", "js", "tv", "hellinger2", COMPARE,
    *(f"{name}{GRADIENT}" for name in GRADIENTS),
)  # fmt: skip
#: Largest relative error of klfast that passes.
TOLERANCE = 1e-5
#: The same of gradients, over the largest entry of a row: what rounding to their type leaves.
GRADIENT_TOLERANCE = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
DEVICE = "cuda"
TORCH = tuple(peer for peer in PEERS if peer.package == "torch")

Call = Callable[[], Any]
#: Rows, vocabulary, dtype, data, measures.
Case = tuple[int, int, str, str, tuple[str, ...]]


@dataclass(frozen=True)
class Timing:
    """One contender's median at one case, and how far its results were from the truth."""

    rows: int
    vocab: int
    dtype: str
    data: str
    measure: str
    contender: str
    seconds: float | None
    of_bound: float | None
    error: float | None = None
    gradient_error: float | None = None
    failure: str | None = None

    @property
    def case(self) -> tuple[int, int, str, str, str]:
        """What was measured, whoever did it."""
        return self.rows, self.vocab, self.dtype, self.data, self.measure

    def wrong(self) -> str | None:
        """What klfast must not get away with."""
        if self.failure:
            return self.failure
        if not (self.error or 0.0) <= TOLERANCE:
            return f"off by {self.error}"
        if not (self.gradient_error or 0.0) <= GRADIENT_TOLERANCE[self.dtype]:
            return f"gradient off by {self.gradient_error}"
        return None


def main() -> None:
    """Measure, print, and write the files."""
    options = _options()
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: PyTorch sees no CUDA device")
    if not klfast.backends()["cuda"]:
        sys.exit(f"benchmarks/gpu.py: the CUDA backend: {klfast.backends()['cuda']}")
    copy = _copy_bandwidth(options.quick)
    launch = _launch_seconds()
    about = _about(copy, launch)
    print("\n".join(grid([[name, value] for name, value in about.items()], left=2)), flush=True)
    out = options.out or (None if options.quick or options.only else HERE)
    deadline = time.monotonic() + 60.0 * options.minutes
    timings: list[Timing] = []
    cases = list(_cases(options))
    if options.jobs:
        _compile(cases, options.jobs)
    for own in (True, False):
        for case in cases:
            for timing in _measure(*case, own, copy, launch, options):
                timings.append(timing)
                if time.monotonic() > deadline:
                    break
            torch.cuda.empty_cache()
            _write(out, about, timings)
            if time.monotonic() > deadline:
                break
    print("\n" + _table(timings))
    if time.monotonic() > deadline:
        print(f"\nended after {options.minutes:g} minutes: the rest was not measured")
    if out is not None:
        print(f"\nwritten: gpu.json, GPU.md in {out}")
    wrong = [
        f"{t.measure} of {t.rows} x {t.vocab} {t.dtype}: {t.wrong()}"
        for t in timings
        if t.contender == "klfast" and t.wrong()
    ]
    if wrong:
        sys.exit("\n".join(["klfast is wrong:", *wrong]))


def _write(out: Path | None, about: dict[str, str], timings: Sequence[Timing]) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    written = [
        {  # JSON has no infinity, which the error of a formula may be
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(each).items()
        }
        for each in timings
    ]
    write_json(out / "gpu.json", {"about": about, "timings": written})
    (out / "GPU.md").write_text(_markdown(about, timings), encoding="utf-8")


def _compile(cases: Iterable[Case], jobs: int) -> None:
    """Have CuPy's cache on disk filled: a process compiles one kernel at a time."""
    begin = time.monotonic()
    calls = [(*case[:4], measure) for case in cases for measure in case[4]]
    try:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for failure in dict.fromkeys(filter(None, pool.map(_call_once, calls))):
                print(f"not compiled: {failure}", file=sys.stderr)
    except Exception as problem:  # what is amiss shows again, and counts, when it is measured
        print(f"not compiled: {problem}", file=sys.stderr)
    print(f"compiled in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def _call_once(call: tuple[int, int, str, str, str]) -> str | None:
    """Have what this measure needs compiled, on as few rows as need the same; the failure."""
    rows, vocab, dtype, data, measure = call
    try:
        inputs = _logits(min(rows, NOT_CUT), vocab, dtype, data)
        _own(measure)(*inputs[: _operation(measure).arity])
        if DEVICE == "cuda":
            sys.modules["torch"].cuda.synchronize()
    except Exception as problem:
        return f"{measure}, {dtype}: {type(problem).__name__}: {problem}"
    return None


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    measures = tuple(m for m in MEASURES if options.only is None or m in options.only)
    if options.quick:
        yield 128, 32000, "float32", "flat", measures
        yield 1, 32000, "bfloat16", "peaked", measures
        return
    for dtype in DTYPES:
        for vocab in VOCABULARIES:
            yield ROWS, vocab, dtype, "flat", measures
    # What language models give: most of the mass on few tokens.
    # And rows that have nothing to do with each other, which need more arithmetic.
    for data, dtype in itertools.product(("peaked", "apart"), DTYPES):
        yield ROWS, FEW_ROWS_VOCABULARY, dtype, data, measures
    for rows in FEW_ROWS:
        for dtype in ("float32", "bfloat16"):
            yield rows, FEW_ROWS_VOCABULARY, dtype, "flat", measures


def _logits(rows: int, vocab: int, dtype: str, data: str) -> tuple[Any, Any]:
    """Two batches like those of a model and of its quantized version, or of two models."""
    import torch

    generator = torch.Generator(DEVICE).manual_seed(vocab + rows)

    def normal() -> Any:
        return torch.randn(rows, vocab, device=DEVICE, generator=generator)

    p = normal().mul_(2.5)
    if data == "peaked":
        tops = torch.randint(vocab, (rows, 1), device=DEVICE, generator=generator)
        height = 8 + 14 * torch.rand(rows, 1, device=DEVICE, generator=generator)
        p.scatter_(1, tops, height)
    q = normal().mul_(2.5) if data == "apart" else normal().mul_(0.1).add_(p).add_(0.3)
    return p.to(getattr(torch, dtype)), q.to(getattr(torch, dtype))


def _measure(
    rows: int,
    vocab: int,
    dtype: str,
    data: str,
    measures: Sequence[str],
    own: bool,
    copy: float,
    launch: float,
    options: argparse.Namespace,
) -> Iterator[Timing]:
    who = "klfast" if own else "its peers"
    print(f"{rows} x {vocab} {dtype} {data}: {who}", file=sys.stderr, flush=True)
    size = rows * vocab * FLOATS[dtype]
    few = rows <= max(FEW_ROWS)
    # Inputs that take turns, so that no cache has them.
    turns = min(256, max(2, (1 << 28) // size)) if few else 1
    sets = [_logits(rows, vocab, dtype, data) for _ in range(turns)]
    for measure in measures:
        if few and measure.endswith(GRADIENT):  # no backward pass is captured
            continue
        arity = _operation(measure).arity
        moved = arity + measure.endswith(GRADIENT)  # arrays that are read or written once
        bound = moved * size / copy + (launch if few else 0.0)
        contenders = _contenders(measure, options)
        inputs = [pair[:arity] for pair in sets]
        case = rows, vocab, dtype, data, measure
        truth = _truths[case] = _truths.get(case) or _truth(measure, inputs[0])
        for name in contenders:
            if (name == "klfast") == own:
                yield _timed(
                    Timing(rows, vocab, dtype, data, measure, name, None, None),
                    contenders[name], inputs, truth, bound, few,
                )  # fmt: skip


def _timed(
    case: Timing,
    make: Callable[[], Callable[..., Any]],
    inputs: list[Any],
    truth: Truth,
    bound: float,
    few: bool,
) -> Timing:
    import torch

    fields = asdict(case)
    try:
        function = make()
        errors = _errors(case.measure, truth, function(*inputs[0]))
        if few:
            seconds = _graph_seconds(function, inputs)
        else:
            seconds = _event_seconds(lambda: function(*inputs[0]))
    except Exception as problem:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        fields["failure"] = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        return Timing(**fields)
    fields |= {"seconds": seconds, "of_bound": bound / seconds, **errors}
    return Timing(**fields)


def _operation(measure: str) -> Operation:
    """That of the measure, or of one value that it has."""
    name = "kl" if measure == COMPARE else measure.removesuffix(GRADIENT)
    return OPERATIONS[name.partition(":")[0]]


def _contenders(
    measure: str, options: argparse.Namespace
) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Functions that make a function of torch tensors, by the name of the contender."""
    found: dict[str, Callable[[], Callable[..., Any]]] = {"klfast": lambda: _own(measure)}
    for peer in TORCH:
        found[peer.name] = lambda peer=peer: _of_peer(peer, measure)  # type: ignore[misc]
    others = {
        "liger": ("liger_kernel", LIGER),
        "speculators": ("speculators", SPECULATORS),
        "quack softmax": ("quack", QUACK),
    }
    for name, (package, table) in others.items():
        if measure in table and importlib.util.find_spec(package) is not None:
            found[name] = table[measure]
    if options.peers is not None:
        found = {name: each for name, each in found.items() if name in ("klfast", *options.peers)}
    return found


def _own(measure: str) -> Callable[..., Any]:
    if measure == COMPARE:
        return lambda p, q: klfast.compare(p, q)
    if measure.endswith(GRADIENT):
        name = measure.removesuffix(GRADIENT)
        return lambda *rows: tuple(klfast.value_and_grad(name, *rows))
    function = getattr(klfast, _operation(measure).function)
    parameters = _parameters(measure)
    return lambda *rows: function(*rows, *parameters)


def _parameters(measure: str) -> tuple[float, ...]:
    """Of "renyi:2": (2.0,)."""
    return parse_metric(measure.removesuffix(GRADIENT))[1] if ":" in measure else ()


def _of_peer(peer: Any, measure: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = peer.measure(measure.removesuffix(GRADIENT))
    if function is None:
        raise LookupError(f"{peer.name} has no {measure}")
    return _both_ways(function) if measure.endswith(GRADIENT) else function


def _both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward: the value, and the gradient with respect to the last of the logits."""

    def run(*rows: Any) -> Any:
        student = rows[-1].detach().requires_grad_()
        value = function(*rows[:-1], student)
        value.sum().backward()
        return value.detach(), student.grad

    return run


def _with_gradient(make: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
    return lambda: _both_ways(make())


def _liger(name: str, **settings: Any) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        import torch

        loss = getattr(importlib.import_module("liger_kernel.transformers"), name)(**settings)

        def log_softmax(x: Any) -> Any:
            return torch.nn.functional.log_softmax(x, -1, dtype=torch.float32)

        return lambda p, q: loss(log_softmax(q), log_softmax(p))

    return make


def _speculators(name: str) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        module = importlib.import_module("speculators.losses.fused")
        loss = getattr(module, name)
        return lambda p, q: loss(q[None], p[None])[0]

    return make


def _quack() -> Callable[..., Any]:
    module = importlib.import_module("quack.softmax")
    softmax: Callable[..., Any] = module.softmax
    return lambda p: softmax(p)


LIGER = {
    "kl": _liger("LigerKLDIVLoss", reduction="batchmean", log_target=True),
    "js": _liger("LigerJSD", beta=0.5),
}
LIGER |= {f"{name}{GRADIENT}": _with_gradient(make) for name, make in LIGER.items()}
# Its fused_ce_loss is that of the largest target alone, and no cross-entropy of two distributions.
SPECULATORS = {
    "kl": _speculators("fused_kl_div_loss"),
    "js": _speculators("fused_js_div_loss"),
    "tv": _speculators("fused_tv_loss"),
}
SPECULATORS |= {f"{name}{GRADIENT}": _with_gradient(make) for name, make in SPECULATORS.items()}
QUACK = {"logsumexp": _quack}


class Truth(NamedTuple):
    """What some of the rows have, in float64."""

    rows: NDArray[np.int64]
    of: int  # rows that there are
    values: NDArray[np.float64]
    gradients: NDArray[np.float64] | None


#: Of the cases that have been measured: the reference takes longer than all contenders together.
_truths: dict[tuple[int, int, str, str, str], Truth] = {}


def _truth(measure: str, rows: Sequence[Any], sample: int = 2) -> Truth:
    operation, parameters = _operation(measure), _parameters(measure)
    count = len(rows[0])
    picked = np.unique(np.linspace(0, count - 1, sample).astype(np.int64))
    inputs = [x[picked].double().cpu().numpy() for x in rows]
    values = operation.reference(*inputs, *parameters)
    gradients = None
    if measure.endswith(GRADIENT):
        wrt = "pq"[operation.arity - 1]
        gradients = klfast.reference.gradient(operation.name, *inputs, *parameters, wrt=wrt)
    return Truth(picked, count, values, gradients)


def _errors(measure: str, truth: Truth, result: Any) -> dict[str, float | None]:
    """Largest relative errors over a few rows; None where a contender gives no value a row.

    That of gradients is over the largest entry of a row.
    """
    gradient = None
    if measure.endswith(GRADIENT):
        result, gradient = result
    if measure == COMPARE:
        result = result["kl"] if isinstance(result, klfast.Comparison) else result[..., 0]
    if result.shape != (truth.of,):
        return {}

    def found(x: Any) -> NDArray[np.float64]:
        picked: NDArray[np.float64] = x[truth.rows].double().cpu().numpy()
        return picked

    off = np.abs(found(result) - truth.values) / np.abs(truth.values)
    errors: dict[str, float | None] = {"error": float(np.max(off))}
    if gradient is not None and truth.gradients is not None:
        size = np.abs(truth.gradients).max(-1, keepdims=True)
        off = np.abs(found(gradient) - truth.gradients) / size
        errors["gradient_error"] = float(np.max(off))
    return errors


def _event_seconds(call: Call, rounds: int = 11) -> float:
    import torch

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in events)) / 1e3


def _graph_seconds(function: Callable[..., Any], inputs: list[Any], rounds: int = 21) -> float:
    """Seconds a call, of one graph that calls the function once on each of the inputs."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for rows in inputs[:3]:
            function(*rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for rows in inputs:
            function(*rows)
    return _event_seconds(graph.replay, rounds) / len(inputs)


def _copy_bandwidth(quick: bool) -> float:
    import torch

    count = 1 << (26 if quick else 32)
    source = torch.empty(count, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    seconds = _event_seconds(lambda: target.copy_(source))
    return 2 * count / seconds


def _launch_seconds() -> float:
    """Seconds that a kernel which does next to nothing takes in a graph."""
    import torch

    x = torch.zeros(1, device=DEVICE)
    return _graph_seconds(lambda x: x.add_(1), [(x,)] * 64)


def _about(copy: float, launch: float) -> dict[str, str]:
    import torch

    facts = torch.cuda.get_device_properties(0)
    installed = [f"{name} {version}" for name, version in versions().items() if version]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{facts.name}, {facts.multi_processor_count} multiprocessors, "
        f"{facts.total_memory / 2**30:.0f} GiB, L2 {facts.L2_cache_size / 2**20:.0f} MiB",
        "copy bandwidth": f"{copy / 1e12:.3g} TB/s, read and written",
        "launch in a graph": f"{1e6 * launch:.2g} us",
        "CUDA": str(torch.version.cuda),
        "versions": ", ".join(installed),
    }


def _table(timings: Sequence[Timing]) -> str:
    titles = (
        "rows",
        "V",
        "dtype",
        "data",
        "measure",
        "",
        "ms",
        "of bound",
        "klfast faster",
        "error",
        "of gradient",
    )
    rows = [list(titles)]
    own = {t.case: t.seconds for t in timings if t.contender == "klfast"}
    order = {case: place for place, case in enumerate(dict.fromkeys(t.case for t in timings))}
    for t in sorted(timings, key=lambda t: order[t.case]):
        case = [str(t.rows), str(t.vocab), t.dtype, t.data, t.measure, t.contender]
        if t.seconds is None or t.of_bound is None:
            rows.append([*case, "failed", "", "", "", ""])
            continue
        mine = own.get(t.case)
        ratio = f"{t.seconds / mine:.1f} x" if mine and t.contender != "klfast" else ""
        rows.append([
            *case, f"{1e3 * t.seconds:.4g}", f"{t.of_bound:.2f}", ratio,
            *("" if each is None else f"{each:.1e}" for each in (t.error, t.gradient_error)),
        ])  # fmt: skip
    failures = sorted({f"{t.contender}, {t.measure}: {t.failure}" for t in timings if t.failure})
    return "\n".join([*grid(rows, left=1), *failures])


def _markdown(about: dict[str, str], timings: Sequence[Timing]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return f"# Measured on a GPU\n\n{facts}\n\n```\n{_table(timings)}\n```\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small shapes, to see it work")
    parser.add_argument("--only", type=lambda text: text.split(","), help="measures, such as kl,js")
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), help="such as 'torch.compile,liger'"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that compile before anything is measured; 0: none",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after these")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write the files")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

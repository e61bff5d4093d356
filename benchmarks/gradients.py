"""``python benchmarks/gradients.py``: values with gradients, beside PyTorch, in one run.

Writes GRADIENTS.md beside itself (``--out`` elsewhere). Each contender runs forward and backward
together, in turns, with the same threads; peaks of memory are of separate processes, above what
they held before, without the gradients that every contender must keep.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import klfast
from klfast._machine import machine, versions
from klfast._peers import PEERS
from klfast._report import grid

HERE = Path(__file__).resolve().parent
# Functions of klfast.torch, and the names of the same measures elsewhere.
MEASURES = {
    "kl": "kl_divergence",
    "jeffreys": "jeffreys_divergence",
    "js": "js_divergence",
    "renyi:2": "renyi_divergence",
    "tv": "total_variation",
    "hellinger2": "squared_hellinger",
}
SHAPE = (512, 131072)
HEADER = ["measure", "klfast, ms", "torch.compile, ms", "", "torch eager, ms", ""]
LINEAR = (1024, 1024, 131072)  # tokens, width of the hidden states, vocabulary


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=2, default=SHAPE, metavar=("ROWS", "V"))
    parser.add_argument("--linear", type=int, nargs=3, default=LINEAR, metavar=("N", "H", "V"))
    parser.add_argument("--out", type=Path, default=HERE / "GRADIENTS.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_linear_worker(options.worker, options.linear)))
        return
    import torch

    torch.set_num_threads(klfast.get_num_threads())
    sections = (_logits(options), _labels(options), _linear(options))
    text = "\n".join([_about(), *(line for section in sections for line in ("", *section)), ""])
    print(text)
    options.out.write_text(text, encoding="utf-8")


def _about() -> str:
    facts, now = machine(), datetime.datetime.now(datetime.UTC)
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    return (
        "# Values with gradients\n\n"
        f"Measured {now:%Y-%m-%d %H:%M} UTC on {facts['processor']}, {facts['cores']} cores, with "
        f"{klfast.get_num_threads()} threads; {known}. Written by `python benchmarks/gradients.py`."
    )


def _logits(options: argparse.Namespace) -> list[str]:
    """Divergence of each row and its gradient with respect to Q, from logits in float32."""
    import torch

    import klfast.torch

    rows, vocab = options.shape
    rng = np.random.default_rng(0)
    p = rng.normal(size=(rows, vocab)).astype(np.float32) * 2
    q = p + 0.1 * rng.normal(size=p.shape).astype(np.float32)
    out = np.empty_like(q)
    teacher, student = torch.from_numpy(p), torch.from_numpy(q).requires_grad_()
    lines = [[*HEADER, "klfast, in place, ms"]]
    for name, function in MEASURES.items():
        fused = getattr(klfast.torch, function)
        if ":" in name:
            fused = functools.partial(fused, alpha=float(name.partition(":")[2]))
        contenders = {"klfast": _both_ways(fused, teacher, student)}
        for peer in PEERS:
            if peer.package == "torch" and (measure := peer.measure(name)) is not None:
                contenders[peer.name] = _both_ways(measure, teacher, student)
        contenders["in place"] = functools.partial(klfast.value_and_grad, name, p, q, out=out)
        lines.append(_line(name, contenders, options.rounds))
    title = f"## Forward and backward, {rows} x {vocab}, float32, with respect to Q"
    note = (
        "klfast.torch and PyTorch write into new memory, which the system first fills with zeros; "
        "in place: klfast.value_and_grad, into memory that it is given."
    )
    return [title, "", note, "", "```", *grid(lines), "```"]


def _labels(options: argparse.Namespace) -> list[str]:
    """Log-probabilities of labels and their gradient, everybody's in new memory."""
    import torch

    import klfast.torch

    functional = torch.nn.functional
    rows, vocab = options.shape
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(rows, vocab)).astype(np.float32) * 2)
    logits.requires_grad_()
    labels = torch.from_numpy(rng.integers(0, vocab, rows))

    def loss(labels: Any, logits: Any) -> Any:
        return functional.cross_entropy(logits, labels)

    def chosen(labels: Any, logits: Any) -> Any:
        return functional.log_softmax(logits, -1).gather(-1, labels[:, None])

    lines = [HEADER]
    for mine, theirs in (
        (klfast.torch.cross_entropy_loss, loss),
        (klfast.torch.token_log_probs, chosen),
    ):

        def fused(labels: Any, logits: Any, mine: Callable[..., Any] = mine) -> Any:
            return mine(logits, labels)

        measures = {
            "klfast": fused, "torch.compile": torch.compile(theirs), "torch eager": theirs,
        }  # fmt: skip
        contenders = {
            name: _both_ways(measure, labels, logits) for name, measure in measures.items()
        }
        lines.append(_line(mine.__name__, contenders, options.rounds))
    title = f"## Forward and backward of known labels, {rows} x {vocab}, float32"
    return [title, "", "klfast.torch and PyTorch, into new memory.", "", "```", *grid(lines), "```"]


def _both_ways(measure: Callable[..., Any], given: Any, student: Any) -> Callable[[], Any]:
    def run() -> None:
        student.grad = None
        measure(given, student).sum().backward()

    return run


def _line(name: str, contenders: dict[str, Callable[[], Any]], rounds: int) -> list[str]:
    seconds = _medians(contenders, rounds)
    mine = seconds["klfast"]
    line = [name, f"{1e3 * mine:.1f}"]
    for peer_name in ("torch.compile", "torch eager"):
        theirs = seconds[peer_name]
        line += [f"{1e3 * theirs:.0f}", f"{theirs / mine:.1f} x"]
    if "in place" in seconds:
        line.append(f"{1e3 * seconds['in place']:.1f}")
    return line


def _medians(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            if name == "torch eager" and turn > 3:
                continue
            began = time.perf_counter()
            run()
            if turn:  # the first one compiles
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def _linear(options: argparse.Namespace) -> list[str]:
    """From hidden states to the loss and the gradients of states and head."""
    tokens, width, vocab = options.linear
    found: dict[str, list[dict[str, float]]] = {"klfast": [], "unfused": [], "products": []}
    for _ in range(3):
        for name, each in found.items():
            command = [sys.executable, __file__, "--worker", name, "--linear"]
            command += [str(number) for number in options.linear]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            each.append(json.loads(result.stdout))
    best = {
        name: {key: statistics.median(one[key] for one in each) for key in ("seconds", "peak")}
        for name, each in found.items()
    }
    lines = [["", "seconds", "peak memory, MB"]]
    names = {
        "klfast": "klfast.torch.linear_distillation_loss",
        "unfused": "two matrix products, log_softmax, kl_div",
        "products": "the four matrix products alone",
    }
    for name, label in names.items():
        lines.append([label, f"{best[name]['seconds']:.2f}", f"{best[name]['peak'] / 1e6:.0f}"])
    speed = best["unfused"]["seconds"] / best["klfast"]["seconds"]
    share = best["klfast"]["peak"] / best["unfused"]["peak"]
    return [
        f"## From hidden states, {tokens} tokens, width {width}, vocabulary {vocab}, float32",
        "",
        "```",
        *grid(lines),
        "```",
        "",
        f"{speed:.2f} x as fast, in {100 * share:.0f} % of the memory.",
    ]


def _linear_worker(name: str, shape: tuple[int, int, int]) -> dict[str, float]:
    import torch

    import klfast.torch

    tokens, width, vocab = shape
    torch.set_num_threads(klfast.get_num_threads())
    torch.manual_seed(0)
    hidden = (0.3 * torch.randn(tokens, width)).requires_grad_()
    weight = (0.05 * torch.randn(vocab, width)).requires_grad_()
    states = hidden.detach() + 0.01 * torch.randn(tokens, width)
    head = weight.detach() + 0.002 * torch.randn(vocab, width)
    klfast.warmup(("kl",))
    # What is imported at the first call of an operator is no memory of the loss's.
    first, second = (each[:2].detach().requires_grad_() for each in (hidden, weight))
    klfast.torch.linear_distillation_loss(first, second, states[:2], head[:2]).backward()

    def fused() -> None:
        klfast.torch.linear_distillation_loss(hidden, weight, states, head).backward()

    def unfused() -> None:
        functional = torch.nn.functional
        student = functional.log_softmax(hidden @ weight.T, -1)
        teacher = functional.log_softmax(states @ head.T, -1)
        functional.kl_div(student, teacher, log_target=True, reduction="batchmean").backward()

    def products() -> None:
        logits = hidden.detach() @ weight.detach().T
        torch.mm(states, head.T, out=logits)
        hidden.grad = logits @ head
        weight.grad = logits.T @ states

    run = {"klfast": fused, "unfused": unfused, "products": products}[name]
    with _Peak() as peak:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
    kept = sum(each.grad.nbytes for each in (hidden, weight) if each.grad is not None)
    return {"seconds": seconds, "peak": peak.bytes - kept}


class _Peak:
    """The most memory that the process held inside, above what it held before."""

    def __enter__(self) -> _Peak:
        self.bytes, self._before, self._stop = 0, self._held(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, self._held() - self._before)

    @staticmethod
    def _held() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return 4096 * pages


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

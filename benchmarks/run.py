"""``make bench``: klfast beside a plain read, NumPy, SciPy, PyTorch and JAX, in one run.

Writes RESULTS.md, results.json and roofline.png beside itself; a run of less than everything
writes them only where ``--out`` says. It takes some ten minutes on two cores, 5 GB of memory, and a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import process
import report
from cases import CASES, MAIN_SHAPE, PEER_CASES, QUICK_SHAPES, SHAPES, Shape, text_of
from report import Case, Results

import klfast
from klfast._arrays import FLOATS
from klfast._bench import READ, Timing, bench
from klfast._machine import machine, versions
from klfast._operations import OPERATIONS
from klfast._report import write_json

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure, print, and write the files."""
    options = _options()
    threads, load = _set_threads(options.threads), _busy()
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    cases = tuple(
        case
        for case in (PEER_CASES if options.quick else CASES)
        if options.only is None or case[0] in options.only
    )
    if not cases:
        sys.exit(f"--only: nothing of {', '.join(options.only)} is measured")
    rounds = 2 if options.quick else options.rounds
    measured: list[Case] = []
    for shape in shapes:
        # Every contender runs everything at the main shape, or the first where that is left out.
        peers = (
            cases if shape == (MAIN_SHAPE if MAIN_SHAPE in shapes else shapes[0]) else PEER_CASES
        )
        measured += _measure(shape, cases, peers, rounds, options.patience)
    figures = {} if options.only else process.measure(2 if options.quick else 15)
    results = Results(_about(threads, load, measured), measured, figures)
    print(report.text(results))

    complete = not (options.quick or options.only or options.shapes)
    if options.out is None and not complete:
        return
    out = options.out or HERE
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results.to_dict())
    (out / "RESULTS.md").write_text(report.markdown(results), encoding="utf-8")
    report.picture(results, out / "roofline.png")
    print(f"\nwritten: RESULTS.md, results.json, roofline.png in {out}")


def _measure(
    shape: Shape,
    cases: Sequence[tuple[str, str]],
    with_peers: Sequence[tuple[str, str]],
    rounds: int,
    patience: float,
) -> Iterator[Case]:
    for dtype in dict.fromkeys(dtype for _, dtype in cases):
        for peers in (None, ()):  # all, none
            measures = [
                case[0]
                for case in cases
                if case[1] == dtype and (case in with_peers) == (peers is None)
            ]
            if not measures:
                continue
            _say(f"{text_of(shape)} {dtype}: {', '.join(measures)}")
            timings = bench(*shape, dtype, measures, rounds=rounds, patience=patience, peers=peers)
            for measure in measures:
                mine: dict[str, Timing] = {
                    each.contender: each for each in timings if each.metric == measure
                }
                yield Case(shape, dtype, measure, mine)


def _set_threads(count: int | None) -> int:
    """Give every library the same cores, before any of them starts its threads.

    All size their pools by the cores that the process may use. JAX has no other way to be told,
    and torch.set_num_threads would do more than that: the exponentials of even the smallest
    tensors would then be shared out to threads.
    """
    if count is not None:
        if not hasattr(os, "sched_setaffinity"):
            sys.exit("--threads: this system cannot limit a process to some of the cores")
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= count <= len(cores):
            sys.exit(f"--threads {count}: there are {len(cores)} cores")
        os.sched_setaffinity(0, cores[:count])
    return klfast.get_num_threads()


def _busy() -> str:
    """Return what else the machine does, and say so if it is too much."""
    if not hasattr(os, "getloadavg"):
        return "unknown"
    load = os.getloadavg()[0]
    if load > 0.5:
        _say(
            f"the machine is busy (load {load:.1f}): libraries that wait for each of their threads "
            "suffer more from that than klfast does, so the comparison is not fair to them"
        )
    return f"{load:.2f}"


def _about(threads: int, load: str, cases: Sequence[Case]) -> dict[str, str]:
    """What the figures were measured on."""
    facts = machine()
    first = cases[0]
    rows, vocab = first.shape
    read = first.timings[READ].seconds or 0.0
    inputs = 1 if first.measure in OPERATIONS and OPERATIONS[first.measure].arity == 1 else 2
    size = inputs * rows * vocab * FLOATS[first.dtype]
    installed = [f"{name} {version}" for name, version in versions().items() if version]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": str(facts["processor"]),
        "cores": str(facts["cores"]),
        "threads": str(threads),
        "load before": load,
        "read speed": f"{size / read / 1e9:.3g} GB/s",
        "system": str(facts["platform"]),
        "versions": ", ".join(installed),
        "threads of the libraries": f"klfast, PyTorch and JAX {threads}, as many as there are "
        "cores for them; NumPy and SciPy have one for these functions",
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
    parser.add_argument(
        "--shapes", metavar="LIST", type=_shapes, help="such as 512x131072,1x1000 (default: all)"
    )
    parser.add_argument(
        "--only", metavar="LIST", type=lambda text: text.split(","), help="measures, such as kl,js"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=15, help="default: 15")
    parser.add_argument(
        "--patience", metavar="S", type=float, default=2.0,
        help="seconds after which a contender takes no more turns (default: 2)",
    )  # fmt: skip
    parser.add_argument("--threads", metavar="N", type=int, help="default: one for each core")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write the files")
    return parser.parse_args()


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for part in text.split(","):
        rows, _, vocab = part.partition("x")
        shapes.append((int(rows), int(vocab)))
    return tuple(shapes)


if __name__ == "__main__":
    # What torch.compile builds goes to a folder of its own: nothing of an earlier run is reused.
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        main()

"""The command ``klfast``: ``compare``, ``bench`` and ``info``.

Exit status: 0, done; 1, the job failed (one line on the error stream says why); 2, bad arguments;
3, done, and a limit of ``--fail-above`` or ``--fail-below`` was violated; 130, interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ._arrays import FLOATS
from ._bench import DEFAULT_BENCH_METRICS, Timing, bench
from ._evaluation import Progress, check_statistic, evaluate, measures, plain_json
from ._machine import info, machine, versions
from ._operations import DEFAULT_METRICS, parse_metric
from ._report import grid, table, write_json
from ._sources import SUFFIXES
from .errors import BackendUnavailable

DONE, FAILED, VIOLATED, INTERRUPTED = 0, 1, 3, 130  # argparse itself exits with 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad arguments raise SystemExit(2)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be text to the terminal
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = run(options)
            sys.stdout.flush()  # here, where it is known what to do if nobody reads it
            return status
    except KeyboardInterrupt:
        print("klfast: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not find out again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, OSError, MemoryError, BackendUnavailable) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"klfast: {reason}", file=sys.stderr)
        return FAILED


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say it in one line; where in klfast it was said does not concern the reader."""
    print(f"klfast: warning: {message}", file=sys.stderr)


# klfast compare


def _compare(options: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = options.parser
    above, below = dict(options.fail_above), dict(options.fail_below)
    try:
        names = measures(options.metrics, options.targets is not None)
        for name in (*above, *below):
            check_statistic(name, names)
    except ValueError as error:
        parser.error(str(error))
    if options.columns and options.json is None:
        parser.error("--columns needs --json")
    _check_output(parser, options.json, (options.base, options.test, options.targets))
    if options.threads is not None:
        _set_threads(options.threads)
    with _progress("rows") as progress:
        evaluation = evaluate(
            options.base,
            options.test,
            options.targets,
            metrics=options.metrics,
            temperature=options.temperature,
            input=options.input,
            vocab_size=options.vocab_size,
            backend=options.backend,
            key=options.key,
            chunk_rows=options.chunk_rows,
            progress=progress,
        )
    if evaluation.rows == 0:
        raise ValueError(f"{options.base}: holds no rows; there is nothing to compare")
    summary = evaluation.summary(options.worst)
    violations = summary.violations(above, below)
    if options.json is not None:
        content = evaluation.to_dict(options.worst, options.columns)
        content["limits"] = {"above": above, "below": below, "violations": violations}
        _write(options.json, content)
    if options.json != "-":
        print(table(evaluation, summary))
    sys.stdout.flush()  # the table before what is said about it
    for line in violations:
        print(f"klfast: limit violated: {line}", file=sys.stderr)
    return VIOLATED if violations else DONE


# klfast bench


def _bench(options: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = options.parser
    try:
        for name in options.metrics:
            if parse_metric(name)[0].tokens:
                parser.error(f"metric {name!r} needs targets, which a benchmark has not")
    except ValueError as error:
        parser.error(str(error))
    _check_output(parser, options.json, ())
    if options.threads is not None:
        _set_threads(options.threads)
    with _progress("measures") as progress:
        timings = bench(
            options.rows,
            options.vocab,
            options.dtype,
            options.metrics,
            rounds=options.rounds,
            progress=progress,
        )
    shape = f"{options.rows} x {options.vocab} {options.dtype}"
    if options.json is not None:
        content = {
            "shape": [options.rows, options.vocab],
            "dtype": options.dtype,
            "timings": [
                {name: getattr(each, name) for name in Timing.__slots__} for each in timings
            ],
            "versions": versions(),
            "machine": machine(),
        }
        _write(options.json, content)
    if options.json != "-":
        print(f"two inputs of {shape}, medians of {options.rounds} rounds taken in turns\n")
        print(_timing_table(timings))
    return DONE


def _timing_table(timings: Sequence[Timing]) -> str:
    rows = [["measure", "", "ms", "of read speed", "klfast is faster by", "largest error"]]
    ours = {each.metric: each.seconds for each in timings if each.contender == "klfast"}
    for each in timings:
        if each.seconds is None or each.of_read is None:
            rows.append([each.metric, each.contender, "failed", "", "", ""])
            continue
        own = ours[each.metric]
        peer = own is not None and each.contender not in ("klfast", "plain read")
        rows.append([
            each.metric,
            each.contender,
            f"{1000 * each.seconds:.3g}",
            f"{each.of_read:.2f}",
            f"{each.seconds / own:.1f} x" if peer and own else "",
            "" if each.error is None else f"{each.error:.1e}",
        ])  # fmt: skip
    failures = [
        f"{each.contender} failed at {each.metric}: {each.failure}"
        for each in timings
        if each.failure is not None
    ]
    return "\n".join([*grid(rows, left=2), *failures])


# klfast info


def _info(options: argparse.Namespace) -> int:
    content = info()
    if options.json is not None:
        _write(options.json, content)
    if options.json != "-":
        for part, entries in content.items():
            print(part)
            rows = [[f"  {name}", _said(value)] for name, value in entries.items()]
            print("\n".join(grid(rows, left=2) or ["  cannot be used"]))
    return DONE


def _said(value: Any) -> str:
    return "not installed" if value is None else str(value)


# Shared


def _set_threads(count: int) -> None:
    import klfast

    klfast.set_num_threads(count)


def _write(path: str, content: dict[str, Any]) -> None:
    content = plain_json(content)
    if path == "-":
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    try:
        write_json(path, content)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error


def _check_output(
    parser: argparse.ArgumentParser, path: str | None, inputs: Sequence[str | None]
) -> None:
    """Find out before a long job, not after it, that its result could not be written."""
    if path is None or path == "-":
        return
    output = Path(path)
    if not output.parent.is_dir():
        parser.error(f"--json {path}: there is no folder {output.parent}")
    if output.exists() and not output.is_file():
        parser.error(f"--json {path}: is not a regular file")
    if not os.access(output.resolve().parent, os.W_OK):
        parser.error(f"--json {path}: the folder is not writable")
    for each in inputs:
        if each is not None and output.exists() and Path(each).exists() and output.samefile(each):
            parser.error(f"--json {path}: is one of the inputs, which would be overwritten")


@contextmanager
def _progress(unit: str) -> Iterator[Progress | None]:
    """Show a bar with rate and time left on the error stream, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print('klfast: no progress bar without rich: pip install "klfast[eval]"', file=sys.stderr)
        yield None
        return

    class Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.3g} {unit}/s" if speed else "")

    with bars.Progress(
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        Rate(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# Arguments


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="klfast",
        description="Divergences between the predictions of two models, straight from logits.",
        epilog="Exit status: 0 done, 1 the job failed, 2 bad arguments, 3 a limit was violated.",
    )
    parser.add_argument("--version", action="version", version=f"klfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        help="compare two files of logits, row by row",
        description="Compare the logits of a test model with those of a base model, row by row, "
        f"and print statistics. Files are {', '.join(SUFFIXES)}, of shape (..., vocabulary); "
        "they are memory-mapped and may be larger than memory.",
        epilog="Exit status: 0 done, 1 the job failed, 2 bad arguments, 3 a limit was violated. "
        "Call klfast.evaluate to do the same from Python.",
    )
    compare.set_defaults(run=_compare, parser=compare)
    compare.add_argument("base", metavar="BASE", help="logits of the original model (P)")
    compare.add_argument("test", metavar="TEST", help="logits of the model under test (Q)")
    compare.add_argument(
        "--targets", metavar="FILE", help="the tokens that followed: adds perplexities"
    )
    compare.add_argument("--key", metavar="NAME", help="name of the array in BASE and TEST")
    compare.add_argument(
        "--metrics", metavar="LIST", type=_names, default=None,
        help=f"measures, such as kl,js,renyi:2 (default: {','.join(DEFAULT_METRICS)})",
    )  # fmt: skip
    compare.add_argument(
        "--temperature", metavar="T[,T]", type=_temperature, default=1.0,
        help="divide the logits by it; two values are those of BASE and TEST (default: 1)",
    )  # fmt: skip
    compare.add_argument(
        "--input", choices=("logits", "log_probs", "probs"), default="logits",
        help="what the files hold (default: logits)",
    )  # fmt: skip
    compare.add_argument(
        "--vocab-size", metavar="N", type=_count, help="read only the first N entries of a row"
    )
    compare.add_argument(
        "--worst", metavar="N", type=_count, default=5,
        help="rows to show in which the first measure is largest (default: 5)",
    )  # fmt: skip
    for side, than in (("above", "more"), ("below", "less")):
        compare.add_argument(
            f"--fail-{side}", metavar="NAME=X", type=_limit, action="append", default=[],
            help=f"exit with 3 if a statistic, such as kl.mean, is {than} than X or not a number",
        )  # fmt: skip
    _add_json(compare)
    compare.add_argument(
        "--columns", action="store_true", help="add every value of every row to the JSON"
    )
    compare.add_argument(
        "--chunk-rows", metavar="N", type=_count, help="rows read at a time (default: 64 MiB)"
    )
    compare.add_argument(
        "--backend", choices=("auto", "reference", "cpu", "cuda"), default="auto",
        help="what computes (default: auto)",
    )  # fmt: skip
    _add_threads(compare)

    benchmark = commands.add_parser(
        "bench",
        help="time klfast and the libraries installed, on this machine",
        description="Time the same measures with klfast and with whichever of NumPy, SciPy, "
        "PyTorch and JAX are installed, and with a plain read of the same bytes, taking turns.",
    )
    benchmark.set_defaults(run=_bench, parser=benchmark)
    benchmark.add_argument("--rows", metavar="N", type=_count, default=256)
    benchmark.add_argument("--vocab", metavar="N", type=_count, default=131072)
    benchmark.add_argument("--dtype", choices=tuple(FLOATS), default="float32")
    benchmark.add_argument(
        "--metrics", metavar="LIST", type=_names, default=DEFAULT_BENCH_METRICS,
        help=f"measures, such as kl,js (default: {','.join(DEFAULT_BENCH_METRICS)})",
    )  # fmt: skip
    benchmark.add_argument("--rounds", metavar="N", type=_count, default=5)
    _add_json(benchmark)
    _add_threads(benchmark)

    about = commands.add_parser(
        "info", help="versions, backends, threads, vector width, cache location"
    )
    about.set_defaults(run=_info, parser=about)
    _add_json(about)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE",
        help="write everything in full precision; - prints it instead of the table",
    )  # fmt: skip


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", metavar="N", type=_count, help="threads of the CPU kernels")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _temperature(text: str) -> float | tuple[float, float]:
    values = [_number(part) for part in text.split(",")]
    if len(values) > 2 or any(not 0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or two positive numbers")
    return values[0] if len(values) == 1 else (values[0], values[1])


def _limit(text: str) -> tuple[str, float]:
    name, equals, limit = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=X, such as kl.mean=0.01")
    return name.strip(), _number(limit)

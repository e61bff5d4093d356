"""The command ``klfast``: ``compare``, ``convert``, ``bench`` and ``info``.

Exit status: 0, done; 1, the job failed (one line on the error stream says why); 2, bad arguments;
3, done, and a limit of ``--fail-above`` or ``--fail-below`` was violated; 130, interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ._arrays import FLOATS
from ._bench import DEFAULT_BENCH_METRICS, Timing, bench
from ._columns import check_parquet, write_parquet
from ._evaluation import EVALUATION_METRICS, Evaluation, measures
from ._heads import open_head
from ._job import Job, Progress, as_source
from ._machine import info, machine, versions
from ._operations import parse_metric
from ._report import Results, grid, write_json, write_text
from ._sources import SUFFIXES, SourceError, open_logits
from ._statistics import Resampling, check_statistic, plain_json
from ._tokens import Vocabulary
from .errors import BackendUnavailable

DONE, FAILED, VIOLATED, INTERRUPTED = 0, 1, 3, 130  # argparse itself exits with 2

_LONG_JOB = 2**30  # bytes to read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad arguments raise SystemExit(2)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be text to the terminal
            stream.reconfigure(errors="backslashreplace")
    command = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(command, argparse.Namespace(command=command))
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return run(options)
    except KeyboardInterrupt:
        print("klfast: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        return FAILED
    except (ValueError, OSError, MemoryError, ImportError, BackendUnavailable) as error:
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
    _check_compare(options)
    if options.threads is not None:
        _set_threads(options.threads)
    if options.llama_compat:
        return _llama_compat(options)
    try:
        job = Job(
            *_both_sides(options),
            options.targets,
            sequences=options.sequences,
            where=options.where,
            ignore_index=options.ignore_index,
            metrics=options.metrics,
            temperature=options.temperature,
            input=options.input,
            vocab_size=options.vocab_size,
            backend=options.backend,
            key=options.key,
            chunk_rows=options.chunk_rows,
        )
        for name, _ in (*options.fail_above, *options.fail_below):
            check_statistic(name, job.names)
    except SourceError:
        raise
    except ValueError as error:
        parser.error(str(error))
    if job.rows == 0:
        raise ValueError(f"{options.base}: holds no rows; there is nothing to compare")
    if not len(job.kept):
        raise ValueError(f"all {job.rows} rows are left out; there is nothing to compare")
    _say_plan(job)
    try:
        with _progress("rows", job.row_bytes) as progress, _surviving_truncation():
            evaluations = job.run(
                progress, options.checkpoint, options.resume, options.checkpoint_every, options.dask
            )
    except KeyboardInterrupt:
        if options.checkpoint is None:
            raise
        command = [*options.command, *([] if options.resume else ["--resume"])]
        print(
            f"klfast: interrupted; {job.done} of {job.rows} rows are kept in {options.checkpoint}; "
            f"go on with: klfast {shlex.join(command)}",
            file=sys.stderr,
        )
        return INTERRUPTED
    return _conclude(options, evaluations)


def _surviving_truncation() -> AbstractContextManager[None]:
    """Have a file that is cut off while it is read fail the job in the end, and not at once."""
    try:
        from .kernels.cpu.faults import zeros_beyond_files
    except ImportError:  # no compiler: the reference reads
        return nullcontext()
    guard: AbstractContextManager[None] = zeros_beyond_files()
    return guard


def _conclude(options: argparse.Namespace, evaluations: Sequence[Evaluation]) -> int:
    """Write and print all results, and decide on the exit status."""
    above, below = dict(options.fail_above), dict(options.fail_below)
    results = Results.of(
        evaluations, worst=options.worst, bootstrap=options.bootstrap, above=above, below=below
    )
    if options.json is not None:
        _write(options.json, results.content(options.columns))
    if options.markdown is not None:
        write_text(options.markdown, results.markdown())
    if options.parquet is not None:
        write_parquet(options.parquet, evaluations)
    if options.report is not None:
        from ._html import write_page

        write_page(results, options.report, options.vocabulary)
    if options.json != "-":
        _print(results.text())
    violations = results.violated()
    for line in violations:
        print(f"klfast: limit violated: {line}", file=sys.stderr)
    empty = [each.test["name"] for each in evaluations if len(each.nan_rows) == each.rows]
    for name in empty:
        reason = "every row has a measure that is NaN; there are no statistics"
        print(f"klfast: {name}: {reason}", file=sys.stderr)
    return VIOLATED if violations else FAILED if empty else DONE


def _check_compare(options: argparse.Namespace) -> None:
    """Find out before a long job, not after it, what could not be done."""
    parser: argparse.ArgumentParser = options.parser
    if options.columns and options.json is None:
        parser.error("--columns needs --json")
    if options.dask is not None and (options.head or options.hidden or options.llama_compat):
        parser.error("--dask does not go with --hidden, --head, --llama-compat")
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    inputs = (options.base, *options.tests, options.targets, options.sequences,
              options.where, *options.hidden, *options.head)  # fmt: skip
    for name in ("json", "markdown", "parquet"):
        _check_output(parser, f"--{name}", getattr(options, name), inputs)
    for name in ("report", "checkpoint"):
        _check_folder(parser, f"--{name}", getattr(options, name))
    if options.parquet is not None:
        check_parquet()
    options.vocabulary = None
    if options.tokenizer is not None:
        if options.report is None:
            parser.error("--tokenizer needs --report")
        options.vocabulary = Vocabulary(options.tokenizer)
    if options.report is not None:
        from ._html import check_report

        check_report()
    try:
        measures(options.metrics, with_targets=True)
        Resampling(options.bootstrap)
    except ValueError as error:
        parser.error(str(error))


def _both_sides(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """BASE and the TESTs, as paths, or as hidden states with output heads."""
    paths = [options.base, *options.tests]
    if not (options.head or options.hidden):
        return paths[0], paths[1:]
    parser: argparse.ArgumentParser = options.parser
    if options.head and options.hidden:
        parser.error("--head and --hidden: BASE and TEST are one or the other; give only one")
    option, given = ("--head", options.head) if options.head else ("--hidden", options.hidden)
    if len(given) not in (1, len(paths)):
        parser.error(f"{option} is given {len(given)} times; accepted: 1 or {len(paths)} times")
    others = given * len(paths) if len(given) == 1 else given
    pairs = [
        (path, other) if options.head else (other, path)
        for path, other in zip(paths, others, strict=True)
    ]
    sources = [open_head(hidden, head) for hidden, head in pairs]
    return sources[0], sources[1:]


def _llama_compat(options: argparse.Namespace) -> int:
    """Print what llama.cpp would, and nothing else."""
    from .llama_cpp import BaseLogits, statistics

    parser: argparse.ArgumentParser = options.parser
    for name in ("json", "markdown", "parquet", "report", "checkpoint", "targets", "sequences",
                 "where", "ignore_index", "metrics", "vocab_size"):  # fmt: skip
        if getattr(options, name) is not None:
            parser.error(f"--llama-compat does not go with --{name.replace('_', '-')}")
    if options.fail_above or options.fail_below or options.hidden:
        parser.error("--llama-compat does not go with --fail-above, --fail-below, --hidden")
    base = BaseLogits(options.base)
    for number, test in enumerate(options.tests):
        if len(options.tests) > 1:
            _print(f"{os.linesep if number else ''}{test}")
        for line in statistics(base, as_source(test, "test", options.key)):
            _print(line)  # one every few seconds, of long files
    return DONE


def _say_plan(job: Job) -> None:
    """Say what a job will need, to whoever looks on, and in the log of a long one."""
    rows = len(job.kept)
    size = rows * job.row_bytes
    if sys.stderr.isatty() or size >= _LONG_JOB:
        print(
            f"klfast: {rows} rows of {job.base.shape[-1]}, {_bytes(size)} to read; at most "
            f"{_bytes(job.memory)} of memory beside mapped files",
            file=sys.stderr,
        )


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError  # the loop has returned


# klfast convert


def _convert(options: argparse.Namespace) -> int:
    from .llama_cpp import BaseLogits, convert

    parser: argparse.ArgumentParser = options.parser
    _check_output(parser, "OUT", options.output, (options.source, options.tokens))
    convert(options.source, options.output, key=options.key, tokens=options.tokens,
            context=options.context, input=options.input)  # fmt: skip
    source = open_logits(options.source, options.key)
    if isinstance(source, BaseLogits) and options.output.lower().endswith((".npy", ".safetensors")):
        share = source.at_floor()
        if share:
            print(
                f"klfast: {100 * share:.3g} % of the entries are at the floor of their row: "
                f"{options.source} knows only upper bounds of them, and {options.output} holds "
                f"these; compare {options.source} itself, which is read accordingly",
                file=sys.stderr,
            )
    return DONE


# klfast bench


def _bench(options: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = options.parser
    try:
        for name in options.metrics:
            if parse_metric(name)[0].tokens:
                parser.error(f"metric {name!r} needs targets, which a benchmark has not")
    except ValueError as error:
        parser.error(str(error))
    _check_output(parser, "--json", options.json, ())
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
        _print(f"two inputs of {shape}, medians of {options.rounds} rounds taken in turns\n")
        _print(_timing_table(timings))
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
            _print(part)
            rows = [[f"  {name}", _said(value)] for name, value in entries.items()]
            _print("\n".join(grid(rows, left=2) or ["  cannot be used"]))
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
        _print(json.dumps(content, indent=2, allow_nan=False))
    else:
        write_json(path, content)


#: What is written for signs of ours that the output stream does not have.
_PLAIN = {"±": "+-", "Δ": "d"}


def _print(text: str) -> None:
    """Print at once: what comes after it on the error stream is said about it."""
    for sign, plain in _PLAIN.items():
        try:
            sign.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = text.replace(sign, plain)
    try:
        print(text, flush=True)
    except OSError as error:
        # Python must not find out again when it flushes in the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"standard output: cannot be written ({error.strerror})") from error


def _check_output(
    parser: argparse.ArgumentParser, option: str, path: str | None, inputs: Sequence[str | None]
) -> None:
    """Find out before a long job, not after it, that its result could not be written."""
    if path is None or (path == "-" and option == "--json"):
        return
    output = Path(path)
    if not output.parent.is_dir():
        parser.error(f"{option} {path}: there is no folder {output.parent}")
    if output.exists() and not output.is_file():
        parser.error(f"{option} {path}: is not a regular file")
    if not os.access(output.resolve().parent, os.W_OK):
        parser.error(f"{option} {path}: the folder is not writable")
    for each in inputs:
        if each is not None and output.exists() and Path(each).exists() and output.samefile(each):
            parser.error(f"{option} {path}: is one of the inputs, which would be overwritten")


def _check_folder(parser: argparse.ArgumentParser, option: str, folder: str | None) -> None:
    """The same of a folder, which is made with those above it where they are not there."""
    if folder is None:
        return
    place = Path(folder).absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not there.is_dir():
        parser.error(f"{option} {folder}: {'' if there == place else f'{there} '}is not a folder")
    if not os.access(there, os.W_OK):
        parser.error(f"{option} {folder}: the folder {there} is not writable")


@contextmanager
def _progress(unit: str, unit_bytes: int = 0) -> Iterator[Progress | None]:
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
            if not speed:
                return Text("")
            volume = f", {speed * unit_bytes / 1e9:.3g} GB/s" if unit_bytes else ""
            return Text(f"{speed:.3g} {unit}/s{volume}")

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

_FILES = (
    f"Each is a {', '.join(SUFFIXES)} file of shape (..., vocabulary), a safetensors .index.json, "
    "a Zarr array, a base-logits file of llama.cpp, or a folder or a quoted pattern of such files, "
    "which are read one after the other; all may be larger than memory. A .json file names hidden "
    "states and an output head: an object with hidden, weight, and, where there are such, bias, "
    "scale and softcap."
)


_EXAMPLES = """examples:
  klfast compare base.npy int4.npy
  klfast compare base.npy int4.npy --targets targets.npy --ignore-index -100 --report page
  klfast compare base.npy int8.npy int4.npy --json report.json --fail-above kl.mean=0.01
  klfast compare 'base-*.safetensors' 'int4-*.safetensors' --checkpoint job --resume
  klfast compare base_states.npy int4_states.npy --head model.safetensors
  klfast compare base.kld q5_0.kld"""
_CONVERTED = """examples:
  klfast convert base.kld base.npy
  klfast convert base.npy base.kld --tokens tokens.npy --context 512"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said; paragraphs of its help stay."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(
            part if part.startswith("examples:") else fill(part, width, indent)
            for part in text.split("\n\n")
        )


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(
        prog="klfast",
        description="Divergences between the predictions of two models, straight from logits.",
        epilog="Exit status: 0 done, 1 the job failed, 2 bad arguments, 3 a limit was violated.",
    )
    parser.add_argument("--version", action="version", version=f"klfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        help="compare files of logits, row by row",
        usage="klfast compare BASE TEST [TEST ...] [options]",
        description="Compare the logits of one or more test models with those of a base model, row "
        f"by row, and print statistics. {_FILES}",
        epilog=f"{_EXAMPLES}\n\nExit status: 0 done, 1 the job failed, 2 bad arguments, 3 a limit "
        "was violated, 130 interrupted. Call klfast.evaluate to do the same from Python.",
    )
    compare.set_defaults(run=_compare, parser=compare)
    compare.add_argument("base", metavar="BASE", help="logits of the original model (P)")
    compare.add_argument(
        "tests", metavar="TEST", nargs="+",
        help="logits of a model under test (Q); of several, each is compared with BASE",
    )  # fmt: skip

    inputs = compare.add_argument_group("what is read")
    inputs.add_argument(
        "--targets", metavar="FILE", help="the tokens that followed: adds perplexities"
    )
    inputs.add_argument(
        "--sequences", metavar="FILE",
        help="which text each row belongs to: intervals are then made by drawing whole texts",
    )  # fmt: skip
    inputs.add_argument(
        "--where", metavar="FILE",
        help="booleans, one a row: rows that are False, such as padding, are left out",
    )  # fmt: skip
    inputs.add_argument(
        "--ignore-index", metavar="N", type=_integer,
        help="leave out rows whose target is this number, such as -100",
    )  # fmt: skip
    inputs.add_argument("--key", metavar="NAME", help="name of the array in BASE and TEST")
    inputs.add_argument(
        "--head", metavar="FILE", action="append", default=[],
        help="BASE and TEST hold hidden states, and FILE the output head (weight, and bias if "
        "there is one): give it once for all of them, or once for each in order",
    )  # fmt: skip
    inputs.add_argument(
        "--hidden", metavar="FILE", action="append", default=[],
        help="BASE and TEST hold output heads, and FILE the hidden states: once for all of them, "
        "or once for each in order",
    )  # fmt: skip
    inputs.add_argument(
        "--temperature", metavar="T[,T]", type=_temperature, default=1.0,
        help="divide the logits by it; two values are those of BASE and TEST (default: 1)",
    )  # fmt: skip
    inputs.add_argument(
        "--input", choices=("logits", "log_probs", "probs"), default="logits",
        help="what the files hold (default: logits)",
    )  # fmt: skip
    inputs.add_argument(
        "--vocab-size", metavar="N", type=_count, help="read only the first N entries of a row"
    )

    statistics = compare.add_argument_group("what is computed")
    statistics.add_argument(
        "--metrics", metavar="LIST", type=_names, default=None,
        help="measures, such as kl,js,renyi:2, or all "
        f"(default: {','.join(EVALUATION_METRICS)})",
    )  # fmt: skip
    statistics.add_argument(
        "--bootstrap", metavar="N", type=_whole, default=1000,
        help="bootstrap samples for confidence intervals; 0: no intervals (default: 1000)",
    )  # fmt: skip
    statistics.add_argument(
        "--worst", metavar="N", type=_whole, default=5,
        help="rows to show in which the first measure is largest; 0: none (default: 5)",
    )  # fmt: skip
    for side, than in (("above", "more"), ("below", "less")):
        statistics.add_argument(
            f"--fail-{side}", metavar="NAME=X", type=_limit, action="append", default=[],
            help=f"exit with 3 if a statistic, such as kl.mean or kl.high, of any TEST is {than} "
            "than X or not a number",
        )  # fmt: skip
    statistics.add_argument(
        "--llama-compat", action="store_true",
        help="print only what llama-perplexity --kl-divergence prints, in its own way: KL over "
        "the entries above its floor, which may be negative",
    )  # fmt: skip

    results = compare.add_argument_group("what is written")
    _add_json(results)
    results.add_argument(
        "--columns", action="store_true", help="add every value of every row to the JSON"
    )
    results.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown")
    results.add_argument(
        "--parquet", metavar="FILE", help="write every value of every row (needs pyarrow)"
    )
    results.add_argument("--report", metavar="DIR", help="write a page with pictures (HTML)")
    results.add_argument(
        "--tokenizer", metavar="FILE",
        help="a tokenizer.json, or a file with one token a line: the report shows worst tokens "
        "with their text",
    )  # fmt: skip

    running = compare.add_argument_group("how it runs")
    running.add_argument(
        "--checkpoint", metavar="DIR", help="keep what is done in a folder, to go on if interrupted"
    )
    running.add_argument(
        "--resume", action="store_true",
        help="go on with what --checkpoint holds, if it holds anything",
    )  # fmt: skip
    running.add_argument(
        "--checkpoint-every", metavar="SECONDS", type=_seconds, default=10.0,
        help="how often to keep what is done (default: 10)",
    )  # fmt: skip
    running.add_argument(
        "--dask", metavar="ADDRESS",
        help='share the work among the workers of a Dask scheduler, or of a "local" cluster',
    )  # fmt: skip
    running.add_argument(
        "--chunk-rows", metavar="N", type=_count, help="rows read at a time (default: 64 MiB)"
    )
    running.add_argument(
        "--backend", choices=("auto", "reference", "cpu", "cuda"), default="auto",
        help="what computes (default: auto)",
    )  # fmt: skip
    _add_threads(running)

    converting = commands.add_parser(
        "convert",
        help="convert logits between llama.cpp's base-logits files and arrays",
        description="Convert a file of logits: OUT is a .npy or .safetensors file, or else a "
        "base-logits file of llama.cpp, which needs --tokens and --context unless IN is one. Of "
        "such a file arrays get the log-probabilities as they are stored, upper bounds at the "
        "floor of a row included: to compare it, name it itself.",
        epilog=_CONVERTED,
    )
    converting.set_defaults(run=_convert, parser=converting)
    converting.add_argument("source", metavar="IN")
    converting.add_argument("output", metavar="OUT")
    converting.add_argument("--key", metavar="NAME", help="name of the array in IN")
    converting.add_argument(
        "--tokens", metavar="FILE", help="all tokens of the text, context after context"
    )
    converting.add_argument("--context", metavar="N", type=_count, help="tokens in a context")
    converting.add_argument(
        "--input", choices=("logits", "log_probs"), default="logits",
        help="what IN holds: log_probs are values that were converted from a file of llama.cpp, "
        "and become the same file again (default: logits)",
    )  # fmt: skip

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


def _add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--json", metavar="FILE",
        help="write everything in full precision; - prints it instead of the table",
    )  # fmt: skip


def _add_threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--threads", metavar="N", type=_count, help="threads of the CPU kernels")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def _whole(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _seconds(text: str) -> float:
    seconds = _number(text)
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0")
    return seconds


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

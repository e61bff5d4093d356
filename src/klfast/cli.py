"""The command ``klfast``: ``compare``, ``convert``, ``bench`` and ``info``.

Exit status: 0, done; 1, the job failed (one line on the error stream says why), or every row of a
candidate holds NaN; 2, bad arguments; 3, done, and a limit of ``--fail-above`` or ``--fail-below``
was violated; 130, interrupted.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ._bench import Timing, bench
from ._columns import write_parquet
from ._evaluation import Evaluation
from ._heads import open_head
from ._job import Job
from ._machine import info, machine, versions
from ._operations import parse_metric
from ._options import check_compare, check_output, parser_of_commands
from ._report import Results, grid, write_text
from ._sources import SourceError, as_source, open_logits
from ._statistics import check_statistic
from ._terminal import progress_of, say, show_warning, write
from .errors import BackendUnavailable

DONE, FAILED, VIOLATED, INTERRUPTED = 0, 1, 3, 130  # argparse itself exits with 2

_LONG_JOB = 2**30  # bytes to read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad arguments raise SystemExit(2)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be text to the terminal
            stream.reconfigure(errors="backslashreplace")
    command = sys.argv[1:] if arguments is None else list(arguments)
    options = parser_of_commands().parse_args(command, argparse.Namespace(command=command))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return _COMMANDS[options.name](options)
    except KeyboardInterrupt:
        print("klfast: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        return FAILED
    except (ValueError, OSError, MemoryError, ImportError, BackendUnavailable) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"klfast: {reason}", file=sys.stderr)
        return FAILED


# klfast compare


def _compare(options: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = options.parser
    check_compare(options)
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
        with progress_of("rows", job.row_bytes) as progress, _surviving_truncation():
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
        write(options.json, results.content(options.columns))
    if options.markdown is not None:
        write_text(options.markdown, results.markdown())
    if options.parquet is not None:
        write_parquet(options.parquet, evaluations)
    if options.report is not None:
        from ._html import write_page

        write_page(results, options.report, options.vocabulary)
    if options.json != "-":
        say(results.text())
    violations = results.violated()
    for line in violations:
        print(f"klfast: limit violated: {line}", file=sys.stderr)
    unknown = [each.nan_rows == each.rows for each in results.summaries]
    for evaluation in itertools.compress(evaluations, unknown):
        reason = "every row has a measure that is NaN; there are no statistics"
        print(f"klfast: {evaluation.test['name']}: {reason}", file=sys.stderr)
    return VIOLATED if violations else FAILED if any(unknown) else DONE


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
            say(f"\n{test}" if number else test)
        for line in statistics(base, as_source(test, "test", options.key)):
            say(line)  # one every few seconds, of long files
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
    check_output(parser, "OUT", options.output, (options.source, options.tokens))
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
    check_output(parser, "--json", options.json, ())
    if options.threads is not None:
        _set_threads(options.threads)
    with progress_of("measures") as progress:
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
        write(options.json, content)
    if options.json != "-":
        say(f"two inputs of {shape}, medians of {options.rounds} rounds taken in turns\n")
        say(_timing_table(timings))
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
        write(options.json, content)
    if options.json != "-":
        for part, entries in content.items():
            say(part)
            rows = [[f"  {name}", _said(value)] for name, value in entries.items()]
            say("\n".join(grid(rows, left=2) or ["  cannot be used"]))
    return DONE


def _said(value: Any) -> str:
    return "not installed" if value is None else str(value)


def _set_threads(count: int) -> None:
    import klfast

    klfast.set_num_threads(count)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compare": _compare, "convert": _convert, "bench": _bench, "info": _info,
}  # fmt: skip

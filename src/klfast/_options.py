"""The arguments of the command line: what they may be, and what does not go together."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._arrays import FLOATS
from ._bench import DEFAULT_BENCH_METRICS
from ._columns import check_parquet
from ._measuring import EVALUATION_METRICS, measures
from ._sources import SUFFIXES
from ._statistics import Resampling
from ._tokens import Vocabulary

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


def parser_of_commands() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(
        prog="klfast",
        description="Divergences between the predictions of two models, straight from logits.",
        epilog="Exit status: 0 done, 1 the job failed, 2 bad arguments, 3 a limit was violated.",
    )
    parser.add_argument("--version", action="version", version=f"klfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")

    compare = commands.add_parser(
        "compare",
        help="compare files of logits, row by row",
        usage="klfast compare BASE TEST [TEST ...] [options]",
        description="Compare the logits of one or more test models with those of a base model, row "
        f"by row, and print statistics. {_FILES}",
        epilog=f"{_EXAMPLES}\n\nExit status: 0 done, 1 the job failed, 2 bad arguments, 3 a limit "
        "was violated, 130 interrupted. Call klfast.evaluate to do the same from Python.",
    )
    compare.set_defaults(parser=compare)
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
    converting.set_defaults(parser=converting)
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
    benchmark.set_defaults(parser=benchmark)
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
    about.set_defaults(parser=about)
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


def _count(text: str, least: int = 1) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return number


def _whole(text: str) -> int:
    return _count(text, 0)


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


# What can be known to fail before a long job


def check_compare(options: argparse.Namespace) -> None:
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
        check_output(parser, f"--{name}", getattr(options, name), inputs)
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


def check_output(
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

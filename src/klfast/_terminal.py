"""What a person sees of the command line: its output, one line for a warning, and a bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ._job import Progress
from ._report import write_json
from ._statistics import plain_json

#: What is written for signs of ours that the output stream does not have.
_PLAIN = {"±": "+-", "Δ": "d"}


def say(text: str) -> None:
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


def write(path: str, content: dict[str, Any]) -> None:
    content = plain_json(content)
    if path == "-":
        say(json.dumps(content, indent=2, allow_nan=False))
    else:
        write_json(path, content)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say it in one line; where in klfast it was said does not concern the reader."""
    print(f"klfast: warning: {message}", file=sys.stderr)


@contextmanager
def progress_of(unit: str, unit_bytes: int = 0) -> Iterator[Progress | None]:
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

"""Results as text for people, and as files for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._evaluation import Evaluation, Statistics, Summary

_HEADINGS = ("mean", "error", "median", "90 %", "95 %", "99 %", "99.9 %", "max")
_FIELDS = ("mean", "standard_error", "median", "p90", "p95", "p99", "p99_9", "max")
_NAMED_NAN_ROWS = 10


def table(evaluation: Evaluation, summary: Summary) -> str:
    """Lay out an evaluation for a person: what was compared, statistics, worst rows."""
    lines = []
    for role, source in (("base", evaluation.base), ("test", evaluation.test)):
        shape = " x ".join(str(n) for n in source["shape"])
        lines.append(f"{role}  {source['name']}  {source['dtype']}, {shape}")
    rate = evaluation.rows / evaluation.seconds if evaluation.seconds else 0.0
    lines.append(f"rows  {evaluation.rows} in {evaluation.seconds:.3g} s ({rate:.3g} rows/s)")
    if summary.nan_rows:
        numbers = [str(row) for row in evaluation.nan_rows[:_NAMED_NAN_ROWS]]
        more = ", ..." if summary.nan_rows > len(numbers) else ""
        plural = "s" if summary.nan_rows > 1 else ""
        lines.append(
            f"NaN   {summary.nan_rows} row{plural} left out of all statistics: "
            f"{', '.join(numbers)}{more}"
        )

    shown = {name: each for name, each in summary.measures.items() if name != "same_top"}
    if shown:
        body = [[name, *_cells(each)] for name, each in shown.items()]
        lines += ["", *grid([["measure", *_HEADINGS], *body])]
    for name, each in shown.items():
        if each.infinite:
            lines.append(f"{name} is infinite in {each.infinite} of the rows")

    pairs = []
    if (same := summary.measures.get("same_top")) is not None:
        pairs.append(["same top token", _plus_minus(same.mean, same.standard_error, percent=True)])
    if (perplexity := summary.perplexity) is not None:
        change = summary.measures.get("delta_prob")
        pairs += [
            ["perplexity of base", _plus_minus(perplexity.base, perplexity.base_error)],
            ["perplexity of test", _plus_minus(perplexity.test, perplexity.test_error)],
            ["ratio test / base", _plus_minus(perplexity.ratio, perplexity.ratio_error)],
        ]
        if change is not None:
            text = _plus_minus(change.mean, change.standard_error, percent=True)
            pairs.append(["change of target's probability", text])
    if pairs:
        lines += ["", *grid(pairs, left=2)]

    if summary.worst_rows:
        names = list(summary.measures)
        rows = [[str(each.row), *(f"{each.values[name]:.4g}" for name in names)]
                for each in summary.worst_rows]  # fmt: skip
        lines += ["", f"worst rows by {names[0]}", *grid([["row", *names], *rows])]
    return "\n".join(lines)


def grid(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align columns: the first ``left`` of them to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file beside ``path`` and rename it: all of it or nothing."""
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _cells(statistics: Statistics) -> list[str]:
    values = [getattr(statistics, name) for name in _FIELDS]
    return [f"{value:.5g}" if i == 0 else f"{value:.2g}" if i == 1 else f"{value:.4g}"
            for i, value in enumerate(values)]  # fmt: skip


def _plus_minus(value: float, error: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.4g} % ± {100 * error:.2g} %"
    return f"{value:.6g} ± {error:.2g}"

"""Results as text for people, and as files for programs."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ._files import replacing
from ._machine import machine, versions
from ._statistics import plain_json

if TYPE_CHECKING:
    from ._evaluation import Evaluation
    from ._statistics import Bucket, Difference, Summary

_QUANTILES = {
    "median": "median", "p90": "90 %", "p95": "95 %", "p99": "99 %", "p99_9": "99.9 %",
    "max": "max",
}  # fmt: skip
_NAMED_NAN_ROWS = 10
_FEW_SEQUENCES = 20

Grid = list[list[str]]


@dataclass(frozen=True)
class Results:
    """All that is to be said of one or more candidates: every way of saying it starts here.

    ``violations`` are lists of lines, one list a candidate, of the ``limits``.
    """

    evaluations: Sequence[Evaluation]
    summaries: Sequence[Summary]
    differences: Sequence[Difference]
    violations: Sequence[Sequence[str]]
    limits: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(
        cls,
        evaluations: Sequence[Evaluation],
        *,
        worst: int = 5,
        bootstrap: int = 1000,
        above: Mapping[str, float] | None = None,
        below: Mapping[str, float] | None = None,
    ) -> Results:
        """Summarize, compare the candidates by pairs, and hold them against limits."""
        from ._measuring import compares

        summaries = [each.summary(worst, bootstrap=bootstrap) for each in evaluations]
        differences = [
            first.versus(second, bootstrap=bootstrap)
            for first, second in itertools.combinations(evaluations, 2)
            if compares(first.metrics[0])
        ]
        given = {"above": dict(above or {}), "below": dict(below or {})}
        limits = {side: each for side, each in given.items() if each}
        violations = [each.violations(above, below) for each in summaries]
        return cls(evaluations, summaries, differences, violations, limits)

    def violated(self) -> list[str]:
        """All violations, with the names of the candidates if there are several."""
        return [
            f"{evaluation.test['name']}: {line}" if len(self.evaluations) > 1 else line
            for evaluation, lines in zip(self.evaluations, self.violations, strict=True)
            for line in lines
        ]

    def overview(self) -> Grid:
        """The first measure, flips and perplexity of each candidate, a line each."""
        return _candidates(self.evaluations, self.summaries)

    def text(self) -> str:
        """What the command line prints."""
        parts = [table(*each) for each in zip(self.evaluations, self.summaries, strict=True)]
        if len(parts) > 1:
            lines = grid(self.overview())
            if self.differences:
                lines += ["", *(each.verdict for each in self.differences)]
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def content(self, columns: bool = False) -> dict[str, Any]:
        """Everything, ready for ``json.dump``; ``columns`` adds every value of every row."""
        contents = [
            content(evaluation, summary, columns)
            for evaluation, summary in zip(self.evaluations, self.summaries, strict=True)
        ]
        report = contents[0]
        if len(contents) > 1:
            report = {
                "candidates": contents,
                "differences": [asdict(each) for each in self.differences],
            }
        limits = {side: dict(self.limits.get(side, {})) for side in ("above", "below")}
        report["limits"] = {**limits, "violations": self.violated()}
        plain: dict[str, Any] = plain_json(report)
        return plain

    def markdown(self) -> str:
        """Everything that `text` says, such as for a pull request."""
        return _markdown(self)


class Tables(NamedTuple):
    """A summary as cells of text, each with a header line."""

    name: str  # of the first measure
    measures: Grid
    notes: list[str]  # what has to be known to read the measures
    pairs: Grid  # without a header
    by_confidence: Grid
    by_position: Grid


def tables(summary: Summary) -> Tables:
    """A summary as cells of text, for any kind of page."""
    return Tables(
        next(iter(summary.measures)),
        _measures(summary),
        _notes(summary),
        _pairs(summary),
        _buckets(summary.by_confidence),
        _buckets(summary.by_position),
    )


def table(evaluation: Evaluation, summary: Summary) -> str:
    """Lay out an evaluation for a person: what was compared, statistics, worst rows."""
    lines = [f"{role:5} {text}" for role, text in heading(evaluation, summary)]
    parts = tables(summary)
    if len(parts.measures) > 1:
        lines += ["", *grid(parts.measures), *parts.notes]
    if parts.pairs:
        lines += ["", *grid(parts.pairs, left=2)]
    if len(parts.by_confidence) > 1:
        title = f"mean {parts.name} by the base's largest probability"
        lines += ["", title, *grid(parts.by_confidence)]
    if len(worst := worst_cells(summary)) > 1:
        lines += ["", f"worst rows by {parts.name}", *grid(worst)]
    return "\n".join(lines)


def _markdown(results: Results) -> str:
    lines = [f"# Compared with {_escaped(results.evaluations[0].base['name'])}", ""]
    lines += [*_markdown_grid(results.overview()), ""]
    lines += [f"- {_escaped(each.verdict)}" for each in results.differences]
    lines += [f"- **limit violated**: {_escaped(line)}" for line in results.violated()]
    for evaluation, summary in zip(results.evaluations, results.summaries, strict=True):
        lines += ["", f"## {_escaped(evaluation.test['name'])}", ""]
        lines += [f"- {role}: {_escaped(text)}" for role, text in heading(evaluation, summary)]
        cells = tables(summary)
        parts = [
            ("", cells.measures),
            ("", [["statistic", "value"], *cells.pairs]),
            (f"Mean {cells.name} by the base's largest probability", cells.by_confidence),
            (f"Mean {cells.name} by position in the sequence", cells.by_position),
            (f"Worst rows by {cells.name}", worst_cells(summary)),
        ]
        for title, grids in parts:
            if len(grids) > 1:
                lines += ["", *([f"### {_escaped(title)}", ""] if title else [])]
                lines += _markdown_grid(grids)
        lines += ["", *(f"- {line}" for line in cells.notes)]
    return "\n".join(lines).rstrip() + "\n"


def content(evaluation: Evaluation, summary: Summary, columns: bool = False) -> dict[str, Any]:
    """Everything that was compared and found, ready for ``json.dump``.

    ``columns`` adds every value of every row.
    """
    result: dict[str, Any] = {
        "base": evaluation.base,
        "test": evaluation.test,
        "settings": evaluation.settings,
        **summary.to_dict(),
        "nan_rows": evaluation.nan_rows,
        "seconds": evaluation.seconds,
        "versions": versions(),
        "machine": machine(),
    }
    if columns:
        result["columns"] = evaluation.columns
    plain: dict[str, Any] = plain_json(result)
    return plain


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
    """Write JSON, all of it or nothing."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def heading(evaluation: Evaluation, summary: Summary) -> list[tuple[str, str]]:
    """What was compared, and how many rows, as pairs of a word and a text."""
    lines = []
    for role, source in (("base", evaluation.base), ("test", evaluation.test)):
        shape = " x ".join(str(n) for n in source["shape"])
        lines.append((role, f"{source['name']}  {source['dtype']}, {shape}"))
    rate = evaluation.rows / evaluation.seconds if evaluation.seconds else 0.0
    texts = "" if summary.sequences is None else f" of {summary.sequences} sequences"
    rows = f"{evaluation.rows}{texts} in {evaluation.seconds:.3g} s ({rate:.3g} rows/s)"
    lines.append(("rows", rows))
    if dropped := evaluation.left_out:
        lines.append(("where", f"{dropped} of {dropped + evaluation.rows} rows are left out"))
    if summary.nan_rows:
        numbers = [str(row) for row in evaluation.nan_rows[:_NAMED_NAN_ROWS]]
        more = ", ..." if summary.nan_rows > len(numbers) else ""
        plural = "s" if summary.nan_rows > 1 else ""
        left_out = f"{summary.nan_rows} row{plural} left out of all statistics: "
        lines.append(("NaN", left_out + ", ".join(numbers) + more))
    return lines


def _has_intervals(summary: Summary) -> bool:
    return any(each.low == each.low for each in summary.measures.values())


def _measures(summary: Summary) -> Grid:
    known = _has_intervals(summary)
    spread = {"low": "from", "high": "to"} if known else {"standard_error": "error"}
    fields = {"mean": "mean", **spread, **_QUANTILES}
    rows = [["measure", *fields.values()]]
    for name, each in summary.measures.items():
        if name != "same_top":
            digits = {"mean": 5, "standard_error": 2}
            rows.append(
                [name, *(_number(getattr(each, field), digits.get(field, 4)) for field in fields)]
            )
            for column, field in enumerate(fields, 1):
                if field in spread and rows[-1][column] == "nan":
                    rows[-1][column] = ""  # not known, as of a single row
    return rows


def _notes(summary: Summary) -> list[str]:
    """What has to be known to read the measures."""
    lines = []
    resampling = summary.resampling
    if summary.sequences == 1:
        lines.append("no interval of the mean: all rows belong to one sequence")
    elif _has_intervals(summary):
        drawn = "rows" if summary.sequences is None else f"the {summary.sequences} sequences"
        lines.append(
            f"from, to: {100 * resampling.level:g} % interval of the mean, by "
            f"{resampling.resamples} bootstrap samples of {drawn}"
        )
    return lines + warnings(summary)


def warnings(summary: Summary) -> list[str]:
    """What makes the measures mean less than they seem to."""
    lines = []
    few = summary.sequences is not None and 1 < summary.sequences < _FEW_SEQUENCES
    if summary.resampling.resamples and few:
        lines.append(f"{summary.sequences} sequences are so few that intervals tell little")
    for name, each in summary.measures.items():
        if each.infinite:
            lines.append(f"{name} is infinite in {each.infinite} of the rows")
    if summary.noise_floor is not None:
        lines.append(
            "rounding logits to 16 bits causes by itself a mean kl of about "
            f"{summary.noise_floor:.2g}"
        )
    return lines


def _pairs(summary: Summary) -> Grid:
    pairs = []
    if (same := summary.measures.get("same_top")) is not None:
        pairs.append(["same top token", _percent(same.mean, same.standard_error)])
    flips = summary.flips
    if flips is not None and not math.isnan(flips.lost):
        pairs.append(["right answers lost", _percent(flips.lost)])
        pairs.append(["right answers gained", _percent(flips.gained)])
    if (perplexity := summary.perplexity) is not None:
        pairs += [
            ["perplexity of base", _plus_minus(perplexity.base, perplexity.base_error)],
            ["perplexity of test", _plus_minus(perplexity.test, perplexity.test_error)],
            ["ratio test / base", _plus_minus(perplexity.ratio, perplexity.ratio_error)],
            ["difference", _plus_minus(perplexity.difference, perplexity.difference_error)],
            ["correlation of nll", _percent(perplexity.correlation)],
        ]
    if (change := summary.measures.get("delta_prob")) is not None:
        mean = _percent(change.mean, change.standard_error)
        pairs.append(["change of target's probability", mean])
        pairs.append(["root mean square of it", _percent(change.rms, change.rms_error)])
    return pairs


def _buckets(buckets: Sequence[Bucket]) -> Grid:
    rows = [["from", "to", "rows", "mean", "error", "median"]]
    for each in buckets:
        if each.rows:
            error = _number(each.standard_error, 2) if each.rows > 1 else ""
            rows.append([f"{each.lower:g}", f"{each.upper:g}", str(each.rows), _number(each.mean),
                         error, _number(each.median)])  # fmt: skip
    return rows


def worst_cells(summary: Summary) -> Grid:
    """The rows where the first measure is largest, with a header line."""
    names = list(summary.measures)
    rows = [["row", *names]]
    return rows + [[str(each.row), *(_number(each.values[name]) for name in names)]
                   for each in summary.worst_rows]  # fmt: skip


def _candidates(evaluations: Sequence[Evaluation], summaries: Sequence[Summary]) -> Grid:
    """The first measure, flips and perplexity of each candidate, a line each."""
    name = next(iter(summaries[0].measures))
    rows = [["candidate", f"{name} mean", "from", "to", "median", "99 %", "max"]]
    flips, perplexity = summaries[0].flips, summaries[0].perplexity
    rows[0] += (["same top"] if flips else []) + (["perplexity ratio"] if perplexity else [])
    for evaluation, summary in zip(evaluations, summaries, strict=True):
        first = summary.measures[name]
        row = [first.mean, first.low, first.high, first.median, first.p99, first.max]
        rows.append([evaluation.test["name"], *map(_number, row)])
        if summary.flips is not None:
            rows[-1].append(_percent(1 - summary.flips.rate))
        if summary.perplexity is not None:
            rows[-1].append(_plus_minus(summary.perplexity.ratio, summary.perplexity.ratio_error))
    return rows


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


def _percent(value: float, error: float | None = None) -> str:
    text = f"{100 * value:.4g} %"
    return text if error is None or math.isnan(error) else f"{text} ± {100 * error:.2g} %"


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.6g}" if math.isnan(error) else f"{value:.6g} ± {error:.2g}"


def _markdown_grid(rows: Grid) -> list[str]:
    lines = [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
    rule = "| --- " + "| ---: " * (len(rows[0]) - 1) + "|"
    return [lines[0], rule, *lines[1:]]


def _escaped(text: str) -> str:
    """Text as Markdown shows it unchanged: names of files may hold anything."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())

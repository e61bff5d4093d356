"""A page that tells people what an evaluation found: verdict first, then tables and pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _figures
from ._evaluation import Evaluation
from ._files import replacing
from ._machine import machine, versions
from ._measuring import compares, is_similarity
from ._report import Results, content, heading, tables, warnings, worst_cells, write_text
from ._statistics import Summary
from ._tokens import Vocabulary

#: Tokens of text before the one that is shown.
_CONTEXT = 24
#: How a mean KL below each of these is put into words, and the colour of that.
_SCALE = (
    (0.001, "nearly the same model", "good"),
    (0.01, "close to the base", "good"),
    (0.1, "noticeably changed", "warn"),
    (np.inf, "a different model", "bad"),
)


def write_report(
    evaluations: Evaluation | Sequence[Evaluation],
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    above: Mapping[str, float] | None = None,
    below: Mapping[str, float] | None = None,
    worst: int = 5,
    bootstrap: int = 1000,
) -> Path:
    """Write ``index.html``, one page that needs nothing else, and its pictures as PNG files.

    Parameters
    ----------
    evaluations
        One for each candidate, of the same rows against the same base.
    folder
        Where to write; made if it is not there.
    tokenizer
        A ``tokenizer.json``, or a text file with one token a line: the worst tokens are then
        shown with the text before them, if targets are known.
    above, below
        Limits, as for `Summary.violations`: the page begins with what violates them.
    worst, bootstrap
        As for `Evaluation.summary`.

    Returns
    -------
    The path of the page. Raises ImportError where jinja2 or matplotlib is missing.
    """
    check_report()
    several = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    results = Results.of(several, worst=worst, bootstrap=bootstrap, above=above, below=below)
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    return write_page(results, folder, vocabulary)


def check_report() -> None:
    """Raise ImportError, in one line, where pages cannot be written."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'a report needs the package {error.name}: pip install "klfast[report]"'
        ) from None


def write_page(
    results: Results, folder: str | os.PathLike[str], vocabulary: Vocabulary | None = None
) -> Path:
    """Write the page of results that are there already."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    names = _shown(results)
    pictures = _pictures(results, names)
    for _, _, picture in pictures:
        with replacing(place / f"{picture.name}.png") as temporary:
            temporary.write_bytes(picture.png)
    environment = Environment(
        loader=PackageLoader("klfast"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    first = results.evaluations[0]
    rows = f"{first.rows} tokens"
    if results.summaries[0].sequences is not None:
        rows += f" of {results.summaries[0].sequences} sequences"
    page = environment.get_template("report.html").render(
        version=versions()["klfast"],
        title=f"Compared with {names[first.base['name']]}",
        subtitle=f"{rows}, a vocabulary of {first.base['shape'][-1:] and first.base['shape'][-1]}",
        verdicts=_verdicts(results, names),
        scale=_scale(),
        candidates=_table(
            "Candidates", [[names.get(line[0], line[0]), *line[1:]] for line in results.overview()]
        ),
        tables=_tables(results, names),
        figures=[
            {
                "title": title,
                "caption": caption,
                "light": _data(picture.light),
                "dark": _data(picture.dark),
            }
            for title, caption, picture in pictures
        ],
        worst=[
            _worst(evaluation, summary, names, vocabulary)
            for evaluation, summary in zip(results.evaluations, results.summaries, strict=True)
            if summary.worst_rows
        ],
        facts=_facts(results),
    )
    write_text(place / "index.html", page)
    return place / "index.html"


def _data(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _shown(results: Results) -> dict[str, str]:
    """What the page calls base and candidates: without folders, if they still differ.

    How it was measured gives all of each name.
    """
    first = results.evaluations[0]
    names = [first.base["name"], *(each.test["name"] for each in results.evaluations)]
    # Hidden states have a head's file in their name too.
    short = [" with ".join(Path(part).name for part in name.split(" with ")) for name in names]
    clear = len(set(short)) == len(set(names))
    return dict(zip(names, short if clear else names, strict=True))


def _verdicts(results: Results, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for evaluation, summary, broken in zip(
        results.evaluations, results.summaries, results.violations, strict=True
    ):
        sentences, level = [], ""
        kl = summary.measures.get("kl")
        words = ""
        if kl is not None:
            words, level = next(
                ((words, level) for limit, words, level in _SCALE if kl.mean < limit),
                ("nothing is known" if np.isnan(kl.mean) else _SCALE[-1][1], "bad"),
            )
            if summary.noise_floor is not None and kl.mean <= 2 * summary.noise_floor:
                words = "no different from the base beyond what rounding to 16 bits does"
            sentences.append(
                f"Mean KL {kl.mean:.4g} nats"
                + (
                    f" ({100 * summary.resampling.level:g} % interval {kl.low:.4g} to "
                    f"{kl.high:.4g})" if kl.low == kl.low else ""
                )
                + f"; 99 % of the tokens below {kl.p99:.4g}, the worst {kl.max:.4g}."
            )  # fmt: skip
        if (flips := summary.flips) is not None:
            text = f"The most probable token is the same for {100 * (1 - flips.rate):.4g} %"
            if flips.lost == flips.lost:
                text += (
                    f"; {100 * flips.lost:.3g} % of right answers are lost, "
                    f"{100 * flips.gained:.3g} % gained"
                )
            sentences.append(text + ".")
        if (ppl := summary.perplexity) is not None:
            sentences.append(
                f"Perplexity {ppl.base:.5g} becomes {ppl.test:.5g}: ratio {ppl.ratio:.5g} "
                f"± {ppl.ratio_error:.2g}."
            )
        sentences += [f"{line[0].upper()}{line[1:]}." for line in warnings(summary)]
        if summary.nan_rows:
            sentences.append(f"{summary.nan_rows} tokens hold NaN and are left out.")
        shown = names[evaluation.test["name"]]
        name = f"{shown}: {words}" if words else shown
        if broken:
            level = "bad"
            name = f"{shown}: violates {len(broken)} limit(s)"
            sentences = [f"{line}." for line in broken] + sentences
        elif results.limits:
            name, level = f"{name}; all limits are kept", "good"
        found.append({"name": name, "level": level, "sentences": sentences})
    for each in results.differences:
        text = each.verdict
        for full in (each.first, each.second):
            text = text.replace(full, names.get(full, full))
        found.append({"name": f"{text}.", "level": "", "sentences": []})
    return found


def _scale() -> str:
    steps = "; ".join(f"below {limit:g}: {words}" for limit, words, _ in _SCALE[:-1])
    return (
        f"The words go by the mean KL ({steps}; else: {_SCALE[-1][1]}). They are a rule of thumb, "
        "not a test of the job that the model is for."
    )


def _tables(results: Results, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for evaluation, summary in zip(results.evaluations, results.summaries, strict=True):
        of = f": {names[evaluation.test['name']]}" if len(results.evaluations) > 1 else ""
        parts = tables(summary)
        name = parts.name
        pieces = [
            ("Measures", parts.measures, "; ".join(parts.notes)),
            ("Tokens", [["", ""], *parts.pairs], ""),
            (f"Mean {name} by the base's largest probability", parts.by_confidence, ""),
        ]
        found += [
            _table(title + of, cells, note) for title, cells, note in pieces if len(cells) > 1
        ]
    return found


def _table(title: str, cells: Sequence[Sequence[str]], note: str = "") -> dict[str, Any]:
    return {"title": title, "header": cells[0], "rows": cells[1:], "note": note}


def _worst(
    evaluation: Evaluation,
    summary: Summary,
    names: Mapping[str, str],
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    cells = worst_cells(summary)
    texts = vocabulary is not None and "target" in evaluation.columns
    rows = []
    for row, line in zip(summary.worst_rows, cells[1:], strict=True):
        before, token = "", ""
        if vocabulary is not None and texts:
            before, token = _context(evaluation, row.row, vocabulary)
        rows.append({"cells": line, "before": before, "token": token})
    name = next(iter(summary.measures))
    return {
        "title": f"Worst tokens by {name}: {names[evaluation.test['name']]}",
        "header": cells[0],
        "rows": rows,
        "texts": texts,
        "note": "The underlined token is the one that really followed." if texts else "",
    }


def _context(evaluation: Evaluation, row: int, vocabulary: Vocabulary) -> tuple[str, str]:
    """The text before the token that followed a row, and that token."""
    columns, numbers = evaluation.columns, evaluation.row_numbers
    place = int(np.searchsorted(numbers, row))
    here = slice(max(0, place - _CONTEXT), place + 1)
    # Not what belongs to another text, and not from before a row that was left out.
    apart = np.diff(numbers[here]) != 1
    if "sequence" in columns:
        apart |= np.diff(columns["sequence"][here]) != 0
    breaks = np.flatnonzero(apart)
    tokens = columns["target"][here][int(breaks[-1]) + 1 if breaks.size else 0 :].tolist()
    before, whole = vocabulary.text(tokens[:-1]), vocabulary.text(tokens)
    # What a token looks like may depend on the one before.
    token = whole[len(before) :] if whole.startswith(before) else vocabulary.text(tokens[-1:])
    return before, token


def _pictures(
    results: Results, shown: Mapping[str, str]
) -> list[tuple[str, str, _figures.Picture]]:
    """Title, caption and picture of all that can be drawn."""
    first = results.evaluations[0]
    names = _short([shown[each.test["name"]] for each in results.evaluations])
    metric = next((m for m in first.metrics if compares(m) and not is_similarity(m)), None)
    found: list[tuple[str, str, _figures.Picture]] = []

    def curves(of: str, against: str | None = None) -> list[_figures.Curve]:
        made = []
        for name, evaluation in zip(names, results.evaluations, strict=True):
            columns = evaluation.columns
            values = columns[of]
            keep = np.isfinite(values)
            if against is not None:
                keep &= np.isfinite(columns[against])
            other = None if against is None else columns[against][keep]
            made.append(_figures.Curve(name, values[keep], other))
        return made

    def add(
        title: str,
        caption: str,
        of: str,
        against: str | None,
        draw: Callable[[Sequence[_figures.Curve]], _figures.Picture],
    ) -> None:
        known = all({of, against or of} <= each.columns.keys() for each in results.evaluations)
        if not known:
            return
        drawn = curves(of, against)
        if all(each.values.size for each in drawn):
            found.append((title, caption, draw(drawn)))

    if metric is not None:
        add(
            f"Distribution of {metric}",
            "Share of the tokens at each size, on a logarithmic axis: what is far to the right is "
            "rare and large.",
            metric, None, lambda c: _figures.distribution(c, metric),
        )  # fmt: skip
        add(
            f"{metric} by the base's confidence",
            "Median of the tokens for which the base model's first choice has this probability; "
            "the bars hold 80 % of them.",
            metric, "top_p", lambda c: _figures.by_confidence(c, metric),
        )  # fmt: skip
        add(
            f"{metric} by position",
            "Mean at each place of the sequences: does the difference grow with the context?",
            metric, "position", lambda c: _figures.by_position(c, metric),
        )  # fmt: skip
    add(
        "Change of the target's probability",
        "How often the probability of the token that really followed changes by how much, on a "
        "logarithmic axis; what lies outside counts at the ends.",
        "delta_prob", None, _figures.target_change,
    )  # fmt: skip
    return found


def _short(names: Sequence[str]) -> list[str]:
    """Names for a legend: not too long, and in signs that every font has."""
    plain = ["".join(c if " " <= c <= "~" else "?" for c in name) for name in names]
    # An underscore at the beginning hides an entry.
    short = [name if len(name) <= 40 else f"...{name[-37:]}" for name in plain]
    return [f" {name}" if name.startswith("_") else name for name in short]


def _facts(results: Results) -> list[tuple[str, str]]:
    facts = []
    for evaluation, summary in zip(results.evaluations, results.summaries, strict=True):
        facts += heading(evaluation, summary)
    first = content(results.evaluations[0], results.summaries[0])
    facts += [
        (name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
        for name, value in first["settings"].items()
        if value is not None
    ]
    facts += [(name, str(value)) for name, value in versions().items() if value is not None]
    facts += [(name, str(value)) for name, value in machine().items()]
    return list(dict.fromkeys(facts))

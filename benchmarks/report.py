"""The results as text, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import LIMITS, MAIN_SHAPE, TARGETS, Shape, text_of

from klfast._bench import OWN, READ, Timing
from klfast._peers import PEERS
from klfast._report import grid

PEER_NAMES = tuple(peer.name for peer in PEERS)


@dataclass(frozen=True)
class Case:
    """One measure at one shape and dtype, by every contender."""

    shape: Shape
    dtype: str
    measure: str
    timings: Mapping[str, Timing]

    def __str__(self) -> str:
        return f"{self.measure}, {self.dtype}"


@dataclass(frozen=True)
class Results:
    """All that was measured, and on what."""

    about: Mapping[str, str]
    cases: Sequence[Case]
    process: Mapping[str, float | str]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes, in the order they were measured in."""
        return tuple(dict.fromkeys(case.shape for case in self.cases))

    def to_dict(self) -> dict[str, Any]:
        """Everything in full precision, for a file."""
        timings = [
            {"rows": case.shape[0], "vocab": case.shape[1], "dtype": case.dtype}
            | {name: getattr(each, name) for name in Timing.__slots__}
            for case in self.cases
            for each in case.timings.values()
        ]
        return {"about": dict(self.about), "timings": timings, "process": dict(self.process)}


def speed_table(cases: Sequence[Case]) -> list[list[str]]:
    """One line a case: milliseconds, share of the read speed, and others beside klfast."""
    peers = [name for name in PEER_NAMES if any(name in case.timings for case in cases)]
    rows = [["measure", "dtype", "read, ms", "klfast, ms", "of read speed", "largest error"]]
    rows[0] += [f"{name}, ms" for name in peers]
    for case in cases:
        own = case.timings[OWN]
        row = [case.measure, case.dtype, _ms(case.timings[READ]), _ms(own)]
        row += [_number(own.of_read), f"{own.error:.1e}" if own.error is not None else ""]
        for name in peers:
            each = case.timings.get(name)
            if each is None:
                row.append("")
            elif each.slower is None:
                row.append("failed")
            else:
                row.append(f"{_ms(each)} ({each.slower:.1f} x)")
        rows.append(row)
    return rows


def target_table(results: Results) -> list[list[str]]:
    """Each figure beside what was aimed for; nothing where the case was not measured."""
    rows = [["what", "figure", "measured", "target", "met"]]
    for case, figure, measured, target in _targets(results):
        rows.append(
            [case, figure, f"{measured:.2f}", f"at least {target:g}", _met(measured >= target)]
        )
    for figure, limit in LIMITS.items():
        value = results.process.get(figure)
        if isinstance(value, float):
            rows.append(["", figure, f"{value:.3g}", f"under {limit:g}", _met(value < limit)])
    return rows


def process_table(results: Results) -> list[list[str]]:
    """Everything about whole processes and calls."""
    cells = (
        [name, f"{value:.3g}" if isinstance(value, float) else value]
        for name, value in results.process.items()
    )
    return [["figure", "median"], *cells]


def text(results: Results) -> str:
    """Lay everything out for a terminal."""
    parts = ["\n".join(grid(list(map(list, results.about.items())), left=2))]
    for shape in results.shapes:
        cases = [case for case in results.cases if case.shape == shape]
        parts.append("\n".join([text_of(shape), *grid(speed_table(cases), left=2)]))
    for table in (process_table(results), target_table(results)):
        if len(table) > 1:
            parts.append("\n".join(grid(table, left=2)))
    return "\n\n".join(parts + list(_failures(results)))


def markdown(results: Results) -> str:
    """Lay everything out as a page."""
    lines = [
        "# Speed",
        "",
        "Written by `make bench`. All contenders take turns in one process on the same inputs "
        "(Gaussian logits of standard deviation 3; those of Q off by 0.3). Times are medians over "
        "the rounds; shares and factors are medians of the ratio within each round, so that "
        "whatever else the machine did met both alike. *Read speed* is that of reading the bytes "
        "of the inputs once with all threads and computing next to nothing with them: 1 is the "
        "speed of memory, or of the caches where the inputs fit into them. *Largest error* is "
        "klfast's, relative to the float64 reference. In brackets stands how many times as fast as "
        "a library klfast is. `compare` stands for its default metrics.",
        "",
        *_markdown([["", ""], *map(list, results.about.items())]),
    ]
    if MAIN_SHAPE in results.shapes:
        lines += ["", "![Speed beside that of a plain read](roofline.png)"]
    for shape in results.shapes:
        cases = [case for case in results.cases if case.shape == shape]
        lines += ["", f"## {text_of(shape)}", "", *_markdown(speed_table(cases))]
    if results.process:
        lines += ["", "## Whole processes and calls", "", *_markdown(process_table(results))]
    targets = target_table(results)
    if len(targets) > 1:
        lines += ["", "## Targets", "", *_markdown(targets)]
    lines += [line for failure in _failures(results) for line in ("", failure)]
    return "\n".join(lines) + "\n"


def picture(results: Results, path: Path) -> None:
    """Draw how close to the read speed every contender comes, at the main shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in results.cases if case.shape == results.shapes[0]][::-1]
    styles = {
        "torch.compile": ("C1", "s"),
        "torch eager": ("C3", "D"),
        "jax.jit": ("C4", "^"),
        "numpy": ("C7", "v"),
        "scipy": ("C2", "o"),
    }
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(cases) + 2), layout="constrained")
    own = [case.timings[OWN].of_read or 0.0 for case in cases]
    axes.scatter(own, range(len(cases)), color="C0", s=90, label=OWN, zorder=5)
    for at, share in enumerate(own):
        axes.annotate(
            f"{share:.2f}", (share, at), (0, 7), textcoords="offset points",
            ha="center", color="C0", fontsize=9, fontweight="bold", zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    for name, (color, marker) in styles.items():
        points = [
            (each.of_read, at)
            for at, case in enumerate(cases)
            if (each := case.timings.get(name)) is not None and each.of_read is not None
        ]
        if points:
            axes.scatter(
                *zip(*points, strict=True), color=color, marker=marker, s=34, label=name,
                edgecolors="white", linewidths=0.8, zorder=3,
            )  # fmt: skip
    axes.axvline(1, color="black", linestyle="--", linewidth=1.2, label=READ, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(right=1.6)
    axes.set_ylim(-0.5, len(cases) - 0.3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(cases)), [str(case) for case in cases])
    axes.set_xlabel("speed, as a share of a plain read of the same bytes (logarithmic)")
    about = results.about
    axes.set_title(
        f"{text_of(results.shapes[0])} logits on {about['processor']}, {about['threads']} threads; "
        f"plain read {about['read speed']}",
        fontsize=10,
    )
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.grid(axis="y", alpha=0.6)
    figure.legend(loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _targets(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """(case, figure, measured, target) for every target that was measured."""
    measured = {(case.shape, case.measure, case.dtype): case for case in results.cases}
    for target in TARGETS:
        for key in target.cases:
            case = measured.get((target.shape, *key))
            if case is None:
                continue
            name = f"{case}, {text_of(case.shape)}"
            if (share := case.timings[OWN].of_read) is not None:
                yield name, "share of the read speed", share, target.of_read
            for peer, factor in target.faster_than.items():
                each = case.timings.get(peer)
                if each is not None and each.slower is not None:
                    yield name, f"times as fast as {peer}", each.slower, factor


def _failures(results: Results) -> Iterator[str]:
    for case in results.cases:
        for each in case.timings.values():
            if each.failure is not None:
                yield f"{each.contender} failed at {case}, {text_of(case.shape)}: {each.failure}"


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = (f"| {' | '.join(row)} |" for row in table)
    return [header, "|---" * len(table[0]) + "|", *rows]


def _ms(timing: Timing) -> str:
    return "" if timing.seconds is None else f"{1000 * timing.seconds:#.3g}".rstrip(".")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _met(met: bool) -> str:
    return "yes" if met else "no"

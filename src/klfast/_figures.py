"""The pictures of a report: what each shows is written under it, by the report.

Every figure is drawn for a light and for a dark page, as SVG for the page and once as PNG.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._statistics import CONFIDENCE

Values = NDArray[np.float64]

#: Told apart by people of all kinds of colour vision (Okabe and Ito, 2008), and never by colour
#: alone: lines also differ in their dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")
INK = {"light": "#1b1f24", "dark": "#e6e8eb"}
FAINT = {"light": "#d5d9de", "dark": "#3a4149"}

#: Divergences below this are drawn as if they were this large: below it is only rounding.
SMALLEST = 1e-12


@dataclass(frozen=True)
class Curve:
    """One candidate's values, one a row, all finite."""

    name: str
    values: Values
    against: Values | None = None  # the confidence or position of each row


@dataclass(frozen=True)
class Picture:
    """A figure in all its forms."""

    name: str
    light: str  # SVG
    dark: str  # SVG
    png: bytes


def distribution(curves: Sequence[Curve], measure: str) -> Picture:
    """How often each divergence occurs, on a logarithmic axis."""
    shown = [np.clip(c.values, SMALLEST, None) for c in curves]
    ends = [(v.min(), v.max()) for v in shown if v.size]
    low = math.floor(math.log10(min((e[0] for e in ends), default=SMALLEST)))
    high = math.ceil(math.log10(max((e[1] for e in ends), default=1.0)) + 1e-9)
    edges = np.logspace(low, max(high, low + 1), 8 * max(high - low, 1) + 1)

    def draw(axes: Any) -> None:
        for style, curve, values in zip(itertools.cycle(_styles()), curves, shown, strict=False):
            counts, _ = np.histogram(values, edges)
            share = 100.0 * counts / max(values.size, 1)
            axes.stairs(share, edges, label=curve.name, **style)
        axes.set_xscale("log")
        axes.set_xlabel(f"{measure} of a token")
        axes.set_ylabel("tokens, %")

    return _picture("distribution", draw, len(curves))


def by_confidence(curves: Sequence[Curve], measure: str) -> Picture:
    """Median, and 10 to 90 %, of the divergence in each bucket of the base's confidence."""
    positions = np.arange(len(CONFIDENCE) - 1)

    def draw(axes: Any) -> None:
        lowest = math.inf
        for i, (style, curve) in enumerate(zip(itertools.cycle(_styles()), curves, strict=False)):
            assert curve.against is not None
            bucket = np.clip(np.digitize(curve.against, CONFIDENCE) - 1, 0, len(positions) - 1)
            quantiles = np.array([
                np.quantile(kept, (0.1, 0.5, 0.9)) if kept.size else (np.nan,) * 3
                for kept in (curve.values[bucket == b] for b in positions)
            ])  # fmt: skip
            quantiles = np.maximum(quantiles, SMALLEST)
            lowest = min(lowest, float(np.nanmin(quantiles)))
            at = positions + 0.12 * (i - (len(curves) - 1) / 2)
            reach = np.abs(quantiles[:, (0, 2)] - quantiles[:, 1:2]).T
            axes.errorbar(
                at, quantiles[:, 1], yerr=reach, label=curve.name, marker="o", markersize=4,
                capsize=2, elinewidth=1, **style,
            )  # fmt: skip
        axes.set_yscale("log")
        names = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(CONFIDENCE)]
        axes.set_xticks(positions, names, rotation=30, ha="right")
        axes.set_xlabel("largest probability of the base model")
        axes.set_ylabel(measure)

    return _picture("confidence", draw, len(curves))


def by_position(curves: Sequence[Curve], measure: str, most: int = 64) -> Picture:
    """The mean divergence along the sequences, in at most ``most`` bins."""

    def draw(axes: Any) -> None:
        for style, curve in zip(itertools.cycle(_styles()), curves, strict=False):
            assert curve.against is not None
            last = int(curve.against.max(initial=0))
            edges = np.unique(np.linspace(0, last + 1, min(most, last + 1) + 1).astype(int))
            bins = np.digitize(curve.against, edges) - 1
            sums = np.bincount(bins, curve.values, len(edges) - 1)
            counts = np.bincount(bins, minlength=len(edges) - 1)
            with np.errstate(invalid="ignore"):
                means = np.maximum(sums / counts, SMALLEST)
                axes.plot((edges[:-1] + edges[1:] - 1) / 2, means, label=curve.name, **style)
        axes.set_yscale("log")
        axes.set_xlabel("position in the sequence")
        axes.set_ylabel(f"mean {measure}")

    return _picture("position", draw, len(curves))


def target_change(curves: Sequence[Curve]) -> Picture:
    """How often the target's probability changes by how much."""
    reach = max((float(np.quantile(np.abs(c.values), 0.999)) for c in curves), default=0.0) or 1e-6
    edges = 100.0 * np.linspace(-reach, reach, 62)

    def draw(axes: Any) -> None:
        for style, curve in zip(itertools.cycle(_styles()), curves, strict=False):
            counts, _ = np.histogram(np.clip(100.0 * curve.values, edges[0], edges[-1]), edges)
            share = 100.0 * counts / max(curve.values.size, 1)
            axes.stairs(share, edges, label=curve.name, **style)
        axes.set_yscale("log")
        axes.set_xlabel("change of the probability of the token that followed, percentage points")
        axes.set_ylabel("tokens, %")

    return _picture("target", draw, len(curves))


def _styles() -> list[Mapping[str, Any]]:
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}
        for i in range(len(COLOURS) * len(DASHES))
    ]


def _picture(name: str, draw: Callable[[Any], None], curves: int) -> Picture:
    """Draw once; for a dark page, ink and grid of the same picture have other colours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, faint = INK["light"], FAINT["light"]
    settings = {
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        # Text stays text, and the same data gives the same file.
        "svg.fonttype": "none",
        "svg.hashsalt": "klfast",
    }
    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.6, 3.5))
        axes = figure.subplots()
        axes.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        if curves > 1:
            for text in axes.legend(frameon=False).get_texts():
                text.set_parse_math(False)  # names of files are not formulas
        slanted = any(label.get_rotation() for label in axes.get_xticklabels())
        figure.subplots_adjust(left=0.13, right=0.98, top=0.97, bottom=0.31 if slanted else 0.15)
        figure.savefig(png, format="png", dpi=150, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    light = svg.getvalue()
    dark = light.replace(ink, INK["dark"]).replace(faint, FAINT["dark"])
    return Picture(name, light, dark, png.getvalue())

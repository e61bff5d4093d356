"""The page: what it says is what the JSON says, nothing in it is run, and a browser shows it."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klfast import Evaluation, evaluate, write_report
from klfast._html import _short
from klfast._report import Results
from klfast._sources import SourceError
from klfast._tokens import Vocabulary
from klfast.cli import main

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

RANDOM = np.random.default_rng(6)
BASE = 3 * RANDOM.standard_normal((8, 5, 60)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
OTHER = BASE + 0.6 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
TARGETS = RANDOM.integers(0, 60, (8, 5))
EVIL = "<script>alert(1)</script>&\"'$x_{$.npy"
PICTURES = {"distribution.png", "confidence.png", "position.png", "target.png"}


class Page(HTMLParser):
    """The text of a page, and what in it could load or run something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.links += [
            value for name, value in attributes if name in ("src", "href", "srcset", "style")
        ]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

        self.in_cell = tag in ("td", "th", "mark")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.cells[-1][-1] += data


def test_the_page_says_what_the_json_says(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("base", BASE), ("a", TEST), ("b", OTHER)):
        np.save(f"{name}.npy", rows)
    np.save("targets.npy", TARGETS)
    arguments = ["compare", "base.npy", "a.npy", "b.npy", "--targets", "targets.npy", "--json",
                 "o.json", "--report", "page", "--fail-above", "kl.mean=0.08"]  # fmt: skip
    assert main(arguments) == 3
    capsys.readouterr()
    assert {each.name for each in Path("page").iterdir()} == {"index.html", *PICTURES}
    content = json.loads(Path("o.json").read_text())
    page = Page(Path("page/index.html"))
    lines = [[cell.strip() for cell in row] for row in page.cells]
    for candidate in content["candidates"]:
        for name, each in candidate["measures"].items():
            if name == "same_top":
                continue
            shown = [f"{each['mean']:.5g}"]
            shown += [f"{each[f]:.4g}" for f in ("low", "high", "median", "p90", "p95", "p99",
                                                 "p99_9", "max")]  # fmt: skip
            assert [name, *shown] in lines
        ppl = candidate["perplexity"]
        assert ["perplexity of test", f"{ppl['test']:.6g} ± {ppl['test_error']:.2g}"] in lines
        kl = candidate["measures"]["kl"]
        assert f"Mean KL {kl['mean']:.4g} nats (95 % interval {kl['low']:.4g} to " in page.text
        for bucket in candidate["by_confidence"]:
            if bucket["rows"]:
                start = [f"{bucket['lower']:g}", f"{bucket['upper']:g}", str(bucket["rows"])]
                assert any(row[:4] == [*start, f"{bucket['mean']:.4g}"] for row in lines)
        for worst in candidate["worst_rows"]:
            first = [str(worst["row"]), f"{worst['values']['kl']:.4g}"]
            assert any(row[:2] == first for row in lines)
    verdict = content["differences"][0]["verdict"]
    assert f"{verdict}." in page.text
    assert "b.npy: violates 1 limit(s)" in page.text
    assert "a.npy: noticeably changed; all limits are kept" in page.text
    # The verdict comes first.
    assert page.text.index("violates 1 limit") < page.text.index("Distribution of kl")


def test_nothing_is_loaded_or_run(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(f"<img src=x onerror=y>{i}" for i in range(60)))
    found = evaluate(BASE, [TEST, OTHER], TARGETS)
    found[0].base["name"] = found[0].test["name"] = EVIL
    found[1].test["name"] = "_hidden_by_matplotlib"
    path = write_report(found, tmp_path / "page", tokenizer=vocabulary)
    page = Page(path)
    assert not {"script", "iframe", "object", "link", "embed"} & {*page.tags}
    assert page.tags.count("img") == len(PICTURES)
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert EVIL in page.text
    assert "<img src=x onerror=y>" in page.text
    text = path.read_text()
    assert html.escape(EVIL) in text or EVIL not in text
    assert "http://" not in re.sub('base64,[^"]*', "", text)


def test_worst_tokens_with_their_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["##s", "##t", *(f"w{i}" for i in range(2, 60))]))
    found = evaluate(BASE, TEST, TARGETS)
    path = write_report(found, tmp_path / "page", tokenizer=tmp_path / "vocab.txt", worst=3)
    page = Page(path)
    for worst in found.summary(3).worst_rows:
        text, place = divmod(worst.row, 5)
        names = ["##s", "##t", *(f"w{i}" for i in range(2, 60))]
        words = " ".join(names[t] for t in TARGETS[text, : place + 1]).replace(" ##", "")
        (line,) = (each for each in page.cells if each and each[0] == str(worst.row))
        assert line[-1] == words


def test_text_begins_after_rows_that_are_left_out(tmp_path: Path) -> None:
    names = [f"w{i}" for i in range(60)]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    keep = np.ones(TARGETS.shape, bool)
    keep[:, 1] = False
    found = evaluate(BASE, TEST, TARGETS, where=keep)
    path = write_report(found, tmp_path / "page", tokenizer=tmp_path / "vocab.txt", worst=1000)
    lines = {each[0]: each[-1] for each in Page(path).cells if each}
    for row in np.flatnonzero(keep):
        text, place = divmod(int(row), 5)
        known = TARGETS[text, 2 if place else 0 : place + 1]
        assert lines[str(row)] == "".join(names[t] for t in known)


def test_vocabularies(tmp_path: Path) -> None:
    def vocabulary(content: Any) -> Vocabulary:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
        return Vocabulary(path)

    # "é" is two bytes, which stand in two tokens.
    pieces = {"Hello": 0, "Ġcaf": 1, "Ã": 2, "©": 3}
    found = vocabulary({"model": {"vocab": pieces}, "added_tokens": [{"id": 4, "content": "<s>"}]})
    assert found.text([4, 0, 1, 2, 3, 9]) == "<s>Hello café[9]"
    assert found.text([0, 1, 2]) == "Hello caf�"
    found = vocabulary({"model": {"vocab": [["▁a", -1.0], ["b", -2.0], ["▁c", -3.0]]}})
    assert found.text([0, 1, 2]) == " ab c"
    wrong: list[Any] = [{}, [], {"model": {"vocab": {"a": 10**12}}}, {"model": {"vocab": 3}}]
    for content in wrong:
        with pytest.raises(SourceError, match=r"tokenizer\.json: is not a tokenizer\.json"):
            vocabulary(content)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="is not text in UTF-8"):
        Vocabulary(tmp_path / "x.txt")
    with pytest.raises(SourceError, match="No such file"):
        Vocabulary(tmp_path / "y.txt")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(SourceError, match="holds no tokens"):
        Vocabulary(tmp_path / "x.txt")


@pytest.mark.slow
def test_pages_of_less(tmp_path: Path) -> None:
    """Measures without a divergence, without targets, infinite, NaN, equal, none at all."""
    infinite = TEST.copy()
    infinite[0, 0, 3] = -np.inf
    infinite[0, 1, 3] = np.nan
    for number, (evaluation, said) in enumerate([
        (evaluate(BASE, TEST, metrics=["entropy_p"]), "entropy_p"),
        (evaluate(BASE, infinite), "infinite in 1 of the rows"),
        (evaluate(BASE, infinite), "1 tokens hold NaN and are left out"),
        (evaluate(BASE[0], BASE[0]), "nearly the same model"),
        (evaluate(BASE[:0], BASE[:0]), "nothing is known"),
        (evaluate(BASE, 9 * TEST), "a different model"),
        (evaluate(BASE.astype("f2"), BASE.astype("f2")), "beyond what rounding to 16 bits does"),
    ]):  # fmt: skip
        path = write_report(evaluation, tmp_path / str(number))
        assert said in Page(path).text


def test_names_in_the_legend() -> None:
    assert _short(["_a", "é" * 50]) == [" _a", "..." + "?" * 37]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("x/a.npy", "x/b.npy", "y/c.npy"), ["a.npy", "b.npy", "c.npy"]),
        (("x/a.npy", "y/a.npy", "y/c.npy"), ["x/a.npy", "y/a.npy", "y/c.npy"]),
        (("p with x/h", "d/q with x/h", "r with y/h"), ["p with h", "q with h", "r with h"]),
    ],
)
def test_names_without_folders_where_they_differ(
    tmp_path: Path, names: tuple[str, str, str], shown: list[str]
) -> None:
    found = evaluate(BASE, [TEST, OTHER], TARGETS)
    for side, name in zip((found[0].base, found[0].test, found[1].test), names, strict=True):
        side["name"] = name
    found[1].base["name"] = names[0]
    page = Page(write_report(found, tmp_path))
    assert f"Compared with {shown[0]}\n" in page.text
    assert f"{shown[1]} is closer to the base than {shown[2]}: mean kl" in page.text
    for short, full in zip(shown, names, strict=True):
        assert f"Measures: {short}" in page.text or full == names[0]
        assert any(full in cell for row in page.cells[-40:] for cell in row)


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    found = evaluate(BASE, TEST, TARGETS)
    pages = [write_report(found, tmp_path / each).read_bytes() for each in ("a", "b")]
    assert pages[0] == pages[1]


def test_missing_packages_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'needs the package jinja2: pip install "klfast\[repo'):
        write_report(Evaluation(), tmp_path / "page")
    np.save(tmp_path / "base.npy", BASE)
    path = str(tmp_path / "base.npy")
    assert main(["compare", path, path, "--report", str(tmp_path / "page")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_results_without_limits() -> None:
    results = Results.of([evaluate(BASE, TEST)], bootstrap=0)
    assert (results.limits, results.violated()) == ({}, [])
    assert results.content()["limits"] == {"above": {}, "below": {}, "violations": []}


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("width", [420, 1100])
def test_a_browser_shows_it(tmp_path: Path, width: int) -> None:
    from matplotlib import image

    path = write_report(evaluate(BASE, [TEST, OTHER], TARGETS), tmp_path / "page")
    # Within a frame the page can be as narrow as on a phone, which a window cannot.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="page/index.html" width="{width}" '
                     'height="3000" style="border:0"></iframe>')  # fmt: skip
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,3000",
    ]  # fmt: skip
    shot = tmp_path / "shot.png"
    done = subprocess.run([*command, f"--screenshot={shot}", frame.as_uri()], capture_output=True,
                          timeout=90)  # fmt: skip
    assert done.returncode == 0
    pixels = image.imread(shot)[..., :3]
    shown = pixels[:, :width].reshape(-1, 3)
    paper = np.median(shown, axis=0)
    ink = (abs(shown - paper).max(1) > 0.1).mean()
    assert 0.02 < ink < 0.5
    # The curves are there, in their colours, and a verdict's border is.
    for colour in ("#0072b2", "#d55e00"):
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (abs(shown - wanted).max(1) < 0.05).sum() > 100
    # Nothing hangs over the right edge: what is too wide scrolls within itself.
    edge = pixels[:, width - 4 : width].reshape(-1, 3)
    assert (abs(edge - paper).max(1) < 0.02).all()
    if width == 1100:
        sheet = tmp_path / "sheet.pdf"
        subprocess.run([*command, f"--print-to-pdf={sheet}", path.as_uri()], capture_output=True,
                       timeout=90, check=True)  # fmt: skip
        assert sheet.read_bytes().startswith(b"%PDF")

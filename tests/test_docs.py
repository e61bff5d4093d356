"""What is written about klfast is true: its examples run, its tables are current."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import klfast
from klfast._operations import OPERATIONS

ROOT = Path(__file__).parent.parent
TEXTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")))
FORMULAS = {each.function: each.formula for each in reversed(OPERATIONS.values())}


class Block(NamedTuple):
    """A fenced block of a text, and the block of output that follows it, if one does."""

    language: str
    code: str
    output: str | None


def blocks(text: str) -> Iterator[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for (language, code), (following, output) in itertools.pairwise([*found, ("", "")]):
        yield Block(language, code, output if following == "text" else None)


def with_blocks(language: str) -> list[Path]:
    """The texts that have blocks of a language."""
    return [
        text
        for text in TEXTS
        if any(each.language == language for each in blocks((ROOT / text).read_text()))
    ]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run examples in, which may write to it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(text: str) -> list[str]:
    """Words, numbers and signs of an output, without the time it took."""
    text = re.sub(r"in \S+ s \(.*\)", "", text)
    return re.findall(r"-?\d[\d.]*(?:e[+-]?\d+)?|\w+|\S", text)


def same(shown: str, printed: str) -> bool:
    """Whether two words are equal, numbers to 3 digits: the next ones depend on the processor."""
    try:
        return float(shown) == pytest.approx(float(printed), rel=1e-3)
    except ValueError:
        return shown == printed


def agree(shown: str, printed: str) -> bool:
    ours, theirs = words(shown), words(printed)
    return len(ours) == len(theirs) and all(map(same, ours, theirs))


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("text", with_blocks("python"), ids=str)
def test_the_python_examples(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    names: dict[str, Any] = {}
    for block in blocks((ROOT / text).read_text()):
        if block.language == "python":
            exec(block.code, names)
            printed = capsys.readouterr().out
            assert agree(block.output or "", printed), printed


@pytest.mark.parametrize("text", with_blocks("console"), ids=str)
def test_the_commands(text: Path, checkout: Path) -> None:
    found = blocks((ROOT / text).read_text())
    commands = [block.code for block in found if block.language == "console"]
    for code in commands:
        command, shown = code.removeprefix("$ ").split("\n", 1)
        command, _, comment = command.partition("  # ")
        program, *arguments = shlex.split(command)
        assert program == "klfast"
        done = subprocess.run(
            [sys.executable, "-m", "klfast", *arguments],
            capture_output=True,
            text=True,
            cwd=checkout,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            encoding="utf-8",
        )
        assert done.returncode == int(comment.removeprefix("exit status ") or 0), done.stderr
        if shown:
            assert agree(shown, done.stdout), done.stdout


#: Of what trains, as much as shows that the loss falls.
SHORTER = {"distill.py": ["--steps", "40", "--teacher-steps", "100", "--vocabulary", "1000"]}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_the_example_scripts(script: Path) -> None:
    for package in re.findall(r"^(?:import|from) (torch|transformers)\b", script.read_text(), re.M):
        pytest.importorskip(package)
    command = [sys.executable, str(script), *SHORTER.get(script.name, [])]
    # Threads of PyTorch's that wait for a core spin, which other tests have a use for.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)", done.stdout):
        assert float(last) < float(first), done.stdout


@pytest.mark.slow  # compiles kernels from new source
def test_a_divergence_is_added_as_the_guide_for_contributors_says(tmp_path: Path) -> None:
    # Laid out as when it is installed, and with the six steps done that NumPy and Numba can run.
    package = tmp_path / "klfast"
    shutil.copytree(ROOT / "src/klfast", package)
    shutil.copytree(ROOT / "kernels", package / "kernels")
    steps = [b.code for b in blocks((ROOT / "CONTRIBUTING.md").read_text()) if b.language == "text"]
    _, reference, table, exact, fast, _, function = steps

    def insert(file: str, before: str, text: str) -> None:
        content = (package / file).read_text(encoding="utf-8")
        assert content.count(before) == 1, (file, before)
        (package / file).write_text(content.replace(before, text + before), encoding="utf-8")

    insert("reference.py", "@_silent\ndef cross_entropy(", reference)
    insert("_operations.py", '    Operation(\n        name="tv",', table)
    insert("kernels/cpu/exact.py", "SUMS = {\n", exact)
    insert("kernels/cpu/exact.py", '    "kl": kl,\n', '    "triangular": triangular,\n')
    insert("kernels/cpu/two_phase.py", "INTEGRANDS = {", fast)
    insert("kernels/cpu/two_phase.py", '"tv": k_tv,', '"triangular": k_triangular, ')
    insert(
        "kernels/plans.py",
        '    "tv": _pair(',
        '    "triangular": _pair("two_phase", "triangular"),\n',
    )
    insert("_api.py", '@documented(Options, operation="tv")', function)
    code = """
import numpy as np, klfast
from klfast._api import triangular_discrimination as ours
assert klfast.__file__.startswith(FOLDER), klfast.__file__
x, y = np.random.default_rng(0).normal(size=(2, 3, 500))
y[0] = x[0] + 1e-3 * y[0]
for dtype, bound in (("float32", 2e-6), ("float64", 1e-13)):
    rows = x.astype(dtype), y.astype(dtype)
    expected = klfast.reference.triangular_discrimination(*rows)
    np.testing.assert_allclose(ours(*rows, dtype="float64"), expected, rtol=bound)
    assert (klfast.compare(*rows, "triangular")["triangular"] == ours(*rows)).all()
"""
    code = f"import sys; FOLDER = {str(tmp_path)!r}; sys.path.insert(0, FOLDER)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_operations_is_current() -> None:
    page: Callable[[], str] = runpy.run_path(str(ROOT / "docs/operations.py"))["page"]
    written = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert written == page(), "write it again with: make docs"


def test_the_guide_is_current(tmp_path: Path) -> None:
    for package in ("matplotlib", "scipy"):
        pytest.importorskip(package)
    page: Callable[[Path], str] = runpy.run_path(str(ROOT / "docs/guide.py"))["page"]
    written = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    assert agree(written, page(tmp_path / "guide")), "write it again with: make docs"
    drawn, kept = (sorted(each.glob("*.svg")) for each in (tmp_path / "guide", ROOT / "docs/guide"))
    assert [each.name for each in drawn] == [each.name for each in kept]
    assert sum(each.stat().st_size for each in kept) < 400_000


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_links_lead_somewhere(text: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / text).read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (ROOT / text.parent / target).exists(), target


def test_make_targets_that_texts_name_exist() -> None:
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in TEXTS:
        named = re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / text).read_text(), re.MULTILINE)
        assert set(named) <= defined, text


@pytest.mark.parametrize("name", sorted(klfast.__all__))
def test_public_names_say_what_they_do(name: str) -> None:
    thing = getattr(klfast, name)
    assert len(inspect.getdoc(thing) or "") > 40
    if not inspect.isfunction(thing) or "axis" not in inspect.signature(thing).parameters:
        return
    text = inspect.getdoc(thing) or ""
    for part in ("Arguments:", "shape (..., V)", "float16, bfloat16, float32 or float64",
                 "Returns:", "Raises:", "TypeError:", "ValueError:"):  # fmt: skip
        assert part in text, part
    for argument in inspect.signature(thing).parameters:
        assert re.search(rf"\b{argument}\b", text), argument
    if name in FORMULAS:
        assert FORMULAS[name] in text
        assert "Source:" in text


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_functions_of_the_reference_say_what_they_compute(name: str) -> None:
    assert inspect.getdoc(getattr(klfast.reference, name))

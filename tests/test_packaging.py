"""What is installed is complete, and importing it is light."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import klfast

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, directory: Path) -> str:
    """What a new Python prints that finds packages in `directory` first."""
    preamble = f"import sys; sys.path.insert(0, {str(directory)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", preamble + code], capture_output=True, text=True, cwd=directory
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build(kind: str, folder: Path) -> None:
    """Build a "wheel" or an "sdist" of the source in `folder`, into it."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('.')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source distribution holds, built from a copy: nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", ".*")
    shutil.copytree(ROOT, copy, ignore=skip, dirs_exist_ok=True)
    build("sdist", copy)
    (archive,) = copy.glob("*.tar.gz")
    target = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as content:
        content.extractall(target, filter="data")
    (folder,) = target.iterdir()
    return folder


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, built from the source distribution."""
    build("wheel", source)
    (wheel,) = source.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_source_distribution_is_the_repository(source: Path) -> None:
    for name in ("benchmarks", "docs", "examples", "kernels", "src", "tests"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and not {"__pycache__", "klfast.egg-info"} & set(path.parts):
                assert (source / path.relative_to(ROOT)).is_file(), path
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"):
        assert (source / name).is_file()


def test_every_module_of_the_repository_is_in_the_wheel(installed: Path) -> None:
    for source, package in ((ROOT / "src/klfast", "klfast"), (ROOT / "kernels", "klfast/kernels")):
        for path in source.rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".html", ".typed"):
                assert (installed / package / path.relative_to(source)).is_file(), path
    assert (installed / "klfast/py.typed").is_file()


def test_every_subpackage_imports_from_the_wheel(installed: Path) -> None:
    names = sorted(
        ".".join(path.parent.relative_to(installed).parts)
        for path in (installed / "klfast").rglob("__init__.py")
    )
    assert names[0] == "klfast"
    assert {"klfast.kernels.cpu", "klfast.kernels.cuda"} < set(names)
    if find_spec("cupy") is None:
        names.remove("klfast.kernels.cuda")  # stands on it
    code = (
        f"import importlib\nfor name in {names!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(installed)!r}), module.__file__\n"
        "print('ok')"
    )
    assert python(code, installed) == "ok"


def test_the_wheel_works(installed: Path) -> None:
    code = (
        "import numpy as np, klfast\n"
        "x = np.zeros((2, 3), np.float32)\n"
        "print(klfast.kl_divergence(x, x, backend='reference').tolist())"
    )
    assert python(code, installed) == "[0.0, 0.0]"


def test_metadata(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert f"Version: {klfast.__version__}" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    core = {re.split("[<>]", line.split()[1])[0] for line in required if "extra ==" not in line}
    assert core == {"numpy", "numba"}
    assert "klfast = klfast.cli:main" in (info / "entry_points.txt").read_text()


def test_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) >= {"cuda12", "cuda13", "eval", "report", "zarr", "torch", "bench", "dev"}


def test_import_is_light(installed: Path) -> None:
    code = (
        "import numpy; before = set(sys.modules)\n"
        "import klfast\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - set(sys.stdlib_module_names) - {'numpy'}))\n"
        "print('importlib.metadata' in sys.modules)"
    )
    assert python(code, installed).split() == ["['klfast']", "False"]


def test_modules_come_when_they_are_asked_for(installed: Path) -> None:
    code = (
        "import sys, klfast\n"
        "print('klfast.gaussian' in sys.modules, klfast.gaussian.kl_divergence([0.0], [0.0]))\n"
        "print({'bounds', 'estimators', 'llama_cpp'} <= set(dir(klfast)))\n"
        "try: klfast.torch\n"
        "except AttributeError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    assert python(code, installed).splitlines() == [
        "False 0.0",
        "True",
        "module 'klfast' has no attribute 'torch' (import klfast.torch)",
        "False",
    ]


def test_import_changes_nothing(installed: Path) -> None:
    code = (
        "import os, warnings, numpy as np\n"
        "def state(): return dict(os.environ), list(warnings.filters), np.geterr()\n"
        "before = state()\n"
        "import klfast\n"
        "print(state() == before)"
    )
    assert python(code, installed) == "True"


def test_public_names_exist_once_and_are_documented() -> None:
    assert len(set(klfast.__all__)) == len(klfast.__all__)
    for name in klfast.__all__:
        thing = getattr(klfast, name)
        assert (thing.__doc__ or "").strip(), name
        assert thing.__name__.rpartition(".")[2] == name


def test_version_is_a_literal_that_the_build_can_read() -> None:
    tree = ast.parse((ROOT / "src/klfast/__init__.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__"
    ]
    assert [ast.literal_eval(value) for value in values] == [klfast.__version__]

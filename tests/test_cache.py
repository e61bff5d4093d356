"""Compiled kernels on disk: found again, never stale, never trusted when damaged."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from klfast.kernels.cpu import native
from processes import CALL, finish, python, start

import klfast

posix = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes of POSIX")


def _forget() -> None:
    for function in (native.cache_directory, native._fingerprint, native._kernel):
        function.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing compiled or loaded yet."""
    path = tmp_path / "cache"
    monkeypatch.setenv("KLFAST_CACHE_DIR", str(path))
    _forget()
    yield path
    _forget()


class Compilations:
    """Counts compilations."""

    def __init__(self, compile_: Callable[..., Any]) -> None:
        self.number = 0
        self._compile = compile_

    def __call__(self, *arguments: Any) -> Any:
        self.number += 1
        return self._compile(*arguments)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    counter = Compilations(native._compile)
    monkeypatch.setattr(native, "_compile", counter)
    return counter


def _load() -> None:
    """Get the smallest kernel as a new process does, and check that it works."""
    native._kernel.cache_clear()
    function = native.kernel("read", (), "qqqqq")
    ones = np.ones(4096, np.float32)
    counter, total = np.zeros(1, np.int64), np.zeros(1)
    function(ones.ctypes.data, ones.nbytes, counter.ctypes.data, total.ctypes.data, 0)
    assert counter[0] > 0
    assert total[0] > 0.0


def test_the_second_time_is_a_load(folder: Path, compilations: Compilations) -> None:
    _load()
    assert compilations.number == 1
    (file,) = folder.iterdir()
    _load()
    assert compilations.number == 1
    assert list(folder.iterdir()) == [file]


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: _flipped(content, 5),  # the digest
        lambda content: _flipped(content, 70),  # the symbol
        lambda content: _flipped(content, len(content) - 100),  # the code
        lambda content: b"\xff" * len(content),
    ],
    ids=["empty", "start", "half", "short", "long", "digest", "symbol", "code", "garbage"],
)
def test_a_damaged_file_is_built_again(
    folder: Path, compilations: Compilations, damage: Callable[[bytes], bytes]
) -> None:
    _load()
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    _load()
    assert compilations.number == 2
    assert list(folder.iterdir()) == [file]
    _load()
    assert compilations.number == 2


def test_one_of_many_threads_compiles(folder: Path, compilations: Compilations) -> None:
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: native.kernel("read", (), "qqqqq"), range(16)))
    assert len({id(kernel) for kernel in kernels}) == 1
    assert compilations.number == 1


def test_functions_of_the_user_are_compiled_as_ever(folder: Path) -> None:
    """Kernels have a target of their own, with other rules for ``min`` and ``int``."""
    import numba

    _load()

    @numba.njit  # type: ignore[untyped-decorator]
    def clipped(x: Any) -> Any:
        return min(x.sum(), int(x[0]) + 0.5), np.add(x, x)

    total, doubled = clipped(np.array([2.75, 1.0]))
    assert total == 2.5
    assert doubled.tolist() == [5.5, 2.0]


# --- names of files ----------------------------------------------------------------------


def _path() -> str:
    native._fingerprint.cache_clear()
    return str(native._path("kernel"))


def test_each_kernel_has_its_file(folder: Path) -> None:
    assert native._path("one") != native._path("other")
    assert _path() == _path()


@pytest.mark.parametrize("source", ["simd.py", "mathematics.py", "rowloop.py", "compiler.py"])
def test_a_changed_helper_changes_the_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    copy = tmp_path / "package"
    shutil.copytree(Path(native.__file__).parent, copy)
    monkeypatch.setattr(native, "__file__", str(copy / "native.py"))
    before = _path()
    with (copy / source).open("a") as file:
        file.write("\n")
    changed = _path()
    (copy / source).rename(copy / f"new_{source}")
    assert len({before, changed, _path()}) == 3


def test_without_source_nothing_is_kept(
    folder: Path, compilations: Compilations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "archive.zip" / "native.py"))
    _load()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("get_host_cpu_name", "another"),
        ("get_process_triple", "another"),
        ("get_host_cpu_features", type("Features", (), {"flatten": lambda self: "+other"})()),
    ],
)
def test_another_processor_has_other_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    from llvmlite import binding

    before = _path()
    monkeypatch.setattr(binding, name, lambda: value)
    assert _path() != before


@pytest.mark.parametrize("package", ["numba", "llvmlite"])
def test_another_compiler_has_other_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from importlib import metadata

    before = _path()
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == package else real(name))
    assert _path() != before


def test_a_setting_of_numba_has_other_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _path()
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert _path() != before


def test_source_that_changes_meanwhile_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native._fingerprint()
    monkeypatch.setattr(native, "_sources", lambda: b"an upgrade while the process runs")
    _load()
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_changed_helper_is_compiled_in(tmp_path: Path) -> None:
    """A copy of the package, as an upgrade leaves it; nothing is written into it."""
    package = Path(klfast.__file__).parent
    copy = tmp_path / "site" / "klfast"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not (copy / "kernels").exists():  # beside src/ in the repository
        kernels = Path(native.__file__).parents[1]
        shutil.copytree(kernels, copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
        import sys
        sys.path.insert(0, {str(copy.parent)!r})
        import numpy as np
        from klfast.kernels.cpu import native
        assert native.__file__.startswith({str(copy)!r})
        ones = np.ones(4096, np.float32)
        counter, total = np.zeros(1, np.int64), np.zeros(1)
        function = native.kernel("read", (), "qqqqq")
        function(ones.ctypes.data, ones.nbytes, counter.ctypes.data, total.ctypes.data, 0)
        print(total[0], "numba" in sys.modules)
    """
    env = {"KLFAST_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    files = sorted(copy.rglob("*"))
    first, compiled = python(code, env=env).split()
    assert compiled == "True"
    assert python(code, env=env).split() == [first, "False"]
    assert sorted(copy.rglob("*")) == files
    with (copy / "kernels" / "cpu" / "simd.py").open("a") as file:
        file.write("\nhsum = hmax\n")
    second, compiled = python(code, env=env).split()
    assert compiled == "True"
    assert second != first
    assert python(code, env=env).split() == [second, "False"]


# --- the folder --------------------------------------------------------------------------


def test_the_folder_is_private(folder: Path) -> None:
    assert native.cache_directory() == folder
    if sys.platform != "win32":
        assert folder.stat().st_mode & 0o777 == 0o700


def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache has to go if it cannot be where it should."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"klfast-{os.getuid() if sys.platform != 'win32' else 'user'}"


@pytest.mark.parametrize("variable", ["KLFAST_CACHE_DIR", "XDG_CACHE_HOME"])
@posix
def test_a_place_that_cannot_be_written_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("KLFAST_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(variable, "/dev/null/nowhere")  # below a file: for root, too
    temporary = _temporary(tmp_path, monkeypatch)
    assert native.cache_directory() == temporary
    _load()
    assert len(list(temporary.iterdir())) == 1


def test_a_user_without_a_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KLFAST_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def lost(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", lost)
    temporary = _temporary(tmp_path, monkeypatch)
    assert native.cache_directory() == temporary


def test_no_place_at_all(
    folder: Path, compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLFAST_CACHE_DIR", os.devnull + "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", os.devnull + "/nowhere")
    assert native.cache_directory() is None
    _load()
    _load()
    assert compilations.number == 2


@posix
@pytest.mark.parametrize("kind", ["link", "open", "other owner", "file"])
def test_a_folder_that_others_control_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
    if kind == "open":
        folder.chmod(0o777)
    temporary = _temporary(tmp_path, monkeypatch)
    if kind == "other owner":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        assert native.cache_directory() is None  # the temporary folder is not his, either
    else:
        assert native.cache_directory() == temporary


def test_a_relative_folder_stays_where_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLFAST_CACHE_DIR", "cache")
    monkeypatch.chdir(tmp_path)
    assert native.cache_directory() == folder


@pytest.mark.parametrize("trouble", ["full disk", "vanished"])
def test_what_cannot_be_written_is_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    native.cache_directory()
    if trouble == "vanished":
        folder.rmdir()
    else:

        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fdopen", full)
    _load()
    assert not folder.exists() or list(folder.iterdir()) == []


def test_files_long_unused_are_removed(folder: Path) -> None:
    _load()
    (kept,) = folder.iterdir()
    day = 86400
    now = time.time()
    os.utime(kept, (now, now - 2 * day))
    _load()
    assert kept.stat().st_mtime > now - day  # used today
    old = folder / "0.klfast"
    foreign = folder / "0.o"
    for path in (old, foreign):
        path.touch()
        os.utime(path, (now, now - 61 * day))
    kept.write_bytes(b"")  # to have something written
    _load()
    assert sorted(folder.iterdir()) == sorted([kept, foreign])


# --- processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_start_together(folder: Path) -> None:
    processes = [start(CALL), start(CALL)]
    for process in processes:
        finish(process)
    first = sorted((file.name, file.read_bytes()) for file in folder.iterdir())
    assert python("import sys\n" + CALL + "assert 'numba' not in sys.modules") == ""
    assert sorted((file.name, file.read_bytes()) for file in folder.iterdir()) == first

"""The library in a process: what it loads and leaves alone, forks, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import CALL, finish, python, start

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")

#: A call with rows that are cut along the vocabulary, and its bits.
SETUP = """
import os, signal, threading, time
import numpy as np
import klfast

rng = np.random.default_rng(0)
p, q = rng.normal(size=(2, 5, 100_000)).astype("f")
klfast.set_num_threads(3)

def bits():
    return klfast.kl_divergence(p, q).tobytes()

def child(work):
    '''Run work in a forked child that must end well, and soon.'''
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.alarm(50)
            status = 0 if work() else 2
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0

"""


# --- what is loaded ----------------------------------------------------------------------


def test_import_loads_neither_numba_nor_llvmlite() -> None:
    code = """
        import sys
        import klfast
        print(*{name.partition(".")[0] for name in sys.modules} & {"numba", "llvmlite", "scipy"})
    """
    assert python(code).split() == []


def test_a_kernel_on_disk_is_called_without_numba() -> None:
    python(CALL)  # compiles, if nobody did before
    assert python("import sys\n" + CALL + "print('numba' in sys.modules)").split() == ["False"]


SYSTEM = """
import mmap, os, signal
for module, names in (
    (os, ("sched_getaffinity", "register_at_fork", "fork", "getuid")),
    (signal, ("SIGBUS", "SIGALRM", "SIGHUP")),
    (mmap, [name for name in dir(mmap) if name.startswith(("MADV_", "PROT_", "MAP_"))]),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""

EVALUATION = """
import sys
import types
from klfast.cli import main
from klfast.kernels.cpu import faults

faults.sys = types.SimpleNamespace(platform="win32")
for name in ("a.npy", "b.npy"):
    np.save(name, np.random.default_rng(len(name)).normal(size=(70, 900)).astype("f"))
assert main(["compare", "a.npy", "b.npy", "--json", "o.json", "--checkpoint", "kept"]) == 0
assert main(["info"]) == 0
"""


def test_a_system_without_the_calls_of_posix(tmp_path: Path) -> None:
    """What Windows does not have; some of it, macOS has not either."""
    code = SYSTEM + CALL + f"os.chdir({str(tmp_path)!r})" + EVALUATION
    assert "mean" in python(code)


STATE = """
import gc, locale, logging, os, signal, sys, threading, warnings
import numpy as np

def state():
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "errors": np.geterr(),
        "random": np.random.get_state()[1].tolist(),
        "printing": np.get_printoptions(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "locale": locale.setlocale(locale.LC_ALL),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning),
        "tracing": (sys.gettrace(), sys.getprofile(), threading.gettrace()),
        "collection": (gc.isenabled(), gc.get_threshold()),
        "switching": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "files": sorted(os.listdir()),
        # Kernels have them become 0.
        "numbers below the normal range": float(np.float32(1e-30) * np.float32(1e-10)),
    }

def compare(before):
    after = state()
    print(*(name for name in before if before[name] != after[name]))

"""


def test_nothing_global_is_changed(tmp_path: Path) -> None:
    code = f"os.chdir({str(tmp_path)!r})\nbefore = state()\n"
    assert python(STATE + code + SETUP + "bits()\ncompare(before)").split() == []


@pytest.mark.slow
def test_nothing_global_is_changed_by_a_compilation(tmp_path: Path) -> None:
    """What the import of Numba itself changes is not counted."""
    code = f"os.chdir({str(tmp_path)!r})\nimport numba\nbefore = state()\n"
    end = """
from numba.np.ufunc import parallel
assert not parallel._is_initialized
assert klfast.backends()["cpu"]
compare(before)
"""
    env = {"KLFAST_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "cache").mkdir(mode=0o700)
    assert python(STATE + code + CALL + end, env=env).split() == []
    assert list((tmp_path / "cache").iterdir()) != []


@pytest.mark.skipif(sys.platform == "win32", reason="places of POSIX")
def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    env = {
        "HOME": "/dev/null/nowhere",
        "XDG_CACHE_HOME": None,
        "KLFAST_CACHE_DIR": None,
        "TMPDIR": str(tmp_path),
    }
    code = "from klfast.kernels.cpu import native\nprint(native.cache_directory())"
    assert Path(python(code, env=env).strip()).parent == tmp_path


# --- forks -------------------------------------------------------------------------------


@forks
def test_a_forked_child_works() -> None:
    code = SETUP + "expected = bits()\nchild(lambda: bits() == expected)\nassert bits() == expected"
    assert python(code, "-W", "ignore::DeprecationWarning") == ""


@forks
def test_a_child_of_a_child_works() -> None:
    code = """
expected = bits()

def work():
    child(lambda: bits() == expected)
    return bits() == expected

child(work)
"""
    assert python(SETUP + code, "-W", "ignore::DeprecationWarning") == ""


@forks
def test_a_fork_while_other_threads_are_inside_calls() -> None:
    code = """
expected = bits()
going = True

def call():
    while going:
        assert bits() == expected

callers = [threading.Thread(target=call) for _ in range(3)]
for caller in callers:
    caller.start()
for _ in range(20):
    child(lambda: bits() == expected)
going = False
for caller in callers:
    caller.join()
assert bits() == expected
"""
    assert python(SETUP + code, "-W", "ignore::DeprecationWarning") == ""


@forks
@pytest.mark.slow
def test_a_fork_while_another_thread_compiles(tmp_path: Path) -> None:
    code = """
from klfast.kernels.cpu import native

compiling = threading.Event()
compile_ = native._compile

def watched(*arguments):
    compiling.set()
    return compile_(*arguments)

native._compile = watched
results = []
caller = threading.Thread(target=lambda: results.append(bits()))
caller.start()
compiling.wait()
time.sleep(0.3)

def work():
    klfast.entropy(p[:1])  # another compilation
    results.append(bits())
    return True

child(work)
caller.join()
child(lambda: bits() == results[0])
"""
    env = {"KLFAST_CACHE_DIR": str(tmp_path / "cache")}
    assert python(SETUP + code, "-W", "ignore::DeprecationWarning", env=env) == ""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork on Windows")
    script = tmp_path / "script.py"
    work = f"""
def work(number):
    return bits()

if __name__ == "__main__":
    import multiprocessing
    expected = bits()
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map(work, range(4)) == [expected] * 4
"""
    script.write_text(SETUP + work)
    subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script)], check=True, timeout=100
    )


# --- the end -----------------------------------------------------------------------------

STRICT = ("-X", "dev", "-W", "error")


def test_the_end_with_idle_helpers() -> None:
    assert python(SETUP + "bits()", *STRICT) == ""


def test_the_end_while_a_thread_is_inside_a_call() -> None:
    code = """
def call():
    while True:
        bits()

bits()
threading.Thread(target=call, daemon=True).start()
time.sleep(0.05)
"""
    assert python(SETUP + code, *STRICT) == ""


def test_a_call_at_the_end() -> None:
    code = "import atexit\natexit.register(lambda: print(len(bits())))"
    assert python(SETUP + code, *STRICT).split() == ["20"]


def test_two_processes_at_once() -> None:
    code = SETUP + "import hashlib\nprint(hashlib.sha256(bits()).hexdigest())"
    first, second = (finish(process) for process in [start(code), start(code)])
    assert first == second

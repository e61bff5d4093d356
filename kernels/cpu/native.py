"""Compiled kernels: built by Numba once per machine, loaded without Numba ever after.

Numba's own disk cache keys a function on the file it stands in: it goes stale when a helper
in another file changes, and two processes that fill it at once can exchange each other's
code.  It also needs Numba imported, which costs more than a first call should.  So kernels
are kept here as plain object files.  A file's name is a digest of everything that its
content depends on (the source of every kernel module, the compilers' versions, the
processor), so that a file once written is right forever and is never written twice; it
appears under its name only when complete; its content is checked by a digest of its own.
Files that no process has used for two months are removed.  LLVM links an object file into
the process, and ctypes calls it with the GIL released and all its arguments in one piece.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import logging  # noqa: F401 (its lock, which compilations take, must be held after ours at a fork)
import os
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

_SUFFIX = ".klfast"
_DAY = 86400.0
#: Whether scratch memory of kernels lies before a page that cannot be touched (see simd.scratch).
GUARDED = bool(os.environ.get("KLFAST_GUARD_SCRATCH"))
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A fork waits for a compilation to end: its child could never get the locks of Numba and
    # LLVM that another thread holds.  What is registered last is called first, so that no lock
    # of a module imported above is held while waiting.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def _user_folder() -> Path:
    if explicit := os.environ.get("KLFAST_CACHE_DIR"):
        return Path(explicit)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~").expanduser() / "klfast"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/klfast").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "klfast"


def _temporary_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"klfast-{user}"


def _is_private(directory: Path) -> bool:
    """Whether nobody else can put a file into the directory, or another one into its place."""
    if not hasattr(os, "getuid"):
        return True  # Windows: both places belong to the user
    info = directory.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


@functools.cache
def cache_directory() -> Path | None:
    """Where object files are kept; None if no place can be written to.

    ``KLFAST_CACHE_DIR`` if set, else the user's cache folder; where that one cannot be used, a
    folder among the temporary files.  Object code is executed, so a folder that is a link,
    belongs to another user or can be written to by others is not used.
    """
    for locate in (_user_folder, _temporary_folder):
        # RuntimeError: the home folder cannot be found.
        with contextlib.suppress(OSError, RuntimeError):
            directory = locate().absolute()
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _is_private(directory):
                with tempfile.TemporaryFile(dir=directory):
                    return directory
    return None


def processor() -> str:
    """LLVM's name of the processor that kernels are compiled for."""
    from llvmlite import binding

    return os.environ.get("NUMBA_CPU_NAME") or str(binding.get_host_cpu_name())


def vector_bits() -> int:
    """Width of the vector registers that kernels are compiled for."""
    from .simd import VECTOR_BITS

    return VECTOR_BITS


def _sources() -> bytes:
    """Digest of the source of every kernel module; empty where there is none to be read."""
    files = sorted(Path(__file__).parent.glob("*.py*"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.digest() if files else b""


@functools.cache
def _fingerprint() -> tuple[bytes, bytes]:
    """Digests of what every kernel's machine code depends on: the source, and all else."""
    from importlib.metadata import version

    from llvmlite import binding

    facts = (
        version("numba"),
        version("llvmlite"),
        binding.llvm_version_info,
        binding.get_process_triple(),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
        sys.version_info[:2],
        sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_")),
        GUARDED,
    )
    return _sources(), hashlib.sha256(repr(facts).encode()).digest()


def _path(name: str) -> Path | None:
    """The file that a kernel is kept in; None if it cannot be kept."""
    directory = cache_directory()
    source, machine = _fingerprint()
    if directory is None or not source:
        return None
    stem = hashlib.sha256(source + machine + name.encode()).hexdigest()[:40]
    return directory / (stem + _SUFFIX)


def _read(path: Path) -> tuple[str, bytes] | None:
    """(symbol, object code), or None if the file is not there or not whole."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)  # still in use
    symbol, _, code = content.partition(b"\n")
    return symbol.decode(), code


def _write(path: Path, symbol: str, code: bytes) -> None:
    content = symbol.encode() + b"\n" + code
    # A full disk or a folder that went away only costs the next compilation.
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=_SUFFIX)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for other in path.parent.glob(f"*{_SUFFIX}"):
            if time.time() - other.stat().st_mtime > 60 * _DAY:
                other.unlink()


def _compile(module: str, arguments: tuple[str | bool, ...], signature: str) -> tuple[str, bytes]:
    """Let Numba compile ``module.build(*arguments)``; returns its symbol and object code."""
    from numba import types

    from .compiler import compile_kernel

    build = importlib.import_module(f".{module}", __package__).build
    kinds = {"q": types.int64, "d": types.float64}
    return compile_kernel(build(*arguments), tuple(kinds[kind] for kind in signature))


def _link(symbol: str, code: bytes, signature: str) -> Callable[..., None]:
    """Load object code into this process; returns a function of integers and floats."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    # One engine for each kernel: symbols of different files never meet.
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    # Numba's calling convention puts two pointers first (return value, exception).
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    function = prototype(engine.get_function_address(symbol))
    unused = (ctypes.c_int64 * 4)()
    pointer = ctypes.addressof(unused)
    pack = struct.Struct(signature).pack

    def call(*numbers: float) -> None:
        function(pointer, pointer, pack(*numbers))

    call.keep = (engine, unused)  # type: ignore[attr-defined]
    return call


@functools.cache
def _kernel(module: str, arguments: tuple[str | bool, ...], signature: str) -> Callable[..., None]:
    path = _path(repr((module, arguments, signature)))
    found = _read(path) if path else None
    if found is None:
        found = _compile(module, arguments, signature)
        # Not if files changed since the name was made: it would stand for other source.
        if path and _sources() == _fingerprint()[0]:
            _write(path, *found)
    return _link(*found, signature)


def kernel(module: str, arguments: tuple[str | bool, ...], signature: str) -> Callable[..., None]:
    """The compiled ``build(*arguments)`` of a kernel module.

    ``signature`` has one letter for each parameter: q is int64 (numbers and addresses), d is
    float64.  The call releases the GIL.
    """
    with _lock:
        return _kernel(module, arguments, signature)

"""Compiled kernels: built by Numba once per machine, loaded without Numba ever after.

Numba's own disk cache keys a function on the file it stands in: it goes stale when a helper
in another file changes, and two processes that fill it at once can exchange each other's
code.  It also needs Numba imported, which costs more than a first call should.  So kernels
are kept here as plain object files.  A file's name is a digest of everything that its
content depends on (the source of every kernel module, the compilers' versions, the
processor), so that a file once written is right forever and is never written twice; it
appears under its name only when complete; its content is checked by a digest of its own.
LLVM links it into the process, and ctypes calls it with the GIL released.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CTYPES = {"q": ctypes.c_int64, "d": ctypes.c_double}
_lock = threading.RLock()


@functools.cache
def cache_directory() -> Path | None:
    """Where object files are kept; None if no place can be written to.

    ``KLFAST_CACHE_DIR`` if set, else the user's cache folder, else a private folder among
    the temporary files.
    """
    candidates = []
    if explicit := os.environ.get("KLFAST_CACHE_DIR"):
        candidates.append(Path(explicit))
    elif sys.platform == "win32":
        candidates.append(Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "klfast")
    elif sys.platform == "darwin":
        candidates.append(Path("~/Library/Caches/klfast").expanduser())
    else:
        xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        candidates.append(Path(xdg).expanduser() / "klfast")
    user = getattr(os, "getuid", lambda: "user")()
    candidates.append(Path(tempfile.gettempdir()) / f"klfast-{user}")
    for directory in candidates:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Object code is executed: never load it from a folder that others can write to.
            info = directory.stat()
            if hasattr(os, "getuid") and (info.st_uid != os.getuid() or info.st_mode & 0o022):
                continue
            with tempfile.TemporaryFile(dir=directory):
                return directory
        except (OSError, RuntimeError):  # RuntimeError: the home folder cannot be found
            continue
    return None


def processor() -> str:
    """LLVM's name of this machine's processor."""
    from llvmlite import binding

    return str(binding.get_host_cpu_name())


def vector_bits() -> int:
    """Width of the vector registers that LLVM uses here."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return 512 if features.get("avx512f") else 256 if features.get("avx2") else 128


@functools.cache
def _fingerprint() -> bytes:
    """Digest of all that every kernel's machine code depends on, besides its own name."""
    from importlib.metadata import version

    from llvmlite import binding

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    features = binding.get_host_cpu_features().flatten()
    for fact in (
        version("numba"),
        version("llvmlite"),
        binding.llvm_version_info,
        binding.get_process_triple(),
        binding.get_host_cpu_name(),
        features,
        sys.version_info[:2],
        {k: v for k, v in os.environ.items() if k.startswith("NUMBA_")},
    ):
        digest.update(repr(fact).encode() + b"\0")
    return digest.digest()


def _read(path: Path) -> tuple[str, bytes] | None:
    """(symbol, object code), or None if the file is not there or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    header, _, code = content.partition(b"\n")
    try:
        facts = json.loads(header)
        if facts["sha256"] == hashlib.sha256(code).hexdigest():
            return str(facts["symbol"]), code
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, symbol: str, code: bytes) -> None:
    header = {"symbol": symbol, "sha256": hashlib.sha256(code).hexdigest()}
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + code)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        pass  # a full disk or a folder that went away only costs the next compilation


def _compile(module: str, arguments: tuple[str, ...], signature: str) -> tuple[str, bytes]:
    """Let Numba compile ``module.build(*arguments)``; returns its symbol and object code."""
    from numba import njit, types

    build = importlib.import_module(f".{module}", __package__).build
    kinds = {"q": types.int64, "d": types.float64}
    dispatcher = njit(
        nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(build(*arguments))
    dispatcher.compile(types.void(*(kinds[kind] for kind in signature)))
    (result,) = dispatcher.overloads.values()
    return result.fndesc.llvm_func_name, result.library._get_compiled_object()


@functools.cache
def _target_machine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine()


def _link(symbol: str, code: bytes, signature: str) -> Callable[..., None]:
    """Load object code into this process; returns a function of integers and floats."""
    from llvmlite import binding

    # One engine for each kernel: symbols of different files never meet.
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    # Numba's calling convention puts two pointers first (return value, exception).
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *(_CTYPES[kind] for kind in signature)
    )
    function = prototype(engine.get_function_address(symbol))
    unused = (ctypes.c_int64 * 4)()
    call = functools.partial(function, ctypes.addressof(unused), ctypes.addressof(unused))
    call.keep = (engine, unused)  # type: ignore[attr-defined]
    return call


@functools.cache
def _kernel(module: str, arguments: tuple[str, ...], signature: str) -> Callable[..., None]:
    name = repr((module, arguments, signature)).encode()
    stem = hashlib.sha256(_fingerprint() + name).hexdigest()[:40]
    directory = cache_directory()
    path = directory / f"{stem}.o" if directory else None
    found = _read(path) if path else None
    if found is None:
        found = _compile(module, arguments, signature)
        if path:
            _write(path, *found)
    return _link(*found, signature)


def kernel(module: str, arguments: tuple[str, ...], signature: str) -> Callable[..., None]:
    """The compiled ``build(*arguments)`` of a kernel module.

    ``signature`` has one letter for each parameter: q is int64 (numbers and addresses), d is
    float64.  The call releases the GIL.
    """
    with _lock:
        return _kernel(module, arguments, signature)

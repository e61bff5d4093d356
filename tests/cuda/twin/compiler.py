"""The text of a CUDA kernel as a program for the host: see ``device.cuh`` beside this file."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-U_FORTIFY_SOURCE"),
)
# What draws the order of blocks and threads where a launch does not say; 0: ascending.
SEED = int(os.environ.get("KLFAST_TWIN_SEED", "0"))
# From the line that marks the device's own functions to that of the next file.
DEVICE = re.compile(r'^#line 1 "[^"\n]*device\.cuh".*?(?=^#line 1 ")', re.DOTALL | re.MULTILINE)
KERNEL = re.compile(r"^[ \t]*KERNEL\([^)]*\)\s*(?:void\s+)?(\w+)\s*\(", re.MULTILINE)


class CompileError(Exception):
    """The compiler did not take a text; `log` is what it said."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.log = log


class LaunchError(Exception):
    """A launch did what a device does not allow."""


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: CXX, or g++; None if there is none."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    return tuple(command) if command and shutil.which(command[0]) else None


@functools.cache
def _command() -> tuple[str, ...]:
    command = compiler()
    if command is None:
        raise CompileError("no C++ compiler")
    flags: tuple[str, ...] = FLAGS
    if platform.machine() in ("x86_64", "AMD64"):
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and re.search(r"\bfma\b", cpuinfo.read_text()):
            flags = (*flags, "-mfma")  # fma as an instruction, not as a call
    return (*command, *flags)


@functools.cache
def _version() -> str:
    command = [*(compiler() or ()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cache_directory() -> Path:
    """Where compiled texts are kept between runs of the tests."""
    path = Path(tempfile.gettempdir()) / f"klfast-twin-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise CompileError(f"{path} belongs to someone else")
    return path


@functools.cache
def _stacks(size: int) -> int:
    """The address of memory for the stacks of a launch, which lasts as long as the process."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size, flags)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _kept.append(memory)
    return address


_kept: list[mmap.mmap] = []
_lock = threading.Lock()  # programs share the stacks, and have one state each


class Program:
    """A kernel that the host can launch."""

    def __init__(self, path: Path, name: str) -> None:
        library = ctypes.CDLL(str(path))
        self.name = name
        self._stacks = library.twin_stacks
        self._stacks.restype = ctypes.c_size_t
        self._launch = library.twin_launch
        self._launch.argtypes = [
            *(ctypes.c_longlong, ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p),
            *(ctypes.c_ulonglong, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t),
        ]

    def launch(self, grid: int, block: int, shared: int, call: int, seed: int = SEED) -> None:
        """Run all blocks; `call` is the address of the argument.

        With a seed, blocks and threads run in an order drawn by it, else in ascending order.
        LaunchError where the kernel does what a device does not allow.
        """
        message = ctypes.create_string_buffer(1024)
        with _lock:
            size = self._stacks(max(block, 1))
            stacks = _stacks(1 << max(size - 1, 1 << 20).bit_length())
            failed = self._launch(grid, block, shared, call, seed, stacks, message, len(message))
        if failed:
            raise LaunchError(f"{self.name}: {message.value.decode(errors='replace')}")


@functools.cache
def compile_text(text: str) -> Program:
    """Compile a whole CUDA text with one kernel, or take what was compiled before."""
    device = '#line 1 "twin/device.cuh"\n' + (HERE / "device.cuh").read_text()
    source, found = DEVICE.subn(lambda _: device, text)
    names = KERNEL.findall(text)
    if found != 1 or len(names) != 1:
        raise CompileError(f"{found} device.cuh and the kernels {names}, where one each is needed")
    launch = f'\n#define TWIN_KERNEL {names[0]}\n#line 1 "twin/launch.cuh"\n'
    source = source.replace("#pragma once", "") + launch + (HERE / "launch.cuh").read_text()
    command = _command()
    key = hashlib.sha256("\0".join([source, *command, _version()]).encode()).hexdigest()[:32]
    path = cache_directory() / f"{names[0]}-{key}.so"
    if not path.exists():
        # Under a name of its own until it is whole: several processes may be at it.
        part = path.with_suffix(f".{os.getpid()}.part")
        result = subprocess.run(
            [*command, "-x", "c++", "-", "-o", str(part)],
            input=source,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise CompileError(result.stderr)
        part.replace(path)
    return Program(path, names[0])

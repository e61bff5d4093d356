"""Mapped files that others cut off: what is gone reads as zeros, and does not end the process.

A page of a mapped file that the file no longer has raises SIGBUS, in the middle of a kernel. The
handler puts a page of zeros there, once and for all, and the kernel goes on; who reads the file
must look at its size and time of change afterwards, and throw away what came of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import signal
import struct
import sys
from collections.abc import Iterator
from typing import Any

#: si_code says why, and si_addr where: the same in every 64-bit Linux. A page that the file has not
#: is BUS_ADRERR, 2; mmap with MAP_PRIVATE, MAP_FIXED and MAP_ANONYMOUS is 0x32. Anything else (such
#: as memory that is broken) ends the process, as it would have.
_HANDLER = """
declare ptr @mmap(ptr, i64, i32, i32, i32, i64)
declare void @abort()

define void @klfast_page_of_zeros(i32 %signal, ptr %info, ptr %context) {{
  %code_at = getelementptr i8, ptr %info, i64 8
  %code = load i32, ptr %code_at
  %address_at = getelementptr i8, ptr %info, i64 16
  %address = load i64, ptr %address_at
  %first = and i64 %address, {mask}
  %page = inttoptr i64 %first to ptr
  %known = icmp eq i32 %code, 2
  br i1 %known, label %replace, label %fail
replace:
  %found = call ptr @mmap(ptr %page, i64 {size}, i32 1, i32 50, i32 -1, i64 0)
  %good = icmp eq ptr %found, %page
  br i1 %good, label %done, label %fail
fail:
  call void @abort()
  unreachable
done:
  ret void
}}
"""


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO = 4


def _handler() -> tuple[Any, int]:
    """An engine that owns the handler, and its address."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    text = _HANDLER.format(mask=-mmap.PAGESIZE, size=mmap.PAGESIZE)
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(text), machine)
    engine.finalize_object()
    return engine, engine.get_function_address("klfast_page_of_zeros")


@contextlib.contextmanager
def zeros_beyond_files() -> Iterator[None]:
    """Have pages that mapped files no longer hold read as zeros, in this process, until the end.

    For a process of klfast's own. Does nothing but on 64-bit Linux.
    """
    if not sys.platform.startswith("linux") or struct.calcsize("P") != 8:
        yield
        return
    engine, address = _handler()
    library = ctypes.CDLL(None, use_errno=True)
    before, action = _Action(), _Action(handler=address, flags=_SA_SIGINFO)
    if library.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(before)):
        raise OSError(ctypes.get_errno(), "sigaction failed")
    try:
        yield
    finally:
        library.sigaction(signal.SIGBUS, ctypes.byref(before), None)
        del engine

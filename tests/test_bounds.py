"""No kernel reads or writes outside of the arrays that it is given, or of its own memory.

The calls are those of guarded.py, in processes of their own: what touches a byte too many ends
them, and their traceback is the message of a failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from processes import python

from klfast import backends

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="pages are protected through POSIX calls"),
    pytest.mark.skipif(not backends()["cpu"], reason="there are no compiled kernels"),
]

#: Guarded kernels are other kernels, which are compiled and kept beside those of the users.
GUARDED = {"PYTHONPATH": str(Path(__file__).parent), "KLFAST_GUARD_SCRATCH": "1"}
PLAIN = {**GUARDED, "KLFAST_GUARD_SCRATCH": None}


def test_rows_that_float32_kernels_read() -> None:
    python("import guarded; guarded.table(narrow=True)", env=PLAIN)


@pytest.mark.parametrize("widths", ["slice(0, None, 2)", "slice(1, None, 2)"])
def test_any_other_rows(widths: str) -> None:
    python(f"import guarded; guarded.table(narrow=False, widths={widths})", env=GUARDED)


def test_what_is_not_in_the_operation_table() -> None:
    python("import guarded; guarded.others()", env=GUARDED)


ARRAYS = """
import ctypes
import numpy as np
import guarded
for end, beyond in ("first", -1), ("last", 80):
    array = guarded.placed(np.zeros((2, 5)), end)
    assert (array == 0.0).all()
    for access in ctypes.string_at, lambda at, n: ctypes.memset(at, 0, n):
        for at in (0, 79, beyond):
            print(guarded.ends_process(access, array.ctypes.data + at, 1))
"""


def test_a_byte_beyond_an_array() -> None:
    assert python(ARRAYS, env=PLAIN).split() == 4 * ["False", "False", "True"]


SCRATCH = """
import numpy as np
import guarded
from klfast.kernels.cpu import native
from klfast.kernels.cpu.compiler import compile_kernel
from klfast.kernels.cpu.simd import peek_f64, poke_f64, scratch
from numba import types

area = scratch(192)

def kernel(to, at, out):
    memory = area()
    poke_f64(out, peek_f64(memory + at))
    poke_f64(memory + to, 1.0)

function = native._link(*compile_kernel(kernel, 3 * (types.int64,)), "qqq")
out = guarded.placed(np.zeros((1, 1)), "last")
for to, at in ((0, 0), (184, 184), (184, 185), (185, 184)):
    print(guarded.ends_process(function, to, at, out.ctypes.data))
function(0, 184, out.ctypes.data)
print(out[0, 0])
"""


def test_a_byte_beyond_scratch_memory() -> None:
    """And there is nothing in it before something is written."""
    assert python(SCRATCH, env=GUARDED).split() == ["False", "False", "True", "True", "nan"]


def test_guarded_kernels_are_kept_apart() -> None:
    code = "from klfast.kernels.cpu import native; print(native._path('a kernel'))"
    assert len({python(code, env=env) for env in (GUARDED, PLAIN)}) == 2

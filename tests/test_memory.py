"""Calls on large arrays need no memory of their size.

Extra memory is work space for the rows and a tile for each thread. Both ways of finding a copy
are used: what NumPy allocates is traced, and the peak of the whole process is watched, which
also sees what compiled code allocates. A process of its own is needed for that peak to be the
calls' own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(
    not (STATUS.exists() and PEAK.exists()), reason="only Linux lets a process watch its peak"
)

ROWS, WIDTH = 64, 131072
ARRAY_BYTES = ROWS * WIDTH * 4  # 32 MiB

CONTROL = "a copy of an array in bfloat16"

#: Values, lists of unfinished rows and counters, for every metric; and Python's own objects.
TRACED_BYTES = 64 * 1024 + 200 * ROWS
#: The stacks and allocator arenas of the threads come in pages, beyond what is traced: a float32
#: copy of one of the arrays would be 16 times as much, one in bfloat16 8 times.
RESIDENT_BYTES = 2 * 1024 * 1024

PROGRAM = f"""
import json, pathlib, re, tracemalloc
import ml_dtypes
import numpy as np
import klfast

WAYS = {{
    "kl_divergence": lambda x, y: klfast.kl_divergence(x, y),
    "js_divergence": lambda x, y: klfast.js_divergence(x, y),
    "js_divergence, weight 0.3": lambda x, y: klfast.js_divergence(x, y, weight=0.3),
    "renyi_divergence": lambda x, y: klfast.renyi_divergence(x, y, 2.0),
    "entropy": lambda x, y: klfast.entropy(x),
    "compare": lambda x, y: klfast.compare(x, y),
    "compare, many": lambda x, y: klfast.compare(x, y, ("js", "renyi:2", "chi2", "entropy_p")),
    "kl_divergence, mean": lambda x, y: klfast.kl_divergence(x, y, reduction="mean"),
}}

def arrays(rows, width, dtype):
    random = np.random.default_rng(0)
    x, y = np.empty((rows, width), dtype), np.empty((rows, width), dtype)
    for i in range(rows):  # nothing of the arrays' size but the arrays
        x[i] = random.standard_normal(width, np.float32)
        y[i] = x[i] + random.standard_normal(width, np.float32)
    return x, y

def layouts(rows, width):
    x, y = arrays(rows, width, np.float32)
    yield "contiguous", x, y
    yield "one long row", x.reshape(1, -1), y.reshape(1, -1)
    yield "every second entry", x[:, ::2], y[:, ::2]
    yield "one row against all", x[0], y
    yield "bfloat16", *arrays(rows, width, ml_dtypes.bfloat16)

def resident(what):
    status = pathlib.Path("{STATUS}").read_text()
    return 1024 * int(re.search(what + r":\\s*(\\d+) kB", status)[1])

def watch(call, x, y):
    tracemalloc.start()
    # What was freed since an earlier peak would be used unseen: the peak begins anew.
    pathlib.Path("{PEAK}").write_text("5")
    before = resident("VmRSS")
    call(x, y)
    grown = resident("VmHWM") - before
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return traced, grown

cases, found = list(layouts({ROWS}, {WIDTH})), []
for _, x, y in cases:  # compiles, and starts the threads
    for call in WAYS.values():
        call(x, y)
for layout, x, y in cases:
    found += [(layout, name, *watch(call, x, y)) for name, call in WAYS.items()]
found.append(("contiguous", "{CONTROL}", *watch(lambda x, y: x + 0, x, y)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured() -> list[Any]:
    """(layout, call, bytes traced, growth of the peak in bytes) for every case."""
    pytest.importorskip("ml_dtypes")
    # Left to itself, the allocator keeps what was freed, and a copy could be made of that unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    assert len(found) == 5 * 8 + 1
    *cases, (_, name, traced, resident) = found
    assert name == CONTROL
    assert min(traced, resident) > ARRAY_BYTES // 2 - RESIDENT_BYTES  # what is looked for is seen
    return cases


def test_numpy_allocates_nothing_of_the_arrays_size(measured: list[Any]) -> None:
    assert TRACED_BYTES < ARRAY_BYTES // 200
    assert [each for each in measured if each[2] > TRACED_BYTES] == []


def test_peak_of_the_process_stays(measured: list[Any]) -> None:
    assert RESIDENT_BYTES <= ARRAY_BYTES // 16
    assert [each for each in measured if each[3] > RESIDENT_BYTES] == []

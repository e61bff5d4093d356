"""What a user waits for outside the kernels: imports, first calls, the overhead of a call."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

import klfast
from klfast._bench import random_inputs, ratio, take_turns

#: A first call of each kind of kernel.
FIRST_CALLS = {
    "kl_divergence": "klfast.kl_divergence(p, q)",
    "renyi_divergence": "klfast.renyi_divergence(p, q, 2)",
    "js_divergence": "klfast.js_divergence(p, q)",
    "total_variation": "klfast.total_variation(p, q)",
    "entropy": "klfast.entropy(p)",
    "logsumexp": "klfast.logsumexp(p)",
}

_IMPORT = """
import time
began = time.perf_counter()
import {module}
print(time.perf_counter() - began)
"""
_HEAVY = """
import sys, klfast
print(*(name for name in ("numba", "llvmlite", "scipy", "torch", "jax") if name in sys.modules))
"""
_FIRST_CALL = """
import time
began = time.perf_counter()
import klfast
import numpy as np
p = np.random.default_rng(0).standard_normal((4, 1000), np.float32)
q = p + np.float32(0.1) * p[::-1]
{call}
print(time.perf_counter() - began)
"""


def measure(rounds: int) -> dict[str, float | str]:
    """Return every figure by its name, which says the unit."""
    return _imports(rounds) | _first_calls(max(1, rounds // 4)) | _latency(rounds)


def _child(program: str, cache: str | None = None) -> list[str]:
    """Run Python on a program in a new process and return the words that it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    if cache is not None:
        environment["KLFAST_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def _imports(rounds: int) -> dict[str, float | str]:
    times: dict[str, list[float]] = {"numpy": [], "klfast": []}
    for name in times:  # writes the bytecode, so that no timed run compiles it
        _child(_IMPORT.format(module=name))
    for _ in range(rounds):
        for name, each in times.items():
            each.append(float(_child(_IMPORT.format(module=name))[0]))
    return {
        "import numpy (s)": statistics.median(times["numpy"]),
        "import klfast (s)": statistics.median(times["klfast"]),
        "import klfast / import numpy": ratio(times["klfast"], times["numpy"]),
        "heavy packages that `import klfast` loads": ", ".join(_child(_HEAVY)) or "none",
    }


def _first_calls(rounds: int) -> dict[str, float | str]:
    """Time first calls, imports included, in pairs of processes: the second finds the cache."""
    figures: dict[str, float | str] = {}
    slowest = {"nothing cached": 0.0, "from the disk cache": 0.0}
    for name, call in FIRST_CALLS.items():
        times: dict[str, list[float]] = {state: [] for state in slowest}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as cache:
                for each in times.values():
                    each.append(float(_child(_FIRST_CALL.format(call=call), cache)[0]))
        for state, each in times.items():
            seconds = statistics.median(each)
            figures[f"first {name} with its imports, {state} (s)"] = seconds
            slowest[state] = max(seconds, slowest[state])
    return figures | {f"slowest first call, {state} (s)": each for state, each in slowest.items()}


def _latency(rounds: int) -> dict[str, float | str]:
    given = random_inputs(1, 1000)
    runs = {"NumPy": lambda: klfast.kl_divergence(given.p, given.q)}
    try:
        import torch
    except ImportError:
        pass
    else:
        p, q = torch.from_numpy(given.p), torch.from_numpy(given.q)
        runs["PyTorch"] = lambda: klfast.kl_divergence(p, q)
    return {
        f"kl_divergence of 1 x 1000, {name} (us)": 1e6 * statistics.median(each)
        for name, each in take_turns(runs, rounds).items()
    }

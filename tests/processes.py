"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping

#: A small call, and a check of its result: KL((0.5, 0.5), (0.75, 0.25)).
CALL = """
import numpy as np
import klfast
value = klfast.kl_divergence(np.log([[.5, .5]], dtype="f"), np.log([[.75, .25]], dtype="f"))
assert abs(value[0] - 0.14384104) < 1e-7, value
"""


def start(
    code: str, *options: str, env: Mapping[str, str | None] | None = None
) -> subprocess.Popen[str]:
    """Start Python with this code; an environment variable that is None is taken away."""
    changed = {**os.environ, **(env or {})}
    return subprocess.Popen(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={name: value for name, value in changed.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What the process printed; it must end well, in time and without a message."""
    with process:
        try:
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, ""), err
    return out


def python(code: str, *options: str, env: Mapping[str, str | None] | None = None) -> str:
    """Run the code to its end; returns what it printed."""
    return finish(start(code, *options, env=env))

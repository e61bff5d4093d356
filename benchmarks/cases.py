"""What is measured, and what was aimed for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, int]

#: The shape that every contender runs every measure at. The others show where the work of a call
#: is divided differently: fewer rows, ordinary ones, one long row, many short ones, one small one.
MAIN_SHAPE: Shape = (512, 131072)
SHAPES: tuple[Shape, ...] = (
    MAIN_SHAPE,
    (64, 262144),
    (4096, 32000),
    (1, 262144),
    (100000, 128),
    (1, 1000),
)
QUICK_SHAPES: tuple[Shape, ...] = ((8, 2048), (1, 1000))

MEASURES = (
    "kl",
    "cross_entropy",
    "entropy",
    "logsumexp",
    "token_log_probs",
    "renyi:2",
    "js",
    "tv",
    "hellinger2",
    "compare",
)
#: Measure and dtype of every case.
CASES: tuple[tuple[str, str], ...] = (
    *((measure, "float32") for measure in MEASURES),
    ("kl", "bfloat16"),
    ("kl", "float16"),
)
#: What the other libraries run at the other shapes, which would take them too long otherwise.
PEER_CASES: tuple[tuple[str, str], ...] = (
    ("kl", "float32"),
    ("entropy", "float32"),
    ("js", "float32"),
)


@dataclass(frozen=True)
class Target:
    """Least speed of a case: beside a plain read, and as a multiple of other libraries'."""

    cases: tuple[tuple[str, str], ...]
    of_read: float
    faster_than: Mapping[str, float] = field(default_factory=dict)
    shape: Shape = MAIN_SHAPE


def _float32(*measures: str) -> tuple[tuple[str, str], ...]:
    return tuple((measure, "float32") for measure in measures)


TARGETS = (
    Target(_float32("kl"), 0.9, {"torch.compile": 5.5, "torch eager": 18, "scipy": 45}),
    Target(_float32("cross_entropy", "entropy", "logsumexp", "token_log_probs"), 0.95),
    Target(_float32("renyi:2"), 0.6, {"torch.compile": 7}),
    Target(_float32("js", "tv", "hellinger2"), 0.42, {"torch.compile": 5}),
    Target(_float32("compare"), 0.3),
    Target((("kl", "bfloat16"), ("kl", "float16")), 0.65, {"torch.compile": 7}),
    Target(_float32("kl"), 0.6, shape=(1, 262144)),
)

#: Most of what a whole process or call may take: the names are those of `process.measure`.
LIMITS = {
    "import klfast / import numpy": 1.3,
    "slowest first call, nothing cached (s)": 2.0,
    "slowest first call, from the disk cache (s)": 0.4,
    "kl_divergence of 1 x 1000, NumPy (us)": 15.0,
}


def text_of(shape: Shape) -> str:
    """Write a shape as people do: 512 x 131072."""
    return f"{shape[0]} x {shape[1]}"

"""``python tests/cuda/every_kernel.py``: calls that launch every kernel in every way it works.

For tools that watch a device, such as compute-sanitizer, which are slow: rows are few and short,
but as many and as long as it takes for a warp, a block, a cluster and several blocks to have one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

import klfast

METRICS = ("kl", "reverse_kl", "tv", "js", "renyi:2", "same_top", "nll_q")
GRADIENTS = ("kl", "js")
#: And how many entries the second batch begins after a vector does.
DTYPES = (("float32", 0), ("bfloat16", 0), ("float32", 1))


def shapes(multiprocessors: int) -> list[tuple[int, int]]:
    """Of rows that a warp has, a block, clusters, and many blocks."""
    return [(9, 50), (2 * multiprocessors, 5000), (multiprocessors, 40_000), (2, 40_000)]


def main() -> None:
    """Make the calls, and see that nothing is NaN."""
    cupy: Any = import_module("cupy")
    import_module("ml_dtypes")  # which tells NumPy of bfloat16
    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    generator = np.random.default_rng(0)
    for rows, width in shapes(multiprocessors):
        x = generator.normal(size=(rows, width)).astype(np.float32)
        y = (x + 0.1 * generator.normal(size=x.shape)).astype(np.float32)
        y[::3] = generator.normal(size=y[::3].shape)
        for dtype, skew in DTYPES:
            p = cupy.asarray(x.astype(dtype))
            q = cupy.asarray(np.pad(y.astype(dtype), ((0, 0), (skew, 0))))[:, skew:]
            tokens = cupy.asarray(np.arange(rows))
            found = dict(klfast.compare(p, q, METRICS, tokens))
            found["renyi"] = klfast.renyi_divergence(p, q, 2.0)
            found["kl"] = klfast.kl_divergence(p, q)
            found["log_softmax"] = klfast.log_softmax(p)
            found["top_k"] = klfast.compare(p, q, ["topk_overlap:5"])["topk_overlap:5"]
            found["renyi:inf"] = klfast.renyi_divergence(p, q, np.inf)
            for metric in GRADIENTS:
                value, both = klfast.value_and_grad(metric, p, q, wrt="both")
                names = (f"gradient of {metric}: {each}" for each in ("value", "p", "q"))
                found |= zip(names, (value, *both), strict=True)
            for name, values in found.items():
                if np.isnan(values.get().astype(np.float32)).any():
                    raise SystemExit(f"{rows} x {width} {dtype}: {name} has NaN")
    print("done")


if __name__ == "__main__":
    main()

"""Compare two quantized models with the original: the Python call behind ``klfast compare``."""

from pathlib import Path

import klfast

DATA = Path(__file__).parent / "data"

for name in ("int8", "int4"):
    result = klfast.evaluate(DATA / "base.npy", DATA / f"{name}.npy", DATA / "targets.npy")
    summary = result.summary()
    kl = summary.measures["kl"]
    print(f"{name}: KL {kl.mean:.3g} ± {kl.standard_error:.1g}, worst {kl.max:.3g},", end=" ")
    print(f"same top token {summary.value('same_top.mean'):.1%},", end=" ")
    print(f"perplexity x {summary.value('perplexity.ratio'):.4f}")
    if summary.violations(above={"kl.mean": 0.01}):
        print(f"{name}: too far from the original")

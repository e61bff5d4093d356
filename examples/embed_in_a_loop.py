"""Measure inside an inference loop of your own, in several processes, and join what they found.

Nothing is stored but one number a measure and token. Here the "models" are the files of
examples/data; put your own in the place of `batches`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import klfast

DATA = Path(__file__).parent / "data"


def batches(first: int, last: int) -> Iterator[tuple[Any, ...]]:
    """What an inference loop has: logits of both models, the tokens that follow, and a mask."""
    base, test = (np.load(DATA / f"{name}.npy", mmap_mode="r") for name in ("base", "int8"))
    targets = np.load(DATA / "targets.npy")
    for start in range(first, last, 4):
        part = slice(start, start + 4)
        counts = np.ones(4, bool)  # False for padding and prompts
        yield base[part], test[part], targets[part], counts


def worker(first: int, last: int, file: Path) -> None:
    """What each process does: measure its share, and write down what it found."""
    evaluation = klfast.Evaluation()
    for base, test, targets, counts in batches(first, last):
        evaluation.update(base, test, targets, where=counts)
    file.write_text(json.dumps(evaluation.to_dict()))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(2)]
        for number, file in enumerate(files):
            worker(12 * number, 12 * number + 12, file)
        whole = klfast.Evaluation()
        for file in files:
            whole.merge(klfast.Evaluation.from_dict(json.loads(file.read_text())))
    print(whole)
    summary = whole.summary()
    kl = summary.measures["kl"]
    print(f"\nmean KL {kl.mean:.3g}, 95 % interval {kl.low:.3g} to {kl.high:.3g}")
    print(f"perplexity ratio {summary.value('perplexity.ratio'):.4f}")


if __name__ == "__main__":
    main()

"""Distil a small language model into a smaller one, with three divergences as the loss.

A teacher reads the documentation that ships with Python (module pydoc_data.topics) and learns to
predict the next word. Three students of a quarter of its width then learn from its logits alone, by
forward KL, reverse KL and Jensen-Shannon. Needs PyTorch; the picture needs matplotlib.

    python examples/distill.py                # half a minute on 2 cores
    python examples/distill.py --picture distill.png
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import klfast.torch
from klfast.torch import distillation_loss

CONTEXT = 6  # words that the next one is predicted from
LOSSES = {"kl": "forward KL", "reverse_kl": "reverse KL", "js": "Jensen-Shannon"}


def words(vocabulary: int) -> tuple[torch.Tensor, int]:
    """The text as numbers, the most frequent words first; all others are one."""
    text = " ".join(topics[name] for name in sorted(topics))
    split = re.findall(r"[a-z_]+|\d+|[^\w\s]", text.lower())
    known = [word for word, _ in Counter(split).most_common(vocabulary - 1)]
    index = {word: number for number, word in enumerate(known)}
    return torch.tensor([index.get(word, len(known)) for word in split]), len(known) + 1


class Model(torch.nn.Module):  # type: ignore[misc]
    """Embeddings of the last words, one hidden layer, logits of the next word."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.hidden = torch.nn.Linear(CONTEXT * width, 2 * width)
        self.head = torch.nn.Linear(2 * width, vocabulary)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        states = torch.relu(self.hidden(self.embed(context).flatten(1)))
        logits: torch.Tensor = self.head(states)
        return logits


class Batches:
    """Random windows of the text: contexts, and the word that follows each."""

    def __init__(self, text: torch.Tensor, size: int, seed: int) -> None:
        self.windows = text.unfold(0, CONTEXT + 1, 1)
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(self.windows), (self.size,), generator=self.generator)
        window = self.windows[chosen]
        return window[:, :-1], window[:, -1]


def train_teacher(model: Model, batches: Batches, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        context, target = batches.next()
        loss = torch.nn.functional.cross_entropy(model(context), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_student(
    student: Model, teacher: Model, batches: Batches, held_out: torch.Tensor, name: str, steps: int
) -> list[tuple[int, float, float]]:
    """Steps, mean loss since the last entry, and KL(teacher, student) on text not trained on."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    curve, since = [], []
    with torch.no_grad():
        truth = teacher(held_out)
    for step in range(1, steps + 1):
        context, _ = batches.next()
        with torch.no_grad():
            soft = teacher(context)
        loss = distillation_loss(student(context), soft, divergence=name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        since.append(float(loss.detach()))
        if step % max(1, steps // 20) == 0:
            with torch.no_grad():
                distance = klfast.torch.kl_divergence(truth, student(held_out), reduction="mean")
            curve.append((step, sum(since) / len(since), float(distance)))
            since.clear()
    return curve


def picture(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, label), dash in zip(LOSSES.items(), ("-", "--", ":"), strict=True):
        steps, _, distances = zip(*curves[name], strict=True)
        axes.plot(steps, distances, dash, label=f"trained by {label}")
    axes.set_xlabel("steps")
    axes.set_ylabel("KL(teacher, student) on held-out text, nats")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=250, help="of each student (default: 250)")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    text, vocabulary = words(options.vocabulary)
    cut = len(text) * 9 // 10
    held_out = text[cut:].unfold(0, CONTEXT + 1, 1)[:: max(1, (len(text) - cut) // 500), :-1]
    print(f"{len(text)} words of documentation, vocabulary {vocabulary}")

    began = time.perf_counter()
    teacher = Model(vocabulary, 64)
    train_teacher(teacher, Batches(text[:cut], 128, seed=0), options.teacher_steps)
    print(f"teacher trained in {time.perf_counter() - began:.0f} s")

    curves = {}
    for name, label in LOSSES.items():
        torch.manual_seed(1)
        began = time.perf_counter()
        curves[name] = train_student(
            Model(vocabulary, 16), teacher, Batches(text[:cut], 128, seed=1), held_out, name,
            options.steps,
        )  # fmt: skip
        (_, first, _), (_, last, distance) = curves[name][0], curves[name][-1]
        print(
            f"{label:<15} loss {first:.3f} -> {last:.3f}, KL(teacher, student) on held-out text "
            f"{distance:.3f}, {time.perf_counter() - began:.0f} s"
        )
    if options.picture:
        picture(curves, options.picture)
    return curves


if __name__ == "__main__":
    main()

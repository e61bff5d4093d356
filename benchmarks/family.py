"""``python benchmarks/family.py``: Gaussians, pairs, counts and samples, beside what others do.

Writes FAMILY.md and family.json beside itself (``--out`` elsewhere, a folder). All contenders of a
line take turns with the same threads; ratios are medians over the rounds. A plain read of the same
bytes, or the bare matrix product, stands beside each as what is possible at best.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import klfast
from klfast import estimators, gaussian
from klfast._bench import ratio, read_all, take_turns
from klfast._machine import machine, versions

HERE = Path(__file__).resolve().parent
Runs = dict[str, Callable[[], Any]]

# Threads of OpenBLAS keep their cores for 2**26 ticks of the clock after a product, some 30 ms, and
# who comes next would pay for it: up to a sixth of a call of 300 ms.
PAUSE = 50e-3

LIMITS = {"plain read": "a plain read", "matrix product": "the bare matrix product"}


@dataclass(frozen=True)
class Line:
    """One job: milliseconds of every contender, and its time over that of klfast."""

    name: str
    milliseconds: dict[str, float]
    slower: dict[str, float]


def main() -> None:
    """Measure, print, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    lines = []
    for name, make in jobs(options.scale):
        runs = make()
        for run in runs.values():
            run()  # compile
        times = take_turns(runs, options.rounds, patience=3.0, pause=PAUSE)
        lines.append(
            Line(
                name,
                {each: 1e3 * statistics.median(taken) for each, taken in times.items()},
                {each: ratio(taken, times["klfast"]) for each, taken in times.items()},
            )
        )
        print(lines[-1], file=sys.stderr)
    text = page(lines)
    print(text)
    options.out.mkdir(exist_ok=True)
    (options.out / "FAMILY.md").write_text(text, encoding="utf-8")
    result = {
        "machine": machine(),
        "versions": versions(),
        "threads": klfast.get_num_threads(),
        "rounds": options.rounds,
        "lines": [asdict(line) for line in lines],
    }
    (options.out / "family.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def page(lines: list[Line]) -> str:
    """Return the table as Markdown."""
    facts, now = machine(), datetime.datetime.now(datetime.UTC)
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    rows = [
        "# Gaussians, pairs, counts and samples\n",
        f"Measured {now:%Y-%m-%d %H:%M} UTC on {facts['processor']}, {facts['cores']} cores, with "
        f"{klfast.get_num_threads()} threads; {known}. Written by `python benchmarks/family.py`.\n",
        "Share: the time of a plain read of the same bytes, or of the bare matrix product, over "
        "klfast's; gradients write as many bytes as they read, which caches fetch first, so that a "
        "third is the most there. The others: how many times as long as klfast they take.\n",
        "| job | klfast, ms | share | of | NumPy / SciPy | PyTorch eager | torch.compile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        limit = next((each for each in LIMITS if each in line.slower), None)
        share = f"{line.slower[limit]:.2f}" if limit else ""
        others = [
            f"{line.slower[each]:.1f} x" if each in line.slower else ""
            for each in ("NumPy", "PyTorch eager", "torch.compile")
        ]
        cells = [line.name, f"{line.milliseconds['klfast']:.3g}", share,
                 LIMITS[limit] if limit else "", *others]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def jobs(scale: float) -> Iterator[tuple[str, Callable[[], Runs]]]:
    """Every line of the table, and what makes its contenders."""
    n = max(8, int(16384 * scale))
    yield f"Gaussian KL from the prior, {n} x 1024", lambda: _prior(n, 1024)
    yield f"Gaussian KL from the prior, {32 * n} x 32", lambda: _prior(32 * n, 32)
    yield f"Gaussian KL of two, {n} x 1024", lambda: _two(n, 1024)
    yield f"Gaussian KL from the prior and its gradients, {n} x 1024", lambda: _gradients(n, 1024)
    many, few = max(64, int(1024 * scale)), max(32, int(256 * scale))
    for n, m, metric in (
        (many, many, "kl"), (few, few, "kl"), (8, 4 * many, "kl"), (many, many, "renyi:0.5"),
    ):  # fmt: skip
        yield (
            f"pairwise {metric}, {n} x {m} x 32768",
            functools.partial(_pairs, metric, n, m),
        )
    yield f"pairwise js, 8 x {few} x 32768", lambda: _tiles("js", few)
    yield f"pairwise tv, 8 x {few} x 32768", lambda: _tiles("tv", few)
    rows = max(2, int(64 * scale))
    yield f"KL from counts, {rows} x 131072, int64", lambda: _counts(rows, "plugin")
    corrected = f"KL from counts, Miller-Madow, {rows} x 131072, int64"
    yield corrected, lambda: _counts(rows, "miller_madow")
    samples, batch = int(1e7 * scale), max(64, int(4096 * scale))
    yield f"Monte Carlo k1, {samples} samples, float64", lambda: _monte_carlo("k1", samples)
    yield f"Monte Carlo k3, {samples} samples, float64", lambda: _monte_carlo("k3", samples)
    yield f"Donsker-Varadhan, {samples} scores each, float32", lambda: _critic(samples)
    yield f"InfoNCE, {batch} x {batch} scores, float32", lambda: _contrast(batch)
    yield "KL by neighbours, 2000 and 2000 samples in 3 dimensions", lambda: _neighbours(2000)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(klfast.get_num_threads())
    return torch


def _normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return 0.5 * np.random.default_rng(seed).standard_normal(shape, np.float32)


def _read(*arrays: NDArray[Any]) -> Callable[[], Any]:
    def run() -> None:
        for array in arrays:
            read_all(array)

    return run


def _prior(n: int, width: int) -> Runs:
    mean, logvar = _normal(n, width), _normal(n, width, seed=1)
    runs: Runs = {
        "klfast": lambda: gaussian.kl_divergence(mean, logvar),
        "plain read": _read(mean, logvar),
        "NumPy": lambda: -0.5 * (1 + logvar - mean**2 - np.exp(logvar)).sum(-1),
    }
    if (torch := _torch()) is not None:
        m, v = torch.from_numpy(mean), torch.from_numpy(logvar)

        def textbook(m: Any, v: Any) -> Any:
            return -0.5 * (1 + v - m**2 - v.exp()).sum(-1)

        fused = torch.compile(textbook)
        runs |= {"PyTorch eager": lambda: textbook(m, v), "torch.compile": lambda: fused(m, v)}
    return runs


def _two(n: int, width: int) -> Runs:
    four = [_normal(n, width, seed=seed) for seed in range(4)]

    def textbook(xp: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return 0.5 * (xp.exp(b - d) - 1 - (b - d) + (a - c) ** 2 * xp.exp(-d)).sum(-1)

    runs: Runs = {
        "klfast": lambda: gaussian.kl_divergence(*four),
        "plain read": _read(*four),
        "NumPy": lambda: textbook(np, *four),
    }
    if (torch := _torch()) is not None:
        tensors = [torch.from_numpy(each) for each in four]
        fused = torch.compile(lambda *x: textbook(torch, *x))
        runs |= {
            "PyTorch eager": lambda: textbook(torch, *tensors),
            "torch.compile": lambda: fused(*tensors),
        }
    return runs


def _gradients(n: int, width: int) -> Runs:
    mean, logvar = _normal(n, width), _normal(n, width, seed=1)
    out = np.empty_like(mean), np.empty_like(mean)

    def by_numpy() -> Any:
        grown = np.exp(logvar)
        return -0.5 * (1 + logvar - mean**2 - grown).sum(-1), mean.copy(), 0.5 * (grown - 1)

    runs: Runs = {
        "klfast": lambda: gaussian.value_and_grad(mean, logvar, out=out),
        "plain read": _read(mean, logvar),
        "NumPy": by_numpy,
    }
    if (torch := _torch()) is not None:
        m, v = (torch.from_numpy(each).requires_grad_() for each in (mean, logvar))

        def textbook(m: Any, v: Any) -> Any:
            return -0.5 * (1 + v - m**2 - v.exp()).sum(-1)

        def both_ways(function: Callable[..., Any]) -> Callable[[], Any]:
            def run() -> None:
                m.grad = v.grad = None
                function(m, v).sum().backward()

            return run

        runs |= {
            "PyTorch eager": both_ways(textbook),
            "torch.compile": both_ways(torch.compile(textbook)),
        }
    return runs


def _logits(n: int, seed: int, width: int = 32768) -> NDArray[np.float32]:
    return 3 * np.random.default_rng(seed).standard_normal((n, width), np.float32)


def _log_softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = x - x.max(-1, keepdims=True)
    logs: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def _pairs(metric: str, n: int, m: int) -> Runs:
    p, q = _logits(n, 0), _logits(m, 1)

    def by_numpy() -> Any:
        a, b = _log_softmax(p), _log_softmax(q)
        if metric == "kl":
            w = np.exp(a)
            return (w * a).sum(-1)[:, None] - w @ b.T
        return -2 * np.log(np.exp(0.5 * a) @ np.exp(0.5 * b).T)

    return {
        "klfast": lambda: klfast.pairwise(p, q, metric),
        "matrix product": lambda: p @ q.T,
        "NumPy": by_numpy,
    }


def _tiles(metric: str, n: int) -> Runs:
    p, q = _logits(8, 0), _logits(n, 1)  # more would take SciPy minutes

    def by_scipy() -> Any:
        from scipy.spatial.distance import cdist

        w, v = np.exp(_log_softmax(p)), np.exp(_log_softmax(q))
        name, factor = ("cityblock", 0.5) if metric == "tv" else ("jensenshannon", 1.0)
        return factor * cdist(w, v, name)

    return {"klfast": lambda: klfast.pairwise(p, q, metric), "NumPy": by_scipy}


def _counts(rows: int, method: Any) -> Runs:
    rng = np.random.default_rng(0)
    p, q = rng.poisson(3.0, (rows, 131072)), 1 + rng.poisson(3.0, (rows, 131072))

    def by_scipy() -> Any:
        from scipy.special import rel_entr

        n, m = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
        w, v = p / n, q / m
        value = rel_entr(w, v).sum(-1)
        if method == "miller_madow":
            value -= ((p > 0).sum(-1) - 1) / (2 * n[:, 0])
            value -= (w * (1 - v) / v).sum(-1) / (2 * m[:, 0])
        return value

    return {
        "klfast": lambda: estimators.kl_from_counts(p, q, method),
        "plain read": _read(p, q),
        "NumPy": by_scipy,
    }


def _monte_carlo(estimator: Any, n: int) -> Runs:
    log_p, change = np.random.default_rng(0).standard_normal((2, n))
    log_q = log_p + 0.1 * change

    def by_numpy() -> Any:
        r = log_p - log_q
        k = r if estimator == "k1" else np.exp(-r) - 1 + r
        return k.mean(), k.std(ddof=1) / np.sqrt(n)

    return {
        "klfast": lambda: estimators.monte_carlo_kl(log_p, log_q, estimator),
        "plain read": _read(log_p, log_q),
        "NumPy": by_numpy,
    }


def _critic(n: int) -> Runs:
    joint, marginal = _normal(n), _normal(n, seed=1)

    def by_scipy() -> Any:
        from scipy.special import logsumexp

        weights = np.exp(marginal - marginal.max())
        error = joint.var() / n + weights.var() / (n * weights.mean() ** 2)
        return joint.mean() - logsumexp(marginal) + np.log(n), np.sqrt(error)

    return {
        "klfast": lambda: estimators.donsker_varadhan(joint, marginal),
        "plain read": _read(joint, marginal),
        "NumPy": by_scipy,
    }


def _contrast(n: int) -> Runs:
    scores = _normal(n, n)

    def by_scipy() -> Any:
        from scipy.special import logsumexp

        terms = np.diag(scores) - logsumexp(scores, axis=1) + np.log(n)
        return terms.mean(), terms.std(ddof=1) / np.sqrt(n)

    return {
        "klfast": lambda: estimators.infonce(scores),
        "plain read": _read(scores),
        "NumPy": by_scipy,
    }


def _neighbours(n: int) -> Runs:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 3)), 0.5 + rng.standard_normal((n, 3))

    def by_numpy() -> Any:
        own = np.sqrt(((x[:, None] - x) ** 2).sum(-1))
        other = np.sqrt(((x[:, None] - y) ** 2).sum(-1))
        rho, nu = np.partition(own, 5, -1)[:, 5], np.partition(other, 4, -1)[:, 4]
        return 3 * np.log(nu / rho).mean() + np.log(n / (n - 1))

    return {"klfast": lambda: estimators.knn_kl(x, y), "NumPy": by_numpy}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

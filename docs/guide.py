"""Write docs/guide.md and its pictures: every number in it is computed here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import klfast
from klfast import bounds, estimators, gaussian

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "examples" / "data"

Values = NDArray[np.float64]

STYLE: dict[str, Any] = {
    "svg.hashsalt": "klfast", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False,
    "axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False,
}  # fmt: skip


def page(pictures: Path) -> str:
    """Return the whole guide, and write its pictures into a folder."""
    pictures.mkdir(exist_ok=True)
    sections = (choosing, direction, orders, metrics, apart, inequalities, sampled)
    with mpl.rc_context(STYLE):
        return "\n".join(section(pictures) for section in sections)


def save(figure: Figure, path: Path) -> str:
    """Write a picture, the same bytes every time, and return what the text says for it."""
    figure.savefig(path, metadata={"Date": None})
    return f"({path.parent.name}/{path.name})"


def table(head: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def choosing(pictures: Path) -> str:
    """Which divergence for which job."""
    jobs = table(
        ("you want to know, or to do", "take", "because"),
        ("how much is lost when a model is quantized", "`kl_divergence(base, test)`",
         "the extra nats a token that the original would pay; 0 only where nothing changed"),
        ("the largest harm to any single decision", "`total_variation`",
         "no event changes its probability by more"),
        ("whether a model says what the other never would", "`kl_divergence(test, base)`",
         "mass where the other has none is what costs most"),
        ("a distance for clustering or search", "square root of `js_divergence`",
         "a metric, bounded, finite also where supports differ"),
        ("train a student to cover all that its teacher does", "`kl_divergence(teacher, student)`",
         "forward KL: misses nothing, blurs"),
        ("train a student or policy to do one thing well", "`kl_divergence(student, teacher)`",
         "reverse KL: picks a mode"),
        ("something between the two", "`js_divergence(weight=...)`, `alpha_divergence`",
         "the weight, or the order, moves from one to the other"),
        ("a guarantee for the worst ratio, as in privacy",
         "`renyi_divergence`, order 2 to infinity",
         "bounds how much more probable anything becomes"),
        ("compare outputs whose values are near or far from each other", "Wasserstein distance",
         "the others do not know that 3 is nearer to 4 than to 400"),
        ("a divergence from samples alone", "`estimators.knn_kl`, or a critic's bound",
         "no densities needed"),
        ("a divergence from counts", "`estimators.kl_from_counts`",
         "corrects for what was not seen"),
    )  # fmt: skip
    return f"""\
# Which divergence for which job

Written by `make docs` from `docs/guide.py`, which computes every number and draws every picture
below; a test repeats it. Logarithms are natural: results are in nats.

{jobs}
"""


# Forward and reverse


GRID = np.linspace(-7.0, 7.0, 561)


def log_normal(mean: Any, deviation: Any) -> Values:
    """Log-density on the grid, without its constant: logits."""
    spread = np.asarray(deviation)[..., None]
    logits: Values = -0.5 * ((GRID - np.asarray(mean)[..., None]) / spread) ** 2 - np.log(spread)
    return logits


def bimodal() -> Values:
    """Logits of a mixture of two normal distributions."""
    left, right = log_normal(-2.0, 0.7), log_normal(2.2, 0.9)
    mixture: Values = np.logaddexp(math.log(0.6) + left, math.log(0.4) + right)
    return mixture


def best_fit(metric: str) -> tuple[float, float, float]:
    """Mean, deviation and divergence of the normal distribution that is nearest to the mixture."""
    means, deviations = np.linspace(-4, 4, 161), np.linspace(0.3, 4.0, 75)
    mean, deviation = (each.ravel() for each in np.meshgrid(means, deviations, indexing="ij"))
    distances = klfast.pairwise(bimodal()[None], log_normal(mean, deviation), metric)[0]
    best = int(distances.argmin())
    return float(mean[best]), float(deviation[best]), float(distances[best])


def density(logits: Values) -> Values:
    """Densities on the grid."""
    values: Values = np.exp(klfast.log_softmax(logits)) / (GRID[1] - GRID[0])
    return values


def draw_fits(axes: Any, metrics: dict[str, str]) -> dict[str, tuple[float, float, float]]:
    """Draw the mixture, and the nearest normal distributions by some measures."""
    axes.fill_between(GRID, density(bimodal()), color="0.88", label="P")
    fits = {metric: best_fit(metric) for metric in metrics}
    for number, (metric, label) in enumerate(metrics.items()):
        mean, deviation, _ = fits[metric]
        axes.plot(GRID[::4], density(log_normal(mean, deviation))[::4], f"C{number}", label=label)
    axes.set(yticks=[], xlim=(-6, 6))
    axes.legend()
    return fits


def direction(pictures: Path) -> str:
    """Forward against reverse KL."""
    figure = Figure(figsize=(5.5, 2.2))
    names = {"kl": "least KL(P, Q)", "reverse_kl": "least KL(Q, P)", "js": "least Jensen-Shannon"}
    fits = draw_fits(figure.subplots(), names)
    picture = save(figure, pictures / "direction.svg")
    rows = [
        (label, *(f"{x:.2f}" for x in fits[metric][:2]), f"{fits[metric][2]:.3f}")
        for metric, label in names.items()
    ]
    return f"""\
## Forward or reverse

P has two modes, Q is one normal distribution. KL(P, Q) is infinite where Q lacks what P has, so
that the best Q covers both modes and puts mass between them, where P has nearly none. KL(Q, P)
punishes exactly that: its best Q is the larger mode alone.

![The best fits of one normal distribution to a mixture of two]{picture}

{table(("Q of", "mean", "deviation", "divergence"), *rows)}

Maximum likelihood, distillation from a teacher's probabilities, and what is called perplexity are
forward KL. Variational inference, and the penalty that keeps a policy near its reference, are
reverse KL. `klfast.kl_divergence(p, q)` is KL(P, Q): exchange the arguments for the other.
"""


def orders(pictures: Path) -> str:
    """The effect of alpha."""
    base, test = (np.load(DATA / f"{name}.npy").astype(np.float32) for name in ("base", "int4"))
    alphas = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0])
    rows = np.stack([klfast.renyi_divergence(base, test, alpha) for alpha in alphas])
    limit = klfast.renyi_divergence(base, test, math.inf)
    figure = Figure(figsize=(5.5, 2.2))
    left, right = figure.subplots(1, 2)
    names = {"alpha:0.1": "order 0.1", "alpha:0.5": "order 0.5", "alpha:2": "order 2"}
    fits = draw_fits(left, names)
    right.loglog(alphas, np.percentile(rows, (10, 50, 90), axis=1).T)
    right.set(xlabel="order", ylabel="Rényi divergence, percentiles")
    right.legend(["10 %", "50 %", "90 %"], loc="lower right")
    picture = save(figure, pictures / "orders.svg")
    deviations = ", ".join(f"{fits[name][1]:.2f} for {label}" for name, label in names.items())
    one, two = (rows[list(alphas).index(each)].mean() for each in (1.0, 2.0))
    return f"""\
## What the order does

Rényi and alpha-divergences have an order: 1 is KL(P, Q), and below it the divergence cares less and
less for what Q misses. Fitted to the same mixture by the alpha-divergence, the deviation of the
best Q is {deviations}.

![Fits by the alpha-divergence; Rényi divergence of real rows against its order]{picture}

On the right, a small language model against itself with weights of 4 bits, 24 next-token
distributions of 30522 entries: the Rényi divergence never decreases in its order. Its mean is
{one:.4f} for order 1, {two:.4f} for order 2 and {limit.mean():.3f} for order infinity, which is the
largest log-ratio of any token: large orders look at the rarest tokens, and at nothing else.
"""


def metrics(pictures: Path) -> str:
    """JS as a metric."""
    rows = np.concatenate([np.load(DATA / f"{name}.npy") for name in ("base", "int8", "int4")])
    lines = []
    names: dict[str, tuple[str, Callable[[Values], Values]]] = {
        "kl": ("KL", lambda x: x),
        "jeffreys": ("Jeffreys", lambda x: x),
        "js": ("Jensen-Shannon", lambda x: x),
        "root js": ("square root of Jensen-Shannon", np.sqrt),
        "tv": ("total variation", lambda x: x),
    }
    for name, (label, change) in names.items():
        d = change(klfast.pairwise(rows, metric=name.split()[-1], dtype="float64"))
        excess = d[:, None, :] - (d[:, :, None] + d[None])  # i to k against i to j to k
        broken = excess > 1e-6 * d[:, None, :]
        ratio = d[:, None, :] / np.maximum(d[:, :, None] + d[None], 1e-300)
        distinct = ~np.eye(len(d), dtype=bool)
        use = distinct[:, :, None] & distinct[None] & distinct[:, None, :]
        lines.append((label, f"{broken[use].mean():.1%}", f"{ratio[use].max():.3g}"))
    return f"""\
## A distance: the square root of Jensen-Shannon

Clustering and nearest-neighbour search rely on the triangle inequality. Of all triples among
{len(rows)} real next-token distributions (24 places of a text, by a model and two quantized
versions of it), so many have a detour that is shorter than the direct way:

{table(("", "triples that break it", "direct way / shortest detour"), *lines)}

`examples/cluster.py` groups the places by it. `klfast.pairwise(p, metric="js")` gives all pairs at
once; total variation is a metric too, and so is the square root of the squared Hellinger distance.
"""


def apart(pictures: Path) -> str:
    """When Wasserstein is the right tool instead."""
    distance = np.linspace(0.0, 12.0, 61)
    zeros = np.zeros((len(distance), 1))
    given = (zeros, zeros, distance[:, None], zeros)
    grid = np.linspace(-8, 20, 1401)
    p, q = -0.5 * grid**2, -0.5 * (grid - distance[:, None]) ** 2
    curves = {
        "KL": gaussian.kl_divergence(*given),
        "Jensen-Shannon": klfast.js_divergence(p, q),
        "total variation": klfast.total_variation(p, q),
        "squared Hellinger": gaussian.squared_hellinger(*given),
        "Wasserstein": gaussian.wasserstein_distance(*given),
    }
    figure = Figure(figsize=(5.5, 2.2))
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(distance, values, label=label)
    axes.set(xlabel="distance of the means, in deviations", ylim=(0, 6))
    axes.legend()
    picture = save(figure, pictures / "apart.svg")
    at = {label: (values[20], values[50]) for label, values in curves.items()}  # 4 and 10
    rows = [(label, *(f"{each:.4g}" for each in pair)) for label, pair in at.items()]
    return f"""\
## When Wasserstein is the right tool instead

Divergences compare the probabilities of each outcome and do not know which outcomes are near each
other. For tokens that is right. For positions, amounts or pixels it is not: two normal
distributions that move apart are soon as different as can be, and bounded divergences stay there,
without a gradient. The Wasserstein distance goes on to say how far.

![Divergences of two normal distributions that move apart]{picture}

{table(("", "4 deviations apart", "10 deviations apart"), *rows)}

KL grows with the square of the distance here, but is infinite as soon as the supports differ.
`klfast.gaussian.wasserstein_distance` has the closed form of Gaussians. For samples on a line take
SciPy's `wasserstein_distance`, for general costs the package POT.
"""


def inequalities(pictures: Path) -> str:
    """What one divergence says of another."""
    rng = np.random.default_rng(0)
    spread = 10 ** rng.uniform(-1.5, 1.0, (240, 1))
    p, q = spread * rng.normal(size=(2, 240, 8))
    kl, tv = klfast.kl_divergence(p, q), klfast.total_variation(p, q)
    line = np.geomspace(1e-3, 10, 60)
    figure = Figure(figsize=(5.5, 2.2))
    axes = figure.subplots()
    axes.plot(kl, tv, ".", color="0.6", markersize=2)
    axes.plot(line, bounds.pinsker(line), label="Pinsker")
    axes.plot(line, bounds.bretagnolle_huber(line), label="Bretagnolle and Huber")
    axes.set(xscale="log", xlim=(1e-3, 10), xlabel="KL", ylabel="total variation")
    axes.legend()
    picture = save(figure, pictures / "inequalities.svg")
    fine = np.linspace(1.0, 2.0, 1001)
    crossing = fine[np.argmax(bounds.bretagnolle_huber(fine) < bounds.pinsker(fine))]
    base, test = (np.load(DATA / f"{name}.npy") for name in ("base", "int4"))
    mean = float(klfast.kl_divergence(base, test, reduction="mean"))
    found = float(klfast.total_variation(base, test, reduction="mean"))
    return f"""\
## What one divergence says of another

The model with weights of 4 bits has a mean KL of {mean:.4f} a token from the original. By Pinsker's
inequality its mean total variation is then at most {bounds.pinsker(mean):.3f}; it is {found:.3f}.
Above about {crossing:.2g} nats the bound of Bretagnolle and Huber is the smaller one.

![Total variation against KL of random pairs, below both bounds]{picture}

`klfast.bounds` has these and the others: by Hellinger, chi-squared and Jensen-Shannon, both ways.
"""


def sampled(pictures: Path) -> str:
    """Without the whole distributions."""
    rng = np.random.default_rng(1)
    n = 4000
    x, y = rng.normal(size=(n, 2)), 0.7 + 1.2 * rng.normal(size=(n, 2))
    logvar = np.full(2, 2 * math.log(1.2))
    truth = float(gaussian.kl_divergence([0.0] * 2, [0.0] * 2, [0.7] * 2, logvar))

    def log_density(z: Values, mean: float, deviation: float) -> Values:
        values: Values = -0.5 * (((z - mean) / deviation) ** 2).sum(-1) - 2 * math.log(deviation)
        return values

    def critic(z: Values) -> Values:
        return log_density(z, 0.0, 1.0) - log_density(z, 0.7, 1.2)

    log_p, log_q = log_density(x, 0.0, 1.0), log_density(x, 0.7, 1.2)
    rows = []
    for name, label in (("k1", "log-probabilities, k1"), ("k3", "log-probabilities, k3")):
        found = estimators.monte_carlo_kl(log_p, log_q, name)  # type: ignore[arg-type]
        rows.append((label, f"{found.value:.3f}", f"{found.standard_error:.3f}"))
    bound = estimators.donsker_varadhan(critic(x), critic(y), correct_bias=True)
    rows.append(("the best critic, Donsker-Varadhan", f"{bound.value:.3f}",
                 f"{bound.standard_error:.3f}"))  # fmt: skip
    rows.append(("neighbours alone, k = 5", f"{estimators.knn_kl(x, y):.3f}", ""))
    p, q = rng.dirichlet(np.full(100, 2.0), size=2)
    exact = float(klfast.kl_divergence(p, q, input="probs"))
    seen_p, seen_q = rng.multinomial(2000, p, 500), rng.multinomial(20000, q, 500)
    by_count = [
        (label, f"{estimators.kl_from_counts(seen_p, seen_q, method).mean():.3f}")  # type: ignore[arg-type]
        for method, label in (("plugin", "plug-in"), ("laplace", "Laplace"),
                              ("miller_madow", "Miller-Madow"))
    ]  # fmt: skip
    return f"""\
## Without the whole distributions

Two normal distributions of two dimensions, {n} samples of each. The truth is {truth:.3f}.

{table(("known", "estimate", "standard error"), *rows)}

And from counts: 2000 draws of P and 20000 of Q over 100 symbols, the mean of 500 repetitions. The
truth is {exact:.3f}. The plug-in is too large, by about the number of symbols over twice that of
draws; the correction takes nearly all of that away. Smoothing pulls both towards the uniform
distribution, which makes the estimate smaller, by how much depends on P and Q.

{table(("estimate", "mean"), *by_count)}
"""


if __name__ == "__main__":
    (HERE / "guide.md").write_text(page(HERE / "guide"), encoding="utf-8")
    sys.stdout.write("docs/guide.md is written\n")

"""What ``llama-perplexity --kl-divergence`` makes of rows and prints, to its last digit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Rows(NamedTuple):
    """What is summed up of the rows; or of one of them."""

    kld: Any
    change: Any  # of the token's probability
    nll: Any
    nll_base: Any
    same: Any  # whether the largest entry is


def compared(a: Float32, logits: NDArray[Any], token: int, normalized: bool) -> Rows:
    """Compare one row of base log-probabilities with one of the test model."""
    b = logits.astype(np.float32, copy=False)
    log_sum = np.float32(0)
    if not normalized:
        largest = b.max()
        log_sum = largest + np.float32(np.log(expf(b - largest).sum(dtype=np.float64)))
    above = a > -16
    terms = expf(a[above]) * (a[above] - b[above] + log_sum)
    nll, nll_base = log_sum - b[token], -a[token]
    change = expf(-nll) - expf(-nll_base)
    return Rows(terms.sum(dtype=np.float64), change, nll, nll_base, a.argmax() == b.argmax())


def expf(x: Any) -> Any:
    """The exponential rounded to float32, which expf of the C library all but always is."""
    return np.exp(x.astype(np.float64)).astype(np.float32)


# Printed with the same numbers of digits.

TITLE = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)
FEW = 100  # with fewer rows it prints no statistics
_QUANTILES = ("99.9", "99.0", "95.0", "90.0", "75.0", "Median", "25.0", "10.0", " 5.0", " 1.0",
              " 0.1")  # fmt: skip


def _mean(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and its standard error, 0 of ten values or fewer."""
    wide = values.astype(np.float64)
    mean = float(wide.mean())
    variance = float((values * values).astype(np.float64).mean()) - mean * mean
    return mean, math.sqrt(variance / (len(wide) - 1)) if variance > 0 and len(wide) > 10 else 0.0


def _logarithms(nll: Float32, nll_base: Float32) -> tuple[Any, ...]:
    """Mean and error of both, their covariance, and mean and error of the difference."""
    test, base = _mean(nll), _mean(nll_base)
    covariance = 0.0
    if len(nll) >= 10:
        product = float((nll * nll_base).astype(np.float64).mean())
        covariance = (product - test[0] * base[0]) / (len(nll) - 1)
    variance = test[1] ** 2 + base[1] ** 2 - 2 * covariance
    return test, base, covariance, (test[0] - base[0], math.sqrt(max(variance, 0.0)))


def _rms(change: Float32) -> tuple[float, float]:
    mean, error = _mean((change * change).astype(np.float64))
    rms = math.sqrt(mean)
    return 100 * rms, 100 * 0.5 / rms * error if rms else math.nan


def _same(same: NDArray[Any]) -> tuple[float, float]:
    share, n = float(same.mean()), len(same)
    return 100 * share, 100 * math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def chunk_line(
    kld: NDArray[np.float64], change: Float32, nll: Float32, nll_base: Float32, same: NDArray[Any]
) -> str:
    (mean, error), _, _, ratio = _logarithms(nll, nll_base)
    perplexity = math.exp(mean)
    kl, rms, top = _mean(kld), _rms(change), _same(same)
    return (
        f"    {perplexity:9.4f} ± {perplexity * error:9.4f}    {ratio[0]:10.5f} ± {ratio[1]:10.5f}"
        f"    {kl[0]:10.5f} ± {kl[1]:10.5f}    {rms[0]:6.3f} ± {rms[1]:6.3f} %"
        f"    {top[0]:6.3f} ± {top[1]:6.3f} %"
    )


def final_lines(
    kld: NDArray[np.float64], change: Float32, nll: Float32, nll_base: Float32, same: NDArray[Any]
) -> list[str]:
    test, base, covariance, ratio = _logarithms(nll, nll_base)
    ppl, ppl_base = math.exp(test[0]), math.exp(base[0])
    errors = ppl * test[1], ppl_base * base[1]
    spread = test[1] * base[1]
    squared = errors[0] ** 2 + errors[1] ** 2 - 2 * ppl * ppl_base * covariance

    quotient = math.exp(ratio[0])

    def pair(value: float, error: float) -> str:
        return f"{value:10.6f} ± {error:10.6f}"

    ordered, change = np.sort(kld.astype(np.float32)), np.sort(change)
    lines = [
        "====== Perplexity statistics ======",
        f"Mean PPL(Q)                   : {pair(ppl, errors[0])}",
        f"Mean PPL(base)                : {pair(ppl_base, errors[1])}",
        "Cor(ln(PPL(Q)), ln(PPL(base))): "
        f"{100 * covariance / spread if spread else math.nan:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {pair(*ratio)}",
        f"Mean PPL(Q)/PPL(base)         : {pair(quotient, quotient * ratio[1])}",
        f"Mean PPL(Q)-PPL(base)         : {pair(ppl - ppl_base, math.sqrt(max(squared, 0.0)))}",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {pair(*_mean(kld))}",
        f"Maximum KLD: {ordered[-1]:10.6f}",
    ]
    quartiles = ("75.0", "25.0")
    for each in (each for each in _QUANTILES if each not in quartiles):
        name = "Median " if each == "Median" else f"{each}%  "
        lines.append(f"{name} KLD: {_quantile(ordered, each):10.6f}")
    lines += [
        f"Minimum KLD: {ordered[0]:10.6f}",
        "====== Token probability statistics ======",
        "Mean    Δp: {:6.3f} ± {:5.3f} %".format(*(100 * x for x in _mean(change))),
        f"Maximum Δp: {100 * change[-1]:6.3f}%",
    ]
    for each in _QUANTILES:
        name = "Median " if each == "Median" else f"{each}%  "
        lines.append(f"{name} Δp: {100 * _quantile(change, each):6.3f}%")
    lines += [
        f"Minimum Δp: {100 * change[0]:6.3f}%",
        "RMS Δp    : {:6.3f} ± {:5.3f} %".format(*_rms(change)),
        "Same top p: {:6.3f} ± {:5.3f} %".format(*_same(same)),
    ]
    return lines


def _quantile(ordered: Float32, name: str) -> float:
    """Linear between the values beside f (n - 1), in float32."""
    n = len(ordered)
    if name == "Median":
        return float(np.float32(0.5) * (ordered[(n - 1) // 2] + ordered[n // 2]))
    place = np.float32(float(name) / 100) * np.float32(n - 1)
    below = int(place)
    part = place - np.float32(below)
    return float((1 - part) * ordered[below] + part * ordered[min(below + 1, n - 1)])

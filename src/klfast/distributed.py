"""Divergences of logits whose vocabulary is sharded over the processes of `torch.distributed`.

    >>> import klfast.distributed
    >>> loss = klfast.distributed.divergence("kl", teacher_shard, student_shard, reduction="mean")
    >>> loss.backward()

Every process calls with its own shard, of shape (..., entries), of the same rows; the shards may
differ in width, and one may be empty. Logits are never sent: processes exchange states of a few
numbers a row (`klfast.RowState`) in one all-gather, and in a second one for Jensen-Shannon and
total variation. All of them merge the same states in the same order, so that results are the same
bits everywhere. Works with any backend of `torch.distributed` that gathers float64 tensors on the
device of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._gradients import differentiable
from ._states import RowState

__all__ = ["compare", "divergence"]

#: Entries of a shard whose gradient is computed at a time, in float64.
_BLOCK = 1 << 20


def compare(
    p: Tensor,
    q: Tensor,
    metrics: str | Sequence[str] = ("kl",),
    targets: Tensor | None = None,
    *,
    vocab_offset: int | None = None,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Many measures of sharded logits, from one exchange, or two where one of them needs it.

    Arguments:
        p: this process's logits of the first batch, shape (..., entries), any float dtype.
        q: those of the second, of the same entries.
        metrics: names as for `RowState.of`.
        targets: integers, one a row, that count in the whole vocabulary, the same in all processes.
        vocab_offset: index of this shard's first entry; None takes the shards in the order of the
            ranks, which takes the exchange of one more number where a metric depends on it.
        temperature: T > 0 that divides the logits, or a pair (T_p, T_q).
        where: booleans, one a row, the same in all processes; rows that are False end as NaN.
        group: the processes that hold the shards; None is all of them.

    Returns:
        For each metric float64 values of the shape of the batch, on the device of `p`; the same
        bits in every process.

    Raises:
        TypeError, ValueError: as `RowState.of`. A process that raises leaves the others waiting,
            as with every collective operation.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if vocab_offset is None:
        vocab_offset = 0
        if targets is not None or "same_top" in names:
            widths = _gathered(np.array([[float(p.shape[-1])]]), p.device, group)
            vocab_offset = int(sum(each[0, 0] for each in widths[: dist.get_rank(group)]))
    options: Any = {"where": where}
    shards = p.detach(), q.detach()
    state = RowState.of(
        *shards, names, vocab_offset=vocab_offset, targets=targets, temperature=temperature,
        **options,
    )  # fmt: skip
    whole = _whole(state, p.device, group)
    sums = None
    if whole.needs_sums:
        sums = _added(whole.partial_sums(*shards, **options), p.device, group)
    return {
        name: torch.from_numpy(values).to(p.device) for name, values in whole.finish(sums).items()
    }


def divergence(
    name: str,
    p: Tensor,
    q: Tensor | None = None,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """One divergence of sharded logits, differentiable in both.

    Arguments:
        name: as for `klfast.value_and_grad`: "kl", "reverse_kl", "jeffreys", "js" or "js:WEIGHT",
            "renyi:ORDER", "alpha:ORDER", "tsallis:ORDER", "tv", "hellinger2", "chi2",
            "cross_entropy", or of one batch "entropy". Orders between 0 and infinity, both
            excluded.
        p: this process's logits of the first batch, shape (..., entries), any float dtype.
        q: those of the second, of the same shape.
        temperature: T > 0 that divides the logits, or a pair (T_p, T_q).
        where: booleans, one a row; rows that are False have the value 0 and no gradient, and a mean
            does not count them.
        reduction: "none" (one value a row), "mean" over the rows that `where` keeps, or "sum".
        group: the processes that hold the shards; None is all of them.

    Returns:
        float32, or float64 if an input is, in nats; the same bits in every process. Each process
        gets the gradient of its own shard, of the value that all of them hold: what follows must
        be computed alike everywhere, and the gradient is not added up over processes. It is
        computed in float64, block by block, from the shard and the merged state alone.

    Raises:
        TypeError, ValueError: as `klfast.value_and_grad`.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'mean', 'sum'")
    operation, parameters = differentiable(name)
    if (q is None) != (operation.arity == 1):
        given = "None" if q is None else "a tensor"
        raise TypeError(f"q is {given}, and {name!r} reads {operation.arity} batches of logits")
    if operation.name in ("renyi", "alpha", "tsallis") and not 0.0 < parameters[0] < math.inf:
        raise ValueError(f"{name!r}; accepted: orders between 0 and infinity, both excluded")
    if q is not None and p.shape != q.shape:
        raise ValueError(
            f"p and q have shapes {tuple(p.shape)} and {tuple(q.shape)}; accepted: equal ones"
        )
    keep = None if where is None else where.expand(p.shape[:-1])
    pair = temperature if isinstance(temperature, tuple) else (temperature,) * 2
    value: Tensor = _Divergence.apply(p, q, keep, operation.name, parameters, pair, group)
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    return total / (value.numel() if keep is None else keep.sum())


# Exchanges


def _gathered(
    array: NDArray[np.float64], device: torch.device, group: dist.ProcessGroup | None
) -> list[NDArray[np.float64]]:
    """The array of every process, of the same shape everywhere, in the order of the ranks."""
    own = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [each.cpu().numpy() for each in found]


def _whole(state: RowState, device: torch.device, group: dist.ProcessGroup | None) -> RowState:
    first, *rest = map(state.with_array, _gathered(state.array, device, group))
    return first.merge(*rest)


def _added(
    sums: NDArray[np.float64], device: torch.device, group: dist.ProcessGroup | None
) -> NDArray[np.float64]:
    """The sum over all processes, added in the order of the ranks."""
    total: NDArray[np.float64] = np.add.reduce(_gathered(sums, device, group))
    return total


# Values and gradients

#: What a gradient needs to know of the whole rows, beside the value.
_ALSO = {"jeffreys": ("kl", "reverse_kl"), "hellinger2": ("renyi:0.5",), "chi2": ("renyi:2.0",)}


def _known_for(name: str, parameters: tuple[float, ...]) -> tuple[str, tuple[str, ...]]:
    """The metric, and all that have to be known for its gradient."""
    metric = ":".join([name, *map(repr, parameters)])
    also = _ALSO.get(name, ())
    if name in ("alpha", "tsallis"):
        also = (f"renyi:{parameters[0]!r}",)
    return metric, (metric, *also)


@dataclass(slots=True)
class _Call:
    """A call, and what is known of the whole rows in the end."""

    name: str
    parameters: tuple[float, ...]
    temperature: tuple[float, ...]
    header: Tensor  # (rows, 2 or 5), of the merged state
    known: dict[str, Tensor]  # (rows,), values of metrics
    means: Tensor | None = None  # (rows, 2), of brackets


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, q: Tensor | None, keep: Tensor | None, name: str,
        parameters: tuple[float, ...], temperature: tuple[float, float],
        group: dist.ProcessGroup | None,
    ) -> Tensor:  # fmt: skip
        metric, metrics = _known_for(name, parameters)
        options: Any = {"where": keep}
        state = RowState.of(
            p, q, metrics, temperature=temperature if q is not None else temperature[0], **options
        )
        whole = _whole(state, p.device, group)
        header = torch.from_numpy(whole.array[:, : 2 if q is None else 5]).to(p.device)
        call = _Call(name, parameters, temperature, header, {})
        sums = None
        if whole.needs_sums:
            assert q is not None
            local = whole.partial_sums(p, q, **options)
            if any(ctx.needs_input_grad[:2]):
                means = [_means(call, entries) for _, entries in _blocks(call, p, q)]
                local = np.concatenate([local, np.concatenate(means)], axis=-1)
            added = _added(local, p.device, group)
            sums = added[:, :1]
            call.means = torch.from_numpy(added[:, 1:]).to(p.device)
        values = whole.finish(sums)
        for each, found in values.items():
            call.known[each] = torch.from_numpy(found.reshape(-1)).to(p.device)
        ctx.save_for_backward(p, q, keep)
        ctx.call = call
        wide = torch.float64 in (p.dtype, p.dtype if q is None else q.dtype)
        value = torch.from_numpy(values[metric]).to(p.device)
        value = value.to(torch.float64 if wide else torch.float32)
        return value if keep is None else torch.where(keep, value, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        p, q, keep = ctx.saved_tensors
        given = [p] if q is None else [p, q]
        wanted = [needs for needs, _ in zip(ctx.needs_input_grad, given, strict=False)]
        gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs else None
                     for x, needs in zip(given, wanted, strict=True)]  # fmt: skip
        scale = upstream.double().reshape(-1)
        if keep is not None:
            scale = torch.where(keep.reshape(-1), scale, 0.0)
        tables = [None if g is None else g.view(scale.numel(), g.shape[-1]) for g in gradients]
        for rows, entries in _blocks(ctx.call, p, q):
            factor = scale[rows, None]
            for side, table in enumerate(tables):
                if table is not None:
                    found = _gradient(ctx.call, side, rows, entries) / ctx.call.temperature[side]
                    table[rows] = torch.where(factor == 0.0, 0.0, found * factor).to(table.dtype)
        return gradients[0], (gradients[1] if q is not None else None), None, None, None, None, None


class _Entries(NamedTuple):
    """Entries of some rows in float64: log p, and log q and log(p/q) of a pair."""

    log_p: Tensor
    log_q: Tensor
    d: Tensor

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()

    @property
    def change(self) -> Tensor:
        """q - p."""
        larger = torch.maximum(self.log_p, self.log_q).exp()
        return self.d.sign() * larger * torch.expm1(-self.d.abs())


def _blocks(call: _Call, p: Tensor, q: Tensor | None) -> Iterator[tuple[slice, _Entries]]:
    """Some rows at a time."""
    width = p.shape[-1]
    tables = [x.reshape(len(call.header), width) for x in (p, q) if x is not None]
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, len(tables[0]), step):
        rows = slice(start, start + step)
        header = call.header[rows, :, None]
        below = [(x[rows].double() - header[:, 2 * side]) for side, x in enumerate(tables)]
        log = [each / call.temperature[side] - header[:, 2 * side + 1]
               for side, each in enumerate(below)]  # fmt: skip
        if q is None:
            yield rows, _Entries(log[0], log[0], torch.zeros_like(log[0]))
            continue
        same = call.temperature[0] == call.temperature[1]
        apart = (
            (below[0] - below[1]) / call.temperature[0]
            if same
            else below[0] / call.temperature[0] - below[1] / call.temperature[1]
        )
        # Outside both supports there is nothing to be far apart.
        d = torch.nan_to_num(apart - header[:, 4], nan=0.0, posinf=math.inf, neginf=-math.inf)
        yield rows, _Entries(log[0], log[1], d)


def _log_over_mixture(own: Tensor, weight: float) -> Tensor:
    """log(p/m) = -log(w + (1-w) exp(-d)) of the side whose d and weight these are."""
    near = torch.log1p((1.0 - weight) * torch.expm1(-own.clamp(-1.0, 1.0)))
    far = torch.logaddexp(torch.full_like(own, math.log(weight)), math.log1p(-weight) - own)
    return -torch.where(own.abs() < 1.0, near, far)


def _bracket(call: _Call, side: int, entries: _Entries) -> Tensor:
    """What a gradient subtracts the mean of, for those whose mean is not the value."""
    own = entries.d if side == 0 else -entries.d
    if call.name == "tv":
        return 0.5 * own.sign()
    weight = call.parameters[0] if side == 0 else 1.0 - call.parameters[0]
    return _log_over_mixture(own, weight)


def _means(call: _Call, entries: _Entries) -> NDArray[np.float64]:
    """A shard's shares of the means under P and under Q."""
    if call.name == "js" and not 0.0 < call.parameters[0] < 1.0:
        return np.zeros((len(entries.p), 2))
    columns = [
        _times(weights, _bracket(call, side, entries)).sum(dim=-1)
        for side, weights in enumerate((entries.p, entries.q))
    ]
    return np.asarray(torch.stack(columns, dim=-1).cpu())


def _times(weights: Tensor, values: Tensor) -> Tensor:
    """The product, where 0 times anything is 0."""
    return torch.where(weights == 0.0, 0.0, weights * values)


def _gradient(call: _Call, side: int, rows: slice, entries: _Entries) -> Tensor:
    """d value / d (logits / T) of some rows of one side."""
    name, parameters = call.name, call.parameters
    metric, _ = _known_for(name, parameters)
    value = call.known[metric][rows, None]
    own = entries.p if side == 0 else entries.q
    d = entries.d if side == 0 else -entries.d
    toward = entries.change if side == 1 else -entries.change  # own less other
    (order,) = parameters or (1.0,)
    if name in ("renyi", "alpha", "tsallis") and order == 1.0:
        name = "kl"
    if name == "entropy":
        found = -_times(own, entries.log_p + value)
    elif name in ("kl", "reverse_kl"):
        first = side == (0 if name == "kl" else 1)
        found = _times(own, d - value) if first else toward
    elif name == "jeffreys":
        found = _times(own, d - call.known[("kl", "reverse_kl")[side]][rows, None]) + toward
    elif name == "cross_entropy":
        found = -_times(own, entries.log_q + value) if side == 0 else toward
    elif name in ("tv", "js"):
        if name == "js" and not 0.0 < order < 1.0:
            return torch.zeros_like(own)
        weight = 1.0 if name == "tv" else (order, 1.0 - order)[side]
        assert call.means is not None
        mean = call.means[rows, side, None]
        found = weight * _times(own, _bracket(call, side, entries) - mean)
    else:
        found = _tilted(call, name, order, side, rows, entries, own, value)
    # Infinite values have no derivative; outside the support there is none.
    usable = torch.isfinite(found) & (own > 0.0)
    found = torch.where(usable, found, 0.0)
    return torch.where(torch.isnan(value), math.nan, found)


def _tilted(
    call: _Call, name: str, order: float, side: int, rows: slice, entries: _Entries, own: Tensor,
    value: Tensor,
) -> Tensor:  # fmt: skip
    """Of what follows from S = sum p^a q^(1-a), with r = p^a q^(1-a) / S.

    Of the Renyi divergence R, a/(a-1) (r - p) and q - r; with log(r/p) = (a-1) (d - R) and
    log(r/q) = a d - (a-1) R.
    """
    order = {"chi2": 2.0, "hellinger2": 0.5}.get(name, order)
    beta = order - 1.0
    renyi = value if name == "renyi" else call.known[f"renyi:{order!r}"][rows, None]
    log_s = beta * renyi
    if side == 0:
        found = _times(own, torch.expm1(beta * (entries.d - renyi))) * (order / beta)
    else:
        found = -_times(own, torch.expm1(order * entries.d - log_s))
    factor = {
        "renyi": torch.ones_like(log_s),
        "alpha": log_s.exp() / order,
        "tsallis": log_s.exp(),
        "chi2": log_s.exp(),
        "hellinger2": 0.5 * log_s.exp(),
    }[name]
    return found * factor

"""The divergences as differentiable functions of PyTorch, and losses made of them.

    >>> import klfast.torch
    >>> loss = klfast.torch.kl_divergence(teacher, student, temperature=2.0, reduction="mean")
    >>> loss.backward()

Every function takes logits of shape (..., V) and computes in float32 or better, whatever their
dtype; gradients have the dtype of the logits. Nothing is stored for the backward pass but the
logits themselves: gradients are computed there from one more read, which moves fewer bytes than
writing them in the forward pass and scaling them later, and needs no memory of their size until
then. Works under autocast and, without a graph break, under `torch.compile`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import klfast

from ._gradients import differentiable, value_and_grad

__all__ = [
    "alpha_divergence",
    "chi2_divergence",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "generalized_jsd_loss",
    "jeffreys_divergence",
    "js_divergence",
    "kl_div",
    "kl_divergence",
    "linear_distillation_loss",
    "renyi_divergence",
    "squared_hellinger",
    "total_variation",
    "tsallis_divergence",
]

Reduction = Literal["none", "mean", "sum"]


# What PyTorch's compiler sees: two operators, of values and of gradients.


@torch.library.custom_op("klfast::divergence", mutates_args=())
def _divergence(
    name: str, p: Tensor, q: Tensor | None, keep: Tensor | None, temperature: list[float]
) -> Tensor:
    operation, parameters = differentiable(name)
    function = getattr(klfast, operation.function)
    rows = {"p": p.detach(), "q": None if q is None else q.detach()}
    given = [rows[side] for side in operation.rows]
    swapped = temperature[::-1] if operation.rows == "qp" else temperature
    value: Tensor = function(
        *given, *parameters if operation.name != "js" else (),
        temperature=swapped[0] if q is None else tuple(swapped), where=keep,
        **({"weight": parameters[0]} if operation.name == "js" else {}),
    )  # fmt: skip
    return value if keep is None else torch.where(keep, value, 0.0)


@_divergence.register_fake
def _(
    name: str, p: Tensor, q: Tensor | None, keep: Tensor | None, temperature: list[float]
) -> Tensor:
    return p.new_empty(p.shape[:-1], dtype=_result_dtype(p, q))


@torch.library.custom_op("klfast::gradient", mutates_args=())
def _gradient(
    name: str, p: Tensor, q: Tensor | None, keep: Tensor | None, temperature: list[float],
    scale: Tensor, wrt: str,
) -> list[Tensor]:  # fmt: skip
    rows = (p.detach(),) if q is None else (p.detach(), q.detach())
    options: Any = {"temperature": temperature[0] if q is None else tuple(temperature)}
    side: Any = wrt
    _, gradient = value_and_grad(
        name, *rows, wrt=side, grad_scale=scale.detach(), where=keep, **options
    )
    return list(gradient) if wrt == "both" else [gradient]


@_gradient.register_fake
def _(
    name: str, p: Tensor, q: Tensor | None, keep: Tensor | None, temperature: list[float],
    scale: Tensor, wrt: str,
) -> list[Tensor]:  # fmt: skip
    sides = {"p": [p], "q": [q], "both": [p, q]}[wrt]
    return [side.new_empty(side.shape) for side in sides if side is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    name, p, q, keep, temperature = inputs
    ctx.save_for_backward(p, q, keep)
    ctx.name, ctx.temperature = name, temperature


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    p, q, keep = ctx.saved_tensors
    needs = {"p": ctx.needs_input_grad[1], "q": ctx.needs_input_grad[2]}
    wanted = [side for side in "pq" if needs[side]]
    if not wanted:
        return None, None, None, None, None
    wrt = "both" if len(wanted) == 2 else wanted[0]
    found = _gradient(ctx.name, p, q, keep, ctx.temperature, upstream, wrt)
    gradients = dict(zip(wanted, found, strict=True))
    return None, gradients.get("p"), gradients.get("q"), None, None


_divergence.register_autograd(_backward, setup_context=_save)


def _no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    raise NotImplementedError(
        "klfast.torch has no second derivatives: backward was called through a gradient "
        "(create_graph=True)"
    )


_gradient.register_autograd(_no_second_derivative)


def _result_dtype(p: Tensor, q: Tensor | None) -> torch.dtype:
    wide = torch.float64 in (p.dtype, p.dtype if q is None else q.dtype)
    return torch.float64 if wide else torch.float32


def _evaluate(
    name: str,
    p: Tensor,
    q: Tensor | None,
    temperature: float | tuple[float, float],
    where: Tensor | None,
    reduction: str,
) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'mean', 'sum'")
    differentiable(name)  # raises for what is not, and for parameters outside their range
    given = temperature if isinstance(temperature, tuple) else (temperature,) * 2
    if q is not None:
        # Expanded here, so that autograd adds up the gradient of rows that are repeated.
        shape = torch.broadcast_shapes(p.shape[:-1], q.shape[:-1])
        p = p.expand(*shape, p.shape[-1])
        q = q.expand(*shape, q.shape[-1])
    keep = None if where is None else where.expand(p.shape[:-1])
    value = _divergence(name, p, q, keep, [float(each) for each in given])
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    return total / (value.numel() if keep is None else keep.sum())


# The functions


def kl_divergence(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """KL(P, Q) = sum p log(p / q) of each row; see `klfast.kl_divergence`.

    Arguments:
        p: logits of the first (in distillation the teacher's), shape (..., V), any float dtype.
        q: logits of the second, whose batch axes broadcast with those of p.
        temperature: T > 0 that divides the logits, or a pair (T_p, T_q).
        where: booleans, one a row; rows that are False are never read: their value and gradient
            are 0, and a mean does not count them.
        reduction: "none" (one value a row), "mean" over the rows that `where` keeps, or "sum".

    Returns:
        float32, or float64 if an input is, in nats; differentiable once in p and q.

    Raises:
        TypeError, ValueError: as the functions of `klfast`.
        NotImplementedError: in a second derivative.

    Source:
        Kullback and Leibler, On Information and Sufficiency, 1951
    """
    return _evaluate("kl", p, q, temperature, where, reduction)


def jeffreys_divergence(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """KL both ways, summed; arguments as of `kl_divergence`."""
    return _evaluate("jeffreys", p, q, temperature, where, reduction)


def js_divergence(
    p: Tensor,
    q: Tensor,
    *,
    weight: float = 0.5,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Jensen-Shannon divergence with `weight` as that of P; arguments as of `kl_divergence`.

    Liger-Kernel's JSD of beta, and TRL's between the ends of beta, are this with P the teacher,
    Q the student and weight = beta.
    """
    return _evaluate(f"js:{weight!r}", p, q, temperature, where, reduction)


def renyi_divergence(
    p: Tensor,
    q: Tensor,
    alpha: float,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Rényi divergence of order `alpha`; arguments as of `kl_divergence`."""
    return _evaluate(f"renyi:{alpha!r}", p, q, temperature, where, reduction)


def alpha_divergence(
    p: Tensor,
    q: Tensor,
    alpha: float,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """alpha-divergence, KL(P, Q) at 1 and KL(Q, P) at 0; arguments as of `kl_divergence`."""
    return _evaluate(f"alpha:{alpha!r}", p, q, temperature, where, reduction)


def tsallis_divergence(
    p: Tensor,
    q: Tensor,
    alpha: float,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Tsallis relative entropy of order `alpha`; arguments as of `kl_divergence`."""
    return _evaluate(f"tsallis:{alpha!r}", p, q, temperature, where, reduction)


def total_variation(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Total variation distance; arguments as of `kl_divergence`.

    Where p = q, which has no derivative, the entry counts as 0.
    """
    return _evaluate("tv", p, q, temperature, where, reduction)


def squared_hellinger(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Squared Hellinger distance; arguments as of `kl_divergence`."""
    return _evaluate("hellinger2", p, q, temperature, where, reduction)


def chi2_divergence(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Pearson's chi-squared divergence; arguments as of `kl_divergence`."""
    return _evaluate("chi2", p, q, temperature, where, reduction)


def cross_entropy(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross-entropy of Q under P, both given by logits; arguments as of `kl_divergence`."""
    return _evaluate("cross_entropy", p, q, temperature, where, reduction)


def entropy(
    p: Tensor,
    *,
    temperature: float = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Shannon entropy; arguments as of `kl_divergence`."""
    return _evaluate("entropy", p, None, temperature, where, reduction)


# Losses


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Distance of a student from its teacher, and from the labels if there are any.

    Formula:
        alpha T^2 mean D(softmax(teacher / T), softmax(student / T))
        + (1 - alpha) mean -log softmax(student)[label],
    over the rows whose label is not `ignore_index`; without labels the first mean alone, times T^2.
    The factor T^2 keeps the size of the gradient as T grows.

    Arguments:
        student: logits, shape (..., V).
        teacher: logits of the same shape; no gradient is given to them.
        labels: integers, shape (...), or None.
        divergence: "kl" is KL(teacher, student), "reverse_kl" KL(student, teacher); "jeffreys",
            "js", "js:WEIGHT" (the teacher's), "renyi:ORDER", "alpha:ORDER", "tv", ...: any that
            `klfast.value_and_grad` has.
        temperature: T > 0.
        alpha: in [0, 1], the share of the divergence where there are labels.
        ignore_index: rows with this label are left out of both means.

    Returns:
        One number, differentiable in `student`.

    Source:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha!r}; accepted: a number in [0, 1]")
    keep = None if labels is None else labels != ignore_index
    soft = _evaluate(divergence, teacher.detach(), student, temperature, keep, "mean")
    soft = soft * temperature**2
    if labels is None:
        return soft
    wide = student if student.dtype == torch.float64 else student.float()
    hard = torch.nn.functional.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), ignore_index=ignore_index
    )
    return alpha * soft + (1.0 - alpha) * hard


def kl_div(
    student: Tensor, teacher: Tensor, *, reduction: Literal["none", "batchmean", "mean", "sum"]
) -> Tensor:
    """What F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True) gives, of logits.

    KL(teacher, student). As there, "mean" divides the sum by the number of entries, "batchmean" by
    the length of the first axis; "none" is one value a row here, not one an entry.
    """
    total = _evaluate("kl", teacher, student, 1.0, None, "none")
    if reduction == "none":
        return total
    divisor = {"sum": 1, "batchmean": student.shape[0], "mean": student.numel()}.get(reduction)
    if divisor is None:
        raise ValueError(
            f"reduction is {reduction!r}; accepted: 'none', 'batchmean', 'mean', 'sum'"
        )
    return total.sum() / divisor


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Literal["none", "batchmean", "sum"] = "batchmean",
) -> Tensor:
    """The loss of that name of TRL's trainer for generalized knowledge distillation.

    JS with weight `beta` of the teacher; as there, beta = 0 is KL(teacher, student) and beta = 1
    KL(student, teacher), which the formula does not tend to. "batchmean" divides by the number of
    labels that are not -100, or without labels by the length of the first axis. "none" is one
    value a row.

    Source: Agarwal et al., On-Policy Distillation of Language Models, 2024
    """
    name = {0.0: "kl", 1.0: "reverse_kl"}.get(float(beta), f"js:{float(beta)!r}")
    keep = None if labels is None else labels != -100
    value = _evaluate(name, teacher_logits, student_logits, temperature, keep, "none")
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    if reduction != "batchmean":
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'batchmean', 'sum'")
    return value.sum() / (student_logits.shape[0] if keep is None else keep.sum())


# From hidden states to the loss, without the logits


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
        teacher_weight: Tensor, teacher_bias: Tensor | None, keep: Tensor | None, name: str,
        temperature: float, block_bytes: int,
    ) -> Tensor:  # fmt: skip
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        kept = rows if keep is None else int(keep.sum())
        scale = 1.0 / kept if kept else math.nan
        needs = ctx.needs_input_grad[:3]
        step = max(1, block_bytes // (4 * vocabulary))
        gradients: list[Tensor | None] = [
            torch.zeros(each.shape, dtype=torch.float32, device=each.device)
            if need and each is not None
            else None
            for each, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        heads = [_wide(each) for each in (weight, teacher_weight)]
        memory = [hidden.new_empty(min(step, rows), vocabulary, dtype=torch.float32) for _ in "pq"]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            states = [_wide(each[part]) for each in (hidden, teacher_hidden)]
            logits = [
                _logits(state, head, offset, into[: len(state)])
                for state, head, offset, into in zip(
                    states, heads, (bias, teacher_bias), memory, strict=True
                )
            ]
            where = None if keep is None else keep[part]
            if not any(needs):
                value = _divergence(name, logits[1], logits[0], where, [temperature] * 2)
                total += value.sum(dtype=torch.float64)
                continue
            # The gradient takes the place of the student's logits.
            value, gradient = value_and_grad(
                name, logits[1], logits[0], wrt="q", grad_scale=scale, out=logits[0],
                where=where, temperature=temperature,
            )  # fmt: skip
            if where is not None:
                value = torch.where(where, value, 0.0)
            total += value.sum(dtype=torch.float64)
            if gradients[0] is not None:
                torch.mm(gradient, heads[0], out=gradients[0][part])
            if gradients[1] is not None:
                gradients[1].addmm_(gradient.T, states[0])
            if gradients[2] is not None:
                gradients[2] += gradient.sum(0)
        ctx.gradients = [
            None if each is None else each.to(like.dtype)
            for each, like in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return (total * scale).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_distillation_loss keeps its gradients for one backward pass; call it again"
            )
        # In place: the gradient of the head is the largest array there is.
        found = [None if each is None else each.mul_(upstream) for each in ctx.gradients]
        ctx.gradients = None
        return (*found, *(None,) * 7)


def _wide(x: Tensor) -> Tensor:
    """In float32, in which the logits are accumulated; a copy only if it is not."""
    return x.detach().float()


def _logits(state: Tensor, head: Tensor, bias: Tensor | None, into: Tensor) -> Tensor:
    torch.mm(state, head.T, out=into)
    if bias is not None:
        into += bias.detach()
    return into


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    where: Tensor | None = None,
    divergence: str = "kl",
    temperature: float = 1.0,
    block_bytes: int = 64 * 2**20,
) -> Tensor:
    """Mean divergence of student from teacher, from hidden states and output heads.

    Formula:
        T^2 mean D(softmax(h_t W_t' / T), softmax(h_s W_s' / T))

    The logits are made block by block of rows, in float32, reduced, and turned into the gradients
    of hidden states and weights at once: no array of all logits exists.

    Arguments:
        student_hidden: shape (..., H); any float dtype.
        student_weight: shape (V, H), the output head.
        teacher_hidden: shape (..., H'), the same batch axes; teacher and head get no gradient.
        teacher_weight: shape (V, H').
        student_bias: shape (V,), or None.
        teacher_bias: shape (V,), or None.
        where: booleans, one a row; rows that are False are left out of the mean.
        divergence: as of `distillation_loss`.
        temperature: T > 0.
        block_bytes: memory of one block of logits; two are held.

    Returns:
        One float32 number, differentiable once in the student's hidden states, weight and bias.
    """
    for name, state, head in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if head.ndim != 2 or state.shape[-1:] != head.shape[-1:]:
            raise ValueError(
                f"{name}_hidden and {name}_weight have shapes {tuple(state.shape)} and "
                f"{tuple(head.shape)}; accepted: (..., H) and (V, H)"
            )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student_weight and teacher_weight have {student_weight.shape[0]} and "
            f"{teacher_weight.shape[0]} rows; accepted: the same vocabulary"
        )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden and teacher_hidden have shapes {tuple(student_hidden.shape)} and "
            f"{tuple(teacher_hidden.shape)}; accepted: the same batch axes"
        )
    differentiable(divergence)
    loss: Tensor = _LinearLoss.apply(
        student_hidden.flatten(0, -2), student_weight, student_bias,
        teacher_hidden.detach().flatten(0, -2), teacher_weight.detach(), teacher_bias,
        None if where is None else where.flatten(), divergence, float(temperature), block_bytes,
    )  # fmt: skip
    return loss * temperature**2

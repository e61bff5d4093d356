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
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

import klfast

from . import _device, gaussian
from ._arguments import Settings, number, prepare, temperatures
from ._arrays import FLOATS, empty, wrap
from ._dispatch import compiled
from ._gradients import differentiable, value_and_grad

__all__ = [
    "alpha_divergence",
    "chi2_divergence",
    "cross_entropy",
    "cross_entropy_loss",
    "distillation_loss",
    "entropy",
    "gaussian_kl_divergence",
    "generalized_jsd_loss",
    "jeffreys_divergence",
    "js_divergence",
    "kl_div",
    "kl_divergence",
    "linear_distillation_loss",
    "renyi_divergence",
    "squared_hellinger",
    "token_log_probs",
    "total_variation",
    "tsallis_divergence",
]

Reduction = Literal["none", "mean", "sum"]


# What PyTorch's compiler sees: two operators, of values and of gradients.


@torch.library.custom_op("klfast::divergence", mutates_args=())
def _divergence(
    name: str, parameters: list[float], p: Tensor, q: Tensor | None, keep: Tensor | None,
    temperature: list[float],
) -> Tensor:  # fmt: skip
    operation, given = differentiable(_full_name(name, parameters))
    options: Any = {"weight": given[0]} if operation.name == "js" else {}
    rows = {"p": p.detach(), "q": None if q is None else q.detach()}
    arrays = [rows[side] for side in operation.rows]
    swapped = temperature[::-1] if operation.rows == "qp" else temperature
    value: Tensor = getattr(klfast, operation.function)(
        *arrays, *(() if options else given),
        temperature=swapped[0] if q is None else tuple(swapped), where=keep, **options,
    )  # fmt: skip
    return value if keep is None else torch.where(keep, value, 0.0)


@_divergence.register_fake
def _(
    name: str, parameters: list[float], p: Tensor, q: Tensor | None, keep: Tensor | None,
    temperature: list[float],
) -> Tensor:  # fmt: skip
    return p.new_empty(p.shape[:-1], dtype=_widest(p, q))


@torch.library.custom_op("klfast::gradient", mutates_args=())
def _gradient(
    name: str, parameters: list[float], p: Tensor, q: Tensor | None, keep: Tensor | None,
    temperature: list[float], scale: Tensor, wrt: str,
) -> list[Tensor]:  # fmt: skip
    rows = (p.detach(),) if q is None else (p.detach(), q.detach())
    options: Any = {"temperature": temperature[0] if q is None else tuple(temperature)}
    side: Any = wrt
    _, gradient = value_and_grad(
        _full_name(name, parameters), *rows, wrt=side, grad_scale=scale.detach(), where=keep,
        **options,
    )  # fmt: skip
    return list(gradient) if wrt == "both" else [gradient]


@_gradient.register_fake
def _(
    name: str, parameters: list[float], p: Tensor, q: Tensor | None, keep: Tensor | None,
    temperature: list[float], scale: Tensor, wrt: str,
) -> list[Tensor]:  # fmt: skip
    sides = {"p": [p], "q": [q], "both": [p, q]}[wrt]
    return [side.new_empty(side.shape) for side in sides if side is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    name, parameters, p, q, keep, temperature = inputs
    ctx.save_for_backward(p, q, keep)
    ctx.name, ctx.parameters, ctx.temperature = name, parameters, temperature


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    p, q, keep = ctx.saved_tensors
    wanted = [side for side, place in (("p", 2), ("q", 3)) if ctx.needs_input_grad[place]]
    gradients: dict[str, Tensor] = {}
    if wanted:
        wrt = "both" if len(wanted) == 2 else wanted[0]
        found = _gradient(ctx.name, ctx.parameters, p, q, keep, ctx.temperature, upstream, wrt)
        gradients = dict(zip(wanted, found, strict=True))
    return None, None, gradients.get("p"), gradients.get("q"), None, None


_divergence.register_autograd(_backward, setup_context=_save)


def _no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    raise NotImplementedError(
        "klfast.torch has no second derivatives: backward was called through a gradient "
        "(create_graph=True)"
    )


_gradient.register_autograd(_no_second_derivative)


def _full_name(name: str, parameters: list[float]) -> str:
    """A name with its parameters, as `klfast.value_and_grad` takes it."""
    return ":".join([name, *map(repr, parameters)])


def _widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of what is computed of these: float64 if one of them is, else float32."""
    wide = any(each is not None and each.dtype == torch.float64 for each in tensors)
    return torch.float64 if wide else torch.float32


# Arguments


def _of_two(divergence: str) -> tuple[str, list[float]]:
    """Name and parameters of a divergence of two batches."""
    operation, parameters = differentiable(divergence)
    if operation.arity == 1:
        raise ValueError(f"divergence is {divergence!r}, of one batch; accepted: one of two")
    return operation.name, list(parameters)


def _check_rows(rows: Mapping[str, Any]) -> None:
    """Logits (or hidden states and heads) are tensors of real numbers that `jvp` is not asked of.

    Everything else about them is checked where they are read.
    """
    for name, each in rows.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} is of type {type(each).__name__}; accepted: torch.Tensor")
        if each.ndim == 0:
            raise ValueError(f"{name} is a single number, of shape (); accepted: shape (..., V)")
        if not each.is_floating_point():
            raise TypeError(f"{name} has dtype {each.dtype}; accepted: {_FLOATS}")
        # PyTorch would take the derivative of an operator that has none of this kind for 0.
        if not torch.compiler.is_compiling() and unpack_dual(each).tangent is not None:
            raise NotImplementedError(
                f"{name} has a tangent, and klfast.torch has no forward-mode derivatives; accepted:"
                " torch.autograd.grad, backward"
            )


_FLOATS = "float16, bfloat16, float32, float64"


def _check_one_a_row(name: str, given: Any, shape: torch.Size, kind: str) -> None:
    """``given`` has an entry for each row of a batch, of a kind: "boolean" or "integers"."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is of type {type(given).__name__}; accepted: torch.Tensor")
    whole = not given.is_floating_point() and not given.is_complex()
    if (given.dtype == torch.bool) != (kind == "boolean") or not whole:
        raise TypeError(f"{name} has dtype {given.dtype}; accepted: {kind}")
    fits = given.shape == shape
    if not fits and kind == "boolean":
        fits = given.ndim <= len(shape) and all(
            one in (1, other)
            for one, other in zip(reversed(given.shape), reversed(shape), strict=False)
        )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; accepted: {tuple(shape)}, one entry a row"
            + (", or what broadcasts to it" if kind == "boolean" else "")
        )


def _evaluate(
    name: str,
    parameters: list[float],
    rows: Mapping[str, Tensor],
    temperature: float | tuple[float, float],
    where: Tensor | None,
    reduction: str,
) -> Tensor:
    """An operation of P and maybe Q, which ``rows`` has in this order by their names."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'mean', 'sum'")
    _check_rows(rows)
    p, q = (*rows.values(), None)[:2]
    shape = p.shape[:-1]
    if q is not None:
        if p.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"{' and '.join(rows)} have vocabularies of {p.shape[-1]} and {q.shape[-1]} "
                "entries; accepted: the same number"
            )
        # Expanded here, so that autograd adds up the gradient of rows that are repeated.
        try:
            shape = torch.broadcast_shapes(shape, q.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"{' and '.join(rows)} have shapes {tuple(p.shape)} and {tuple(q.shape)}; accepted:"
                " batch axes (all but the last) that broadcast"
            ) from None
        p = p.expand(*shape, p.shape[-1])
        q = q.expand(*shape, q.shape[-1])
    keep = None
    if where is not None:
        _check_one_a_row("where", where, shape, "boolean")
        keep = where.expand(shape)
    given = list(temperatures(temperature, len(rows)))
    value = _divergence(name, parameters, p, q, keep, given)
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
    return _evaluate("kl", [], {"p": p, "q": q}, temperature, where, reduction)


def jeffreys_divergence(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """KL both ways, summed; arguments as of `kl_divergence`."""
    return _evaluate("jeffreys", [], {"p": p, "q": q}, temperature, where, reduction)


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
    return _evaluate(
        "js", [number("weight", weight)], {"p": p, "q": q}, temperature, where, reduction
    )


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
    return _evaluate(
        "renyi", [number("alpha", alpha)], {"p": p, "q": q}, temperature, where, reduction
    )


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
    return _evaluate(
        "alpha", [number("alpha", alpha)], {"p": p, "q": q}, temperature, where, reduction
    )


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
    return _evaluate(
        "tsallis", [number("alpha", alpha)], {"p": p, "q": q}, temperature, where, reduction
    )


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
    return _evaluate("tv", [], {"p": p, "q": q}, temperature, where, reduction)


def squared_hellinger(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Squared Hellinger distance; arguments as of `kl_divergence`."""
    return _evaluate("hellinger2", [], {"p": p, "q": q}, temperature, where, reduction)


def chi2_divergence(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Pearson's chi-squared divergence; arguments as of `kl_divergence`."""
    return _evaluate("chi2", [], {"p": p, "q": q}, temperature, where, reduction)


def cross_entropy(
    p: Tensor,
    q: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross-entropy of Q under P, both given by logits; arguments as of `kl_divergence`."""
    return _evaluate("cross_entropy", [], {"p": p, "q": q}, temperature, where, reduction)


def entropy(
    p: Tensor,
    *,
    temperature: float = 1.0,
    where: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Shannon entropy; arguments as of `kl_divergence`."""
    return _evaluate("entropy", [], {"p": p}, temperature, where, reduction)


# Log-probabilities of tokens, whose gradients need no more than what the values were made of


@torch.library.custom_op("klfast::token_log_probs", mutates_args=())
def _token_log_probs(
    logits: Tensor, tokens: Tensor, keep: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The values, and in float64 once more with the logarithms of the normalizers."""
    settings = Settings(temperature=temperature, where=keep)
    batch = prepare({"logits": logits.detach()}, settings, ("tokens", tokens))
    metrics: list[tuple[str, tuple[float, ...]]] = [("token_log_probs", ()), ("logsumexp", ())]
    if batch.place.device == "cpu":
        found = [batch.empty_values() for _ in metrics]
        if not batch.idle:
            found = batch.backend.compare(metrics, batch.p, batch.p, batch.rows, batch.tokens)
        known = torch.stack([torch.from_numpy(each).reshape(batch.shape) for each in found])
    else:
        known = torch.stack(_device.evaluate(batch, metrics, "float64"))
    if keep is not None:
        known = torch.where(keep, known, 0.0)
    return known[0].to(_widest(logits), copy=True), known


@_token_log_probs.register_fake
def _(
    logits: Tensor, tokens: Tensor, keep: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    batch = logits.shape[:-1]
    return (
        logits.new_empty(batch, dtype=_widest(logits)),
        logits.new_empty((2, *batch), dtype=torch.float64),
    )


@torch.library.custom_op("klfast::token_gradient", mutates_args=())
def _token_gradient(
    logits: Tensor, tokens: Tensor, keep: Tensor | None, known: Tensor, scale: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    logits = logits.detach()
    scale = scale.double() if keep is None else torch.where(keep, scale.double(), 0.0)
    tokens = tokens.long() if keep is None else torch.where(keep, tokens.long(), 0)
    if not logits.numel():
        return logits.new_empty(logits.shape)
    kernels = compiled() if logits.device.type == "cpu" else None
    if kernels is not None and logits.dtype != torch.float64:
        batch = prepare({"logits": logits}, Settings(temperature=temperature))
        if batch.p.stride == FLOATS[batch.p.dtype] and temperature >= 1e-30:
            # NumPy asks for huge pages, PyTorch does not: new small ones take twice as long as
            # the kernel.
            stored, view = empty(tuple(logits.shape), batch.p.dtype)
            numbers = [each.contiguous().numpy() for each in (tokens, *known, scale)]
            kernels.token_gradients(batch.p, stored, *numbers)
            gradient: Tensor = wrap(stored, view.dtype, batch.place, logits)
            return gradient
    value, log_sum = known[..., None]
    scale, tokens = scale[..., None] / temperature, tokens[..., None]
    wide = torch.exp(logits.double() / temperature - log_sum).mul_(-scale)
    wide.scatter_(-1, tokens, -torch.expm1(value) * scale)
    nothing = (scale == 0.0) | (value == -math.inf)
    return wide.masked_fill_(nothing, 0.0).to(logits.dtype).contiguous()


@_token_gradient.register_fake
def _(
    logits: Tensor, tokens: Tensor, keep: Tensor | None, known: Tensor, scale: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, tokens, keep, ctx.temperature = inputs
    ctx.save_for_backward(logits, tokens, keep, output[1])


def _token_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    return _token_gradient(*ctx.saved_tensors, upstream, ctx.temperature), None, None, None


_token_log_probs.register_autograd(_token_backward, setup_context=_save_tokens)
_token_gradient.register_autograd(_no_second_derivative)


def _of_tokens(
    names: tuple[str, str],
    logits: Tensor,
    tokens: Tensor,
    where: Tensor | None,
    temperature: float,
) -> Tensor:
    _check_rows({names[0]: logits})
    shape = logits.shape[:-1]
    _check_one_a_row(names[1], tokens, shape, "integers")
    if where is not None:
        _check_one_a_row("where", where, shape, "boolean")
        where = where.expand(shape)
    (temperature,) = temperatures(temperature, 1)
    value: Tensor = _token_log_probs(logits, tokens, where, temperature)[0]
    return value


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    where: Tensor | None = None,
) -> Tensor:
    """Log-probability of one token a row, differentiable: what policy gradients are made of.

    Formula:
        log p[token] = x[token] / T - log sum exp(x / T),
        whose derivative is (onehot(token) - p) / T.

    Arguments:
        logits: shape (..., V), in any float dtype.
        tokens: integers from 0 to V - 1, shape (...).
        temperature: T > 0 that divides the logits.
        where: booleans, one a row; rows that are False are never read, may have any token, such as
            -100, and have value and gradient 0.

    Returns:
        One value a row, float32 or, if the logits are, float64, in nats; exact also where it is
        close to 0. Differentiable once in the logits; the gradient comes from one more read of them
        and has their dtype. It is 0 where the value is -inf, which has no derivative.

        Of float64 logits, of logits that are not contiguous along the vocabulary, and on CUDA the
        gradient is computed by PyTorch in float64, which takes memory of its size.

    Raises:
        TypeError, ValueError: for arguments of other kinds or shapes.
        IndexError: for tokens out of range (on a GPU their rows are NaN).
        NotImplementedError: in a second derivative.
    """
    return _of_tokens(("logits", "tokens"), logits, tokens, where, temperature)


# Losses


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of logits with known labels: F.cross_entropy, of the last axis.

    Formula:
        -log softmax(logits / T)[label] of each row, and its mean or sum over the rows whose label
        is not ignore_index.

    Arguments:
        logits: shape (..., V), in any float dtype. (F.cross_entropy has classes on axis 1.)
        labels: integers from 0 to V - 1, or ignore_index, shape (...).
        temperature: T > 0.
        ignore_index: rows with this label are not read; their value and gradient are 0.
        reduction: "mean" (NaN where all rows are ignored, as there), "sum" or "none".

    Returns:
        float32, or float64 if the logits are; differentiable once, as `token_log_probs`.

    Raises:
        TypeError, ValueError, IndexError: as `token_log_probs`.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'mean', 'sum'")
    _check_rows({"logits": logits})
    _check_one_a_row("labels", labels, logits.shape[:-1], "integers")
    keep = labels != ignore_index
    value = 0.0 - _of_tokens(("logits", "labels"), logits, labels, keep, temperature)
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.sum() / keep.sum()


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    where: Tensor | None = None,
    divergence: str = "kl",
    temperature: float = 1.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Distance of a student from its teacher, and from the labels if there are any.

    Formula:
        alpha T^2 mean D(softmax(teacher / T), softmax(student / T))
        + (1 - alpha) mean -log softmax(student)[label],
    over the rows that `where` keeps and whose label is not `ignore_index`; without labels the first
    mean alone, times T^2. The factor T^2 keeps the size of the gradient as T grows.

    Arguments:
        student: logits, shape (..., V).
        teacher: logits of the same shape; no gradient is given to them.
        labels: integers, shape (...), or None.
        where: booleans, shape (...), or None: rows that are False take no part.
        divergence: "kl" is KL(teacher, student), "reverse_kl" KL(student, teacher); "jeffreys",
            "js", "js:WEIGHT" (the teacher's), "renyi:ORDER", "alpha:ORDER", "tv", ...: any that
            `klfast.value_and_grad` has.
        temperature: T > 0.
        alpha: in [0, 1], the share of the divergence where there are labels; 1 takes of them only
            which rows to leave out.
        ignore_index: rows with this label are left out of both means.

    Returns:
        One number, differentiable in `student`.

    Source:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha!r}; accepted: a number in [0, 1]")
    rows = {"student": student, "teacher": teacher}
    _check_rows(rows)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "accepted: the same"
        )
    if where is not None:
        _check_one_a_row("where", where, student.shape[:-1], "boolean")
    keep = where
    if labels is not None:
        _check_one_a_row("labels", labels, student.shape[:-1], "integers")
        if where is not None:
            labels = labels.masked_fill(~where, ignore_index)
        keep = labels != ignore_index
    (temperature,) = temperatures(temperature, 1)
    soft = _evaluate(
        *_of_two(divergence), {"teacher": teacher.detach(), "student": student}, temperature,
        keep, "mean",
    )  # fmt: skip
    soft = soft * temperature**2
    if labels is None or alpha == 1.0:
        return soft
    hard = cross_entropy_loss(student, labels, ignore_index=ignore_index)
    return alpha * soft + (1.0 - alpha) * hard


def kl_div(
    student: Tensor, teacher: Tensor, *, reduction: Literal["none", "batchmean", "mean", "sum"]
) -> Tensor:
    """What F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True) gives, of logits.

    KL(teacher, student). As there, "mean" divides the sum by the number of entries, "batchmean" by
    the length of the first axis; "none" is one value a row here, not one an entry.
    """
    total = _evaluate("kl", [], {"teacher": teacher, "student": student}, 1.0, None, "none")
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
    beta = number("beta", beta)
    name = {0.0: "kl", 1.0: "reverse_kl"}.get(beta, "js")
    rows = {"teacher_logits": teacher_logits, "student_logits": student_logits}
    keep = None
    if labels is not None:
        _check_one_a_row("labels", labels, student_logits.shape[:-1], "integers")
        keep = labels != -100
    parameters = [beta] if name == "js" else []
    value = _evaluate(name, parameters, rows, temperature, keep, "none")
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    if reduction != "batchmean":
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'batchmean', 'sum'")
    return value.sum() / (student_logits.shape[0] if keep is None else keep.sum())


# From hidden states to the loss, without the logits


@torch.library.custom_op("klfast::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, keep: Tensor | None, name: str,
    temperature: float, block_bytes: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients with respect to the first three (empty where not needed)."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    kept = rows if keep is None else int(keep.sum())
    scale = temperature**2 / kept if kept else math.nan
    dtype = _widest(hidden, weight, teacher_hidden, teacher_weight)
    step = max(1, block_bytes // (dtype.itemsize * vocabulary))
    student = (hidden, weight, bias)
    gradients = [
        each.new_zeros(each.shape, dtype=dtype) if need and each is not None else None
        for each, need in zip(student, needs, strict=True)
    ]
    heads = [each.detach().to(dtype) for each in (weight, teacher_weight)]
    biases = [None if each is None else each.detach() for each in (bias, teacher_bias)]
    memory = [hidden.new_empty(min(step, rows), vocabulary, dtype=dtype) for _ in range(2)]
    total = hidden.new_zeros((), dtype=torch.float64)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        states = [each[part].detach().to(dtype) for each in (hidden, teacher_hidden)]
        logits = [
            _logits(state, head, offset, into[: len(state)])
            for state, head, offset, into in zip(states, heads, biases, memory, strict=True)
        ]
        where = None if keep is None else keep[part]
        pair = (name, logits[1], logits[0])
        if not any(needs):
            value = _divergence(*_of_two(name), logits[1], logits[0], where, [temperature] * 2)
            total += value.sum(dtype=torch.float64)
            continue
        # The gradient takes the place of the student's logits.
        value, gradient = value_and_grad(
            *pair, wrt="q", grad_scale=scale, out=logits[0], where=where, temperature=temperature
        )
        if where is not None:
            value = torch.where(where, value, 0.0)
        total += value.sum(dtype=torch.float64)
        if gradients[0] is not None:
            torch.mm(gradient, heads[0], out=gradients[0][part])
        if gradients[1] is not None:
            gradients[1].addmm_(gradient.T, states[0])
        if gradients[2] is not None:
            gradients[2] += gradient.sum(0)
    of_hidden, of_weight, of_bias = (
        hidden.new_empty(0) if each is None or like is None else each.to(like.dtype)
        for each, like in zip(gradients, student, strict=True)
    )
    return (total * scale).to(dtype), of_hidden, of_weight, of_bias


@_linear_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, keep: Tensor | None, name: str,
    temperature: float, block_bytes: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_hidden, of_weight, of_bias = (
        each.new_empty(each.shape) if need and each is not None else hidden.new_empty(0)
        for each, need in zip((hidden, weight, bias), needs, strict=True)
    )
    dtype = _widest(hidden, weight, teacher_hidden, teacher_weight)
    return hidden.new_empty((), dtype=dtype), of_hidden, of_weight, of_bias


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *second: Tensor | None) -> Any:
    if any(each is not None for each in second):
        _no_second_derivative(ctx)
    try:
        gradients = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "linear_distillation_loss keeps its gradients for one backward pass; call it again"
        ) from error
    found = [None, None, None]
    for place, (gradient, need) in enumerate(zip(gradients, ctx.needs_input_grad, strict=False)):
        if need and upstream is not None:
            # In place: the gradient of the head is the largest array there is.
            again = torch.is_grad_enabled()  # create_graph=True
            found[place] = gradient * upstream if again else gradient.detach().mul_(upstream)
    return (*found, *(None,) * 8)


_linear_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _logits(state: Tensor, head: Tensor, bias: Tensor | None, into: Tensor) -> Tensor:
    torch.mm(state, head.T, out=into)
    if bias is not None:
        into += bias
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
        One number, float32 or, if an input is, float64; differentiable once in the student's
        hidden states, weight and bias. Its gradients are made in the forward pass, so that it can
        be called backward through once.

    Raises:
        TypeError, ValueError: for arguments that are no tensors of real numbers, or do not fit.
        NotImplementedError: in a second derivative.
    """
    given = {
        "student_hidden": student_hidden, "student_weight": student_weight,
        "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight,
    }  # fmt: skip
    biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
    _check_rows(given | {name: each for name, each in biases.items() if each is not None})
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
    for name, each in biases.items():
        if each is not None and each.shape != student_weight.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(each.shape)}; accepted: {tuple(student_weight.shape[:1])}"
            )
    if where is not None:
        _check_one_a_row("where", where, student_hidden.shape[:-1], "boolean")
        where = where.expand(student_hidden.shape[:-1]).reshape(-1)
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes!r}; accepted: a whole number above 0")
    _of_two(divergence)
    (temperature,) = temperatures(temperature, 1)
    student = (student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias)
    needs = [
        torch.is_grad_enabled() and each is not None and each.requires_grad for each in student
    ]
    loss: Tensor = _linear_loss(
        *student, teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach(), where,
        divergence, temperature, block_bytes, needs,
    )[0]  # fmt: skip
    return loss


# Gaussians, whose gradients come from the same kernel as the value


@torch.library.custom_op("klfast::gaussian_kl", mutates_args=())
def _gaussian_kl(
    mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor | None, logvar_q: Tensor | None
) -> Tensor:
    given = (mean_p, logvar_p, mean_q, logvar_q)
    value: Tensor = gaussian.kl_divergence(*(None if x is None else x.detach() for x in given))
    return value


@_gaussian_kl.register_fake
def _(mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor | None, logvar_q: Tensor | None) -> Tensor:
    return mean_p.new_empty(mean_p.shape[:-1], dtype=_widest(mean_p))


@torch.library.custom_op("klfast::gaussian_kl_gradient", mutates_args=())
def _gaussian_kl_gradient(
    mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor | None, logvar_q: Tensor | None, scale: Tensor
) -> list[Tensor]:
    p = mean_p.detach(), logvar_p.detach()
    q = () if mean_q is None or logvar_q is None else (mean_q.detach(), logvar_q.detach())
    return list(gaussian.value_and_grad(*p, *q, grad_scale=scale.detach()).gradients)


@_gaussian_kl_gradient.register_fake
def _(
    mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor | None, logvar_q: Tensor | None, scale: Tensor
) -> list[Tensor]:
    return [mean_p.new_empty(mean_p.shape) for _ in range(2 if mean_q is None else 4)]


def _save_gaussian(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gaussian_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    gradients = _gaussian_kl_gradient(*ctx.saved_tensors, upstream)
    return tuple(
        gradient if needed else None
        for gradient, needed in zip([*gradients, None, None][:4], ctx.needs_input_grad, strict=True)
    )


_gaussian_kl.register_autograd(_gaussian_backward, setup_context=_save_gaussian)
_gaussian_kl_gradient.register_autograd(_no_second_derivative)


def gaussian_kl_divergence(
    mean_p: Tensor,
    logvar_p: Tensor,
    mean_q: Tensor | None = None,
    logvar_q: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """KL divergence of Gaussians with diagonal covariance: the regularizer of an autoencoder.

    `klfast.gaussian.kl_divergence`, differentiable in all its arguments.

    Arguments:
        mean_p: means of P, shape (..., n); all arguments have one shape and dtype.
        logvar_p: logarithms of its variances.
        mean_q: means of Q; with the next one, the standard normal distribution if left out.
        logvar_q: logarithms of its variances.
        reduction: "none", or "mean" or "sum" over the batch.
    """
    given = [x for x in (mean_p, logvar_p, mean_q, logvar_q) if x is not None]
    if len({(x.shape, x.dtype) for x in given}) > 1:
        text = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in given)
        raise ValueError(f"the arguments are {text}; accepted: one shape and dtype")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'mean', 'sum'")
    value: Tensor = _gaussian_kl(mean_p, logvar_p, mean_q, logvar_q)
    return value if reduction == "none" else getattr(value, reduction)()

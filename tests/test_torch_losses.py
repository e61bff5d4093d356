"""klfast.torch: derivatives, losses, and the way they work with the rest of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import klfast.torch as losses  # noqa: E402 (it imports PyTorch)
from klfast import reference  # noqa: E402

F = torch.nn.functional
PAIRS: list[tuple[str, tuple[float, ...]]] = [
    ("kl_divergence", ()),
    ("jeffreys_divergence", ()),
    ("js_divergence", ()),
    ("renyi_divergence", (2.0,)),
    ("alpha_divergence", (0.3,)),
    ("tsallis_divergence", (1.5,)),
    ("total_variation", ()),
    ("squared_hellinger", ()),
    ("chi2_divergence", ()),
    ("cross_entropy", ()),
]


def logits(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(*shape, generator=generator, dtype=torch.float64)
    q = p + 0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return p.to(dtype), q.to(dtype)


@pytest.mark.parametrize(("name", "parameters"), PAIRS)
def test_gradcheck(name: str, parameters: tuple[float, ...]) -> None:
    p, q = (x.requires_grad_() for x in logits(3, 6, dtype=torch.float64))
    function = getattr(losses, name)
    assert torch.autograd.gradcheck(
        lambda x, y: function(x, y, *parameters, temperature=(1.5, 0.8)), (p, q)
    )


def test_gradcheck_of_entropy() -> None:
    p, _ = logits(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.entropy, (p.requires_grad_(),))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_kl_div_is_that_of_torch(reduction: Any) -> None:
    teacher, student = logits(4, 5, 33)
    student.requires_grad_()
    value = losses.kl_div(student, teacher, reduction=reduction)
    (gradient,) = torch.autograd.grad(value, student)
    theirs = F.kl_div(
        F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction=reduction
    )
    (expected,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(value, theirs)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)


def published_jsd(student: Any, teacher: Any, beta: float, temperature: float) -> Any:
    """Of every entry: KL(student) and KL(teacher) from the mixture, as TRL and Liger publish it."""
    s, t = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    if beta == 0:
        return t.exp() * (t - s)
    if beta == 1:
        return s.exp() * (s - t)
    mixture = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
    return beta * t.exp() * (t - mixture) + (1 - beta) * s.exp() * (s - mixture)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("with_labels", [False, True])
def test_generalized_jsd_loss_is_that_of_trl(beta: float, with_labels: bool) -> None:
    teacher, student = logits(2, 7, 33, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.zeros(2, 7, dtype=torch.long)
    labels[0, :3] = -100
    entries = published_jsd(student, teacher, beta, 1.7)
    if with_labels:
        expected = entries[labels != -100].sum() / (labels != -100).sum()
    else:
        expected = entries.sum() / entries.shape[0]
    value = losses.generalized_jsd_loss(
        student, teacher, labels if with_labels else None, beta=beta, temperature=1.7
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0]
    )


def test_liger_jsd_is_the_mean_of_js() -> None:
    teacher, student = logits(7, 33, dtype=torch.float64)
    expected = published_jsd(student, teacher, 0.3, 1.0).sum() / 7
    value = losses.js_divergence(teacher, student, weight=0.3, reduction="mean")
    torch.testing.assert_close(value, expected)


def test_distillation_loss_is_its_formula() -> None:
    teacher, student = logits(2, 7, 33, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.arange(14).reshape(2, 7)
    labels[1, 2:4] = -100
    keep = labels != -100
    soft = published_jsd(student, teacher, 0.0, 2.0).sum(-1)[keep].mean()
    hard = F.cross_entropy(student[keep], labels[keep])
    expected = 0.3 * 4.0 * soft + 0.7 * hard
    value = losses.distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.3)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0]
    )


def test_rows_that_a_distillation_loss_leaves_out() -> None:
    teacher, student = logits(3, 7, 33, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.arange(21).reshape(3, 7)
    labels[0, 2:4] = -100
    where = torch.arange(7) < 5
    keep = where & (labels != -100)
    for given, kept in ((labels, keep), (None, where.expand(3, 7))):
        chosen = None if given is None else given[kept]
        value = losses.distillation_loss(student, teacher, given, where=where, alpha=0.3)
        expected = losses.distillation_loss(student[kept], teacher[kept], chosen, alpha=0.3)
        torch.testing.assert_close(value, expected)
    # alpha = 1 takes nothing else of the labels.
    soft = losses.distillation_loss(student, teacher, labels, where=where, alpha=1.0)
    torch.testing.assert_close(soft, losses.kl_divergence(teacher[keep], student[keep]).mean())
    assert torch.autograd.grad(soft, student)[0][~keep].eq(0).all()


def test_gradient_does_not_shrink_with_the_temperature() -> None:
    teacher, student = logits(5, 100, dtype=torch.float64)
    student.requires_grad_()
    sizes = []
    for temperature in (10.0, 100.0):
        value = losses.distillation_loss(student, teacher, temperature=temperature)
        sizes.append(float(torch.autograd.grad(value, student)[0].norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_dropped_rows_are_zero_and_not_counted() -> None:
    p, q = logits(4, 10)
    q[1] = math.nan
    q.requires_grad_()
    where = torch.tensor([True, False, True, True])
    value = losses.kl_divergence(p, q, where=where)
    assert value[1] == 0.0
    mean = losses.kl_divergence(p, q, where=where, reduction="mean")
    torch.testing.assert_close(mean, value.sum() / 3)
    mean.backward()
    assert (q.grad[1] == 0.0).all()
    assert torch.isfinite(q.grad).all()


def test_repeated_rows_add_up_their_gradient() -> None:
    p, q = logits(4, 10, dtype=torch.float64)
    one = p[:1].clone().requires_grad_()
    losses.js_divergence(one, q, reduction="sum").backward()
    expected = sum(
        reference.gradient("js", p[:1].numpy(), y[None], 0.5, wrt="p") for y in q.numpy()
    )
    np.testing.assert_allclose(one.grad.numpy(), expected, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_get_narrow_gradients_and_float32_values(dtype: Any) -> None:
    p, q = logits(3, 50, dtype=dtype)
    q.requires_grad_()
    value = losses.kl_divergence(p, q)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert q.grad.dtype == dtype
    expected = reference.gradient("kl", p.double().numpy(), q.detach().double().numpy())
    # Rounded once.
    unit = torch.finfo(dtype).eps / 2
    np.testing.assert_allclose(q.grad.double().numpy(), expected, rtol=1.01 * unit, atol=1e-7)


def test_autocast_changes_nothing() -> None:
    p, q = logits(3, 50)
    plain = losses.js_divergence(p, q)
    with torch.autocast("cpu", torch.bfloat16):
        again = losses.js_divergence(p, q)
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


def linear(x: Any, y: Any) -> Any:
    """Of hidden states x and y, with the first rows of y as both heads."""
    return losses.linear_distillation_loss(y, y[:3], x, x[:3], divergence="js:0.3")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: losses.renyi_divergence(x, y, 2.0, reduction="mean"),
        lambda x, y: losses.js_divergence(x, y, weight=0.3, where=x[:, 0] > 0).sum(),
        lambda x, y: losses.entropy(y, temperature=2.0).sum(),
        lambda x, y: losses.distillation_loss(y, x, torch.arange(len(x)), temperature=2.0),
        linear,
    ],
    ids=["renyi", "js and where", "entropy", "distillation", "linear"],
)
def test_compile_has_no_graph_break(loss: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: loss(x, 1.5 * y), fullgraph=True, dynamic=dynamic)
    for rows in (4, 3):
        p, q = logits(rows, 50)
        q.requires_grad_()
        (found,) = torch.autograd.grad(compiled(p, q), q)
        (expected,) = torch.autograd.grad(loss(p, 1.5 * q), q)
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_operators_are_registered_as_pytorch_wants_them() -> None:
    p, q = (x.requires_grad_() for x in logits(3, 6, dtype=torch.float64))
    torch.library.opcheck(
        torch.ops.klfast.divergence.default, ("js", [0.3], p, q, None, [1.0, 1.0])
    )
    given = (p, q, None, p.detach(), q.detach(), None, None, "kl", 1.0, 100, [True, True, False])
    # Its other tests call the operator backward through all outputs, of which but one allows that.
    torch.library.opcheck(
        torch.ops.klfast.linear_loss.default, given,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_second_derivatives_are_refused() -> None:
    p, q = logits(2, 5)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(
        losses.kl_divergence(p, q, reduction="sum"), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # used by torch.func
def test_forward_mode_is_refused() -> None:
    """PyTorch takes the tangent of an operator that has no rule for 0, and says nothing."""
    p, q = logits(2, 5)
    with pytest.raises(NotImplementedError, match="q has a tangent"):
        torch.func.jvp(lambda y: losses.kl_divergence(p, y), (q,), (q,))


@pytest.mark.parametrize("wanted", ["p", "q", "pq"])
def test_only_what_requires_a_gradient_gets_one(wanted: str) -> None:
    rows = dict(zip("pq", logits(3, 20), strict=True))
    for side in wanted:
        rows[side].requires_grad_()
    losses.js_divergence(rows["p"].T.contiguous().T, rows["q"], reduction="sum").backward()
    for side, each in rows.items():
        assert (each.grad is not None) == (side in wanted)
        if side in wanted:
            p, q = (x.detach().numpy() for x in rows.values())
            expected = reference.gradient("js", p, q, 0.5, wrt=side)
            np.testing.assert_allclose(each.grad.numpy(), expected, atol=1e-8)


def test_no_rows() -> None:
    p, q = logits(0, 5)
    q.requires_grad_()
    losses.kl_divergence(p, q, reduction="sum").backward()
    assert q.grad.shape == (0, 5)
    assert torch.isnan(losses.kl_divergence(p, q, reduction="mean"))
    none = torch.full((3,), -100)
    student, teacher = logits(3, 5)
    assert torch.isnan(losses.distillation_loss(student, teacher, none))


def test_bad_arguments_are_named() -> None:
    p, q = logits(2, 5)
    with pytest.raises(ValueError, match="reduction is 'batchmean'"):
        losses.kl_divergence(p, q, reduction="batchmean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha is -1"):
        losses.renyi_divergence(p, q, -1.0)
    with pytest.raises(ValueError, match="alpha is 2"):
        losses.distillation_loss(p, q, alpha=2.0)
    with pytest.raises(ValueError, match="'k1' has no gradient here"):
        losses.distillation_loss(p, q, divergence="k1")
    with pytest.raises(ValueError, match="p and q have vocabularies of 5 and 4"):
        losses.kl_divergence(p, q[:, :4])
    with pytest.raises(ValueError, match=r"shapes \(2, 5\) and \(3, 5\); accepted: batch axes"):
        losses.kl_divergence(p, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="p is a single number"):
        losses.entropy(p[0, 0])
    with pytest.raises(TypeError, match="q is of type ndarray"):
        losses.kl_divergence(p, q.numpy())
    with pytest.raises(TypeError, match=r"p has dtype torch.int64; accepted: float16"):
        losses.kl_divergence(p.long(), q)
    with pytest.raises(ValueError, match="temperature is 0"):
        losses.kl_divergence(p, q, temperature=0)
    with pytest.raises(ValueError, match=r"temperature is \(1.0, 2.0\); accepted: a number above"):
        losses.entropy(p, temperature=(1.0, 2.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"where has shape \(3,\); accepted: \(2,\)"):
        losses.kl_divergence(p, q, where=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"where has dtype torch.int64; accepted: boolean"):
        losses.kl_divergence(p, q, where=torch.ones(2, dtype=torch.long))
    with pytest.raises(TypeError, match="where is of type list"):
        losses.kl_divergence(p, q, where=[True, False])
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        losses.generalized_jsd_loss(p, q, reduction="mean")  # type: ignore[arg-type]


def test_bad_arguments_of_the_distillation_loss_are_named() -> None:
    student, teacher = logits(2, 5)
    with pytest.raises(ValueError, match=r"student and teacher have shapes \(2, 5\) and \(2, 4\)"):
        losses.distillation_loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); accepted: \(2,\)"):
        losses.distillation_loss(student, teacher, torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"labels has dtype torch.float32; accepted: integers"):
        losses.distillation_loss(student, teacher, torch.zeros(2))
    with pytest.raises(TypeError, match=r"where has dtype torch.int64; accepted: boolean"):
        losses.distillation_loss(student, teacher, where=torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="divergence is 'entropy', of one batch"):
        losses.distillation_loss(student, teacher, divergence="entropy")
    with pytest.raises(ValueError, match=r"temperature is \(1.0, 2.0\)"):
        losses.distillation_loss(student, teacher, temperature=(1.0, 2.0))  # type: ignore[arg-type]


def heads(dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, bias = normal(11, 8), normal(101, 8), normal(101)
    return [hidden, weight, bias, hidden + 0.1 * normal(11, 8), weight + 0.1 * normal(101, 8)]


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "renyi:2"])
@pytest.mark.parametrize("block_bytes", [1, 2000, 1 << 20])
def test_linear_distillation_loss_is_the_unfused_one(divergence: str, block_bytes: int) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight = heads()
    where = torch.arange(11) % 4 != 0
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    value = losses.linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, student_bias=bias, where=where,
        divergence=divergence, temperature=2.0, block_bytes=block_bytes,
    )  # fmt: skip
    found = torch.autograd.grad(3.0 * value, inputs)
    assert not any(each.requires_grad for each in found)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    student = wide[0] @ wide[1].T + wide[2]
    teacher = teacher_hidden.detach().double() @ teacher_weight.detach().double().T
    expected = losses.distillation_loss(
        student[where], teacher[where], divergence=divergence, temperature=2.0
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    for one, other in zip(found, torch.autograd.grad(3.0 * expected, wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


def test_linear_loss_keeps_the_logits_in_float32() -> None:
    """Liger-Kernel#1432: rounding the logits to bfloat16 cost 4 to 23 % of the gradient."""
    hidden, weight, _, teacher_hidden, teacher_weight = heads(torch.bfloat16)
    hidden.requires_grad_()
    value = losses.linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight)
    (found,) = torch.autograd.grad(value, hidden)
    wide = hidden.detach().double().requires_grad_()
    teacher = teacher_hidden.double() @ teacher_weight.double().T
    truth = losses.distillation_loss(wide @ weight.double().T, teacher)
    (expected,) = torch.autograd.grad(truth, wide)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - expected).norm() / expected.norm()) < 0.004


def test_linear_loss_names_shapes_that_do_not_fit() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight = heads()
    with pytest.raises(ValueError, match=r"student_hidden and student_weight have shapes"):
        losses.linear_distillation_loss(hidden[:, :3], weight, teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match="101 and 100 rows; accepted: the same vocabulary"):
        losses.linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight[:100])
    with pytest.raises(ValueError, match="accepted: the same batch axes"):
        losses.linear_distillation_loss(hidden[:3], weight, teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match=r"student_bias has shape \(100,\); accepted: \(101,\)"):
        losses.linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, student_bias=torch.zeros(100)
        )
    with pytest.raises(TypeError, match=r"student_hidden has dtype torch\.int64"):
        losses.linear_distillation_loss(hidden.long(), weight, teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match="temperature is 0"):
        losses.linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, temperature=0
        )
    with pytest.raises(ValueError, match="block_bytes is 0"):
        losses.linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, block_bytes=0
        )
    with pytest.raises(ValueError, match="divergence is 'entropy', of one batch"):
        losses.linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, divergence="entropy"
        )


def test_linear_loss_of_float64_is_computed_in_float64() -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight = heads(torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    value = losses.linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, student_bias=bias, temperature=1.5
    )
    assert value.dtype == torch.float64
    found = torch.autograd.grad(value, inputs)
    expected = losses.distillation_loss(
        hidden @ weight.T + bias, teacher_hidden @ teacher_weight.T, temperature=1.5
    )
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_linear_loss_of_one_state_without_batch_axes() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight = heads()
    one = losses.linear_distillation_loss(hidden[0], weight, teacher_hidden[0], teacher_weight)
    batch = losses.linear_distillation_loss(hidden[:1], weight, teacher_hidden[:1], teacher_weight)
    torch.testing.assert_close(one, batch, atol=0, rtol=0)


def test_the_linear_loss_is_called_backward_through_once() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight = heads()
    hidden.requires_grad_()
    value = 3.0 * losses.linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward pass"):
        value.backward()
    value = losses.linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight)
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("width", [1, 2, 77, 4099])
def test_token_log_probs_have_the_gradient_of_the_definition(
    width: int, temperature: float, dtype: str
) -> None:
    x = (8.0 * logits(6, width, dtype=torch.float64)[0]).to(getattr(torch, dtype))
    tokens = torch.arange(6) * 7 % width
    tokens[0] = x[0].argmax()
    x[1] += 500.0  # no multiple of a rounded log2(e)
    x[2, tokens[2]] += 40.0  # a probability near 1
    x.requires_grad_()
    scale = torch.linspace(-1.0, 2.0, 6)
    value = losses.token_log_probs(x, tokens, temperature=temperature)
    (gradient,) = torch.autograd.grad((value * scale).sum(), x)
    wide = x.detach().double()
    truth = torch.from_numpy(
        reference.token_log_probs(wide.numpy(), tokens.numpy(), temperature=temperature)
    )
    # Not by autograd, whose 1 - p is 0 where p is next to 1.
    factor = (scale.double() / temperature)[:, None]
    expected = -factor * F.softmax(wide / temperature, -1)
    expected.scatter_(-1, tokens[:, None], -factor * torch.expm1(truth)[:, None])
    torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=1e-11)
    assert gradient.dtype == x.dtype
    largest = expected.abs().amax(-1, keepdim=True)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 1e-5, "float64": 1e-12}[dtype]
    least = 2.0**-24 if dtype == "float16" else 1e-30
    assert ((gradient.double() - expected).abs() <= unit * largest + least).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_loss_is_that_of_torch(reduction: Any, dtype: Any) -> None:
    x = logits(3, 5, 331, dtype=dtype)[0].requires_grad_()
    labels = torch.arange(15).reshape(3, 5) * 20
    labels[1, 2:] = -100
    mine = losses.cross_entropy_loss(x, labels, reduction=reduction)
    theirs = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction=reduction)
    torch.testing.assert_close(mine.flatten(), theirs.flatten().to(dtype))
    (gradient,) = torch.autograd.grad(mine.sum(), x)
    (expected,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[1, 2:] == 0.0).all()


def test_gradcheck_of_token_log_probs() -> None:
    x = logits(3, 6, dtype=torch.float64)[0].requires_grad_()
    tokens = torch.tensor([0, 5, 2])
    assert torch.autograd.gradcheck(
        lambda x: losses.token_log_probs(x, tokens, temperature=1.5), (x,)
    )
    value = losses.token_log_probs(x, tokens).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_gradients_of_strange_rows(dtype: Any) -> None:
    x = logits(5, 1003, dtype=dtype)[0]
    tokens = torch.tensor([4, 3, 2, -100, 0])
    x[0, 5:900] = -math.inf  # outside the support
    x[1, 3] = -math.inf  # the token itself
    x[2, 7] = math.nan
    x[3] = math.nan  # not read
    x[4, 1:] = -math.inf  # nothing but the token
    x.requires_grad_()
    value = losses.token_log_probs(x, tokens, where=torch.arange(5) != 3)
    value.sum().backward()
    assert value[1] == -math.inf
    assert value[2].isnan()
    assert (value[3:] == 0.0).all()
    assert (x.grad[0, 5:900] == 0.0).all()
    assert x.grad[0].sum().abs() < 1e-6
    assert x.grad[2].isnan().all()
    assert (x.grad[[1, 3, 4]] == 0.0).all()


def test_token_log_probs_of_rows_that_are_repeated_or_strided() -> None:
    x = logits(64, 1, 4, dtype=torch.float32)[0].permute(2, 1, 0).expand(4, 3, 64)
    tokens = torch.arange(12).reshape(4, 3)
    for rows in (x, x.contiguous(), logits(1, 64)[0].expand(4, 3, 64)):
        rows = rows.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses.token_log_probs(rows, tokens).sum(), rows)
        wide = rows.detach().double().requires_grad_()
        truth = F.log_softmax(wide, -1).gather(-1, tokens[..., None]).sum()
        (expected,) = torch.autograd.grad(truth, wide)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_tokens_that_do_not_fit_are_refused() -> None:
    x = logits(3, 7)[0]
    with pytest.raises(IndexError, match="7"):
        losses.token_log_probs(x, torch.tensor([0, 7, 1]))
    with pytest.raises(TypeError, match=r"labels has dtype .*; accepted: integers"):
        losses.cross_entropy_loss(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"tokens has shape \(2,\); accepted: \(3,\)"):
        losses.token_log_probs(x, torch.zeros(2, dtype=torch.int64))
    unknown: Any = "batchmean"
    with pytest.raises(ValueError, match="reduction is 'batchmean'"):
        losses.cross_entropy_loss(x, torch.zeros(3, dtype=torch.int64), reduction=unknown)
    assert losses.cross_entropy_loss(x, torch.full((3,), -100)).isnan()
    assert losses.token_log_probs(x[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_cross_entropy_loss_under_compile_and_autocast() -> None:
    x = logits(8, 501)[0].requires_grad_()
    labels = torch.arange(8)

    def loss(rows: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return losses.cross_entropy_loss(rows * 2.0, labels)

    value = loss(x)
    (gradient,) = torch.autograd.grad(value, x)
    again = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (compiled,) = torch.autograd.grad(again, x)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(compiled, gradient)
    torch.testing.assert_close(value, F.cross_entropy(2.0 * x, labels))

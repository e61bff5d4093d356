"""Values with gradients of arrays on a device, against the float64 reference."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
from test_gradients import (
    EXTREME,
    NAMES,
    logits,
    rows_of,
    sides_of,
    strange_rows,
    true_gradient,
    true_value,
)

import klfast


def both(device: Any, name: str, *rows: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The value and the gradients with respect to every row, fetched."""
    wrt: Any = "p" if name == "entropy" else "both"
    arrays = [device.asarray(x) for x in rows]
    value, gradient = klfast.value_and_grad(name, *arrays, wrt=wrt, **options)
    gradients = gradient if wrt == "both" else (gradient,)
    assert all(isinstance(x, device.ndarray) for x in (value, *gradients))
    return value.get(), [x.get() for x in gradients]


def assert_close(gradient: Any, expected: Any) -> None:
    """To 1e-5 of the largest entry of each row."""
    size = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(gradient - expected) <= 1e-5 * size).all()


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-4), ("float64", 1.0)])
@pytest.mark.parametrize("name", [*NAMES, *EXTREME[:3]])
def test_gradients_are_those_of_the_reference(
    name: str, noise: float, dtype: str, device: Any
) -> None:
    p, q = strange_rows(noise, dtype)
    value, gradients = both(device, name, *rows_of(name, p, q), temperature=1.5)
    np.testing.assert_allclose(value, true_value(name, p, q, 1.5), rtol=3e-6, atol=1e-11)
    for wrt, gradient in zip(sides_of(name), gradients, strict=True):
        assert gradient.dtype == dtype
        expected = true_gradient(name, p, q, wrt, temperature=1.5)
        nan = np.isnan(expected)
        assert (np.isnan(gradient) == nan).all()
        side = {"p": p, "q": q}[wrt]
        assert (gradient[~nan & (side == -np.inf)] == 0.0).all()
        scale = np.abs(np.where(nan, 0.0, expected)).max(-1, keepdims=True)
        error = np.abs(np.where(nan, 0.0, gradient - expected))
        relative, floor = (1e-5, 1e-11) if dtype == "float32" else (1e-11, 1e-15)
        if name == "tv" and dtype == "float32":
            floor = 6e-8  # float32 takes the mean from 1/2 or -1/2, which may be nearly all of that
        assert (error <= relative * scale + floor).all(), (error / (scale + 1e-300)).max()
        if name not in ("cross_entropy", "entropy", "renyi:inf"):
            assert (gradient[9] == 0.0).all()  # the rows are equal


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32")], ids="/".join)
@pytest.mark.parametrize("name", ["kl", "js:0.2", "renyi:2"])
def test_gradients_have_the_dtype_of_their_logits(
    name: str, dtypes: tuple[str, str], device: Any
) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = [np.dtype(getattr(ml_dtypes, dtype, dtype)) for dtype in dtypes]
    p, q = (x.astype(kind) for x, kind in zip(logits(0.1, 3, 77), kinds, strict=True))
    _, gradients = both(device, name, p, q)
    for wrt, gradient, kind in zip("pq", gradients, kinds, strict=True):
        assert gradient.dtype == kind
        expected = true_gradient(name, p.astype(np.float64), q.astype(np.float64), wrt)
        unit = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(kind.name, 1e-5)
        error = np.abs(gradient.astype(np.float64) - expected)
        assert (error <= unit * np.abs(expected) + 2.0**-24).all()


def test_scale_where_and_vocab_size(device: Any) -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=6, width=60))
    p[5] = np.nan
    where = np.array([True, False, True, True, True, True])
    scale = np.array([1.0, 2.0, -0.5, 0.0, 3.0, 0.0])
    expected = true_gradient("kl", p[:, :50], q[:, :50], "q") * scale[:, None] / math.log(2)
    expected[[1, 3, 5]] = 0.0  # a scale of 0 gives 0, whatever the row holds
    on_device = [device.asarray(x) for x in (p, q)]
    for factors in (scale, device.asarray(scale), device.asarray(scale.astype(np.float32))):
        value, gradient = klfast.value_and_grad(
            "kl", *on_device, grad_scale=factors, where=where, vocab_size=50, base=2
        )
        assert np.isnan(value.get()[[1, 5]]).all()
        assert_close(gradient.get()[:, :50], expected)
        assert (gradient.get()[[1, 3, 5]] == 0.0).all()
        assert (gradient.get()[:, 50:] == 0.0).all()
    _, gradient = klfast.value_and_grad("kl", *on_device, grad_scale=1 / 6)
    assert_close(gradient.get()[:5], true_gradient("kl", p, q, "q")[:5] / 6)


@pytest.mark.parametrize("name", ["kl", "js", "entropy"])
def test_gradients_may_overwrite_the_logits(name: str, device: Any) -> None:
    rows = rows_of(name, *strange_rows(0.2, "float32"))
    value, apart = both(device, name, *rows)
    own = [device.asarray(x.copy()) for x in rows]
    wrt: Any = "p" if name == "entropy" else "both"
    out = own[0] if name == "entropy" else tuple(own)
    again, inside = klfast.value_and_grad(name, *own, wrt=wrt, out=out)
    np.testing.assert_array_equal(again.get(), value)
    for array, expected in zip(own, apart, strict=True):
        np.testing.assert_array_equal(array.get(), expected)
    assert inside is out or all(one is other for one, other in zip(inside, own, strict=True))


def test_any_layout(device: Any) -> None:
    p, q = (x.astype(np.float32).reshape(2, 3, 40) for x in logits(0.2, rows=6, width=40))
    expected = true_gradient("js", p, q, "q")
    moved = [device.asarray(np.ascontiguousarray(np.moveaxis(x, -1, 0))) for x in (p, q)]
    room = device.asarray(np.zeros((2, 40, 3), np.float32))
    out = room.transpose(1, 0, 2)
    _, gradient = klfast.value_and_grad("js", *moved, axis=0, out=out)
    assert gradient is out
    assert_close(np.moveaxis(out.get(), 0, -1), expected)
    one, many = device.asarray(p[0, 0]), device.asarray(q)
    _, gradient = klfast.value_and_grad("kl", one, many)
    assert_close(gradient.get(), true_gradient("kl", p[0, 0], q, "q"))
    assert klfast.value_and_grad("kl", many[:0], many[:0]).gradient.shape == (0, 3, 40)


def test_what_is_refused(device: Any) -> None:
    p, q = (device.asarray(x.astype(np.float32)) for x in logits(0.2, rows=3, width=8))
    with pytest.raises(TypeError, match="grad_scale has dtype bool; accepted: real numbers"):
        klfast.value_and_grad("kl", p, q, grad_scale=device.asarray(np.ones(3, bool)))
    with pytest.raises(ValueError, match=r"grad_scale has shape \(2,\); accepted: \(3,\)"):
        klfast.value_and_grad("kl", p, q, grad_scale=device.asarray(np.ones(2)))
    with pytest.raises(ValueError, match=r"q has shape .* rows are repeated"):
        klfast.value_and_grad("kl", p, q[:1])
    with pytest.raises(ValueError, match="out overlaps p without being it"):
        klfast.value_and_grad("kl", p, q, out=p)
    with pytest.raises(TypeError, match="out is a NumPy array on cpu"):
        klfast.value_and_grad("kl", p, q, out=np.zeros((3, 8), np.float32))


@pytest.mark.parametrize("name", ["kl", "js", "entropy"])
def test_gradients_of_arrays_on_the_host(name: str, device: Any, monkeypatch: Any) -> None:
    """In chunks, over the logits or not, as on the device but for how rows are aligned."""
    streaming = importlib.import_module("klfast.kernels.cuda.streaming")
    monkeypatch.setattr(streaming, "CHUNK", 3000)
    rows = rows_of(name, *strange_rows(0.2, "float32"))
    wrt: Any = "p" if name == "entropy" else "both"
    where, scale = np.arange(12) % 5 > 0, np.linspace(-1.0, 2.0, 12)
    options: Any = {"wrt": wrt, "where": where, "grad_scale": scale, "vocab_size": 100}
    on_device = [device.asarray(x) for x in rows]
    value, gradient = klfast.value_and_grad(name, *on_device, **options)
    expected = [x.get() for x in (gradient if wrt == "both" else (gradient,))]
    for own in (False, True):
        given = [x.copy() for x in rows]
        out = None if not own else given[0] if name == "entropy" else tuple(given)
        found, gradients = klfast.value_and_grad(name, *given, backend="cuda", out=out, **options)
        np.testing.assert_allclose(found, value.get(), rtol=1e-6)
        for one, other in zip(gradients if wrt == "both" else (gradients,), expected, strict=True):
            np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
            assert_close(np.nan_to_num(one), np.nan_to_num(other))


def test_blocks_share_few_wide_rows(device: Any) -> None:
    p, q = (x.astype(np.float32) for x in logits(0.2, rows=3, width=9001))
    own = device.asarray(p), device.asarray(q)
    value, gradients = klfast.value_and_grad("kl", *own, wrt="both", out=own)
    np.testing.assert_allclose(value.get(), true_value("kl", p, q), rtol=2e-6)
    for wrt, gradient in zip("pq", gradients, strict=True):
        assert_close(gradient.get(), true_gradient("kl", p, q, wrt))


def test_where_rows_are_kept(device: Any) -> None:
    """As few blocks a row as have room, and as many as leave no multiprocessor idle."""
    launches = importlib.import_module("klfast.kernels.cuda.launches")
    here = importlib.import_module("klfast.kernels.cuda.loader").machine(0)
    arrays = importlib.import_module("klfast._arrays")
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for count in (1, 40, 10 * here.multiprocessors):
            for width in (1, 2048, 2049, 5000, 32_000, 128_256, 262_144):
                rows = arrays.Rows(
                    None, 0, dtype, count, width, size, size * width, None, "logits", 1.0
                )
                parts = launches.whole(width, launches.GRADIENT_SHAPE[0])
                at = launches.residence(0, rows, rows, launches.GRADIENT_SHAPE, parts)
                assert at.cluster == 1 or (here.clusters and width > launches.SHORT)
                assert at.shared + 2 * at.threads <= here.shared
                assert (at.shared + 2 * at.threads) * at.blocks <= here.shared_together
                kept = at.cluster * at.resident >= width
                assert kept or (at.blocks == 1 and (at.cluster == 8 or not here.clusters))
                if count < here.multiprocessors and kept and here.clusters and width > 8192:
                    assert at.cluster > 1


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32_000, 128_256, 262_144])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_rows_on_a_gpu(dtype: str, width: int) -> None:
    """Enough of them that all blocks go on to others, and over the logits."""
    cupy = pytest.importorskip("cupy")
    kind = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype, dtype))
    if not klfast.backends()["cuda"]:
        pytest.skip("no CUDA")
    p, q = (np.tile(x.astype(kind), (100, 1)) for x in logits(0.2, rows=4, width=width))
    wrt: Any
    for name, wrt in (("kl", "q"), ("js", "both")):
        own = cupy.asarray(p), cupy.asarray(q)
        out = own if wrt == "both" else own[1]
        value, found = klfast.value_and_grad(name, *own, wrt=wrt, out=out)
        few = [x[:4].astype(np.float64) for x in (p, q)]
        np.testing.assert_allclose(
            value.get().reshape(100, 4), [true_value(name, few[0], few[1])] * 100, 2e-6
        )
        sides = {"p": found[0], "q": found[1]} if wrt == "both" else {"q": found}
        for side, gradient in sides.items():
            got = gradient.get().reshape(100, 4, width)
            assert (got == got[0]).all()
            expected = true_gradient(name, few[0], few[1], side)
            size = np.abs(expected).max(-1, keepdims=True)
            unit = 1e-5 if dtype == "float32" else 2.0**-8
            assert (np.abs(got[0].astype(np.float64) - expected) <= unit * size).all()


@pytest.mark.gpu
def test_functions_and_losses_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or not klfast.backends()["cuda"]:
        pytest.skip("no CUDA")
    functions = importlib.import_module("klfast.torch")
    p, q = (torch.from_numpy(x.astype(np.float32)) for x in logits(0.2, rows=6, width=60))
    found = []
    for device in ("cpu", "cuda"):
        teacher = p.to(device)
        student = q.to(device).requires_grad_()
        loss = functions.distillation_loss(student, teacher, divergence="js", temperature=2.0)
        loss.backward()
        hidden = teacher[:, :8].clone().requires_grad_()
        head = student.detach()[:, :8].clone()
        linear = functions.linear_distillation_loss(hidden, head, hidden.detach(), 1.1 * head)
        linear.backward()
        found.append([x.detach().cpu() for x in (loss, student.grad, linear, hidden.grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)

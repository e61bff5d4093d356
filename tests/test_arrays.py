"""Arrays of every kind are read where they lie, and results are of the same kind."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

import klfast
from klfast._arrays import (
    NATIVE,
    Rows,
    View,
    _capsule_pointer,
    _DLTensor,
    decode,
    encode,
    memory,
    place_of,
    rows_of,
    view_of,
)

ml_dtypes = pytest.importorskip("ml_dtypes")
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


def to_numpy(x: NDArray[Any], dtype: str) -> Any:
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def to_torch(x: NDArray[Any], dtype: str) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(x.copy()).to(getattr(torch, dtype))


def to_jax(x: NDArray[Any], dtype: str) -> Any:
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray(x, dtype=getattr(jax.numpy, dtype))


class Exporter:
    """An array of some other library, which offers DLPack and nothing else."""

    def __init__(self, array: NDArray[Any], device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class StandardArray(Exporter):
    """The same, of a library that follows the array API standard."""

    def __array_namespace__(self) -> Any:
        return StandardNamespace


class StandardNamespace:
    @staticmethod
    def from_dlpack(x: NDArray[Any]) -> StandardArray:
        return StandardArray(x)


def to_exporter(x: NDArray[Any], dtype: str) -> Any:
    return Exporter(x.astype(dtype))


KINDS = [
    pytest.param(convert, dtype, id=f"{library}-{dtype}")
    for library, convert, dtypes in [
        ("numpy", to_numpy, ["float16", "bfloat16", "float32", "float64"]),
        ("torch", to_torch, ["float16", "bfloat16", "float32", "float64"]),
        ("jax", to_jax, ["float16", "bfloat16", "float32"]),
        ("dlpack", to_exporter, ["float16", "float32", "float64"]),
    ]
    for dtype in dtypes
]


def plain(x: Any) -> NDArray[Any]:
    """Any result as NumPy."""
    array: NDArray[Any] = np.array(x.tolist() if hasattr(x, "tolist") else x)
    return array


@pytest.mark.parametrize(("convert", "dtype"), KINDS)
def test_every_kind_is_read_exactly(
    convert: Callable[[Any, str], Any], dtype: str, pair: Pair, backend: Any
) -> None:
    p, q = convert(pair[0], dtype), convert(pair[1], dtype)
    exact = [to_numpy(x, dtype).astype(np.float64) for x in pair]
    got = klfast.kl_divergence(p, q, backend=backend)
    expected = klfast.reference.kl_divergence(*exact)
    np.testing.assert_allclose(plain(got), expected, rtol=2e-6)
    kind = np.ndarray if isinstance(p, Exporter) else type(p)
    assert isinstance(got, kind)
    wanted = "float64" if dtype == "float64" else "float32"
    assert str(got.dtype).removeprefix("torch.") == wanted


@pytest.mark.parametrize(("convert", "dtype"), KINDS)
def test_log_softmax_keeps_the_kind(
    convert: Callable[[Any, str], Any], dtype: str, pair: Pair, backend: Any
) -> None:
    x = convert(pair[0], dtype)
    got = klfast.log_softmax(x, backend=backend)
    expected = klfast.reference.log_softmax(to_numpy(pair[0], dtype).astype(np.float64))
    np.testing.assert_allclose(plain(got), expected, rtol=2e-6)


def test_a_standard_library_gets_its_own_arrays_back(pair: Pair) -> None:
    p, q = map(StandardArray, pair)
    got = klfast.kl_divergence(p, q, backend="reference")
    assert isinstance(got, StandardArray)
    np.testing.assert_allclose(got.array, klfast.reference.kl_divergence(*pair), rtol=2e-6)
    comparison = klfast.compare(p, q, "kl", backend="reference")
    assert comparison.to_dict() == {"kl": got.array.tolist()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_result_dtypes(dtype: str, pair: Pair) -> None:
    torch = pytest.importorskip("torch")
    exact = klfast.reference.kl_divergence(*pair)
    rounded = torch.from_numpy(exact).to(getattr(torch, dtype))
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    of_numpy = klfast.kl_divergence(*pair, dtype=numpy_dtype, backend="reference")
    assert of_numpy.dtype == numpy_dtype
    np.testing.assert_array_equal(of_numpy.astype(np.float64), rounded.double().numpy())
    tensors = [torch.from_numpy(x) for x in pair]
    for name in (dtype, getattr(torch, dtype)):
        of_torch = klfast.kl_divergence(*tensors, dtype=name, backend="reference")
        assert of_torch.dtype == getattr(torch, dtype)
        assert torch.equal(of_torch, rounded)


def test_jax_results_stay_on_the_device_of_the_input(pair: Pair) -> None:
    jax = pytest.importorskip("jax")
    p, q = (jax.device_put(x, jax.devices("cpu")[0]) for x in pair)
    got = klfast.kl_divergence(p, q, dtype=jax.numpy.bfloat16, backend="reference")
    assert got.dtype == jax.numpy.bfloat16
    assert got.device == p.device


def test_jax_arrays_that_are_still_being_computed(pair: Pair) -> None:
    jax = pytest.importorskip("jax")
    p, q = map(jax.numpy.asarray, pair)

    slowly = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, y: y + 0.01, x))
    moved = slowly(p)
    got = klfast.kl_divergence(moved, q, backend="reference")
    np.testing.assert_allclose(plain(got), klfast.reference.kl_divergence(*pair), rtol=1e-4)


def test_no_result_loses_a_gradient_in_silence(pair: Pair) -> None:
    torch = pytest.importorskip("torch")
    p, q = (torch.from_numpy(x) for x in pair)
    expected = klfast.kl_divergence(p, q, backend="reference")
    wanted = q.clone().requires_grad_()
    calls: list[Callable[[], Any]] = [
        lambda: klfast.kl_divergence(p, wanted),
        lambda: klfast.entropy(wanted),
        lambda: klfast.log_softmax(wanted),
        lambda: klfast.token_log_probs(wanted, 0),
        lambda: klfast.token_log_probs(wanted, 0, return_entropy=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"requires a gradient, .*\.detach\(\)"):
            call()
    with torch.no_grad():
        got = klfast.kl_divergence(p, wanted, backend="reference")
    assert torch.equal(got, expected)
    assert not got.requires_grad
    # None of these is taken for a loss.
    assert torch.equal(klfast.compare(p, wanted, "kl", backend="reference")["kl"], expected)
    assert torch.equal(klfast.value_and_grad("kl", p, wanted, backend="reference").value, expected)


LAYOUTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "contiguous": lambda x: x.copy(),
    "Fortran order": np.asfortranarray,
    "reversed vocabulary": lambda x: x[..., ::-1].copy()[..., ::-1],
    "reversed batch": lambda x: x[::-1].copy()[::-1],
    "every other entry": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "every third row": lambda x: np.repeat(x, 3, 1)[:, ::3],
    "transposed batch": lambda x: x.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "part of wider rows": lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "subclass": lambda x: x.view(type("Subclass", (np.ndarray,), {})),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(layout: str, pair: Pair, backend: Any) -> None:
    p, q = pair
    expected = klfast.kl_divergence(p, q, backend=backend)
    strange = LAYOUTS[layout](p)
    np.testing.assert_array_equal(strange, p)
    kept = strange.copy()
    got = klfast.kl_divergence(strange, q, backend=backend)
    np.testing.assert_allclose(got, expected, rtol=5e-7)  # other strides may take other kernels
    np.testing.assert_array_equal(strange, kept)


def test_memory_mapped_files(tmp_path: Path, pair: Pair, backend: Any) -> None:
    np.save(tmp_path / "p.npy", pair[0])
    p = np.load(tmp_path / "p.npy", mmap_mode="r")
    got = klfast.kl_divergence(p, pair[1], backend=backend)
    np.testing.assert_array_equal(got, klfast.kl_divergence(*pair, backend=backend))
    assert type(got) is np.ndarray


def test_one_row_against_many(pair: Pair, backend: Any) -> None:
    p, q = pair
    got = klfast.kl_divergence(p[0, 0], q, backend=backend)
    assert got.shape == q.shape[:-1]
    full = np.broadcast_to(p[0, 0], q.shape).copy()
    np.testing.assert_array_equal(got, klfast.kl_divergence(full, q, backend=backend))
    cross = klfast.kl_divergence(p[:, :1], q[:1], backend=backend)
    assert cross.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            one = klfast.kl_divergence(p[i, 0], q[0, j], backend=backend)
            assert one == cross[i, j]


def test_a_batch_of_one_row_and_of_none(pair: Pair, backend: Any) -> None:
    p, q = pair
    one = klfast.kl_divergence(p[0, 0], q[0, 0], backend=backend)
    assert isinstance(one, np.float32)
    assert one == klfast.kl_divergence(p, q, backend=backend)[0, 0]
    assert klfast.kl_divergence(p[:0], q[:0], backend=backend).shape == (0, 4)
    assert klfast.kl_divergence(p[:0], q[:1], backend=backend).shape == (0, 4)
    assert klfast.log_softmax(p[:0], backend=backend).shape == (0, 4, 50)


def test_more_than_2_to_the_31_entries(tmp_path: Path, backend: Any) -> None:
    """pytorch#85786: the last rows were wrong where rows * V passed 2^31."""
    count, width = 70_000, 32_000
    p = np.memmap(tmp_path / "p", np.float32, "w+", shape=(count, width))  # sparse
    p[-1] = np.linspace(0, 5, width)
    q = np.zeros((1, width), np.float32)
    where = np.zeros(count, bool)
    where[[0, -1]] = True
    got = klfast.kl_divergence(p, q, where=where, backend=backend)
    expected = klfast.reference.kl_divergence(np.asarray(p[-1]), q[0])
    assert got[0] == 0
    np.testing.assert_allclose(got[-1], expected, rtol=2e-6)
    assert np.isnan(got[1:-1]).all()


def test_an_input_larger_than_memory_is_not_copied(backend: Any) -> None:
    p = np.broadcast_to(np.float32(3), (1 << 20, 1 << 20))
    q = as_strided(np.arange(64, dtype=np.float32), (1 << 20, 64), (0, 4))
    where = np.zeros(1 << 20, bool)
    where[5] = True
    got = klfast.kl_divergence(p, q, where=where, vocab_size=64, backend=backend)
    assert got[5] == klfast.kl_divergence(p[0, :64], q[0], backend=backend)


@pytest.mark.parametrize("convert", [to_numpy, to_torch, to_jax, to_exporter])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backend_gets_the_memory_of_the_array_itself(
    convert: Callable[[Any, str], Any], dtype: str, pair: Pair, recorder: Any
) -> None:
    if convert is to_exporter and dtype == "bfloat16":
        pytest.skip("NumPy, which stands in for the other library, does not export bfloat16")
    p, q = convert(pair[0], dtype), convert(pair[1], dtype)
    spy = recorder()
    klfast.kl_divergence(p, q)
    (call,) = spy.calls
    for rows, x in ((call["p"], p), (call["q"], q)):
        if convert is to_torch:
            address = x.data_ptr()
        elif convert is to_jax:
            address = x.unsafe_buffer_pointer()
        else:
            address = (x if convert is to_numpy else x.array).ctypes.data
        assert rows.address == address
        assert (rows.dtype, rows.count, rows.width) == (dtype, 12, 50)


def test_memory_lives_as_long_as_its_rows() -> None:
    """A temporary may have no owner but the view while a backend reads it."""
    jax = pytest.importorskip("jax")
    for x in (np.full(1000, 7.0, np.float32), jax.numpy.full(1000, 7.0)):
        view = view_of(x, place_of(x, "x"), "x")
        del x
        clutter = [np.zeros(1000, np.float32) for _ in range(10)]
        assert (memory(view) == 7).all()
        del clutter


def rows_as_numpy(rows: Rows) -> NDArray[np.float64]:
    """What a backend sees."""
    result = np.empty((rows.count, rows.width))
    for number in range(rows.count):
        step = number * rows.row_stride if rows.offsets is None else int(rows.offsets[number])
        view = View(rows.owner, rows.address + step, rows.dtype, (rows.width,), (rows.stride,))
        result[number] = decode(memory(view), rows.dtype)
    return result


@st.composite
def strided_arrays(draw: st.DrawFn) -> NDArray[np.float32]:
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    base = np.arange(math.prod(n * 2 for n in shape), dtype=np.float32)
    x = base.reshape([n * 2 for n in shape])
    for axis, length in enumerate(shape):
        step = draw(st.sampled_from([1, 2, -1, -2]))
        x = np.moveaxis(np.moveaxis(x, axis, 0)[::step][:length], 0, axis)
    return x.transpose(draw(st.permutations(range(len(shape)))))


@given(strided_arrays(), st.data())
@settings(max_examples=200, deadline=None)
def test_rows_describe_any_strided_array(x: NDArray[np.float32], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-x.ndim, -1))
    batch = np.moveaxis(x, axis, -1).shape[:-1]
    extra = tuple(data.draw(st.lists(st.integers(1, 2), max_size=2)))
    shape = extra + tuple(data.draw(st.integers(1, 3)) if n == 1 else n for n in batch)
    width = data.draw(st.integers(1, x.shape[axis]))
    view = view_of(x, place_of(x, "x"), "x")
    rows = rows_of(view, axis, shape, width, "logits", 1.0)
    moved = np.moveaxis(x, axis, -1)[..., :width]
    expected = np.broadcast_to(moved, (*shape, width)).reshape(-1, width)
    np.testing.assert_array_equal(rows_as_numpy(rows), expected)


@given(st.floats(1e-37, 3e38), st.sampled_from([1, -1]))
def test_bfloat16_is_rounded_to_the_nearest(size: float, sign: int) -> None:
    value = np.array(sign * size)
    got = float(decode(encode(value, "bfloat16"), "bfloat16"))
    _, exponent = math.frexp(size)
    assert abs(got - value) <= 2.0 ** (exponent - 9)  # half of the last of 8 bits


def test_bfloat16_rounding_of_a_tie_that_float32_would_move() -> None:
    tie = 1 + 2.0**-8
    assert encode(np.array(tie), "bfloat16") == 0x3F80  # to even
    assert encode(np.array(tie + 2.0**-40), "bfloat16") == 0x3F81  # float32 would drop the rest
    assert encode(np.array(np.inf), "bfloat16") == 0x7F80
    assert encode(np.array(1e300), "bfloat16") == 0x7F80
    assert np.isnan(decode(encode(np.array(np.nan), "bfloat16"), "bfloat16"))


class TestRefused:
    """What cannot be read says so, instead of being read wrongly."""

    @pytest.fixture
    def q(self) -> NDArray[np.float32]:
        return np.zeros((2, 3), np.float32)

    def refuse(self, p: Any, q: Any, error: type[Exception], *parts: str) -> None:
        with pytest.raises(error) as caught:
            klfast.kl_divergence(p, q, backend="reference")
        for part in parts:
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        "dtype",
        [
            *("int32", "int64", "uint8", "bool", "complex64"),
            pytest.param(
                "longdouble",
                marks=pytest.mark.skipif(
                    np.dtype("longdouble").itemsize == 8, reason="it is float64 here"
                ),
            ),
        ],
    )
    def test_numbers_that_are_no_logits(self, dtype: str, q: Any) -> None:
        self.refuse(q.astype(dtype), q, TypeError, "p has dtype", "accepted: float16, bfloat16")

    @pytest.mark.parametrize("library", ["torch", "jax"])
    def test_integers_of_other_libraries(self, library: str, q: Any) -> None:
        convert = {"torch": to_torch, "jax": to_jax}[library]
        self.refuse(
            convert(q, "int32"), convert(q, "float32"), TypeError, "p has dtype int32", "accepted"
        )

    def test_the_byte_order_of_other_machines(self, q: Any) -> None:
        swapped = q.astype(q.dtype.newbyteorder("S"))
        assert swapped.dtype not in NATIVE
        self.refuse(swapped, q, TypeError, "byte order", "newbyteorder")

    def test_unaligned_entries(self, q: Any) -> None:
        shifted = np.frombuffer(b"\0" * 25, np.float32, count=6, offset=1).reshape(2, 3)
        self.refuse(shifted, q, ValueError, "p has float32", "multiples of 4", "np.require")

    def test_fields_of_packed_records(self, q: Any) -> None:
        records = np.zeros((2, 3), np.dtype([("flag", "u1"), ("logit", "f4")]))
        self.refuse(records["logit"], q, ValueError, "aligned")

    def test_masked_arrays(self, q: Any) -> None:
        self.refuse(np.ma.masked_equal(q, 0), q, TypeError, "mask", "where=")

    @pytest.mark.parametrize("given", [[[1.0, 2, 3]], (1.0, 2.0), 1.5, None, "logits", {}])
    def test_what_is_no_array(self, given: Any, q: Any) -> None:
        self.refuse(given, q, TypeError, "p is of type", type(given).__name__, "accepted: NumPy")

    def test_nothing_beside_an_array(self, q: Any) -> None:
        with pytest.raises(TypeError, match="q is of type NoneType; accepted: NumPy"):
            klfast.kl_divergence(q, None)

    @pytest.mark.parametrize(
        ("given", "way"),
        [
            ([1.0, 2.0], "(np.asarray(p, np.float64))"),
            (SimpleNamespace(logits=1), "(p.logits)"),  # the output of a model of transformers
            (SimpleNamespace(to_numpy=1), "(p.to_numpy())"),  # a table of pandas
        ],
    )
    def test_what_is_nearly_an_array(self, given: Any, way: str, q: Any) -> None:
        self.refuse(given, q, TypeError, "p is of type", way)

    def test_a_single_number(self, q: Any) -> None:
        self.refuse(np.array(1.0), q, ValueError, "p is a single number", "(..., V)")

    def test_a_vector_of_numbers(self, q: Any) -> None:
        class Lanes(Exporter):
            def __dlpack__(self, **options: Any) -> Any:
                capsule = self.array.__dlpack__()
                _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor")).lanes = 4
                return capsule

        self.refuse(Lanes(q.copy()), Exporter(q), TypeError, "p has dtype float32x4")

    def test_a_jax_array_inside_jit(self, q: Any) -> None:
        jax = pytest.importorskip("jax")
        with pytest.raises(TypeError, match=r"p is being traced .* jax\.jit"):
            jax.jit(klfast.kl_divergence)(jax.numpy.asarray(q), jax.numpy.asarray(q))

    def test_a_sparse_tensor(self, q: Any) -> None:
        tensor = to_torch(q, "float32")
        self.refuse(tensor.to_sparse(), tensor, TypeError, "p is", "sparse", "to_dense")

    def test_a_tensor_whose_sign_is_pending(self, q: Any) -> None:
        torch = pytest.importorskip("torch")
        pending = torch.ones(2, 3, dtype=torch.complex64).conj().imag
        assert pending.is_neg()
        self.refuse(pending, to_torch(q, "float32"), TypeError, "resolve_neg")

    def test_two_libraries(self, q: Any) -> None:
        self.refuse(q, to_torch(q, "float32"), TypeError, "p is a NumPy", "q is a PyTorch")
        self.refuse(to_jax(q, "float32"), q, TypeError, "p is a JAX", "q is a NumPy")

    def test_two_devices(self, q: Any) -> None:
        self.refuse(
            Exporter(q), Exporter(q, (2, 0)), TypeError, "on cpu", "on cuda:0", "one device"
        )
        self.refuse(Exporter(q, (2, 0)), Exporter(q, (2, 1)), TypeError, "cuda:0", "cuda:1")


class FirstExporter(Exporter):
    """An array of a library that knows the first DLPack protocol only."""

    def __dlpack__(self) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


def test_both_dlpack_protocols(pair: Pair) -> None:
    p, q = pair
    expected = klfast.kl_divergence(p[:, ::2], q[:, ::2], backend="reference")
    p.flags.writeable = False  # which only the newer protocol exports
    for second in (Exporter(q[:, ::2]), FirstExporter(q[:, ::2])):
        got = klfast.kl_divergence(Exporter(p[:, ::2]), second, backend="reference")
        np.testing.assert_array_equal(got, expected)


def test_pinned_host_memory_is_host_memory(pair: Pair) -> None:
    p, q = (Exporter(x, (3, 0)) for x in pair)
    got = klfast.kl_divergence(p, q, backend="reference")
    np.testing.assert_array_equal(got, klfast.kl_divergence(*pair, backend="reference"))


def test_no_library_is_imported_for_the_user() -> None:
    code = (
        "import sys, numpy as np, klfast\n"
        "x = np.zeros((2, 3), np.float32)\n"
        "klfast.compare(x, x, backend='reference')\n"
        "print([m for m in ('torch', 'jax', 'cupy', 'ml_dtypes', 'numba') if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

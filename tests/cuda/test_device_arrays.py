"""Arrays on a device: read there, with results of the same kind there, and nobody waits."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from test_arrays import Exporter

import klfast
from klfast import reference
from klfast._arrays import STORAGE

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


#: On the device itself: the twin has no graphs.
on_a_gpu = pytest.mark.parametrize(
    "device", [pytest.param("real", marks=pytest.mark.gpu)], indirect=True
)


def on_device(device: Any, *arrays: Any) -> list[Any]:
    return [device.asarray(np.asarray(x)) for x in arrays]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: str, pair: Pair, device: Any) -> None:
    p, q = (x.astype(DTYPES[dtype]) for x in pair)
    got = klfast.kl_divergence(*on_device(device, p, q))
    assert isinstance(got, device.ndarray)
    assert got.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_allclose(got.get(), reference.kl_divergence(p, q), rtol=2e-6)
    stored = klfast.kl_divergence(*on_device(device, *pair), dtype=dtype)
    expected = reference.kl_divergence(*pair)
    assert stored.dtype == DTYPES[dtype]
    rtol = {"float16": 1e-3, "bfloat16": 4e-3}.get(dtype, 2e-6)
    np.testing.assert_allclose(stored.get().astype(np.float64), expected, rtol=rtol)


# Of the function that copies to the device, and an array of shape (3, 4, 50).
LAYOUTS: dict[str, Any] = {
    "Fortran order": lambda put, x: put(x.T.copy()).T,
    "reversed vocabulary": lambda put, x: put(x[..., ::-1].copy())[..., ::-1],
    "reversed batch": lambda put, x: put(x[::-1].copy())[::-1],
    "every other entry": lambda put, x: put(np.repeat(x, 2, -1))[..., ::2],
    "every third row": lambda put, x: put(np.repeat(x, 3, 1))[:, ::3],
    "transposed batch": lambda put, x: put(x.transpose(1, 0, 2).copy()).transpose(1, 0, 2),
    "part of wider rows": lambda put, x: put(np.concatenate([x, x], -1))[..., :50],
    "between other entries": lambda put, x: put(np.pad(x, ((0, 0), (0, 0), (3, 2))))[..., 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_layout(layout: str, dtype: str, pair: Pair, device: Any) -> None:
    p, q = (x.astype(dtype) for x in pair)
    strange = LAYOUTS[layout](device.asarray, p)
    np.testing.assert_array_equal(strange.get(), p)
    got = klfast.kl_divergence(strange, device.asarray(q), dtype="float64").get()
    np.testing.assert_allclose(got, reference.kl_divergence(p, q), rtol=2e-6)
    log_p = klfast.log_softmax(strange).get()
    np.testing.assert_allclose(log_p, reference.log_softmax(p), rtol=1e-6)


def test_any_axis(pair: Pair, device: Any) -> None:
    expected = reference.kl_divergence(*pair)
    for axis in (0, 1, -3):
        p, q = (device.asarray(np.ascontiguousarray(np.moveaxis(x, -1, axis))) for x in pair)
        np.testing.assert_allclose(klfast.kl_divergence(p, q, axis=axis).get(), expected, rtol=2e-6)


def test_broadcasting(pair: Pair, device: Any) -> None:
    p, q = pair
    expected = reference.kl_divergence(p[:, :1], q[:1])
    cross = klfast.kl_divergence(*on_device(device, p[:, :1], q[:1]))
    np.testing.assert_allclose(cross.get(), expected, rtol=2e-6)
    one = klfast.kl_divergence(*on_device(device, p[0, 0], q))
    np.testing.assert_allclose(one.get(), reference.kl_divergence(p[0, 0], q), rtol=2e-6)
    single = klfast.kl_divergence(*on_device(device, p[0, 0], q[0, 0]))
    assert single.shape == ()
    assert float(single) == pytest.approx(reference.kl_divergence(p[0, 0], q[0, 0]), rel=2e-6)


KEYWORDS: dict[str, dict[str, Any]] = {
    "base": {"base": 2},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": (0.7, 1.3)},
    "vocab_size": {"vocab_size": 31},
    "log_probs": {"input": "log_probs"},
    "mean": {"reduction": "mean"},
    "sum": {"reduction": "sum"},
    "where": {"where": np.arange(12).reshape(3, 4) % 5 != 1},
    "where, mean": {"where": np.arange(4) != 1, "reduction": "mean"},
    "no row": {"where": False, "reduction": "mean"},
    "no row, sum": {"where": False, "reduction": "sum"},
}


@pytest.mark.parametrize("keywords", KEYWORDS)
def test_keywords_mean_what_they_mean_on_the_host(keywords: str, pair: Pair, device: Any) -> None:
    options = {**KEYWORDS[keywords], "dtype": "float64"}
    expected = klfast.js_divergence(*pair, backend="reference", **options)
    got = klfast.js_divergence(*on_device(device, *pair), **options)
    assert got.shape == np.shape(expected)
    np.testing.assert_allclose(got.get(), expected, rtol=2e-6)
    p, q = on_device(device, *pair)
    comparison = klfast.compare(p, q, ["kl", "entropy_q"], **options)
    expected = klfast.compare(*pair, ["kl", "entropy_q"], backend="reference", **options)
    for name, values in comparison.items():
        np.testing.assert_allclose(values.get(), expected[name], rtol=2e-6)
    assert comparison.to_dict().keys() == expected.keys()


def test_probabilities(pair: Pair, device: Any) -> None:
    p, q = map(np.exp, pair)
    got = klfast.kl_divergence(*on_device(device, p, q), input="probs")
    np.testing.assert_allclose(got.get(), reference.kl_divergence(*pair), rtol=2e-6)


def test_no_rows(pair: Pair, device: Any) -> None:
    p, q = on_device(device, *(x[:0] for x in pair))
    assert klfast.kl_divergence(p, q).shape == (0, 4)
    assert klfast.log_softmax(p).shape == (0, 4, 50)
    assert float(klfast.kl_divergence(p, q, reduction="sum")) == 0
    assert math.isnan(float(klfast.kl_divergence(p, q, reduction="mean")))
    assert klfast.compare(p, q)["kl"].shape == (0, 4)


class TestOut:
    def test_is_written_and_returned(self, pair: Pair, device: Any) -> None:
        p, q = on_device(device, *pair)
        expected = reference.kl_divergence(*pair)
        room = device.asarray(np.zeros((4, 6)))
        out = room[:, ::2].T  # of any strides
        assert klfast.kl_divergence(p, q, out=out) is out
        np.testing.assert_allclose(out.get(), expected, rtol=2e-6)
        assert (room[:, 1::2].get() == 0).all()
        mean = device.asarray(np.zeros((), np.float32))
        assert klfast.kl_divergence(p, q, reduction="mean", out=mean) is mean
        assert float(mean) == pytest.approx(expected.mean(), rel=2e-6)

    def test_of_log_softmax(self, pair: Pair, device: Any) -> None:
        x = device.asarray(pair[0])
        out = device.asarray(np.zeros((50, 3, 4), np.float16))
        moved = device.asarray(np.ascontiguousarray(np.moveaxis(pair[0], -1, 0)))
        assert klfast.log_softmax(moved, axis=0, out=out) is out
        expected = np.moveaxis(reference.log_softmax(pair[0]), -1, 0)
        np.testing.assert_allclose(out.get(), expected, rtol=1e-3)
        with pytest.raises(ValueError, match="out overlaps x"):
            klfast.log_softmax(x, out=x)

    def test_must_be_on_the_device(self, pair: Pair, device: Any) -> None:
        p, q = on_device(device, *pair)
        with pytest.raises(TypeError, match=r"out is a NumPy array on cpu, .* CuPy array on"):
            klfast.kl_divergence(p, q, out=np.zeros((3, 4)))
        with pytest.raises(ValueError, match=r"out has shape \(4, 3\); accepted: \(3, 4\)"):
            klfast.kl_divergence(p, q, out=device.asarray(np.zeros((4, 3))))


class TestWhereAndTokens:
    tokens = np.arange(12).reshape(3, 4) * 4

    @pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
    def test_on_the_device_or_not(self, dtype: str, pair: Pair, device: Any) -> None:
        x = device.asarray(pair[0])
        where = np.arange(4) != 2
        expected = reference.token_log_probs(pair[0], self.tokens)
        expected[:, 2] = np.nan
        tokens = self.tokens.astype(dtype)
        for given in (tokens, tokens.tolist(), device.asarray(tokens)):
            for kept in (where, where.tolist(), device.asarray(where)):
                got = klfast.token_log_probs(x, given, where=kept)
                np.testing.assert_allclose(got.get(), expected, rtol=2e-6)
        one = klfast.token_log_probs(x, device.asarray(np.array(7, dtype)))
        np.testing.assert_allclose(one.get(), reference.token_log_probs(pair[0], 7), rtol=2e-6)

    def test_both_results(self, pair: Pair, device: Any) -> None:
        got = klfast.token_log_probs(device.asarray(pair[0]), self.tokens, return_entropy=True)
        expected = reference.token_log_probs(pair[0], self.tokens), reference.entropy(pair[0])
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one.get(), other, rtol=2e-6)

    def test_a_token_out_of_range_makes_its_row_nan(self, pair: Pair, device: Any) -> None:
        p, q = on_device(device, *pair)
        tokens = self.tokens.copy()
        tokens[1, 2], tokens[2, 0] = 50, -1
        bad = device.asarray(tokens)
        got = klfast.compare(p, q, ["kl", "nll_p", "delta_prob"], bad)
        for name in ("nll_p", "delta_prob"):
            assert np.argwhere(np.isnan(got[name].get())).tolist() == [[1, 2], [2, 0]]
        assert np.isfinite(got["kl"].get()).all()
        message = r"targets\[1, 2\] is 50; accepted: 0 to 49"
        with pytest.raises(IndexError, match=message):
            klfast.compare(p, q, "nll_p", bad, validate=True)
        with pytest.raises(IndexError, match=message):
            klfast.compare(p, q, "nll_p", tokens)  # on the host: always checked
        where = device.asarray((tokens >= 0) & (tokens < 50))
        got = klfast.compare(p, q, "nll_p", bad, where=where, validate=True)
        assert np.isnan(got["nll_p"].get()).sum() == 2

    def test_what_is_refused(self, pair: Pair, device: Any) -> None:
        x = device.asarray(pair[0])
        with pytest.raises(TypeError, match="tokens has dtype float64; accepted: integers"):
            klfast.token_log_probs(x, device.asarray(np.zeros((3, 4))))
        with pytest.raises(TypeError, match="where has dtype int64; accepted: boolean"):
            klfast.entropy(x, where=device.asarray(self.tokens))
        with pytest.raises(ValueError, match=r"where has shape \(5,\); accepted: \(3, 4\)"):
            klfast.entropy(x, where=device.asarray(np.ones(5, bool)))
        with pytest.raises(TypeError, match="tokens is a CuPy array on cuda:0, and the logits"):
            klfast.token_log_probs(pair[0], device.asarray(self.tokens))


class TestRefused:
    def test_mixed_places(self, pair: Pair, device: Any) -> None:
        with pytest.raises(TypeError, match="p is a CuPy array on cuda:0, q is a NumPy array on"):
            klfast.kl_divergence(device.asarray(pair[0]), pair[1])

    @pytest.mark.parametrize("name", ["cpu", "reference"])
    def test_backends_of_the_host(self, name: Any, pair: Pair, device: Any) -> None:
        p, q = on_device(device, *pair)
        with pytest.raises(klfast.BackendUnavailable, match=f"'{name}' reads memory of cpu, and"):
            klfast.kl_divergence(p, q, backend=name)

    def test_unknown_libraries(self, pair: Pair, device: Any) -> None:
        x = Exporter(pair[0], (2, 0))
        with pytest.raises(TypeError, match="p is a test_arrays array on cuda:0; accepted there"):
            klfast.kl_divergence(x, x)

    def test_integers(self, pair: Pair, device: Any) -> None:
        x = device.asarray(pair[0].astype(np.int32))
        with pytest.raises(TypeError, match="p has dtype int32; accepted: float16"):
            klfast.kl_divergence(x, x)


class TestStreams:
    def test_work_is_queued_on_the_current_stream(self, pair: Pair, device: Any) -> None:
        stream = device.cuda.Stream(non_blocking=True)
        if hasattr(device, "launches"):
            device.cuda.stream.deferred = True
        with stream:
            p, q = on_device(device, *pair)
            kept = device.asarray(np.arange(12).reshape(3, 4) % 2 == 0)
            got = klfast.kl_divergence(p[:, :1], q[:1], where=kept)
            if hasattr(device, "launches"):
                assert {launch.stream for launch in device.launches} == {stream.ptr}
                assert np.isnan(got._view).all()  # nothing has run
            del p, q, kept
        stream.synchronize()
        expected = reference.kl_divergence(pair[0][:, :1], pair[1][:1])
        keep = np.arange(12).reshape(3, 4) % 2 == 0
        with stream:
            np.testing.assert_allclose(got.get()[keep], expected[keep], rtol=2e-6)

    @on_a_gpu
    def test_a_graph_can_be_captured(self, pair: Pair, device: Any) -> None:
        stream = device.cuda.Stream(non_blocking=True)
        with stream:
            p, q = on_device(device, *pair)
            out = device.zeros((3, 4), np.float32)
            klfast.kl_divergence(p, q, out=out)
            stream.synchronize()
            stream.begin_capture()
            klfast.kl_divergence(p, q, out=out)
            graph = stream.end_capture()
            q[...] = p
            graph.launch(stream)
            assert (out.get() == 0).all()

    @on_a_gpu
    @pytest.mark.usefixtures("device")
    def test_a_graph_of_pytorchs_can_be_captured(self, pair: Pair, torch: Any) -> None:
        if not torch.cuda.is_available():
            pytest.skip("PyTorch has no CUDA")
        p, q = (torch.from_numpy(x).cuda() for x in pair)
        klfast.kl_divergence(p, q)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values = [klfast.kl_divergence(p, q) for _ in range(3)]
        q.copy_(p)
        graph.replay()
        assert all((value == 0).all() for value in values)

    def test_memory_of_a_captured_call_is_the_graphs(
        self, pair: Pair, twin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CuPy's pool could have to ask the driver for more, which a capture does not allow."""
        x = twin.asarray(pair[0])
        tokens = twin.asarray(np.zeros((3, 4), np.int32))
        out = klfast.token_log_probs(x, tokens)
        sizes: list[int] = []
        allocate = twin.cuda.malloc_async

        def watch(size: int) -> Any:
            sizes.append(size)
            return allocate(size)

        monkeypatch.setattr(twin.cuda.Stream, "is_capturing", lambda self: True)
        monkeypatch.setattr(twin.cuda, "malloc_async", watch)
        monkeypatch.setattr(twin.cuda.memory, "pool", None)
        klfast.token_log_probs(x, tokens, out=out)
        assert sizes == [12 * 8, 12 * 8 * 5]  # the tokens as int64, and five columns
        np.testing.assert_allclose(out.get(), reference.token_log_probs(pair[0], 0), rtol=2e-6)

    def test_one_launch_serves_the_measures_of_a_pair(self, pair: Pair, twin: Any) -> None:
        metrics = ["kl", "reverse_kl", "js", "tv", "hellinger2", "jeffreys", "top_p", "same_top"]
        p, q = on_device(twin, *pair)
        klfast.compare(p, q, metrics)
        names = [launch.name for launch in twin.launches]
        assert names.count("finish") == len(metrics)
        assert names[0] == "two_phase"
        assert set(names[1:]) == {"exact", "finish"}

    def test_more_measures_than_registers_have_room_for(self, pair: Pair, twin: Any) -> None:
        metrics = [
            "kl", "reverse_kl", "js", "tv", "hellinger2", "jeffreys", "renyi:2", "chi2",
            "alpha:0.3", "cross_entropy", "entropy_p", "entropy_q", "top_p", "same_top",
        ]  # fmt: skip
        p, q = on_device(twin, *pair)
        klfast.compare(p, q, metrics)
        names = [launch.name for launch in twin.launches]
        assert names.count("finish") == len(metrics)
        assert names.count("two_phase") == 2
        assert set(names) == {"two_phase", "exact", "finish"}


def test_memory_that_runs_out_is_an_error_and_the_next_call_works(pair: Pair, twin: Any) -> None:
    p, q = on_device(twin, *pair)
    twin.cuda.memory.limit = twin.cuda.memory.used
    with pytest.raises(MemoryError):
        klfast.kl_divergence(p, q)
    twin.cuda.memory.limit = None
    got = klfast.kl_divergence(p, q).get()
    np.testing.assert_allclose(got, reference.kl_divergence(*pair), rtol=2e-6)


def test_the_same_bits_every_time(pair: Pair, device: Any) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 6000)).astype(np.float32)
    p, q = on_device(device, *x)
    first = klfast.compare(p, q, ["kl", "js", "entropy_p"], dtype="float64")
    again = klfast.compare(p, q, ["kl", "js", "entropy_p"], dtype="float64")
    for name, values in first.items():
        assert values.get().tobytes() == again[name].get().tobytes()


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch, imported before the twin is in CuPy's place."""
    return pytest.importorskip("torch")


class TestTensors:
    """PyTorch's tensors on a device; the twin's are tensors of the host that say otherwise."""

    @pytest.fixture
    def tensor(self, torch: Any, device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        if not hasattr(device, "launches"):
            if not torch.cuda.is_available():
                pytest.skip("PyTorch has no CUDA")

            def sent(x: Any) -> Any:
                x = np.array(x)
                if x.dtype.name == "bfloat16":  # unknown to from_numpy
                    return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16).cuda()
                return torch.from_numpy(x).cuda()

            return sent
        here = torch.device("cuda", 0)

        class Tensor(torch.Tensor):  # type: ignore[misc]
            device = property(lambda self: here)

        def make(x: Any) -> Any:
            with device.cuda.using_allocator(device.cuda.memory.pool):
                view = device.asarray(np.asarray(x))._view
            bits = view.view(np.uint16) if view.dtype.name == "bfloat16" else view
            tensor = torch.from_numpy(bits)
            if view.dtype.name == "bfloat16":
                tensor = tensor.view(torch.bfloat16)
            return tensor.as_subclass(Tensor)

        def empty(shape: Any, dtype: Any, device: Any) -> Any:
            assert device == here
            name = str(dtype).removeprefix("torch.")
            self.made.append(math.prod(shape))
            tensor = make(np.zeros(shape, STORAGE.get(name, name)))
            return tensor.view(dtype) if name == "bfloat16" else tensor

        self.made: list[int] = []
        self.stream = device.cuda.Stream(non_blocking=True)
        current = type("Current", (), {"cuda_stream": self.stream.ptr})()
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        return make

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(
        self, dtype: str, pair: Pair, torch: Any, tensor: Any, device: Any
    ) -> None:
        p, q = (x.astype(DTYPES[dtype]) for x in pair)
        got = klfast.kl_divergence(tensor(p), tensor(q))
        assert isinstance(got, torch.Tensor)
        assert got.device == torch.device("cuda", 0)
        np.testing.assert_allclose(np.array(got.tolist()), reference.kl_divergence(p, q), rtol=2e-6)
        if hasattr(device, "launches"):
            assert {launch.stream for launch in device.launches} == {self.stream.ptr}
        stored = klfast.log_softmax(tensor(pair[0]), dtype=dtype)
        assert stored.dtype == getattr(torch, dtype)

    def test_gradients(self, pair: Pair, torch: Any, tensor: Any, device: Any) -> None:
        p, q = map(tensor, pair)
        scale = tensor(np.arange(4, dtype=np.float32))
        value, gradient = klfast.value_and_grad("kl", p, q, grad_scale=scale)
        expected = reference.gradient("kl", *pair) * np.arange(4)[:, None]
        assert isinstance(gradient, torch.Tensor)
        assert gradient.device == torch.device("cuda", 0)
        largest = np.abs(expected).max(-1, keepdims=True)
        error = np.abs(np.array(gradient.tolist()) - expected)
        assert (error <= 1e-6 * largest + 1e-11).all()
        np.testing.assert_allclose(
            np.array(value.tolist()), reference.kl_divergence(*pair), rtol=2e-6
        )

    @pytest.mark.usefixtures("twin")
    def test_memory_is_pytorchs(self, pair: Pair, tensor: Any) -> None:
        p, q = map(tensor, pair)
        klfast.kl_divergence(p, q)
        assert self.made == [12, 12 * 8]  # the result, and its value in float64

    def test_memory_that_runs_out(
        self, pair: Pair, torch: Any, tensor: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        p, q = map(tensor, pair)

        def fail(*arguments: Any, **keywords: Any) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", fail)
            with pytest.raises(MemoryError, match="Tried to allocate"):
                klfast.kl_divergence(p, q)
        got = klfast.kl_divergence(p, q)
        np.testing.assert_allclose(
            np.array(got.tolist()), reference.kl_divergence(*pair), rtol=2e-6
        )

    def test_where_targets_and_out(self, pair: Pair, torch: Any, tensor: Any, device: Any) -> None:
        p, q = map(tensor, pair)
        tokens, where = np.arange(12).reshape(3, 4), np.arange(4) != 1
        got = klfast.compare(p, q, ["nll_p"], tensor(tokens), where=tensor(where), validate=True)
        expected = reference.nll(pair[0], tokens)
        expected[:, 1] = np.nan
        np.testing.assert_allclose(np.array(got.to_dict()["nll_p"]), expected, rtol=2e-6)
        out = tensor(np.zeros((3, 4), np.float32))
        assert klfast.entropy(p, out=out, base=2) is out
        np.testing.assert_allclose(
            np.array(out.tolist()), reference.entropy(pair[0]) / math.log(2), rtol=2e-6
        )
        for wrong, message in ((where, "bool"), (tokens * 1.0, "float64")):
            with pytest.raises(TypeError, match=f"tokens has dtype torch.{message}"):
                klfast.token_log_probs(p, tensor(wrong))
        with pytest.raises(IndexError, match=r"tokens\[0, 0\] is -100"):
            klfast.token_log_probs(p, tensor(tokens - 100), validate=True)
        with pytest.raises(TypeError, match="q is a PyTorch array on cpu"):
            klfast.kl_divergence(p, torch.zeros(3, 4, 50))

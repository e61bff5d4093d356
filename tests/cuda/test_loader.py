"""From sources to kernels: the text, the argument's layout, what is compiled once, and errors."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import every_kernel
import numpy as np
import pytest
from twin import run_kernel

import klfast

KERNELS = Path(__file__).parents[2] / "kernels" / "cuda"
P = np.zeros((2, 5), np.float32)


def loader() -> Any:
    """As klfast has it now: the twin brings its own."""
    return import_module("klfast.kernels.cuda.loader")


def test_every_source_is_whole_in_itself(twin: Any) -> None:
    for path in KERNELS.glob("*.cu*"):
        assert "#include" not in path.read_text(), path
    for path in KERNELS.glob("*.cu"):
        (name,) = re.findall(
            r"^KERNEL\(THREADS, BLOCKS\) (\w+)\((?:const|ARGUMENT) Call call\)",
            path.read_text(),
            re.M,
        )
        assert name == path.stem
        text = loader().source(name, (("THREADS", 64), ("TEAM", 64)))
        assert text.startswith('#define THREADS 64\n#define TEAM 64\n#line 1 "device.cuh"\n')
        assert text.count(f'#line 1 "{name}.cu"') == 1
        assert "#pragma once" not in text


def test_the_argument_has_the_layout_of_the_kernels(twin: Any) -> None:
    launches = import_module("klfast.kernels.cuda.launches")

    def places(struct: Any, kind: str) -> list[str]:
        return [f"__builtin_offsetof({kind}, {name})" for name in struct.names]

    wanted = [
        "sizeof(Call)", "sizeof(Rows)", *places(launches.CALL, "Call"),
        *places(launches.CALL["p"], "Rows"),
    ]  # fmt: skip
    stores = "".join(f"call.values[{i}] = {what};\n" for i, what in enumerate(wanted))
    text = f"KERNEL(THREADS, BLOCKS) layout(const Call call)\n{{\n{stores}}}\n"
    values = run_kernel(text, grid=1, values=np.zeros((1, len(wanted))), count=1)
    found = [launches.CALL.itemsize, launches.CALL["p"].itemsize]
    for struct in (launches.CALL, launches.CALL["p"]):
        found += [struct.fields[name][1] for name in struct.names]
    assert values[0].tolist() == found
    for code, name in enumerate(("FLOAT16", "BFLOAT16", "FLOAT32", "FLOAT64")):
        assert f"#define {name} {code}\n" in (KERNELS / "rows.cuh").read_text()
        assert launches.DTYPE_CODE[name.lower()] == code
    assert len(launches.DTYPE_CODE) == 4
    formulas = (KERNELS / "finish.cuh").read_text().partition("enum Formula {")[2].split("}")[0]
    codes = [name.strip(" ,") for name in formulas.split("\n") if name.strip()]
    assert codes == [code.name for code in import_module("klfast.kernels.plans").Finish]


def test_kernels_are_compiled_once(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    module = twin.RawModule

    def count(**options: Any) -> Any:
        compiled.append(options["code"])
        assert options["options"] == ("-std=c++17",)
        return module(**options)

    monkeypatch.setattr(twin, "RawModule", count)
    x = twin.asarray(P)
    klfast.entropy(x)
    first = len(compiled)
    klfast.entropy(x)
    klfast.entropy(x, base=2)
    assert len(compiled) == first == 2  # single_pass and finish
    klfast.logsumexp(x)  # another formula of the same numbers
    assert len(compiled) == first
    klfast.entropy(x, input="probs")
    assert len(compiled) == first + 1  # exact


def test_a_kernel_that_does_not_compile_shows_the_compilers_log(
    twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loader().MORE_HEADERS, "finish", ())
    with pytest.raises(RuntimeError, match=r"kernel finish does not compile:(?s:.*)finished"):
        klfast.entropy(twin.asarray(P))
    monkeypatch.undo()
    assert klfast.entropy(twin.asarray(P)).tolist() == pytest.approx([np.log(5)] * 2)


def test_more_shared_memory_than_usual_is_asked_for(twin: Any) -> None:
    x = np.random.default_rng(0).normal(size=(1, 20_000)).astype(np.float32)
    got = klfast.log_softmax(twin.asarray(x)).get()
    np.testing.assert_allclose(got, klfast.reference.log_softmax(x), rtol=1e-6)
    assert twin.launches[-1].shared > 48 << 10


def test_an_operation_without_a_fast_kernel_is_exact(twin: Any) -> None:
    launches = import_module("klfast.kernels.cuda.launches")
    plans = import_module("klfast.kernels.plans")
    arrays = import_module("klfast._arrays")
    rows = arrays.plain_rows(P, arrays.NUMPY)
    steps = [plans.Step("two_phase", "new", "pq"), plans.Step("two_phase", "js", "pq", 0.5)]
    assert [each.module for each in launches.schedule(steps, rows, rows)] == ["two_phase", "exact"]


def test_what_is_explained(twin: Any) -> None:
    """Few rows are cut into parts; a cluster keeps a pair, or what it has room for."""
    twin.cuda.device.attributes.update(MultiProcessorCount=132)
    for count, width, clusters, parts, second in (
        (1, 128_256, 1, 61, "L2"),
        (8192, 20_000, 2, 1, "shared memory"),
        (8192, 128_256, 8, 1, "shared memory"),
        (8192, 400_000, 8, 1, "shared memory, the rest from L2 and device memory"),
    ):
        one = twin.asarray(np.zeros(1, np.float32))
        view = np.lib.stride_tricks.as_strided(one._view, (count, width), (0, 4))
        x = twin.ndarray(view, one._memory)
        (step,) = klfast.explain(x, x, "js")["steps"]
        assert step["kernel"] == "two_phase.js"
        assert step["blocks_of_a_cluster"] == clusters
        assert step["parts_of_a_row"] == parts
        assert step["second_read"] == second
    (step,) = klfast.explain(x, None, "entropy")["steps"]
    assert "second_read" not in step


def test_what_is_explained_of_gradients(twin: Any) -> None:
    x = twin.asarray(np.zeros((3, 1000), np.float32))
    for metric, kernel in (
        ("kl", "gradients.kl"), ("js", "gradients.js"), ("renyi:0.3", "gradients.renyi"),
        ("js:0.2", "exact_gradients.js"), ("renyi:inf", "exact_gradients.renyi_inf"),
    ):  # fmt: skip
        gradient = klfast.explain(x, x, metric)["value_and_gradient"]
        assert gradient["kernel"] == kernel
        assert ("second_read" in gradient) == kernel.startswith("gradients")
        klfast.value_and_grad(metric, x, x)
        assert kernel.partition(".")[0] in [launch.name for launch in twin.launches]
        twin.launches.clear()
    (step,) = klfast.explain(x, x, "js:0.2")["steps"]
    assert step["kernel"] == "exact.js"
    assert klfast.explain(x, None, "entropy")["value_and_gradient"]["kernel"] == (
        "gradients.cross_entropy"
    )
    assert "value_and_gradient" not in klfast.explain(x, x, "topk_overlap:3").to_dict()


def test_warmup_compiles_what_calls_need(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = import_module("klfast.kernels.cuda")
    monkeypatch.setattr(backend, "WARM_WIDTHS", (100,))
    klfast.warmup(["entropy", "tv"], "float32", backend="cuda")
    monkeypatch.setattr(twin, "RawModule", None)
    p = twin.asarray(P)
    klfast.entropy(p)
    klfast.total_variation(p, p)


def test_info_and_explain(device: Any) -> None:
    assert klfast.backends()["cuda"]
    info = import_module("klfast.kernels.cuda").info()
    assert re.fullmatch(r"compute capability \d+\.\d, \d+ multiprocessors", info["devices"][0])
    assert re.fullmatch(r"driver: CUDA \d+\.\d, runtime: CUDA \d+\.\d", info["versions"])
    p = device.asarray(P)
    for name in ("kl", "js", "renyi:2", "entropy", "topk_overlap:3"):
        q = None if name == "entropy" else p
        explanation = klfast.explain(p, q, name)
        assert explanation["backend"] == "cuda"
        assert explanation["device"] == "cuda:0"
        assert explanation["steps"][0]["kernel"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("cudaErrorInsufficientDriver: CUDA driver version is insufficient", "driver"),
        (None, "there is no CUDA device"),
    ],
)
def test_why_it_cannot_be_used(
    twin: Any, error: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        if error is None:
            return 0
        raise twin.cuda.runtime.CUDARuntimeError(error)

    monkeypatch.setattr(twin.cuda.runtime, "getDeviceCount", count)
    for call in (
        lambda: klfast.kl_divergence(P, P, backend="cuda"),
        lambda: klfast.kl_divergence(twin.asarray(P), twin.asarray(P)),
        lambda: klfast.warmup("kl", backend="cuda"),
    ):
        with pytest.raises(klfast.BackendUnavailable, match=f"{reason}.*CuPy 14.*driver: CUDA 13"):
            call()
    assert reason in str(klfast.backends()["cuda"].reason)
    assert klfast.kl_divergence(P, P).tolist() == [0, 0]


def test_a_device_that_is_too_old(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin.cuda.device, "capability", "75")
    reason = "cuda:0 has compute capability 7.5; accepted: 8.0 or later"
    assert reason in str(klfast.backends()["cuda"].reason)
    x = twin.asarray(P)
    with pytest.raises(klfast.BackendUnavailable, match=reason):
        klfast.kl_divergence(x, x)
    with pytest.raises(klfast.BackendUnavailable, match=reason):
        klfast.kl_divergence(P, P, backend="cuda")
    # Beside another one, which can be used.
    with pytest.raises(klfast.BackendUnavailable, match=reason):
        loader().machine(0)


@pytest.mark.slow
def test_the_calls_for_tools_that_watch_a_device(
    twin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(every_kernel, "shapes", lambda multiprocessors: [(4, 50)])
    monkeypatch.setattr(every_kernel, "METRICS", ("kl", "js", "nll_q"))
    monkeypatch.setattr(every_kernel, "GRADIENTS", ("kl",))
    monkeypatch.setattr(every_kernel, "DTYPES", [("float32", 1)])
    every_kernel.main()
    assert capsys.readouterr().out == "done\n"
    names = {launch.name for launch in twin.launches}
    assert names == {path.stem for path in KERNELS.glob("*.cu")} - {"offsets", "shards"}

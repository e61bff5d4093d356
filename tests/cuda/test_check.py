"""A part of ``make cuda-check``: that NVIDIA's compiler takes the kernels, and they fit a GPU."""

from __future__ import annotations

import re

import check
import pytest


@pytest.fixture(autouse=True)
def compiler() -> None:
    if check.compiler() is None:
        pytest.skip("neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc is installed")


def test_one_kernel_of_each_file_compiles() -> None:
    cases = [check.FLOAT32._replace(dtype_p="bfloat16", skew=1)]
    few = {each.name: each for each in check.requests("sm_90", cases)}
    assert few.keys() == {path.stem for path in check.REPORT.parent.glob("*.cu")}
    for name, each in few.items():
        compiled = check.compile_for("sm_90", each.source)
        assert not compiled.bad, f"{name}: {compiled.log}"
        assert 16 <= compiled.registers <= 255


@pytest.mark.slow
def test_kernels_of_float32_rows_compile() -> None:
    for each in check.requests("sm_90", [check.FLOAT32]):
        compiled = check.compile_for("sm_90", each.source)
        assert not compiled.bad, f"{each.name} {each.definitions}: {compiled.log}"


def test_what_does_not_compile_is_bad_and_tells_why() -> None:
    compiled = check.compile_for("sm_90", 'extern "C" __global__ void k() { nothing(); }')
    assert compiled.bad
    assert 'identifier "nothing" is undefined' in compiled.log


def test_local_memory_is_bad() -> None:
    text = """
    extern "C" __global__ void k(const float* x, float* out, int n)
    {
        float kept[64];
        for (int i = 0; i < 64; ++i)
            kept[i] = x[i];
        for (int i = 0; i < n; ++i)
            out[i] = kept[int(x[i]) % 64];
    }
    """
    compiled = check.compile_for("sm_80", text)
    assert not compiled.failed
    assert compiled.local >= 256
    assert compiled.bad


def test_the_report_has_every_kernel() -> None:
    """Of this version: `make cuda-check` writes it."""
    wanted = [(name, each) for name in check.DEVICES for each in check.requests(name)]
    nothing = check.Compiled(0, 0, 0.0, "", False)
    lines = [row[:3] for row in check.report([(*each, nothing) for each in wanted])]
    text = check.REPORT.read_text("utf-8")
    found = [re.split(r" *\| *", line)[1:4] for line in text.splitlines() if line[:2] == "| "]
    assert [line for line in found if line[0] != "---"] == lines

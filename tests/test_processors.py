"""Kernels compiled for other processors than the one that the tests run on."""

import platform

import pytest
from processes import python

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="these are features of x86-64"
)

HASWELL = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt",
}
#: Neither AVX, nor fused multiply-add (a function of the C library does it), nor float16.
SSE4 = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt"}

AGREEMENT = """
import numpy as np
import klfast
import klfast.reference as exact
from klfast.kernels import cpu

assert cpu.info()["vector_bits"] == {bits}, cpu.info()
random = np.random.default_rng(0)
p = random.normal(scale=4.0, size=(3, 2500)).astype("f")
for noise in (1e-4, 0.3, 8.0):
    q = p + np.float32(noise) * random.normal(size=p.shape).astype("f")
    for dtype in ("float32", "float16"):
        x, y = p.astype(dtype), q.astype(dtype)
        for name in ("kl_divergence", "js_divergence"):
            found = getattr(klfast, name)(x, y, backend="cpu", dtype="float64")
            np.testing.assert_allclose(found, getattr(exact, name)(x, y), rtol=2e-6, atol=1e-17)
"""


@pytest.mark.parametrize(("processor", "bits"), [(HASWELL, 256), (SSE4, 128)], ids=["avx2", "sse4"])
def test_values_agree_with_the_reference(processor: dict[str, str], bits: int) -> None:
    python(AGREEMENT.format(bits=bits), env=processor)


def test_numba_told_to_do_without_avx() -> None:
    python(AGREEMENT.format(bits=128), env={"NUMBA_ENABLE_AVX": "0"})

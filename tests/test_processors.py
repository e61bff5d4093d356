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


@pytest.mark.slow
def test_values_agree_with_the_reference_on_avx2() -> None:
    python(AGREEMENT.format(bits=256), env=HASWELL)


HALVES = """
import numpy as np
from numba import types
from klfast.kernels import cpu
from klfast.kernels.cpu import native, simd
from klfast.kernels.cpu.compiler import compile_kernel

assert not simd.HAS_F16
every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(16, 4096)
found = np.empty(every.shape, np.float32)
cpu.to_float32(every, found)
np.testing.assert_array_equal(found, every.astype(np.float32))
assert (np.signbit(found) == np.signbit(every)).all()

load, (store, _) = simd.loader("float32", simd.f32v), simd.storer("float16")

def narrowed(source, target, n):
    for j in range(0, n, simd.LANES32):
        store(target + 2 * j, load(source + 4 * j))

call = native._link(*compile_kernel(narrowed, (types.int64,) * 3), "qqq")
# Every float16, the halves between two of them, and what is beside those.
near = found.ravel().view(np.uint32)
bits = np.concatenate([near + np.uint32(n) for n in (0, 1, 0xFFF, 0x1000, 0x1001, 0xFFFFFFFF)])
source = bits.view(np.float32)
target = np.empty(source.shape, np.float16)
call(source.ctypes.data, target.ctypes.data, source.size)
with np.errstate(all="ignore"):
    expected = source.astype(np.float16)
np.testing.assert_array_equal(target, expected)
a_number = ~np.isnan(expected)
assert (np.signbit(target) == np.signbit(expected))[a_number].all()
"""


def test_float16_without_instructions_for_it() -> None:
    python(HALVES, env=SSE4)


EXPONENTIALS = """
import numpy as np
from numba import types
from klfast.kernels.cpu import mathematics, native, simd
from klfast.kernels.cpu.compiler import compile_kernel

assert not simd.HAS_AVX512
load, (store, _) = simd.loader("float32", simd.f32v), simd.storer("float32")
exp2 = mathematics.exp2_32

def powers(source, target, n):
    for j in range(0, n, simd.LANES32):
        store(target + 4 * j, exp2(load(source + 4 * j)))

call = native._link(*compile_kernel(powers, (types.int64,) * 3), "qqq")
z = np.concatenate([
    np.linspace(-130.0, 127.0, 1 << 20, dtype="f"),
    np.float32([-np.inf, np.nan, -3e38, -1e4, -127.0, -126.5, -126.0, 0.0] * 2),
])
found = np.empty_like(z)
call(z.ctypes.data, found.ctypes.data, z.size)
expected = np.exp2(z.astype("d"))
normal = z >= -126.0
np.testing.assert_allclose(found[normal], expected[normal], rtol=2e-7)
small = z < -126.0
assert (found[small] >= 0.0).all() and (found[small] < 2.0**-126).all()
assert (found[z < -127.0] == 0.0).all()
np.testing.assert_array_equal(np.isnan(found), np.isnan(z))
"""


def test_exponentials_without_avx512() -> None:
    python(EXPONENTIALS, env=HASWELL)

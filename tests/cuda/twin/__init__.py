"""A host twin of the CUDA kernels: the same source, run thread by thread on the CPU by g++.

One kernel, from Python (with tests/cuda on sys.path)::

    import numpy as np
    from twin import run_kernel

    p = np.random.default_rng(0).normal(size=(4, 1000)).astype("float32")
    q = np.random.default_rng(1).normal(size=(4, 1000)).astype("float32")
    run_kernel("one_pass", p, q, {"OPERATION_kl": 1}, parameters=[0, 40])  # -> shape (4, 1)
    run_kernel("two_phase", p, q, {"TERMS": "KL,TV", "CLUSTER": 2}, columns=2,
               shared=8192, resident=1024)
    run_kernel("exact", p, q, {"OPERATION_kl": 1, "DTYPE_P": None, "DTYPE_Q": None},
               values=values, phase=1)  # `values` from before, changed in place
    run_kernel("one_pass", p, q, {"OPERATION_kl": 1}, parts=4, state=8)  # few, long rows
    run_kernel("one_pass", p, q, {"OPERATION_kl": 1, "TEAM": 32}, grid=2, seed=5)
    run_kernel("single_pass", p, None, {"OPERATION_statistics": 1}, columns=5,
               tokens=np.zeros(4, np.int64), where=np.ones(4, np.uint8))
    run_kernel(TEXT, p)  # a text with a kernel of its own, behind all that is in *.cuh

bfloat16 is uint16. A seed, or KLFAST_TWIN_SEED, runs blocks and threads in another order. Misuse
(a barrier that some threads miss, a bad address, a write outside of shared memory) raises
`LaunchError`.

All of klfast, with CuPy arrays whose memory is the host's::

    with installed() as cupy:
        klfast.kl_divergence(cupy.asarray(p), cupy.asarray(q))
        print(cupy.launches)
"""

from .compiler import CompileError, LaunchError, compile_text, compiler
from .installing import installed
from .running import CALL, ROWS, kernel_text, run_kernel

__all__ = [
    "CALL",
    "ROWS",
    "CompileError",
    "LaunchError",
    "compile_text",
    "compiler",
    "installed",
    "kernel_text",
    "run_kernel",
]

"""How Numba compiles kernels: helpers go into a kernel, and only the kernel becomes machine code.

Left to itself, Numba optimizes every helper on its own, makes machine code of it and loads
that, although its callers inline it: more work than the kernel itself.  Here a helper stays
as it is until the kernel that calls it is optimized as a whole, and a kernel is written out
as an object file, not loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.codegen import AOTCodeLibrary, JITCPUCodegen
from numba.core.compiler import Compiler, PassManager
from numba.core.compiler_lock import global_compiler_lock

#: Passes of Numba for what kernels do not have: contexts, closures, raised objects, unrolling
#: over literals, inlining before types are known, array expressions; and for reports.
_NOT_NEEDED = {
    "AnnotateTypes",
    "DumpParforDiagnostics",
    "FindLiterallyCalls",
    "InlineClosureLikes",
    "InlineInlinables",
    "InlineOverloads",
    "LiteralPropagationSubPipelinePass",
    "LiteralUnroll",
    "MakeFunctionToJitFunction",
    "NoPythonSupportedFeatureValidation",
    "NopythonRewrites",
    "RewriteDynamicRaises",
    "WithLifting",
}


class _Library(AOTCodeLibrary):  # type: ignore[misc]
    """LLVM code of one function and of all that it calls, optimized when it is emitted."""

    def _optimize_final_module(self) -> None:
        pass

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0  # as Numba has it for a function without a wrapper for Python

    def emit_native_object(self) -> bytes:
        self._ensure_finalized()
        super()._optimize_final_module()
        code: bytes = super().emit_native_object()
        return code


class _Codegen(JITCPUCodegen):  # type: ignore[misc]
    """Code for this very processor that is not loaded."""

    _library_class = _Library

    def _add_module(self, module: Any) -> None:
        pass

    def set_env(self, name: str, environment: Any) -> None:
        pass


@functools.cache
def _codegen() -> _Codegen:
    return _Codegen("klfast")


class _Compiler(Compiler):  # type: ignore[misc]
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.library = _codegen().create_library("klfast")

    def define_pipelines(self) -> list[PassManager]:
        pipelines: list[PassManager] = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes = [
                entry for entry in pipeline.passes if entry[0].__name__ not in _NOT_NEEDED
            ]
            pipeline.finalize()
        return pipelines


#: What ``numba.njit`` is, for kernels and their helpers.
jit = functools.partial(
    njit,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    pipeline_class=_Compiler,
)


def compile_kernel(function: Callable[..., None], signature: Any) -> tuple[str, bytes]:
    """Symbol and object code of a Python function for the argument types of a signature."""
    dispatcher = jit()(function)
    dispatcher.compile(signature)
    (result,) = dispatcher.overloads.values()
    with global_compiler_lock:  # LLVM's state is shared with whatever else Numba compiles
        return result.fndesc.llvm_func_name, result.library.emit_native_object()

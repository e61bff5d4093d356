"""How Numba compiles kernels: a target of its own, for which only what they need is done.

Kernels are made of numbers, tuples and vectors, and of functions of them.  Numba's own target
imports what it has for arrays, tries NumPy's ufuncs for every operator, compiles a function for
every ``min``, and makes of each helper a module of its own, optimized, with all in it that the
helper calls.  Here the contexts know numbers and tuples, and what ``simd`` adds to them; helpers
stay as they are until the kernel that calls them is optimized as a whole, and a kernel is written
out as an object file, not loaded.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from llvmlite import binding, ir
from numba.core import (
    cgutils,
    cpu,
    imputils,
    target_extension,
    typed_passes,
    types,
    typing,
    untyped_passes,
)
from numba.core.codegen import AOTCodeLibrary, JITCPUCodegen
from numba.core.compiler import CompilerBase
from numba.core.compiler_lock import global_compiler_lock
from numba.core.descriptors import TargetDescriptor
from numba.core.dispatcher import Dispatcher
from numba.core.extending import intrinsic
from numba.core.typing import builtins as _builtin_types  # noqa: F401 (imported to register)
from numba.core.typing import collections, mathdecl, templates  # noqa: F401
from numba.cpython import builtins, mathimpl, numbers, rangeobj, tupleobj  # noqa: F401

#: The passes of Numba that kernels need.
_PASSES = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    untyped_passes.DeadBranchPrune,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.NativeLowering,
    typed_passes.NoPythonBackend,
)


class _Library(AOTCodeLibrary):  # type: ignore[misc]
    """The LLVM code of one function, and the libraries of those that it calls."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._modules: list[Any] = []

    def add_ir_module(self, ir_module: Any) -> None:
        self._modules.append(ir_module)

    def finalize(self) -> None:
        pass  # until a kernel is emitted

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # as Numba has it for a function without a wrapper for Python

    def _all_modules(self, seen: set[_Library]) -> Iterator[Any]:
        if self not in seen:
            seen.add(self)
            yield from self._modules
            for library in self._linking_libraries:
                yield from library._all_modules(seen)

    def emit_kernel(self, symbol: str) -> bytes:
        """Object code of all of it; only the function of that name is seen from outside."""
        for module in self._all_modules(set()):
            for function in module.functions:
                if function.blocks and function.name != symbol:
                    function.linkage = "linkonce_odr"
            self._final_module.link_in(binding.parse_assembly(str(module)))
        self._final_module.verify()
        self._optimize_final_module()
        code: bytes = self._codegen._tm.emit_object(self._final_module)
        return code


class _Codegen(JITCPUCodegen):  # type: ignore[misc]
    """Code for this very processor that is not loaded."""

    _library_class = _Library

    def set_env(self, name: str, environment: Any) -> None:
        pass


#: What Numba compiles a function for, of numbers alone.
_types, _code = templates.Registry(), imputils.Registry("klfast")


def _extremum(function: Callable[..., Any], beyond: Callable[..., Any]) -> None:
    """``min`` or ``max`` of numbers: the first of those that no other one is beyond."""

    @_types.register_global(function)
    class Typing(templates.AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
            if len(args) > 1 and all(isinstance(each, types.Number) for each in args):
                return typing.signature(self.context.unify_types(*args), *args)
            return None

    @_code.lower(function, types.VarArg(types.Number))  # type: ignore[untyped-decorator]
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builtins.do_minmax(context, builder, sig.args, args, beyond)


_extremum(min, operator.lt)
_extremum(max, operator.gt)


@_types.register_global(int)
class _IntTyping(templates.AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
        return typing.signature(types.int64, *args)


@_code.lower(int, types.Number)  # type: ignore[untyped-decorator]
@_code.lower(int, types.Boolean)  # type: ignore[untyped-decorator]
def _int(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.cast(builder, args[0], sig.args[0], sig.return_type)


class _TypingContext(typing.Context):  # type: ignore[misc]
    """Types of what kernels do; without what Numba compiles a function for, or has for NumPy."""

    def load_additional_registries(self) -> None:
        self.install_registry(mathdecl.registry)
        self.install_registry(_types)

    def _load_builtins(self) -> None:
        self.install_registry(templates.builtin_registry)

    def install_registry(self, registry: Any) -> None:
        """Take from a registry what it did not hold the last time."""
        if registry not in self._registries:
            self._registries[registry] = templates.RegistryLoader(registry)
        new = self._registries[registry].new_registrations
        for template in filter(_is_lowered, new("functions")):
            self.insert_function(template(self))
        for template in filter(_is_lowered, new("attributes")):
            self.insert_attributes(template(self))
        for value, kind in new("globals"):
            if isinstance(kind, types.Function):
                kept = tuple(filter(_is_lowered, kind.templates))
                if not kept:
                    continue
                kind = types.Function(kept)
            known = self._lookup_global(value)
            if known is not None:
                kind = known.augment(kind)
                self._remove_global(value)
            self._insert_global(value, kind)


_COMPILED = {templates._OverloadFunctionTemplate, templates._OverloadAttributeTemplate}


def _is_lowered(template: type) -> bool:
    """Whether what a template is for becomes LLVM code as it is, and does not concern NumPy."""
    return _COMPILED.isdisjoint(template.__mro__) and not template.__module__.startswith("numba.np")


class _Context(cpu.CPUContext):  # type: ignore[misc]
    """How that becomes LLVM code."""

    def init(self) -> None:
        self._internal_codegen = _Codegen("klfast")

    def load_additional_registries(self) -> None:
        self.install_registry(mathimpl.registry)
        self.install_registry(_code)

    def get_abi_sizeof(self, ty: Any) -> int:
        return _size(ty, self.target_data)

    def post_lowering(self, module: Any, library: _Library) -> None:
        pass  # Numba's runtime, which counts references, is not linked


@functools.cache
def _size(ty: Any, target_data: Any) -> int:
    """Bytes of an LLVM type, which is asked for with every variable."""
    return int(ty.get_abi_size(target_data))


class _Processor(target_extension.CPU):  # type: ignore[misc]
    """Numba's name for the target."""


class _Target(TargetDescriptor):  # type: ignore[misc]
    options = cpu.CPUTargetOptions

    @functools.cached_property
    def typing_context(self) -> _TypingContext:
        return _TypingContext()

    @functools.cached_property
    def target_context(self) -> _Context:
        return _Context(self.typing_context, self._target_name)


class _Dispatcher(Dispatcher):  # type: ignore[misc]
    targetdescr = _Target("klfast")

    def get_call_template(self, args: tuple[types.Type, ...], kws: Any) -> Any:
        # LLVM sees the constants of what it inlines: one function does for True and for False.
        if "forceinline" in self.targetoptions:
            args = tuple(map(types.unliteral, args))
        return super().get_call_template(args, kws)


target_extension.target_registry["klfast"] = _Processor
target_extension.dispatcher_registry[_Processor] = _Dispatcher


class _Pipeline:
    """Passes that are run, without timing and reporting each."""

    pipeline_name = "klfast"
    exec_times: ClassVar[dict[str, Any]] = {}

    def run(self, state: Any) -> None:
        for kind in _PASSES:
            step = kind()
            step.analysis = {kind: None}  # is looked up, and not used
            step.run_pass(state)


class _Compiler(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[_Pipeline]:
        return [_Pipeline()]


def jit(**options: bool) -> Callable[[Callable[..., Any]], _Dispatcher]:
    """What ``numba.njit`` is, for kernels and their helpers."""
    settings = {
        "nopython": True,
        "_nrt": False,
        "error_model": "numpy",
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
        **options,
    }
    return lambda function: _Dispatcher(function, targetoptions=settings, pipeline_class=_Compiler)


def _unpacked(kinds: tuple[types.Type, ...]) -> Any:
    """An intrinsic ``unpacked(address)``: the numbers of 8 bytes each that lie there."""

    @intrinsic
    def unpacked(typingctx, address):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            first, *_ = args
            values = []
            for i, kind in enumerate(kinds):
                pointer = context.get_value_type(kind).as_pointer()
                place = builder.inttoptr(builder.add(first, first.type(8 * i)), pointer)
                values.append(builder.load(place, align=8))
            return context.make_tuple(builder, sig.return_type, values)

        return types.Tuple(kinds)(address), codegen

    return unpacked


#: The bit of the control word that has results too small for a normal number become 0.
_FLUSH_TO_ZERO = 0x8000


@intrinsic
def flush_to_zero(typingctx):  # type: ignore[no-untyped-def]
    """Have this thread's results below the normal range become 0; returns what it did before.

    An entry 80 to 400 nats below its row's largest has such a probability, and a processor that
    cares for the digits of those takes 10 to 30 times as long. Inputs are read as they are. Only
    on x86-64: others lose little or no time.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if not _HAS_CONTROL_WORD:
            return ir.Constant(ir.IntType(32), 0)
        place = cgutils.alloca_once(builder, ir.IntType(32))
        _control_word(builder, "st", place)
        before = builder.load(place)
        builder.store(builder.or_(before, before.type(_FLUSH_TO_ZERO)), place)
        _control_word(builder, "ld", place)
        return before

    return types.int32(), codegen


@intrinsic
def set_control_word(typingctx, word):  # type: ignore[no-untyped-def]
    """Have this thread do with such results what it did."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if _HAS_CONTROL_WORD:
            place = cgutils.alloca_once_value(builder, args[0])
            _control_word(builder, "ld", place)
        return context.get_dummy_value()

    return types.void(word), codegen


_HAS_CONTROL_WORD = binding.get_process_triple().startswith("x86_64")


def _control_word(builder: ir.IRBuilder, direction: str, place: Any) -> None:
    """Load or store the register that says how vectors are computed with."""
    address = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [address])
    name = f"llvm.x86.sse.{direction}mxcsr"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(place, address)])


def compile_kernel(function: Callable[..., None], kinds: tuple[Any, ...]) -> tuple[str, bytes]:
    """Symbol and object code of a Python function of such numbers: it takes their address.

    One argument is called with in a tenth of the time that twenty of them take.
    """
    kernel, unpacked = jit()(function), _unpacked(kinds)

    def entry(address: int) -> None:
        before = flush_to_zero()
        kernel(*unpacked(address))
        set_control_word(before)

    dispatcher = jit()(entry)
    dispatcher.compile(types.void(types.int64))
    (result,) = dispatcher.overloads.values()
    symbol = result.fndesc.llvm_func_name
    with global_compiler_lock:  # LLVM's state is shared with whatever else Numba compiles
        return symbol, result.library.emit_kernel(symbol)

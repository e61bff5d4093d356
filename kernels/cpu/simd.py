"""Vectors of float32 and float64 as values in Numba code.

Numba has no vector type, and LLVM does not vectorize a loop that holds a running
maximum, a table look-up or a conversion from bfloat16.  Here a vector is an ordinary
Numba value: ``a * b + c``, ``fma(a, b, c)``, ``where(a > b, a, b)``.  Its LLVM type is
``<lanes x element>``, which LLVM maps onto whatever registers the machine has: one
AVX-512 register, two AVX, four NEON.

Every operation is explicit and none depends on fast-math flags: infinities and NaN mean
what IEEE 754 says, except where a docstring below tells what happens to a NaN.

Pointers are plain integers (the address), so that one kernel serves every array library.
"""

from __future__ import annotations

import functools
import mmap
import operator
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.core.extending import intrinsic, register_model
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from .native import GUARDED

#: Lanes of a float32 vector; a float64 vector has half as many (the same 64 bytes).
LANES32 = 16
LANES64 = 8


def _features() -> frozenset[str]:
    """LLVM's names of what the processor that Numba compiles for has.

    This machine's, but for what NUMBA_CPU_FEATURES or NUMBA_ENABLE_AVX say.
    """
    flags = config.CPU_FEATURES
    if flags is None:
        flags = get_host_cpu_features()
    return frozenset(flag[1:] for flag in flags.split(",") if flag.startswith("+"))


_FEATURES = _features()
HAS_AVX512 = "avx512f" in _FEATURES
#: AVX-512 has instructions for both ends of an exponential: 2**x for any x (0 where it
#: underflows, NaN at NaN), and the distance from the next whole number below.
HAS_SCALEF = HAS_AVX512 and "avx512dq" in _FEATURES
#: Whether an instruction converts float16.  On x86-64 without one, LLVM calls functions that a
#: process need not have.
_IS_X86 = binding.get_process_triple().startswith("x86_64")
HAS_F16 = HAS_AVX512 or "f16c" in _FEATURES or not _IS_X86
#: Width of the registers that vectors are split into.
VECTOR_BITS = 512 if HAS_AVX512 else 256 if "avx2" in _FEATURES else 128


class Vector(types.Type):  # type: ignore[misc]
    """The Numba type of ``<lanes x element>``."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"Vector({element}x{lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_LLVM_ELEMENT[self.element], self.lanes)


_LLVM_ELEMENT = {
    types.boolean: ir.IntType(1),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32v = Vector(types.float32, LANES32)
f64v = Vector(types.float64, LANES64)
#: Two float32 vectors at once, where there are registers for that.  Long chains of operations that
#: wait for each other fill a processor's scheduler: with two of them, instruction by instruction,
#: it finds twice as much to do.
f32w = Vector(types.float32, 2 * LANES32) if HAS_AVX512 else f32v
LANES32W = f32w.lanes
mask32 = Vector(types.boolean, LANES32)
mask64 = Vector(types.boolean, LANES64)
_MASK = {ty: Vector(types.boolean, ty.lanes) for ty in (f32v, f64v, f32w)}
_INT = {ty: ir.VectorType(ir.IntType(ty.element.bitwidth), ty.lanes) for ty in (f32v, f64v, f32w)}


def _constant(ty: Vector, value: float) -> ir.Constant:
    return ir.Constant(ty.llvm, [value] * ty.lanes)


def _lanes(builder: ir.IRBuilder, vector: ir.Value, start: int, count: int) -> ir.Value:
    numbers = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, vector, numbers)


def _joined(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    lanes = 2 * low.type.count
    numbers = ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(lanes)))
    return builder.shuffle_vector(low, high, numbers)


def _by_register(builder: ir.IRBuilder, emit: Any, *vectors: ir.Value) -> ir.Value:
    """What an instruction of one register gives of float32 vectors of one or two."""
    if vectors[0].type.count == LANES32:
        return emit(*vectors)
    parts = [
        emit(*(_lanes(builder, vector, start, LANES32) for vector in vectors))
        for start in (0, LANES32)
    ]
    return _joined(builder, *parts)


def spread(builder: ir.IRBuilder, scalar: ir.Value, ty: Vector) -> ir.Value:
    """Emit code that puts a number into every lane."""
    undef = ir.Constant(ty.llvm, ir.Undefined)
    first = builder.insert_element(undef, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), ty.lanes), [0] * ty.lanes)
    return builder.shuffle_vector(first, undef, zeros)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, ty: Vector) -> ir.Value:
    if ty.lanes * ty.element.bitwidth > 512:
        half = _splat(builder, scalar, Vector(ty.element, ty.lanes // 2))
        return _joined(builder, half, half)
    vector = spread(builder, scalar, ty)
    if HAS_AVX512 and ty.element in (types.float32, types.float64):
        # An empty piece of assembly that LLVM cannot look into.  Without it every use of a
        # constant in a loop is turned back into a load from the constant pool, at an address
        # that takes ten bytes of code; with it constants stay in registers.
        identity = ir.InlineAsm(ir.FunctionType(ty.llvm, [ty.llvm]), "", "=v,0")
        vector = builder.call(identity, [vector], attrs=("readnone", "nounwind"))
    return vector


def _as_vector(
    context: Any, builder: ir.IRBuilder, value: ir.Value, frm: types.Type, to: Vector
) -> ir.Value:
    """A vector stays; a scalar is rounded to the element type and put into every lane."""
    if isinstance(frm, Vector):
        return value
    return _splat(builder, context.cast(builder, value, frm, to.element), to)


def _call(
    builder: ir.IRBuilder, name: str, args: list[ir.Value], returns: ir.Type | None = None
) -> ir.Value:
    """Call the LLVM intrinsic of that full name (``llvm.fma.v16f32``)."""
    ty = ir.FunctionType(returns or args[0].type, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, ty, name), args)


def _suffix(ty: Vector) -> str:
    return f"v{ty.lanes}f{ty.element.bitwidth}"


# --- operators -------------------------------------------------------------------------


def _vector_of(args: tuple[types.Type, ...]) -> Vector | None:
    vectors = {a for a in args if isinstance(a, Vector)}
    rest = [a for a in args if not isinstance(a, Vector)]
    if len(vectors) != 1 or not all(isinstance(a, (types.Number, types.Literal)) for a in rest):
        return None
    return vectors.pop()


def _binary(op: Any, emit: Any, compares: bool) -> None:
    @infer_global(op)
    class Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
            ty = _vector_of(args)
            if ty is None or ty not in _MASK:
                return None
            return signature(_MASK[ty] if compares else ty, *args)

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        ty = _vector_of(sig.args)
        a, b = (_as_vector(context, builder, v, t, ty) for v, t in zip(args, sig.args, strict=True))
        return emit(builder, a, b)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(op, *pair)(lower)


_binary(operator.add, lambda b, x, y: b.fadd(x, y), False)
_binary(operator.sub, lambda b, x, y: b.fsub(x, y), False)
_binary(operator.mul, lambda b, x, y: b.fmul(x, y), False)
_binary(operator.truediv, lambda b, x, y: b.fdiv(x, y), False)
_binary(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), True)
_binary(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), True)
_binary(operator.eq, lambda b, x, y: b.fcmp_ordered("==", x, y), True)
_binary(operator.ne, lambda b, x, y: b.fcmp_unordered("!=", x, y), True)


@infer_global(operator.neg)
class _NegTyping(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
        return signature(args[0], args[0]) if args[0] in _MASK else None


@lower_builtin(operator.neg, Vector)
def _neg(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return builder.fneg(args[0])


def _mask_binary(op: Any, emit: Any) -> None:
    @infer_global(op)
    class Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
            if len(args) == 2 and args[0] == args[1] and args[0] in _MASK.values():
                return signature(args[0], *args)
            return None

    lower_builtin(op, Vector, Vector)(lambda context, builder, sig, args: emit(builder, *args))


_mask_binary(operator.and_, lambda b, x, y: b.and_(x, y))
_mask_binary(operator.or_, lambda b, x, y: b.or_(x, y))


@infer_global(operator.invert)
class _InvertTyping(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
        return signature(args[0], args[0]) if args[0] in _MASK.values() else None


@lower_builtin(operator.invert, Vector)
def _invert(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return builder.not_(args[0])


# --- functions -------------------------------------------------------------------------


@intrinsic
def splat32(typingctx, x):
    """The number ``x`` in every lane of a float32 vector."""

    def codegen(context, builder, sig, args):
        return _as_vector(context, builder, args[0], sig.args[0], f32v)

    return f32v(x), codegen


@intrinsic
def splat32w(typingctx, x):
    """The number ``x`` in every lane of a wide float32 vector."""

    def codegen(context, builder, sig, args):
        return _as_vector(context, builder, args[0], sig.args[0], f32w)

    return f32w(x), codegen


@intrinsic
def splat64(typingctx, x):
    """The number ``x`` in every lane of a float64 vector."""

    def codegen(context, builder, sig, args):
        return _as_vector(context, builder, args[0], sig.args[0], f64v)

    return f64v(x), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, rounded once."""
    ty = _vector_of((a, b, c))

    def codegen(context, builder, sig, args):
        vs = [_as_vector(context, builder, v, t, ty) for v, t in zip(args, sig.args, strict=True)]
        return _call(builder, f"llvm.fma.{_suffix(ty)}", vs)

    return ty(a, b, c), codegen


@intrinsic
def where(typingctx, condition, a, b):
    """``a`` in the lanes where ``condition`` holds, else ``b``."""
    ty = _vector_of((a, b))

    def codegen(context, builder, sig, args):
        x = _as_vector(context, builder, args[1], sig.args[1], ty)
        y = _as_vector(context, builder, args[2], sig.args[2], ty)
        return builder.select(args[0], x, y)

    return ty(condition, a, b), codegen


@intrinsic
def unordered(typingctx, a, b):
    """Lanes where ``a`` or ``b`` is NaN."""

    def codegen(context, builder, sig, args):
        return builder.fcmp_unordered("uno", *args)

    return _MASK[a](a, b), codegen


def _unary(llvm_name):
    @intrinsic
    def op(typingctx, a):
        def codegen(context, builder, sig, args):
            return _call(builder, f"llvm.{llvm_name}.{_suffix(a)}", [args[0]])

        return a(a), codegen

    return op


vabs = _unary("fabs")
rint = _unary("rint")


@intrinsic
def copysign(typingctx, a, b):
    """The size of ``a`` with the sign of ``b``."""

    def codegen(context, builder, sig, args):
        return _call(builder, f"llvm.copysign.{_suffix(a)}", list(args))

    return a(a, a), codegen


@intrinsic
def vmax(typingctx, a, b):
    """The larger; ``b`` where either is NaN (one instruction on x86)."""
    ty = _vector_of((a, b))

    def codegen(context, builder, sig, args):
        x, y = (_as_vector(context, builder, v, t, ty) for v, t in zip(args, sig.args, strict=True))
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    return ty(a, b), codegen


@intrinsic
def vmin(typingctx, a, b):
    """The smaller; ``b`` where either is NaN (one instruction on x86)."""
    ty = _vector_of((a, b))

    def codegen(context, builder, sig, args):
        x, y = (_as_vector(context, builder, v, t, ty) for v, t in zip(args, sig.args, strict=True))
        return builder.select(builder.fcmp_ordered("<", x, y), x, y)

    return ty(a, b), codegen


@intrinsic
def scalef32(typingctx, a, n):
    """``a * 2**floor(n)`` of float32 vectors (where HAS_SCALEF)."""

    def codegen(context, builder, sig, args):
        def emit(x, y):
            i16, i32 = ir.IntType(16), ir.IntType(32)
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            return _call(builder, name, [x, y, x, i16(0xFFFF), i32(4)])

        return _by_register(
            builder, emit, _as_vector(context, builder, args[0], sig.args[0], n), args[1]
        )

    return n(a, n), codegen


def _fraction(rounding):
    @intrinsic
    def fraction(typingctx, x):
        def codegen(context, builder, sig, args):
            def emit(y):
                i16, i32 = ir.IntType(16), ir.IntType(32)
                name = "llvm.x86.avx512.mask.reduce.ps.512"
                return _call(builder, name, [y, i32(8 + rounding), y, i16(0xFFFF), i32(4)])

            return _by_register(builder, emit, args[0])

        return x(x), codegen

    return fraction


#: ``x - floor(x)`` and ``x - rint(x)`` of a float32 vector, 0 at infinity (where HAS_SCALEF).
fraction32 = _fraction(1)
remainder32 = _fraction(0)


@intrinsic
def pow2(typingctx, n):
    """``2.0 ** n`` for whole ``n`` in the normal exponent range."""
    bits = n.element.bitwidth
    mantissa, bias = (23, 127) if bits == 32 else (52, 1023)

    def codegen(context, builder, sig, args):
        ity = _INT[n]
        # Adding 1.5 * 2**mantissa puts the whole number into the low bits.
        magic = _constant(n, 1.5 * 2.0**mantissa + bias)
        i = builder.bitcast(builder.fadd(args[0], magic), ity)
        i = builder.shl(i, ir.Constant(ity, [mantissa] * n.lanes))
        return builder.bitcast(i, n.llvm)

    return n(n), codegen


@intrinsic
def rounded32(typingctx, t, factor):
    """``n``, which is ``t * factor`` rounded to a whole number, and ``2.0 ** n``.

    For n in the normal exponent range, and -127, of which the power is 0; three instructions, where
    each by itself takes two or three.
    """

    def codegen(context, builder, sig, args):
        ity = _INT[t]
        # As in pow2: the whole number goes into the low bits.
        magic = _splat(builder, ir.Constant(ir.FloatType(), 1.5 * 2.0**23 + 127), t)
        scale = _as_vector(context, builder, args[1], sig.args[1], t)
        biased = _call(builder, f"llvm.fma.{_suffix(t)}", [args[0], scale, magic])
        bits = builder.shl(builder.bitcast(biased, ity), ir.Constant(ity, [23] * t.lanes))
        results = (builder.fsub(biased, magic), builder.bitcast(bits, t.llvm))
        return context.make_tuple(builder, sig.return_type, results)

    return types.UniTuple(t, 2)(t, factor), codegen


@intrinsic
def log_split64(typingctx, x):
    """From positive normal x the exponent e with x = m 2**e and m in [sqrt(1/2), sqrt(2))."""

    def codegen(context, builder, sig, args):
        ity = _INT[x]
        root = ir.Constant(ity, [0x3FE6A09E667F3BCD] * x.lanes)  # the bits of sqrt(1/2)
        bits = builder.sub(builder.bitcast(args[0], ity), root)
        return builder.sitofp(builder.ashr(bits, ir.Constant(ity, [52] * x.lanes)), x.llvm)

    return x(x), codegen


@intrinsic
def log2_ratio_32(typingctx, a, b):
    """A whole number not more than 0.5861 from log2(a/b), of positive normal a and b.

    The bits of a number, as a whole one over 2**23, are its base 2 logarithm up to a constant and
    0.0861: linear between powers of 2.
    """

    def codegen(context, builder, sig, args):
        ity = _INT[a]
        x, y = (
            builder.bitcast(_as_vector(context, builder, v, t, a), ity)
            for v, t in zip(args, sig.args, strict=True)
        )
        bits = builder.add(builder.sub(x, y), ir.Constant(ity, [1 << 22] * a.lanes))
        return builder.sitofp(builder.ashr(bits, ir.Constant(ity, [23] * a.lanes)), a.llvm)

    return a(a, b), codegen


@intrinsic
def hsum(typingctx, a):
    """The sum of all lanes."""

    def codegen(context, builder, sig, args):
        ty = _LLVM_ELEMENT[a.element]
        fnty = ir.FunctionType(ty, [ty, a.llvm])
        name = f"llvm.vector.reduce.fadd.{_suffix(a)}"
        fn = cgutils.get_or_insert_function(builder.module, fnty, name)
        # reassoc: lanes may be joined as a tree (a fixed one, given the machine).
        return builder.call(fn, [ir.Constant(ty, -0.0), args[0]], fastmath=("reassoc",))

    return a.element(a), codegen


@intrinsic
def hmax(typingctx, a):
    """The largest lane; any where there is a NaN."""

    def codegen(context, builder, sig, args):
        # As a tree of vmax: LLVM's own reduction looks for NaN at each of its steps.
        vector, lanes = args[0], a.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (_lanes(builder, vector, start, lanes) for start in (0, lanes))
            vector = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(vector, ir.IntType(32)(0))

    return a.element(a), codegen


@intrinsic
def first(typingctx, a):
    """The first lane."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], ir.IntType(32)(0))

    return a.element(a), codegen


def _widened(builder, vector, start):
    """Emit LANES64 lanes of a float32 vector, from ``start`` on, in float64."""
    return builder.fpext(_lanes(builder, vector, start, LANES64), f64v.llvm)


def _widening(start):
    @intrinsic
    def widen(typingctx, a):
        def codegen(context, builder, sig, args):
            return _widened(builder, args[0], start)

        return f64v(a), codegen

    return widen


#: The first and the second half of a float32 vector, in float64.
low64, high64 = _widening(0), _widening(LANES64)


@intrinsic
def fold64(typingctx, a):
    """A float32 vector as a float64 vector of sums of two lanes, or of four of a wide one."""

    def codegen(context, builder, sig, args):
        parts = [_widened(builder, args[0], i) for i in range(0, a.lanes, LANES64)]
        return functools.reduce(builder.fadd, parts)

    return f64v(a), codegen


@intrinsic
def halves_sum32(typingctx, a):
    """The sum of the two vectors that a wide one is; a vector itself."""

    def codegen(context, builder, sig, args):
        if a.lanes == LANES32:
            return args[0]
        return builder.fadd(*(_lanes(builder, args[0], start, LANES32) for start in (0, LANES32)))

    return f32v(a), codegen


@intrinsic
def narrowed32(typingctx, low, high):
    """Two float64 vectors as one of float32, rounded."""

    def codegen(context, builder, sig, args):
        half = ir.VectorType(ir.FloatType(), LANES64)
        return _joined(builder, *(builder.fptrunc(each, half) for each in args))

    return f32v(low, high), codegen


@intrinsic
def hany(typingctx, m):
    """True if any lane of the mask is set."""

    def codegen(context, builder, sig, args):
        ity = ir.IntType(m.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], ity), ity(0))

    return types.boolean(m), codegen


@intrinsic
def first_lane(typingctx, m):
    """Index of the first set lane; the number of lanes if none is set."""

    def codegen(context, builder, sig, args):
        ity = ir.IntType(m.lanes)
        bits = builder.zext(builder.bitcast(args[0], ity), ir.IntType(64))
        bits = builder.or_(bits, ir.IntType(64)(1 << m.lanes))
        return builder.cttz(bits, ir.IntType(1)(1))

    return types.int64(m), codegen


def _lane_numbers(ty: Vector) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(64), ty.lanes), list(range(ty.lanes)))


@intrinsic
def lanes_below(typingctx, like, n):
    """Mask of the lanes whose number is below ``n``; ``like`` gives the shape."""

    def codegen(context, builder, sig, args):
        n64 = context.cast(builder, args[1], sig.args[1], types.int64)
        wide = Vector(types.int64, like.lanes)
        return builder.icmp_signed("<", _lane_numbers(like), _splat(builder, n64, wide))

    return _MASK[like](like, n), codegen


@intrinsic
def lane_is(typingctx, like, n):
    """Mask of the one lane with number ``n``."""

    def codegen(context, builder, sig, args):
        n64 = context.cast(builder, args[1], sig.args[1], types.int64)
        wide = Vector(types.int64, like.lanes)
        return builder.icmp_signed("==", _lane_numbers(like), _splat(builder, n64, wide))

    return _MASK[like](like, n), codegen


# --- memory ----------------------------------------------------------------------------

#: Element types in memory: bytes of one element.
ITEMSIZE = {"uint16": 2, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_STORED = {
    "uint16": ir.IntType(16),
    "float16": ir.HalfType(),
    "bfloat16": ir.IntType(16),
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
}


def _widen(builder, loaded, dtype, ty):
    """From the vector type in memory to the vector type of the computation."""
    if dtype == "bfloat16":  # the upper half of a float32
        i32 = ir.VectorType(ir.IntType(32), ty.lanes)
        bits = builder.shl(builder.zext(loaded, i32), ir.Constant(i32, [16] * ty.lanes))
        loaded = builder.bitcast(bits, ir.VectorType(ir.FloatType(), ty.lanes))
    if dtype == "float16" and not HAS_F16:
        loaded = _from_half(builder, loaded)
    if loaded.type == ty.llvm:
        return loaded
    if dtype == "uint16":
        return builder.uitofp(loaded, ty.llvm)
    return builder.fpext(loaded, ty.llvm)


def _from_half(builder, half):
    """A float16 vector as float32, by its bits.

    Exponent and mantissa, moved to where float32 has them, are 2**-112 times the number, also where
    that is subnormal; infinities and NaN get the largest exponent instead.
    """
    lanes = half.type.count
    i32 = ir.VectorType(ir.IntType(32), lanes)
    f32 = ir.VectorType(ir.FloatType(), lanes)

    def number(n):
        return ir.Constant(i32, [n] * lanes)

    bits = builder.bitcast(half, ir.VectorType(ir.IntType(16), lanes))
    bits = builder.zext(bits, i32)
    size = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
    scaled = builder.fmul(builder.bitcast(size, f32), ir.Constant(f32, [2.0**112] * lanes))
    special = builder.icmp_unsigned(">=", size, number(0x7C00 << 13))
    size = builder.select(
        special, builder.or_(size, number(0x7F800000)), builder.bitcast(scaled, i32)
    )
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    return builder.bitcast(builder.or_(size, sign), f32)


@functools.cache
def loader(dtype, ty):
    """An intrinsic ``load(address)`` of one vector of ``dtype``, widened to ``ty``."""
    memory = ir.VectorType(_STORED[dtype], ty.lanes)

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], memory.as_pointer())
            return _widen(builder, builder.load(pointer, align=ITEMSIZE[dtype]), dtype, ty)

        return ty(address), codegen

    return load


@functools.cache
def any_order(*dtypes):
    """Vectors for sums and maxima, whose lanes may be in any order, the same in all ``dtypes``.

    Their type, an intrinsic that puts a number into every lane of one, and a loader for each dtype.

    Of bfloat16 alone it is two registers at once: entries of even number, then those of odd.  A
    shift and a mask take the two apart, where bringing each entry to the lane of its number takes
    a shuffle as well, on the one port of two that has them.
    """
    if set(dtypes) != {"bfloat16"}:
        return f32v, splat32, *(loader(dtype, f32v) for dtype in dtypes)
    half = LANES32W // 2
    pairs = ir.VectorType(ir.IntType(32), half)

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], pairs.as_pointer())
            loaded = builder.load(pointer, align=ITEMSIZE["bfloat16"])
            low = builder.shl(loaded, ir.Constant(pairs, [16] * half))
            high = builder.and_(loaded, ir.Constant(pairs, [0xFFFF0000] * half))
            return builder.bitcast(_joined(builder, low, high), f32w.llvm)

        return f32w(address), codegen

    return f32w, splat32w, *(load for _ in dtypes)


@functools.cache
def tail_loader(dtype, ty):
    """An intrinsic ``load(address, n)``: the first ``n`` lanes are read, the rest -inf (or 0)."""
    memory = ir.VectorType(_STORED[dtype], ty.lanes)

    @intrinsic
    def load(typingctx, address, n):
        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], memory.as_pointer())
            wide = Vector(types.int64, ty.lanes)
            n64 = context.cast(builder, args[1], sig.args[1], types.int64)
            mask = builder.icmp_signed("<", _lane_numbers(ty), _splat(builder, n64, wide))
            letter = "i" if dtype in ("uint16", "bfloat16") else "f"
            suffix = f"v{ty.lanes}{letter}{ITEMSIZE[dtype] * 8}"
            minus_inf = {"uint16": 0, "bfloat16": 0xFF80}.get(dtype, float("-inf"))
            fill = ir.Constant(memory, [minus_inf] * ty.lanes)
            name = f"llvm.masked.load.{suffix}.p0"
            i32 = ir.IntType(32)
            fnty = ir.FunctionType(memory, [pointer.type, i32, mask.type, memory])
            fn = cgutils.get_or_insert_function(builder.module, fnty, name)
            loaded = builder.call(fn, [pointer, i32(ITEMSIZE[dtype]), mask, fill])
            return _widen(builder, loaded, dtype, ty)

        return ty(address, n), codegen

    return load


@intrinsic
def transpose(typingctx, source, target):
    """Write the 16 x 16 float32 matrix at ``source`` to ``target`` with rows as columns."""

    def codegen(context, builder, sig, args):
        i32 = ir.IntType(32)
        pointers = [builder.inttoptr(each, f32v.llvm.as_pointer()) for each in args]

        def row(pointer, i):
            return builder.gep(pointer, [i32(i)])

        rows = [builder.load(row(pointers[0], i), align=4) for i in range(LANES32)]
        # Blocks off the diagonal change places: of 8 x 8 entries, within them of 4 x 4, and so on.
        for size in (8, 4, 2, 1):
            masks = [
                ir.Constant(ir.VectorType(i32, LANES32), lanes)
                for lanes in (
                    [LANES32 + j - size if j & size else j for j in range(LANES32)],
                    [LANES32 + j if j & size else j + size for j in range(LANES32)],
                )
            ]
            for i in range(LANES32):
                if not i & size:
                    pair = rows[i], rows[i + size]
                    rows[i], rows[i + size] = (builder.shuffle_vector(*pair, m) for m in masks)
        for i, each in enumerate(rows):
            builder.store(each, row(pointers[1], i), align=4)
        return context.get_dummy_value()

    return types.void(source, target), codegen


@intrinsic
def lane_sums(typingctx, source):
    """The sums of the lanes of 16 float32 vectors in memory, as two float64 vectors.

    Halves are widened as they are loaded, which takes no shuffle; then two vectors at a time become
    one whose lanes are sums of each, in three rounds.
    """

    def codegen(context, builder, sig, args):
        half = ir.VectorType(ir.FloatType(), LANES64)
        pointer = builder.inttoptr(args[0], half.as_pointer())
        i32 = ir.IntType(32)
        vectors = []
        for i in range(LANES32):
            halves = [
                builder.load(builder.gep(pointer, [i32(2 * i + j)]), align=4) for j in range(2)
            ]
            vectors.append(builder.fadd(*(builder.fpext(each, f64v.llvm) for each in halves)))
        for size in (1, 2, 4):
            masks = [
                ir.Constant(ir.VectorType(i32, LANES64), lanes)
                for lanes in (
                    [LANES64 + j - size if j & size else j for j in range(LANES64)],
                    [LANES64 + j if j & size else j + size for j in range(LANES64)],
                )
            ]
            vectors = [
                builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))
                for x, y in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return context.make_tuple(builder, sig.return_type, vectors)

    return types.UniTuple(f64v, 2)(source), codegen


def add_widened(builder, address, vector):
    """Emit code that adds the lanes of a float32 vector to as many float64 at an address."""
    pointer = builder.inttoptr(address, f64v.llvm.as_pointer())
    for part in range(2):
        place = builder.gep(pointer, [ir.IntType(32)(part)])
        added = _widened(builder, vector, part * LANES64)
        total = builder.fadd(builder.load(place, align=8), added)
        builder.store(total, place, align=8)


@intrinsic
def add64(typingctx, address, vector):
    """Add the lanes of a float32 vector to as many float64 that follow each other in memory."""

    def codegen(context, builder, sig, args):
        add_widened(builder, *args)
        return context.get_dummy_value()

    return types.void(address, vector), codegen


@intrinsic
def repeat32(typingctx, address):
    """The float32 at an address, in every lane."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        return spread(builder, builder.load(pointer, align=4), f32v)

    return f32v(address), codegen


def ask_for(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Emit the request of a cache line."""
    i32 = ir.IntType(32)
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    fnty = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
    fn = cgutils.get_or_insert_function(builder.module, fnty, "llvm.prefetch.p0")
    builder.call(fn, [pointer, i32(0), i32(3), i32(1)])


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address; one outside the array is harmless."""

    def codegen(context, builder, sig, args):
        ask_for(builder, args[0])
        return context.get_dummy_value()

    return types.void(address), codegen


def _narrow(builder, value, dtype):
    """Float32 vectors or numbers, rounded to ``dtype``: to nearest, ties to even; NaN stays NaN."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else None

    def like(element):
        return element if lanes is None else ir.VectorType(element, lanes)

    def number(n):
        i32 = ir.IntType(32)
        return i32(n) if lanes is None else ir.Constant(like(i32), [n] * lanes)

    if dtype == "float16" and HAS_F16:
        return builder.fptrunc(value, like(ir.HalfType()))
    if dtype == "float16":
        bits = builder.bitcast(value, like(ir.IntType(32)))
        sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
        size = builder.and_(bits, number(0x7FFFFFFF))
        # From 2**-14 on: half an ulp is added, less one where the last bit that stays is even.
        odd = builder.and_(builder.lshr(size, number(13)), number(1))
        normal = builder.add(builder.add(size, odd), number(0xFFF - (112 << 23)))
        normal = builder.lshr(normal, number(13))
        # Below: the last bit of a number from 1/2 to 1 is worth 2**-24, as that of a subnormal.
        half = builder.bitcast(number(0x3F000000), value.type)
        small = builder.fadd(builder.bitcast(size, value.type), half)
        small = builder.sub(builder.bitcast(small, size.type), number(0x3F000000))
        rounded = builder.select(builder.icmp_unsigned("<", size, number(113 << 23)), small, normal)
        # From 65520 on: infinity.
        large = builder.icmp_unsigned(">=", size, number(0x477FF000))
        rounded = builder.select(large, number(0x7C00), rounded)
        is_nan = builder.icmp_unsigned(">", size, number(0x7F800000))
        rounded = builder.select(is_nan, number(0x7E00), rounded)
        bits = builder.trunc(builder.or_(rounded, sign), like(ir.IntType(16)))
        return builder.bitcast(bits, like(ir.HalfType()))
    if dtype == "bfloat16":
        bits = builder.bitcast(value, like(ir.IntType(32)))
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        bits = builder.select(is_nan, number(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(bits, number(16)), like(ir.IntType(16)))
    return value


@functools.cache
def storer(dtype):
    """Intrinsics ``store(address, vector)`` and ``store_tail(address, vector, n)``.

    They round a float32 vector to ``dtype`` and write it, or its first ``n`` lanes.
    """

    @intrinsic
    def store(typingctx, address, vector):
        def codegen(context, builder, sig, args):
            value = _narrow(builder, args[1], dtype)
            pointer = builder.inttoptr(args[0], value.type.as_pointer())
            builder.store(value, pointer, align=ITEMSIZE[dtype])
            return context.get_dummy_value()

        return types.void(address, vector), codegen

    @intrinsic
    def store_tail(typingctx, address, vector, n):
        def codegen(context, builder, sig, args):
            value = _narrow(builder, args[1], dtype)
            pointer = builder.inttoptr(args[0], value.type.as_pointer())
            wide = Vector(types.int64, vector.lanes)
            n64 = context.cast(builder, args[2], sig.args[2], types.int64)
            mask = builder.icmp_signed("<", _lane_numbers(vector), _splat(builder, n64, wide))
            letter = "i" if dtype == "bfloat16" else "f"
            size = ITEMSIZE[dtype]
            i32 = ir.IntType(32)
            fnty = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, i32, mask.type])
            name = f"llvm.masked.store.v{vector.lanes}{letter}{8 * size}.p0"
            fn = cgutils.get_or_insert_function(builder.module, fnty, name)
            builder.call(fn, [value, pointer, i32(size), mask])
            return context.get_dummy_value()

        return types.void(address, vector, n), codegen

    return store, store_tail


store, store_tail = storer("float32")


def narrow_store(dtype):
    """An intrinsic ``poke(address, x)``: a float64 number, rounded to ``dtype``.

    To a 16-bit type by way of float32.
    """

    @intrinsic
    def poke(typingctx, address, x):
        def codegen(context, builder, sig, args):
            value = args[1]
            if dtype != "float64":
                value = _narrow(builder, builder.fptrunc(value, ir.FloatType()), dtype)
            pointer = builder.inttoptr(args[0], value.type.as_pointer())
            builder.store(value, pointer, align=ITEMSIZE[dtype])
            return context.get_dummy_value()

        return types.void(address, types.float64), codegen

    return poke


def _scalar_access(ty):
    """Intrinsics ``peek(address)`` and ``poke(address, value)`` for one number."""
    llvm = _LLVM_ELEMENT[ty]
    align = ty.bitwidth // 8

    @intrinsic
    def peek(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.load(builder.inttoptr(args[0], llvm.as_pointer()), align=align)

        return ty(address), codegen

    @intrinsic
    def poke(typingctx, address, value):
        def codegen(context, builder, sig, args):
            number = context.cast(builder, args[1], sig.args[1], ty)
            builder.store(number, builder.inttoptr(args[0], llvm.as_pointer()), align=align)
            return context.get_dummy_value()

        return types.void(address, value), codegen

    return peek, poke


peek_i64, poke_i64 = _scalar_access(types.int64)
peek_f64, poke_f64 = _scalar_access(types.float64)


@intrinsic
def fetch_add(typingctx, address, n):
    """Atomically add ``n`` to the int64 at ``address``; returns what was there."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(address, types.int64), codegen


def _guarded(builder, size):
    """Emit code that lends memory whose last byte is the last one that can be touched.

    It is full of NaN, so that what is read before it is written shows, and is never given back: a
    page or a few for every call of a kernel.
    """
    address, integer, i64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)

    def call(name, result, kinds, *values):
        kind = ir.FunctionType(result, kinds)
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, values)

    touchable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    first = call(
        "mmap", address, [address, i64, integer, integer, integer, i64],
        address(None), i64(touchable + mmap.PAGESIZE), integer(mmap.PROT_READ | mmap.PROT_WRITE),
        integer(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), integer(-1), i64(0),
    )  # fmt: skip
    guard = builder.gep(first, [i64(touchable)])
    call("mprotect", integer, [address, i64, integer], guard, i64(mmap.PAGESIZE), integer(0))
    call("memset", address, [address, integer, i64], first, integer(0xFF), i64(touchable))
    return builder.gep(guard, [i64(-size)])


def scratch(size):
    """An intrinsic: the address of ``size`` bytes on the caller's stack, aligned for vectors.

    In processes that set KLFAST_GUARD_SCRATCH, of `_guarded` memory; there a kernel that reads or
    writes beyond it ends the process.
    """

    @intrinsic
    def area(typingctx):
        def codegen(context, builder, sig, args):
            if GUARDED:
                pointer = _guarded(builder, size)
            else:
                with builder.goto_entry_block():
                    pointer = builder.alloca(ir.ArrayType(ir.IntType(8), size))
                    pointer.align = 64
            return builder.ptrtoint(pointer, ir.IntType(64))

        return types.int64(), codegen

    return area

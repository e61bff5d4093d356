"""Arrays between pages that cannot be touched, and calls on them for processes of their own.

A kernel that reads or writes one byte beyond such an array ends its process, with a traceback of
Python that says which call it was. `table` calls all of the operation table, `others` the rest.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import math
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal

import ml_dtypes
import numpy as np
from klfast.kernels import cpu
from measures import computed

import klfast
from klfast import _pairs, gaussian
from klfast._dispatch import compiled
from klfast._operations import OPERATIONS, Operation
from klfast._values import given, plain_rows
from klfast.estimators import kl_from_counts, monte_carlo_kl

Array = Any
End = Literal["first", "last"]
#: Whether the first byte of an array, or the last one, is next to such a page.
ENDS: tuple[End, ...] = ("first", "last")

#: Widths at and beside one, a vector of either type, and a tile of either loop and of both.
WIDTHS = (1, 8, 15, 16, 17, 1023, 1024, 1025, 2047, 2048, 2049, 4099)
ROWS = 3
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)

#: Entries between rows, and between the entries of a row.
LAYOUTS: dict[str, Callable[[int], tuple[int, int]]] = {
    "rows one after the other": lambda width: (width, 1),
    "rows apart": lambda width: (width + 5, 1),
    "rows backwards": lambda width: (-width, 1),
    "the same row": lambda width: (0, 1),
    "entries apart": lambda width: (3 * width, 3),
    "entries backwards": lambda width: (width, -1),
    "columns": lambda _: (1, ROWS),
    "the same entry": lambda _: (1, 0),
}
TOGETHER = [name for name, steps in LAYOUTS.items() if steps(100)[1] == 1]

_library = ctypes.CDLL(None, use_errno=True)
_library.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def memory(size: int, end: End) -> Array:
    """Bytes of which the first one, or the last one, is next to a page that cannot be touched."""
    page = mmap.PAGESIZE
    middle = max(1, -(-size // page)) * page
    whole = np.frombuffer(mmap.mmap(-1, middle + 2 * page), np.uint8)
    address = whole.ctypes.data
    for guard in (address, address + page + middle):
        if _library.mprotect(guard, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = page if end == "first" else page + middle - size
    return whole[start : start + size]


def placed(values: Array, end: End, layout: str = "rows one after the other") -> Array:
    """A copy of a table with such a layout; what is between its entries is NaN, or -1.

    Where rows or entries are all the same, it has the first ones.
    """
    n, width = values.shape
    steps = LAYOUTS[layout](width)
    reach = [(length - 1) * step for length, step in zip(values.shape, steps, strict=True)]
    before = -sum(min(0, each) for each in reach)
    entries = 1 + before + sum(max(0, each) for each in reach)
    size = values.dtype.itemsize
    raw = memory(size * entries, end)
    raw[:] = 0xFF
    base = raw.view(values.dtype)
    strides = [size * step for step in steps]
    table = np.lib.stride_tricks.as_strided(base[before:], (n, width), strides)
    keep = tuple(slice(None) if step else slice(1) for step in steps)
    table[keep] = values[keep]
    return table


def guard_work_arrays() -> None:
    """Have what is allocated through NumPy's functions end at such a page, full of ones' bits."""
    empty = np.empty

    def empty_(shape: Any, dtype: Any = np.float64, *rest: Any, **options: Any) -> Array:
        kind = np.dtype(dtype)
        size = math.prod(np.atleast_1d(np.asarray(shape, np.int64)).tolist()) * kind.itemsize
        if rest or options or kind.hasobject or not size:
            return empty(shape, dtype, *rest, **options)
        found = memory(size, "last")
        found[:] = 0xFF
        return found.view(kind).reshape(shape)

    def full(shape: Any, value: Any, dtype: Any = None) -> Array:
        found = empty_(shape, np.asarray(value).dtype if dtype is None else dtype)
        found[...] = value
        return found

    def zeros(shape: Any, dtype: Any = np.float64) -> Array:
        return full(shape, 0, dtype)

    for function in (empty_, full, zeros):
        setattr(np, function.__name__.rstrip("_"), function)


def ends_process(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether such a page is touched by a call, which a child process makes."""
    child = os.fork()
    if not child:
        function(*arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)


def start() -> None:
    faulthandler.enable()
    guard_work_arrays()


def logits(width: int) -> tuple[Array, Array]:
    """Rows that are close, that are far apart, and of which one has a support of its own."""
    rng = np.random.default_rng(width)
    p = rng.normal(size=(ROWS, width))
    q = p + np.array([[0.1], [4.0], [0.1]]) * rng.normal(size=p.shape)
    q[-1, width // 2] = -np.inf
    return p, q


def some_measures() -> Iterator[tuple[Operation, tuple[float, ...]]]:
    """Every operation, with parameters that take different kernels."""
    for operation in OPERATIONS.values():
        examples = {"weight": (0.5, 0.3), "k": (1.0,)}
        if operation.name == "renyi":
            examples["alpha"] = (0.0, 0.5, 2.0, math.inf)
        for parameters in itertools.product(
            *(examples.get(each.name, (1.5,)) for each in operation.parameters)
        ):
            yield operation, parameters


SHARED = ("kl", "jeffreys", "js", "js:0.3", "tv", "renyi:2", "renyi:inf", "same_top", "top_p")
GRADIENTS = ("kl", "jeffreys", "renyi:inf")


def arranged(width: int, narrow: bool) -> Iterator[tuple[str, End, Array, Array]]:
    """Pairs of tables, each layout with another one.

    ``narrow``: those that the float32 kernels read; else all others.
    """
    values = logits(width)
    layouts = TOGETHER if narrow else [*LAYOUTS]
    for number, layout in enumerate(layouts):
        other = layouts[(number + 1 + width % 3) % len(layouts)]
        for end in ENDS if width % 8 == 1 else ENDS[1:]:
            sides = []
            for side, own in enumerate((layout, other)):
                # Each pair of narrow dtypes would be another few kernels to compile.
                kinds = FLOATS[:3] if narrow else FLOATS[3:] if own in TOGETHER else FLOATS
                turn = number + width // 2 + (0 if narrow else side)
                kind = kinds[turn % len(kinds)]
                sides.append(placed(values[side].astype(kind), end, own))
            yield layout, end, sides[0], sides[1]


def close_to(found: Array, expected: Array, what: str) -> None:
    """Within what a narrow result is rounded to."""
    narrow = found.dtype.itemsize < 4
    found = found.astype(np.float64)
    rounding = (1e-2, 1e-3) if narrow else (1e-5, 1e-6)
    np.testing.assert_allclose(found, expected, *rounding, err_msg=what)


def check(what: str, end: End, p: Array, q: Array) -> None:
    """Call everything that the operation table has on two tables, and on float64 copies of them."""
    a, b = (np.array(x, np.float64) for x in (p, q))
    tokens = memory(8 * len(p), end).view(np.int64)
    tokens[:] = p.shape[1] - 1
    for operation, parameters in some_measures():
        found = computed(operation, parameters, p, q, tokens)
        close_to(
            found,
            computed(operation, parameters, a, b, tokens),
            f"{operation.name} {parameters} of {what}",
        )
    together = klfast.compare(p, q, SHARED, backend="cpu", dtype="float64")
    whole = klfast.compare(a, b, SHARED, backend="cpu", dtype="float64")
    of_states = shared(p, q)
    for name in SHARED:
        close_to(together[name], whole[name], f"{name} of {what}")
        close_to(of_states[name], whole[name], f"{name} of a state of {what}")

    out = placed(np.zeros(p.shape, p.dtype), end)
    klfast.log_softmax(p, out=out, backend="cpu")
    close_to(out, klfast.log_softmax(a, backend="cpu"), f"log_softmax of {what}")
    for name in GRADIENTS:
        into = tuple(placed(np.zeros(x.shape, x.dtype), end) for x in (p, q))
        value, _ = klfast.value_and_grad(name, p, q, wrt="both", out=into, backend="cpu")
        expected, slopes = klfast.value_and_grad(name, a, b, wrt="both", backend="cpu")
        close_to(value, expected, f"{name} with gradients of {what}")
        for found, slope in zip(into, slopes, strict=True):
            close_to(found, slope, f"gradient of {name} of {what}")


def shared(p: Array, q: Array) -> dict[str, Array]:
    """Values of states of the rows, and what a second look at the rows gives."""
    state = klfast.RowState.of(p, q, metrics=SHARED, backend="cpu")
    return state.finish(state.partial_sums(p, q, backend="cpu"))


def table(narrow: bool, widths: slice = slice(None)) -> None:
    """All of the operation table, of rows of any width around a tile's.

    Every second width is enough for a process that guards scratch memory: it may have 65530
    mappings.
    """
    start()
    every = [*WIDTHS, 32769] if narrow else [*WIDTHS]  # the last is cut into parts
    for width in every[widths]:
        for layout, end, p, q in arranged(width, narrow):
            check(f"{layout}, {p.dtype} and {q.dtype}, {width} entries, {end}", end, p, q)


def others() -> None:
    """What is not in the operation table."""
    start()
    for end in ENDS:
        for n, width in ((1, 1), (15, 17), (16, 33), (17, 513), (33, 1025)):
            rng = np.random.default_rng(width)
            p, q = rng.normal(size=(2, n, width))
            what = f"{n} rows of {width}, {end}"
            for kind in (np.float32, np.float16, np.float64):
                check_gaussian(what, *(placed(x.astype(kind), end) for x in (p, q)))
            for kind in (np.float32, ml_dtypes.bfloat16):
                check_pairs(what, *(placed(x.astype(kind), end) for x in (p, q)))
                check_samples(what, *(placed(x.astype(kind), end) for x in (p, q)))
            for number in (np.int32, np.int64, np.float32):
                check_counts(what, *(placed(np.floor(9 + x).astype(number), end) for x in (p, q)))
            check_words(what, end, n, width)


def check_gaussian(what: str, p: Array, q: Array) -> None:
    views = given({"mean": p, "logvar": q}).views.values()
    rows = [plain_rows(view, p.shape[:1], p.shape[1]) for view in views]
    kernels: Any = compiled()
    _, sound = kernels.gaussian_kl(rows, None, ())
    assert sound, f"what is in memory beyond {what} counts"
    a, b = (x.astype(np.float64) for x in (p, q))
    for size in (2, 4):
        arrays = (p, q, q, p)[:size]
        end: End = "last" if what.endswith("last") else "first"
        into = tuple(placed(np.zeros_like(p), end) for _ in arrays)
        value, _ = gaussian.value_and_grad(*arrays, out=into)
        whole, slopes = gaussian.value_and_grad(*(a, b, b, a)[:size])
        close_to(value, whole, f"Gaussians, {what}")
        for found, slope in zip(into, slopes, strict=True):
            close_to(found, slope, f"gradients of Gaussians, {what}")


def check_pairs(what: str, p: Array, q: Array) -> None:
    a, b = (x.astype(np.float64) for x in (p, q))
    for metric in ("kl", "js", "tv", "hellinger2"):
        for first, second, x, y in ((p, None, a, None), (p, q, a, b)):
            found = klfast.pairwise(first, second, metric, dtype="float64")
            close_to(found, klfast.pairwise(x, y, metric), f"pairs, {metric}, {what}")


def check_samples(what: str, p: Array, q: Array) -> None:
    for estimator in ("k1", "k2", "k3"):
        found = monte_carlo_kl(p, q, estimator)
        wide = monte_carlo_kl(p.astype(np.float64), q.astype(np.float64), estimator)
        close_to(found.value, wide.value, f"{estimator}, {what}")


def check_counts(what: str, p: Array, q: Array) -> None:
    found = kl_from_counts(p, q, "laplace")
    wide = kl_from_counts(p.astype(np.float64), q.astype(np.float64), "laplace")
    close_to(found, wide, f"counts, {what}")


def check_words(what: str, end: End, n: int, width: int) -> None:
    """The decoding of stored rows, and 16-bit numbers as float32."""
    rng = np.random.default_rng(width)
    words = placed(rng.integers(0, 65536, (n, width)).astype(np.uint16), end)
    log_p = placed(rng.normal(size=(n, width)).astype(np.float32), end)
    decoding = np.tile([1e-4, -9.0, -9.0], (n, 1))
    for sides in ((words, words), (words, log_p), (log_p, log_p)):
        stored = [(side, decoding) for side in sides]
        out = [placed(np.zeros((n, width), np.float32), end) for _ in sides]
        decoded = [np.zeros((n, width), np.float32) for _ in sides]
        found, expected = cpu.join_floors(stored, out), _pairs.join_floors(stored, decoded)
        close_to(found, expected, f"sums of decoded rows, {what}")
        close_to(np.stack(out), np.stack(decoded), f"decoded, {what}")
    for kind in (np.float16, ml_dtypes.bfloat16):
        source = placed(log_p.astype(kind), end)
        out = placed(np.zeros((n, width), np.float32), end)
        cpu.to_float32(source, out)
        np.testing.assert_array_equal(out, source.astype(np.float32))
    cpu.read_bytes(log_p)

"""Calls on rows in the memory of a device, as launches of kernels on the current stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from klfast._arrays import FLOATS, Rows
from klfast._dispatch import Result

from ..plans import COLUMNS, LOG_SOFTMAX, Plan, Step, exact_operation, plan_of, plans_of
from .loader import kernel, machine

__all__ = [
    "CALL",
    "Work",
    "cut",
    "differentiate",
    "evaluate",
    "is_fast",
    "log_softmax",
    "schedule",
    "second_read",
]

ROWS = np.dtype(
    [
        ("data", "u8"), ("offsets", "u8"), ("row_stride", "i8"), ("stride", "i8"),
        ("inverse_temperature", "f8"), ("dtype", "i4"), ("probabilities", "i4"),
    ],
    align=True,
)  # fmt: skip
#: The one argument of every kernel: see rows.cuh.
CALL = np.dtype(
    [
        ("p", ROWS), ("q", ROWS), ("width", "i8"), ("count", "i8"), ("where", "u8"),
        ("tokens", "u8"), ("values", "u8"), ("columns", "i8"), ("parameters", "f8", (16,)),
        ("out", "u8"), ("out_offsets", "u8"), ("out_stride", "i8"), ("out_dtype", "i4"),
        ("phase", "i4"), ("resident", "i8"), ("parts", "i8"), ("part_width", "i8"),
        ("states", "u8"), ("arrived", "u8"), ("into_p", ROWS), ("into_q", ROWS), ("scales", "u8"),
    ],
    align=True,
)  # fmt: skip
DTYPE_CODE = {name: code for code, name in enumerate(FLOATS)}

#: Threads of a block, and blocks that the registers of a multiprocessor must have room for.
THREADS, BLOCKS = 256, {"one_pass": 4, "single_pass": 3}
#: ``one_pass`` needs so many registers that smaller blocks make better use of them.
THREADS_OF = {"one_pass": 128}
#: Vectors of each row that a thread of ``one_pass`` has under way or reads.
RING = 5
#: Bytes of shared memory that a team needs beside the rows that it keeps.
EXCHANGE = 768
#: Threads of a block of ``two_phase``, and blocks that share a multiprocessor: the more sums are
#: taken, up to so many, the more registers they need.
SHAPES = ((5, 256, 2), (8, 128, 3), (1 << 10, 128, 2))
#: The same of ``gradients``.
GRADIENT_SHAPE = 128, 3
#: Definitions of kernels that have a whole block work on a row.
WHOLE: dict[str, object] = {"THREADS": THREADS, "TEAM": THREADS, "BLOCKS": 1}
#: Rows up to this length are the work of a warp; longer ones that of a block.
SHORT = 2048
#: Fewer rows than blocks that a device has room for are cut into parts, of this length or more.
SMALLEST_PART = 2048
BLOCKS_EACH = 3  # parts that a multiprocessor gets
#: Entries of a vector, at most.
VECTOR = 8
#: Numbers in the state of a part, at most.
STATE = 64
#: The most blocks in a launch: they go on to other rows when they have done theirs.
MOST_BLOCKS = 1 << 20

#: Bytes of shared memory that the device takes for itself, of each block.
RESERVED = 1024

#: Phases of ``finish``.
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


#: What a step is called in two_phase, whose terms come in this order.
TERMS = {
    ("kl", "pq"): "KL",
    ("kl", "qp"): "REVERSE_KL",
    ("renyi", "pq"): "RENYI",
    ("renyi", "qp"): "REVERSE_RENYI",
    ("js", "pq"): "JS",
    ("tv", "pq"): "TV",
    ("hellinger2", "pq"): "HELLINGER2",
    ("jeffreys", "pq"): "JEFFREYS",
    ("cross_entropy", "pq"): "CROSS_ENTROPY",
    ("statistics", "p"): "STATISTICS_P",
    ("statistics", "q"): "STATISTICS_Q",
    ("top", "p"): "ARGMAX_P",
    ("top", "q"): "ARGMAX_Q",
}
MOST_TERMS = 8
#: Operations that ``exact`` has together, in this order.
DIVERGENCES = ("kl", "cross_entropy", "tv", "hellinger2", "jeffreys")
#: Kernels that finish all rows themselves.
FINISHED = ("single_pass", "top_k")


def is_fast(p: Rows, q: Rows | None = None) -> bool:
    """Whether the float32 kernels can read these rows."""
    size = FLOATS[p.dtype]
    if size == 8 or p.stride != size or p.input == "probs" or p.temperature < 1e-30:
        return False
    return q is None or (is_fast(q) and q.temperature == p.temperature)


def is_aligned(p: Rows, q: Rows) -> bool:
    """Whether vectors of both rows begin at the same entries, in every pair of rows."""
    vector = 4 if FLOATS[p.dtype] == FLOATS[q.dtype] == 4 else 8

    def skews(rows: Rows) -> list[int]:
        """Of the first row, and what each axis of the batch adds."""
        steps = [step for _, step in rows.axes] or [rows.row_stride if rows.count > 1 else 0]
        return [place // FLOATS[rows.dtype] % vector for place in (rows.address, *steps)]

    first, second = skews(p), skews(q)
    if p.axes or q.axes:  # which may be different ones
        return first[0] == second[0] and not any(first[1:] + second[1:])
    return first == second


class Launch(NamedTuple):
    """A kernel, and the steps that one launch of it does."""

    module: str
    steps: tuple[Step, ...]


def _columns(step: Step) -> int:
    return COLUMNS.get(step.operation, 1)


def _terms(step: Step) -> tuple[Step, ...]:
    """The steps of ``two_phase`` that have the values of a step, column after column."""
    if step.operation == "kl_both":
        return Step("two_phase", "kl", "pq"), Step("two_phase", "kl", "qp")
    return (Step("two_phase", step.operation, step.rows, step.parameter),)


def steps_of(plans: Sequence[Plan]) -> list[Step]:
    """The different steps of some operations."""
    return list(dict.fromkeys(step for plan in plans for step in plan.steps))


def schedule(steps: Sequence[Step], p: Rows, q: Rows | None) -> list[Launch]:
    """Which kernels do these steps: what reads a pair of rows does it once for all of them."""
    launches = []
    if q is not None and is_fast(p, q):
        terms = {
            step: _terms(step)
            for step in steps
            if step.module in ("one_pass", "two_phase", "single_pass")
            and all((term.operation, term.rows) in TERMS for term in _terms(step))
        }
        pairs = [step for step in terms if len(step.rows) == 2]
        if pairs and (len(terms) > 1 or pairs[0].module == "two_phase"):
            order = list(TERMS)
            together = sorted(
                {term for each in terms.values() for term in each},
                key=lambda term: (order.index((term.operation, term.rows)), term.parameter),
            )
            for start in range(0, len(together), MOST_TERMS):
                group = tuple(together[start : start + MOST_TERMS])
                launches.append(Launch("two_phase", group))
            steps = [step for step in steps if step not in terms]
    sides = {"p": p, "q": p if q is None else q}
    for step in steps:
        fast = step.module == "top_k" or (
            step.module in ("one_pass", "single_pass")
            and is_fast(*(sides[side] for side in step.rows))
        )
        launches.append(Launch(step.module if fast else "exact", (step,)))
    return launches


class Cut(NamedTuple):
    """How the rows of a launch are shared out."""

    team: int  # threads that work on a row, or on a part of it
    parts: int
    part_width: int


def whole(width: int, threads: int = THREADS) -> Cut:
    """Short rows are the work of a warp, long ones that of a block."""
    return Cut(32 if width <= SHORT else threads, 1, width)


def cut(device: int, count: int, width: int, threads: int = THREADS) -> Cut:
    """Few long rows are cut into parts, so that every multiprocessor has several."""
    multiprocessors = machine(device).multiprocessors
    if count >= 2 * multiprocessors or width < 2 * SMALLEST_PART:
        return whole(width, threads)
    parts = min(-(-BLOCKS_EACH * multiprocessors // count), width // SMALLEST_PART)
    part_width = -(-width // parts // 64) * 64
    return Cut(threads, -(-width // part_width), part_width)


class Residence(NamedTuple):
    """Where a pair of rows is kept between the phases of a kernel."""

    threads: int
    blocks: int  # that the registers of a multiprocessor must have room for
    cluster: int  # blocks that share a row
    resident: int  # entries that a team keeps
    shared: int  # bytes of shared memory
    parts: Cut


def second_read(device: int, p: Rows, q: Rows, at: Residence) -> str:
    """Where the second phase of ``two_phase`` finds a pair of rows."""
    here = machine(device)
    rest = max(0, p.width - at.cluster * at.resident)
    if rest == 0:
        return "shared memory"
    # Rows that are worked on at a time; all of them, where they are cut.
    rows = p.count if at.resident == 0 else here.multiprocessors * at.blocks // at.cluster
    size = rows * rest * (FLOATS[p.dtype] + FLOATS[q.dtype])
    cache = "L2" if size <= here.cache else "L2 and device memory"
    return f"shared memory, the rest from {cache}" if at.resident else cache


def _share(width: int, blocks: int) -> int:
    """Entries of whole vectors that a block keeps, of a row that begins anywhere in one."""
    return -(-(-(-width // blocks) + VECTOR) // VECTOR) * VECTOR


def shape_of(steps: Sequence[Step]) -> tuple[int, int]:
    """Threads of a block of ``two_phase``, and blocks that share a multiprocessor."""
    sums = sum(2 if step.operation in ("statistics", "cross_entropy") else 1 for step in steps)
    return next(shape[1:] for shape in SHAPES if sums <= shape[0])


def residence(device: int, p: Rows, q: Rows, shape: tuple[int, int], parts: Cut) -> Residence:
    """As few blocks a row as have room for all of it, and leave no multiprocessor idle.

    They share a multiprocessor with others, or if that makes a pair fit, have it for themselves:
    the same number of threads in one block. Rows that are cut are read again from where they were,
    for their parts do not know when all of them have been read.
    """
    here, size = machine(device), FLOATS[p.dtype] + FLOATS[q.dtype]
    threads, blocks = shape
    if parts.parts > 1:
        return Residence(threads, blocks, 1, 0, EXCHANGE, parts)
    if parts.team == 32:
        threads, blocks = SHAPES[-1][1:]
        kept = _share(p.width, 1)
        return Residence(threads, blocks, 1, kept, (kept * size + EXCHANGE) * threads // 32, parts)
    clusters = (1, 2, 4, 8) if here.clusters else (1,)
    alone = threads * blocks, 1
    for (threads, blocks), cluster in itertools.product((shape, alone), clusters):
        most = min(here.shared_together // blocks - RESERVED, here.shared)
        room = (most - 2 * threads - EXCHANGE) // size // VECTOR * VECTOR
        wanted = _share(p.width, cluster)
        busy = p.count * cluster >= here.multiprocessors
        if wanted <= room and (busy or p.width < 2 * cluster * SMALLEST_PART):
            break
    kept = min(room, wanted)
    shared, parts = kept * size + EXCHANGE, parts._replace(team=threads)
    return Residence(threads, blocks, cluster, kept, shared, parts)


class Work:
    """The launches of one call: their argument, and the memory that they use."""

    def __init__(self, p: Rows, q: Rows | None, where: Any, tokens: Any) -> None:
        self.device: int = cupy.cuda.Device().id
        self.count = p.count
        self.rows = {"p": p, "q": p if q is None else q}
        # What is given back in the order of the stream, after the last launch.
        self.memory: list[Any] = []
        self.call = np.zeros((), CALL)
        for name, value in (
            ("width", p.width), ("count", p.count), ("parts", 1),
            ("where", 0 if where is None else where.ptr),
            ("tokens", 0 if tokens is None else tokens.ptr),
        ):  # fmt: skip
            self.call[name] = value
        self.described = {side: self.describe(rows) for side, rows in self.rows.items()}

    def room(self, size: int) -> int:
        """The address of new memory."""
        pointer = cupy.cuda.alloc(size)
        self.memory.append(pointer)
        address: int = pointer.ptr
        return address

    def launch(
        self, name: str, blocks: int, definitions: Mapping[str, object] = WHOLE, shared: int = 0
    ) -> None:
        """Queue a kernel, on at most so many blocks."""
        function = kernel(self.device, name, tuple(definitions.items()))
        function.launch(min(blocks, MOST_BLOCKS), self.call, shared)

    def _offsets(self, rows: Rows) -> int:
        """The address of the bytes from the first row to each of them, if one stride is wrong."""
        if not rows.axes:
            return 0
        call, inner = self.call, rows.count
        call["out"] = address = self.room(8 * rows.count)
        for phase, (length, step) in enumerate(rows.axes):
            inner //= length
            call["phase"], call["parameters"][:3] = min(phase, 1), (inner, length, step)
            self.launch("offsets", -(-rows.count // THREADS))
        call["phase"] = 0
        return address

    def describe(self, rows: Rows) -> Any:
        described = np.zeros((), ROWS)
        described["data"], described["offsets"] = rows.address, self._offsets(rows)
        described["row_stride"], described["stride"] = rows.row_stride, rows.stride
        described["inverse_temperature"] = 1.0 / rows.temperature
        described["dtype"] = DTYPE_CODE[rows.dtype]
        described["probabilities"] = rows.input == "probs"
        return described

    def read(self, sides: str) -> tuple[Rows, Rows]:
        """Have kernels read these rows, as their first and their second."""
        first, second = sides[0], sides[-1]
        self.call["p"], self.call["q"] = self.described[first], self.described[second]
        return self.rows[first], self.rows[second]

    def write_to(self, rows: Rows) -> None:
        """Have kernels write their results there."""
        call = self.call
        call["out_offsets"] = self._offsets(rows)
        call["out"], call["out_stride"] = rows.address, rows.row_stride
        call["out_dtype"] = DTYPE_CODE[rows.dtype]

    def set_parts(self, cut: Cut) -> None:
        """Have kernels cut rows like this, and count the parts that are done from 0."""
        call = self.call
        call["parts"], call["part_width"], call["phase"] = cut.parts, cut.part_width, 0
        if cut.parts > 1:
            call["states"] = self.room(8 * STATE * self.count * cut.parts)
            call["arrived"] = arrived = self.room(4 * self.count)
            stream = cupy.cuda.get_current_stream()
            cupy.cuda.runtime.memsetAsync(arrived, 0, 4 * self.count, stream.ptr)

    def finish(self, plan: Plan, other: int, result: Result) -> None:
        """Make the results of values, and of those so many columns further on."""
        call = self.call
        self.write_to(result.rows)
        call["parameters"][: len(plan.numbers)] = plan.numbers
        call["parameters"][12:15] = plan.finish, other, result.unit
        call["phase"] = phase = REDUCTIONS[result.reduction]
        blocks = 1 if phase else -(-self.count // THREADS)
        if blocks:
            self.launch("finish", blocks)

    def do(self, launch: Launch, column: int) -> None:
        """Queue a kernel that writes its columns from this one on, and what must follow it."""
        values = int(self.call["values"])
        if launch.module != "exact":
            self.call["values"] = values + 8 * column
            getattr(self, f"_{launch.module}")(launch)
            self.call["values"] = values
        if launch.module not in FINISHED:
            for step in launch.steps:
                self.exact(step, column, marked=launch.module != "exact")
                column += _columns(step)

    def exact(self, step: Step, column: int, marked: bool) -> None:
        """Do a step in float64: all rows, or those that another kernel has marked."""
        if step.operation == "kl_both":
            for number, term in enumerate(_terms(step)):
                self.exact(term, column + number, marked)
            return
        call = self.call
        self.read(step.rows)
        call["phase"], call["parameters"][[0, 15]] = marked, (step.parameter, column)
        # Marked rows are few, and each thread looks for one.
        blocks = 4 * machine(self.device).multiprocessors if marked else MOST_BLOCKS
        name = exact_operation(step)
        if name in DIVERGENCES:
            call["parameters"][0], name = DIVERGENCES.index(name), "divergence"
        self.launch("exact", min(self.count, blocks), WHOLE | {f"OPERATION_{name}": 1})

    def _top_k(self, launch: Launch) -> None:
        (step,) = launch.steps
        self.read(step.rows)
        self.call["parameters"][0] = step.parameter
        self.launch("top_k", self.count, shared=8 * THREADS)

    def _one_pass(self, launch: Launch) -> None:
        (step,) = launch.steps
        p, q = self.read(step.rows)
        threads = THREADS_OF.get(launch.module, THREADS)
        shape = cut(self.device, self.count, p.width, threads)
        definitions: dict[str, object] = {
            "THREADS": threads, "TEAM": shape.team, "BLOCKS": BLOCKS[launch.module],
            "DTYPE_P": DTYPE_CODE[p.dtype], f"OPERATION_{step.operation}": 1,
        }  # fmt: skip
        shared = 0
        if len(step.rows) == 2:
            sizes = FLOATS[p.dtype], FLOATS[q.dtype]
            shared = RING * threads * sum(sizes) * 16 // min(sizes)
            definitions |= {"DTYPE_Q": DTYPE_CODE[q.dtype], "ALIGNED": int(is_aligned(p, q))}
        self.set_parts(shape)
        self.call["parameters"][:2] = step.parameter, step.limit
        items = self.count * shape.parts
        self.launch(launch.module, -(-items * shape.team // threads), definitions, shared)

    _single_pass = _one_pass

    def _two_phase(self, launch: Launch) -> None:
        shape = shape_of(launch.steps)
        parts = cut(self.device, self.count, self.rows["p"].width, shape[0])
        names = ",".join(TERMS[step.operation, step.rows] for step in launch.steps)
        for number, step in enumerate(launch.steps):
            self.call["parameters"][number] = step.parameter
        # The normalizers of parts must be known before their terms are summed.
        phases = (0,) if parts.parts == 1 else (1, 2)
        self.keep("two_phase", *self.read("pq"), {"TERMS": names}, shape, parts, phases)

    def keep(
        self,
        name: str,
        p: Rows,
        q: Rows,
        purpose: Mapping[str, object],
        shape: tuple[int, int],
        parts: Cut,
        phases: Sequence[int] = (0,),
    ) -> None:
        """Queue a kernel that keeps its rows."""
        here = residence(self.device, p, q, shape, parts)
        team = here.parts.team
        definitions = {
            "THREADS": here.threads, "TEAM": team, "CLUSTER": here.cluster, "BLOCKS": here.blocks,
            "DTYPE_P": DTYPE_CODE[p.dtype], "DTYPE_Q": DTYPE_CODE[q.dtype],
            "ALIGNED": int(is_aligned(p, q)), **purpose,
        }  # fmt: skip
        self.set_parts(here.parts)
        self.call["resident"] = here.resident
        teams = self.count * here.parts.parts * here.cluster
        for phase in phases:
            self.call["phase"] = phase
            self.launch(name, -(-teams * team // here.threads), definitions, here.shared)


def evaluate(
    metrics: Sequence[tuple[str, tuple[float, ...]]],
    p: Rows,
    q: Rows | None,
    where: Any,
    tokens: Any,
    results: Sequence[Result],
) -> None:
    """Queue the values of some operations, on the current device and stream.

    ``where`` and ``tokens`` point to a byte or an int64 number a row, in memory of CuPy's.
    """
    plans = plans_of(metrics)
    work = Work(p, q, where, tokens)
    call = work.call
    launches = schedule(steps_of(plans), p, q)
    columns: dict[Step, int] = {}
    starts, width = [], 0
    for launch in launches:
        starts.append(width)
        for step in launch.steps:
            columns[step] = width
            width += _columns(step)
    call["values"], call["columns"] = values, _ = work.room(8 * width * p.count), width
    if p.count:
        for launch, start in zip(launches, starts, strict=True):
            work.do(launch, start)
    for plan, result in zip(plans, results, strict=True):
        places = [
            columns[step] if step in columns else columns[_terms(step)[0]] for step in plan.steps
        ]
        call["values"] = values + 8 * (places[0] + plan.column)
        work.finish(plan, places[-1] - places[0], result)


def log_softmax(x: Rows, where: Any, out: Rows) -> None:
    """Queue the logarithms of the probabilities of all entries, on the current device."""
    if not x.count:
        return
    work = Work(x, None, where, None)
    call = work.call
    work.write_to(out)
    work.read("p")
    call["parameters"][12] = out.stride
    if not is_fast(x):
        work.exact(LOG_SOFTMAX, 0, marked=False)
        return
    # What a block has read it keeps, as far as there is room, and writes from there.
    size, here = FLOATS[x.dtype], machine(work.device)
    wanted = size * (x.width + 16 // size - 1)
    threads, team = (THREADS, 32) if x.width <= SHORT else (THREADS, THREADS)
    room = here.shared_together // 2 - RESERVED - 2 * threads
    if wanted * threads // team > room:
        threads = team = 1024
        room = here.shared - 2 * threads
    kept = min(-(-wanted // 16) * 16, room * team // threads // 16 * 16)
    call["resident"] = kept // size
    definitions = {
        "THREADS": threads, "TEAM": team, "BLOCKS": 1, "DTYPE_P": DTYPE_CODE[x.dtype],
        "OPERATION_log_softmax": 1,
    }  # fmt: skip
    blocks = -(-x.count * team // threads)
    work.launch("single_pass", blocks, definitions, kept * threads // team)


class Slope(NamedTuple):
    """How a gradient follows from those that the kernels know, of rows that may be exchanged.

    ``parameter`` is an order or the weight of P; the factors are of the gradients with respect to P
    and Q, and ``power`` says how often S = sum p^alpha q^(1-alpha) is one.
    """

    operation: str
    parameter: float = 1.0
    factor_p: float = 1.0
    factor_q: float = 1.0
    power: int = 0
    swapped: bool = False


def slope_of(name: str, parameters: tuple[float, ...]) -> Slope:
    """The gradient of an operation of the table.

    Derivatives of log(S)/(alpha-1) with respect to the logits of P and Q are
    alpha/(alpha-1) (r - p) and q - r; those of S itself are S (alpha-1) times as large.
    """
    if name in ("kl", "jeffreys", "tv", "cross_entropy"):
        return Slope(name)
    if name == "entropy":  # cross-entropy with itself
        return Slope("cross_entropy")
    if name == "reverse_kl":
        return Slope("kl", swapped=True)
    if name == "js":
        (weight,) = parameters
        constant = weight in (0.0, 1.0)
        return Slope("js", weight, *(0.0, 0.0) if constant else (weight, 1.0 - weight))
    alpha = {"chi2": 2.0, "hellinger2": 0.5}.get(name) or parameters[0]
    if alpha == 1.0:
        return Slope("kl")
    if name == "alpha" and alpha == 0.0:
        return Slope("kl", swapped=True)
    order_p = 1.0 if alpha == math.inf else alpha / (alpha - 1.0)
    # S - 1 is (alpha-1) times the Tsallis divergence.
    scales = {"renyi": 1.0, "tsallis": 1.0, "chi2": 1.0, "hellinger2": 0.5}
    scale = scales.get(name) or 1.0 / alpha
    power = int(name != "renyi")
    if 0.0 < alpha < 0.5:
        # r is the same for Q, P and 1 - alpha, but each row is on the other side of it.
        return Slope("renyi", 1.0 - alpha, -scale, -scale * order_p, power, swapped=True)
    operation = {0.0: "renyi_0", math.inf: "renyi_inf"}.get(alpha, "renyi")
    return Slope(operation, alpha, scale * order_p, scale, power)


def differentiate(
    metric: tuple[str, tuple[float, ...]],
    p: Rows,
    q: Rows | None,
    where: Any,
    result: Result,
    scales: Any,
    into: Mapping[str, Rows],
) -> None:
    """Queue the values of an operation, and its gradients with respect to the logits of ``into``.

    ``scales`` point to a float64 number a row, or are None; ``into`` has rows for "p", "q" or both,
    which are written to their full width: with zeros beyond that of the logits.
    """
    if not p.count:
        return
    slope = slope_of(*metric)
    sides = "qp" if slope.swapped else "pq"
    plan = plan_with_gradient(metric, q)
    together = is_kept(slope, plan, p, q, into)
    if not together:
        evaluate([metric], p, q, where, None, [result])
    work = Work(p, q, where, None)
    call = work.call
    first, second = work.read(sides)
    for side, place in zip(sides, ("into_p", "into_q"), strict=True):
        if side in into:
            call[place] = work.describe(into[side])
    call["scales"] = 0 if scales is None else scales.ptr
    numbers = (
        slope.factor_p / result.unit, slope.factor_q / result.unit, slope.power, 0.0,
        *(into[side].width if side in into else 0 for side in sides),
    )  # fmt: skip
    blocks = p.count
    if together:
        (step,) = plan.steps
        call["values"], call["columns"] = work.room(16 * p.count), 2
        call["parameters"][:7] = (step.parameter, *numbers)
        purpose = {
            "TERMS": TERMS[step.operation, "pq"],
            "TO_P": int(sides[0] in into), "TO_Q": int(sides[1] in into),
        }  # fmt: skip
        work.keep(
            "gradients", first, second, purpose, GRADIENT_SHAPE, whole(p.width, GRADIENT_SHAPE[0])
        )
        work.exact(step, 0, marked=True)
        work.read(sides)
        call["parameters"][15] = 1
        blocks = min(blocks, 4 * machine(work.device).multiprocessors)
    call["parameters"][:7] = (slope.parameter, *numbers)
    operation = {f"OPERATION_{slope.operation}": 1}
    work.launch("exact_gradients", blocks, WHOLE | operation)
    if together:
        work.finish(plan, 0, result)


def plan_with_gradient(metric: tuple[str, tuple[float, ...]], q: Rows | None) -> Plan:
    """That of the value; entropy is the cross-entropy of a row with itself."""
    return plan_of("cross_entropy", ()) if q is None else plan_of(*metric)


def is_kept(slope: Slope, plan: Plan, p: Rows, q: Rows | None, into: Mapping[str, Rows]) -> bool:
    """Whether ``gradients`` gives value and gradient from one read."""
    step, rows = plan.steps[0], {"p": p, "q": p if q is None else q}
    operations = {"renyi": ("renyi", "hellinger2")}.get(slope.operation, (slope.operation,))
    return (
        step.module != "exact"
        and step.operation in operations
        and is_fast(*rows.values())
        and all(
            each.dtype == rows[side].dtype and each.stride == FLOATS[each.dtype]
            for side, each in into.items()
        )
    )

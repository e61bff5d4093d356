"""All divergences of many rows against many.

Most divergences are made of sums over the vocabulary that are products of a function of p and one
of q: cross-entropies, and S = sum p^a q^(1-a). All pairs of them are one matrix product, taken a
part of the vocabulary at a time: the tables of a part stay in cache, and parts are added up in
float64. In float32 a kernel multiplies the tables, which are made in the order it reads them; where
one side has few rows, the kernel makes the other's as it goes. In float64 NumPy multiplies them.
Total variation and Jensen-Shannon divergence are no such products; the same kernel goes over the
tables with other terms.

What is subtracted from a product of its own size would lose its digits. Pairs where much cancels,
and those whose product leaves the range, are computed again one by one, straight from the logits,
by the kernels that compute them anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from ._arguments import Batch, check_options, prepare, target_of
from ._arrays import FLOATS, Rows, decode, encode, memory, view_of, wrap
from ._dispatch import compiled
from ._operations import parse_metric

__all__ = ["pairwise"]

Values = NDArray[np.float64]
Table = NDArray[Any]
Kind = Literal["probs", "powers", "logs"]

#: Entries of the vocabulary in a part.
PART = 4096
#: Entries that a first guess of normalizers is made from.
SAMPLE = 2048
#: Rows of a panel, which are next to each other in every entry of a table.
PANEL = 16
#: Bytes.
CACHE_LINE = 64
#: Fewer rows than this on a side are not worth a matrix product, unless they are THIN beside MANY.
FEW = 5
#: Up to this many rows on a side, the table of the other one is only made in cache.
THIN = 256
MANY = 64
#: What is left of a subtraction, at least, beside what went into it: rounding of 1e-6 (float32) or
#: 1e-14 is then below 1e-5 or 1e-11 of the result.
TRUSTED = {"float32": 0.1, "float64": 1e-3}
#: Results of the tiles below these are computed again.
SMALLEST = {"tv": 0.02, "js": 0.01}
#: Pairs that are computed one by one at a time.
AT_A_TIME = 1 << 18
#: Bytes of rows among which pairs are taken before moving on, so that they stay in cache.
CACHE = 1 << 20

PAIRS = (
    "kl", "reverse_kl", "cross_entropy", "jeffreys", "js", "renyi", "alpha", "tsallis", "chi2",
    "hellinger2", "tv",
)  # fmt: skip


class PairwiseOptions(TypedDict, total=False):
    """Keywords of `pairwise`."""

    input: Literal["logits", "log_probs", "probs"]
    temperature: float | tuple[float, float]
    base: float | None
    vocab_size: int | None
    dtype: Any


def pairwise(p: Any, q: Any = None, metric: str = "kl", **options: Unpack[PairwiseOptions]) -> Any:
    """All N x M divergences of the rows of `p` from those of `q`, or of `p` from each other.

    Formula:
        result[i, j] = D(P_i, Q_j), with the formula of the function that has the name.

    Arguments:
        p: logits, shape (N, V), in float16, bfloat16, float32 or float64: NumPy arrays, PyTorch
            tensors or JAX arrays on the CPU, or anything with `__dlpack__`.
        q: logits, shape (M, V), of the same library; None is `p` itself.
        metric: "kl", "reverse_kl", "cross_entropy", "jeffreys", "js" or "js:W", "renyi:A",
            "alpha:A", "tsallis:A", "chi2", "hellinger2" or "tv".
        input, temperature, base, vocab_size, dtype: as for `kl_divergence`.

    Returns:
        Shape (N, M), the same kind of array as `p`. Relative errors are at most 1e-5 (1e-11 for
        float64), never below 0, and exactly 0 for identical rows: pairs that are close to each
        other are computed as `kl_divergence` computes them. Many of them take as long as there.
        So do all pairs for a Rényi order of 0, infinity, or close to 1, and "js" with a weight
        other than 1/2.

    Raises:
        TypeError, ValueError: as `kl_divergence`, and for arrays that are not two-dimensional.

    Use it as a precomputed metric: `DBSCAN(metric="precomputed").fit(pairwise(p, metric="js"))`.
    The square roots of "js" and "hellinger2", and "tv" itself, are metrics; "kl" is none.
    """
    operation, parameters = parse_metric(metric)
    if operation.name not in PAIRS:
        raise ValueError(f"metric is {metric!r}; accepted: {', '.join(PAIRS)}")
    settings = check_options("pairwise", options, PairwiseOptions)
    temperatures = settings.temperature
    if not isinstance(temperatures, tuple | list):
        temperatures = (temperatures, temperatures)
    sides, batches = [], []
    for name, x, temperature in zip("pq", (p, p if q is None else q), temperatures, strict=True):
        one = replace(settings, temperature=temperature)
        batch = prepare({name: x}, one)
        if len(batch.shape) != 1:
            view = view_of(x, batch.place, name)
            raise ValueError(f"{name} has shape {view.shape}; accepted: shape (N, V)")
        batches.append(batch)
        sides.append(_Side(name, x, batch))
    first, second = batches
    if first.place != second.place:
        raise TypeError(
            f"p is {first.place}, q is {second.place}; accepted: arrays of one library on one "
            "device"
        )
    if first.p.width != second.p.width:
        raise ValueError(
            f"p and q have vocabularies of {first.p.width} and {second.p.width} entries; accepted: "
            "the same number"
        )
    wide = "float64" in (first.widest, second.widest)
    first.widest = "float64" if wide else "float32"
    dtype, _ = target_of(first, (first.p.count, second.p.count))
    same = (q is None or q is p) and temperatures[0] == temperatures[1]
    values = _all_pairs(operation.name, parameters, sides[0], sides[1], first.widest, same)
    if operation.logarithmic and settings.base is not None:
        values = values / settings.unit
    return wrap(encode(values, dtype), dtype, first.place, p)


class _Side:
    """The rows of one argument, and tables made of them."""

    def __init__(self, name: str, x: Any, batch: Batch) -> None:
        self.rows, self.backend = batch.p, batch.backend
        view = view_of(x, batch.place, name)
        self.stored, self.stored_dtype = memory(view), view.dtype
        self.shifts = np.zeros((2, _whole(self.rows.count)))

    @property
    def in_kernel(self) -> bool:
        """Whether a kernel makes its tables."""
        rows = self.rows
        return (
            compiled() is not None
            and rows.input != "probs"
            and rows.offsets is None
            and rows.stride == FLOATS[rows.dtype]
            and rows.dtype != "float64"
        )

    def prepare(self) -> NDArray[np.bool_]:
        """Find the normalizers, in float64; returns which rows are no distributions."""
        normalizer = self._of_rows("logsumexp", self.rows)
        self._shift(normalizer)
        # The kernel gives large ones to the digits of their size, which would be missing here.
        far = np.flatnonzero(np.isfinite(normalizer) & (np.abs(normalizer) > 32.0))
        if far.size and self.rows.input != "probs":
            c = decode(self.stored[far, : self.rows.width], self.stored_dtype).max(-1)
            self.shifts[:, far] = c, -np.log(self._of_rows("top_p", self.rows, far)[far])
        return ~np.isfinite(normalizer)

    def guess(self) -> None:
        """Take normalizers from the first entries, as if the others were like them."""
        some = min(SAMPLE, self.rows.width)
        normalizer = self._of_rows("logsumexp", replace(self.rows, width=some))
        normalizer += math.log(self.rows.width / some)
        self._shift(np.where(np.isfinite(normalizer), normalizer, 0.0))

    def _shift(self, normalizer: Values) -> None:
        shifts = self.shifts[:, : self.rows.count]
        if self.rows.input == "probs":
            shifts[1] = normalizer
            return
        # x/T - normalizer as (x - c)/T - rest, where the subtraction from a large x is exact.
        with np.errstate(all="ignore"):
            c = (normalizer * self.rows.temperature).astype(np.float32).astype(np.float64)
            shifts[:] = c, normalizer - c / self.rows.temperature

    def _of_rows(self, name: str, rows: Rows, numbers: NDArray[np.int64] | None = None) -> Values:
        out = np.empty(rows.count)
        self.backend.run(name, rows, None, (), numbers, out)
        return out

    def table(
        self,
        part: slice,
        table: Table,
        kind: Kind,
        sums: Values,
        factor: float = 1.0,
        nothing: float = 0.0,
    ) -> bool:
        """Fill a table with p, a power of it, or its logarithm times a factor; `nothing` for log 0.

        p is relative to what the shifts are. Its sum is added to the first of `sums`, and with
        "probs" that of p log p to the second. Whether an entry is 0 is returned.
        """
        rows = self.rows
        if self.in_kernel and table.ndim == 3:
            options = {"factor": factor, "nothing": nothing}
            zero: bool = compiled().fill_table(  # type: ignore[union-attr]
                rows, part, self.shifts, table, kind, sums, **options
            )
            return zero
        values = decode(self.stored[:, part], self.stored_dtype)
        c, rest = self.shifts[:, : rows.count, None]
        x = np.log(values) if rows.input == "probs" else values - c
        log_p = x / rows.temperature - rest
        empty = log_p == -np.inf
        weight = np.exp(log_p)
        sums[0, : rows.count] += weight.sum(-1)
        if kind == "probs":
            sums[1, : rows.count] += np.sum(np.where(empty, 0.0, weight * log_p), -1)
            _write(weight, table)
        elif kind == "powers":
            _write(np.exp(factor * np.where(empty, 0.0, log_p)) * ~empty, table)
        else:
            _write(np.where(empty, nothing, factor * log_p), table)
        return bool(empty.any())

    def add_products(
        self,
        part: slice,
        few: Table,
        count: int,
        kind: Kind,
        sums: Values,
        factor: float,
        product: Values,
    ) -> bool:
        """Add the products of a table of ``count`` rows with the one that `table` would fill.

        Only where a kernel makes that; returns what `table` does.
        """
        zero: bool = compiled().add_products(  # type: ignore[union-attr]
            few, count, self.rows, part, self.shifts, kind, sums, product, factor=factor
        )
        return zero

    def some(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows with these numbers, which may repeat."""
        offsets = self.rows.offsets
        if offsets is None:
            offsets = np.arange(self.rows.count, dtype=np.int64) * self.rows.row_stride
        return replace(self.rows, count=len(numbers), offsets=offsets[numbers], row_stride=0)


def _all_pairs(
    name: str, parameters: tuple[float, ...], p: _Side, q: _Side, dtype: str, same: bool
) -> Values:
    shape = (p.rows.count, q.rows.count)
    products = name not in SMALLEST
    worth = products and _is_thin(p, q, dtype) and max(shape) >= MANY
    if min(shape) < FEW and not worth:
        method: Callable[..., tuple[Values, NDArray[np.bool_]]] | None = None
    elif products:
        method = _products
    else:
        method = _tiles if dtype == "float32" and parameters in ((), (0.5,)) else None
    if method is None:
        values, doubtful = np.empty(shape), np.ones(shape, np.bool_)
    else:
        with np.errstate(all="ignore"):
            values, doubtful = method(name, parameters, p, q, dtype, same)
    _again(name, parameters, p, q, values, doubtful)
    return values


def _again(
    name: str,
    parameters: tuple[float, ...],
    p: _Side,
    q: _Side,
    values: Values,
    doubtful: NDArray[np.bool_],
) -> None:
    """Compute pairs one by one, those of a few rows after each other."""
    if not doubtful.any():
        return
    i, j = np.nonzero(doubtful)
    row_bytes = p.rows.width * 4
    block = max(1, CACHE // (2 * row_bytes))
    order = np.lexsort((j, i, j // block, i // block))
    i, j = i[order], j[order]
    for start in range(0, len(i), AT_A_TIME):
        some = slice(start, start + AT_A_TIME)
        out = np.empty(len(i[some]))
        p.backend.run(name, p.some(i[some]), q.some(j[some]), parameters, None, out)
        values[i[some], j[some]] = out


# Matrix products


@dataclass(slots=True)
class _Sums:
    """What is added up over the vocabulary, with p and q relative to what the shifts are."""

    product: Values  # (N, M)
    of_p: Values  # (2, N): the sums of p, and of p log p
    of_q: Values  # (2, M)
    outside: NDArray[np.bool_] | None  # (N, M), whether p is above 0 where q is 0; None: nowhere

    def holds(self) -> bool:
        """Whether the shifts were near enough to the normalizers that no p has left float32."""
        masses = np.concatenate([self.of_p[0], self.of_q[0]])
        return bool((np.isnan(masses) | ((masses > 1e-13) & (masses < 1e13))).all())


def _products(
    name: str, parameters: tuple[float, ...], p: _Side, q: _Side, dtype: str, same: bool
) -> tuple[Values, NDArray[np.bool_]]:
    if name == "reverse_kl":
        values, doubtful = _products("kl", (), q, p, dtype, same)
        return values.T, doubtful.T
    if name == "jeffreys":
        there, back = (_products("kl", (), *pair, dtype, same) for pair in ((p, q), (q, p)))
        return there[0] + back[0].T, there[1] | back[1].T
    alpha = {"chi2": 2.0, "hellinger2": 0.5}.get(name, parameters[0] if parameters else 1.0)
    if not 0.0 < alpha < math.inf:
        values = np.empty((p.rows.count, q.rows.count))
        return values, np.ones_like(values, np.bool_)
    s = _sums(p, q, dtype, alpha, same, exactly=name == "cross_entropy")
    log_p, log_q = np.log(s.of_p[0]), np.log(s.of_q[0])
    values, doubtful = s.product, np.empty(s.product.shape, np.bool_)
    # A few rows at a time, which stay in cache.
    rows_at_a_time = max(PANEL, CACHE // (64 * values.shape[1]))
    for start in range(0, len(values), rows_at_a_time):
        some = slice(start, start + rows_at_a_time)
        block, rows = values[some], (s.of_p[:, some, None], log_p[some, None])
        if alpha == 1.0:
            doubtful[some] = _entropic(name, block, *rows, log_q, TRUSTED[dtype])
        else:
            doubtful[some] = _of_order(name, alpha, block, rows[1], log_q, TRUSTED[dtype])
    bad = ~np.isfinite(log_p)[:, None] | ~np.isfinite(log_q)
    if s.outside is not None:
        # Of a row that is no distribution, the kernels say what the result is.
        infinite = s.outside & ~bad
        doubtful &= ~infinite
        values[infinite] = np.inf
    doubtful |= bad
    return values, doubtful


def _entropic(
    name: str, product: Values, of_p: Values, log_p: Values, log_q: Values, trusted: float
) -> NDArray[np.bool_]:
    """Cross-entropies or KL divergences in place of products, and which are doubtful.

    With masses P and Q, p = P p' and q = Q q':  -sum p' log q' = log Q - (sum p log q)/P, and
    sum p' log p' = (sum p log p)/P - log P.  What is rounded is sum p log q, which is no more than
    cross-entropy and log Q together, sum p log p likewise, and log P and log Q, whose rounding is
    as that of a number of 0.2. A cross-entropy that is more than log Q loses nothing by it.
    """
    mass, own = of_p
    product *= -1.0 / mass
    product += log_q
    if name == "cross_entropy":
        return ~(product > trusted + np.abs(log_q))
    # values > trusted (cross-entropy + others), rearranged.
    least = product * trusted
    least += trusted * (0.2 + np.abs(log_p)) + trusted * np.abs(log_q)
    product += own / mass - log_p
    return ~(product > least)


def _of_order(
    name: str, alpha: float, total: Values, log_p: Values, log_q: Values, trusted: float
) -> NDArray[np.bool_]:
    """Divergences in place of the sums of p^alpha q^(1-alpha), and which are doubtful."""
    beta = alpha - 1.0
    doubtful = ~((total > 1e-20) & (total < 1e30))
    total *= np.exp(-alpha * log_p)
    total *= np.exp(beta * log_q)
    doubtful |= ~(np.abs(total - 1.0) > trusted)
    if name == "renyi":
        np.log(total, out=total)
        total /= beta
    else:
        total -= 1.0
        total /= {"alpha": alpha * beta, "tsallis": beta, "chi2": 1.0, "hellinger2": -1.0}[name]
    return doubtful


def _sums(p: _Side, q: _Side, dtype: str, alpha: float, same: bool, exactly: bool) -> _Sums:
    """The sums of p log q, or with another order than 1 those of p^alpha q^(1-alpha).

    What a row is relative to cancels from its divergences, and only has to be near its normalizer,
    which then comes from the same read of the logits. It is found first where that does not hold,
    where high powers of it would not stay in range, and for cross-entropies (`exactly`), which
    may be less than what guesses are wrong by.
    """
    sides = (p,) if same else (p, q)
    ways: list[Callable[[_Side], Any]] = [_Side.prepare]
    if p.in_kernel and q.in_kernel and dtype == "float32" and alpha <= 2.0 and not exactly:
        ways.insert(0, _Side.guess)
    for find in ways:
        for side in sides:
            find(side)
        if same:
            q.shifts = p.shifts
        s = _add_up(p, q, dtype, alpha)
        if s.holds():
            break
    return s


def _add_up(p: _Side, q: _Side, dtype: str, alpha: float) -> _Sums:
    n, m = p.rows.count, q.rows.count
    product, of_p, of_q = _empty_sums(n, m)
    outside = None
    entropic = alpha == 1.0
    sides: list[tuple[_Side, Kind, Values, float]] = [
        (p, "probs" if entropic else "powers", of_p, alpha),
        (q, "logs" if entropic else "powers", of_q, 1.0 if entropic else 1.0 - alpha),
    ]
    thin = _is_thin(p, q, dtype)
    turned = thin and n > m
    if turned:
        sides.reverse()
        product = np.zeros(product.shape[::-1])
    (x, x_kind, x_sums, x_factor), (y, y_kind, y_sums, y_factor) = sides
    # The table of few rows has as many entries as the one of THIN rows, which stays in cache.
    most = PART * THIN // _whole(x.rows.count) if thin else PART
    buffer = _Buffer((x.rows.count,) if thin else (n, m), dtype, most)
    for part in _parts(p.rows.width, most):
        tables = buffer.tables(part)
        zeros = [x.table(part, tables[0], x_kind, x_sums, x_factor)]
        if thin:
            few = tables[0], x.rows.count
            zeros.append(y.add_products(part, *few, y_kind, y_sums, y_factor, product))
        else:
            zeros.append(y.table(part, tables[1], y_kind, y_sums, y_factor))
            _add_products(tables[0], tables[1], (n, m), part, product)
        if zeros[0 if turned else 1] and alpha >= 1.0:
            outside = _outside(p, q, part) | (False if outside is None else outside)
    if turned:
        product = product.T
    return _Sums(product[:n, :m], of_p[:, :n], of_q[:, :m], outside)


def _is_thin(p: _Side, q: _Side, dtype: str) -> bool:
    """Whether a side has few rows, and the table of the other need not be written."""
    few = min(p.rows.count, q.rows.count) <= THIN
    return few and dtype == "float32" and p.in_kernel and q.in_kernel


def _add_products(x: Table, y: Table, shape: tuple[int, int], part: slice, product: Values) -> None:
    """Add the matrix product of two tables of rows."""
    kernels = compiled() if x.ndim == 3 else None
    if kernels is None:
        product[: shape[0], : shape[1]] += np.matmul(x, y.T)
    else:
        kernels.add_pairs("product", x, y, shape, part.stop - part.start, product)


def _empty_sums(n: int, m: int) -> tuple[Values, Values, Values]:
    """Zeros for all pairs of rows and for the rows of each side, in whole panels."""
    n, m = _whole(n), _whole(m)
    return np.zeros((n, m)), np.zeros((2, n)), np.zeros((2, m))


def _whole(rows: int) -> int:
    """As many rows as there are in whole panels."""
    return -(-rows // PANEL) * PANEL


def _parts(width: int, most: int = PART) -> Iterator[slice]:
    """Parts of the vocabulary, of up to ``most`` entries."""
    return (slice(start, min(start + most, width)) for start in range(0, width, most))


class _Buffer:
    """Memory for tables of so many rows, the same for every part of the vocabulary.

    A table has the shape (rows, entries), or where a kernel reads it, (panels, entries, PANEL),
    with room for more entries than there are.
    """

    def __init__(self, rows: tuple[int, ...], dtype: str, most: int = PART) -> None:
        self.rows = rows
        self.in_panels = dtype == "float32" and compiled() is not None
        # A vector that lies in two cache lines takes twice as long to load.
        self.memory = [_aligned(_whole(n) * self._apart(most), dtype) for n in rows]

    def _apart(self, width: int) -> int:
        """Entries from the start of a row or panel to that of the next."""
        return -(-width // PANEL) * PANEL if self.in_panels else width

    def tables(self, part: slice) -> list[Table]:
        """Contiguous tables for a part, over what was in the last ones."""
        apart = self._apart(part.stop - part.start)
        shapes: list[tuple[int, ...]]
        if not self.in_panels:
            shapes = [(n, apart) for n in self.rows]
        else:
            shapes = [(_whole(n) // PANEL, apart, PANEL) for n in self.rows]
        pairs = zip(self.memory, shapes, strict=True)
        return [memory[: math.prod(shape)].reshape(shape) for memory, shape in pairs]


def _aligned(size: int, dtype: str) -> Table:
    memory = np.empty(size + CACHE_LINE, dtype)
    skip = -memory.ctypes.data % CACHE_LINE // memory.itemsize
    return memory[skip : skip + size]


def _write(values: Values, table: Table) -> None:
    """Fill a table, which may be in panels, with the values of its rows."""
    n, width = values.shape
    if table.ndim == 2:
        table[...] = values
        return
    whole = np.zeros((_whole(n), width))
    whole[:n] = values
    table[:, :width] = whole.reshape(-1, PANEL, width).transpose(0, 2, 1)


def _outside(p: _Side, q: _Side, part: slice) -> NDArray[np.bool_]:
    """Whether a row of the first has weight where one of the second has none."""
    nothing = 0.0 if p.rows.input == "probs" else -np.inf
    inside, missing = (
        (decode(side.stored[:, part], side.stored_dtype) != nothing).astype(np.float32)
        for side in (p, q)
    )
    outside: NDArray[np.bool_] = inside @ (1.0 - missing).T > 0
    return outside


# Tiles


def _tiles(
    name: str, parameters: tuple[float, ...], p: _Side, q: _Side, dtype: str, same: bool
) -> tuple[Values, NDArray[np.bool_]]:
    n, m = p.rows.count, q.rows.count
    values = np.zeros((_whole(n), _whole(m)))
    kernels = compiled()
    if kernels is None:
        return values[:n, :m], np.ones((n, m), np.bool_)
    sides = (p,) if same else (p, q)
    bad = [side.prepare() for side in sides]
    unused = np.zeros((2, max(values.shape)))
    buffer = _Buffer(tuple(side.rows.count for side in sides), dtype)
    for part in _parts(p.rows.width):
        tables = buffer.tables(part)
        for side, table in zip(sides, tables, strict=True):
            if name == "tv":
                side.table(part, table, "probs", unused)
            else:
                base_2 = {"factor": 1.0 / math.log(2.0), "nothing": -math.inf}
                side.table(part, table, "logs", unused, **base_2)
        kernels.add_pairs(name, tables[0], tables[-1], (n, m), part.stop - part.start, values)
    values = values[:n, :m]
    if same:
        values = np.triu(values) + np.triu(values, 1).T
    doubtful = ~(values > SMALLEST[name]) | bad[0][:, None] | bad[-1]
    return np.minimum(values, 1.0 if name == "tv" else math.log(2.0)), doubtful

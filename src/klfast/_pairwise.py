"""All divergences of many rows against many.

Most divergences are made of sums over the vocabulary that are products of a function of p and one
of q: cross-entropies, and S = sum p^a q^(1-a). All pairs of them are one matrix product, taken a
part of the vocabulary at a time: the tables of a part stay in cache, and parts are added up in
float64. In float32 a kernel multiplies the tables, which are made in the order it reads them, in
float64 NumPy does. Total variation and Jensen-Shannon divergence are no such products; the same
kernel goes over the tables with other terms.

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

#: Entries of the vocabulary in a part.
PART = 4096
#: Rows of a panel, which are next to each other in every entry of a table.
PANEL = 16
#: Bytes.
CACHE_LINE = 64
#: Fewer rows than this on a side are not worth a matrix product.
FEW = 5
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

    def prepare(self) -> NDArray[np.bool_]:
        """Find the normalizers, in float64; returns which rows are no distributions."""
        normalizer = self._of_rows("logsumexp", None)
        shifts = self.shifts[:, : self.rows.count]
        if self.rows.input == "probs":
            shifts[1] = normalizer
            return ~np.isfinite(normalizer)
        # x/T - normalizer as (x - c)/T - rest, where the subtraction from a large x is exact.
        with np.errstate(all="ignore"):
            c = (normalizer * self.rows.temperature).astype(np.float32).astype(np.float64)
            rest = normalizer - c / self.rows.temperature
        # The kernel gives large ones to the digits of their size, which would be missing here.
        far = np.flatnonzero(np.isfinite(normalizer) & (np.abs(normalizer) > 32.0))
        if far.size:
            c[far] = decode(self.stored[far, : self.rows.width], self.stored_dtype).max(-1)
            rest[far] = -np.log(self._of_rows("top_p", far)[far])
        shifts[:] = c, rest
        return ~np.isfinite(normalizer)

    def _of_rows(self, name: str, numbers: NDArray[np.int64] | None) -> Values:
        out = np.empty(self.rows.count)
        self.backend.run(name, self.rows, None, (), numbers, out)
        return out

    def tables(
        self,
        part: slice,
        powers: Table | None,
        logs: Table | None,
        own: Values,
        order: float = 1.0,
        factor: float = 1.0,
        nothing: float = 0.0,
    ) -> bool:
        """Fill `powers` with p^order and `logs` with log p times a factor; `nothing` for log 0.

        With powers, the sums of powers times log p are added to `own`. Whether an entry is 0 is
        returned.
        """
        kernels = compiled()
        some = powers if powers is not None else logs
        assert some is not None
        rows = self.rows
        if (
            kernels is not None
            and some.ndim == 3
            and rows.input != "probs"
            and rows.offsets is None
            and rows.stride == FLOATS[rows.dtype]
            and rows.dtype != "float64"
        ):
            options = {"order": order, "factor": factor, "nothing": nothing}
            zero: bool = kernels.fill_tables(rows, part, self.shifts, powers, logs, own, **options)
            return zero
        values = decode(self.stored[:, part], self.stored_dtype)
        c, rest = self.shifts[:, : rows.count, None]
        x = np.log(values) if rows.input == "probs" else values - c
        log_p = x / rows.temperature - rest
        empty = log_p == -np.inf
        power = np.exp(order * np.where(empty, 0.0, log_p)) * ~empty
        if powers is not None:
            own[: rows.count] += np.sum(np.where(empty, 0.0, power * log_p), -1)
            _write(power, powers)
        if logs is not None:
            _write(np.where(empty, nothing, factor * log_p), logs)
        return bool(empty.any())

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
    if min(shape) < FEW:
        method: Callable[..., tuple[Values, NDArray[np.bool_]]] | None = None
    elif name in SMALLEST:
        method = _tiles if dtype == "float32" and parameters in ((), (0.5,)) else None
    else:
        method = _products
    if method is None:
        values, doubtful = np.empty(shape), np.ones(shape, np.bool_)
    else:
        bad_p = bad_q = p.prepare()
        if same:
            q.shifts = p.shifts
        else:
            bad_q = q.prepare()
        with np.errstate(all="ignore"):
            values, doubtful = method(name, parameters, p, q, dtype, same)
        doubtful |= bad_p[:, None] | bad_q
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
    """What is added up over the vocabulary."""

    product: Values  # (N, M)
    own_p: Values  # (N), sum p log p
    own_q: Values  # (M)
    outside: NDArray[np.bool_]  # (N, M), whether p is above 0 where q is 0
    outside_q: NDArray[np.bool_]  # the other way round


def _products(
    name: str, parameters: tuple[float, ...], p: _Side, q: _Side, dtype: str, same: bool
) -> tuple[Values, NDArray[np.bool_]]:
    if name == "reverse_kl":
        values, doubtful = _products("kl", (), q, p, dtype, same)
        return values.T, doubtful.T
    alpha = {"chi2": 2.0, "hellinger2": 0.5}.get(name, parameters[0] if parameters else 1.0)
    trusted = TRUSTED[dtype]
    if alpha == 1.0:
        s = _sums(p, q, dtype, None, name == "jeffreys")
        if name == "cross_entropy":
            values = -s.product
            doubtful = ~(values > trusted)
        elif name == "jeffreys":
            values = s.own_p[:, None] + s.own_q - s.product
            doubtful = ~(values > trusted * -s.product)
        else:
            # In place, as new memory takes longer; values > trusted (values - own), rearranged.
            values = np.subtract(s.own_p[:, None], s.product, out=s.product)
            doubtful = ~(values > (trusted / (1.0 - trusted)) * -s.own_p[:, None])
        infinite = s.outside | s.outside_q
    elif 0.0 < alpha < math.inf:
        s = _sums(p, q, dtype, alpha, False)
        total, beta = s.product, alpha - 1.0
        away = np.abs(total - 1.0) > trusted
        doubtful = ~(away & (total > 1e-20) & (total < 1e30))
        if name == "renyi":
            values = np.divide(np.log(total, out=total), beta, out=total)
        else:
            scale = {"alpha": alpha * beta, "tsallis": beta, "chi2": 1.0, "hellinger2": -1.0}[name]
            values = (total - 1.0) / scale
        infinite = s.outside if alpha > 1.0 else np.zeros_like(s.outside)
    else:
        values = np.empty((p.rows.count, q.rows.count))
        return values, np.ones_like(values, np.bool_)
    if infinite.any():
        # A row that is no distribution makes its product NaN; the kernels say what the result is.
        doubtful &= ~infinite | np.isnan(values)
        values[infinite] = np.inf
    return values, doubtful


def _sums(p: _Side, q: _Side, dtype: str, alpha: float | None, both: bool) -> _Sums:
    """The sums of p log q (`both`: and of q log p), or with an order alpha, p^a q^(1-a)."""
    n, m = p.rows.count, q.rows.count
    product, own_p, own_q = _empty_sums(n, m)
    outside, outside_q = np.zeros((n, m), np.bool_), np.zeros((n, m), np.bool_)
    powers, logs = _Buffer((n, m), dtype), _Buffer((n, m) if both else (), dtype)
    for part in _parts(p.rows.width):
        left, right = powers.tables(part)
        logs_p, powers_q = logs.tables(part) if both else (None, None)
        if alpha is None:
            zero_p = p.tables(part, left, logs_p, own_p)
            zero_q = q.tables(part, powers_q, right, own_q)
        else:
            zero_p = p.tables(part, left, None, own_p, alpha)
            zero_q = q.tables(part, right, None, own_q, 1.0 - alpha)
        _add_products(left, right, (n, m), part, product)
        if logs_p is not None and powers_q is not None:
            _add_products(logs_p, powers_q, (n, m), part, product)
        if zero_q:
            outside |= _outside(p, q, part)
        if zero_p and both:
            outside_q |= _outside(q, p, part).T
    return _Sums(product[:n, :m], own_p[:n], own_q[:m], outside, outside_q)


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
    return np.zeros((n, m)), np.zeros(n), np.zeros(m)


def _whole(rows: int) -> int:
    """As many rows as there are in whole panels."""
    return -(-rows // PANEL) * PANEL


def _parts(width: int) -> Iterator[slice]:
    """Parts of the vocabulary."""
    return (slice(start, min(start + PART, width)) for start in range(0, width, PART))


class _Buffer:
    """Memory for a table of each side, the same for every part of the vocabulary.

    A table has the shape (rows, entries), or where a kernel reads it, (panels, entries, PANEL).
    """

    def __init__(self, rows: tuple[int, ...], dtype: str) -> None:
        self.rows = rows
        self.in_panels = dtype == "float32" and compiled() is not None
        # A vector that lies in two cache lines takes twice as long to load.
        self.memory = [_aligned(_whole(n) * PART, dtype) for n in rows]

    def tables(self, part: slice) -> list[Table]:
        """Contiguous tables for a part, over what was in the last ones."""
        width = part.stop - part.start
        shapes: list[tuple[int, ...]]
        if not self.in_panels:
            shapes = [(n, width) for n in self.rows]
        else:
            padded = -(-width // PANEL) * PANEL
            shapes = [(_whole(n) // PANEL, padded, PANEL) for n in self.rows]
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
    unused = np.zeros(max(values.shape))
    sides = (p,) if same else (p, q)
    buffer = _Buffer(tuple(side.rows.count for side in sides), dtype)
    for part in _parts(p.rows.width):
        tables = buffer.tables(part)
        for side, table in zip(sides, tables, strict=True):
            if name == "tv":
                side.tables(part, table, None, unused)
            else:
                side.tables(part, None, table, unused, 1.0, 1.0 / math.log(2.0), -math.inf)
        kernels.add_pairs(name, tables[0], tables[-1], (n, m), part.stop - part.start, values)
    values = values[:n, :m]
    if same:
        values = np.triu(values) + np.triu(values, 1).T
    doubtful = ~(values > SMALLEST[name])
    return np.minimum(values, 1.0 if name == "tv" else math.log(2.0)), doubtful

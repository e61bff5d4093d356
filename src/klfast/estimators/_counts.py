"""Divergences and entropies of distributions that are known by counts alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .._dispatch import compiled
from .._elementary import kl_term

__all__ = ["entropy_from_counts", "kl_from_counts"]

Values = NDArray[np.float64]
Method = Literal["plugin", "laplace", "miller_madow"]

METHODS = ("plugin", "laplace", "miller_madow")
UNSEEN = ("infinite", "drop", "error")


def kl_from_counts(
    p: Any,
    q: Any,
    method: Method = "plugin",
    *,
    smoothing: float = 1.0,
    unseen: Literal["infinite", "drop", "error"] = "infinite",
) -> Any:
    """Estimate KL(P, Q) from counts of symbols, such as histograms or counts of tokens.

    Formula:
        "plugin": KL of the relative frequencies, the maximum likelihood estimate.
        "laplace": the same after `smoothing` is added to every count (1 is Laplace's, 1/2
        Krichevsky and Trofimov's): biased towards 0 and always finite.
        "miller_madow": "plugin" less its bias to the first order of 1/N and 1/M, for the N and M
        symbols counted of P and Q, K of them different ones of P:
        (K - 1)/(2 N) + sum p (1 - q)/(2 M q). It may be negative.

    Arguments:
        p: counts, numbers from 0, shape (..., V): a NumPy array or whatever NumPy makes one of, or
            one of SciPy's sparse matrices of shape (rows, V), which is read as it is.
        q: counts that broadcast with them; sparse if the others are.
        method: "plugin", "laplace" or "miller_madow".
        smoothing: what "laplace" adds, above 0.
        unseen: what becomes of symbols that were counted of P and never of Q: "infinite", as the
            formula says; "drop" leaves them out of P; "error" refuses them. With "laplace" there
            are none.

    Returns:
        One value a row, in nats, float64. A row without counts gives NaN.

    Raises:
        ValueError: for negative counts or NaN, shapes that do not fit, an unknown method, or
            symbols that Q lacks where these are refused.

    Source:
        Miller, Note on the bias of information estimates, 1955; Zhang and Grabchak, Nonparametric
        estimation of Kullback-Leibler divergence, 2014.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; accepted: {', '.join(map(repr, METHODS))}")
    if unseen not in UNSEEN:
        raise ValueError(f"unseen is {unseen!r}; accepted: {', '.join(map(repr, UNSEEN))}")
    added = _added(method, smoothing)
    drop = unseen == "drop" and not added
    if _is_sparse(p) or _is_sparse(q):
        columns, shape = _sparse_sums(p, q, added, drop)
    else:
        columns, shape = _dense_sums(p, q, added, drop, method == "miller_madow")
    value, total_p, total_q, kinds, _, only_p, spread, least = columns.T
    if not (np.isfinite(total_p) & np.isfinite(total_q)).all() or (least < 0).any():
        raise ValueError("p or q holds a negative number, NaN or infinity; accepted: counts from 0")
    if unseen == "error" and not added and only_p.any():
        row = int(np.flatnonzero(only_p)[0])
        raise ValueError(
            f"row {row} of p has {int(only_p[row])} symbols that q has not; accepted: none, with "
            "unseen='error'"
        )
    with np.errstate(all="ignore"):
        if method == "miller_madow":
            value = value - (kinds - 1.0) / (2.0 * total_p) - spread / (2.0 * total_q)
        return np.where((total_p > 0) & (total_q > 0), value, np.nan).reshape(shape)[()]


def entropy_from_counts(counts: Any, method: Method = "plugin", *, smoothing: float = 1.0) -> Any:
    """Estimate the entropy of a distribution from counts of symbols.

    Formula:
        "plugin": that of the relative frequencies; "laplace": with `smoothing` added to every
        count; "miller_madow": "plugin" + (K - 1)/(2 N), for N symbols of K kinds.

    Arguments:
        counts: numbers from 0, shape (..., V), as for `kl_from_counts`; dense or sparse.
        method: as for `kl_from_counts`.
        smoothing: what "laplace" adds.

    Returns:
        One value a row, in nats, float64. A row without counts gives NaN.

    Source:
        Miller, Note on the bias of information estimates, 1955.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; accepted: {', '.join(map(repr, METHODS))}")
    added = _added(method, smoothing)
    if _is_sparse(counts):
        matrix = _csr(counts)
        shape: tuple[int, ...] = (matrix.shape[0],)
        width = matrix.shape[1]
        c = matrix.data.astype(np.float64)
        rows = np.repeat(np.arange(shape[0]), np.diff(matrix.indptr))
    else:
        dense = _counts("counts", counts)
        shape, width = dense.shape[:-1], dense.shape[-1]
        table = dense.reshape(-1, width)
        rows, columns = np.nonzero(table)
        c = table[rows, columns].astype(np.float64)
    if not np.isfinite(c).all() or (c < 0).any():
        raise ValueError("counts hold a negative number, NaN or infinity; accepted: from 0")
    n = int(np.prod(shape))
    seen = _by_row(rows, np.ones_like(c), n)
    total = _by_row(rows, c, n) + added * width
    with np.errstate(all="ignore"):
        share = (c + added) / total[rows]
        value = _by_row(rows, -share * np.log(share), n)
        if added:
            rest = added / total
            value -= (width - seen) * rest * np.log(rest)
        if method == "miller_madow":
            value += (seen - 1.0) / (2.0 * total)
        return np.where(total > 0, np.maximum(value, 0.0), np.nan).reshape(shape)[()]


def _added(method: str, smoothing: float) -> float:
    if not 0.0 < float(smoothing) < np.inf:
        raise ValueError(f"smoothing is {smoothing!r}; accepted: a number above 0")
    return float(smoothing) if method == "laplace" else 0.0


def _is_sparse(x: Any) -> bool:
    return hasattr(x, "tocsr") and not isinstance(x, np.ndarray)


def _csr(matrix: Any) -> Any:
    """A sparse matrix with every symbol of a row once, and none that has no count."""
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()
    csr.eliminate_zeros()
    return csr


def _counts(name: str, x: Any) -> NDArray[Any]:
    array = np.asarray(x)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} has dtype {array.dtype}; accepted: integers or real numbers")
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; accepted: shape (..., V)")
    if array.dtype not in (np.int32, np.int64, np.float32):
        array = array.astype(np.int64 if array.dtype.kind != "f" else np.float64)
    return array


def _dense_sums(
    p: Any, q: Any, added: float, drop: bool, wants_spread: bool
) -> tuple[Values, tuple[int, ...]]:
    """The columns of the kernel ``counts``, and the shape of the batch."""
    a, b = _counts("p", p), _counts("q", q)
    try:
        if a.shape[-1] != b.shape[-1]:
            raise ValueError
        a, b = np.broadcast_arrays(a, b)
    except ValueError:
        raise ValueError(
            f"p and q have shapes {a.shape} and {b.shape}; accepted: batch axes that broadcast, "
            "and the same number of symbols"
        ) from None
    shape, width = a.shape[:-1], a.shape[-1]
    dtype = np.result_type(a, b)
    tables = [np.ascontiguousarray(each, dtype).reshape(-1, width) for each in (a, b)]
    kernels = compiled()
    if kernels is not None:
        sums: Values = kernels.count_sums(*tables, added, drop, wants_spread)
        return sums, shape
    rows, _ = np.indices(tables[0].shape)
    w, v = (each.astype(np.float64).ravel() for each in tables)
    return _sums(rows.ravel(), w, v, len(tables[0]), width, added, drop), shape


def _sparse_sums(p: Any, q: Any, added: float, drop: bool) -> tuple[Values, tuple[int, ...]]:
    """The same of sparse matrices, from the symbols that occur in either."""
    if not (_is_sparse(p) and _is_sparse(q)) or p.shape != q.shape:
        kinds = [f"{type(x).__name__} of shape {np.shape(x)}" for x in (p, q)]
        raise ValueError(
            f"p and q are {' and '.join(kinds)}; accepted: two sparse matrices of the same shape"
        )
    n, width = p.shape
    keys, values = [], []
    for matrix in (p, q):
        csr = _csr(matrix)
        rows = np.repeat(np.arange(n, dtype=np.int64), np.diff(csr.indptr))
        keys.append(rows * width + csr.indices)
        values.append(csr.data.astype(np.float64))
    union = np.union1d(*keys)
    w, v = np.zeros(len(union)), np.zeros(len(union))
    for table, key, value in zip((w, v), keys, values, strict=True):
        table[np.searchsorted(union, key)] = value
    return _sums(union // width, w, v, n, width, added, drop), (n,)


def _sums(
    rows: NDArray[np.int64], w: Values, v: Values, n: int, width: int, added: float, drop: bool
) -> Values:
    """What the kernel computes, of some symbols of each row; the others have no counts."""
    if drop:
        w = np.where(v > 0, w, 0.0)
    columns = np.zeros((n, 8))
    columns[:, 7] = min(w.min(initial=0.0), v.min(initial=0.0))
    for column, marked in ((3, w > 0), (4, v > 0), (5, (w > 0) & (v == 0))):
        columns[:, column] = _by_row(rows, marked, n)
    total_p = _by_row(rows, w, n) + added * width
    total_q = _by_row(rows, v, n) + added * width
    with np.errstate(all="ignore"):
        terms = _terms(w + added, v + added, total_p[rows], total_q[rows])
        value = _by_row(rows, terms, n)
        others = width - _by_row(rows, np.ones_like(w), n)
        if added:
            alone = np.full(n, added)
            value += others * _terms(alone, alone, total_p, total_q)
        share = np.where(v == 0, 0.0, w / total_p[rows] * (total_q[rows] - v) / v)
        columns[:, 6] = _by_row(rows, share, n)
    columns[:, 0], columns[:, 1], columns[:, 2] = value, total_p, total_q
    return columns


def _terms(w: Values, v: Values, total_p: Values, total_q: Values) -> Values:
    """The terms of KL, whose numerators are exact."""
    change = (v * total_p - w * total_q) / (total_p * total_q)
    return kl_term(w / total_p, v / total_q, change)


def _by_row(rows: NDArray[np.int64], values: NDArray[Any], n: int) -> Values:
    return np.bincount(rows, values.astype(np.float64), minlength=n).astype(np.float64, copy=False)

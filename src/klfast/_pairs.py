"""A base and a candidate, read side by side: each for itself, or decoded together.

Files of llama.cpp are decoded together. Of the entries at the floor of a row (`llama_cpp`) only
an upper bound of each is known, and of all of them together the mass that is missing to 1. So all
entries that are at the floor in either row count as one outcome, with that mass in each: the row
of V log-probabilities gets one entry more, and those at its floor have probability 0. Joining
outcomes can only bring two distributions closer, so that the divergences are lower bounds, and no
less than 0.

The missing mass is a small difference. With e the errors of the stored log-probabilities,
uniform in a step of ``scale``, it is known up to

    sigma = scale / sqrt(12) * sqrt(sum of p^2 over the stored entries, but the largest),

the largest being stored exactly. A mass that comes out smaller than sigma is taken as sigma, and
one larger than (entries at the floor) * exp(floor), the most that it can be, as that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._sources import LogitSource
from .llama_cpp import BaseLogits, decode, is_clamped

#: Rows of which the effect of 16 bits is estimated.
NOISE_ROWS = 32
#: The log-probability of what is left out, as in kernels/cpu/floors.py: its exponential is 0.
LEFT_OUT = -1e4


class Block(NamedTuple):
    """Rows of a base and a candidate, and what their files know of them."""

    p: Any
    q: Any
    input: str | None = None  # what p and q hold, if it is not what the user said
    nll: tuple[Any, Any] | None = None  # of the targets, where p and q do not give it
    tops: tuple[Any, Any] | None = None  # largest entry of each row, likewise; -1 where undefined
    extra: Mapping[str, Any] | None = None  # more to know of each row


class Pair:
    """A base and a candidate that are read each for itself."""

    noise_floor: float | None = None

    def __init__(self, base: LogitSource, test: LogitSource) -> None:
        self.base, self.test = base, test

    def read(self, start: int, stop: int) -> tuple[Any, Any]:
        """Rows ``start`` to ``stop`` of both, as they are stored; any thread may ask."""
        return self.base.read(start, stop), self.test.read(start, stop)

    def block(self, start: int, rows: tuple[Any, Any]) -> Block:
        """What was read from ``start`` on, ready to be compared."""
        return Block(*rows)


class FlooredPair(Pair):
    """A base and a candidate of which at least one is a file of llama.cpp.

    ``targets`` are one a row. `block` gives log-probabilities with one entry more, whose masses
    are also the columns floor_mass_p and floor_mass_q; negative log-likelihoods of the targets
    are those of the stored values as they are.

    ``noise_floor`` is the mean KL that storing 16 bits causes by itself, see `Side.noise`, on the
    rows of ``sample``.
    """

    def __init__(
        self,
        base: LogitSource,
        test: LogitSource,
        targets: NDArray[np.int64],
        sample: NDArray[np.int64],
        backend: str,
    ) -> None:
        super().__init__(base, test)
        self._targets = targets
        self._backend = backend
        self._kernels = _kernels(backend)
        # Memory that is asked for anew costs twice as much as what is written to it.
        self._space = np.empty((2, 0, 0), np.float32)
        noise = [self._noise(int(row)) for row in sample]
        self.noise_floor: float | None = math.fsum(noise) / len(noise) if noise else None

    def read(self, start: int, stop: int) -> tuple[Any, Any]:
        """Rows ``start`` to ``stop`` of both: those of llama.cpp as `Stored`."""
        p, q = (
            Stored(*each.stored(start, stop))
            if isinstance(each, BaseLogits)
            else each.read(start, stop)
            for each in (self.base, self.test)
        )
        return p, q

    def block(self, start: int, rows: tuple[Any, Any]) -> Block:
        """What was read from ``start`` on, decoded; it is overwritten by the next block."""
        p, q = self._sides(rows)
        targets = self._targets[start : start + len(p.rows), None]
        nll = p.nll(targets), q.nll(targets)  # before what is at a floor is left out
        self._join(p, q)
        extra = {"floor_mass_p": np.exp(p.rows[:, -1]), "floor_mass_q": np.exp(q.rows[:, -1])}
        return Block(p.rows, q.rows, "log_probs", nll, (p.tops, q.tops), extra)

    def _sides(self, rows: tuple[Any, Any]) -> tuple[Side, Side]:
        count, width = rows[0].shape
        if self._space.shape[1] < count:
            whole_lines = -(-(width + 1) // 16) * 16  # so that every row begins with a cache line
            self._space = np.empty((2, count, whole_lines), np.float32)
        p, q = (
            Side(each, space[:count, : width + 1], self._backend)
            for each, space in zip(rows, self._space, strict=True)
        )
        return p, q

    def _join(self, p: Side, q: Side) -> None:
        sides = [(each.values, each.parameters) for each in (p, q)]
        into = [each.rows[:, :-1] for each in (p, q)]
        found = self._kernels.join_floors(sides, into)
        p.join(found[:, 0])
        q.join(found[:, 1])

    def _noise(self, row: int) -> float:
        p, q = self._sides(self.read(row, row + 1))
        self._join(p, q)
        return float(p.noise()[0] + q.noise()[0])


class Stored(NamedTuple):
    """Rows of a file of llama.cpp, see `BaseLogits.stored`."""

    scale: NDArray[np.float32]
    least: NDArray[np.float32]
    words: NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.words.shape


class Side:
    """Rows of one side, as they are stored and, after `join_floors`, as they are compared.

    ``values`` are words or log-probabilities, ``parameters`` what kernels/cpu/floors.py asks for.
    ``rows`` have room for one entry more, which `join` fills in, with ``tops``, the largest entry
    of each row, and ``sigma``, how exactly the missing mass is known.
    """

    tops: NDArray[np.int64]
    sigma: NDArray[np.float64]
    _spread: NDArray[np.float64]  # sum of p (1 - p), but of the largest: it is stored exactly

    def __init__(self, read: Any, rows: NDArray[np.float32], backend: str) -> None:
        import klfast

        self.rows = rows
        self.parameters = np.full((len(rows), 3), (0.0, 0.0, math.nan))
        self.values: NDArray[Any]
        if isinstance(read, Stored):
            self.parameters[:, 0], self.parameters[:, 1], self.values = read
            self.parameters[is_clamped(read.scale), 2] = 0.0
        else:
            self.values = self.rows[:, :-1]
            options: Any = {"dtype": np.float32, "backend": backend}
            self.values[:] = klfast.log_softmax(np.asarray(read), **options)

    def nll(self, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Negative log-likelihoods of targets (rows, 1), as they are stored."""
        found = np.take_along_axis(self.values, targets, 1)
        if found.dtype == np.uint16:
            scale, least = self.parameters[:, 0, None], self.parameters[:, 1, None]
            found = (scale * found + least).astype(np.float32)
        return -found[:, 0].astype(np.float64)

    def join(self, found: NDArray[np.float64]) -> None:
        """Fill in the last entry, tops, and sigma, from what `join_floors` returned."""
        mass, squares, equal, other, own, tops, largest = found.T
        self.tops = tops.astype(np.int64)
        self._spread = mass - squares
        self.sigma = self.parameters[:, 0] / math.sqrt(12) * np.sqrt(squares)
        most = other + own * np.exp(self.parameters[:, 1])
        missing = 1.0 - mass - equal * np.exp(largest)
        missing = np.maximum(missing, np.maximum(other, self.sigma))
        with np.errstate(divide="ignore"):
            self.rows[:, -1] = np.maximum(np.log(np.minimum(missing, most)), LEFT_OUT)

    def noise(self) -> NDArray[np.float64]:
        """The mean KL that storing 16 bits causes by itself, to second order in the errors.

        1/2 sum p (1 - p) scale^2 / 12 of the entries that are compared one by one, and
        min(sigma, mass)^2 / (2 mass) of the missing mass.
        """
        mass = np.exp(self.rows[:, -1].astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            floor = np.where(mass > 0, np.minimum(self.sigma, mass) ** 2 / (2 * mass), 0.0)
        spread: NDArray[np.float64] = self.parameters[:, 0] ** 2 / 24 * self._spread + floor
        return spread


def check_floored(options: Mapping[str, Any]) -> None:
    """Raise ValueError if the options of a job make no sense for a file of llama.cpp."""
    for name, only in (("input", "logits"), ("temperature", 1.0), ("vocab_size", None)):
        if options[name] != only:
            raise ValueError(
                f"{name} is {options[name]!r}; accepted, where a file of llama.cpp is compared: "
                f"{only!r}"
            )


def join_floors(
    sides: Sequence[tuple[NDArray[Any], NDArray[np.float64]]], rows: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """What kernels/cpu/floors.py does, in NumPy."""
    floors = [values == of[:, 2, None] for values, of in sides]
    either = floors[0] | floors[1]
    sums = np.empty((len(either), 2, 7))
    for side, (values, of) in enumerate(sides):
        found, own = rows[side], floors[side]
        tops = values.argmax(1)
        top = values == np.take_along_axis(values, tops[:, None], 1)
        found[:] = values
        if values.dtype == np.uint16:
            decode(of[:, 0], of[:, 1], values, out=found)
        mass = np.exp(found.astype(np.float64))
        kept = np.where(either | top, 0.0, mass)
        sums[:, side, 0], sums[:, side, 1] = kept.sum(1), (kept**2).sum(1)
        sums[:, side, 2] = (top & ~either).sum(1)
        sums[:, side, 3] = np.where(either & ~own, mass, 0.0).sum(1)
        sums[:, side, 4] = own.sum(1)
        sums[:, side, 5] = np.where(top.any(1), tops, -1)
        sums[:, side, 6] = np.take_along_axis(found, tops[:, None], 1)[:, 0]
        found[either] = LEFT_OUT
    return sums


def _kernels(backend: str) -> Any:
    """The CPU kernels, or this module where they are not wanted or cannot be used."""
    import klfast

    if backend != "reference" and klfast.backends()["cpu"]:
        return import_module("klfast.kernels.cpu")
    return sys.modules[__name__]

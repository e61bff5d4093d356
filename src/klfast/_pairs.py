"""A base and a candidate, read side by side: each for itself, or decoded together.

Files of llama.cpp are decoded together. Of the entries at the floor of a row (`llama_cpp`) only
an upper bound of each is known, and of all of them together the mass that is missing to 1. So all
entries that are at the floor in either row count as one outcome, with that mass in each: the row
of V log-probabilities gets one entry more, and its floor is -inf. Joining outcomes can only bring
two distributions closer, so that the divergences are lower bounds, and no less than 0.

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


class Block(NamedTuple):
    """Rows of a base and a candidate, and what their files know of them."""

    p: Any
    q: Any
    input: str | None = None  # what p and q hold, if it is not what the user said
    nll: tuple[Any, Any] | None = None  # of the targets, where p and q do not give it
    tops: tuple[Any, Any] | None = None  # largest entry of each row, likewise
    extra: Mapping[str, Any] | None = None  # more to know of each row


class Pair:
    """A base and a candidate that are read each for itself."""

    noise_floor: float | None = None

    def __init__(self, base: LogitSource, test: LogitSource) -> None:
        self.base, self.test = base, test

    def read(self, start: int, stop: int) -> Block:
        """Rows ``start`` to ``stop`` of both."""
        return Block(self.base.read(start, stop), self.test.read(start, stop))


class FlooredPair:
    """A base and a candidate of which at least one is a file of llama.cpp.

    ``targets`` are one a row. `read` gives log-probabilities with one entry more, whose masses
    are also the columns floor_mass_p and floor_mass_q; negative log-likelihoods of the targets
    are those of the stored values as they are.

    ``noise_floor`` is the mean KL that storing 16 bits causes by itself, to second order in the
    errors: 1/2 sum p (1 - p) scale^2 / 12 of the entries, and min(sigma, mass)^2 / (2 mass) of
    the missing mass, on a sample of the rows.
    """

    def __init__(
        self,
        base: LogitSource,
        test: LogitSource,
        targets: NDArray[np.int64],
        backend: str,
    ) -> None:
        self._sides = base, test
        self._targets = targets
        self._backend = backend
        # Two of them take turns: one is read into while the other is worked on. Memory that is
        # asked for anew costs twice as much as what is written to it.
        self._spaces: list[NDArray[np.float32]] = [np.empty((2, 0, 0), np.float32)] * 2
        rows = math.prod(base.shape[:-1])
        sample = np.unique(np.linspace(0, rows - 1, min(NOISE_ROWS, rows)).astype(np.int64))
        noise = [self._noise(int(row)) for row in sample]
        self.noise_floor: float | None = math.fsum(noise) / len(noise) if noise else None

    def read(self, start: int, stop: int) -> Block:
        """Rows ``start`` to ``stop`` of both; they are overwritten by the next but one."""
        p, q = self._joined(start, stop)
        targets = self._targets[start:stop, None]
        nll = p.nll(targets), q.nll(targets)
        extra = {"floor_mass_p": np.exp(p.rows[:, -1]), "floor_mass_q": np.exp(q.rows[:, -1])}
        return Block(p.rows, q.rows, "log_probs", nll, (p.tops, q.tops), extra)

    def _joined(self, start: int, stop: int) -> tuple[Side, Side]:
        space = self._spaces.pop(0)
        entries = self._sides[0].shape[-1] + 1
        if space.shape[1] < stop - start:
            whole_lines = -(-entries // 16) * 16  # so that every row begins with a cache line
            space = np.empty((2, stop - start, whole_lines), np.float32)
        self._spaces.append(space)
        p, q = (
            Side(each, start, stop, rows[: stop - start, :entries], self._backend)
            for each, rows in zip(self._sides, space, strict=True)
        )
        sums = _backend(self._backend).join_floors(
            [(each.values, each.parameters) for each in (p, q)], [p.rows[:, :-1], q.rows[:, :-1]]
        )
        p.join(sums[:, 0])
        q.join(sums[:, 1])
        return p, q

    def _noise(self, row: int) -> float:
        noise = 0.0
        for each in self._joined(row, row + 1):
            scale, sigma = each.parameters[0, 0], each.sigma[0]
            p = np.exp(each.rows[0].astype(np.float64))
            rounded = p[:-1] * (1 - p[:-1])
            rounded[each.tops[0]] = 0.0  # stored exactly
            noise += scale**2 / 24 * float(rounded.sum())
            if p[-1] > 0:
                noise += min(sigma, p[-1]) ** 2 / (2 * p[-1])
        return noise


class Side:
    """Rows of one side, as they are stored and, after `join_floors`, as they are compared.

    ``values`` are words or log-probabilities, ``parameters`` what kernels/cpu/floors.py asks for,
    ``tops`` the largest entry of each row; ``rows`` have room for one entry more, which `join`
    fills in. ``sigma`` is how exactly the missing mass is known.
    """

    def __init__(
        self, source: LogitSource, start: int, stop: int, rows: NDArray[np.float32], backend: str
    ) -> None:
        import klfast

        count = stop - start
        self.rows = rows
        self.parameters = np.full((count, 4), (0.0, 0.0, math.nan, 0.0))
        self.values: NDArray[Any]
        if isinstance(source, BaseLogits):
            scale, least, self.values = source.stored(start, stop)
            self.parameters[:, 0], self.parameters[:, 1] = scale, least
            self.parameters[is_clamped(scale), 2] = 0.0
        else:
            self.values = self.rows[:, :-1]
            logits = np.asarray(source.read(start, stop))
            options: Any = {"dtype": np.float32, "backend": backend}
            self.values[:] = klfast.log_softmax(logits, **options)
        self.tops = self.values.argmax(1)
        self.parameters[:, 3] = self._at(self.tops[:, None])
        self.sigma = np.zeros(count)

    def nll(self, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Negative log-likelihoods of targets (rows, 1), as they are stored."""
        return -self._at(targets).astype(np.float64)

    def _at(self, entries: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.take_along_axis(self.values, entries, 1)
        if found.dtype == np.uint16:
            scale, least = self.parameters[:, 0, None], self.parameters[:, 1, None]
            found = (scale * found + least).astype(np.float32)
        return found[:, 0]

    def join(self, sums: NDArray[np.float64]) -> None:
        """Fill in the last entry, and sigma, from what `join_floors` returned."""
        mass, squares, equal, other, own = sums.T
        mass = mass + equal * np.exp(self.parameters[:, 3])
        self.sigma = self.parameters[:, 0] / math.sqrt(12) * np.sqrt(squares)
        most = other + own * np.exp(self.parameters[:, 1])
        missing = np.maximum(1.0 - mass, np.maximum(other, self.sigma))
        with np.errstate(divide="ignore"):
            self.rows[:, -1] = np.log(np.minimum(missing, most))


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
    sums = np.empty((len(either), 2, 5))
    for side, (values, of) in enumerate(sides):
        found, own = rows[side], floors[side]
        found[:] = values
        if values.dtype == np.uint16:
            decode(of[:, 0], of[:, 1], values, out=found)
        mass = np.exp(found.astype(np.float64))
        equal = found == of[:, 3, None].astype(np.float32)
        kept = np.where(either | equal, 0.0, mass)
        sums[:, side, 0], sums[:, side, 1] = kept.sum(1), (kept**2).sum(1)
        sums[:, side, 2] = (equal & ~either).sum(1)
        sums[:, side, 3] = np.where(either & ~own, mass, 0.0).sum(1)
        sums[:, side, 4] = own.sum(1)
        found[either] = -np.inf
    return sums


def _backend(name: str) -> Any:
    """The CPU kernels, or this module where they are not wanted or cannot be used."""
    import klfast

    if name != "reference" and klfast.backends()["cpu"]:
        return import_module("klfast.kernels.cpu")
    return sys.modules[__name__]

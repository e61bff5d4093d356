"""Shards that are missing or cannot be read, and how many rows they would have had.

A job goes on without them and names them in the end: their rows need a place among the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ._sources import Entries, Entry, LogitSource, MissingSource, ShardedSource, SourceError

_Numbers: TypeAlias = tuple[int, ...]


def completed(sources: Sequence[LogitSource]) -> list[LogitSource]:
    """Sources of the same rows, in which shards that cannot be read have their place.

    A shard that another source has under the same number, and this one has not, is missing; and
    one whose number is left out, where another source has the rows that it would have. How many
    rows one has that cannot be read is known from that of the same number, from what is
    missing to the rows of another source, or from the other shards, where those are all of one
    length. Where it is not, the reason why it cannot be read is raised.
    """
    return [_completed(each, [x for x in sources if x is not each]) for each in sources]


def _completed(source: LogitSource, others: Sequence[LogitSource]) -> LogitSource:
    if not isinstance(source, ShardedSource):
        return source
    columns, shards = _numbered(source.entries)
    theirs: dict[_Numbers, tuple[str, int]] = {}
    for other in others:
        if isinstance(other, ShardedSource):
            for number, (name, each) in _numbered(other.entries)[1].items():
                if not isinstance(each, SourceError):
                    theirs[number] = name, _rows_of(each)
    total = max(map(_rows_of, others), default=0)
    if shards.keys() & theirs.keys() and _rows_of(source) != total:
        missing = {
            number: f"{theirs[number][0]} is there" for number in theirs.keys() - shards.keys()
        }
    else:
        longest = max(others, key=_rows_of, default=source).name
        missing = dict.fromkeys(
            _left_out(columns, shards, total), f"{longest} has {total} rows"
        )  # fmt: skip
    for number, reason in missing.items():
        name = _renumbered(next(iter(source.entries)), columns, number)
        error = SourceError(f"{name}: is missing, and {reason}")
        error.file = name
        shards[number] = name, error
    broken = [each for _, each in shards.values() if isinstance(each, SourceError)]
    if not broken:
        for each in source.entries.values():
            if isinstance(each, SourceError):
                raise each
        return source
    first = source.shards[0]
    known, inner = list(map(_rows_of, source.shards)), math.prod(first.shape[1:-1])
    whole: list[LogitSource] = []
    for number, (_, each) in sorted(shards.items()):
        if not isinstance(each, SourceError):
            whole.append(each)
            continue
        rows: int | None = theirs[number][1] if number in theirs else None
        if rows is None and len(broken) == 1 and total > sum(known):
            rows = total - sum(known)
        if rows is None and len(set(known)) == 1:
            rows = known[0]
        if rows is None or rows % inner:
            raise each
        lead = (rows // inner, *first.shape[1:-1]) if len(first.shape) > 1 else (rows,)
        whole.append(MissingSource(each, (*lead, first.shape[-1]), first.dtype))
    if total and sum(map(_rows_of, whole)) != total:
        raise broken[0]
    return ShardedSource(whole, source.name, list(map(Path, source.files)))


def _left_out(
    columns: Sequence[int], shards: Mapping[_Numbers, tuple[str, Entry]], total: int
) -> list[_Numbers]:
    """Numbers between those of the shards, if the rows that are not in these fit there."""
    known = [_rows_of(each) for _, each in shards.values() if not isinstance(each, SourceError)]
    left = total - sum(known)
    if len(columns) != 1 or len(known) < len(shards) or left <= 0:
        return []
    numbers = [number for (number,) in shards]
    first, last = min(numbers), max(numbers)
    count = last - first + 1 - len(numbers)
    if not 0 < count <= len(numbers) or (count > 1 and {*known} != {left / count}):
        return []
    return [(number,) for number in range(first, last) if (number,) not in shards]


def _rows_of(source: LogitSource) -> int:
    return math.prod(source.shape[:-1])


def _numbered(entries: Entries) -> tuple[list[int], dict[_Numbers, tuple[str, Entry]]]:
    """Shards by the numbers in their names, of those that differ, and which of them these are.

    None, where their names are not alike.
    """
    found = {name: tuple(map(int, re.findall(r"\d+", Path(name).name))) for name in entries}
    if len({len(each) for each in found.values()}) > 1:
        return [], {}
    by_place = enumerate(zip(*found.values(), strict=True))
    columns = [place for place, numbers in by_place if len(set(numbers)) > 1]
    numbered = {
        tuple(found[name][place] for place in columns): (name, each)
        for name, each in entries.items()
    }
    return (columns, numbered) if len(numbered) == len(entries) else ([], {})


def _renumbered(name: str, columns: Sequence[int], numbers: _Numbers) -> str:
    """The name of a shard with other numbers, as long as they are where they begin with 0."""
    path = Path(name)
    parts = re.split(r"(\d+)", path.name)
    for column, number in zip(columns, numbers, strict=True):
        old = parts[2 * column + 1]
        parts[2 * column + 1] = str(number).zfill(len(old) if old[0] == "0" else 1)
    return str(path.with_name("".join(parts)))

"""Checkpoints: what an evaluation job has done, in a folder, so that a killed job can go on.

``job.json`` says which job it is: the files compared, with size and time of change, the settings,
and which files could not be read: those may have changed when the job goes on. Each
``rows-START-STOP.npz`` holds the columns of those rows for every candidate. Every file is written
under another name, synced and renamed: whenever the job is killed, the files that are there are
whole, and the rows that they hold are done.
"""

from __future__ import annotations

import glob
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._files import replacing
from ._sources import LogitSource, SourceError

Part = dict[str, NDArray[Any]]

_JOB = "job.json"
_UNREADABLE = "unreadable"
_FORMAT = {"format": "klfast checkpoint", "version": 1}


class Checkpoint:
    """A folder that remembers a job.

    Parameters
    ----------
    folder
        Made where it is not there.
    job
        What makes this job the one it is, as JSON has it: strings, numbers, lists, dicts.
    resume
        Whether to go on with what is there. If not, a folder that holds rows is refused.

    Raises
    ------
    SourceError
        If the folder holds another job, is damaged, or holds rows that are not to be resumed.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], resume: bool) -> None:
        self.folder = folder
        self._content = {**_FORMAT, **json.loads(json.dumps(job))}
        self._unreadable: list[str] = []
        if folder.exists() and not folder.is_dir():
            raise SourceError(f"{folder}: is not a folder, which a checkpoint needs")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{folder}: cannot be made ({error.strerror or error})") from error
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        if (folder / _JOB).exists():
            if not resume:
                raise SourceError(
                    f"{folder}: holds a checkpoint; continue it with --resume (resume=True), or "
                    "delete the folder to begin again"
                )
            self._check(self._content)
        elif any(folder.glob("rows-*.npz")):
            raise SourceError(f"{folder}: holds rows but no {_JOB}; delete the folder")
        self._write()

    def _write(self) -> None:
        content = {**self._content, _UNREADABLE: self._unreadable}
        with replacing(self.folder / _JOB) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def note_unreadable(self, file: str) -> None:
        """Let this file have changed when the job goes on."""
        path = str(Path(file).absolute())
        if path not in self._unreadable:
            self._unreadable.append(path)
            self._write()

    def parts(self) -> Iterator[tuple[int, int, Part]]:
        """What is done in order, with its first row and the row after the last."""
        stop = 0
        for start, end, path in sorted(self._listed()):
            if start >= stop:
                yield start, end, _loaded(path)
                stop = end

    def put(self, parts: Sequence[tuple[int, int, Part]]) -> None:
        """Keep the columns of these rows, those that follow each other in one file."""
        together: list[tuple[int, int, Part]] = []
        for start, stop, part in [*sorted(parts, key=lambda each: each[:2]), (-1, -1, {})]:
            if together and together[-1][1] != start:
                first, last = together[0][0], together[-1][1]
                path = self.folder / f"rows-{first:012d}-{last:012d}.npz"
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **_joined([each for _, _, each in together]))  # type: ignore[arg-type]
                together = []
            together.append((start, stop, part))

    def drop(self, first: int, last: int, parts: Sequence[tuple[int, int, Part]]) -> None:
        """Keep nothing of these rows; what was kept with them is among ``parts``, without them."""
        gone = []
        for start, stop, path in self._listed():
            if start < last and first < stop:
                path.unlink()
                gone.append((start, stop))
        self.put([part for part in parts if any(a <= part[0] and part[1] <= b for a, b in gone)])

    def _listed(self) -> Iterator[tuple[int, int, Path]]:
        """First row, row after the last, and file of every part."""
        for path in self.folder.glob("rows-*.npz"):
            if match := re.fullmatch(r"rows-(\d+)-(\d+)\.npz", path.name):
                yield int(match[1]), int(match[2]), path

    def _check(self, job: dict[str, Any]) -> None:
        path = self.folder / _JOB
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SourceError(f"{path}: cannot be read ({error})") from error
        if not isinstance(known, dict) or any(known.get(k) != v for k, v in _FORMAT.items()):
            raise SourceError(f"{path}: is not the checkpoint of an evaluation job")
        unreadable = set(known.pop(_UNREADABLE, []))
        for name in {**known, **job}:
            was, now = (_without(each.get(name), unreadable) for each in (known, job))
            if was != now:
                raise SourceError(
                    f"{self.folder}: belongs to another job: {_change(name, was, now)}"
                )


def _joined(parts: Sequence[Part]) -> Part:
    """The columns of rows that follow each other; seconds add up."""
    joined = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        joined[name] = np.sum(columns) if columns[0].ndim == 0 else np.concatenate(columns)
    return joined


def _without(value: Any, files: set[str]) -> Any:
    """A part of a job, without what it knows of these files."""
    if isinstance(value, list):
        return [_without(each, files) for each in value]
    if not isinstance(value, dict) or "files" not in value:
        return value
    known = value["files"].items()
    kept = {file: each for file, each in known if str(Path(file).absolute()) not in files}
    return {**value, "files": kept}


def _loaded(path: Path) -> Part:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"{path}: is damaged ({reason}); delete it to compute its rows again"
        ) from error


def identity(source: LogitSource) -> dict[str, Any]:
    """What a source is known by: name, shape, dtype, and its files with size and time of change."""
    files = [Path(each) for each in getattr(source, "files", ())]
    if not files:
        found = sorted(glob.glob(source.name))  # noqa: PTH207 - a name may be absolute
        files = [Path(each) for each in found] or [Path(source.name)]
    listed = [
        file for path in files for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
    ]
    return {
        "name": source.name,
        "shape": list(source.shape),
        "dtype": source.dtype,
        "files": {
            str(file): [file.stat().st_size, file.stat().st_mtime_ns]
            for file in listed
            if file.is_file()
        },
    }


def _change(name: str, was: Any, now: Any) -> str:
    """Say in one line how a part of a job differs."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now) and was:
        pairs = zip(was, now, strict=True)
        number, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        return _change(f"{name} {number + 1}", old, new)
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                if key == "files":
                    changed = (each for each in {**was[key], **now[key]}
                               if was[key].get(each) != now[key].get(each))  # fmt: skip
                    return f"{next(changed)} has changed since"
                return _change(f"{name} {key}", was.get(key), now.get(key))
    return f"{name} was {json.dumps(was)}, and is {json.dumps(now)}"

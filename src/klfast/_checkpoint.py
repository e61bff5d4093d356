"""Checkpoints: what an evaluation job has done, in a folder, so that a killed job can go on.

``job.json`` says which job it is: the files compared, with size and time of change, and the
settings. Each ``rows-START-STOP.npz`` holds the columns of those rows for every candidate. Every
file is written under another name, synced and renamed: whenever the job is killed, the files that
are there are whole, and the rows that they hold without a gap are done.
"""

from __future__ import annotations

import glob
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._files import replacing
from ._sources import LogitSource, SourceError

Part = dict[str, NDArray[Any]]

_JOB = "job.json"
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
        self.rows = 0  # that are done
        content = {**_FORMAT, **json.loads(json.dumps(job))}
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
            self._check(content)
            return
        if any(folder.glob("rows-*.npz")):
            raise SourceError(f"{folder}: holds rows but no {_JOB}; delete the folder")
        with replacing(folder / _JOB) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def parts(self) -> Iterator[Part]:
        """What is done, in order."""
        found = {start: (stop, path) for start, stop, path in self._listed()}
        while self.rows in found:
            stop, path = found[self.rows]
            yield _loaded(path)
            self.rows = stop

    def scattered(self) -> Iterator[tuple[int, int, Part]]:
        """What is done with its first row and the row after the last, gaps or not."""
        stop = 0
        for start, end, path in sorted(self._listed()):
            if start >= stop:
                yield start, end, _loaded(path)
                stop = end

    def put(self, start: int, stop: int, part: Part) -> None:
        """Keep the columns of any rows."""
        path = self.folder / f"rows-{start:012d}-{stop:012d}.npz"
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **part)  # type: ignore[arg-type]

    def add(self, stop: int, part: Part) -> None:
        """Keep the columns of the rows from those that are done to ``stop``."""
        self.put(self.rows, stop, part)
        self.rows = stop

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
        for name in {**known, **job}:
            was, now = known.get(name), job.get(name)
            if was != now:
                raise SourceError(
                    f"{self.folder}: belongs to another job: {_change(name, was, now)}"
                )


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

"""Hidden states and output heads, named by files: logits that are made while they are compared."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ._sources import LogitSource, SourceError, open_logits

_FILES = ("hidden", "weight", "bias")
_NUMBERS = ("scale", "softcap")
#: Names of the arrays in files that hold several: the first one that is there. Models whose head is
#: tied to their embeddings may have no array of its own for it.
_NAMES = {
    "hidden": ("hidden",),
    "weight": ("weight", "lm_head.weight", "model.embed_tokens.weight"),
    "bias": ("bias", "lm_head.bias"),
}

Place = tuple[str, str | None]  # a file, and the name of the array in it

# Sides that name the same file have the same array, and of a head one product.
_in_use: weakref.WeakValueDictionary[tuple[Any, ...], NDArray[Any]] = weakref.WeakValueDictionary()


def open_head(hidden: str, head: str) -> LogitSource:
    """Logits from a file of hidden states, and one of an output head: weight, and bias if any.

    Arrays have these names in files that hold several, or those that transformers gives them in
    the files of a model; a file of one array holds the weight.
    """
    places: dict[str, Place] = {"hidden": (hidden, None), "weight": (head, None)}
    for key in _NAMES["bias"]:
        with suppress(SourceError):
            open_logits(head, key)
            places["bias"] = (head, key)
            break
    return _linear(f"{hidden} with {head}", places, {})


def open_description(path: str | os.PathLike[str]) -> LogitSource:
    """Logits as a JSON file describes them.

    It is an object with "hidden", "weight" and, where there are such, "bias", each the name of a
    file beside it or {"file": ..., "key": ...}, and the numbers "scale" and "softcap".
    """
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:
        raise SourceError(f"{name}: is not JSON ({error})") from error
    accepted = {*_FILES, *_NUMBERS}
    if not isinstance(content, dict) or not {"hidden", "weight"} <= content.keys() <= accepted:
        raise SourceError(
            f"{name}: must be an object with hidden and weight, and may have bias, scale, softcap"
        )
    places = {}
    for part in _FILES:
        if part in content:
            each = content[part]
            each = {"file": each} if isinstance(each, str) else each
            if not isinstance(each, dict) or not isinstance(each.get("file"), str):
                raise SourceError(
                    f'{name}: {part} must be the name of a file, or {{"file": ..., "key": ...}}'
                )
            places[part] = str(Path(path).parent / each["file"]), each.get("key")
    numbers = {part: content[part] for part in _NUMBERS if content.get(part) is not None}
    for part, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise SourceError(f"{name}: {part} is {number!r}; accepted: a number")
    return _linear(name, places, numbers)


def _linear(name: str, places: Mapping[str, Place], numbers: Mapping[str, float]) -> LogitSource:
    from ._linear import LinearLogits

    arrays = {part: _array(part, *place) for part, place in places.items()}
    try:
        source: Any = LinearLogits(**arrays, **numbers)
    except ValueError as error:
        raise SourceError(f"{name}: {error}") from error
    source.name = name
    source.files = tuple(dict.fromkeys(file for file, _ in places.values()))
    made: LogitSource = source
    return made


def _array(part: str, file: str, key: str | None) -> Any:
    """The array in a file, memory-mapped where its format allows it."""
    try:
        found = Path(file).stat()
    except OSError:  # a pattern, or nothing
        return _read(part, file, key)
    place = (part, key, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    known = _in_use.get(place)
    if known is None:
        known = _in_use[place] = _read(part, file, key)
    return known


def _read(part: str, file: str, key: str | None) -> Any:
    source = open_logits(file, key) if key is not None else _opened(file, _NAMES[part])
    array = source.read(0, math.prod(source.shape[:-1]))
    return array.reshape(-1 if part == "bias" else source.shape)


def _opened(file: str, names: Sequence[str]) -> LogitSource:
    """The array of the first of these names that is there, or the only one."""
    for name in names:
        with suppress(SourceError):
            return open_logits(file, name)
    return open_logits(file)

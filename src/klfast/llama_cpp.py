"""The base-logits files of llama.cpp: read, written, and compared in its own way.

``llama-perplexity --kl-divergence-base FILE`` writes them. All numbers are little-endian::

    offset 0   "_logits_"
    8          uint32  n_ctx, int32 n_vocab, int32 n_chunk
    20         int32   tokens[n_chunk][n_ctx]
    then       rows[n_chunk][n_ctx - 1 - n_ctx // 2], the second half of each context, of
               float32 scale, float32 least, uint16 word[n_vocab] (and one more if n_vocab is odd)

A row is log-probabilities, ``scale * word + least``. The largest logit has the word 65535. Entries
16 or more below it have the word 0: of those, only an upper bound is known. Source of the format:
tools/perplexity/perplexity.cpp in https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._dispatch import get_num_threads
from ._files import replacing
from ._llama_perplexity import FEW, TITLE, Rows, chunk_line, compared, expf, final_lines
from ._sources import LogitSource, SourceError, open_column, open_logits

__all__ = ["MAGIC", "BaseLogits", "convert", "encode", "statistics"]

MAGIC = b"_logits_"
_HEADER = 20
#: Rows that span this much were cut off at the bottom: 16 in llama.cpp, more in forks of it. What
#: is missing to 16 is rounding of logits of up to 100 000 in size.
_CLAMPED = 15.99
_RANGE = np.float32(16)
_WORDS = np.float32(65535)
_BLOCK_BYTES = 32 * 2**20
_ROWS_AT_ONCE = 32

Float32 = NDArray[np.float32]


class BaseLogits:
    """A base-logits file of llama.cpp, memory-mapped; rows are decoded as they are read.

    Attributes
    ----------
    shape
        ``(n_chunk, n_ctx - 1 - n_ctx // 2, n_vocab)``: the rows that llama.cpp scores.
    tokens
        The text, int32 ``(n_chunk, n_ctx)``.
    targets
        The token that follows each row, int64 ``(n_chunk, rows of a chunk)``.
    sequences
        The chunk of each row.

    Raises
    ------
    SourceError
        If the file does not begin with ``_logits_``, is damaged, or is not as long as it must be.
    """

    dtype = "float32"
    kind = "16-bit log-probabilities"
    mapped = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            size = Path(path).stat().st_size
            with Path(path).open("rb") as file:
                header = file.read(_HEADER)
        except OSError as error:
            raise SourceError(f"{self.name}: {error.strerror or error}") from error
        if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
            raise SourceError(
                f"{self.name}: does not begin with _logits_, as base-logits files of llama.cpp do"
            )
        if len(header) < _HEADER:
            raise SourceError(
                f"{self.name}: is truncated: its header has {_HEADER} bytes, {len(header)} are "
                "there"
            )
        self.n_ctx = int.from_bytes(header[8:12], "little")
        n_vocab = int.from_bytes(header[12:16], "little", signed=True)
        n_chunk = int.from_bytes(header[16:20], "little", signed=True)
        rows = self.n_ctx - 1 - self.n_ctx // 2
        if rows < 1 or n_vocab < 1 or n_chunk < 0:
            raise SourceError(
                f"{self.name}: is damaged: its header says n_ctx {self.n_ctx}, n_vocab {n_vocab}, "
                f"n_chunk {n_chunk}"
            )
        self.shape = (n_chunk, rows, n_vocab)
        self.row_bytes = 2 * _row_words(n_vocab)
        start = _HEADER + 4 * n_chunk * self.n_ctx
        expected = start + n_chunk * rows * self.row_bytes
        if size != expected:
            whole = max(0, size - start) // (rows * self.row_bytes)
            raise SourceError(
                f"{self.name}: is truncated: {expected} bytes promised, {size} there "
                f"({whole} of {n_chunk} chunks are whole)"
                if size < expected
                else f"{self.name}: is damaged: {expected} bytes promised, {size} there"
            )
        mapped = np.memmap(path, np.uint8, "r", shape=(size,)) if size > _HEADER else None
        content = np.empty(0, np.uint8) if mapped is None else np.asarray(mapped)[_HEADER:]
        text = content[: start - _HEADER]
        self.tokens: NDArray[np.int32] = text.copy().view("<i4").reshape(n_chunk, self.n_ctx)
        self._rows = content[start - _HEADER :].reshape(n_chunk * rows, self.row_bytes)
        self.targets = self.tokens[:, self.n_ctx // 2 + 1 :].astype(np.int64)
        wrong = np.argwhere((self.targets < 0) | (self.targets >= n_vocab))
        if wrong.size:
            chunk, row = wrong[0]
            raise SourceError(
                f"{self.name}: is damaged: token {self.targets[chunk, row]} in chunk {chunk} is "
                f"outside the vocabulary, 0 to {n_vocab - 1}"
            )
        self.sequences = np.repeat(np.arange(n_chunk), rows)

    def stored(self, start: int, stop: int) -> tuple[Float32, Float32, NDArray[np.uint16]]:
        """Scale and least log-probability of each row, and its words, which are not copied."""
        part = self._rows[start:stop]
        head = part[:, :8].copy().view("<f4").astype(np.float32)
        if not np.isfinite(head).all() or (head[:, 0] < 0).any():
            row = start + int(np.argmin(np.isfinite(head).all(1) & (head[:, 0] >= 0)))
            raise SourceError(
                f"{self.name}: is damaged: row {row} has scale {head[row - start, 0]} and least "
                f"log-probability {head[row - start, 1]}"
            )
        # Rows begin at any byte of the file that is a multiple of 4.
        words = part.view("<u2")[:, 4 : 4 + self.shape[-1]]
        return head[:, 0], head[:, 1], words

    def at_floor(self) -> float:
        """The share of all entries of which only an upper bound is stored; reads the file."""
        rows, count = len(self._rows), 0
        for start in range(0, rows, _ROWS_AT_ONCE):
            scale, _, words = self.stored(start, min(start + _ROWS_AT_ONCE, rows))
            count += int(np.count_nonzero(words[is_clamped(scale)] == 0))
        return count / max(1, rows * self.shape[-1])

    def read(self, start: int, stop: int) -> Float32:
        """Log-probabilities of rows ``start`` to ``stop``, as they are stored."""
        scale, least, words = self.stored(start, stop)
        return decode(scale, least, words)


def decode(
    scale: NDArray[Any], least: NDArray[Any], words: NDArray[np.uint16], out: Float32 | None = None
) -> Float32:
    """``scale * word + least`` of each row, rounded once."""
    found = np.empty(words.shape, np.float32) if out is None else out
    for row, each in enumerate(words):
        wide = np.multiply(each, np.float64(scale[row]))
        np.add(wide, np.float64(least[row]), out=found[row], casting="same_kind")
    return found


def is_clamped(scale: Float32) -> NDArray[np.bool_]:
    """Whether the words 0 of a row stand for all that lies below."""
    clamped: NDArray[np.bool_] = scale * _WORDS >= _CLAMPED
    return clamped


def encode(values: Any, input: str = "logits") -> NDArray[np.uint8]:
    """Rows as the file has them: ``(rows, V)`` numbers to ``(rows, bytes of a row)``.

    Parameters
    ----------
    values
        Numbers, of which the largest of a row is finite.
    input
        "logits" are encoded as llama.cpp does it, in its float32 arithmetic. "log_probs" that were
        decoded from such a file, so that their largest one has the word 65535 and their least
        the word 0, are given back their very words; others are taken as logits.

    Raises
    ------
    ValueError
        If a row holds NaN or infinity, or nothing but -infinity.
    """
    x: Float32 = np.asarray(values, np.float32)
    largest: Float32 = x.max(1)
    if not np.isfinite(largest).all():
        row = int(np.argmin(np.isfinite(largest)))
        raise ValueError(f"row {row} has the largest value {largest[row]}; accepted: finite ones")
    made = np.zeros((len(x), 2 * _row_words(x.shape[1])), np.uint8)
    for row, each in enumerate(x):
        known = _as_decoded(each) if input == "log_probs" else None
        scale, least, words = known or _encode_row(each)
        made[row, :8] = np.frombuffer(np.array([scale, least], "<f4").tobytes(), np.uint8)
        made[row, 8 : 8 + 2 * len(each)] = words.astype("<u2", copy=False).view(np.uint8)
    return made


def _encode_row(x: Float32) -> tuple[np.float32, np.float32, NDArray[np.uint16]]:
    largest = x.max()
    lowest = max(x.min(), largest - _RANGE)
    total = expf(x - largest).sum(dtype=np.float64)
    least = lowest - largest - np.float32(np.log(total))
    scale = (largest - lowest) / _WORDS
    if scale == 0:
        return scale, least, np.zeros(len(x), np.uint16)
    above = np.rint((np.float32(1) / scale) * (np.maximum(x, lowest) - lowest))
    return scale, least, above.astype(np.uint16)


def _as_decoded(x: Float32) -> tuple[np.float32, np.float32, NDArray[np.uint16]] | None:
    """The row that decodes to ``x``, if there is one.

    Its least value is that of the word 0. The largest, of the word 65535, is rounded, so that
    the scale is known but for its last few bits: of those, all are tried.
    """
    least, largest = x.min(), x.max()
    if not np.isfinite(least):
        return None
    wide = x.astype(np.float64) - np.float64(least)
    guess = np.float32((np.float64(largest) - np.float64(least)) / 65535)
    if guess == 0:
        return (guess, least, np.zeros(len(x), np.uint16)) if largest == least else None
    words = np.rint(wide / np.float64(guess))
    if words.max() > 65535:
        return None
    # Half a unit in the last place of the two ends, in units of the scale's.
    reach = int(np.ceil(np.spacing(np.abs(x).max()) / 65535 / np.spacing(guess))) + 1
    whole = words.astype(np.uint16)
    for step in sorted(range(-reach, reach + 1), key=abs):
        scale = np.float32(guess + step * np.spacing(guess))
        if np.array_equal(decode(np.array([scale]), np.array([least]), whole[None])[0], x):
            return scale, least, whole
    return None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    key: str | None = None,
    tokens: Any = None,
    context: int | None = None,
    input: str = "logits",
) -> None:
    """Convert a file of logits into one of another kind, block by block.

    Parameters
    ----------
    source
        What `klfast.open_logits` takes.
    target
        A ``.npy`` or ``.safetensors`` file, in float32, or else a base-logits file of llama.cpp.
        Of such a file arrays get the log-probabilities as they are stored, so that they can be
        made the same file again: entries at the floor are upper bounds and have too much mass, so
        compare the file itself rather than the array. `BaseLogits.at_floor` says how many.
    key
        Name of the array in ``source``.
    tokens, context
        To write a file of llama.cpp: the text, as integers or the file that holds them, and how
        many tokens a context has. ``source`` has a row for each token that llama.cpp scores,
        those of the second half of each context but its last one. None takes them from a
        ``source`` that is such a file.
    input
        What ``source`` holds, as for `encode`.

    Raises
    ------
    SourceError, ValueError
        If a file cannot be read, shapes do not fit, or a value cannot be written.
    """
    opened = open_logits(source, key)
    suffix = Path(target).suffix.lower()
    if suffix == ".npz":
        raise ValueError(f"{os.fspath(target)}: accepted: .npy, .safetensors, or another name")
    if suffix in (".npy", ".safetensors"):
        if tokens is not None or context is not None:
            raise ValueError(f"{os.fspath(target)}: holds logits alone, and no tokens or context")
        _write_array(opened, target, suffix)
        return
    if isinstance(opened, BaseLogits):
        if tokens is not None or context is not None:
            raise ValueError(f"{opened.name}: has its own tokens and context")
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
        return
    if tokens is None or context is None:
        raise ValueError(
            f"{os.fspath(target)}: a file of llama.cpp holds the text too: name tokens (--tokens) "
            "and context (--context); or write a .npy or .safetensors file"
        )
    given = open_column(tokens) if isinstance(tokens, (str, os.PathLike)) else tokens
    text = _text(np.asarray(given), context, opened)
    with replacing(target) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + np.array([context, opened.shape[-1], len(text)], "<u4").tobytes())
        file.write(text.astype("<i4").tobytes())
        for start, block in _blocks(opened):
            try:
                file.write(encode(block, input).tobytes())
            except ValueError as error:
                raise SourceError(f"{opened.name}: rows from {start}: {error}") from error


def _text(tokens: NDArray[Any], context: int, source: LogitSource) -> NDArray[Any]:
    """All tokens, context after context, if they are as many as the rows need."""
    rows = math.prod(source.shape[:-1])
    scored = context - 1 - context // 2
    if scored < 1:
        raise ValueError(f"context is {context}; accepted: a whole number from 3")
    chunks, rest = divmod(tokens.size, context)
    if not np.issubdtype(tokens.dtype, np.integer) or rest or chunks * scored != rows:
        raise SourceError(
            f"{source.name}: has {rows} rows, and tokens are {tokens.size} of {tokens.dtype}; "
            f"accepted, of contexts of {context} with {scored} rows each: "
            f"{rows // scored * context} integers"
        )
    outside = (tokens < 0) | (tokens >= source.shape[-1])
    if outside.any():
        raise SourceError(
            f"tokens: token {tokens[outside].flat[0]} is outside the vocabulary, 0 to "
            f"{source.shape[-1] - 1}"
        )
    return tokens.reshape(chunks, context)


def _write_array(source: LogitSource, target: str | os.PathLike[str], suffix: str) -> None:
    """Write float32 rows as they come: both formats are a header and the numbers after it."""
    shape = list(source.shape)
    stream = io.BytesIO()
    if suffix == ".npy":
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_2_0(stream, header)
    else:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        text = json.dumps({"logits": entry}).encode()
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)
    with replacing(target) as temporary, temporary.open("wb") as file:
        file.write(stream.getvalue())
        for _, block in _blocks(source):
            file.write(np.ascontiguousarray(block, "<f4").tobytes())


def _blocks(source: LogitSource) -> Iterator[tuple[int, NDArray[Any]]]:
    rows = math.prod(source.shape[:-1])
    at_once = max(1, _BLOCK_BYTES // (4 * source.shape[-1]))
    for start in range(0, rows, at_once):
        yield start, np.asarray(source.read(start, min(start + at_once, rows)))


def _row_words(n_vocab: int) -> int:
    return 2 * ((n_vocab + 1) // 2) + 4


def statistics(base: BaseLogits, test: LogitSource) -> Iterator[str]:
    """Lines that ``llama-perplexity --kl-divergence`` prints of a base file and a test model.

    In its own way, float32 arithmetic included: KL over the entries whose base log-probability is
    above -16, which may be negative. ``test`` are logits of the rows of ``base``, of which every
    digit is that of llama.cpp. Lines come chunk by chunk, and the statistics, of 100 rows or more,
    at the end.

    If ``test`` comes from such a file too, it is taken as it is stored, in 16 bits. Rounding moves
    the log-likelihood of a token by ``scale / sqrt(12)``, at most 7e-5, in the standard deviation;
    that of the largest entry not at all. It is without bias: rows of real files whose missing mass
    is below 1e-5 sum to 1, to 0.01 steps. What llama.cpp printed of the same model may be further
    off: of 115 tokens of a Q5_0 model, the mean of nll_q differed from that of its file by 1.8e-5,
    3.8 standard deviations of rounding, as if each logit were another by 1e-4. Most likely the
    file and the printed lines come from two runs of the model; that was not tried.

    Raises
    ------
    SourceError
        If the two do not have the same shape, or not the same text.
    """
    check_same_text(base, test)
    chunks, rows, _ = base.shape
    found = Rows(*(np.empty(chunks * rows, kind) for kind in ("f8", "f4", "f4", "f4", "?")))
    normalized = isinstance(test, BaseLogits)
    yield TITLE
    with ThreadPoolExecutor(get_num_threads(), "klfast-llama") as pool:
        for chunk in range(chunks):
            end = (chunk + 1) * rows
            for start in range(chunk * rows, end, _ROWS_AT_ONCE):
                part = slice(start, min(start + _ROWS_AT_ONCE, end))
                blocks = (np.asarray(each.read(part.start, part.stop)) for each in (base, test))
                tokens = base.targets.ravel()[part]
                values = pool.map(compared, *blocks, tokens, itertools.repeat(normalized))
                for column, each in zip(found, zip(*values, strict=True), strict=True):
                    column[part] = each
            yield f"{chunk + 1:4d}" + chunk_line(*(each[:end] for each in found))
    if chunks * rows >= FEW:
        yield from final_lines(*found)


def check_same_text(base: LogitSource, test: LogitSource) -> None:
    """Raise `SourceError` if two sources do not belong together."""
    if isinstance(base, BaseLogits) and isinstance(test, BaseLogits) and base.n_ctx != test.n_ctx:
        raise SourceError(f"{test.name}: has n_ctx {test.n_ctx}, but {base.name} has {base.n_ctx}")
    if base.shape[-1] != test.shape[-1]:
        raise SourceError(
            f"{test.name}: has a vocabulary of {test.shape[-1]}, but {base.name} has "
            f"{base.shape[-1]}"
        )
    if math.prod(base.shape[:-1]) != math.prod(test.shape[:-1]):
        raise SourceError(f"{test.name}: has shape {test.shape}, but {base.name} has {base.shape}")
    if isinstance(base, BaseLogits) and isinstance(test, BaseLogits):
        different = np.argwhere(base.tokens != test.tokens)
        if different.size:
            chunk, place = different[0]
            raise SourceError(
                f"{test.name}: was made of another text than {base.name}: token {place} of chunk "
                f"{chunk} is {test.tokens[chunk, place]}, not {base.tokens[chunk, place]}"
            )

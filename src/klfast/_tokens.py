"""The text of tokens, for people who look at the worst ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._sources import SourceError


class Vocabulary:
    """The text of each token.

    Parameters
    ----------
    path
        A ``tokenizer.json`` of the library tokenizers, or a text file with one token a line.

    Raises
    ------
    SourceError
        If the file is missing, or neither of these.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fspath(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise SourceError(f"{name}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{name}: is not text in UTF-8 ({error.reason})") from error
        self.tokens: list[str] = text.splitlines()
        if Path(path).suffix.lower() == ".json":
            try:
                self.tokens = _of_tokenizers(json.loads(text))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise SourceError(f"{name}: is not a tokenizer.json ({error})") from error
        if not self.tokens:
            raise SourceError(f"{name}: holds no tokens")
        self._join = _joiner(self.tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """What these tokens say together; one that is unknown is shown by its number."""
        known = len(self.tokens)
        return self._join([self.tokens[t] if 0 <= t < known else f"[{t}]" for t in tokens])


def _of_tokenizers(content: Any) -> list[str]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: token and score
        numbered = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    else:
        numbered = {str(token): int(number) for token, number in vocabulary.items()}
    for added in content.get("added_tokens") or ():
        numbered[str(added["content"])] = int(added["id"])
    if numbered and not 0 <= min(numbered.values()) <= max(numbered.values()) < 10 * len(numbered):
        raise ValueError("its numbers of tokens are not those of a vocabulary")
    tokens = [""] * (max(numbered.values(), default=-1) + 1)
    for token, number in numbered.items():
        tokens[number] = token
    return tokens


def _joiner(tokens: Sequence[str]) -> Callable[[Sequence[str]], str]:
    """How tokens of this kind are put together, told by the signs that they use."""
    marks = {sign: sum(sign in token for token in tokens) for sign in ("Ġ", "▁", "##")}
    sign = max(marks, key=lambda each: marks[each])
    if 50 * marks[sign] < len(tokens):
        return "".join
    return {"Ġ": _bytes, "▁": _marked, "##": _pieces}[sign]


def _marked(tokens: Sequence[str]) -> str:
    """SentencePiece: a sign stands for the space before a word."""
    return "".join(tokens).replace("▁", " ")


def _pieces(tokens: Sequence[str]) -> str:
    """WordPiece: words, of which ## marks what continues one."""
    return " ".join(tokens).replace(" ##", "")


def _bytes(tokens: Sequence[str]) -> str:
    """Byte-level BPE: one printable character for each byte of UTF-8.

    Bytes that are printable themselves in Latin-1 stand for themselves, the others, in order, are
    the characters from U+0100 on (Radford et al., GPT-2, 2019).
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    table |= {chr(256 + number): byte for number, byte in enumerate(others)}
    data = b"".join(
        bytes([table[sign]]) if sign in table else sign.encode() for sign in "".join(tokens)
    )
    return data.decode("utf-8", errors="replace")

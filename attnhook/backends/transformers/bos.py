"""The token with which a GGUF file says that every text begins, and which Transformers' tokenizer may leave out.

A tokenizer that Transformers makes from a GGUF file need not follow the file's ``add_bos_token``: that of Gemma 3
(Transformers 5) starts with the first word. llama.cpp follows it, and the model was trained with it. Without it there
is no attention sink at position 0, and what the model attends to is something else.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnhook.errors import OptionError

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
# type of a metadata value -> how struct calls it
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
# BPE tokenizers to which llama.cpp adds the token where the file does not say; to SentencePiece ones it always does
_BPE_WITH_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
)


def read_header(path: str | Path) -> dict[str, Any]:
    """The metadata of a GGUF file, without its arrays (the vocabulary), which are passed over.

    gguf's own reader makes an object of every entry of the vocabulary, which takes 12 s for one of 262,144. Raises
    OptionError where the file is not GGUF of version 2 or 3, little-endian, or ends too early.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).header()
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise OptionError(
            "model",
            f"model {str(path)!r}: its GGUF header cannot be read ({type(error).__name__}: {error}); fetch the file "
            "again, or convert it with a llama.cpp of 2023 or later",
        ) from error


def wanted(header: Mapping[str, Any]) -> bool:
    """Whether llama.cpp puts the begin-of-sequence token before a text, by the file's metadata or its own defaults."""
    said = header.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    kind = header.get("tokenizer.ggml.model")
    return kind == "llama" or (kind == "gpt2" and header.get("tokenizer.ggml.pre") in _BPE_WITH_BOS)


def token(header: Mapping[str, Any], tokenizer: Any) -> int | None:
    """Id of the token that every text begins with, or None where there is none.

    It is the file's ``bos_token_id``, or the tokenizer's where the file has none.
    """
    if not wanted(header):
        return None
    found = header.get("tokenizer.ggml.bos_token_id", tokenizer.bos_token_id)
    return None if found is None else int(found)


def once(ids: Sequence[int], bos: int | None) -> list[int]:
    """The ids with ``bos`` in front exactly once, whether they had it none, one or several times; as they are if None.

    A chat template that writes the token and a tokenizer that adds it would give two.
    """
    out = [int(i) for i in ids]
    if bos is None:
        return out
    words = next((n for n, i in enumerate(out) if i != bos), len(out))
    return [bos, *out[words:]]


class _Walk:
    """Goes through a file's header, value by value."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> dict[str, Any]:
        if self._data[:4] != _MAGIC:
            raise ValueError(f"it is not a GGUF file, and begins with {self._data[:8]!r}")
        version = struct.unpack_from("<I", self._data, 4)[0]
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}")
        self._at = 8
        self._number("Q")  # how many tensors
        out = {}
        for _ in range(self._number("Q")):
            name, kind = self._string().decode(), self._number("I")
            value = self._value(kind)
            if kind != _ARRAY:
                out[name] = value
        return out

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string().decode(errors="replace")
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            self._at += count * struct.calcsize("<" + _NUMBERS[inner])
        else:
            for _ in range(count):
                self._value(inner)
        return None

    def _number(self, form: str) -> Any:
        value = struct.unpack_from("<" + form, self._data, self._at)[0]
        self._at += struct.calcsize("<" + form)
        return value

    def _string(self) -> bytes:
        size = self._number("Q")
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError(f"it ends within a text of {size} bytes")
        return self._data[start : self._at]

"""Key mass on its way from the workers to a reply: pieces that passes add, and what leaves with the last record.

A pass tells a request's prompt rows as one piece, and each row that a token may be sampled from as another, since a
draft may be refused. Where tokens are accepted, `Gathered` adds the pieces that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attnhook.capture.key_mass import Added, KeySums
from attnhook.options import RequestOptions
from attnhook.record.key_mass import KeyMass

Piece = dict[str, Any]  # plain values, which any serialiser takes

PROMPT = -1  # the token of a piece that holds the prompt's rows
_ONE = ("", 0)  # the sequence of a request that has its sums to itself


def pack(added: Added, token: int) -> Piece:
    """A pass's addition as plain values; ``token`` is its row's place among the sampled ones, or `PROMPT`."""
    return {"token": token, "rows": added.rows, "layers": [*added.layers], **_packed(added.mass)}


def join(stages: Sequence[Iterable[Piece]], layers: Sequence[int]) -> list[Piece]:
    """The pieces of a request with the layers of all pipeline stages; without numbers where a stage lacks its own."""
    parts: dict[int, list[Piece]] = {}
    for pieces in stages:
        for piece in pieces:
            parts.setdefault(piece["token"], []).append(piece)
    if len(stages) == 1 and all([*own[0]["layers"]] == [*layers] for own in parts.values()):
        return [own[0] for own in parts.values()]
    return [_joined(own, layers) for own in parts.values()]


def _joined(parts: list[Piece], layers: Sequence[int]) -> Piece:
    found = {
        layer: mass for part in parts for layer, mass in zip(part["layers"], _mass(part, part["layers"]), strict=True)
    }
    whole = found.keys() == {*layers} and all(part["data"] is not None for part in parts)
    mass = np.stack([found[layer] for layer in layers]) if whole else None
    return {**parts[0], "layers": [*layers], **_packed(mass)}


class Gathered:
    """The sums of one request, where its tokens are accepted."""

    def __init__(self, options: RequestOptions) -> None:
        self._kv_heads = options.key_mass == "kv_head"
        self._sums = KeySums(kv_heads=self._kv_heads, mask_prefix=options.mask_prefix)

    def add(self, pieces: Iterable[Piece], tokens: int) -> None:
        """Add the pieces of the prompt and of the first ``tokens`` sampled rows."""
        for piece in pieces:
            if piece["token"] < tokens:
                mass = None if piece["data"] is None else _mass(piece, piece["layers"])
                self._sums.add([Added(_ONE, piece["rows"], tuple(piece["layers"]), mass)], lambda *_: None)

    def leave(self) -> dict[str, Any] | None:
        """All that was added, as plain values; None where a row was dropped, or none was there."""
        if not self._sums.sequences():
            return None
        mass = self._sums.of(_ONE)
        return {"rows": mass.rows, "layers": [*mass], **_packed(np.stack([*mass.values()]))}


def received(packed: Mapping[str, Any]) -> KeyMass:
    """What `Gathered.leave` made."""
    layers = packed["layers"]
    return KeyMass(dict(zip(layers, _mass(packed, layers), strict=True)), packed["rows"])


def _packed(mass: np.ndarray | None) -> dict[str, Any]:
    if mass is None:
        return {"shape": [], "data": None}
    return {"shape": [*mass.shape], "data": np.ascontiguousarray(mass, "<f4").tobytes()}


def _mass(packed: Mapping[str, Any], layers: Sequence[int]) -> np.ndarray:
    """float32 [L, G, keys] of a piece, [L, keys] or [L, kv heads, keys] of what leaves."""
    if packed["data"] is None:
        return np.zeros((len(layers), 1, 0), np.float32)
    return np.frombuffer(packed["data"], "<f4").reshape(packed["shape"])

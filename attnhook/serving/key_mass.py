"""Key mass on its way from the workers to a reply: pieces that passes add, and what leaves with the last record.

A pass tells a request's prompt rows as one piece, and each row that a token may be sampled from as another, since a
draft may be refused. Where tokens are accepted, `Gathered` adds the pieces that stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attnhook.capture.key_mass import Added, KeySums
from attnhook.options import RequestOptions
from attnhook.record.key_mass import KeyMass

Piece = dict[str, Any]  # plain values, which any serialiser takes

PROMPT = -1  # the token of a piece that holds the prompt's rows


def pack(added: Added, token: int) -> Piece:
    """A pass's addition as plain values; ``token`` is its row's place among the sampled ones, or `PROMPT`."""
    layers = added.layers
    return {
        "token": token,
        "rows": added.rows,
        "groups": 0 if not layers else len(next(iter(layers.values()))),
        "layers": None if layers is None else {str(layer): _bytes(mass) for layer, mass in layers.items()},
    }


def _bytes(mass: np.ndarray) -> bytes:
    return np.ascontiguousarray(mass, "<f4").tobytes()


def join(stages: Sequence[Iterable[Piece]], layers: Collection[int]) -> list[Piece]:
    """The pieces of a request with the layers of all pipeline stages; without any where a stage lacks its own."""
    found: dict[int, Piece] = {}
    for pieces in stages:
        for piece in pieces:
            known = found.get(piece["token"])
            if known is None:
                found[piece["token"]] = dict(piece)
            elif known["layers"] is not None:
                known["layers"] = None if piece["layers"] is None else {**known["layers"], **piece["layers"]}
    for piece in found.values():
        if piece["layers"] is not None and {int(layer) for layer in piece["layers"]} != {*layers}:
            piece["layers"] = None
    return list(found.values())


class Gathered:
    """The sums of one request, where its tokens are accepted."""

    def __init__(self, options: RequestOptions) -> None:
        self._sums = KeySums(kv_heads=options.key_mass == "kv_head", mask_prefix=options.mask_prefix)

    def add(self, pieces: Iterable[Piece], tokens: int) -> None:
        """Add the pieces of the prompt and of the first ``tokens`` sampled rows."""
        for piece in pieces:
            if piece["token"] < tokens:
                self._sums.add([_added(piece)], lambda *_: None)

    def leave(self) -> dict[str, Any] | None:
        """All that was added, as plain values; None where a row was dropped, or none was there."""
        if not self._sums.sequences():
            return None
        mass = self._sums.of(_ONE)
        return {
            "rows": mass.rows,
            "layers": {str(layer): _bytes(own) for layer, own in mass.items()},
            "groups": [len(own) if own.ndim == 2 else 0 for own in mass.values()],
        }


_ONE = ("", 0)


def _added(piece: Piece) -> Added:
    layers = piece["layers"]
    if layers is None:
        return Added(_ONE, piece["rows"], None)
    groups = piece["groups"]
    return Added(
        _ONE,
        piece["rows"],
        {int(layer): np.frombuffer(data, "<f4").reshape(groups, -1) for layer, data in layers.items()},
    )


def received(packed: Mapping[str, Any]) -> KeyMass:
    """What `Gathered.leave` made."""
    found = {}
    for (layer, data), groups in zip(packed["layers"].items(), packed["groups"], strict=True):
        mass = np.frombuffer(data, "<f4")
        found[int(layer)] = mass.reshape(groups, -1) if groups else mass
    return KeyMass(found, packed["rows"])

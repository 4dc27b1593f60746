"""Key mass: how much attention each key of a request got from its captured rows, summed up pass by pass.

The heavy-hitter score of H2O, SnapKV's window score and the document score of in-context re-ranking are such sums; the
rows that are added decide which of them it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from attnhook.errors import UnsupportedError
from attnhook.record.key_mass import KeyMass

Sequence = tuple[str, int]  # request id, choice


class Added(NamedTuple):
    """What rows of one sequence in one pass add, float32 [L, G, keys] for keys 0 on; None where one was dropped."""

    sequence: Sequence
    rows: int
    layers: tuple[int, ...]
    mass: np.ndarray | None
    position: int | None = None  # of the one row that gives a token; None: they are rows of the prompt


class _Sums:
    """Sums of one sequence, in float64: a long answer adds thousands of small numbers to a large one."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.rows = self.keys = 0
        self.mass = np.zeros((len(layers), 0, 0))  # [L, G, room]

    def add(self, rows: int, mass: np.ndarray) -> None:
        layers, groups, keys = mass.shape
        if self.mass.shape[2] < keys:
            larger = np.zeros((layers, groups, keys + (keys // 2 if self.keys else 0)))
            larger[..., : self.keys] = self.mass[..., : self.keys] if self.keys else 0
            self.mass = larger
        self.mass[..., :keys] += mass
        self.keys = max(self.keys, keys)
        self.rows += rows


class KeySums:
    """What one listener has of all sequences. ``lost`` are those of which a row was dropped, so that they have none."""

    def __init__(self, *, kv_heads: bool, mask_prefix: int = 0) -> None:
        self._kv_heads, self._prefix = kv_heads, mask_prefix
        self._sums: dict[Sequence, _Sums] = {}
        self.lost: set[Sequence] = set()

    def add(self, added: Iterable[Added], dropped: Callable[[str, int, str], None]) -> None:
        """Take what a pass adds; of a sequence that loses a row nothing is kept, which ``dropped`` is told once."""
        for sequence, rows, layers, mass, _ in added:
            if mass is None:
                if sequence not in self.lost:
                    self.lost.add(sequence)
                    dropped("key_mass", 1, f"request {sequence[0]}: one of its rows was dropped, so it has no key mass")
                self._sums.pop(sequence, None)
            elif sequence not in self.lost:
                if sequence not in self._sums:
                    self._sums[sequence] = _Sums(layers)
                self._sums[sequence].add(rows, mass)

    def check(self, records: Mapping[Sequence, int]) -> None:
        """Raise UnsupportedError unless every sequence has as many rows here as records were made of it."""
        for sequence, count in records.items():
            sums = self._sums.get(sequence)
            rows = 0 if sums is None else sums.rows
            if rows != count and sequence not in self.lost:
                raise UnsupportedError(
                    f"key_mass of request {sequence[0]}, choice {sequence[1]}: {rows} rows were added up and {count} "
                    "were captured: the engine's backend does not tell all of them, so it has no key mass; capture "
                    "without key_mass"
                )

    def of(self, sequence: Sequence) -> KeyMass:
        """The key mass of one sequence. Raises KeyError where it has none."""
        sums = self._sums[sequence]
        mass = sums.mass[..., : sums.keys].astype(np.float32)
        mass[..., : self._prefix] = np.nan
        return KeyMass(dict(zip(sums.layers, mass if self._kv_heads else mass[:, 0], strict=True)), sums.rows)

    def sequences(self) -> list[Sequence]:
        """Sequences that have a key mass, in the order in which they came."""
        return list(self._sums)


class KeyMasses(Mapping[str | Sequence, KeyMass]):
    """The key mass of each sequence by (request id, choice), or by the request id where a request has one choice."""

    def __init__(self, sums: KeySums | None) -> None:
        self._own = sums

    def __getitem__(self, name: str | Sequence) -> KeyMass:
        if self._own is None:
            raise KeyError(f"{name!r}: no key mass was asked for: capture(key_mass='mean') or 'kv_head'")
        known = self._own.sequences()
        wanted = [one for one in known if name in (one, one[0])]
        if len(wanted) == 1:
            return self._own.of(wanted[0])
        if wanted:
            raise KeyError(f"{name!r} has the choices {[choice for _, choice in wanted]}: ask for ({name!r}, choice)")
        raise KeyError(f"{name!r} has no key mass; there is one of {', '.join(map(repr, known)) or 'no request'}")

    def __iter__(self) -> Iterator[str | Sequence]:
        own = [] if self._own is None else self._own.sequences()
        count = Counter(request for request, _ in own)
        return iter([one if count[one[0]] > 1 else one[0] for one in own])

    def __len__(self) -> int:
        return 0 if self._own is None else len(self._own.sequences())

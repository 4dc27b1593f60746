"""What one row holds: its fields, and the numbers that are read off them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from attnhook.errors import RecordError
from attnhook.record.sink_mass import free_means

Mode = Literal["raw", "sketch", "fingerprint"]
ThinkPhase = Literal["think", "output"]
MODES: tuple[Mode, ...] = get_args(Mode)
PHASES: tuple[ThinkPhase, ...] = get_args(ThinkPhase)

SCHEMA_VERSION = 1  # of entries without token ids; a binary row's version tells more, see `attnhook.record.layout`
TOKENS_VERSION = 2  # of those with them
VERSIONS = (SCHEMA_VERSION, TOKENS_VERSION)
TOP_K_PER_HEAD_MAX = 16  # positions that are told of each head
UNKNOWN = -1  # in the place of a token id that is masked or not known


class RowName(NamedTuple):
    """What tells a row from the others of a step; see `TokenRecord`."""

    request_id: str
    choice: int
    decode_step: int | None
    query_position: int

    @property
    def key(self) -> tuple[str, int, int]:
        """That of its `TokenRecord`."""
        return self.request_id, self.choice, self.query_position


@dataclass(frozen=True, eq=False)
class RowData:
    """The fields of a `TokenRecord`, which adds its bytes, its JSON and its zone."""

    request_id: str
    query_position: int  # position of the row in the request's full sequence, from 0
    layers: tuple[int, ...]  # layer numbers as in the model, ascending
    token_positions: np.ndarray  # int32 [L, k]
    attention_scores: np.ndarray  # float32 [L, k], descending; true probabilities
    fingerprints: np.ndarray  # float32 [L, 20]
    decode_step: int | None = 0  # index of the generated token; None for a prompt row
    choice: int = 0
    mode: Mode = "raw"
    think_phase: ThinkPhase = "output"  # of the token that was sampled from the row; prompt rows are "output"
    model: str = ""
    span_names: tuple[str, ...] = ()
    span_mass: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # float32 [L, n]
    query_token: int = UNKNOWN  # id of the token at query_position; also unknown where there are no ids
    token_ids: np.ndarray | None = None  # int32 [L, k]: ids at token_positions, or UNKNOWN (-1); None: no ids
    #: float32 [L]: attention on position 0, the attention sink, which is part of the fingerprints; 0 where the row does
    #: not see it, None where it was not kept (rows of attnhook before 0.2).
    sink_mass: np.ndarray | None = None
    # of each query head by itself; H all query heads of a layer, None where it was not asked for
    head_positions: np.ndarray | None = None  # int32 [L, H, k_h]; -1 behind the last reportable key
    head_scores: np.ndarray | None = None  # float32 [L, H, k_h], descending; true probabilities
    head_fingerprints: np.ndarray | None = None  # float32 [L, H, 20]
    head_span_mass: np.ndarray | None = None  # float32 [L, H, n]
    head_sink_mass: np.ndarray | None = None  # float32 [L, H]; attention on position 0
    head_lse: np.ndarray | None = None  # float32 [L, H]; natural log of the softmax's denominator

    @property
    def key(self) -> tuple[str, int, int]:
        """(request id, choice, query position): unique for a row, so stores can drop repeats."""
        return self.request_id, self.choice, self.query_position

    @property
    def is_prompt(self) -> bool:
        """Whether this is a prompt row: no generated token was sampled from it."""
        return self.decode_step is None

    @cached_property
    def fingerprint(self) -> np.ndarray:
        """Mean over the captured layers, float32[20]."""
        mean: np.ndarray = self.fingerprints.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    @cached_property
    def free_fingerprint(self) -> np.ndarray:
        """Mean over the captured layers without the attention sink, float32[20]; `fingerprint` where it was not kept.

        Raises RecordError where the sink's mass is more than its bin's.
        """
        if self.sink_mass is None:
            return self.fingerprint
        means, sound = free_means(self.fingerprints[None], self.sink_mass[None], np.array([self.query_position]))
        if not sound[0]:
            raise RecordError(
                f"record {self.key!r}: the mass of its attention sink, {self.sink_mass.tolist()}, does not fit its "
                "fingerprints: the record is damaged"
            )
        mean: np.ndarray = means[0]
        return mean

    @property
    def topk_mass(self) -> np.ndarray:
        """Sum of each layer's reported scores, float32[L]; at most 1."""
        mass: np.ndarray = self.attention_scores.sum(axis=1, dtype=np.float64).astype(np.float32)
        return mass

    @property
    def spans(self) -> dict[str, float]:
        """Attention mass in each named position range, mean over the captured layers."""
        if not self.span_names:
            return {}
        return dict(zip(self.span_names, self.span_mass.mean(axis=0, dtype=np.float64).tolist(), strict=True))

    def top(self, layer: int | None = None) -> list[tuple[int, float]]:
        """(position, score) pairs of one captured layer, the last one by default, best first.

        Raises KeyError if the layer was not captured.
        """
        if layer is not None and layer not in self.layers:
            raise KeyError(f"layer {layer} was not captured; captured: {list(self.layers)}")
        row = len(self.layers) - 1 if layer is None else self.layers.index(layer)
        kept = self.token_positions[row] >= 0
        return list(
            zip(self.token_positions[row][kept].tolist(), self.attention_scores[row][kept].tolist(), strict=True)
        )


def is_token(value: object) -> bool:
    """Whether a value is a token id or `UNKNOWN`."""
    return isinstance(value, int) and not isinstance(value, bool) and UNKNOWN <= value < 2**31

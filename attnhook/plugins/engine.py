"""The contract of a server engine: what its adapter tells the engine kit, `attnhook.serving`.

The kit does the rest: options, guard rails, plans, kernels, ranks, graphs, replies, streams, refusals. docs/plugins.md
builds a whole engine from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from attnhook.capture.ranks import Ranks

if TYPE_CHECKING:
    import torch

    from attnhook.kernels.topk import PagedKeys

Batch = TypeVar("Batch")
Call = TypeVar("Call")


class Computed(NamedTuple):
    """The tokens of one request that a pass computes, where the request asks for records."""

    request: str
    packed: str  # the request's options, as `attnhook.serving.wire.pack_options` made them
    source: int  # the request's row in the page tables
    start: int  # place of its first token among the pass's tokens
    first: int  # position of that token in the request
    tokens: int
    sampled: int  # of its last rows so many are sampled from: 0 in the middle of a prompt, more with drafts
    prompt_end: int  # position of the prompt's last token, whose row gives the first generated token


class LayerView(NamedTuple):
    """One layer's keys and values in the cache, and its softmax."""

    keys: PagedKeys
    values: PagedKeys
    softmax: dict[str, Any]  # scale, and of softcap, window, sinks, alibi_slopes what it has: see `topk_attention`
    value_heads: torch.Tensor | None = None  # [Hq, L, Dv]: how heads read shared latent values of L numbers (MLA)


class LayerShape(NamedTuple):
    """One attention layer of this worker."""

    heads: int  # query heads that this worker has
    dim: int  # dimensions of a query, as `EngineAdapter.queries` gives it


@dataclass(frozen=True)
class ModelShape:
    """The model, as one worker has it."""

    name: str  # under which it is served
    layers: Mapping[int, LayerShape]  # by number in the model; without those that have no attention
    dtype: torch.dtype
    device: torch.device
    graphs: bool = False  # whether the engine replays graphs of whole passes, in which no Python runs
    graph_rows: int = 512  # most rows of one such graph
    ranks: Ranks = field(default_factory=Ranks)  # the other workers of the model
    kv_heads: int | None = None  # of the whole model's layers; key mass by kv head wants it where ranks share them


class EngineAdapter(ABC, Generic[Batch, Call]):
    """One model in one worker of a server engine.

    ``Batch`` is whatever the engine computes in one pass, ``Call`` whatever describes one attention call: the kit
    hands both back as they came. Methods run on the thread of the engine's pass. What they raise is told to the
    requests that asked, and never reaches the engine.
    """

    #: Version of this contract that a subclass was written against, see `CONTRACTS`.
    contract = 1

    #: Name of the engine, for messages.
    engine: str

    #: Whether the adapter can make a pass run Python in place of a graph (`Worker.replays`). Then a pass runs as a
    #: graph only where graphs keep all that is wanted of it. Otherwise the engine decides, and what graphs do not keep
    #: is missing.
    can_avoid_graphs = False

    @abstractmethod
    def shape(self) -> ModelShape:
        """The model. Raises UnsupportedError for what cannot be captured, before the server takes requests."""

    @abstractmethod
    def rows(self, batch: Batch) -> Iterable[Computed]:
        """Before a pass: which rows it computes for each request that asks; the same on all ranks."""

    @abstractmethod
    def queries(self, call: Call) -> torch.Tensor:
        """[N, Hq, D] of all tokens of a pass, after the positions were put in; a view where possible."""

    @abstractmethod
    def keys(self, call: Call) -> LayerView:
        """Where the keys of the pass's requests lie; they stay there until it ends. Raises UnsupportedError."""

    def meeting_keys(self, call: Call, rows: torch.Tensor) -> torch.Tensor:
        """Queries [U, Hq, D] as they meet the stored keys, [U, Hq, D']; another form with latent attention only."""
        return rows

    def output(self, call: Call) -> torch.Tensor | None:
        """[N, Hq, Dv]: what the engine's attention made of the queries; None where a call has only a part of it."""
        return None

    def may_be_graph(self, batch: Batch) -> bool:
        """Whether a graph may run this pass."""
        return True

    def is_in_graphs(self, call: Call) -> bool:
        """Whether a call is one that graphs are captured of."""
        return True

    def without_tensors(self, call: Call) -> Call:
        """A call that is kept for the replays of its graph: ``keys`` must do with it, of the pass that runs then."""
        return call

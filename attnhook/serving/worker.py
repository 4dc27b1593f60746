"""A worker of a server engine: the passes of one model, from their rows to the packed records of those who ask.

The engine's own calls stay as they are. An adapter's hooks tell a `Worker` that a pass begins (`plan`), that a layer's
attention has run (`see`), and that the pass is over (`finish`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Generic

import torch

from attnhook.errors import UnsupportedError
from attnhook.options import graph_layers, resolve_layers
from attnhook.plugins import versions
from attnhook.plugins.engine import Batch, Call, EngineAdapter, ModelShape
from attnhook.serving.exchange import answers
from attnhook.serving.graphs import KeptQueries
from attnhook.serving.plan import Model, Plan
from attnhook.serving.reduction import Memory, Reduction

_NOT_KEPT = (
    ": a CUDA graph ran them, where only queries of the layers that --attention-tokens-graph-layers names are kept"
)


class Worker(Generic[Batch, Call]):
    """What is ours of one model in one worker process; passes come one at a time.

    Raises UnsupportedError where the model has nothing that can be captured, and PluginError for an adapter that was
    written against a contract that this release does not know.
    """

    def __init__(self, adapter: EngineAdapter[Batch, Call], kept: KeptQueries | None = None) -> None:
        versions.check("adapter", adapter, f"the adapter of {adapter.engine}")
        self.adapter = adapter
        shape = adapter.shape()
        heads = {number: layer.heads for number, layer in shape.layers.items()}
        self.model = Model(shape.name, heads, shape.ranks, shape.kv_heads)
        if not self.model.whole:
            raise UnsupportedError(f"{adapter.engine}'s model has no attention layer that attnhook can capture")
        #: Queries that graphs keep, or None where every pass runs Python.
        self.kept = keep_queries(shape, self.model.whole) if kept is None else kept
        #: Whether the pass that runs may be a graph's, since graphs keep all that is wanted of it.
        self.replays = False
        self._reduction: Reduction | None = None  # of the pass that runs, where somebody asks
        self._memory = Memory()
        self._device = shape.device
        self._graphed: dict[int, Call] = {}  # the call of each layer that a graph has

    @property
    def plan(self) -> Plan | None:
        """Of the pass that runs; None where nobody asks."""
        return None if self._reduction is None else self._reduction.plan

    @property
    def wanted(self) -> frozenset[int]:
        """Layers that are wanted of the pass that runs."""
        return frozenset() if self._reduction is None else self._reduction.plan.wanted

    @property
    def sees(self) -> bool:
        """Whether an attention call of any layer is of interest now."""
        return self.kept is not None or self._reduction is not None

    def rest(self) -> None:
        """Before every pass: nothing is wanted of it yet."""
        self.abandon()
        if self.kept is not None:
            self.kept.rest()

    def abandon(self) -> None:
        """The engine's own pass has failed: nothing comes of it."""
        self._reduction, self.replays = None, False

    def begin(self, batch: Batch, asking: Collection[str]) -> None:
        """A pass begins in which the requests named in ``asking`` want records. From here on all ranks keep in step."""
        plan = Plan(self.model, self._device)
        choosing = self.adapter.can_avoid_graphs
        self._reduction = Reduction(plan, self._memory, _NOT_KEPT if self.kept is not None and not choosing else "")
        try:
            for computed in self.adapter.rows(batch):
                plan.add(computed)
            if self.kept is not None and (not choosing or self._graphs_have_all(plan, batch)):
                self.kept.aim(plan.index)
                self.replays = True
        except Exception as error:
            plan.give_up(error, asking)

    def see(self, number: int, call: Call) -> None:
        """A layer's attention has run: what is wanted of it is taken, or becomes part of the graph being captured."""
        try:
            self._see(number, call)
        except Exception as error:
            if self.plan is not None:
                self.plan.give_up(error)
            elif self.kept is not None:
                self.kept.drop(number, error)

    def finish(self) -> dict[str, dict[str, Any]]:
        """After a pass: the packed `Share` of every request that asked; empty on ranks that do not answer."""
        reduction = self._reduction
        if reduction is None:
            return {}
        if self.kept is not None and self.replays:
            try:
                self._take_kept(reduction, self.kept)
            except Exception as error:
                reduction.plan.give_up(error)
        self.abandon()
        return answers(reduction)

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what is kept of requests that ended."""
        self.model.forget(requests)

    def _see(self, number: int, call: Call) -> None:
        adapter, kept, reduction = self.adapter, self.kept, self._reduction
        if kept is not None and kept.records(number) and (reduction is None or self.replays):
            if adapter.is_in_graphs(call):
                kept.keep(number, adapter.queries(call))
                self._graphed[number] = adapter.without_tensors(call)
            return
        if reduction is None or number not in reduction.plan.wanted:
            return
        index = reduction.plan.index
        # copies: the engine uses its buffers again
        rows = adapter.queries(call).index_select(0, index)
        output = adapter.output(call) if reduction.needs_output(number) else None
        self._take(reduction, number, call, rows, None if output is None else output.index_select(0, index))

    def _take(
        self, reduction: Reduction, number: int, call: Call, rows: torch.Tensor, output: torch.Tensor | None
    ) -> None:
        view = self.adapter.keys(call)
        reduction.take(number, self.adapter.meeting_keys(call, rows), view, output)

    def _take_kept(self, reduction: Reduction, kept: KeptQueries) -> None:
        """Layers whose attention ran inside a graph."""
        for number in reduction.missing:
            rows = kept.get(number, len(reduction.plan.index))
            if rows is not None and number in self._graphed:
                self._take(reduction, number, self._graphed[number], rows, None)

    def _graphs_have_all(self, plan: Plan, batch: Batch) -> bool:
        kept = self.kept
        if kept is None or plan.self_checks or not self.adapter.may_be_graph(batch):
            return False
        graphed = {number for number in self._graphed if number in kept}  # a layer may have been dropped since
        return bool(plan.wanted) and plan.wanted <= graphed and len(plan.index) <= kept.rows


def keep_queries(shape: ModelShape, whole: Iterable[int]) -> KeptQueries | None:
    """Buffers that graphs write queries into; None where there are no graphs.

    ``whole`` are the layers of the whole model. Where ATTNHOOK_GRAPH_LAYERS names layers they are there without graphs
    too, which is how they are tested.
    """
    asked = graph_layers()
    if asked is None and not shape.graphs:
        return None
    chosen = resolve_layers(asked or "auto", list(whole), "ATTNHOOK_GRAPH_LAYERS")
    shapes = {
        number: (shape.layers[number].heads, shape.layers[number].dim) for number in chosen if number in shape.layers
    }
    return KeptQueries(shapes, shape.graph_rows, shape.dtype, shape.device)

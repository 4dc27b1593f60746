"""SGLang's scheduler process as the engine kit sees it: layers, a pass's rows, each layer's queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from attnhook.backends.sglang import pool
from attnhook.backends.sglang.layers import attention_layers
from attnhook.backends.sglang.requests import Asking
from attnhook.capture.ranks import Ranks
from attnhook.errors import UnsupportedError
from attnhook.plugins.engine import Computed, EngineAdapter, LayerShape, LayerView, ModelShape

_COLUMNS = 512  # positions by which the table of slots grows: the kernel prepares its jobs anew for another width
_KEPT_ROWS = 512  # most requests of one replay whose queries are kept; SGLang's own graphs go to 512 by default


class Pass(NamedTuple):
    """A batch that is about to run, and those of its requests that ask, by their place in it."""

    batch: Any
    asking: list[tuple[int, Any, Asking]]


class Call(NamedTuple):
    """One call of an attention backend; in a graph's replay without its tensors."""

    module: Any
    q: torch.Tensor
    output: Any
    batch: Any
    backend: str
    decodes: bool
    extra: dict[str, Any]


class SglangAdapter(EngineAdapter[Pass, Call]):
    """One scheduler process, which runs one model, one pass at a time.

    Raises UnsupportedError where a layer's pool cannot be read.
    """

    engine = "SGLang"
    can_avoid_graphs = True

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.layers = attention_layers(runner.model)
        for layer in self.layers.values():
            pool.check(runner.token_to_kv_pool, layer.module)
        #: The rows of the pass that runs, by request.
        self.computed: dict[str, Computed] = {}
        self._slots: pool.Slots | None = None

    def shape(self) -> ModelShape:
        """The model as this worker has it."""
        from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group

        runner = self.runner
        return ModelShape(
            str(getattr(runner.server_args, "served_model_name", None) or runner.server_args.model_path),
            {number: LayerShape(*layer.query_shape) for number, layer in self.layers.items()},
            runner.model_config.dtype,
            torch.device(runner.device),
            graphs=str(runner.device).startswith("cuda"),
            graph_rows=min(_KEPT_ROWS, int(runner.req_to_token_pool.size)),
            ranks=Ranks.of(get_tp_group(), get_pp_group()),
            kv_heads=getattr(runner.model_config, "num_key_value_heads", None),
        )

    def rows(self, batch: Pass) -> Iterator[Computed]:
        """Those of the requests that ask; then their keys can be found."""
        forward, asking = batch
        self.computed, self._slots = {}, None
        for computed in _rows(forward, asking):
            self.computed[computed.request] = computed
            yield computed
        places = torch.tensor([i for i, _, _ in asking], device=forward.req_pool_indices.device)
        longest = max(computed.first + computed.tokens for computed in self.computed.values())
        longest = -(-longest // _COLUMNS) * _COLUMNS
        table = self.runner.req_to_token_pool.req_to_token[forward.req_pool_indices[places], :longest]
        self._slots = pool.Slots(self.runner.token_to_kv_pool, table.to(torch.int32))

    def may_be_graph(self, batch: Pass) -> bool:
        """Graphs run passes of decoding."""
        return bool(batch.batch.forward_mode.is_decode())

    def queries(self, call: Call) -> torch.Tensor:
        """Of a call of a layer or of its twin."""
        return self.layers[call.module.layer_id].queries(call.module, call.q, call.extra)

    def meeting_keys(self, call: Call, rows: torch.Tensor) -> torch.Tensor:
        """Those of an MLA layer's twin are absorbed."""
        return self.layers[call.module.layer_id].for_pool(call.module, rows)

    def keys(self, call: Call) -> LayerView:
        """In SGLang's pool, by the request table."""
        number = call.module.layer_id
        layer = self.layers[number]
        if self._slots is None:
            raise UnsupportedError(f"layer {number}: attention outside the pass that was planned")
        view = pool.view(
            self.runner.token_to_kv_pool, layer.module, self._slots, call.backend,
            decodes=call.decodes, sinks=call.extra.get("sinks"),
        )  # fmt: skip
        return view._replace(value_heads=layer.value_heads(call.module))

    def output(self, call: Call) -> torch.Tensor | None:
        """None where it is only a part, which SGLang adds others to."""
        return self.layers[call.module.layer_id].output(call.module, call.output, call.batch)

    def is_in_graphs(self, call: Call) -> bool:
        """Decoding, and not by the module that expands its keys."""
        return call.module is self.layers[call.module.layer_id].module and call.decodes

    def without_tensors(self, call: Call) -> Call:
        """The module, its backend and what it was given besides."""
        return call._replace(q=call.q[:0], output=None, batch=None)

    def has(self, module: Any) -> bool:
        """Whether a module is one of the model's own layers; a draft model's have the same numbers."""
        layer = self.layers.get(module.layer_id)
        return layer is not None and layer.has(module)


def _rows(batch: Any, asking: list[tuple[int, Any, Asking]]) -> Iterator[Computed]:
    """The asking requests' rows in a pass."""
    mode = batch.forward_mode
    if mode.is_decode():
        lengths = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens.cpu()
        for source, (i, req, ask) in enumerate(asking):
            yield Computed(req.rid, ask.packed, source, i, int(lengths[i]) - 1, 1, 1, ask.prompt_end)
    elif mode.is_extend() and batch.extend_seq_lens_cpu is not None:
        counts = [int(count) for count in batch.extend_seq_lens_cpu]
        for source, (i, req, ask) in enumerate(asking):
            first = int(batch.extend_prefix_lens_cpu[i])
            # in the middle of a prompt that is computed in chunks no token is sampled
            sampled = int(first + counts[i] >= len(req.origin_input_ids) + len(req.output_ids))
            yield Computed(req.rid, ask.packed, source, sum(counts[:i]), first, counts[i], sampled, ask.prompt_end)
    else:
        raise UnsupportedError(f"a pass of SGLang in mode {mode.name} is not captured")

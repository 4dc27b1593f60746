"""vLLM's worker as the engine kit sees it: the model's layers, a pass's rows, each layer's queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from attnhook.backends.vllm import cache
from attnhook.backends.vllm.frontend import served_name
from attnhook.capture.ranks import Ranks
from attnhook.errors import UnsupportedError
from attnhook.plugins.engine import Computed, EngineAdapter, LayerShape, LayerView, ModelShape
from attnhook.plugins.patching import objects


class Call(NamedTuple):
    """One attention call of a layer; in a graph's replay only the layer is known."""

    name: str
    layer: Any
    query: torch.Tensor | None = None
    kv_cache: torch.Tensor | None = None
    metadata: Any = None
    output: torch.Tensor | None = None


class VllmAdapter(EngineAdapter[Iterable[Computed], Call]):
    """One model runner; its batches are the rows that `runner_v1` and `runner_v2` read from it.

    Raises UnsupportedError where a layer's cache cannot be read.
    """

    engine = "vLLM"

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.layers = attention_layers(runner)
        #: Attention metadata by layer name, of the pass that has just run.
        self.metadata: Any = None
        for _, layer in self.layers.values():
            cache.view(layer, layer.kv_cache, torch.zeros(0, 0, dtype=torch.int32))  # its view needs no requests

    def shape(self) -> ModelShape:
        """The model as this worker has it."""
        return model_shape(self.runner)

    def rows(self, batch: Iterable[Computed]) -> Iterable[Computed]:
        """Those of the requests that ask."""
        return batch

    def queries(self, call: Call) -> torch.Tensor:
        """As views of vLLM's own."""
        assert call.query is not None
        return _heads(call.layer, call.query)

    def meeting_keys(self, call: Call, rows: torch.Tensor) -> torch.Tensor:
        """MLA's queries take the step from keys to latents into themselves."""
        return cache.queries(call.layer, rows)

    def keys(self, call: Call) -> LayerView:
        """In vLLM's paged cache."""
        layer = call.layer
        metadata = self.metadata[call.name] if call.metadata is None else call.metadata
        kv_cache = layer.kv_cache if call.kv_cache is None else call.kv_cache
        return cache.view(layer, kv_cache, self._block_table(call.name, metadata))

    def output(self, call: Call) -> torch.Tensor | None:
        """As views of vLLM's own."""
        return None if call.output is None else _heads(call.layer, call.output)

    def without_tensors(self, call: Call) -> Call:
        """The layer alone."""
        return Call(call.name, call.layer)

    def _block_table(self, name: str, metadata: Any) -> torch.Tensor:
        """int32 [R, blocks] of a layer's cache: in its metadata, or, with some backends, only in the runner."""
        table: torch.Tensor | None = getattr(metadata, "block_table", None)
        if table is not None:
            return table
        runner = self.runner
        for number, groups in enumerate(runner.attn_groups):
            for group in groups:
                if name in group.layer_names:
                    if hasattr(runner, "block_tables"):  # V2
                        table = runner.block_tables.input_block_tables[number]
                    else:
                        table = runner.input_batch.block_table[number].get_device_tensor(runner.input_batch.num_reqs)
                    # before 0.32 the runner's table is the kernel's already
                    mapped: Callable[[Any], Any] = getattr(group, "map_to_kernel_block_table", lambda same: same)
                    return mapped(table)  # type: ignore[no-any-return]
        raise UnsupportedError(f"vLLM's runner has no block table of {name}")


def model_shape(runner: Any) -> ModelShape:
    """What a runner's model looks like; its cache need not be there yet. Raises UnsupportedError."""
    config = runner.vllm_config
    layers = {
        number: LayerShape(layer.impl.num_heads, _query_dim(layer))
        for number, (_, layer) in attention_layers(runner).items()
    }
    rows = config.scheduler_config.max_num_seqs * (1 + (config.num_speculative_tokens or 0))
    largest = config.compilation_config.max_cudagraph_capture_size
    return ModelShape(
        served_name(runner.model_config),
        layers,
        config.model_config.dtype,
        runner.device,
        graphs=config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
        graph_rows=min(rows, largest or rows),
        ranks=_ranks(runner),
        kv_heads=config.model_config.get_total_num_kv_heads(),
    )


def nothing_to_capture(model: Any) -> str | None:
    """Why a ModelConfig's model has nothing that could be asked for; None where it has."""
    if model.runner_type == "pooling":
        return "a pooling model generates no tokens"
    if getattr(model, "is_attention_free", False):
        return "the model has no attention layer"
    return None


def attention_layers(runner: Any) -> dict[int, tuple[str, Any]]:
    """Name and module of the runner's attention layers by their number in the model."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    found = {}
    own = {id(module) for module in runner.get_model().modules()}  # a draft model's layers have the same numbers
    for name, layer in runner.vllm_config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if not isinstance(layer, AttentionLayerBase) or id(layer) not in own or not hasattr(impl, "scale"):
            continue  # a state-space layer has no attention to report
        found[extract_layer_index(name)] = name, layer
    return dict(sorted(found.items()))


def _query_dim(layer: Any) -> int:
    return int(layer.qk_nope_head_dim + layer.qk_rope_head_dim if cache.is_mla(layer) else layer.head_size)


def _heads(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], layer.impl.num_heads, -1)


def _ranks(runner: Any) -> Ranks:
    """The groups that this worker's part of the model is in; made once, for each takes connections and threads."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    known: Ranks | None = runner.__dict__.get("_attnhook_ranks")
    if known is not None:
        return known
    parallel = runner.vllm_config.parallel_config
    for name, size in (
        ("decode context", getattr(parallel, "decode_context_parallel_size", 1)),
        ("prefill context", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if size > 1:
            raise UnsupportedError(
                f"vLLM with {name} parallelism over {size} ranks cannot be captured: each rank has a part of the keys "
                "only. Start without it, or without ATTNHOOK=1"
            )
    if parallel.use_ubatching:
        raise UnsupportedError(
            "vLLM with dual batch overlap cannot be captured: its halves run their attention apart. Start without "
            "--enable-dbo, or without ATTNHOOK=1"
        )
    ranks = Ranks.of(get_tp_group(), get_pp_group())
    objects["vllm"].note(runner, "_attnhook_ranks", ranks)
    return ranks

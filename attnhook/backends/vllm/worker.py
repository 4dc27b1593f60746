"""In vLLM's workers: which rows a pass computes, and each layer's queries and keys.

Hooks of both model runners; `attnhook.serving.step` does the rest. A pass in which nobody asks runs as it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch

from attnhook import __version__
from attnhook.backends.vllm import cache
from attnhook.backends.vllm.frontend import served_name
from attnhook.capture.ranks import Ranks
from attnhook.errors import UnsupportedError
from attnhook.options import graph_layers, resolve_layers
from attnhook.plugins.patching import objects
from attnhook.serving.graphs import KeptQueries
from attnhook.serving.step import Computed, Served, ServedStep, safely, warm_up
from attnhook.serving.wire import KEY

logger = logging.getLogger("attnhook")

Original = Callable[..., Any]


def salting(original: Original) -> Original:
    """``VllmConfig.compute_hash``: what a cache on disk keeps of a run with attnhook is used by no run without it."""

    @wraps(original)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        plain = original(self, *args, **kwargs)
        salted = f"{plain} attnhook {__version__} {graph_layers()}"
        return hashlib.sha256(salted.encode()).hexdigest()[: len(plain)]

    return compute_hash


class _Worker:
    """What is ours of one model runner."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.layers = _attention_layers(runner)
        for _, layer in self.layers.values():
            # a cache that cannot be read is refused now; its view needs no requests
            cache.view(layer, layer.kv_cache, torch.zeros(0, 0, dtype=torch.int32))
        heads = {number: layer.impl.num_heads for number, (_, layer) in self.layers.items()}
        self.served = Served(served_name(runner.model_config), heads, _ranks(runner))
        if not self.served.whole:
            raise UnsupportedError("vLLM's model has no attention layer that attnhook can capture")
        self.asks: dict[str, tuple[str, int]] = {}  # request -> packed options, position of its prompt's last token
        self.scheduled: Any = None  # of the pass that is about to run
        self.step: ServedStep | None = None
        self.sees: frozenset[int] = frozenset()  # layers that are wanted of the pass that runs
        self.shares: dict[str, dict[str, Any]] | None = None
        if "_attnhook_kept" not in runner.__dict__:  # the CPU's runner loads its model in a way of its own
            objects["vllm"].note(runner, "_attnhook_kept", _kept_queries(runner))
        self.kept: KeptQueries | None = runner._attnhook_kept
        if self.kept is not None:
            self.served.if_missing = (
                ": a CUDA graph ran them, where only queries of the layers that --attention-tokens-graph-layers names "
                "are kept"
            )

    def note(self, scheduled: Any) -> None:
        """Remember who asks; the engine's runners keep a request's options in different places, or not at all."""
        self.scheduled, self.step, self.shares = scheduled, None, None
        if self.kept is not None:
            self.kept.rest()
        for request in scheduled.finished_req_ids:
            self.asks.pop(request, None)
        self.served.forget(scheduled.finished_req_ids)
        for new in scheduled.scheduled_new_reqs:
            params = new.sampling_params
            packed = params.extra_args.get(KEY) if params is not None and params.extra_args else None
            if packed is not None:
                self.asks[new.req_id] = packed, _prompt_length(new) - 1

    def plan(self, device: torch.device, rows: Iterator[Computed]) -> None:
        """Start the capture of a pass that computes these rows."""
        self.step = ServedStep(self.served, device)
        try:
            for computed in rows:
                self.step.add(computed)
            if self.kept is not None:
                self.kept.aim(self.step.index)
        except Exception as error:
            self.step.give_up(error)
        self.sees = self.step.wanted

    def finish(self, metadata: Any) -> None:
        """After the pass, with its attention metadata by layer name: reduce what was taken."""
        step, self.step, self.sees = self.step, None, frozenset()
        if step is None:
            return
        if self.kept is not None:
            try:
                self._take_kept(step, self.kept, metadata)
            except Exception as error:
                step.give_up(error)
        self.shares = step.finish()

    def _take_kept(self, step: ServedStep, kept: KeptQueries, metadata: Any) -> None:
        """Layers whose attention ran inside a CUDA graph."""
        for number in step.missing:
            name, layer = self.layers[number]
            q = kept.get(number, len(step.index))
            if q is not None:
                table = self.block_table(name, metadata[name])
                step.take(number, cache.queries(layer, q), cache.view(layer, layer.kv_cache, table))

    def block_table(self, name: str, metadata: Any) -> torch.Tensor:
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


def _prompt_length(new: Any) -> int:
    """Tokens of a new request's prompt; ``NewRequestData`` tells them itself from vLLM 0.29 on."""
    known = getattr(new, "prompt_len", None)
    if known is not None:
        return int(known)
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    return len(new.prompt_embeds)


_current: _Worker | None = None  # whose pass runs now; a process runs one at a time


def _worker(runner: Any) -> _Worker | None:
    worker: _Worker | None = runner.__dict__.get("_attnhook")
    return worker


def initialising_cache(original: Original) -> Original:
    """``GPUModelRunner.initialize_kv_cache``: hook the layers, or refuse before the server takes requests."""

    @wraps(original)
    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, kv_cache_config, *args, **kwargs)
        # V2 runners before 0.29 take no such argument
        is_profiling = kwargs.get("is_profiling", args[0] if args else False)
        why_not = _nothing_to_capture(self.vllm_config.model_config)
        if why_not is not None:
            logger.warning("attnhook captures nothing here: %s", why_not)
        elif not is_profiling:
            from attnhook.backends.vllm import check_modules

            check_modules()
            worker = objects["vllm"].note(self, "_attnhook", _Worker(self))
            for number, (name, layer) in worker.layers.items():
                if "_attnhook" not in layer.__dict__:
                    objects["vllm"].note(layer, "_attnhook", True)
                    hook = _Observer(number, name, layer, worker.kept)
                    if cache.is_mla(layer):
                        objects["vllm"].wrap(layer, "forward_impl", hook.latent(layer.forward_impl))
                    else:
                        objects["vllm"].wrap(layer.impl, "forward", hook.plain(layer.impl.forward))
            warm_up()
        return result

    return initialize_kv_cache


def _nothing_to_capture(model: Any) -> str | None:
    """Why a ModelConfig's model has nothing that could be asked for; None where it has."""
    if model.runner_type == "pooling":
        return "a pooling model generates no tokens"
    if getattr(model, "is_attention_free", False):
        return "the model has no attention layer"
    return None


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


def loading(original: Original) -> Original:
    """``GPUModelRunner.load_model``: buffers for CUDA graphs count as the model's when the engine measures memory."""

    @wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if _nothing_to_capture(self.vllm_config.model_config) is None:
            objects["vllm"].note(self, "_attnhook_kept", _kept_queries(self))
        return result

    return load_model


def _kept_queries(runner: Any) -> KeptQueries | None:
    config = runner.vllm_config
    asked = graph_layers()
    if asked is None and not config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return None
    layers = {number: layer for number, (_, layer) in _attention_layers(runner).items()}
    whole = _ranks(runner).everywhere({number: 1 for number in layers})
    chosen = layers.keys() & set(resolve_layers(asked or "auto", list(whole), "ATTNHOOK_GRAPH_LAYERS"))
    shapes = {number: (layers[number].impl.num_heads, _query_dim(layers[number])) for number in chosen}
    rows = config.scheduler_config.max_num_seqs * (1 + (config.num_speculative_tokens or 0))
    largest = config.compilation_config.max_cudagraph_capture_size
    return KeptQueries(shapes, min(rows, largest or rows), config.model_config.dtype, runner.device)


def _query_dim(layer: Any) -> int:
    return int(layer.qk_nope_head_dim + layer.qk_rope_head_dim if cache.is_mla(layer) else layer.head_size)


def _attention_layers(runner: Any) -> dict[int, tuple[str, Any]]:
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


class _Observer:
    """Hands the captured rows of one layer over, right after the engine's own attention."""

    def __init__(self, number: int, name: str, layer: Any, kept: KeptQueries | None) -> None:
        self._number, self._name, self._layer, self._kept = number, name, layer, kept

    def plain(self, original: Original) -> Original:
        """Of an attention implementation's ``forward``; nothing is done in layers that nobody wants."""
        number, kept = self._number, self._kept

        @wraps(original)
        def forward(
            layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            output = original(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
            worker = _current
            if kept is not None or (worker is not None and number in worker.sees):
                self._see(query, kv_cache, attn_metadata, output)
            return output

        return forward

    def latent(self, original: Original) -> Original:
        """Of an MLA layer's ``forward_impl``."""
        number, kept = self._number, self._kept

        @wraps(original)
        def forward_impl(
            q: Any, k_c_normed: Any, k_pe: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            output = original(q, k_c_normed, k_pe, kv_cache, attn_metadata, *args, **kwargs)
            worker = _current
            if kept is not None or (worker is not None and number in worker.sees):
                self._see(q, kv_cache, attn_metadata, output)
            return output

        return forward_impl

    def _see(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        number, layer = self._number, self._layer
        if self._kept is not None and self._kept.records(number):
            self._kept.keep(number, self._heads(query))
            return
        worker = _current
        if worker is None or metadata is None:
            return
        step = worker.step
        if step is None or number not in step.wanted:
            return
        try:
            view = cache.view(layer, kv_cache, worker.block_table(self._name, metadata))
            # copies: the engine uses its buffers again
            q = cache.queries(layer, self._heads(query).index_select(0, step.index))
            step.take(
                number, q, view, self._heads(output).index_select(0, step.index) if step.needs_output(number) else None
            )
        except Exception as error:
            step.give_up(error)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], self._layer.impl.num_heads, -1)


def scheduled(original: Original) -> Original:
    """``GPUModelRunner.execute_model``: note what was scheduled; the pass itself is not told."""

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        worker = _worker(self)
        if worker is None:
            return original(self, scheduler_output, *args, **kwargs)
        safely(worker.note, scheduler_output)
        try:
            output = original(self, scheduler_output, *args, **kwargs)
        finally:
            _current = None
        if worker.step is not None:  # V2: the runner's own step, which only now is over
            state = getattr(self, "execute_model_state", None)
            safely(worker.finish, getattr(state, "attn_metadata", None))
        return output

    return execute_model


def capturing(original: Original) -> Original:
    """``GPUModelRunner._model_forward`` of V1: the pass itself, with its metadata in vLLM's forward context."""

    @wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        worker = _worker(self)
        if worker is None or worker.scheduled is None or not worker.asks:
            return original(self, *args, **kwargs)
        safely(worker.plan, self.device, _rows(self, worker, kwargs.get("positions")))
        _current = worker
        try:
            output = original(self, *args, **kwargs)
        finally:
            _current = None
        safely(worker.finish, _metadata())
        return output

    return _model_forward


def _metadata() -> Any:
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata


def preparing(original: Original) -> Original:
    """``GPUModelRunner.prepare_attn`` of V2, which runs for real batches only, right before their pass."""

    @wraps(original)
    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        tables = original(self, input_batch, *args, **kwargs)
        worker = _worker(self)
        if worker is not None and worker.scheduled is not None and worker.asks:
            safely(worker.plan, self.device, _rows_v2(self, worker, input_batch))
            _current = worker
        return tables

    return prepare_attn


def answering(original: Original) -> Original:
    """``GPUModelRunner.sample_tokens``: send the records along with the sampled tokens."""

    @wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        worker = _worker(self)
        shares = None if worker is None else worker.shares
        if not worker or not shares or output is None:
            return output
        worker.shares = None
        if hasattr(output, "get_output"):  # asynchronous: the output itself comes later
            later = output.get_output

            def get_output() -> Any:
                result = later()
                result.attnhook = shares
                return result

            output.get_output = get_output
        else:
            output.attnhook = shares
        return output

    return sample_tokens


def _rows(runner: Any, worker: _Worker, positions: torch.Tensor | None) -> Iterator[Computed]:
    """The asking requests' rows in a batch of V1."""
    scheduled, batch = worker.scheduled, runner.input_batch
    drafts = scheduled.scheduled_spec_decode_tokens
    asking = [(i, r) for i, r in enumerate(batch.req_ids) if r in worker.asks and r in scheduled.num_scheduled_tokens]
    starts = [int(runner.query_start_loc.np[i]) for i, _ in asking]
    firsts = [int(batch.num_computed_tokens_cpu[i]) for i, _ in asking]
    # the runner's own count runs ahead of the accepted tokens where drafts are verified asynchronously
    if positions is not None and positions.dim() == 1:
        if positions.device.type == "cpu":
            known = positions.numpy()
            firsts = [int(known[start]) for start in starts]
        elif runner.speculative_config:
            firsts = positions[torch.tensor(starts, device=positions.device, dtype=torch.int64)].tolist()
    for (i, request), start, first in zip(asking, starts, firsts, strict=True):
        packed, prompt_end = worker.asks[request]
        sampled = 0 if bool(runner.discard_request_mask.np[i]) else 1 + len(drafts.get(request, ()))
        count = scheduled.num_scheduled_tokens[request]
        yield Computed(request, packed, i, start, first, count, sampled, prompt_end)


def _rows_v2(runner: Any, worker: _Worker, batch: Any) -> Iterator[Computed]:
    """The asking requests' rows in a batch of V2."""
    asking = [(i, request) for i, request in enumerate(batch.req_ids) if request in worker.asks]
    starts = [int(batch.query_start_loc_np[i]) for i, _ in asking]
    firsts = [int(batch.num_computed_tokens_np[i]) for i, _ in asking]
    if runner.speculative_config is not None:  # as in V1
        firsts = batch.positions[torch.tensor(starts, device=batch.positions.device, dtype=torch.int64)].tolist()
    for (i, request), start, first in zip(asking, starts, firsts, strict=True):
        packed, prompt_end = worker.asks[request]
        count = int(batch.query_start_loc_np[i + 1]) - start
        drafts = 0 if batch.num_draft_tokens_per_req is None else int(batch.num_draft_tokens_per_req[i])
        sampled = 0 if first + count < int(batch.prefill_len_np[i]) else 1 + drafts
        yield Computed(request, packed, i, start, first, count, sampled, prompt_end)

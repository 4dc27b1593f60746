"""In vLLM's workers: queries of the captured rows, and their reduction after the forward pass.

Hooks of the V1 model runner. A pass in which nobody asks runs as it is; what goes wrong in ours is told to
the requests that asked and never reaches the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from attnhook.backends.rebuild import KEYS_THAT_TELL, check_output
from attnhook.backends.vllm import cache
from attnhook.backends.vllm.frontend import served_name
from attnhook.capture import Row, StepCapture, wants_row
from attnhook.errors import AttnhookError, UnsupportedError
from attnhook.kernels.topk import LayerRows
from attnhook.kernels.topk.cpu import gather
from attnhook.options import RequestOptions, check_heads, resolve_layers
from attnhook.serving.wire import KEY, Share, reason, unpack_options

logger = logging.getLogger("attnhook")

Original = Callable[..., Any]
T = TypeVar("T")


@dataclass
class _Group:
    """Rows of the requests that ask for the same, which are reduced together."""

    options: RequestOptions
    layers: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # each row's place in the batch's tokens


@dataclass
class _Taken:
    """What one layer leaves for the reduction."""

    q: torch.Tensor  # [U, Hq, D], a copy: the engine uses its buffer again
    view: cache.LayerView


class _Pass:
    """One forward pass in which somebody asks."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.groups: dict[str, _Group] = {}
        self.errors: dict[str, str] = {}
        self.taken: dict[int, _Taken] = {}
        self.index = torch.empty(0, dtype=torch.int64)
        self.wanted: frozenset[int] = frozenset()
        self.reply: dict[str, bool] = {}
        self.sampled: dict[str, list[int]] = {}  # request id -> positions of the rows that are sampled from

    def fail(self, error: Exception, requests: Iterable[str]) -> None:
        """Tell these requests why there are no records; the first reason stands."""
        known = isinstance(error, AttnhookError)
        logger.warning("attention capture failed in this step: %s", error, exc_info=not known)
        for request in requests:
            self.errors.setdefault(request, reason(error))

    def give_up(self, error: Exception) -> None:
        """Capture nothing more in this pass."""
        self.fail(error, self.sampled)
        self.groups.clear()
        self.wanted = frozenset()


def hooked_layers(runner: Any) -> dict[int, Any]:
    """The runner's causal attention layers by their number in the model."""
    return runner.__dict__.setdefault("_attnhook_layers", {})  # type: ignore[no-any-return]


_current: _Pass | None = None  # a worker runs one pass at a time


def initialising_cache(original: Original) -> Original:
    """``GPUModelRunner.initialize_kv_cache``: hook the layers, or refuse before the server takes requests."""

    @wraps(original)
    def initialize_kv_cache(self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> Any:
        result = original(self, kv_cache_config, is_profiling, **kwargs)
        if not is_profiling:
            _refuse_parallel(self.vllm_config)
            _hook_layers(self)
            _warm_up()
        return result

    return initialize_kv_cache


def refusing_runner(original: Original) -> Original:
    """``__init__`` of the V2 model runner, whose rows are not read yet: better no server than empty replies."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            "vLLM's model runner V2 cannot be captured yet: start with VLLM_USE_V2_MODEL_RUNNER=0, or without "
            "ATTNHOOK=1"
        )

    return __init__


def _refuse_parallel(config: Any) -> None:
    parallel = config.parallel_config
    for name, size, flag in (
        ("tensor", parallel.tensor_parallel_size, "--tensor-parallel-size 1"),
        ("pipeline", parallel.pipeline_parallel_size, "--pipeline-parallel-size 1"),
    ):
        if size > 1:
            raise UnsupportedError(
                f"vLLM with {name} parallelism over {size} ranks cannot be captured yet: each rank sees a part of the "
                f"model only. Start with {flag}, or without ATTNHOOK=1"
            )


def _hook_layers(runner: Any) -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    layers = hooked_layers(runner)
    context = runner.vllm_config.compilation_config.static_forward_context
    for name, layer in context.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        impl = getattr(layer, "impl", None)
        if impl is None or not hasattr(impl, "scale"):
            continue  # a state-space layer: no attention to report
        number = extract_layer_index(name)
        # a cache that cannot be read is refused now; its view needs no requests
        cache.view(layer, impl, layer.kv_cache, SimpleNamespace(block_table=torch.zeros(0, 0, dtype=torch.int32)))
        layers[number] = layer
        if "_attnhook" not in impl.__dict__:
            impl._attnhook = True
            impl.forward = _observed(impl.forward, number)
    if not layers:
        raise UnsupportedError("vLLM's model has no attention layer that attnhook can capture")


def _warm_up() -> None:
    """Compile the kernel before the first request needs it."""
    from attnhook.kernels.topk import PagedKeys, topk_attention

    keys = PagedKeys.from_dense(torch.zeros(1, 1, 64, 16))
    for rows in (1, 16):
        place = torch.arange(64 - rows, 64)
        topk_attention(torch.zeros(rows, 1, 16), keys, torch.zeros(rows, dtype=torch.int32), place, top_k=1, scale=1.0)


def _observed(original: Original, number: int) -> Original:
    """An attention implementation's ``forward`` that hands the captured rows over."""

    @wraps(original)
    def forward(
        layer: Any,
        query: torch.Tensor,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = original(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        step = _current
        if step is not None and number in step.wanted and attn_metadata is not None:
            try:
                _take(step, number, layer, query, kv_cache, attn_metadata, output)
            except Exception as error:
                step.give_up(error)
        return output

    return forward


def _take(
    step: _Pass, number: int, layer: Any, query: torch.Tensor, kv_cache: Any, metadata: Any, output: torch.Tensor
) -> None:
    view = cache.view(layer, layer.impl, kv_cache, metadata)
    heads, dim = layer.impl.num_heads, view.keys.cache.shape[-1]
    q = query.view(-1, heads, query.shape[-1] if query.dim() == 3 else dim)[step.index]
    step.taken[number] = _Taken(q, view)
    if not getattr(layer, "_attnhook_checked", False):
        _check(step, number, layer, q, view, output)


def _check(step: _Pass, number: int, layer: Any, q: torch.Tensor, view: cache.LayerView, output: torch.Tensor) -> None:
    """Rebuild the attention output of one row, the first time that a layer is captured."""
    group = next(iter(step.groups.values()))
    row, place = group.rows[-1], group.places[-1]
    at = int((step.index == place).nonzero()[0, 0])
    window = view.softmax["window"]
    low = 0 if window < 0 else max(0, row.position - window + 1)
    dims = (q.shape[-1], output.shape[-1] if output.dim() == 3 else q.shape[-1])
    k, v = (
        gather(paged.pages(dim), paged, row.source, low, row.position + 1).transpose(0, 1)
        for paged, dim in zip((view.keys, view.values), dims, strict=True)
    )
    softmax = {name: value for name, value in view.softmax.items() if name != "window"}
    out = output.view(-1, q.shape[1], dims[1])[place]
    error = check_output(f"vLLM, layer {number} ({type(layer.impl).__name__})", q[at], k, v, out, **softmax)
    if error is not None and row.position + 1 - low >= KEYS_THAT_TELL:
        layer._attnhook_checked = True


def scheduled(original: Original) -> Original:
    """``GPUModelRunner.execute_model``: remember what was scheduled; the pass itself is not told."""

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._attnhook_scheduled = scheduler_output
        return original(self, scheduler_output, *args, **kwargs)

    return execute_model


def capturing(original: Original) -> Original:
    """``GPUModelRunner._model_forward``: capture the rows of the requests that ask."""

    @wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        step = _safely(_plan, self, kwargs.get("positions"))
        if step is None:
            return original(self, *args, **kwargs)
        _current = step
        try:
            output = original(self, *args, **kwargs)
        finally:
            _current = None
        self._attnhook_shares = _safely(_finish, step)
        return output

    return _model_forward


def answering(original: Original) -> Original:
    """``GPUModelRunner.sample_tokens``: send the records along with the sampled tokens."""

    @wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        shares = self.__dict__.pop("_attnhook_shares", None)
        if not shares or output is None:
            return output
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


def _safely(function: Callable[..., T], *arguments: Any) -> T | None:
    """The result, or None: nothing of ours may end the engine. Who asked is told that no records came."""
    try:
        return function(*arguments)
    except Exception:
        logger.exception("attention capture failed in this step")
        return None


def _plan(runner: Any, positions: torch.Tensor | None) -> _Pass | None:
    """Which rows of this pass are captured; None where nobody asks."""
    scheduled = runner.__dict__.get("_attnhook_scheduled")
    if scheduled is None:
        return None
    seen = runner.__dict__.setdefault("_attnhook_prompt_rows", {})
    if seen:
        for request in scheduled.finished_req_ids:
            seen.pop(request, None)
    asking: list[tuple[int, str, str]] = []
    for i, request in enumerate(runner.input_batch.req_ids):
        params = runner.requests[request].sampling_params
        packed = params.extra_args.get(KEY) if params is not None and params.extra_args else None
        if packed is not None and request in scheduled.num_scheduled_tokens:
            asking.append((i, request, packed))
    if not asking:
        return None
    step = _Pass(runner)
    step.sampled = {request: [] for _, request, _ in asking}
    for i, request, packed in asking:
        try:
            _plan_request(step, i, request, packed, scheduled, positions)
        except Exception as error:
            step.fail(error, [request])
    places = [place for group in step.groups.values() for place in group.places]
    step.index = torch.tensor(places, dtype=torch.int64, device=runner.device)
    step.wanted = frozenset(layer for group in step.groups.values() for layer in group.layers)
    return step


def _plan_request(
    step: _Pass, i: int, request: str, packed: str, scheduled: Any, positions: torch.Tensor | None
) -> None:
    runner = step.runner
    options, step.reply[request] = unpack_options(packed)
    start, count = int(runner.query_start_loc.np[i]), scheduled.num_scheduled_tokens[request]
    first = int(runner.input_batch.num_computed_tokens_cpu[i])
    if positions is not None and positions.dim() == 1 and positions.device.type == "cpu":
        first = int(positions[start])  # exact, where the runner's own count runs ahead of the sampled tokens
    prompt_end = runner.requests[request].num_prompt_tokens - 1  # position whose row gives the first token
    drafts = len(scheduled.scheduled_spec_decode_tokens.get(request, ()))
    sampled = 0 if bool(runner.discard_request_mask.np[i]) else 1 + drafts
    rows: list[tuple[int, int | None]] = []  # offset among the request's rows, decode step
    if options.prompt:
        seen = runner._attnhook_prompt_rows
        known = max(seen.get(request, 0), first)
        rows += [(p - first, None) for p in range(known, min(first + count, prompt_end))]
        seen[request] = max(known, min(first + count, prompt_end))
    for offset in range(count - sampled, count):
        position = first + offset
        step.sampled[request].append(position)
        if wants_row(options, position - prompt_end):
            rows.append((offset, position - prompt_end))
    if not rows:
        return
    group = step.groups.get(packed)
    if group is None:
        layers = resolve_layers(options.layers, list(hooked_layers(runner)), "attention_layers")
        check_heads(options.heads, hooked_layers(runner)[layers[0]].impl.num_heads, "attention_heads")
        group = step.groups[packed] = _Group(options, layers)
    for offset, decode_step in rows:
        group.rows.append(Row(request, 0, first + offset, decode_step, i))
        group.places.append(start + offset)


def _finish(step: _Pass) -> dict[str, dict[str, Any]]:
    """The shares of all asking requests, packed."""
    shares = {request: Share() for request in step.sampled}
    start = 0
    for group in step.groups.values():
        stop = start + len(group.places)
        try:
            _reduce(step, group, slice(start, stop), shares)
        except Exception as error:
            requests = {row.request_id for row in group.rows}
            step.fail(error, requests)
            shares.update({request: Share() for request in requests})
        start = stop
    for request, why in step.errors.items():
        shares[request].error = why
    for request, share in shares.items():
        share.reply = step.reply.get(request, True)
    return {request: share.pack() for request, share in shares.items()}


def _reduce(step: _Pass, group: _Group, part: slice, shares: dict[str, Share]) -> None:
    missing = [layer for layer in group.layers if layer not in step.taken]
    if missing:
        raise UnsupportedError(f"layers {missing} made no attention call in this forward pass")
    capture = StepCapture(group.rows, group.layers, group.options, served_name(step.runner.model_config))
    slots = torch.tensor([row.position for row in group.rows], device=step.index.device)
    table = step.taken[group.layers[0]].view.keys.page_table
    shift = torch.zeros(table.shape[0], dtype=torch.int32, device=step.index.device)
    layers = [
        LayerRows(taken.q[part], taken.view.keys, slots, **taken.view.softmax)
        for taken in (step.taken[layer] for layer in group.layers)
    ]
    capture.add_layers(group.layers, layers, shift)
    bad: list[str] = []
    records = capture.records(lambda why, count, message: bad.append(f"{count} rows dropped: {message}"))
    rows: dict[tuple[str, int], bytes] = {}
    for record in records:
        data = record.to_bytes()
        if record.is_prompt:
            shares[record.request_id].prompt.append(data)
        else:
            rows[record.request_id, record.query_position] = data
    kept = {(record.request_id, record.query_position) for record in records}
    for row in group.rows:
        if (row.request_id, row.position) not in kept:
            step.errors.setdefault(row.request_id, "; ".join(bad))
    for request in {row.request_id for row in group.rows}:
        # one place per token that may be sampled; the empty ones were not wanted
        shares[request].generated = [rows.get((request, position), b"") for position in step.sampled[request]]

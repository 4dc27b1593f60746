"""In SGLang's schedulers: which rows a pass computes, and each layer's queries and keys.

`attnhook.serving.step` does the rest. A pass in which nobody asks runs as it is; one in which somebody does runs
without graphs, because Python does not run when a graph is replayed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from attnhook.backends.sglang import older, pool, refusals
from attnhook.errors import UnsupportedError
from attnhook.serving.ranks import Ranks
from attnhook.serving.step import Computed, Served, ServedStep, safely, warm_up
from attnhook.serving.wire import KEY, reason, unpack_options

logger = logging.getLogger("attnhook")

Original = Callable[..., Any]

_GRAPHS = ("decode_cuda_graph_runner", "prefill_cuda_graph_runner", "graph_runner", "piecewise_cuda_graph_runner")


@dataclass
class Asking:
    """What is ours of one request in a scheduler."""

    packed: str
    prompt: bool  # prompt rows too
    reply: bool  # false: for the sinks only
    prompt_end: int  # position of the prompt's last token
    # what waits for the next token
    prompt_rows: list[bytes] = field(default_factory=list)
    error: str | None = None


@dataclass
class Row:
    """The record of a row whose token was sampled in one pass."""

    position: int
    data: bytes  # empty where it was not wanted
    check: float | None
    # from another pipeline stage only: what waits for the token there
    prompt_rows: list[bytes] = field(default_factory=list)
    error: str | None = None


class _Worker:
    """What is ours of one scheduler process: it runs one model, one pass at a time."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.layers = _attention_layers(runner)
        name = str(getattr(runner.server_args, "served_model_name", None) or runner.server_args.model_path)
        heads = {number: layer.tp_q_head_num for number, layer in self.layers.items()}
        self.served = Served(name, heads, _ranks())
        if not self.served.whole:
            raise UnsupportedError("SGLang's model has no attention layer that attnhook can capture")
        self.reqs: list[Any] = []  # of the batch that is about to run
        self.step: ServedStep | None = None
        self.computed: dict[str, Computed] = {}
        self.slots: pool.Slots | None = None

    def plan(self, batch: Any) -> None:
        """Start the capture of a pass, where somebody asks; what goes wrong is told to all who do."""
        asking = [(i, req, ask) for i, req in enumerate(self.reqs) if (ask := asking_of(req)) is not None]
        if not asking or batch.forward_mode.is_idle():
            return
        # from here on this rank keeps in step with the others
        step = self.step = ServedStep(self.served, batch.req_pool_indices.device)
        self.computed = {}
        try:
            for (_, req, ask), computed in zip(asking, _rows(batch, asking), strict=True):
                self.computed[req.rid] = computed
                _note_gap(self.served, req, ask, computed.first)
                step.add(computed)
            places = torch.tensor([i for i, _, _ in asking], device=batch.req_pool_indices.device)
            longest = max(computed.first + computed.tokens for computed in self.computed.values())
            table = self.runner.req_to_token_pool.req_to_token[batch.req_pool_indices[places], :longest]
            self.slots = pool.Slots(self.runner.token_to_kv_pool, table.to(torch.int32))
        except Exception as error:
            for _, _, ask in asking:
                ask.error = ask.error or reason(error)
            step.give_up(error)

    def finish(self, output: Any) -> None:
        """After the pass: reduce what was taken, and leave the rows with the logits that the tokens come from."""
        step, self.step, self.slots = self.step, None, None
        if step is None:
            return
        shares = step.finish()
        rows: dict[str, Row] = {}
        for req in self.reqs:
            share, ask = shares.get(req.rid), asking_of(req)
            if share is None or ask is None:
                continue
            ask.prompt_rows += share["prompt"]
            ask.error = ask.error or share["error"]
            computed = self.computed.get(req.rid)
            if computed is not None and computed.sampled:
                data = share["generated"][-1] if share["generated"] else b""
                row = rows[req.rid] = Row(computed.first + computed.tokens - 1, data, share["check"])
                if self.served.ranks.stage_count > 1:
                    row.prompt_rows, row.error = ask.prompt_rows, ask.error
                    ask.prompt_rows, ask.error = [], None
        if rows:
            output.logits_output.attnhook = rows


_worker: _Worker | None = None


def answers() -> bool:
    """Whether this process sends its requests' tokens to the front end: the first rank of the first stage."""
    return _worker is not None and _worker.served.ranks.rank == 0 and _worker.served.ranks.stage == 0


def reasoning_parser() -> str | None:
    """Name of the server's reasoning parser, if it has one."""
    return None if _worker is None else getattr(_worker.runner.server_args, "reasoning_parser", None)


def asking_of(req: Any) -> Asking | None:
    """What a request asks for; None where it does not."""
    known: Asking | None = req.__dict__.get("_attnhook")
    if known is None:
        params = req.sampling_params.custom_params
        packed = params.get(KEY) if params else None
        # SGLang warms the cache for n > 1 with a request of no tokens, which nobody asked for
        if packed is None or req.sampling_params.max_new_tokens == 0:
            return None
        options, reply = unpack_options(packed)
        known = req._attnhook = Asking(packed, options.prompt, reply, len(req.origin_input_ids) - 1)
        if options.prompt and _worker is not None:
            _worker.served.forget([req.rid])
            weakref.finalize(req, _worker.served.forget, [req.rid]).atexit = False
    return known


def attending(original: Original) -> Original:
    """``ModelRunner.init_attention_backends``: hook the backend, or refuse before the server takes requests."""

    @wraps(original)
    def init_attention_backends(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _worker
        from attnhook.backends.sglang import WORKER, check_hooks

        result = original(self, *args, **kwargs)
        if not self.is_draft_worker and self.is_generation:
            check_hooks(WORKER)
            refusals.check(self.server_args)
            _worker = _Worker(self)
            for backend in _backends(self):
                if "_attnhook" not in backend.__dict__:
                    backend._attnhook = True
                    backend.forward = _observed(backend.forward, type(backend).__name__)
            warm_up()
        return result

    return init_attention_backends


def generating(original: Original) -> Original:
    """``TpModelWorker.forward_batch_generation``: note whose batch it is; the pass itself is not told."""

    @wraps(original)
    def forward_batch_generation(self: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
        worker = _worker
        if worker is None or batch is None or self.model_runner is not worker.runner:
            return original(self, batch, *args, **kwargs)
        worker.reqs = list(batch.reqs)
        try:
            return original(self, batch, *args, **kwargs)
        finally:
            worker.reqs = []

    return forward_batch_generation


def capturing(original: Original) -> Original:
    """``ModelRunner.forward``: capture the rows of the requests that ask."""

    @wraps(original)
    def forward(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        worker = _worker
        if worker is None or self is not worker.runner or not worker.reqs:
            return original(self, forward_batch, *args, **kwargs)
        safely(worker.plan, forward_batch)
        if worker.step is None:
            return original(self, forward_batch, *args, **kwargs)
        try:
            with _without_graphs(self):
                output = original(self, forward_batch, *args, **kwargs)
        except BaseException:
            worker.step = worker.slots = None
            raise
        safely(worker.finish, output)
        return output

    return forward


def recomputing(original: Original) -> Original:
    """``Req._compute_max_prefix_len``: a cached prompt row is not computed, so it could not be captured."""
    if getattr(original, "__name__", "") == "init_next_round_input":
        return older.matching(original, _reusable)

    @wraps(original)
    def _compute_max_prefix_len(self: Any, *args: Any, **kwargs: Any) -> Any:
        length, limit = original(self, *args, **kwargs), safely(_reusable, self)
        return length if limit is None else min(length, limit)

    return _compute_max_prefix_len


def _reusable(req: Any) -> int | None:
    """How many cached tokens a request may reuse; None for any number."""
    ask = asking_of(req)
    if ask is None or not ask.prompt or _worker is None:
        return None
    seen = _worker.served.prompt_rows.get(req.rid, 0)
    return None if seen >= ask.prompt_end else seen


def _note_gap(served: Served, req: Any, ask: Asking, first: int) -> None:
    """Say it where prompt rows were reused all the same, as in sessions, which keep their keys."""
    seen = served.prompt_rows.get(req.rid, 0)
    if ask.prompt and seen < min(first, ask.prompt_end):
        ask.error = ask.error or (
            f"attention_prompt: rows {seen} to {min(first, ask.prompt_end) - 1} of the prompt came from a cache and "
            "were not computed"
        )


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


def _attention_layers(runner: Any) -> dict[int, Any]:
    """The model's causal attention layers by their number; raises UnsupportedError."""
    from sglang.srt.layers.radix_attention import RadixAttention

    found: dict[int, Any] = {}
    for module in runner.model.modules():
        if isinstance(module, RadixAttention):
            if module.is_cross_attention:
                raise UnsupportedError("SGLang's model has cross-attention, whose keys lie among its own: not captured")
            if module.layer_id in found:
                raise UnsupportedError(f"the model has two attention layers of number {module.layer_id}")
            pool.check(runner.token_to_kv_pool, module)
            found[module.layer_id] = module
    return dict(sorted(found.items()))


def _ranks() -> Ranks:
    """The groups of SGLang that this worker's part of the model is in."""
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group

    return Ranks.of(get_tp_group(), get_pp_group())


def _backends(runner: Any) -> list[Any]:
    """The live attention backends, each once; wrappers such as the hybrid ones, not what is in them."""
    group = getattr(runner, "decode_attn_backend_group", None) or ()
    found = [runner.attn_backend, getattr(runner, "decode_attn_backend", None), *group]
    return list({id(backend): backend for backend in found if backend is not None}.values())


def _observed(original: Original, backend: str) -> Original:
    """An attention backend's ``forward`` that hands the captured rows over."""

    @wraps(original)
    def forward(q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(q, k, v, layer, forward_batch, *args, **kwargs)
        worker = _worker
        step = None if worker is None else worker.step
        if worker is not None and step is not None:
            try:
                # a draft model's layers have the same numbers
                if layer.layer_id in step.wanted and worker.layers[layer.layer_id] is layer:
                    _take(worker, step, layer, q, output, backend, kwargs)
            except Exception as error:
                step.give_up(error)
        return output

    return forward


def _take(
    worker: _Worker, step: ServedStep, layer: Any, q: torch.Tensor, output: Any, backend: str, extra: dict[str, Any]
) -> None:
    unknown = [name for name, value in extra.items() if value is not None and name != "sinks"]
    if unknown:
        raise UnsupportedError(f"layer {layer.layer_id}: attention with {', '.join(unknown)}, which attnhook ignores")
    if worker.slots is None:
        raise UnsupportedError(f"layer {layer.layer_id}: attention outside the pass that was planned")
    view = pool.view(worker.runner.token_to_kv_pool, layer, worker.slots, backend, extra.get("sinks"))
    out = output[0] if isinstance(output, tuple) else output
    heads, places = layer.tp_q_head_num, step.index
    # copies: the engine uses its buffers again
    rows = q.reshape(-1, heads, layer.qk_head_dim)[places]
    seen = out.reshape(-1, heads, layer.v_head_dim)[places] if step.needs_output(layer.layer_id) else None
    step.take(layer.layer_id, rows, view, seen)


@contextmanager
def _without_graphs(runner: Any) -> Iterator[None]:
    kept = {name: runner.__dict__[name] for name in _GRAPHS if runner.__dict__.get(name) is not None}
    for name in kept:
        setattr(runner, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(runner, name, value)

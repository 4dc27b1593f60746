"""In SGLang's schedulers: which rows a pass computes, and each layer's queries and keys.

`attnhook.serving.step` does the rest. A pass in which nobody asks runs as it is; one in which somebody does runs
without graphs, because Python does not run when a graph is replayed, unless it decodes and wants no other layers than
those whose queries the graphs themselves keep.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch

from attnhook.backends.sglang import older, pool, refusals
from attnhook.backends.sglang.layers import Attention, attention_layers, computing, live_backends
from attnhook.capture.ranks import Ranks
from attnhook.errors import UnsupportedError
from attnhook.options import graph_layers, resolve_layers
from attnhook.plugins.patching import objects
from attnhook.serving.graphs import KeptQueries
from attnhook.serving.step import Computed, Served, ServedStep, safely, warm_up
from attnhook.serving.wire import KEY, reason, unpack_options

logger = logging.getLogger("attnhook")

Original = Callable[..., Any]

_GRAPHS = ("decode_cuda_graph_runner", "prefill_cuda_graph_runner", "graph_runner", "piecewise_cuda_graph_runner")
_COLUMNS = 512  # positions by which the table of slots grows: the kernel prepares its jobs anew for another width
_KEPT_ROWS = 512  # most requests of one replay whose queries are kept; SGLang's own graphs go to 512 by default


@dataclass
class Asking:
    """What is ours of one request in a scheduler."""

    packed: str
    prompt: bool  # prompt rows too
    reply: bool  # false: for the sinks only
    prompt_end: int  # position of the prompt's last token
    mask_prefix: int
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


class _Call(NamedTuple):
    """One call of an attention backend."""

    module: Any
    q: torch.Tensor
    output: Any
    batch: Any
    backend: str
    decodes: bool
    extra: dict[str, Any]


class _Worker:
    """What is ours of one scheduler process: it runs one model, one pass at a time."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.layers = attention_layers(runner.model)
        for layer in self.layers.values():
            pool.check(runner.token_to_kv_pool, layer.module)
        name = str(getattr(runner.server_args, "served_model_name", None) or runner.server_args.model_path)
        heads = {number: layer.heads for number, layer in self.layers.items()}
        self.served = Served(name, heads, _ranks())
        if not self.served.whole:
            raise UnsupportedError("SGLang's model has no attention layer that attnhook can capture")
        self.reqs: list[Any] = []  # of the batch that is about to run
        self.step: ServedStep | None = None
        self.computed: dict[str, Computed] = {}
        self.slots: pool.Slots | None = None
        self.kept = self._kept_queries()
        self.graphed: dict[int, _Call] = {}  # the call of each layer that a graph has
        self.replays = False  # whether the pass may be a graph's

    def _kept_queries(self) -> KeptQueries | None:
        """Buffers that graphs write into; without a GPU only where layers are named, which is how they are tested."""
        asked, runner = graph_layers(), self.runner
        if asked is None and not str(runner.device).startswith("cuda"):
            return None
        chosen = resolve_layers(asked or "auto", list(self.served.whole), "ATTNHOOK_GRAPH_LAYERS")
        shapes = {number: self.layers[number].query_shape for number in chosen if number in self.layers}
        rows = min(_KEPT_ROWS, int(runner.req_to_token_pool.size))
        return KeptQueries(shapes, rows, runner.model_config.dtype, torch.device(runner.device))

    def sees(self) -> bool:
        """Whether an attention call now is of any interest."""
        return self.step is not None or self.kept is not None

    def see(self, call: _Call) -> None:
        """An attention call: what is wanted of it is taken, or becomes part of the graph that is being captured."""
        number, step, kept = call.module.layer_id, self.step, self.kept
        layer = self.layers.get(number)
        if layer is None or not layer.has(call.module):
            return
        if kept is not None and kept.records(number) and (step is None or self.replays):
            if call.module is layer.module and call.decodes:
                kept.keep(number, layer.queries(call.module, call.q, call.extra))
                self.graphed[number] = call._replace(q=call.q[:0], output=None, batch=None)
            return
        if step is None or number not in step.wanted:
            return
        # copies: the engine uses its buffers again
        rows = layer.queries(call.module, call.q, call.extra)[step.index]
        output = layer.output(call.module, call.output, call.batch) if step.needs_output(number) else None
        self._take(layer, call, rows, None if output is None else output[step.index])

    def _take(self, layer: Attention, call: _Call, rows: torch.Tensor, output: torch.Tensor | None) -> None:
        number = call.module.layer_id
        if self.slots is None or self.step is None:
            raise UnsupportedError(f"layer {number}: attention outside the pass that was planned")
        view = pool.view(
            self.runner.token_to_kv_pool, layer.module, self.slots, call.backend,
            decodes=call.decodes, sinks=call.extra.get("sinks"),
        )  # fmt: skip
        view = view._replace(value_heads=layer.value_heads(call.module))
        self.step.take(number, layer.for_pool(call.module, rows), view, output)

    def _take_kept(self, step: ServedStep, kept: KeptQueries) -> None:
        """Layers whose attention ran inside a graph."""
        for number in step.missing:
            rows = kept.get(number, len(step.index))
            if rows is not None and number in self.graphed:
                self._take(self.layers[number], self.graphed[number], rows, None)

    def rest(self) -> None:
        """Before every pass: nothing is wanted of a graph yet."""
        self.replays = False
        if self.kept is not None:
            self.kept.rest()

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
            longest = -(-longest // _COLUMNS) * _COLUMNS
            table = self.runner.req_to_token_pool.req_to_token[batch.req_pool_indices[places], :longest]
            self.slots = pool.Slots(self.runner.token_to_kv_pool, table.to(torch.int32))
            self._aim(step, batch)
        except Exception as error:
            for _, _, ask in asking:
                ask.error = ask.error or reason(error)
            step.give_up(error)

    def _aim(self, step: ServedStep, batch: Any) -> None:
        """Let graphs run the pass where they keep every query that is wanted."""
        if self.kept is None or not batch.forward_mode.is_decode() or step.self_checks:
            return
        graphed = {number for number in self.graphed if number in self.kept}  # a layer may have been dropped since
        if step.wanted and step.wanted <= graphed and len(step.index) <= self.kept.rows:
            self.kept.aim(step.index)
            self.replays = True

    def finish(self, output: Any) -> None:
        """After the pass: reduce what was taken, and leave the rows with the logits that the tokens come from."""
        step = self.step
        if step is None:
            return
        if self.kept is not None and self.replays:
            try:
                self._take_kept(step, self.kept)
            except Exception as error:
                step.give_up(error)
        self.step = self.slots = None
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
        known = req._attnhook = Asking(
            packed, options.prompt, reply, len(req.origin_input_ids) - 1, options.mask_prefix
        )
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
            for backend in live_backends(self):
                if "_attnhook" not in backend.__dict__:
                    objects["sglang"].note(backend, "_attnhook", True)
                    objects["sglang"].wrap(backend, "forward", _observed(backend.forward, backend))
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
        if worker is None or self is not worker.runner:
            return original(self, forward_batch, *args, **kwargs)
        safely(worker.rest)
        if worker.reqs:
            safely(worker.plan, forward_batch)
        if worker.step is None:
            return original(self, forward_batch, *args, **kwargs)
        try:
            with nullcontext() if worker.replays else _without_graphs(self):
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


def _ranks() -> Ranks:
    """The groups of SGLang that this worker's part of the model is in."""
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group

    return Ranks.of(get_tp_group(), get_pp_group())


def _observed(original: Original, backend: Any) -> Original:
    """An attention backend's ``forward`` that hands the captured rows over."""

    @wraps(original)
    def forward(q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(q, k, v, layer, forward_batch, *args, **kwargs)
        worker = _worker
        if worker is not None and worker.sees():
            try:
                decodes = forward_batch.forward_mode.is_decode()
                name = type(computing(backend, decodes)).__name__
                worker.see(_Call(layer, q, output, forward_batch, name, decodes, kwargs))
            except Exception as error:
                if worker.step is not None:
                    worker.step.give_up(error)
                elif worker.kept is not None:
                    worker.kept.drop(layer.layer_id, error)
        return output

    return forward


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

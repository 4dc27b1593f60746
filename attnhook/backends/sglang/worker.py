"""In SGLang's schedulers: when a pass runs, for whom, and what comes of it.

`adapter` reads the model and its batches, `attnhook.serving.worker` does the rest. A pass in which nobody asks runs as
it is; one in which somebody does runs without graphs, because Python does not run when a graph is replayed, unless it
decodes and wants no other layers than those whose queries the graphs themselves keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from attnhook.backends.sglang import older, refusals
from attnhook.backends.sglang.adapter import Call, Pass, SglangAdapter
from attnhook.backends.sglang.layers import computing, live_backends
from attnhook.backends.sglang.requests import Row, asking_of
from attnhook.capture.rows import prompt_ranges, wants_prompt
from attnhook.plugins.patching import objects
from attnhook.serving.guard import safely
from attnhook.serving.key_mass import PROMPT
from attnhook.serving.plan import Model
from attnhook.serving.reduction import warm_up
from attnhook.serving.wire import Share
from attnhook.serving.worker import Worker

Original = Callable[..., Any]

_GRAPHS = ("decode_cuda_graph_runner", "prefill_cuda_graph_runner", "graph_runner", "piecewise_cuda_graph_runner")


class _Scheduler:
    """What is ours of one scheduler process."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.adapter = SglangAdapter(runner)
        self.worker = Worker(self.adapter)
        self.reqs: list[Any] = []  # of the batch that is about to run

    def begin(self, batch: Any) -> None:
        """Start the capture of a pass, where somebody asks."""
        model = self.worker.model
        asking = [(i, req, ask) for i, req in enumerate(self.reqs) if (ask := asking_of(req, model)) is not None]
        if not asking or batch.forward_mode.is_idle():
            return
        self.worker.begin(Pass(batch, asking), [req.rid for _, req, _ in asking])

    def see(self, backend: Any, q: Any, output: Any, module: Any, batch: Any, extra: dict[str, Any]) -> None:
        """An attention call of a backend."""
        if self.adapter.has(module):
            decodes = batch.forward_mode.is_decode()
            name = type(computing(backend, decodes)).__name__
            self.worker.see(module.layer_id, Call(module, q, output, batch, name, decodes, extra))

    def finish(self, output: Any) -> None:
        """After the pass: leave the rows with the logits that the tokens come from."""
        shares = self.worker.finish()
        rows: dict[str, Row] = {}
        for req in self.reqs:
            packed, ask = shares.get(req.rid), asking_of(req, self.worker.model)
            if packed is None or ask is None:
                continue
            share = Share.unpack(packed)
            check, share.check = share.check, None  # which goes with its token
            ask.waiting.add(share)
            computed = self.adapter.computed.get(req.rid)
            if computed is not None and computed.sampled:
                data = share.generated[-1] if share.generated else b""
                row = rows[req.rid] = Row(computed.first + computed.tokens - 1, data, check)
                row.pieces = [piece for piece in share.pieces if piece["token"] != PROMPT]
                if self.worker.model.ranks.stage_count > 1:
                    waited = ask.waiting.take()
                    row.prompt_rows, row.error = waited.prompt, waited.error
                    row.pieces += waited.pieces
        if rows:
            output.logits_output.attnhook = rows


_scheduler: _Scheduler | None = None


def served() -> Model | None:
    """The model of this process; None where it runs none."""
    return None if _scheduler is None else _scheduler.worker.model


def answers() -> bool:
    """Whether this process sends its requests' tokens to the front end: the first rank of the first stage."""
    model = served()
    return model is not None and model.ranks.rank == 0 and model.ranks.stage == 0


def reasoning_parser() -> str | None:
    """Name of the server's reasoning parser, if it has one."""
    return None if _scheduler is None else getattr(_scheduler.runner.server_args, "reasoning_parser", None)


def wrap_init_attention_backends(original: Original) -> Original:
    """``ModelRunner.init_attention_backends``: watch the backend, or refuse before the server takes requests."""

    @wraps(original)
    def init_attention_backends(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _scheduler
        from attnhook.backends.sglang import HOOKS, WORKER

        result = original(self, *args, **kwargs)
        if not self.is_draft_worker and self.is_generation:
            HOOKS.check_in_place(WORKER)
            refusals.check(self.server_args)
            _scheduler = _Scheduler(self)
            for backend in live_backends(self):
                if "_attnhook" not in backend.__dict__:
                    objects["sglang"].note(backend, "_attnhook", True)
                    objects["sglang"].wrap(backend, "forward", _wrap_forward(backend.forward, backend))
            warm_up()
        return result

    return init_attention_backends


def wrap_forward_batch_generation(original: Original) -> Original:
    """``TpModelWorker.forward_batch_generation``: note whose batch it is; the pass itself is not told."""

    @wraps(original)
    def forward_batch_generation(self: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
        own = _scheduler
        if own is None or batch is None or self.model_runner is not own.runner:
            return original(self, batch, *args, **kwargs)
        own.reqs = list(batch.reqs)
        try:
            return original(self, batch, *args, **kwargs)
        finally:
            own.reqs = []

    return forward_batch_generation


def wrap_model_forward(original: Original) -> Original:
    """``ModelRunner.forward``: capture the rows of the requests that ask."""

    @wraps(original)
    def forward(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        own = _scheduler
        if own is None or self is not own.runner:
            return original(self, forward_batch, *args, **kwargs)
        worker = own.worker
        safely(worker.rest)
        if own.reqs:
            safely(own.begin, forward_batch)
        if worker.plan is None:
            return original(self, forward_batch, *args, **kwargs)
        try:
            with nullcontext() if worker.replays else _without_graphs(self):
                output = original(self, forward_batch, *args, **kwargs)
        except BaseException:
            worker.abandon()
            raise
        safely(own.finish, output)
        return output

    return forward


def _wrap_forward(original: Original, backend: Any) -> Original:
    """An attention backend's ``forward``, whose calls are handed over."""

    @wraps(original)
    def forward(q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(q, k, v, layer, forward_batch, *args, **kwargs)
        own = _scheduler
        if own is not None and own.worker.sees:
            safely(own.see, backend, q, output, layer, forward_batch, kwargs)
        return output

    return forward


def wrap_compute_max_prefix_len(original: Original) -> Original:
    """``Req._compute_max_prefix_len``: a cached prompt row is not computed, so it could not be captured."""
    if getattr(original, "__name__", "") == "init_next_round_input":
        return older.wrap_init_next_round_input(original, _reusable)

    @wraps(original)
    def _compute_max_prefix_len(self: Any, *args: Any, **kwargs: Any) -> Any:
        length, limit = original(self, *args, **kwargs), safely(_reusable, self)
        return length if limit is None else min(length, limit)

    return _compute_max_prefix_len


def _reusable(req: Any) -> int | None:
    """How many cached tokens a request may reuse; None for any number."""
    model = served()
    ask = asking_of(req, model)
    if ask is None or model is None or not wants_prompt(ask.options):
        return None
    # rows that are not wanted may come from the cache, up to the first that is
    to_come = prompt_ranges(ask.options, model.prompt_rows.get(req.rid, 0), ask.prompt_end)
    return to_come[0].start if to_come else None


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

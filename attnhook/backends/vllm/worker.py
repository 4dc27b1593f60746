"""In vLLM's workers, whatever the runner: the model is made ready, its layers are watched, its answers brought out.

`runner_v1` and `runner_v2` tell when a pass runs and which rows it computes; `adapter` reads the layers;
`attnhook.serving.worker` does the rest. A pass in which nobody asks runs as it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from attnhook import __version__
from attnhook.backends.vllm import cache
from attnhook.backends.vllm.adapter import Call, VllmAdapter, model_shape, nothing_to_capture
from attnhook.options import graph_layers
from attnhook.plugins.patching import objects
from attnhook.serving.guard import safely
from attnhook.serving.reduction import warm_up
from attnhook.serving.wire import KEY
from attnhook.serving.worker import Worker, keep_queries

logger = logging.getLogger("attnhook")

Original = Callable[..., Any]


class Runner:
    """What is ours of one of vLLM's model runners."""

    def __init__(self, runner: Any) -> None:
        self.adapter = VllmAdapter(runner)
        if "_attnhook_kept" not in runner.__dict__:  # the CPU's runner loads its model in a way of its own
            _keep_queries(runner)
        self.worker = Worker(self.adapter, runner._attnhook_kept)
        self.asks: dict[str, tuple[str, int]] = {}  # request -> packed options, position of its prompt's last token
        self.scheduled: Any = None  # of the pass that is about to run
        self.shares: dict[str, dict[str, Any]] | None = None

    def note(self, scheduled: Any) -> None:
        """Remember who asks; the engine's runners keep a request's options in different places, or not at all."""
        self.scheduled, self.shares = scheduled, None
        self.worker.rest()
        for request in scheduled.finished_req_ids:
            self.asks.pop(request, None)
        self.worker.forget(scheduled.finished_req_ids)
        for new in scheduled.scheduled_new_reqs:
            params = new.sampling_params
            packed = params.extra_args.get(KEY) if params is not None and params.extra_args else None
            if packed is not None:
                self.asks[new.req_id] = packed, prompt_length(new) - 1

    @property
    def asked(self) -> bool:
        """Whether the pass that is about to run may be of interest."""
        return self.scheduled is not None and bool(self.asks)

    def finish(self, metadata: Any) -> None:
        """After the pass, with its attention metadata by layer name."""
        self.adapter.metadata = metadata
        try:
            self.shares = self.worker.finish()
        finally:
            self.adapter.metadata = None


def prompt_length(new: Any) -> int:
    """Tokens of a new request's prompt; ``NewRequestData`` tells them itself from vLLM 0.29 on."""
    known = getattr(new, "prompt_len", None)
    if known is not None:
        return int(known)
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    return len(new.prompt_embeds)


_running: Runner | None = None  # whose pass runs now, where somebody asks; a process runs one at a time


def running(own: Runner | None) -> None:
    """A pass that may be of interest runs now; None: it is over."""
    global _running
    _running = own


def ours(runner: Any) -> Runner | None:
    """What is ours of a model runner; None of a draft model's, or where nothing can be captured."""
    known: Runner | None = runner.__dict__.get("_attnhook")
    return known


def wrap_compute_hash(original: Original) -> Original:
    """``VllmConfig.compute_hash``: what a cache on disk keeps of a run with attnhook is used by no run without it."""

    @wraps(original)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        plain = original(self, *args, **kwargs)
        salted = f"{plain} attnhook {__version__} {graph_layers()}"
        return hashlib.sha256(salted.encode()).hexdigest()[: len(plain)]

    return compute_hash


def wrap_load_model(original: Original) -> Original:
    """``GPUModelRunner.load_model``: buffers for CUDA graphs count as the model's when the engine measures memory."""

    @wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if nothing_to_capture(self.vllm_config.model_config) is None:
            _keep_queries(self)
        return result

    return load_model


def _keep_queries(runner: Any) -> None:
    shape = model_shape(runner)
    kept = keep_queries(shape, shape.ranks.everywhere({number: 1 for number in shape.layers}))
    objects["vllm"].note(runner, "_attnhook_kept", kept)


def wrap_initialize_kv_cache(original: Original) -> Original:
    """``GPUModelRunner.initialize_kv_cache``: watch the layers, or refuse before the server takes requests."""

    @wraps(original)
    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, kv_cache_config, *args, **kwargs)
        # V2 runners before 0.29 take no such argument
        is_profiling = kwargs.get("is_profiling", args[0] if args else False)
        why_not = nothing_to_capture(self.vllm_config.model_config)
        if why_not is not None:
            logger.warning("attnhook captures nothing here: %s", why_not)
        elif not is_profiling:
            from attnhook.backends.vllm import HOOKS

            HOOKS.check_modules()
            own = objects["vllm"].note(self, "_attnhook", Runner(self))
            for number, (name, layer) in own.adapter.layers.items():
                if "_attnhook" not in layer.__dict__:
                    objects["vllm"].note(layer, "_attnhook", True)
                    _watch(self, number, name, layer)
            warm_up()
        return result

    return initialize_kv_cache


def _watch(runner: Any, number: int, name: str, layer: Any) -> None:
    """Hand each attention call of a layer over, right after the engine's own attention."""
    if cache.is_mla(layer):
        objects["vllm"].wrap(layer, "forward_impl", _wrap_forward_impl(layer.forward_impl, runner, number, name, layer))
    else:
        objects["vllm"].wrap(layer.impl, "forward", _wrap_forward(layer.impl.forward, runner, number, name, layer))


def _wrap_forward(original: Original, runner: Any, number: int, name: str, module: Any) -> Original:
    """An attention implementation's ``forward``; every layer of every pass comes by, so it does little."""
    ours_of_runner = runner.__dict__
    kept = ours_of_runner["_attnhook"].worker.kept  # graphs are captured outside of any pass that we know of

    @wraps(original)
    def forward(
        layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        output = original(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        own = _running if kept is None else ours_of_runner.get("_attnhook")
        if own is not None and (kept is not None or number in own.worker.wanted):
            own.worker.see(number, Call(name, module, query, kv_cache, attn_metadata, output))
        return output

    return forward


def _wrap_forward_impl(original: Original, runner: Any, number: int, name: str, module: Any) -> Original:
    """An MLA layer's ``forward_impl``."""
    ours_of_runner = runner.__dict__
    kept = ours_of_runner["_attnhook"].worker.kept  # graphs are captured outside of any pass that we know of

    @wraps(original)
    def forward_impl(
        q: Any, k_c_normed: Any, k_pe: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        output = original(q, k_c_normed, k_pe, kv_cache, attn_metadata, *args, **kwargs)
        own = _running if kept is None else ours_of_runner.get("_attnhook")
        if own is not None and (kept is not None or number in own.worker.wanted):
            own.worker.see(number, Call(name, module, q, kv_cache, attn_metadata, output))
        return output

    return forward_impl


def wrap_execute_model(original: Original) -> Original:
    """``GPUModelRunner.execute_model``: note what was scheduled; the pass itself is not told.

    V1 has finished its pass in here, V2 ends the one that `runner_v2.wrap_prepare_attn` began only with this call.
    """

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        own = ours(self)
        if own is None:
            return original(self, scheduler_output, *args, **kwargs)
        safely(own.note, scheduler_output)
        try:
            output = original(self, scheduler_output, *args, **kwargs)
            if own.worker.plan is not None:
                state = getattr(self, "execute_model_state", None)
                safely(own.finish, getattr(state, "attn_metadata", None))
            return output
        finally:
            own.scheduled = None
            running(None)
            own.worker.abandon()

    return execute_model


def wrap_sample_tokens(original: Original) -> Original:
    """``GPUModelRunner.sample_tokens``: send the records along with the sampled tokens."""

    @wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        own = ours(self)
        shares = None if own is None else own.shares
        if own is None or not shares or output is None:
            return output
        own.shares = None
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

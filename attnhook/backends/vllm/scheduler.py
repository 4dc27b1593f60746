"""In vLLM's engine core: a step's records join the outputs of the tokens that were really accepted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

from attnhook.backends.vllm.stops import Stops
from attnhook.options import RequestOptions
from attnhook.plugins.patching import objects
from attnhook.record import tokens
from attnhook.record.tokens import Lookup
from attnhook.serving.guard import safely
from attnhook.serving.key_mass import PROMPT, Gathered
from attnhook.serving.waiting import Waiting, publish
from attnhook.serving.wire import KEY, Share, unpack_options
from attnhook.sinks import outlet

logger = logging.getLogger("attnhook")

_FLUSH_SECONDS = 5.0  # vLLM's front end waits about as long for its engine


class _Core:
    """What is ours of one scheduler."""

    def __init__(self) -> None:
        self.waiting: dict[str, Waiting] = {}
        self.masses: dict[str, Gathered] = {}  # of requests that ask for key mass
        self.stops = Stops()


def _core(scheduler: Any) -> _Core:
    known: _Core | None = scheduler.__dict__.get("_attnhook_core")
    return objects["vllm"].note(scheduler, "_attnhook_core", _Core()) if known is None else known


def wrap_update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.update_from_output``: put each request's share into its output."""

    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        shares = getattr(model_runner_output, "attnhook", None) or {}
        core = self.__dict__.get("_attnhook_core")
        if not shares and (core is None or not core.waiting):
            return original(self, scheduler_output, model_runner_output)
        core = core or _core(self)
        # taken now: the scheduler forgets a request when it ends
        requests = safely(_known, self, core, {*shares, *core.waiting}) or {}
        outputs = original(self, scheduler_output, model_runner_output)
        try:
            _forward(self, core, shares, outputs, requests)
        except Exception:
            logger.exception("attention records of this step are lost")
        return outputs

    return update_from_output


def wrap_shutdown(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.shutdown``: the process may be ended right after it, past Python's own end."""

    @wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        outlet.flush(_FLUSH_SECONDS)
        return original(self, *args, **kwargs)

    return shutdown


def _known(scheduler: Any, core: _Core, names: set[str]) -> dict[str, Any]:
    """The requests of these names; those with stop strings are followed from here on."""
    requests = {name: scheduler.requests[name] for name in names if name in scheduler.requests}
    core.stops.follow(scheduler, requests)
    return requests


def _forward(
    scheduler: Any,
    core: _Core,
    shares: dict[str, dict[str, Any]],
    outputs: dict[int, Any],
    requests: dict[str, Any],
) -> None:
    now: dict[str, Share] = {}
    for name, packed in shares.items():
        now[name] = Share.unpack(packed)
        core.waiting.setdefault(name, Waiting(reply=now[name].reply)).add(now[name])
    for client in outputs.values():
        for output in client.outputs:
            kept = core.waiting.pop(output.request_id, None)
            if kept is None:
                continue
            # of speculated tokens only those that were accepted, of stopped ones only those before the stop
            request = requests.get(output.request_id)
            rows = now[output.request_id].generated if output.request_id in now else []
            staying = core.stops.kept(output, request)
            share = kept.take(rows[:staying])
            if request is not None:
                _add_key_mass(core, output, request, share, now.get(output.request_id), staying)
            if share:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: share.pack()}
            _publish(share, request)
    core.stops.forget(scheduler.requests)
    for names in (core.waiting, core.masses):
        for name in [name for name in names if name not in scheduler.requests]:
            del names[name]


def _add_key_mass(core: _Core, output: Any, request: Any, share: Share, now: Share | None, staying: int) -> None:
    """Add what stays of a step to its request's key mass, which leaves with the last token."""
    options = _options(request.sampling_params.extra_args[KEY])
    if not options.key_mass:
        return
    name = output.request_id
    gathered = core.masses.get(name)
    if gathered is None:
        gathered = core.masses[name] = Gathered(options)
    gathered.add(share.pieces, staying)
    if now is not None:
        gathered.add([piece for piece in now.pieces if piece["token"] != PROMPT], staying)
    share.pieces = []
    if output.finish_reason is not None or core.stops.stopped(name):
        share.key_mass = gathered.leave()
        del core.masses[name]


def _publish(share: Share, request: Any) -> None:
    """To the sinks. The scheduler's requests hold prompt and accepted tokens by position, so chunked prompts, cached
    prefixes, preemptions and rejected drafts make no difference."""

    def token_at() -> Lookup | None:
        if request is None:
            return None
        # of a prompt that is embeddings, in part or whole, the ids are stand-ins
        hidden = request.num_prompt_tokens if request.prompt_embeds is not None else 0
        return tokens.sequence(request.all_token_ids, hidden=hidden)

    publish(share, token_at, lambda: _options(request.sampling_params.extra_args[KEY]).mask_prefix)


@lru_cache(maxsize=256)
def _options(packed: str) -> RequestOptions:
    return unpack_options(packed)[0]

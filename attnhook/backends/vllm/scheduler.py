"""In vLLM's engine core: a step's records join the outputs of the tokens that were really accepted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from attnhook.backends.vllm import tokens
from attnhook.backends.vllm.stops import Stops
from attnhook.plugins.patching import objects
from attnhook.record.token_record import TokenRecord
from attnhook.serving.step import safely
from attnhook.serving.wire import KEY, Share, worse
from attnhook.sinks import outlet

logger = logging.getLogger("attnhook")

_FLUSH_SECONDS = 5.0  # vLLM's front end waits about as long for its engine


def forwarding(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.update_from_output``: put each request's share into its output."""

    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        shares = getattr(model_runner_output, "attnhook", None) or {}
        waiting = self.__dict__.get("_attnhook_waiting") or {}
        if not shares and not waiting:
            return original(self, scheduler_output, model_runner_output)
        # taken now: the scheduler forgets a request when it ends
        requests = safely(_known, self, {*shares, *waiting}) or {}
        outputs = original(self, scheduler_output, model_runner_output)
        try:
            _forward(self, shares, outputs, requests)
        except Exception:
            logger.exception("attention records of this step are lost")
        return outputs

    return update_from_output


def flushing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.shutdown``: the process may be ended right after it, past Python's own end."""

    @wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        outlet.flush(_FLUSH_SECONDS)
        return original(self, *args, **kwargs)

    return shutdown


def _known(scheduler: Any, names: set[str]) -> dict[str, Any]:
    """The requests of these names; those with stop strings are followed from here on."""
    requests = {name: scheduler.requests[name] for name in names if name in scheduler.requests}
    _stops(scheduler).follow(scheduler, requests)
    return requests


def _stops(scheduler: Any) -> Stops:
    known: Stops | None = scheduler.__dict__.get("_attnhook_stops")
    return objects["vllm"].note(scheduler, "_attnhook_stops", Stops()) if known is None else known


def _forward(
    scheduler: Any, shares: dict[str, dict[str, Any]], outputs: dict[int, Any], requests: dict[str, Any]
) -> None:
    # a prompt that is computed in chunks has records before it has an output
    waiting: dict[str, Share] | None = scheduler.__dict__.get("_attnhook_waiting")
    if waiting is None:
        waiting = objects["vllm"].note(scheduler, "_attnhook_waiting", {})
    now: dict[str, list[bytes]] = {}
    for name, packed in shares.items():
        share = Share.unpack(packed)
        now[name], share.generated = share.generated, []
        kept = waiting.setdefault(name, Share(reply=share.reply))
        kept.prompt += share.prompt
        kept.error = kept.error or share.error
        kept.check = worse(kept.check, share.check)
    for client in outputs.values():
        for output in client.outputs:
            if output.request_id not in waiting:
                continue
            kept = waiting.pop(output.request_id)
            # of speculated tokens only those that were accepted, of stopped ones only those before the stop
            request = requests.get(output.request_id)
            accepted = now.get(output.request_id, [])[: _stops(scheduler).kept(output, request)]
            kept.generated = [row for row in accepted if row]
            if kept.reply and (kept.generated or kept.prompt or kept.error):
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: kept.pack()}
            if outlet.publishes():
                records = [TokenRecord.from_bytes(row) for row in (*kept.prompt, *kept.generated)]
                outlet.publish(tokens.fill(records, request) if outlet.publishes_tokens() else records)
    _stops(scheduler).forget(scheduler.requests)
    for name in [name for name in waiting if name not in scheduler.requests]:
        del waiting[name]

"""In vLLM's engine core: records of tokens inside a reasoning block are marked, for replies and sinks alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from attnhook.plugins.patching import objects
from attnhook.record.token_record import with_phase
from attnhook.serving.reasoning import Markers, PhaseFollower

logger = logging.getLogger("attnhook")

_UNKNOWN = object()


def marking(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.update_from_output``, inside `scheduler.forwarding`: what that sends on is marked already."""

    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        shares = getattr(model_runner_output, "attnhook", None)
        if not shares or _markers_of(self) is None:
            return original(self, scheduler_output, model_runner_output)
        # taken now: the scheduler forgets a request when it ends
        requests = {name: self.requests[name] for name in shares if name in self.requests}
        outputs = original(self, scheduler_output, model_runner_output)
        try:
            _mark(_markers_of(self), shares, requests, outputs)
        except Exception:
            logger.exception("think_phase of this step's records is not known: they say output")
        return outputs

    return update_from_output


def _mark(markers: Any, shares: dict[str, dict[str, Any]], requests: dict[str, Any], outputs: dict[int, Any]) -> None:
    for client in outputs.values():
        for output in client.outputs:
            request = requests.get(output.request_id)
            if request is None or not output.new_token_ids:
                continue
            tokens, new = request.all_token_ids, len(output.new_token_ids)
            kept = request.__dict__.get("_attnhook_phases")
            if kept is None:
                kept = (PhaseFollower(markers, tokens[: request.num_prompt_tokens]), request.num_prompt_tokens)
            follower, done = kept
            # from where it stopped: a step whose capture failed has brought no share
            phases = follower.follow(tokens[done:])[-new:]
            request.__dict__["_attnhook_phases"] = follower, len(tokens)
            rows = shares[output.request_id]["generated"]
            for i, (row, phase) in enumerate(zip(rows, phases, strict=False)):  # rows of refused drafts are left over
                if row and phase != "output":
                    rows[i] = with_phase(row, phase)


def _markers_of(scheduler: Any) -> Markers | None:
    known = scheduler.__dict__.get("_attnhook_markers", _UNKNOWN)
    if known is _UNKNOWN:
        try:
            known = find_markers(scheduler.vllm_config)
        except Exception as error:  # parsers raise anything for a tokenizer that they do not know
            logger.warning("the reasoning parser tells no markers (%s): think_phase is always output", error)
            known = None
        objects["vllm"].note(scheduler, "_attnhook_markers", known)
    return known  # type: ignore[no-any-return]


def find_markers(config: Any) -> Markers | None:
    """The markers of a VllmConfig's reasoning parser; None without a parser, or where it has none."""
    found = getattr(config, "reasoning_config", None)
    if found is not None and found.enabled:
        return Markers(tuple(found.reasoning_start_token_ids), tuple(found.natural_reasoning_end_token_ids))
    name = config.structured_outputs_config.reasoning_parser
    if not name or config.model_config.skip_tokenizer_init:
        return None
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    # a parser of models that think on request only names its markers when they do
    on = {"thinking": True, "enable_thinking": True}
    tokenizer = cached_tokenizer_from_config(model_config=config.model_config)
    parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer, chat_template_kwargs=on)
    texts = (parser.reasoning_start_str, parser.reasoning_end_str)
    if not all(texts):
        logger.warning("vLLM's reasoning parser %s names no markers: think_phase is always output", name)
        return None
    start, end = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return Markers(start, end)

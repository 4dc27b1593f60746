"""In vLLM's engine core: records of tokens inside a reasoning block are marked, for replies and sinks alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from attnhook.plugins.patching import objects
from attnhook.serving.reasoning import Markers, Phases, find_markers, mark_phases

logger = logging.getLogger("attnhook")

_UNKNOWN = object()


def wrap_update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.update_from_output``, inside that of `scheduler`: what it sends on is marked already."""

    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        shares = getattr(model_runner_output, "attnhook", None)
        markers = _markers_of(self) if shares else None
        if not shares or markers is None:
            return original(self, scheduler_output, model_runner_output)
        # taken now: the scheduler forgets a request when it ends
        requests = {name: self.requests[name] for name in shares if name in self.requests}
        outputs = original(self, scheduler_output, model_runner_output)
        try:
            _mark(markers, shares, requests, outputs)
        except Exception:
            logger.exception("think_phase of this step's records is not known: they say output")
        return outputs

    return update_from_output


def _mark(
    markers: Markers, shares: dict[str, dict[str, Any]], requests: dict[str, Any], outputs: dict[int, Any]
) -> None:
    for client in outputs.values():
        for output in client.outputs:
            request = requests.get(output.request_id)
            if request is None or not output.new_token_ids:
                continue
            tokens, prompt = request.all_token_ids, request.num_prompt_tokens
            phases: Phases | None = request.__dict__.get("_attnhook_phases")
            if phases is None:
                phases = request.__dict__["_attnhook_phases"] = Phases(markers, tokens[:prompt])
            share = shares[output.request_id]
            found = phases.of_last(tokens, len(output.new_token_ids), start=prompt)
            share["generated"] = mark_phases(share["generated"], found)  # rows of refused drafts are left over


def _markers_of(scheduler: Any) -> Markers | None:
    known = scheduler.__dict__.get("_attnhook_markers", _UNKNOWN)
    if known is _UNKNOWN:
        config = scheduler.vllm_config
        known = find_markers(lambda: markers_of(config), config.structured_outputs_config.reasoning_parser)
        objects["vllm"].note(scheduler, "_attnhook_markers", known)
    return known  # type: ignore[no-any-return]


def markers_of(config: Any) -> Markers | None:
    """The markers of a VllmConfig's reasoning parser; None without a parser. Raises what parsers raise."""
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
        return None
    start, end = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return Markers(start, end)

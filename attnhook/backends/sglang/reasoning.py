"""In SGLang's schedulers: which of a request's tokens are inside a reasoning block."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from attnhook.record.token_record import ThinkPhase
from attnhook.serving.reasoning import Markers, PhaseFollower

logger = logging.getLogger("attnhook")


def phase_of_last(req: Any, parser: str | None) -> ThinkPhase:
    """Phase of the token that a request got last; "output" where no reasoning parser tells its markers."""
    if not parser or req.tokenizer is None:
        return "output"
    kept = req.__dict__.get("_attnhook_phases")
    if kept is None:
        markers = _markers(parser, req.tokenizer)
        kept = (PhaseFollower(markers, list(req.origin_input_ids)) if markers else None, 0)
    follower, done = kept
    if follower is None:
        req._attnhook_phases = kept
        return "output"
    phases: list[ThinkPhase] = follower.follow(list(req.output_ids[done:]))
    req._attnhook_phases = follower, len(req.output_ids)
    return phases[-1] if phases else "output"


@cache
def _markers(parser: str, tokenizer: Any) -> Markers | None:
    """Token ids of the texts between which SGLang's parser finds reasoning."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    try:
        detector = ReasoningParser(parser, stream_reasoning=False).detector
        texts = (detector.think_start_token, detector.think_end_token)
        start, end = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        return Markers(start, end)
    except Exception as error:  # parsers raise anything for a tokenizer that they do not know
        logger.warning("the reasoning parser %s tells no markers (%s): think_phase is always output", parser, error)
        return None

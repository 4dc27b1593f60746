"""In SGLang's schedulers: which of a request's tokens are inside a reasoning block."""

from __future__ import annotations

from functools import cache
from typing import Any

from attnhook.record.row import ThinkPhase
from attnhook.serving.reasoning import Markers, Phases, find_markers


def phase_of_last(req: Any, parser: str | None) -> ThinkPhase:
    """Phase of the token that a request got last; "output" where no reasoning parser tells its markers."""
    if not parser or req.tokenizer is None:
        return "output"
    markers = _markers(parser, req.tokenizer)
    if markers is None:
        return "output"
    phases: Phases | None = req.__dict__.get("_attnhook_phases")
    if phases is None:
        phases = req._attnhook_phases = Phases(markers, list(req.origin_input_ids))
    return phases.of_last(req.output_ids, 1)[-1]


@cache
def _markers(parser: str, tokenizer: Any) -> Markers | None:
    """Token ids of the texts between which SGLang's parser finds reasoning."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    def find() -> Markers:
        detector = ReasoningParser(parser, stream_reasoning=False).detector
        texts = (detector.think_start_token, detector.think_end_token)
        start, end = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        return Markers(start, end)

    return find_markers(find, parser)

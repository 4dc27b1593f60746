"""In SGLang's schedulers: a row's record joins the token that was sampled from it, on its way to the front end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from attnhook.backends.sglang.reasoning import phase_of_last
from attnhook.backends.sglang.worker import Asking, Row, answers, asking_of, reasoning_parser
from attnhook.record import tokens
from attnhook.record.token_record import TokenRecord, with_phase
from attnhook.serving.step import safely
from attnhook.serving.wire import KEY, Share
from attnhook.sinks import outlet

logger = logging.getLogger("attnhook")

NOTHING_TAKEN = "no attention was captured in this step; the server's log may say why"


def collecting(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SchedulerBatchResultProcessor._maybe_collect_customized_info``, called once a token was accepted."""

    @wraps(original)
    def collect(self: Any, i: int, req: Any, logits_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, i, req, logits_output, *args, **kwargs)
        safely(_collect, req, logits_output)
        return result

    return collect


def _collect(req: Any, logits: Any) -> None:
    ask = asking_of(req)
    if ask is None or not answers():
        return
    rows: dict[str, Row] = getattr(logits, "attnhook", None) or {}
    token = len(req.output_ids) - 1
    share = _share(ask, rows.get(req.rid), token)
    if share.generated and (phase := phase_of_last(req, reasoning_parser())) != "output":
        share.generated = [with_phase(row, phase) for row in share.generated]
    if ask.reply:
        # SGLang sends one element per token along with the tokens, and slices them as it does the tokens
        if req.customized_info is None:
            req.customized_info = {}
        elements = req.customized_info.setdefault(KEY, [])
        elements += [None] * (token - len(elements))
        elements.append(share.pack() if share.generated or share.prompt or share.error else None)
    if outlet.publishes():
        records = [TokenRecord.from_bytes(row) for row in (*share.prompt, *share.generated)]
        outlet.publish(_with_tokens(records, req, ask) if outlet.publishes_tokens() else records)


def _with_tokens(records: list[TokenRecord], req: Any, ask: Asking) -> list[TokenRecord]:
    """The request holds prompt and accepted tokens by position, however its passes were scheduled."""
    prompt = req.origin_input_ids
    hidden = len(prompt) if getattr(req, "input_embeds", None) is not None else 0
    vocabulary = getattr(req, "vocab_size", None) or 2**31  # stand-ins of images lie above it
    token_at = tokens.sequence(prompt, req.output_ids, hidden=hidden, vocabulary=vocabulary)
    return tokens.fill(records, token_at, ask.mask_prefix)


def _share(ask: Asking, row: Row | None, token: int) -> Share:
    """What goes with one token; what waited for it waits no more."""
    share = Share(prompt=ask.prompt_rows, error=ask.error)
    ask.prompt_rows, ask.error = [], None
    if row is not None:
        share.prompt, share.error = share.prompt + row.prompt_rows, share.error or row.error
    if row is None:
        share.error = share.error or NOTHING_TAKEN
    elif row.position - ask.prompt_end != token:
        share.error = share.error or f"the row at position {row.position} is not that of token {token}"
    else:
        share.check = row.check
        share.generated = [row.data] if row.data else []
    return share

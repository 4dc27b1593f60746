"""In SGLang's schedulers: a row's record joins the token that was sampled from it, on its way to the front end."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from attnhook.backends.sglang.reasoning import phase_of_last
from attnhook.backends.sglang.requests import Asking, Row, asking_of
from attnhook.backends.sglang.worker import answers, reasoning_parser, served
from attnhook.record import tokens
from attnhook.record.tokens import Lookup
from attnhook.serving.guard import safely
from attnhook.serving.reasoning import mark_phases
from attnhook.serving.waiting import publish
from attnhook.serving.wire import KEY, Share

NOTHING_TAKEN = "no attention was captured in this step; the server's log may say why"


def wrap_maybe_collect_customized_info(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SchedulerBatchResultProcessor._maybe_collect_customized_info``, called once a token was accepted."""

    @wraps(original)
    def collect(self: Any, i: int, req: Any, logits_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, i, req, logits_output, *args, **kwargs)
        safely(_collect, req, logits_output)
        return result

    return collect


def _collect(req: Any, logits: Any) -> None:
    ask = asking_of(req, served())
    if ask is None or not answers():
        return
    rows: dict[str, Row] = getattr(logits, "attnhook", None) or {}
    token = len(req.output_ids) - 1
    share = _share(ask, rows.get(req.rid), token)
    if ask.gathered is not None:
        ask.gathered.add(share.pieces, tokens=1)
        share.pieces = []
        if req.finished():
            share.key_mass = ask.gathered.leave()
    if share.generated:
        share.generated = mark_phases(share.generated, [phase_of_last(req, reasoning_parser())])
    if share.reply:
        # SGLang sends one element per token along with the tokens, and slices them as it does the tokens
        if req.customized_info is None:
            req.customized_info = {}
        elements = req.customized_info.setdefault(KEY, [])
        elements += [None] * (token - len(elements))
        elements.append(share.pack() if share else None)
    publish(share, lambda: _token_at(req), lambda: ask.options.mask_prefix)


def _token_at(req: Any) -> Lookup:
    """The request holds prompt and accepted tokens by position, however its passes were scheduled."""
    prompt = req.origin_input_ids
    hidden = len(prompt) if getattr(req, "input_embeds", None) is not None else 0
    vocabulary = getattr(req, "vocab_size", None) or 2**31  # stand-ins of images lie above it
    return tokens.sequence(prompt, req.output_ids, hidden=hidden, vocabulary=vocabulary)


def _share(ask: Asking, row: Row | None, token: int) -> Share:
    """What goes with one token; what waited for it waits no more."""
    waiting = ask.waiting
    if row is None:
        waiting.add(Share(error=NOTHING_TAKEN))
        return waiting.take()
    strange = row.position - ask.prompt_end != token
    error = f"the row at position {row.position} is not that of token {token}" if strange else None
    waiting.add(Share(prompt=row.prompt_rows, error=row.error or error, check=None if strange else row.check))
    share = waiting.take([] if strange else [row.data])
    share.pieces += row.pieces
    return share

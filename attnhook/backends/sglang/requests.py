"""In SGLang's schedulers: what is ours of one request, and of the row whose token was sampled in one pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from attnhook.capture.rows import wants_prompt
from attnhook.options import RequestOptions
from attnhook.serving.key_mass import Gathered, Piece
from attnhook.serving.plan import Model
from attnhook.serving.waiting import Waiting
from attnhook.serving.wire import KEY, unpack_options


@dataclass
class Asking:
    """A request that asks."""

    packed: str
    options: RequestOptions
    prompt_end: int  # position of the prompt's last token
    waiting: Waiting
    gathered: Gathered | None = None  # where the options ask for key mass


@dataclass
class Row:
    """The record of a row whose token was sampled in one pass."""

    position: int
    data: bytes  # empty where it was not wanted
    check: float | None
    # from another pipeline stage only: what waits for the token there
    prompt_rows: list[bytes] = field(default_factory=list)
    error: str | None = None
    pieces: list[Piece] = field(default_factory=list)  # for the key mass: of this row; from another stage of all


def asking_of(req: Any, model: Model | None) -> Asking | None:
    """What a request asks for; None where it does not. ``model`` keeps count of its prompt rows."""
    known: Asking | None = req.__dict__.get("_attnhook")
    if known is None:
        params = req.sampling_params.custom_params
        packed = params.get(KEY) if params else None
        # SGLang warms the cache for n > 1 with a request of no tokens, which nobody asked for
        if packed is None or req.sampling_params.max_new_tokens == 0:
            return None
        options, reply = unpack_options(packed)
        known = req._attnhook = Asking(
            packed,
            options,
            len(req.origin_input_ids) - 1,
            Waiting(reply),
            Gathered(options) if options.key_mass else None,
        )
        if wants_prompt(options) and model is not None:
            model.forget([req.rid])
            weakref.finalize(req, model.forget, [req.rid]).atexit = False
    return known

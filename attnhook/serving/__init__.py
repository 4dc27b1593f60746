"""The engine kit: what a server engine's adapter is built from; knows no engine.

In a worker: an `EngineAdapter` (of `attnhook.plugins`) tells `Worker` of the passes, which gives each request's
`Share`. Where tokens are accepted: `Waiting`, `Gathered`, `publish`. In the front end: `FrontEnd` admits and measures
requests, `Attention` and `Stream` put records into replies, `RouteGuard` carries them. These names are stable, with
version ``adapter`` of `attnhook.plugins.CONTRACTS`; docs/plugins.md builds a server's plugin from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnhook.plugins import exports

if TYPE_CHECKING:
    from attnhook.record.tokens import sequence as token_lookup
    from attnhook.serving.account import ChoiceAccount
    from attnhook.serving.flags import add_flags
    from attnhook.serving.frontend import FrontEnd, ServedModel
    from attnhook.serving.gate import LeavingStream, Place
    from attnhook.serving.guard import safely
    from attnhook.serving.key_mass import Gathered
    from attnhook.serving.policy import Policy
    from attnhook.serving.reasoning import Markers, Phases, find_markers, mark_phases
    from attnhook.serving.reduction import warm_up
    from attnhook.serving.refusal import Refusal
    from attnhook.serving.replies import Attention, Stream
    from attnhook.serving.routes import RouteGuard
    from attnhook.serving.waiting import Waiting, publish
    from attnhook.serving.wire import ASK, KEY, Share, foreign, pack_options, unpack_options
    from attnhook.serving.worker import Worker

__all__ = [
    "ASK",
    "KEY",
    "Attention",
    "ChoiceAccount",
    "FrontEnd",
    "Gathered",
    "LeavingStream",
    "Markers",
    "Phases",
    "Place",
    "Policy",
    "Refusal",
    "RouteGuard",
    "ServedModel",
    "Share",
    "Stream",
    "Waiting",
    "Worker",
    "add_flags",
    "find_markers",
    "foreign",
    "mark_phases",
    "pack_options",
    "publish",
    "safely",
    "token_lookup",
    "unpack_options",
    "warm_up",
]

_HOMES = {
    # the workers
    "Worker": "serving.worker",
    "warm_up": "serving.reduction",
    "safely": "serving.guard",
    **dict.fromkeys(("KEY", "Share", "pack_options", "unpack_options"), "serving.wire"),
    # where tokens are accepted
    **dict.fromkeys(("Waiting", "publish"), "serving.waiting"),
    "Gathered": "serving.key_mass",
    "token_lookup": "record.tokens:sequence",
    **dict.fromkeys(("Markers", "Phases", "find_markers", "mark_phases"), "serving.reasoning"),
    # the front end
    **dict.fromkeys(("FrontEnd", "ServedModel"), "serving.frontend"),
    **dict.fromkeys(("ASK", "foreign"), "serving.wire"),
    **dict.fromkeys(("LeavingStream", "Place"), "serving.gate"),
    "Refusal": "serving.refusal",
    "ChoiceAccount": "serving.account",
    **dict.fromkeys(("Attention", "Stream"), "serving.replies"),
    "RouteGuard": "serving.routes",
    "Policy": "serving.policy",
    "add_flags": "serving.flags",
}

if not TYPE_CHECKING:  # a type checker is to know each name, and that there are no others
    __getattr__ = exports.names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

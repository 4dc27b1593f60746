"""Where requests come in and tokens are accepted: what a request asks for, and what has been captured for it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving import (
    KEY,
    ChoiceAccount,
    FrontEnd,
    Place,
    ServedModel,
    Share,
    Waiting,
    pack_options,
    publish,
    safely,
    token_lookup,
)

#: Set when the server's application is made.
served = ServedModel("")


def version() -> str | None:
    """Of tinyserve."""
    from tinyserve_attnhook import TinyserveBackend

    return TinyserveBackend().version()


front_end = FrontEnd("tinyserve", version, lambda: served, ("/v1/completions",))


@dataclass
class Ticket:
    """What a route has admitted, on its way to `Engine.submit`, which may refuse it all the same."""

    options: RequestOptions
    place: Place
    error: OptionError | None = None


ticket: ContextVar[Ticket | None] = ContextVar("tinyserve_attnhook", default=None)


@dataclass
class Asking:
    """A request that asks."""

    options: RequestOptions
    reply: bool  # false: for the sinks only
    account: ChoiceAccount
    waiting: Waiting = field(default_factory=Waiting)
    rows: list[bytes] = field(default_factory=list)  # of the token that is about to be accepted
    sent: int = 0  # tokens that replies have brought


_asking: WeakValueDictionary[str, Asking] = WeakValueDictionary()  # by request; each hangs on its request


def wrap_submit(original: Callable[..., None]) -> Callable[..., None]:
    """``Engine.submit``: check what only the tokenized prompt shows, and mark the request for all ranks."""

    @wraps(original)
    def submit(self: Any, request: Any) -> None:
        asked = ticket.get()
        if asked is not None:
            options = asked.options
            try:
                front_end.measure(options, asked.place, len(request.prompt), request.max_tokens, 1)
            except OptionError as error:
                asked.error = error  # a ValueError, which tinyserve takes for its own
                raise
        elif (everything := front_end.everything()) is None:
            return original(self, request)
        else:
            options = everything
        reply = asked is not None
        request.extra[KEY] = str(pack_options(options, reply=reply))
        request.attnhook = _asking[request.id] = Asking(options, reply, ChoiceAccount(options, len(request.prompt)))
        return original(self, request)

    return submit


def arrived(request: str, share: Share) -> None:
    """What a pass has captured of a request, on the rank that answers."""
    asking = _asking.get(request)
    if asking is not None:
        asking.waiting.add(share)
        asking.rows = share.generated


def wrap_accept(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Engine.accept``: a token takes its row along, to the reply and to the sinks."""

    @wraps(original)
    def accept(self: Any, request: Any, token: int) -> Any:
        output = original(self, request, token)
        safely(_join, request, output)
        return output

    return accept


def _join(request: Any, output: Any) -> None:
    asking: Asking | None = getattr(request, "attnhook", None)
    if asking is None:
        return
    share, asking.rows = asking.waiting.take(asking.rows), []
    output.extra[KEY] = share
    publish(share, lambda: token_lookup(request.prompt, request.output), lambda: asking.options.mask_prefix)

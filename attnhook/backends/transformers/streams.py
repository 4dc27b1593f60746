"""Ending a stream whose generation we have refused: who reads it must not wait for ever, and must learn why."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

logger = logging.getLogger("attnhook")


class _Raised(str):
    """An empty piece of text in a stream's queue: the stream compares it with its end, and that raises our error."""

    error: BaseException

    def __eq__(self, other: object) -> NoReturn:
        raise self.error

    __hash__ = str.__hash__


def streamer_of(generate: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The streamer that a call of ``generate(model, *args, **kwargs)`` was given; None where it was given none."""
    if not args or "streamer" in kwargs:
        return kwargs.get("streamer")
    return inspect.signature(generate).bind_partial(model, *args).arguments.get("streamer")


def fail(streamer: Any, error: BaseException) -> None:
    """End a stream because of ``error``.

    Iterating Transformers' `TextIteratorStreamer` or `AsyncTextIteratorStreamer` raises the error, behind the text that
    came before it. Any other streamer is told that the generation has ended, as it is at a usual end.
    """
    from transformers.generation import streamers

    put = None
    if isinstance(streamer, streamers.TextIteratorStreamer):
        put = partial(streamer.text_queue.put, timeout=streamer.timeout)
    elif isinstance(streamer, streamers.AsyncTextIteratorStreamer):
        put = partial(streamer.loop.call_soon_threadsafe, streamer.text_queue.put_nowait)
    try:
        if put is None:
            streamer.end()
        else:
            _end_with(streamer, put, error)
    except Exception:  # somebody else's code, or a loop that is closed; the error itself goes on to the caller
        logger.warning("a %s could not be told that its generation was refused", type(streamer).__name__, exc_info=True)


def _end_with(streamer: Any, put: Callable[[str], object], error: BaseException) -> None:
    """End a stream of text: what is left of it, then the error, then the end, for who goes on reading."""
    told = _Raised()
    told.error = error
    usual = streamer.on_finalized_text

    def last(text: str, stream_end: bool = False) -> None:
        usual(text)
        put(told)
        usual("", stream_end=stream_end)

    streamer.on_finalized_text = last
    try:
        streamer.end()
    finally:
        del streamer.on_finalized_text

"""What SGLang before 0.5.15 does not do itself with the elements that go along with the tokens.

It gives a request the elements of another where only some requests of a batch have any, keeps only the last piece
of a request's elements, and takes a request's first element for all where several HTTP workers share a batch. Each
hook is put in place only where SGLang's own module shows no sign of doing it (`_OLDER`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from attnhook.serving.guard import safely
from attnhook.serving.wire import KEY

Original = Callable[..., Any]


def wrap_stream_output_generation(original: Original) -> Original:
    """``stream_output_generation``: while one request of a batch has elements, all have a list of them."""

    @wraps(original)
    def stream_output_generation(self: Any, reqs: Any, *args: Any, **kwargs: Any) -> Any:
        lent = safely(_lend, reqs) or []
        try:
            return original(self, reqs, *args, **kwargs)
        finally:
            for req, own in lent:
                req.customized_info = own

    return stream_output_generation


def _lend(reqs: list[Any]) -> list[tuple[Any, Any]]:
    """Empty lists for the requests that have none; these, with what they had."""
    without = [req for req in reqs if KEY not in (req.customized_info or ())]
    if len(without) == len(reqs):
        return []
    lent = [(req, req.customized_info) for req in without]
    for req, own in lent:
        req.customized_info = {**(own or {}), KEY: []}
    return lent


def wrap_extract_field_by_index(original: Original) -> Original:
    """``_extract_field_by_index``: a batch of one request holds a list of one list of elements."""

    @wraps(original)
    def _extract_field_by_index(output: Any, field_name: str, *args: Any, **kwargs: Any) -> Any:
        result = original(output, field_name, *args, **kwargs)
        if field_name == "customized_info" and isinstance(result, dict):
            return {name: [elements] for name, elements in result.items()}
        return result

    return _extract_field_by_index


def wrap_handle_batch_output(original: Original) -> Original:
    """``TokenizerManager._handle_batch_output``: results tell all of a request's elements so far."""

    @wraps(original)
    async def _handle_batch_output(self: Any, recv_obj: Any, *args: Any, **kwargs: Any) -> Any:
        safely(_accumulate, self.rid_to_state, recv_obj)
        return await original(self, recv_obj, *args, **kwargs)

    return _handle_batch_output


def _accumulate(states: dict[str, Any], output: Any) -> None:
    pieces = (getattr(output, "customized_info", None) or {}).get(KEY) or []
    for i, (request, piece) in enumerate(zip(output.rids, pieces, strict=bool(pieces))):
        if request in states:
            pieces[i] = states[request].__dict__.setdefault("_attnhook", [])
            pieces[i] += piece


class _Names(tuple[str, ...]):
    """A tuple of ours, so that it can be told apart and taken back."""


def add_meta_info_keys(original: tuple[str, ...]) -> _Names:
    """``_INCREMENTAL_STREAMING_META_INFO_KEYS``: what SGLang cuts to the new tokens, and joins, in such streams."""
    return _Names((*original, KEY))


def wrap_init_next_round_input(original: Original, reusable: Callable[[Any], int | None]) -> Original:
    """``Req.init_next_round_input``, which looks the prefix up itself: of no more tokens than ``reusable`` allows."""

    @wraps(original)
    def init_next_round_input(self: Any, tree_cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        limit = None if tree_cache is None else safely(reusable, self)
        cache = tree_cache if limit is None else _Shortened(tree_cache, limit)
        return original(self, cache, *args, **kwargs)

    return init_next_round_input


class _Shortened:
    """A prefix cache that looks no further than ``limit`` tokens."""

    def __init__(self, cache: Any, limit: int) -> None:
        self._cache, self._limit = cache, limit

    def match_prefix(self, params: Any) -> Any:
        return self._cache.match_prefix(replace(params, key=params.key[: self._limit]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

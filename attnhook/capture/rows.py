"""Query rows, and which of them a request wants."""

from __future__ import annotations

from typing import NamedTuple

from attnhook.options import RequestOptions


class Row(NamedTuple):
    """One query row to capture."""

    request_id: str
    choice: int
    position: int  # in the request's full sequence
    decode_step: int | None  # None: a prompt row
    source: int  # row of the page table (the request's place in the batch)


def wants_row(options: RequestOptions, decode_step: int | None) -> bool:
    """Whether the options keep this row: prompt rows if asked for, generated rows by stride and limit."""
    if decode_step is None:
        return options.prompt
    return decode_step % options.stride == 0 and decode_step // options.stride < options.max_tokens


def over_limit(options: RequestOptions, decode_step: int | None) -> bool:
    """Whether only ``max_tokens`` keeps this row out, so that the cut can be counted."""
    return (
        decode_step is not None
        and decode_step % options.stride == 0
        and decode_step // options.stride >= options.max_tokens
    )

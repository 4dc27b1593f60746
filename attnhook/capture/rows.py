"""Query rows, and which of them a request wants."""

from __future__ import annotations

from typing import NamedTuple

from attnhook.errors import UnsupportedError
from attnhook.options import RequestOptions


class Row(NamedTuple):
    """One query row to capture."""

    request_id: str
    choice: int
    position: int  # in the request's full sequence
    decode_step: int | None  # None: a prompt row
    source: int  # row of the page table (the request's place in the batch)


def wants_row(options: RequestOptions, decode_step: int | None, position: int | None = None) -> bool:
    """Whether the options keep this row: prompt rows if asked for, all or chosen ones; generated rows by stride and
    limit. With a limit of 0 the prompt's last row, of decode step 0, is one of its own.

    Raises UnsupportedError where prompt rows were chosen and the ``position`` of this one is not told.
    """
    if decode_step is None:
        return wants_prompt_row(options, position)
    if (
        options.max_tokens == 0
    ):  # the prompt's last row gives token 0: it is there where it was asked for as one of them
        return decode_step == 0 and wants_prompt(options) and wants_prompt_row(options, position)
    return decode_step % options.stride == 0 and decode_step // options.stride < options.max_tokens


def wants_prompt_row(options: RequestOptions, position: int | None) -> bool:
    """Whether the options keep the prompt's row at this position; see `wants_row`."""
    if options.prompt or not options.rows:
        return options.prompt
    if position is None:
        raise UnsupportedError(
            f"rows={[list(one) for one in options.rows]}: this engine's backend does not tell the positions of prompt "
            "rows, so none can be chosen: capture them all with prompt=True"
        )
    return any(start <= position < end for start, end in options.rows)


def wants_prompt(options: RequestOptions) -> bool:
    """Whether the options keep rows of the prompt."""
    return options.prompt or bool(options.rows)


def prompt_ranges(options: RequestOptions, low: int, high: int) -> list[range]:
    """Those of the prompt's positions ``low`` to ``high - 1`` whose rows the options keep, ascending."""
    if options.prompt:
        return [range(low, high)] if low < high else []
    cut = [range(max(start, low), min(end, high)) for start, end in options.rows]
    return [one for one in cut if one]


def prompt_rows(options: RequestOptions, low: int, high: int) -> list[int]:
    """`prompt_ranges` one by one."""
    return [position for one in prompt_ranges(options, low, high) for position in one]


def over_limit(options: RequestOptions, decode_step: int | None) -> bool:
    """Whether only ``max_tokens`` keeps this row out, so that the cut can be counted."""
    return (
        decode_step is not None
        and options.max_tokens > 0  # else none was asked for
        and decode_step % options.stride == 0
        and decode_step // options.stride >= options.max_tokens
    )

"""The text of each token."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

_WINDOW, _OVERLAP = 32, 8  # tokens that are decoded together at most, besides those before them


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text of each token such that the pieces, joined, are the decoded text.

    A character that several tokens share is shown whole at the last of them; the others are empty.
    """
    out: list[str] = []
    ends = [0]  # where a character ends
    start, before = 0, ""  # the text from start to where the last character ended
    for end in range(1, len(ids) + 1):
        # where a character ends: half a one spoils a whole run of byte tokens. Further back where one character, or
        # what is none, takes more tokens than the window reaches back
        reach = ends[max(0, min(bisect_right(ends, window_start(end)) - 1, len(ends) - 4))]
        if reach != start:
            start, before = reach, tokenizer.decode(ids[reach : ends[-1]])
        text = tokenizer.decode(ids[start:end])
        if text.endswith("�") and end < len(ids):
            out.append("")
            continue
        out.append(text[len(before) :])
        before = text
        ends.append(end)
    return out


def window_start(end: int) -> int:
    """Where the tokens that `pieces` decodes to find the text of token ``end - 1`` begin.

    Some tokens before, so that spaces between tokens survive; the same place for many tokens in a row, so that
    what was decoded for one is the beginning for the next.
    """
    return max(0, (end - 1) // _WINDOW * _WINDOW - _OVERLAP)

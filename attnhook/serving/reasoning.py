"""Which of a choice's tokens are reasoning: `think_phase` from the token ids that open and close a block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnhook.record.packing import with_phase
from attnhook.record.row import ThinkPhase

logger = logging.getLogger("attnhook")


@dataclass(frozen=True)
class Markers:
    """Token ids that open and close a reasoning block; most models have one of each."""

    start: tuple[int, ...]
    end: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.start or not self.end:
            raise ValueError(f"a reasoning block needs token ids at both ends, got {self.start} and {self.end}")


class PhaseFollower:
    """Follows the tokens of one choice.

    ``prompt`` may leave a block open, as templates of reasoning models do; blocks that it closes, such as those
    of earlier turns, count no more.
    """

    def __init__(self, markers: Markers, prompt: Sequence[int]) -> None:
        self._markers = markers
        self._reach = max(len(markers.start), len(markers.end))
        self._tail = list(prompt[max(0, len(prompt) - self._reach) :])  # a marker may begin before what comes next
        self._thinking = self._last(prompt)

    def follow(self, tokens: Sequence[int]) -> list[ThinkPhase]:
        """Phases of the next tokens. Markers are "think"; of a start of several tokens, only the last one is."""
        phases: list[ThinkPhase] = []
        for token in tokens:
            self._tail = [*self._tail[1 - self._reach :], token] if self._reach > 1 else [token]
            opened = self._marker(self._tail)
            phases.append("think" if self._thinking or opened else "output")
            if opened is not None:
                self._thinking = opened
        return phases

    def _marker(self, tokens: Sequence[int]) -> bool | None:
        """Whether the tokens end in a start (True) or an end (False) of a block; None for neither."""
        start, end = self._markers.start, self._markers.end
        opens, closes = (tuple(tokens[-len(marker) :]) == marker for marker in (start, end))
        if opens and closes:  # one marker ends in the other: the longer one is meant
            return len(start) > len(end)
        return True if opens else False if closes else None

    def _last(self, prompt: Sequence[int]) -> bool:
        """Whether the last marker of the prompt opens a block."""
        lasts = (self._markers.start[-1], self._markers.end[-1])
        for stop in range(len(prompt), 0, -1):
            if prompt[stop - 1] in lasts:
                found = self._marker(prompt[max(0, stop - self._reach) : stop])
                if found is not None:
                    return found
        return False


class Phases:
    """The phases of one request's tokens, as they are accepted.

    ``prompt`` are the token ids that it began with.
    """

    def __init__(self, markers: Markers, prompt: Sequence[int]) -> None:
        self._follower = PhaseFollower(markers, prompt)
        self._done = 0  # generated tokens that were followed

    def of_last(self, tokens: Sequence[int], count: int, *, start: int = 0) -> list[ThinkPhase]:
        """Phases of the last ``count`` of all tokens so far, of which the first ``start`` are the prompt.

        Some may have passed by without a call.
        """
        phases = self._follower.follow(tokens[start + self._done :])
        self._done = len(tokens) - start
        return phases[-count:] if count else []


def find_markers(find: Callable[[], Markers | None], parser: str | None) -> Markers | None:
    """What ``find`` tells; None where it fails, which is logged: parsers raise anything for a strange tokenizer."""
    try:
        markers = find()
        if markers is None and parser:
            raise ValueError("it names none")
    except Exception as error:
        logger.warning("the reasoning parser %s tells no markers (%s): think_phase is always output", parser, error)
        return None
    return markers


def mark_phases(rows: list[bytes], phases: Sequence[ThinkPhase]) -> list[bytes]:
    """Packed rows of consecutive tokens with their phases; rows beyond the phases stay, as do empty ones."""
    marked = [
        row if not row or phase == "output" else with_phase(row, phase)
        for row, phase in zip(rows, phases, strict=False)
    ]
    return [*marked, *rows[len(marked) :]]

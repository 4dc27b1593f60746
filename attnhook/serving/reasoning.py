"""Which of a choice's tokens are reasoning: `think_phase` from the token ids that open and close a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnhook.record.token_record import ThinkPhase


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

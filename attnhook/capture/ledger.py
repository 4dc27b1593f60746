"""The account of one generation: what was captured must be what was generated, row by row.

A backend notes every row that it has captured for one listener, wanted or not, and at the end says how many tokens each
sequence got. Whatever does not match - a row that is missing, twice, or has another position or step - is told in
words, with the numbers seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnhook.capture.rows import Row

_Sequence = tuple[str, int]  # request id, choice


class RowLedger:
    """Rows of one listener in one generation.

    Parameters
    ----------
    whole
        Whether the listener was there from the start. One that came later must have every row from its first on.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole
        #: A row was refused, and told as such: what is missing then is known.
        self.refused = False
        self._prompt: dict[_Sequence, list[int]] = {}
        self._generated: dict[_Sequence, list[tuple[int, int]]] = {}  # (decode step, position)

    def note(self, rows: Iterable[Row]) -> None:
        """Rows that one forward pass has computed, in the order in which they came."""
        for row in rows:
            sequence = row.request_id, row.choice
            if row.decode_step is None:
                self._prompt.setdefault(sequence, []).append(row.position)
            else:
                self._generated.setdefault(sequence, []).append((row.decode_step, row.position))

    @property
    def empty(self) -> bool:
        """Whether nothing was noted."""
        return not self._prompt and not self._generated

    def check(
        self, tokens: Mapping[_Sequence, int], first: Mapping[_Sequence, int] | None = None
    ) -> tuple[list[str], int]:
        """What does not match ``tokens``, the generated tokens of each sequence, and how many rows are concerned.

        ``first`` is the position of each sequence's row of step 0, where it is known. An empty list means that every
        token has its row, once, in order, and that positions have no gap from the first row to the last.
        """
        told: list[str] = []
        concerned = 0
        for sequence in sorted({*tokens, *self._generated, *self._prompt}):
            count = tokens.get(sequence)
            steps = self._generated.get(sequence, [])
            begins = None if first is None else first.get(sequence)
            why = self._strange(count, steps, begins) or self._strange_prompt(self._prompt.get(sequence, []), steps)
            if why:
                told.append(f"sequence {sequence[0]}, choice {sequence[1]}: {why}")
                concerned += max(1, abs((count or 0) - len(steps)))
        return told, concerned

    def _strange(self, count: int | None, rows: list[tuple[int, int]], begins: int | None) -> str | None:
        if count is None:
            return f"{len(rows)} rows of a sequence that was not returned"
        steps = [step for step, _ in rows]
        first = 0 if self.whole or not steps else steps[0]
        if not self.whole and not steps:
            return None  # its tokens were generated before anybody listened
        if steps != list(range(first, count)):
            return f"{count} tokens were generated, and rows of the decode steps {short(steps)} came"
        offsets = {position - step for step, position in rows}
        if len(offsets) > 1:
            return f"positions {short([position for _, position in rows])} of {count} consecutive tokens"
        if begins is not None and offsets and offsets != {begins}:
            return f"the first generated row would be at position {min(offsets)}, and the prompt ends at {begins}"
        return None

    def _strange_prompt(self, positions: list[int], generated: list[tuple[int, int]]) -> str | None:
        if not positions:
            return None
        if positions != list(range(positions[0], positions[0] + len(positions))):
            return f"prompt rows at positions {short(positions)}, which are not each once and without a gap"
        if generated and generated[0][0] == 0 and positions[-1] + 1 != generated[0][1]:
            return f"the prompt's rows end at {positions[-1]}, the first generated one is at {generated[0][1]}"
        return None


def short(numbers: list[int]) -> str:
    """A list that may be long: its ends."""
    if len(numbers) <= 12:
        return str(numbers)
    return f"[{', '.join(map(str, numbers[:6]))}, ..., {', '.join(map(str, numbers[-4:]))}] ({len(numbers)})"

"""The account of one choice of a reply: what it brings must be what its tokens were asked to bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnhook.capture.ledger import short
from attnhook.capture.rows import prompt_rows, wants_prompt, wants_row
from attnhook.options import RequestOptions
from attnhook.record.key_mass import KeyMass
from attnhook.record.token_record import TokenRecord
from attnhook.serving.replies import NOTHING_CAME, Attention


class ChoiceAccount:
    """Follows one choice from its first token on; `settle` what comes with each of its outputs."""

    def __init__(self, options: RequestOptions, prompt: int | None = None) -> None:
        self.options = options
        self._end = None if prompt is None else prompt - 1  # position of the prompt's last token, where it is known
        self._tokens = 0  # that are settled
        self._offset: int | None = None  # position of the row that gives token 0
        self._told = False
        self._early: list[TokenRecord] = []  # rows that came before their tokens
        self._rows = 0  # that have gone out

    def settle(self, new: Attention, tokens: int, *, finished: bool) -> Attention:
        """What of ``new`` belongs to the tokens that the choice has, with an error where rows do not match.

        ``tokens`` is how many tokens the choice has now. Rows of later ones wait for them. An engine that accepts
        several at once computes rows beyond the one at which it then stops: where it has ``finished``, those go.
        """
        before, self._tokens = self._tokens, max(self._tokens, tokens)
        rows = [*self._early, *new.generated]
        kept = [record for record in rows if (record.decode_step or 0) < tokens]
        self._early = [record for record in rows if (record.decode_step or 0) >= tokens]
        error = new.error
        if error is not None:
            self._told = True  # what is missing then is known
        elif not self._told:
            error = self._strange(kept, before, tokens) or self._strange_prompt(new.prompt, kept, before, finished)
            self._told = error is not None
        self._rows += len(kept) + len(new.prompt)
        if finished and self.options.key_mass and not self._told and error is None:
            error = self._strange_sums(new.key_mass)
        return replace(new, generated=kept, error=error, encoding_format=self.options.encoding_format)

    def _strange_sums(self, mass: KeyMass | None) -> str | None:
        if mass is None:
            return "attention_key_mass: none came with the last record; the server's log may say why"
        if mass.rows != self._rows:
            return f"attention_key_mass: {mass.rows} rows were added up, and {self._rows} came"
        return None

    def _strange(self, rows: Sequence[TokenRecord], before: int, tokens: int) -> str | None:
        wanted = [step for step in range(before, tokens) if self._wants(step)]
        steps = [-1 if row.decode_step is None else row.decode_step for row in rows]
        if steps != wanted:
            if wanted and not steps and not before:
                return NOTHING_CAME
            return (
                f"tokens {before} to {tokens - 1} need rows of the decode steps {short(wanted)}, and rows of "
                f"{short(steps)} came; the server's log may say why"
            )
        for row in rows:
            offset = row.query_position - (row.decode_step or 0)
            if self._offset not in (None, offset):
                return f"the row of decode step {row.decode_step} has position {row.query_position}, which cannot be"
            self._offset = offset
        return None

    def _wants(self, step: int) -> bool:
        end = self._end if self._offset is None else self._offset
        if self.options.max_tokens == 0 and end is None:
            return False  # whether the prompt's last row was chosen cannot be known
        return wants_row(self.options, step, None if end is None else end + step)

    def _strange_prompt(
        self, prompt: Sequence[TokenRecord], rows: Sequence[TokenRecord], before: int, finished: bool
    ) -> str | None:
        end = self._end if self._offset is None else self._offset
        if not wants_prompt(self.options) or before or not (rows or finished) or end is None:
            return None
        positions = [row.query_position for row in prompt]
        wanted = prompt_rows(self.options, 0, end)
        if positions != wanted:
            name, what = ("attention_prompt", "rows") if self.options.prompt else ("attention_rows", "chosen rows")
            return f"{name}: {len(wanted)} {what} come before the prompt's last, and {short(positions)} are here"
        return None

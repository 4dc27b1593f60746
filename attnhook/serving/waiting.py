"""Where an engine accepts tokens: what was captured waits for its token, then goes into the reply and to the sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnhook.record import tokens
from attnhook.record.token_record import TokenRecord
from attnhook.record.tokens import Lookup
from attnhook.serving.key_mass import PROMPT, Piece
from attnhook.serving.wire import Share, worse
from attnhook.sinks import outlet


@dataclass
class Waiting:
    """What waits for one request's next token: a prompt that is computed in chunks has records before it has one."""

    reply: bool = True  # false: for the sinks only
    prompt: list[bytes] = field(default_factory=list)
    error: str | None = None
    check: float | None = None
    pieces: list[Piece] = field(default_factory=list)  # of the prompt's rows, for the key mass

    def add(self, share: Share) -> None:
        """All of a share but the rows of its tokens."""
        self.prompt += share.prompt
        self.error = self.error or share.error
        self.check = worse(self.check, share.check)
        self.pieces += [piece for piece in share.pieces if piece["token"] == PROMPT]

    def take(self, generated: Sequence[bytes] = ()) -> Share:
        """What goes with tokens that were accepted, whose rows are ``generated``; nothing waits any more.

        Empty rows were not wanted.
        """
        rows = [row for row in generated if row]
        share = Share(rows, self.prompt, self.error, self.reply, self.check, self.pieces)
        self.prompt, self.error, self.check, self.pieces = [], None, None, []
        return share


def publish(share: Share, token_at: Callable[[], Lookup | None], mask_prefix: Callable[[], int]) -> None:
    """Hand the rows of accepted tokens to the process's sinks, with token ids where one of them keeps those.

    ``token_at`` makes the look-up of the request's token ids by position, or None where they are not known;
    ``mask_prefix`` tells below which positions none is reported. Both are called only where they are needed.
    """
    if not outlet.publishes():
        return
    records = [TokenRecord.from_bytes(row) for row in (*share.prompt, *share.generated)]
    if outlet.publishes_tokens() and (look_up := token_at()) is not None:
        records = tokens.fill(records, look_up, mask_prefix())
    outlet.publish(records)

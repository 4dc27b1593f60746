"""What a server answers to a request that it does not serve."""

from __future__ import annotations


class Refusal(Exception):
    """A request that this server does not serve; ``status`` is the HTTP status, ``field`` what to change."""

    def __init__(self, status: int, field: str, message: str) -> None:
        super().__init__(message)
        self.status, self.field = status, field

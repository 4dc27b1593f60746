"""The command line, one file per command."""

from __future__ import annotations

from attnhook.system import moved

__getattr__ = moved.names(
    __name__,
    {
        "main": "cli.app",
    },
)

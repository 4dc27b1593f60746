"""``attnhook verify``: checks of this process and of a running server."""

from __future__ import annotations

from attnhook.system import moved

__getattr__ = moved.names(
    __name__,
    {
        "Report": "verify.report",
        "own_versions": "verify.report",
        "run": "verify.local",
    },
)

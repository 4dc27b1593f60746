"""Who listens, which rows they want, and how one forward pass is reduced to records."""

from __future__ import annotations

from attnhook.system import moved

__getattr__ = moved.names(
    __name__,
    {
        "Captured": "process.capturing",
        "Row": "capture.rows",
        "Session": "capture.session",
        "StepCapture": "capture.step",
        "capture": "process.capturing",
        "over_limit": "capture.rows",
        "sessions": "capture.session",
        "spent": "capture.session",
        "wants_row": "capture.rows",
    },
)

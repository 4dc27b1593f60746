"""What a third party may add, and the manager that finds it."""

from __future__ import annotations

from attnhook.system import moved

__getattr__ = moved.names(
    __name__,
    {
        "BUILT_INS": "plugins.manager",
        "GROUP": "plugins.manager",
        "backends": "plugins.manager",
        "has_observers": "plugins.manager",
        "model_in": "plugins.manager",
        "open_sink": "sinks.opening",
        "sink_classes": "plugins.manager",
    },
)

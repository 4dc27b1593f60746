"""What a third party builds on: the contracts, and what an engine that is no server captures with.

These names are stable: `CONTRACTS` has the version of each contract, and a plugin may state which one it was written
against. What a server engine is built with is in `attnhook.serving`. docs/plugins.md shows all of it at work. Importing
this package imports no engine and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnhook.plugins import exports

if TYPE_CHECKING:
    from attnhook.capture.ranks import Ranks
    from attnhook.capture.rows import Row, wants_row
    from attnhook.capture.session import Session, sessions
    from attnhook.capture.step import StepCapture
    from attnhook.kernels.topk.types import PagedKeys
    from attnhook.plugins.contracts import Backend, Installation, SelfCheck, Sink
    from attnhook.plugins.engine import Computed, EngineAdapter, LayerShape, LayerView, ModelShape
    from attnhook.plugins.hooks import Hook, Hooks
    from attnhook.plugins.hookspecs import RegisterBackend, RegisterSink, RegisterVariable, hookimpl
    from attnhook.plugins.patching import EngineInstallation, Patches
    from attnhook.plugins.versions import CONTRACTS

__all__ = [
    "CONTRACTS",
    "Backend",
    "Computed",
    "EngineAdapter",
    "EngineInstallation",
    "Hook",
    "Hooks",
    "Installation",
    "LayerShape",
    "LayerView",
    "ModelShape",
    "PagedKeys",
    "Patches",
    "Ranks",
    "RegisterBackend",
    "RegisterSink",
    "RegisterVariable",
    "Row",
    "SelfCheck",
    "Session",
    "Sink",
    "StepCapture",
    "hookimpl",
    "sessions",
    "wants_row",
]

_HOMES = {
    **dict.fromkeys(("Backend", "Installation", "SelfCheck", "Sink"), "plugins.contracts"),
    **dict.fromkeys(("Computed", "EngineAdapter", "LayerShape", "LayerView", "ModelShape"), "plugins.engine"),
    **dict.fromkeys(("Hook", "Hooks"), "plugins.hooks"),
    **dict.fromkeys(("RegisterBackend", "RegisterSink", "RegisterVariable", "hookimpl"), "plugins.hookspecs"),
    **dict.fromkeys(("EngineInstallation", "Patches"), "plugins.patching"),
    "CONTRACTS": "plugins.versions",
    # for an engine that is no server
    "PagedKeys": "kernels.topk.types",
    "Ranks": "capture.ranks",
    **dict.fromkeys(("Row", "wants_row"), "capture.rows"),
    **dict.fromkeys(("Session", "sessions"), "capture.session"),
    "StepCapture": "capture.step",
}
_OLDER = {
    **dict.fromkeys(("BUILT_INS", "GROUP", "backends", "has_observers", "model_in", "sink_classes"), "plugins.manager"),
    "open_sink": "sinks.opening",
}

if not TYPE_CHECKING:  # a type checker is to know each name, and that there are no others
    __getattr__ = exports.names(__name__, _HOMES, _OLDER)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

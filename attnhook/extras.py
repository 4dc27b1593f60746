"""Libraries that come with an extra of the package: imported when needed, with the remedy where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from attnhook.errors import PluginError


def need(module: str, user: str, extra: str = "sinks") -> Any:
    """Import ``module`` for ``user``; raises PluginError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PluginError(f"{user} needs {module}: {error}; run pip install 'attnhook[{extra}]'") from error

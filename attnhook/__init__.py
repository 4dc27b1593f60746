"""attnhook shows what a served language model attends to: exactly, per token, on the engine that serves it.

``install()`` hooks every engine found here, ``capture()`` collects records around a call; importing this
package imports no engine.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from attnhook.capture import Captured, capture
from attnhook.errors import AttnhookError, OptionError, PluginError, RecordError, UnsupportedError
from attnhook.hookspecs import hookimpl
from attnhook.lifecycle import install, uninstall
from attnhook.records import TokenRecord

try:
    __version__ = version("attnhook")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "AttnhookError",
    "Captured",
    "OptionError",
    "PluginError",
    "RecordError",
    "TokenRecord",
    "UnsupportedError",
    "__version__",
    "capture",
    "hookimpl",
    "install",
    "uninstall",
]

"""attnhook shows what a served language model attends to: exactly, per token, on the engine that serves it.

``install()`` hooks every engine found here, ``capture()`` collects records around a call; importing this
package imports no engine, and nothing else either before a name is asked for: with ``ATTNHOOK=1`` every Python
process imports it.
"""

from __future__ import annotations

import sys

from attnhook.system import moved

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes longer than all of this

if TYPE_CHECKING:
    from attnhook.errors import AttnhookError, OptionError, PluginError, RecordError, UnsupportedError
    from attnhook.plugins.hookspecs import hookimpl
    from attnhook.process.capturing import Captured, capture
    from attnhook.process.lifecycle import install, uninstall
    from attnhook.record.token_record import TokenRecord

    __version__: str

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

_HOMES = {
    "errors": ("AttnhookError", "OptionError", "PluginError", "RecordError", "UnsupportedError"),
    "plugins.hookspecs": ("hookimpl",),
    "process.capturing": ("Captured", "capture"),
    "process.lifecycle": ("install", "uninstall"),
    "record.token_record": ("TokenRecord",),
}
# as attributes of the package, for who writes attnhook.process.lifecycle.dropped() after `import attnhook`
_MODULES = frozenset({"client", "errors", "options", "plugins", "process", "record", "sinks", "store"})
# that were such attributes before
_OLD = frozenset({"delivery", "hookspecs", "lifecycle", "records"})


_Module = type(sys)


class _Package(_Module):  # type: ignore[valid-type,misc] # types.ModuleType
    def __setattr__(self, name: str, value: object) -> None:
        # importing the submodule of that name would put it in the place of the function
        if not (name == "capture" and isinstance(value, _Module)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__, *_MODULES})


if not TYPE_CHECKING:  # a type checker is to know each name, and that there are no others

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                value = version("attnhook")
            except PackageNotFoundError:  # run from a source tree that is not installed
                value = "0.0.0"
        elif home := next((home for home, names in _HOMES.items() if name in names), None):
            value = getattr(import_module(f"attnhook.{home}"), name)
        elif name in _MODULES or name in _OLD:
            return import_module(f"attnhook.{name}")
        else:
            raise AttributeError(f"module 'attnhook' has no attribute {name!r}")
        globals()[name] = value
        return value


sys.modules[__name__].__class__ = _Package
moved.watch()

"""Versions of the contracts, so that a plugin can say which one it was written against.

A version is raised where a plugin that fits it would no longer work: a name, an argument or a duty is another one.
tests/plugins/contracts/ has the names and signatures of each.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnhook import __version__
from attnhook.errors import PluginError

#: Contract -> the newest version that this release knows, and it knows all before it. ``adapter`` is that of
#: `EngineAdapter` and of what `attnhook.serving` gives out.
CONTRACTS: Mapping[str, int] = {"backend": 1, "sink": 1, "adapter": 1}


def check(contract: str, what: object, name: str) -> None:
    """Raise PluginError where ``what``, called ``name``, states a version of its contract that is not known here.

    It states it as its attribute ``contract``; what states none was written against the first.
    """
    stated, newest = getattr(what, "contract", 1), CONTRACTS[contract]
    if isinstance(stated, bool) or not isinstance(stated, int) or stated < 1:
        raise PluginError(
            f"{name} states contract={stated!r}: state a version of the {contract} contract, 1 to {newest}"
        )
    if stated > newest:
        raise PluginError(
            f"{name} was written for version {stated} of the {contract} contract, and attnhook {__version__} knows "
            f"versions up to {newest}: install a newer attnhook, or a release of the plugin for version {newest}"
        )

"""The contracts as text: names, members and signatures of what third parties build on.

tests/plugins/contracts/ has them of each version; ``python -m tests.plugins.frozen`` writes those of this source tree.
A version that has been released is written no more: what breaks a plugin then needs the next one (`CONTRACTS`).
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import attnhook.plugins
import attnhook.serving

FOLDER = Path(__file__).with_name("contracts")
_SINK = ("Sink", "RegisterSink", "hookimpl")
_ADAPTER = (
    "Computed", "EngineAdapter", "EngineInstallation", "Hook", "Hooks", "LayerShape", "LayerView", "ModelShape",
    "Ranks",
)  # fmt: skip


def contracts() -> dict[str, dict[str, Any]]:
    """Contract -> name -> what it is."""
    ours, kit = attnhook.plugins, attnhook.serving
    backend = [name for name in ours.__all__ if name not in {*_SINK, *_ADAPTER, "CONTRACTS"}]
    return {
        "backend": {name: described(getattr(ours, name)) for name in backend},
        "sink": {name: described(getattr(ours, name)) for name in sorted(_SINK)},
        "adapter": {
            **{f"plugins.{name}": described(getattr(ours, name)) for name in sorted(_ADAPTER)},
            **{f"serving.{name}": described(getattr(kit, name)) for name in kit.__all__},
        },
    }


def described(what: Any) -> Any:
    """A class by its public members, a function by its signature, a value by itself."""
    if not inspect.isclass(what):
        return _signature(what) if inspect.isfunction(what) else _value(what)
    members = {} if getattr(what, "_is_protocol", False) else {"()": _signature(what)}
    for one in reversed(what.__mro__):
        if one.__module__.startswith("attnhook."):
            members |= {name: _member(value) for name, value in vars(one).items() if _is_public(name)}
            kinds = vars(one).get("__annotations__", {})
            members |= {name: getattr(kind, "__forward_arg__", kind) for name, kind in kinds.items() if name[0] != "_"}
    return dict(sorted(members.items()))


def _is_public(name: str) -> bool:
    return name[0] != "_" or name == "__call__"


def _member(value: Any) -> str:
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {_signature(value.__func__)}"
    if isinstance(value, property):
        return f"property {inspect.signature(value.fget).return_annotation}" if value.fget else "property"
    return _signature(value) if inspect.isfunction(value) else _value(value)


def _signature(what: Any) -> str:
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", str(inspect.signature(what)))
    return re.sub(r"<function .* at 0x\w+>", "<function>", text)


def _value(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else type(value).__name__


def path(contract: str, version: int) -> Path:
    """Where a version of a contract is kept."""
    return FOLDER / f"{contract}-{version}.json"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for contract, found in contracts().items():
        text = json.dumps(found, indent=1)
        path(contract, attnhook.plugins.CONTRACTS[contract]).write_text(text + "\n", encoding="utf-8")

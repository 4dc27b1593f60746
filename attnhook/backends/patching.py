"""Reversible patches on an engine's classes and modules."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Patches:
    """A stack of attribute replacements that `undo` takes back in reverse order."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace ``owner.name``; what a class inherits is restored by deleting our override."""
        self._saved.append((owner, name, owner.__dict__.get(name, _ABSENT), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restore every attribute, unless somebody else has wrapped ours since: then it stays, inert."""
        while self._saved:
            owner, name, old, new = self._saved.pop()
            if owner.__dict__.get(name) is not new:
                continue
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

    def names(self) -> list[str]:
        """``Owner.attribute`` of each patch in place."""
        return [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _, _ in self._saved]

"""What a plugin adds: a backend (one engine), a sink (one kind of destination)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from attnhook.options import CaptureOptions
from attnhook.record.token_record import TokenRecord


class Installation(Protocol):
    """What `Backend.install` hands back."""

    @property
    def active(self) -> bool:
        """Whether the engine is patched now (false while it has not been imported yet)."""
        ...

    def describe(self) -> dict[str, str]:
        """What is hooked, for ``attnhook verify``: hook point -> state."""
        ...

    def uninstall(self) -> None:
        """Undo every patch; calling it twice is harmless."""
        ...


@dataclass(frozen=True)
class SelfCheck:
    """What a backend found when it checked itself, for ``attnhook verify``."""

    title: str  # what was done, such as "self-check against eager attention"
    found: Mapping[str, str]  # what was compared -> the numbers, and what is allowed
    problems: Sequence[str] = ()  # one sentence for each thing that is not as it must be


@runtime_checkable
class Backend(Protocol):
    """One engine. Installing is idempotent and reversible, and imports nothing by itself.

    A backend may also have

    - an attribute ``contract``, the version of this contract that it was written against (`CONTRACTS`; without it the
      first);
    - an attribute ``servers: Collection[str]``: modules (of ``python -m``) and programs that serve the engine. With
      ``ATTNHOOK=1`` such a process ends where attnhook cannot do what it was asked to, in place of serving without;
    - a method ``models_in(target: object) -> Sequence[object]``: the models that an object is or wraps, for
      ``capture(model=...)``;
    - a method ``self_check(model: str | None) -> SelfCheck`` for ``attnhook verify``: run the engine and compare what
      is captured with what its attention is by definition. ``model`` is what the user named, None for one of the
      backend's own choice; a backend that runs no such model takes its own. What it raises is reported as a problem.
    """

    name: str

    def available(self) -> bool:
        """Whether the engine can be imported, found out without importing it."""
        ...

    def version(self) -> str | None:
        """Version of the installed engine, or None."""
        ...

    def install(self, options: CaptureOptions) -> Installation:
        """Patch the engine now if it is imported, else as soon as it is.

        ``options`` are those of the process: of `attnhook.install` or, while that is not in force, of the `capture`
        that came first. Most backends need none of them, since each `Session` and each request has its own. Where
        others come, the installation is uninstalled and this is called again, unless the installation has an attribute
        ``any_options`` that is true; where that raises, every backend has the old ones again.

        Raises UnsupportedError, naming the engine, its version, what was looked for and what to do, where a
        hook point is missing.
        """
        ...


class Sink(ABC):
    """One destination of records.

    One thread at a time calls a sink, in the order open, write*, close; open may run in another thread.

    Subclasses document their delivery guarantee in their docstring.
    """

    #: Version of this contract that a subclass was written against, see `CONTRACTS`.
    contract: ClassVar[int] = 1

    #: Whether ``tokens=1`` makes a difference: a sink that counts and forgets the records refuses it.
    keeps_tokens: ClassVar[bool] = True

    @abstractmethod
    def open(self, config: str) -> None:
        """Make ready to write. ``config`` is the part of the sink's URL behind ``scheme:``.

        Raises PluginError (cause, value seen, remedy) where the destination cannot be written to; nothing
        may be left half-made.
        """

    @abstractmethod
    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Store the records, in order. An exception means that none of the batch counts as delivered."""

    def flush(self) -> None:  # noqa: B027 - a sink without a buffer has nothing to do
        """Hand everything written so far to the destination."""

    def close(self) -> None:
        """Flush and let go of the destination; calling it twice is harmless."""
        self.flush()

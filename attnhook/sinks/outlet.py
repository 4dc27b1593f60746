"""Where a process sends the records of all its requests: the sinks and observers that `install` opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnhook.capture.session import Session
from attnhook.errors import OptionError
from attnhook.options import CaptureOptions
from attnhook.plugins import manager as plugins
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.delivery import Delivery


class Outlet:
    """What `install` set up: its options and, where there are sinks or observers, a session that feeds them."""

    def __init__(self, options: CaptureOptions) -> None:
        self.options = options
        self.delivery = open_delivery(options, process=True)
        self.session: Session | None = None
        if self.delivery is not None and options.request.key_mass:
            self.delivery.close()
            raise OptionError(
                "key_mass",
                f"key_mass={options.request.key_mass!r}: sinks and observers get records, which have no key mass: ask "
                "for it in capture() (unset ATTNHOOK_KEY_MASS)",
            )

    def start(self) -> None:
        """Listen to every pass, where there is a place for its records."""
        if self.delivery is not None:
            self.session = Session(self.options.request, self.delivery.put, strict=False, tokens=self.delivery.tokens)
            self.session.__enter__()

    def close(self) -> None:
        """Listen no longer; what is queued is written first."""
        if self.session is not None:
            self.session.__exit__()
        if self.delivery is not None:
            self.delivery.close()  # interrupted, it goes on when the process ends


_current: Outlet | None = None  # replaced whole, so that an engine thread reads it without a lock


def current() -> Outlet | None:
    """The process's outlet, or None while `install` is not in force."""
    return _current


def replace(outlet: Outlet | None) -> None:
    """Make ``outlet`` the process's own."""
    global _current
    _current = outlet


def open_delivery(options: CaptureOptions, *, process: bool = False) -> Delivery | None:
    """The queue to the options' sinks and the plugins' observers, or None where there are neither.

    While `install` shows observers every record, nobody else does, so that they see none twice.
    """
    observe = plugins.has_observers() and (process or _current is None or _current.session is None)
    if options.sinks or observe:
        return Delivery.from_urls(options.sinks, queue_size=options.queue_size, observe=observe, listen_later=process)
    return None


def publishes() -> bool:
    """Whether the process has sinks or observers, so that `publish` needs records."""
    outlet = _current
    return outlet is not None and outlet.delivery is not None


def publishes_tokens() -> bool:
    """Whether one of the process's sinks keeps token ids, so that `publish` needs them in the records."""
    outlet = _current
    return outlet is not None and outlet.delivery is not None and outlet.delivery.tokens


def publish(records: Sequence[TokenRecord]) -> None:
    """Hand records that an engine has captured for a reply to the process's sinks and observers too."""
    outlet = _current
    if outlet is not None and outlet.delivery is not None:
        outlet.delivery.put(records)


def flush(timeout: float) -> bool:
    """Wait until the process's sinks have what was handed to them; False if ``timeout`` seconds were too few."""
    outlet = _current
    return outlet is None or outlet.delivery is None or outlet.delivery.flush(timeout)


def sink_stats() -> dict[str, Any]:
    """Per sink of `install`: queued, written and dropped counts, by reason."""
    outlet = _current
    return {} if outlet is None or outlet.delivery is None else outlet.delivery.stats()


def dropped() -> dict[str, int]:
    """Rows that `install`'s capture could not turn into records, by reason (``unsupported``, ``nan``, ...)."""
    outlet = _current
    return {} if outlet is None or outlet.session is None else dict(outlet.session.dropped)

"""How far a command is, on standard error: a bar on a terminal, a line now and then where output is piped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FIRST, LONGEST = 5.0, 60.0  # seconds to the first line, and most between two; each wait is twice the one before


@dataclass
class Work:
    """What a command is doing; `tell` says how far it is, from any thread."""

    text: str
    done: float = 0
    total: float | None = None
    count: str | None = None
    begin: float = field(default_factory=time.monotonic)

    def tell(
        self, done: float | None = None, total: float | None = None, text: str | None = None, count: str | None = None
    ) -> None:
        """Move on: ``done`` of ``total``, what is being done, and how its amount is shown (default: done/total)."""
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.text = self.text if text is None else text
        self.count = self.count if count is None else count
        self.changed()

    def changed(self) -> None:
        """Show it; nothing to do where lines come by the clock."""

    @property
    def amount(self) -> str:
        """``12/64``, or nothing where no amount is known."""
        if self.count is not None:
            return self.count
        return f"{self.done:,.0f}/{self.total:,.0f}" if self.total else ""

    @property
    def line(self) -> str:
        """All of it on one line."""
        passed = time.monotonic() - self.begin
        parts = [f"{self.text}:", *([f"{self.amount},"] if self.amount else []), f"{_duration(passed)} so far"]
        if self.total and 0 < self.done < self.total:
            parts[-1] += f", about {_duration(passed * (self.total - self.done) / self.done)} left"
        return " ".join(parts)


@contextmanager
def progress(
    text: str, total: float | None = None, *, measured: bool = True, console: Console | None = None
) -> Iterator[Work]:
    """Show that ``text`` is going on until the block ends, and how much of ``total`` is done.

    The total may be told later; with ``measured`` False there is none, and no bar.
    """
    console = console or Console(stderr=True)
    if not console.is_interactive:
        with _lines(Work(text, total=total), console) as work:
            yield work
        return
    if not measured:
        columns: tuple[ProgressColumn, ...] = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    else:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
    with Progress(*columns, console=console, transient=True) as bar:
        shown = _Shown(text, total=total, bar=bar)
        yield shown


@dataclass
class _Shown(Work):
    """Work on a terminal."""

    bar: Progress = field(kw_only=True)

    def __post_init__(self) -> None:
        self._task = self.bar.add_task(escape(self.text), total=self.total, amount=escape(self.amount))

    def changed(self) -> None:
        self.bar.update(
            self._task,
            completed=self.done,
            total=self.total,
            description=escape(self.text),
            amount=escape(self.amount),
        )


@contextmanager
def _lines(work: Work, console: Console) -> Iterator[Work]:
    """Print a line while the work goes on; work that is over in `FIRST` seconds prints none."""
    over = threading.Event()

    def report() -> None:
        wait = FIRST
        while not over.wait(wait):
            wait = min(2 * wait, LONGEST)
            try:
                print(work.line, file=console.file, flush=True)
            except (OSError, ValueError):
                return  # nobody reads standard error any more: there is nobody to tell

    thread = threading.Thread(target=report, name="attnhook-progress", daemon=True)
    thread.start()
    try:
        yield work
    finally:
        over.set()
        thread.join()


def _duration(seconds: float) -> str:
    """``8 s``, ``3 min`` or ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

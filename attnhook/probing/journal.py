"""The file beside a run's output that says whose output it is and which probes are finished.

Its first line is the manifest: what the run measures, with what. Each further line is one finished probe, written
when the sink has its records. A run that was killed is resumed from it: what is finished is left out. At most one
probe can be in the output and not here, the one that was being written; see `Journal.settle`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnhook.errors import AttnhookError, OptionError
from attnhook.system import untrusted

if sys.platform != "win32":
    import fcntl

_FORMAT = 1
_LOCAL = ("jsonl", "sqlite", "parquet")  # sinks whose configuration is a path
_ONCE = ("sqlite",)  # sinks that keep a record once, however often it comes


class Journal:
    """The open journal of one run; `begin` makes a new one, `resume` goes on with one that is there."""

    def __init__(self, path: Path, out: str, manifest: dict[str, Any], done: dict[str, dict[str, Any]], fd: int):
        self.path, self.manifest, self.done = path, manifest, done
        self._out, self._fd = out, fd

    @classmethod
    def begin(cls, path: Path, out: str, identity: Mapping[str, Any]) -> Journal:
        """A new journal for the run that ``identity`` describes. Raises OptionError where one is there."""
        manifest = {"probe_run": _FORMAT, "out": out, **identity}
        line = json.dumps(manifest).encode() + b"\n"
        try:
            with open(path, "xb", buffering=0) as file:
                file.write(line)
        except FileExistsError as error:
            raise OptionError("out", taken(path)) from error
        except OSError as error:
            raise AttnhookError(f"cannot write {path}: {error.strerror}; choose another place with --state") from error
        return cls.resume(path, out, identity)

    @classmethod
    def resume(cls, path: Path, out: str, identity: Mapping[str, Any]) -> Journal:
        """The journal at ``path``, if it is of the same run.

        Raises OptionError naming what differs, and where another process writes it; AttnhookError where it is
        damaged.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise OptionError("resume", f"cannot open {path}: {error.strerror}; name a run's file") from error
        try:
            _lock(fd, path)
            with open(path, "rb") as file:
                lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # cut short by a kill: that probe is not finished
                os.ftruncate(fd, sum(map(len, lines[:-1])))
                lines.pop()
            manifest, done = _parse(path, lines)
            _same(path, manifest, {"out": out, **identity})
        except BaseException:
            os.close(fd)
            raise
        return cls(path, out, manifest, done, fd)

    def settle(self) -> None:
        """Before the sink is opened: take out of the output what a killed run wrote there without recording it.

        Exact for ``jsonl:`` files, whose size was recorded, and needless for ``sqlite:``. Raises OptionError where
        the file is not as this run left it.
        """
        path = _plain_file(self._out)
        if path is None:
            return
        known = max((int(entry["size"]) for entry in self.done.values() if "size" in entry), default=0)
        size = path.stat().st_size if path.exists() else 0
        if size < known:
            raise OptionError(
                "out", f"{path} has {size} bytes, but this run wrote {known}: it was changed; start anew elsewhere"
            )
        if size > known:
            with open(path, "rb+") as file:
                file.seek(known)
                for line in file.read().splitlines(keepends=True):
                    if not self._ours(line):
                        raise OptionError(
                            "out",
                            f"{path} holds records behind byte {known} that this run did not write, beginning "
                            f"{line[:60]!r}: keep other records in another file",
                        )
                file.truncate(known)

    def _ours(self, line: bytes) -> bool:
        """Whether a line is a record of a probe that is not finished, or the beginning of one."""
        if not line.endswith(b"\n"):
            return True
        try:
            request = untrusted.loads(line).get("request_id", "")
        except (ValueError, AttributeError):
            return False
        return str(request).startswith("probe/") and request not in self.done

    @property
    def may_repeat(self) -> bool:
        """Whether the output may have records of probes that are not recorded, and would keep them twice."""
        return _plain_file(self._out) is None and self._out.partition(":")[0] not in _ONCE

    def add(self, request_id: str, entry: Mapping[str, Any]) -> None:
        """Record that a probe is finished and its records are with the sink. Raises AttnhookError."""
        path = _plain_file(self._out)
        line = {"probe": request_id, **entry, **({} if path is None else {"size": path.stat().st_size})}
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise AttnhookError(
                f"cannot write {self.path}: {error.strerror}; make room and continue with --resume"
            ) from error
        self.done[request_id] = line

    def close(self) -> None:
        """Let go of the file; another run may resume it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest and the finished probes, by request id, of the journal at ``path``; the run may be going on.

    Raises OptionError where it cannot be read, AttnhookError where it is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise OptionError(
            "state", f"cannot open {path}, the record of a probe run: {error.strerror}; name it with --state"
        ) from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return _parse(path, lines)


def place(out: str, state: Path | None) -> Path:
    """Where the journal of a run into the sink ``out`` lies: ``state``, or beside a local output.

    Raises OptionError where it must be given.
    """
    if state is not None:
        return state
    path = _path(out)
    if path is None:
        raise OptionError(
            "state", f"{out} is no file of this machine beside which the run could be recorded: add --state FILE"
        )
    return path.with_name(f"{path.name}.probes")


def check_new(out: str, journal: Path) -> None:
    """Raise OptionError where the output of a new run, or its journal, is there already."""
    if journal.exists():
        raise OptionError("out", taken(journal))
    path = _path(out)
    if path is not None and path.exists() and (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
        raise OptionError(
            "out", f"{path} is there already and no run of attnhook probe wrote it: name another output with --out"
        )
    for folder in (journal.parent, *(() if path is None else (path.parent,))):
        if not folder.is_dir():
            raise OptionError("out", f"the folder {folder} does not exist: create it first")


def taken(path: Path) -> str:
    """The message for a run that is there already."""
    return f"{path} records a run already: continue it with --resume, or name another output with --out"


def _path(out: str) -> Path | None:
    """The local file or folder of a sink, behind which options may stand."""
    scheme, _, config = out.partition(":")
    name = config.partition("?")[0]
    if scheme not in _LOCAL or name in ("", "-") or "://" in name:
        return None
    return Path(name).expanduser()


def _plain_file(out: str) -> Path | None:
    """The output, where it is one file of lines: neither rotated nor compressed nor a device."""
    path = _path(out)
    if path is None or not out.startswith("jsonl:") or "?" in out or (path.exists() and not path.is_file()):
        return None
    return path


def _parse(path: Path, lines: list[bytes]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    entries = []
    for number, line in enumerate(lines, 1):
        entry: Any = None
        with suppress(ValueError):
            entry = untrusted.loads(line)
        if not isinstance(entry, dict) or ("probe_run" if number == 1 else "probe") not in entry:
            raise AttnhookError(f"{path}, line {number} is not of a run's record: {line[:60]!r}; start anew elsewhere")
        entries.append(entry)
    if not entries:
        raise AttnhookError(f"{path} is empty, so it records no run: remove it and start without --resume")
    if entries[0]["probe_run"] != _FORMAT:
        raise AttnhookError(
            f"{path} has format {entries[0]['probe_run']!r}; this attnhook reads {_FORMAT}: use the one that wrote it"
        )
    return entries[0], {entry["probe"]: entry for entry in entries[1:]}


def _same(path: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    identity = json.loads(json.dumps(identity))  # tuples become lists
    for name, value in identity.items():
        if manifest.get(name) != value:
            raise OptionError(
                "resume",
                f"{path} records another run: its {name} is {manifest.get(name)!r}, not {value!r}; run it with the "
                "same options and versions, or name another output with --out",
            )


def _lock(fd: int, path: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OptionError("out", f"another attnhook probe is writing {path}: wait for it, or end it") from error
    except OSError:
        return  # a file system without locks

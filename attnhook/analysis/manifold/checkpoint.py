"""The folder of an unfinished discovery: which stages are done, and by whom it is used."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnhook.analysis.manifold.artifact import MANIFEST, sha256, write_json
from attnhook.errors import OptionError, PluginError
from attnhook.system import untrusted

if sys.platform != "win32":
    import fcntl

_STATE = "state.json"


class Checkpoint:
    """``<out>.partial``: the files of finished stages, and ``artifact``, which becomes ``out`` at the end.

    A stage counts as done only while its files are what they were when it ended. Another process on the same folder,
    an ``out`` that holds something, and a run with other settings are refused.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.artifact = self.folder / "artifact"
        self._force = force
        self._identity = dict(identity)
        if out.exists() and not out.is_dir():
            raise OptionError("out", f"--out {out} is a file: name a folder")
        unfinished = (self.folder / _STATE).exists()
        if unfinished and not resume and not force:
            raise OptionError(
                "out", f"{self.folder} has an unfinished run: go on with --resume, or begin anew with --force"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PluginError(f"{self.folder} cannot be made: {error}; name another folder with --out") from error
        self._fd: int | None = self._lock()
        try:
            state = self._read() if unfinished and resume else None
            if out.is_dir() and any(out.iterdir()) and not force and not self._was_published(state):
                if not unfinished:
                    shutil.rmtree(self.folder)
                raise OptionError("out", f"--out {out} is not empty: name another folder, or replace it with --force")
            #: Whether a run before this one did all but remove its folder.
            self.published = self._was_published(state)
            self.done: dict[str, dict[str, str]] = {} if state is None else self._sound(state["stages"])
            if self.published:
                return
            if state is None:
                self._clear()
            for leftover in [*self.folder.glob(".*.partial"), *self.artifact.glob(".*.partial")]:
                leftover.unlink()
            self.artifact.mkdir(exist_ok=True)
            self._write()
        except BaseException:
            self.close()
            raise

    def finish(self, stage: str, files: Sequence[Path]) -> None:
        """Note that a stage is done and made these files."""
        self.done[stage] = {str(file.relative_to(self.folder)): sha256(file) for file in files}
        self._write()

    def publish(self) -> None:
        """Make ``artifact`` the folder ``out``: at no time is there a half of it under that name."""
        replaced = self.folder / "replaced"
        if not self.published:
            if self.out.is_dir() and any(self.out.iterdir()):
                if replaced.exists():
                    shutil.rmtree(replaced)
                os.rename(self.out, replaced)
            try:
                os.rename(self.artifact, self.out)
            except OSError:
                if replaced.exists() and not self.out.exists():
                    os.rename(replaced, self.out)
                raise
        self.close()
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Remove the unfinished run."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others have the folder."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _was_published(self, state: Mapping[str, Any] | None) -> bool:
        """Whether the run was interrupted after its artifact had got its name."""
        return (
            state is not None
            and "picture" in state["stages"]
            and not self.artifact.exists()
            and (self.out / MANIFEST).exists()
        )

    def _read(self) -> dict[str, Any]:
        path = self.folder / _STATE
        try:
            state: dict[str, Any] = untrusted.load(path)
            before = state["identity"]
            stages = {name: dict(files) for name, files in state["stages"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PluginError(f"{path} is damaged: {error!r}; begin anew with --force") from error
        for name in sorted({*before, *self._identity}):
            if before.get(name) != self._identity.get(name):
                raise OptionError(
                    "resume",
                    f"{self.folder} was begun with {name}={before.get(name)!r}, now it is "
                    f"{self._identity.get(name)!r}: resume with the same, or begin anew with --force",
                )
        return {"identity": before, "stages": stages}

    def _sound(self, stages: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
        """The stages up to the first whose files are not what they were."""
        sound: dict[str, dict[str, str]] = {}
        for stage, files in stages.items():
            for name, wanted in files.items():
                path = self.folder / name
                if not path.is_file() or sha256(path) != wanted:
                    return sound
            sound[stage] = dict(files)
        return sound

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _write(self) -> None:
        write_json(self.folder / _STATE, {"identity": self._identity, "stages": [[k, v] for k, v in self.done.items()]})

    def _lock(self) -> int:
        """A file descriptor that holds the folder; a process that dies lets go of it."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if sys.platform == "win32":
            return fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise PluginError(f"{self.folder} is used by another process: wait for it, or name another --out") from (
                error
            )
        except OSError:  # a file system without locks
            return fd
        return fd

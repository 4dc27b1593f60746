"""How every command takes a store: as a URL such as ``sqlite:records.db``, or as the path alone."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from rich.console import Console

from attnhook.errors import AttnhookError, OptionError, PluginError
from attnhook.sinks.opening import open_sink

#: Endings of a path, and what a store of that name is.
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".db": "sqlite",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".parquet": "parquet",
}
_DATA_SET = "_attnhook.json"  # attnhook.sinks.dataset.MARKER, which cannot be imported without pyarrow
_COMPRESSED = (".zst", ".gz")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]+:")  # two letters or more: C: is a drive
_SQLITE = b"SQLite format 3\0"
_SAY = "x.jsonl, x.db, x/ (a folder: Parquet), or the kind in front, such as sqlite:x"


def readable(text: str, name: str = "store") -> str:
    """The URL of the store that a person named to be read: ``scheme:path`` as it is, or an existing path.

    A folder is ``parquet:``; of a file the first bytes decide, and where they do not (it is empty), its ending.
    ``name`` is the argument's, for the error. Raises OptionError where there is no such path or it is no store.
    """
    from attnhook.sinks.rotation import rotated_files

    path = _path(text, name)
    if path is None:
        return _with_scheme(text)
    if path.is_dir():
        return f"parquet:{text}"
    if path.is_file():
        return f"{_kind(path, text, name)}:{text}"
    if path.exists():
        raise OptionError(name, f"{text} is neither a file nor a folder, so it is no store: name {_SAY}")
    if ENDINGS.get(path.suffix) == "jsonl" and rotated_files(path):
        return f"jsonl:{text}"  # the sink has just given the file another name
    raise OptionError(name, f"{text!r} is no store: there is no such file or folder; name one that is there: {_SAY}")


def writable(text: str, name: str = "out") -> str:
    """The URL of the sink that a person named to be written to: ``scheme:config`` as it is, or a path.

    The ending of the path decides, of an existing file with another ending its first bytes. ``name`` is the
    argument's, for the error. Raises OptionError where neither tells the kind of store.
    """
    from attnhook.sinks import config

    path = _path(text, name)
    if path is None:
        return _with_scheme(text)
    if path.suffix in _COMPRESSED:
        raise OptionError(
            name,
            f"{text}: no store is written compressed from the start: name {path.with_suffix('').name}, or "
            "jsonl:records.jsonl?rotate=64MB&zstd=1, which compresses what it rotates",
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OptionError(name, f"cannot write {text}: it is a device or a pipe: name {_SAY}")
    if path.is_dir() and any(path.iterdir()) and not (path / _DATA_SET).exists():
        raise OptionError(name, f"cannot write {text}: it is a folder that holds other things: name {_SAY}")
    if path.is_dir() or config.split(text)[0].endswith("/"):
        return f"parquet:{text}"
    if path.suffix in ENDINGS:
        return f"{ENDINGS[path.suffix]}:{text}"
    if path.is_file() and path.stat().st_size:
        return f"{_kind(path, text, name)}:{text}"
    raise OptionError(name, f"{text}: its name does not tell what kind of store it is: name {_SAY}")


def kept(text: str, name: str = "out") -> str:
    """`writable`, for a command whose records must outlive it.

    Raises PluginError for a scheme that no sink has, OptionError for ``memory:``.
    """
    from attnhook.plugins import manager as plugins

    url = writable(text, name)
    scheme, colon, _ = url.partition(":")
    known = plugins.sink_classes()
    if not colon or scheme not in known:
        schemes = ", ".join(f"{one}:" for one in known)
        raise PluginError(f"unknown sink {text!r}: name {_SAY}; the kinds are {schemes}")
    if scheme == "memory":
        raise OptionError(name, f"--{name} memory: keeps nothing when the command ends: name {_SAY}")
    return url


def try_options(url: str) -> None:
    """Open a sink like this one in a folder that is thrown away, and so make nothing in its own place.

    Raises what `attnhook.sinks.open_sink` does for the options that the URL has. One that is not on this machine is
    left alone.
    """
    from attnhook.sinks import config

    path = local_path(url)
    if path is None:
        return
    scheme, _, rest = url.partition(":")
    shown, options = config.split(rest)
    with tempfile.TemporaryDirectory(prefix="attnhook-") as folder:
        trial = str(Path(folder) / "records")
        try:
            open_sink(f"{scheme}:{config.join(trial, options)}").close()
        except AttnhookError as error:
            raise type(error)(*_same_but_for(error, trial, shown)) from error


def _same_but_for(error: AttnhookError, trial: str, shown: str) -> list[str]:
    """The arguments that make an error anew, about the path that a person knows."""
    message = str(error).replace(trial, shown)
    return [error.field, message] if isinstance(error, OptionError) else [message]


def tell_sink_is_in(what: str, url: str) -> None:
    """Tell on stderr that the attention sink could not be left out of what was made of a store."""
    Console(stderr=True).print(
        f"the attention sink is part of this {what}: {url} does not tell the rows' attention on position 0 (attnhook "
        "before 0.2, or JSON lines of several layers that are not in mode 'raw'); see docs/discovery.md",
        style="yellow",
        soft_wrap=True,
    )


def local_path(url: str) -> Path | None:
    """The file or folder of this machine that a URL of `readable` or `writable` names; None where it names none."""
    from attnhook.sinks import config
    from attnhook.store.base import SCHEMES

    scheme, _, rest = url.partition(":")
    path = config.split(rest)[0]
    return None if scheme not in SCHEMES or path in ("", "-") or "://" in path else Path(path).expanduser()


def _path(text: str, name: str) -> Path | None:
    """The path that ``text`` is; None where it begins with a scheme."""
    from attnhook.sinks import config

    if not text.strip():
        raise OptionError(name, f"the name of the store is empty: give {_SAY}")
    plain = Path(config.split(text)[0]).expanduser()
    return None if _SCHEME.match(text) and not plain.exists() else plain


def _with_scheme(text: str) -> str:
    return f"parquet:{text}" if text.startswith("s3://") else text


def _kind(path: Path, text: str, name: str) -> str:
    """What an existing file holds, by its first bytes; where it has none, by its ending."""
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
    except OSError as error:
        raise OptionError(name, f"{text} cannot be read: {error.strerror}; change its permissions") from error
    if begin.startswith(_SQLITE):
        return "sqlite"
    if begin.lstrip().startswith(b"{") or path.suffix == ".zst":
        return "jsonl"
    kind = ENDINGS.get(path.suffix)
    if kind in ("jsonl", "sqlite"):
        return kind  # its reader says what is wrong with it
    raise OptionError(
        name, f"{text} is no store: it is neither SQLite nor lines of JSON, and begins {begin[:20]!r}; name {_SAY}"
    )

"""The switch ``ATTNHOOK``, what kind of process this is, and what becomes of a start-up that cannot be.

attnhook ends no process of a user: what it cannot do there it refuses in the log. Only a command that serves an
engine ends, since a server that was asked to capture must not serve without. This module imports next to nothing:
every Python process asks it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Set in the process of a server's command, for the workers that it starts.
SERVING = "_ATTNHOOK_SERVING"

_PROGRAMS = ("vllm", "sglang")  # with `serve`
_MODULES_WITH_SERVE = ("vllm", "vllm.entrypoints.cli.main", "sglang", "sglang.cli.main")
_MODULES = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.grpc_server", "sglang.launch_server")
_WITH_VALUE = "cmWX"  # Python's own options that take one

plugins_commands: set[str] = set()  #: modules and programs that serve the engines of plugins
starting = False  # whether `install` runs because of the switch; its engines' later faults are refused, not raised
told: set[str] = set()  #: refusals that the log has


def fault(environ: Mapping[str, str] | None = None) -> str | None:
    """What is wrong with ``ATTNHOOK``, or None: it must be unset, empty, 0 or 1."""
    value = (os.environ if environ is None else environ).get("ATTNHOOK", "")
    return None if value in ("", "0", "1") else f"ATTNHOOK={value!r}: set it to 1 to turn attnhook on, or unset it"


def serving(command: Sequence[str] | None = None) -> bool:
    """Whether this process serves an engine: the command that does, or a worker that such a command started.

    ``command`` is a whole command line; default: this process's own (`sys.orig_argv`).
    """
    if command is None and os.environ.get(SERVING) == "1":
        return True
    words = [*(sys.orig_argv if command is None else command)][1:]
    while words:
        word = words.pop(0)
        if word == "--check-hash-based-pycs":
            del words[:1]
        elif word == "-" or not word.startswith("-"):
            program = os.path.basename(word).removesuffix(".exe")
            return program in plugins_commands or (program in _PROGRAMS and words[:1] == ["serve"])
        elif not word.startswith("--"):
            place = next((place for place, option in enumerate(word) if option in _WITH_VALUE), None)
            if place is None:
                continue
            value = word[place + 1 :] or (words.pop(0) if words else "")
            if word[place] == "m":
                name = value.removesuffix(".__main__")
                return (
                    name in _MODULES
                    or name in plugins_commands
                    or (name in _MODULES_WITH_SERVE and words[:1] == ["serve"])
                )
            if word[place] == "c":
                return False
    return False


def refuse(error: Exception) -> None:
    """A start-up failed: end a server's process with the reason and status 2, tell it in any other's log, once."""
    from attnhook.errors import AttnhookError

    expected = isinstance(error, AttnhookError)
    if serving():
        print(f"attnhook: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    if str(error) not in told:
        told.add(str(error))
        import logging

        logging.getLogger("attnhook").error(
            "attnhook is off in this process: %s", error, exc_info=None if expected else error
        )

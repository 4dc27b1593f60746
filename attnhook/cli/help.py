"""What ``attnhook -h`` and the help of each command show: the order of use, and an example each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

#: Every command in the order of use: what it does, in one line, and an example.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": (
        "Answer a prompt and show where each token looked.",
        'attnhook run "What is the capital of France?" --html report.html',
    ),
    "verify": ("Check versions, hooks and numbers; for bug reports.", "attnhook verify"),
    "probe": ("Run prompts that excite known kinds of attention.", "attnhook probe --prompt-rows --out probes.db"),
    "session": (
        "One request over its tokens: hubs, layers, zones.",
        "attnhook session probes.db probe/brackets/brackets-00",
    ),
    "calibrate": ("Fit and judge the zones' thresholds by probes.", "attnhook calibrate probes.db --out calibration"),
    "discover": (
        "Map a store's fingerprints and find their clusters.",
        "attnhook discover probes.db --out map --without-sink sink",
    ),
    "compare": (
        "Compare two models, dtypes, engines or times.",
        "attnhook compare before.db after.db --out comparison",
    ),
    "drift": (
        "Tell when attention is not as it was.",
        "attnhook drift fit good.db --out baseline.npz",
    ),
    "drift fit": ("Fit a baseline of requests as they should be.", "attnhook drift fit good.db --out baseline.npz"),
    "drift check": (
        "Check a store's requests against a baseline.",
        "attnhook drift check today.db --baseline baseline.npz",
    ),
    "sinks": ("List, try, copy and clear the places for records.", "attnhook sinks convert records.jsonl records.db"),
    "sinks list": ("The sinks that are installed here.", "attnhook sinks list"),
    "sinks test": ("Write a record, read it back, delete it.", "attnhook sinks test records.db"),
    "sinks convert": (
        "Copy every record of a store into another.",
        "attnhook sinks convert records.jsonl records.db",
    ),
    "sinks prune": ("Remove records that are too old.", "attnhook sinks prune records.db --keep-days 30"),
    "collect": ("Gather the records of running servers.", "attnhook collect --store records.db"),
    "monitor": ("Watch a collector live.", "attnhook monitor --url http://127.0.0.1:9002"),
    "model-path": ("Print the folder of the default model.", "attnhook model-path"),
}


def dress(group: Any) -> Any:
    """Give a Typer application's Click group its order, summaries and examples; returns it."""
    _dress(group, "")
    return group


def usage_error(error: Any, words: Sequence[str]) -> str:
    """A wrong call as one line: what is wrong, how it is meant, where there is more; ``words`` are what was typed."""
    said = " ".join(error.format_message().split()).rstrip(".")
    value = _value(getattr(error, "param", None), words)
    if value is not None and value not in said:
        said += f": {value!r}"
    context = error.ctx
    if context is None:
        return said
    path = _path(context)
    if "unexpected extra argument" in said and path == "run":
        said += ": put the prompt in quotes"
    more = f"{' '.join(['attnhook', *path.split()])} -h tells more"
    known = COMMANDS.get(path)
    if known is None or getattr(context.command, "commands", None):
        return f"{said}; {more}"
    return f"{said}; for example: {known[1]} ({more})"


def _value(option: Any, words: Sequence[str]) -> str | None:
    """What was given for an option."""
    for name in getattr(option, "opts", ()):
        for word, after in zip(words, [*words[1:], None], strict=False):
            if word == name or word.startswith(f"{name}="):
                return after if word == name else word.partition("=")[2]
    return None


def _path(context: Any) -> str:
    names = []
    while context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(reversed(names))


def _dress(command: Any, path: str) -> None:
    pieces = command.collect_usage_pieces
    command.collect_usage_pieces = lambda context: [piece.strip("{}") for piece in pieces(context)]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.get_help_record = _without_type(parameter.get_help_record)
    inner = getattr(command, "commands", None)
    examples = [COMMANDS[path][1]] if path in COMMANDS else []
    if inner:
        order = [name for name in COMMANDS if " ".join(name.split()[:-1]) == path]
        names = [name.split()[-1] for name in order]
        ranked = sorted(inner, key=lambda name: names.index(name) if name in names else len(names))
        command.commands = {name: inner[name] for name in ranked}
        examples = [COMMANDS[name][1] for name in order]
        for name, one in command.commands.items():
            _dress(one, f"{path} {name}".strip())
    if path in COMMANDS:
        command.short_help = COMMANDS[path][0]
    # \b: the lines stay as they are
    command.epilog = "\b\nExample:\n" if len(examples) == 1 else "\b\nExamples:\n"
    command.epilog += "\n".join(f"  {example}" for example in examples)


def _without_type(record: Callable[[Any], tuple[str, str] | None]) -> Callable[[Any], tuple[str, str] | None]:
    """An argument's line of help with its name alone: Typer adds the type of the Python variable."""

    def plain(context: Any) -> tuple[str, str] | None:
        found = record(context)
        return None if found is None else (found[0].partition(" <")[0], found[1])

    return plain

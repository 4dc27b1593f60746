"""The server options as flags of an engine's own command line."""

from __future__ import annotations

import argparse
import os
from typing import Any

from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.policy import FLAGS, Policy


class _SetVariable(argparse.Action):
    """Hands a flag's value to every process that the server starts, as the variable that ``const`` names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = not (option_string or "").startswith("--no-")
        os.environ[self.const] = str(int(values) if isinstance(values, bool) else values)
        try:
            RequestOptions.resolve()
            Policy.from_environ()
        except OptionError as error:
            parser.error(f"{self.option_strings[0]}: {error}")
        self.keep(namespace, values)

    def keep(self, namespace: Any, value: Any) -> None:
        """Among the arguments too, as any flag."""
        setattr(namespace, self.dest, value)


class _SetSecret(_SetVariable):
    """As a secret stays out of the arguments, which engines log."""

    def keep(self, namespace: Any, value: Any) -> None:
        """The default stays."""


def add_flags(parser: Any) -> None:
    """Add `FLAGS` to an argument parser, in a group of their own."""
    group = parser.add_argument_group(title="attnhook", description="Exact attention in replies (ATTNHOOK=1).")
    for flag in FLAGS:
        names = [flag.flag]
        action = _SetSecret if flag.secret else _SetVariable
        settings: dict[str, Any] = {"action": action, "const": flag.variable, "help": flag.help}
        if flag.kind is bool:
            names.append("--no-" + flag.flag[2:])
            settings["nargs"] = 0
        else:
            settings["type"] = flag.kind
        group.add_argument(*names, default=None, **settings)

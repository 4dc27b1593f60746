"""The command line: ``verify`` and ``model-path``; the other commands are in modules of their own."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from attnhook import __version__
from attnhook.cli import calibrate as calibrate_command
from attnhook.cli import collect as collector_commands
from attnhook.cli import compare as compare_command
from attnhook.cli import discover as discover_command
from attnhook.cli import drift as drift_commands
from attnhook.cli import help as cli_help
from attnhook.cli import options as cli_options
from attnhook.cli import probe as probe_command
from attnhook.cli import run as run_command
from attnhook.cli import session as session_command
from attnhook.cli.progress import progress
from attnhook.cli.sinks import app as sinks_app
from attnhook.errors import AttnhookError
from attnhook.system.addresses import scrubbed

_INTERRUPTED = 130  # what shells give a command that Ctrl-C ended
_UsageError: Any = typer.BadParameter.__base__  # Click's, or Typer's own copy of it

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Shows what a language model attends to: exactly, per token.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: attnhook's own errors and wrong usage become one line and exit status 2."""
    try:
        status = cli_help.dress(typer.main.get_command(app))(standalone_mode=False)
    except AttnhookError as error:
        # whoever wrote the message: no password or token of an address that was given to this command is printed
        given = [*sys.argv[1:], *os.environ.get("ATTNHOOK_SINKS", "").split(",")]
        print(
            f"error: {scrubbed(str(error), *(word for word in given if ':' in word and ' ' not in word))}",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    except _UsageError as error:
        if len(sys.argv) == 1 or type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # the help
        else:
            print(f"error: {cli_help.usage_error(error, sys.argv[1:])}", file=sys.stderr)
        raise SystemExit(2) from error
    except typer.Abort as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from error
    if status == _INTERRUPTED:  # Typer's newer way of telling it
        print("interrupted", file=sys.stderr)
    raise SystemExit(status)


def _show_version(value: bool) -> None:
    if value:
        print(f"attnhook {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Shows what a language model attends to: exactly, per token."""


run_command.register(app)


@app.command()
def verify(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Check on this model (default: SmolLM2-135M-Instruct); with --url, a served name."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Check this server, such as http://127.0.0.1:8000/v1, in place of this process."
        ),
    ] = None,
    api_key: cli_options.ApiKey = None,
    attention_key: cli_options.AttentionKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, engines and hooks, check the numbers against eager attention, and give a verdict.

    With --url: check a running server's answers, streamed and whole, and what it finds when it checks itself.
    """
    cli_options.check_place(url, here={}, there={"api-key": api_key, "attention-key": attention_key})
    if url is None:
        from attnhook.verify import local as checks

        with progress("checking", measured=False):
            report = checks.run(model)
    else:
        from attnhook.verify import server as servercheck

        with progress("checking the server", measured=False):
            report = servercheck.run(url, model=model, api_key=api_key, attention_key=attention_key)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report.to_text())
    if not report.ok:
        raise typer.Exit(1)


probe_command.register(app)
discover_command.register(app)
session_command.register(app)
calibrate_command.register(app)
compare_command.register(app)
drift_commands.register(app)
app.add_typer(sinks_app, name="sinks")
collector_commands.register(app)


@app.command("model-path")
def model_path() -> None:
    """Print the folder of the default model; the first time, convert it (about 20 seconds)."""
    from attnhook.backends.transformers import default_model

    with progress("converting the default model, which is done once", measured=False):
        path = default_model.default_model_path()
    print(path)

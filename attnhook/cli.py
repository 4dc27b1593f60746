"""The command line: ``run``, ``verify`` and ``model-path``; the other commands are in modules of their own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attnhook import __version__, cli_options
from attnhook.analysis import session_cli as session_command
from attnhook.analysis.calibration import cli as calibrate_command
from attnhook.analysis.compare import cli as compare_command
from attnhook.analysis.drift import cli as drift_commands
from attnhook.analysis.manifold import cli as discover_command
from attnhook.cli_sinks import app as sinks_app
from attnhook.collector import cli as collector_commands
from attnhook.errors import AttnhookError, OptionError
from attnhook.options import CaptureOptions, parse_heads, parse_layers
from attnhook.probing import cli as probe_command

DEFAULT_PROMPT = (
    "The brig Halcyon brought 212 barrels of olive oil from Lisbon. The schooner Marigold took salted cod to Bergen. "
    "What did the Halcyon bring, and from where?"
)

_UsageError: Any = typer.BadParameter.__base__  # Click's, or Typer's own copy of it

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Shows what a language model attends to: exactly, per token.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(sinks_app, name="sinks")

collector_commands.register(app)


def main() -> None:
    """Entry point: attnhook's own errors and wrong usage become one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except AttnhookError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except _UsageError as error:
        if len(sys.argv) == 1 or type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # the help
        else:
            print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except typer.Abort as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from error
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


@app.command()
def run(
    model: cli_options.Model = None,
    url: cli_options.Url = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: Annotated[str | None, typer.Option(help="Read the prompt from this file; - is standard input.")] = None,
    layers: cli_options.Layers = "last",
    heads: Annotated[str | None, typer.Option(help="Average over these query heads only, such as 0,3.")] = None,
    top_k: cli_options.TopK = 8,
    prompt_rows: Annotated[bool, typer.Option("--prompt-rows", help="Capture the prompt's tokens too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    dtype: cli_options.Dtype = "auto",
    device: cli_options.Device = None,
    api_key: cli_options.ApiKey = None,
    attention_key: cli_options.AttentionKey = None,
    out: Annotated[Path | None, typer.Option(help="Write the records to this file, one JSON object a line.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an interactive report to this one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the coloured answer.")] = False,
) -> None:
    """Answer a prompt and show where each generated token looked."""
    options: dict[str, Any] = {"layers": parse_layers("--layers", layers), "top_k": top_k, "prompt": prompt_rows}
    if heads is not None:
        options["heads"] = parse_heads("--heads", heads)
    CaptureOptions.resolve(options)  # before anything heavy is loaded
    if max_new_tokens < 1:
        raise OptionError("max_new_tokens", f"--max-new-tokens {max_new_tokens} must be at least 1")
    text = _prompt(prompt, file)
    if not text.strip():
        raise OptionError("prompt", "the prompt is empty: give some text with --prompt or --file")
    for path in (out, html):
        _check_output(path)
    if out is not None and html is not None and out.resolve() == html.resolve():
        raise OptionError("html", f"--out and --html both name {html}: name two files")

    if url is None:
        _only_with_url(api_key=api_key, attention_key=attention_key)
    for name, value in {"dtype": None if dtype == "auto" else dtype, "device": device}.items():
        if url is not None and value is not None:
            raise OptionError(name, f"--{name} cannot be used with --url: the server has its own; drop one")
    answer: Any
    if url is None:
        with _status("loading the model"):
            from attnhook.backends.transformers import runner

            loaded = runner.load(model, dtype, device)
        ids = runner.encode(loaded, text, chat=chat, max_new_tokens=max_new_tokens)
        with _progress("generating", max_new_tokens) as advance:
            answer = runner.answer(loaded, ids, max_new_tokens=max_new_tokens, progress=advance, **options)
    else:
        from attnhook.client import Client

        client = Client(url, api_key=api_key, attention_key=attention_key)
        with _status("asking the server"):
            answer = client.ask(text, model=model, max_new_tokens=max_new_tokens, chat=chat, **options)

    if out is not None:
        _write_records(out, answer.records)
    if html is not None:
        _write_report(html, answer, "Transformers" if url is None else answer.engine)
    if as_json:
        print(json.dumps(_as_json(answer)))
        return
    from attnhook import terminal

    terminal.show(answer, Console())
    for path in (out, html):
        if path is not None:
            print(f"wrote {path}")


@app.command()
def verify(
    model: Annotated[
        str | None,
        typer.Option(help="Check on this model (default: SmolLM2-135M-Instruct); with --url, a served name."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Check this server, such as http://127.0.0.1:8000/v1, in place of this process.")
    ] = None,
    api_key: cli_options.ApiKey = None,
    attention_key: cli_options.AttentionKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, engines and hooks, check the numbers against eager attention, and give a verdict.

    With --url: check a running server's answers, streamed and whole, and what it finds when it checks itself.
    """
    if url is None:
        _only_with_url(api_key=api_key, attention_key=attention_key)
        from attnhook import verify as checks

        with _status("checking"):
            report = checks.run(model)
    else:
        from attnhook import servercheck

        with _status("checking the server"):
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


@app.command("model-path")
def model_path() -> None:
    """Print the folder of the default model; the first time, convert it (about 20 seconds)."""
    from attnhook.backends.transformers.default_model import default_model_path

    print(default_model_path())


def _only_with_url(**options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise OptionError(name, f"--{name.replace('_', '-')} is for --url only; drop one")


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise OptionError("prompt", "--prompt and --file were both given: choose one")
    if prompt is not None:
        return prompt
    if file is None:
        return DEFAULT_PROMPT
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("file", f"--file {file}: cannot be read as UTF-8 text: {error}") from error


def _check_output(path: Path | None) -> None:
    """Find out before the model runs whether the file can be written."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        problem = "it is a folder: name a file in it"
    elif path.exists() and not path.is_file():
        problem = "it is a device or a pipe: name a file"
    elif not folder.is_dir():
        problem = f"the folder {folder} does not exist: create it first"
    elif not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        problem = "no permission to write there: choose another place"
    else:
        return
    raise OptionError("out", f"cannot write {path}: {problem}")


def _write_records(path: Path, records: list[Any]) -> None:
    """The whole file or none: written beside its place, then renamed."""
    from attnhook.sinks.jsonl import JsonlSink

    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    sink = JsonlSink()
    try:
        sink.open(str(scratch))
        sink.write(records)
        sink.close()
        scratch.replace(path)
    except OSError as error:
        raise AttnhookError(f"cannot write {path}: {error}; choose another place with --out") from error
    finally:
        scratch.unlink(missing_ok=True)


def _write_report(path: Path, answer: Any, engine: str) -> None:
    from attnhook.analysis import zones
    from attnhook.explorer import report

    report.write(
        report.Report(
            title=answer.model,
            subtitle=f"attnhook {__version__} on {engine} · {len(answer.records)} rows captured · "
            "zones leave out the attention sink at position 0",
            tokens=answer.tokens,
            prompt_length=answer.prompt_length,
            records=answer.records,
            zones=[zone.name for zone in answer.zones],
            zone_confidence=[zone.confidence for zone in answer.zones],
            zone_legend={name: (zones.COLOURS[name], zones.MEANINGS[name]) for name in zones.ZONE_NAMES},
        ),
        path,
    )


def _as_json(answer: Any) -> dict[str, Any]:
    from attnhook.records import fill_zones

    entries: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    fill_zones(answer.records)
    for record in answer.records:
        entries[record.is_prompt].append(record.to_dict())
    return {
        "model": answer.model,
        "text": answer.text,
        "tokens": answer.tokens,
        "token_ids": answer.token_ids,
        "prompt_length": answer.prompt_length,
        "attention_tokens": entries[False],
        "prompt_attention_tokens": entries[True],
        "dropped": dict(answer.dropped),
    }


@contextmanager
def _status(text: str) -> Iterator[None]:
    with Console(stderr=True).status(text):
        yield


@contextmanager
def _progress(text: str, total: int) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.update(task, completed=count)

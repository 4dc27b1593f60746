"""``attnhook run``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attnhook import __version__
from attnhook.cli import options as cli_options
from attnhook.cli import stores as cli_stores
from attnhook.cli.progress import progress
from attnhook.errors import AttnhookError, OptionError
from attnhook.options import CaptureOptions, parse_heads, parse_layers, parse_names, parse_ranges
from attnhook.plugins import manager as plugins
from attnhook.sinks.config import split
from attnhook.sinks.opening import open_sink

DEFAULT_PROMPT = (
    "The brig Halcyon brought 212 barrels of olive oil from Lisbon. The schooner Marigold took salted cod to Bergen. "
    "What did the Halcyon bring, and from where?"
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("run")(run)


def run(
    words: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt, in quotes; - is standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt, as an option.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from this file; - is standard input.")
    ] = None,
    model: cli_options.Model = None,
    url: cli_options.Url = None,
    layers: cli_options.Layers = "last",
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="HEADS", help='Average over these query heads only, such as 0,3, or {"12": [0, 3]} by layer.'
        ),
    ] = None,
    top_k: cli_options.TopK = 8,
    prompt_rows: Annotated[bool, typer.Option("--prompt-rows", help="Capture the prompt's tokens too.")] = False,
    rows: Annotated[
        str | None,
        typer.Option(metavar="RANGES", help="Capture these tokens of the prompt too, such as 0:4,180:196."),
    ] = None,
    per_head: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tell of every head too: fingerprint, sink, top, lse; commas between."),
    ] = None,
    top_k_per_head: Annotated[int, typer.Option(metavar="N", help="Positions of each head, 1 to 16.")] = 1,
    key_mass: Annotated[
        str | None,
        typer.Option(metavar="HEADS", help="Sum up how much attention each token gets: mean, or kv_head."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")] = 64,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    dtype: cli_options.Dtype = "auto",
    device: cli_options.Device = None,
    api_key: cli_options.ApiKey = None,
    attention_key: cli_options.AttentionKey = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Write the records to x.jsonl, anew, or add them to another store, such as x.db.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an interactive report to this one HTML file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the coloured answer.")] = False,
) -> None:
    """Answer a prompt and show where each generated token looked.

    Without a prompt it asks one of its own.
    """
    # whatever can be refused is refused before anything heavy is loaded
    options: dict[str, Any] = {"layers": parse_layers("--layers", layers), "top_k": top_k, "prompt": prompt_rows}
    if heads is not None:
        options["heads"] = parse_heads("--heads", heads)
        if isinstance(options["heads"], dict) and layers == "last":
            del options["layers"]  # those that have heads
    if rows is not None:
        options["rows"] = parse_ranges("--rows", rows)
    if per_head is not None:
        options |= {"per_head": parse_names(per_head), "top_k_per_head": top_k_per_head}
    if key_mass is not None:
        options["key_mass"] = key_mass
    CaptureOptions.resolve(options, plugins=plugins.variables)
    if max_new_tokens < 1:
        raise OptionError("max_new_tokens", f"--max-new-tokens {max_new_tokens} must be at least 1")
    cli_options.check_place(
        url, here={"dtype": dtype, "device": device}, there={"api-key": api_key, "attention-key": attention_key}
    )
    from attnhook.backends.transformers import runner

    runner.check_dtype(dtype)
    text = _prompt(words, prompt, file)
    sink = None if out is None else _Output(out)
    _check_file(html, "--html")
    if sink is not None and html is not None and sink.path is not None and sink.path.resolve() == html.resolve():
        raise OptionError("html", f"--out and --html both name {html}: name two files")

    answer: Any
    if url is None:
        answer = _from_model(model, dtype, device, text, chat=chat, max_new_tokens=max_new_tokens, options=options)
    else:
        from attnhook.client.client import Client

        client = Client(url, api_key=api_key, attention_key=attention_key)
        with progress("asking the server", measured=False):
            answer = client.ask(text, model=model, max_new_tokens=max_new_tokens, chat=chat, **options)

    if sink is not None:
        sink.write(answer.records)
    if html is not None:
        _write_report(html, answer, "Transformers" if url is None else answer.engine)
    if as_json:
        print(json.dumps(_as_json(answer)))
        return
    from attnhook.cli import terminal

    terminal.show(answer, Console())
    for written in (out, html):
        if written is not None:
            print(f"wrote {written}")


def _from_model(
    model: str | None,
    dtype: str,
    device: str | None,
    text: str,
    *,
    chat: bool,
    max_new_tokens: int,
    options: dict[str, Any],
) -> Any:
    """The answer of a model on this machine; what its files tell is checked before it is loaded."""
    from attnhook.backends.transformers import model_files, runner

    wanted = CaptureOptions.resolve(options, plugins=plugins.variables).request
    ids: list[int] = []
    with progress(model_files.work(model), measured=False):
        model_files.limits(model).check(wanted.layers, wanted.heads, max_new_tokens)
        loaded = runner.load(
            model,
            dtype,
            device,
            before=lambda reader: ids.extend(runner.encode(reader, text, chat=chat, max_new_tokens=max_new_tokens)),
        )
    with progress("generating", max_new_tokens) as work:
        return runner.answer(loaded, ids, max_new_tokens=max_new_tokens, progress=work.tell, **options)


def _prompt(words: str | None, prompt: str | None, file: str | None) -> str:
    """The text of the one way in which a prompt was given."""
    given = {"a prompt": words, "--prompt": prompt, "--file": file}
    both = [name for name, value in given.items() if value is not None]
    if len(both) > 1:
        raise OptionError("prompt", f"{' and '.join(both)} were both given: choose one")
    text = _read(words, prompt, file)
    if not text.strip():
        raise OptionError("prompt", f"the prompt is empty: give some text{_other_way(words, prompt, file)}")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise OptionError("prompt", f"the prompt {text[:20]!r} is not UTF-8: encode it so, or give a file of it")
    return text


def _read(words: str | None, prompt: str | None, file: str | None) -> str:
    if words == "-":
        file, words = words, None
    if file is None:
        text = words if words is not None else prompt
        return DEFAULT_PROMPT if text is None else text
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("file", f"--file {file}: cannot be read as UTF-8 text: {error}") from error


def _other_way(words: str | None, prompt: str | None, file: str | None) -> str:
    """Where else a prompt could come from than from where an empty one came."""
    if file is not None or words == "-":
        return ' there, or as attnhook run "PROMPT"'
    return " in quotes, or a file of it with --file"


class _Output:
    """Where ``--out`` puts the records: a plain file of lines is written anew, any other store gets them added."""

    def __init__(self, text: str) -> None:
        """Raises AttnhookError where nothing can be written there, and makes nothing."""
        self._url = cli_stores.kept(text)
        self.path = cli_stores.local_path(self._url)
        if self._url.startswith("jsonl:-"):
            raise OptionError("out", f"--out {text} would mix records with the answer: name a file, or give --json")
        scheme, _, config = self._url.partition(":")
        self._whole = scheme == "jsonl" and self.path is not None and not split(config)[1]
        if self.path is None or (self.path.exists() and not self._whole):
            open_sink(self._url).close()  # refuses what is no store
        else:
            _check_file(self.path, "--out")
            cli_stores.try_options(self._url)

    def write(self, records: list[Any]) -> None:
        if self._whole and self.path is not None:
            _write_records(self.path, records)
            return
        try:
            with closing(open_sink(self._url)) as sink:
                sink.write(records)
        except OSError as error:
            raise AttnhookError(f"cannot write {self._url}: {error}; choose another place with --out") from error


def _check_file(path: Path | None, option: str) -> None:
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
    raise OptionError(option.removeprefix("--"), f"{option}: cannot write {path}: {problem}")


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
    from attnhook.explorer import report
    from attnhook.record import zones

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
    from attnhook.record.token_record import fill_zones

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
        **({} if answer.key_mass is None else {"attention_key_mass": answer.key_mass.to_list()}),
    }

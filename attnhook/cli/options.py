"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from attnhook.errors import OptionError

Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder, .gguf file or hub id (default: SmolLM2-135M-Instruct); with --url, a served name.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ask this server, such as http://127.0.0.1:8000/v1, in place of a local model."),
]
Layers = Annotated[
    str, typer.Option(metavar="LAYERS", help="last, auto (four over the depth), all, or numbers such as 0,14,-1.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="N", help="Positions to keep per token and layer, 1 to 256.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
]
ApiKey = Annotated[str | None, typer.Option(metavar="KEY", help="The server's key. Default: OPENAI_API_KEY.")]
AttentionKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="The server's key for capture. Default: ATTNHOOK_API_KEY.")
]
Store = Annotated[
    str, typer.Argument(metavar="STORE", help="Where the records are: x.jsonl, x.db, a Parquet folder, or sqlite:x.")
]


def check_place(url: str | None, *, here: Mapping[str, object], there: Mapping[str, object]) -> None:
    """Refuse what only a server takes (``there``) without --url, and what only a local model takes (``here``) with it.

    Both are options by name, None or ``auto`` where they were not given. Raises OptionError.
    """
    for name, value in there.items() if url is None else here.items():
        if value not in (None, "auto"):
            why = "is for --url only" if url is None else "cannot be used with --url: the server has its own"
            raise OptionError(name, f"--{name} {why}; drop one")

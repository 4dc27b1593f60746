"""examples/tinyserve: a server engine of somebody else's, with a plugin made of the public names alone.

Its processes are real, and so are SmolLM2's weights; every record is compared with Transformers' eager attention.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnhook.plugins
import attnhook.serving
from tests import oracle
from tests.backends.servers import Server, free_port, running
from tests.backends.vllm.engine import ALL, check, from_entry
from tests.cli.test_run import command
from tests.helpers import LAYERS, ROOT, byte_tokenizer, environment, tiny_model
from tests.plugins.installing import installed

PACKAGE = ROOT / "examples" / "tinyserve"
PUBLIC = {"attnhook", "attnhook.errors", "attnhook.options", "attnhook.plugins", "attnhook.serving"}
KEY = "open sesame"
FINGERPRINTS = {"return_attention_tokens": True, "attention_mode": "fingerprint"}
TEXTS = (
    "The brig Halcyon brought 212 barrels of olive oil from Lisbon. " * 8,  # more tokens than one pass computes
    "The capital of France is",
    "One, two, three, four, five, six, seven, eight,",
    "Once upon a time there was a lighthouse keeper who",
)


# -- what it is made of


def _imports(folder: str) -> list[tuple[str, list[str]]]:
    """Module and names of every import in a folder of the example."""
    found = []
    for path in sorted((PACKAGE / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(alias.name, []) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level and node.module
                found.append((node.module, [alias.name for alias in node.names]))
    return found


def test_the_plugin_is_made_of_public_names():
    given = {"attnhook.plugins": attnhook.plugins.__all__, "attnhook.serving": attnhook.serving.__all__}
    ours = [(module, names) for module, names in _imports("tinyserve_attnhook") if module.split(".")[0] == "attnhook"]
    assert len(ours) >= 8
    for module, names in ours:
        assert module in PUBLIC
        assert set(names) <= set(given.get(module, names))


def test_the_engine_knows_nothing_of_attnhook():
    assert not [module for module, _ in _imports("tinyserve") if "attnhook" in module]
    for path in (PACKAGE / "tinyserve").glob("*.py"):
        assert path.name == "__init__.py" or "attnhook" not in path.read_text(encoding="utf-8")


# -- a server of SmolLM2


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(PACKAGE, tmp_path_factory)


def _environment(site: Path, **environ: str) -> dict[str, str]:
    found = environment(ATTNHOOK="1", HF_HUB_OFFLINE="1", **environ)
    return {**found, "PYTHONPATH": os.pathsep.join((str(site), found["PYTHONPATH"]))}


@contextlib.contextmanager
def _serve(site: Path, folder: Path, model: str, *arguments: str, **environ: str) -> Iterator[Server]:
    port = free_port()
    argv = ["tinyserve", model, "--port", str(port), "--served-model-name", "it", *arguments]
    with running(argv, port, folder / "server.log", _environment(site, **environ)) as server:
        yield server


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "records.jsonl"


@pytest.fixture(scope="module")
def server(
    site: Path, smol_path: str, records_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("smol")
    settings = {"ATTNHOOK_SINKS": f"jsonl:{records_file}?tokens=1", "ATTNHOOK_MAX_CONCURRENT": str(len(TEXTS))}
    with _serve(site, folder, smol_path, **settings) as server:
        yield server


def _ask(server: Server, prompt: Any, new: int, fields: dict[str, Any], **headers: str) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, reply = server.post("/v1/completions", {**body, **fields}, **headers)
    assert status == 200, reply
    choice = reply["choices"][0]
    return {**choice, "id": reply["id"], "usage": reply["usage"]}


@pytest.fixture(scope="module")
def answers(server: Server) -> list[dict[str, Any]]:
    """What is answered to all texts at the same time."""
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        return list(pool.map(lambda text: _ask(server, text, 6, ALL), TEXTS))


@pytest.mark.slow
@pytest.mark.model
def test_requests_that_share_passes_get_each_its_own_exact_records(answers, smol, tokenizer):
    assert len(tokenizer(TEXTS[0])["input_ids"]) > 2 * 64  # its prompt is computed in three passes, beside the others'
    for text, answer in zip(TEXTS, answers, strict=True):
        prompt = tokenizer(text)["input_ids"]
        assert "attention_error" not in answer and answer["usage"]["prompt_tokens"] == len(prompt)
        generated, before = (
            [from_entry(entry) for entry in answer[name]] for name in ("attention_tokens", "prompt_attention_tokens")
        )
        check(smol, prompt, answer["token_ids"], generated, before)


@pytest.mark.slow
@pytest.mark.model
def test_asking_changes_no_token_and_not_asking_brings_no_field(server, answers, smol, tokenizer):
    for text, asked in zip(TEXTS, answers, strict=True):
        plain = _ask(server, text, 6, {})
        assert plain["token_ids"] == asked["token_ids"] and plain["text"] == asked["text"]
        assert not [name for name in plain if "attention" in name]
    prompt = tokenizer(TEXTS[1], return_tensors="pt")
    told = smol.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert told.tolist() == answers[1]["token_ids"]  # tinyserve is the engine that it says it is


@pytest.mark.slow
@pytest.mark.model
def test_a_stream_brings_each_record_with_its_token(server, answers):
    body = {"prompt": TEXTS[2], "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **ALL}
    choices = [event["choices"][0] for event in server.events("/v1/completions", body)]
    assert [len(choice["token_ids"]) for choice in choices] == [1] * 6
    assert [[entry["decode_step"] for entry in choice["attention_tokens"]] for choice in choices] == [
        [n] for n in range(6)
    ]
    assert [("prompt_attention_tokens" in choice) for choice in choices] == [True, *[False] * 5]
    assert [token for choice in choices for token in choice["token_ids"]] == answers[2]["token_ids"]
    streamed = [from_entry(entry) for choice in choices for entry in choice["attention_tokens"]]
    for one, other in zip(streamed, map(from_entry, answers[2]["attention_tokens"]), strict=True):
        assert one.query_position == other.query_position
        assert np.abs(one.attention_scores - other.attention_scores).max() < 1e-5


@pytest.mark.slow
@pytest.mark.model
def test_sinks_get_what_replies_bring(answers, records_file, tokenizer):
    kept = [json.loads(line) for line in records_file.read_text(encoding="utf-8").splitlines()]
    for text, answer in zip(TEXTS, answers, strict=True):
        rows = [row for row in kept if row["request_id"] == answer["id"]]
        tokens = [*tokenizer(text)["input_ids"], *answer["token_ids"]]
        brought = [*answer["prompt_attention_tokens"], *answer["attention_tokens"]]
        assert [row["query_position"] for row in rows] == [entry["query_position"] for entry in brought]
        for row, entry in zip(rows, brought, strict=True):
            assert row["query_token"] == tokens[row["query_position"]]
            assert row["model"] == "it"
            assert set(row["layers"]) == set(entry["layers"])
            assert row["layers"]["29"]["token_positions"] == entry["layers"]["29"]["token_positions"]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top_k_attention": 9999}, "top_k_attention"),
        ({"attention_layers": [30]}, "attention_layers"),
        ({"attention_heads": [9]}, "attention_heads"),
        ({"attention_layer": "all"}, "attention_layer"),
        ({"attention_spans": {"far": [4000, 4001]}}, "attention_spans"),  # shown by the tokenized prompt alone
        ({"return_attention_tokens": "yes"}, "return_attention_tokens"),
    ],
)
def test_a_bad_field_is_named(server, fields, named):
    status, reply = server.post(
        "/v1/completions", {"prompt": "Hello", "max_tokens": 4, "return_attention_tokens": True, **fields}
    )
    assert (status, reply["error"]["param"]) == (400, named)
    assert named in reply["error"]["message"]


@pytest.mark.slow
@pytest.mark.model
def test_streams_that_clients_leave_give_back_their_places_and_pages(server):
    body = {"prompt": TEXTS[1], "max_tokens": 1900, "ignore_eos": True, "stream": True, **FINGERPRINTS}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode())
    streams = [urllib.request.urlopen(request, timeout=30) for _ in TEXTS]  # of all 512 pages 480
    for stream in streams:
        assert stream.readline().startswith(b"data: ")
    short = {"prompt": TEXTS[1], "max_tokens": 2, **FINGERPRINTS}
    status, reply = server.post("/v1/completions", short)
    assert status == 429 and "4 requests are capturing already" in reply["error"]["message"]
    for stream in streams:
        stream.close()
    until = time.monotonic() + 20  # all answers would take minutes
    while server.post("/v1/completions", short)[0] == 429:
        assert time.monotonic() < until
        time.sleep(0.1)
    began = time.monotonic()
    _ask(server, list(range(1, 701)), 1, {})  # which needs 44 pages
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.model
def test_it_says_what_it_can(server):
    told = server.get("/v1/attention/capabilities")
    assert told["engine"] == {"name": "tinyserve", "version": "1.0"}
    assert (told["model"], told["layers"], told["query_heads"]) == ("it", list(range(30)), 9)
    assert (told["dtype"], told["device"]) == ("float32", "cpu")


@pytest.mark.slow
@pytest.mark.model
def test_verify_finds_nothing_wrong_with_it(server):
    ran = command("verify", "--url", server.url + "/v1")
    assert ran.code == 0, ran.out
    assert "FAILED" not in ran.out and "12 tokens x 30 layers" in ran.out


# -- tensor parallelism, with a model whose heads divide


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Folder of a random Llama, and the model."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(vocab_size=256, initializer_range=0.5)  # heads that look somewhere
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder), model


def _tiny_answers(server: Server, prompts: list[list[int]]) -> list[dict[str, Any]]:
    fields = {**ALL, "attention_self_check": True}
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: _ask(server, prompt, 8, fields, **{"X-Attention-Key": KEY}), prompts))


@pytest.mark.slow
def test_two_ranks_give_the_records_of_one_and_of_eager_attention(site, tiny, tmp_path):
    folder, model = tiny
    prompts = [[(7 * i + 3 * j) % 250 for i in range(length)] for j, length in enumerate((5, 40, 100))]
    found, parts, silent = [], [], []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def start(ranks: int) -> Server:
            here = tmp_path / str(ranks)
            here.mkdir()
            settings = {"ATTNHOOK_CAPTURE_ALL": "fingerprint", "ATTNHOOK_SINKS": f"jsonl:{here}/records.jsonl"}
            if ranks == 1:
                settings["ATTNHOOK_API_KEY"] = KEY
            arguments = [] if ranks == 1 else ["--tensor-parallel", "2", "--attention-tokens-api-key", KEY]
            return stack.enter_context(_serve(site, here, folder, *arguments, **settings))

        for server in pool.map(start, (1, 2)):
            found.append(_tiny_answers(server, prompts))
            part = {**ALL, "attention_heads": [1, 2], "attention_spans": {"first": [0, 9]}}  # one head of each rank
            parts.append(_ask(server, prompts[1], 4, part, **{"X-Attention-Key": KEY})["attention_tokens"])
            bare = {"prompt": "Hello", "max_tokens": 2, "return_attention_tokens": True}
            status, reply = server.post("/v1/completions", bare)
            assert status == 403 and "X-Attention-Key" in reply["error"]["message"]
            status, _ = server.post("/v1/completions", bare, **{"X-Attention-Key": KEY})
            assert status == 200
            status, reply = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})
            assert status == 200 and not [name for name in reply["choices"][0] if "attention" in name]
            silent.append(reply["id"])
    for ranks, name in zip((1, 2), silent, strict=True):  # all traffic goes to the sinks, fingerprints alone
        kept = (tmp_path / str(ranks) / "records.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, kept) if row["request_id"] == name]
        assert [(row["query_position"], row["mode"]) for row in rows] == [(4, "fingerprint"), (5, "fingerprint")]
    for one, two in zip(*parts, strict=True):
        assert [entry["layers"]["1"]["spans"]["first"] > 0 for entry in (one, two)] == [True, True]
        a, b = (from_entry(entry) for entry in (one, two))
        assert np.abs(a.fingerprints - b.fingerprints).max() < oracle.FEATURE
        assert abs(one["spans"]["first"] - two["spans"]["first"]) < oracle.FEATURE
    for prompt, one, two in zip(prompts, *found, strict=True):
        assert one["token_ids"] == two["token_ids"]
        for answer in (one, two):
            assert "attention_error" not in answer and answer["attention_self_check"]["max_error"] < 1e-4
            generated, before = (
                [from_entry(entry) for entry in answer[name]]
                for name in ("attention_tokens", "prompt_attention_tokens")
            )
            check(model, prompt, answer["token_ids"], generated, before, layers=LAYERS)
        a, b = (np.array([from_entry(entry).fingerprints for entry in x["attention_tokens"]]) for x in (one, two))
        assert np.abs(a - b).max() < oracle.FEATURE


@pytest.mark.slow
@pytest.mark.parametrize("broken", [True, False], ids=["hook point", "variable"])
def test_a_server_that_cannot_capture_does_not_serve(site, tiny, tmp_path, broken):
    there = tmp_path / "site"
    shutil.copytree(site, there)
    environ = {} if broken else {"ATTNHOOK_MAX_CONCURRENT": "many"}
    if broken:  # another release of tinyserve
        model = there / "tinyserve" / "model.py"
        model.write_text(model.read_text(encoding="utf-8").replace("attend(", "look("), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "tinyserve", tiny[0], "--port", str(free_port())],
        env=_environment(there, **environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2
    said = "tinyserve 1.0: Model.attend was not found" if broken else "ATTNHOOK_MAX_CONCURRENT='many' must be"
    assert run.stderr.startswith(f"attnhook: {said}")


@pytest.mark.slow
def test_heads_that_do_not_divide_are_refused(site, tiny):
    run = subprocess.run(
        [sys.executable, "-m", "tinyserve", tiny[0], "--tensor-parallel", "4"],
        env=_environment(site), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2
    assert "num_key_value_heads=2 does not divide by --tensor-parallel 4" in run.stderr

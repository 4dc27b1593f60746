"""``attnhook verify --url``: a server whose answers are right is right, and each wrong one is found.

No real server can be made to answer wrongly in all these ways, so a small one answers with records of random
attention and is then spoilt; the real one is in tests/backends/vllm/test_reasoning.py.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from attnhook.capture import rebuild
from attnhook.errors import OptionError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.verify import server as servercheck
from tests.backends.vllm.engine import free_port
from tests.cli.test_run import command, refused
from tests.client.test_client import CAPABILITIES, CHAT, GOOD, TEXT, error, server

PROMPT, LAYERS = 20, (3, 7)
TOLD = {
    "attnhook": "0.1.0",
    "schema_version": 1,
    "engine": {"name": "vllm", "version": "1"},
    "layers": list(LAYERS),
    "query_heads": 4,
    "dtype": "float32",
    "limits": {"fingerprint_only": False},
}
ERROR = 2e-6
NAMES: dict[str, list[Any]] = {  # of fields, with what may be asked for
    "top_k_attention": [servercheck.TOP_K],
    "attention_spans": [servercheck._SPANS],
    "attention_mode": ["raw", "fingerprint"],
    "attention_layers": ["all"],
    "attention_layer": [],
}
Answer = dict[str, Any]
Spoil = Callable[[Answer, bool], None]  # of a reply that has records; whether it will be streamed


@cache
def entries(mode: Any) -> list[Answer]:
    rng = np.random.default_rng(0)
    found = []
    for step in range(servercheck.NEW):
        p = PROMPT - 1 + step
        attention = rng.dirichlet(np.full(p + 1, 0.3), len(LAYERS))
        bins = [fp.bin_of(p - position) for position in range(p + 1)]
        histogram = np.stack([np.bincount(bins, row, fp.BINS) for row in attention])
        entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(axis=1) / np.log(p + 1)
        order = np.argsort(-attention, axis=1)[:, : servercheck.TOP_K].astype(np.int32)
        record = TokenRecord(
            "r", p, LAYERS, order, np.take_along_axis(attention, order, 1).astype(np.float32),
            fp.assemble(histogram, entropy), decode_step=step, mode=mode, span_names=("sink", "head", "rest"),
            span_mass=np.stack([attention[:, :1].sum(1), attention[:, :7].sum(1), attention[:, 7:].sum(1)], 1),
        )  # fmt: skip
        found.append(record.to_dict())
    return found


def reply(body: Answer, spoil: Spoil) -> tuple[int, Any]:
    """What a good server answers, then spoilt."""
    wrong = [name for name in body.keys() & NAMES.keys() if body[name] not in NAMES[name]]
    if wrong:
        return 400, {"error": {"message": f"{wrong[0]} is bad", "param": wrong[0]}}
    new = body["max_tokens"]
    choice: Answer = {"index": 0, "token_ids": list(range(100, 100 + new)), "text": "x"}
    if body.get("return_attention_tokens"):
        choice["attention_tokens"] = copy.deepcopy(entries(body.get("attention_mode", "raw")))
        choice["attention_self_check"] = {"max_error": ERROR}
    usage = {"prompt_tokens": PROMPT, "completion_tokens": new}
    whole = {"choices": [choice], "usage": usage}
    spoil(choice, bool(body.get("stream")))
    if not body.get("stream"):
        return 200, whole
    chunks: list[Answer] = []
    rows = choice.pop("attention_tokens", [])
    for i, token in enumerate(choice["token_ids"]):
        chunks.append({"choices": [{**choice, "token_ids": [token], "attention_tokens": rows[i : i + 1]}]})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, {"choices": [], "usage": usage}]]
    return 200, "".join([": hello\n\n", *lines, "data: [DONE]\n\n"]).encode()


def answers(spoil: Spoil = lambda choice, streamed: None, **told: Any) -> dict[tuple[str, str], Any]:
    def answer(body: Answer) -> tuple[int, Any]:
        return reply(body, spoil)

    return {**GOOD, CAPABILITIES: (200, {**TOLD, **told}), CHAT: answer, TEXT: answer}


def test_a_good_server() -> None:
    with server(answers()) as (url, asked):
        ran = command("verify", "--url", url, "--api-key", "k", "--attention-key", "a")
        headers = {name.lower(): value for name, value in asked[0][2].items()}
    assert ran.code == 0 and ran.complaints == "", ran.out
    assert headers["authorization"] == "Bearer k" and headers["x-attention-key"] == "a"
    assert ran.out.endswith("verdict\n  OK\n") and "FAILED" not in ran.out
    for part in ("vllm 1", "float32", "2.0e-06 (allowed 1e-03)", "12 tokens x 2 layers", "stream - whole"):
        assert part in ran.out, part
    with server(answers()) as (url, _):
        found = command("verify", "--url", url, "--json").json
    assert found["ok"] and not found["problems"] and found["server"]["model"] == "smol"


def test_a_server_without_chats_is_checked_by_its_text_completions() -> None:
    routes = {path: answer for path, answer in answers().items() if path != CHAT}
    with server(routes) as (url, _):
        ran = command("verify", "--url", url)
    assert ran.code == 0, ran.out
    assert re.search(r"chat completions +not checked: the server has no such route", ran.out)
    assert re.search(r"text completions +12 tokens x 2 layers", ran.out)


def test_a_server_without_any_completions_is_not_ok() -> None:
    routes = {path: answer for path, answer in answers().items() if path not in (CHAT, TEXT)}
    with server(routes) as (url, _):
        ran = command("verify", "--url", url)
    assert ran.code == 1 and "/v1/completions gives HTTP 404" in ran.out


def layer(choice: Answer, token: int = 4, number: str = "7") -> Answer:
    found: Answer = choice["attention_tokens"][token]["layers"][number]
    return found


def only_with_records(change: Callable[[Answer], None]) -> Spoil:
    def spoil(choice: Answer, streamed: bool) -> None:
        if choice.get("attention_tokens"):
            change(choice)

    return spoil


def shifted(choice: Answer) -> None:
    numbers = layer(choice)["fingerprint"]
    numbers[4:] = [*numbers[5:], numbers[4]]


def entry(**changes: Any) -> Callable[[Answer], None]:
    return lambda choice: choice["attention_tokens"][4].update(changes)


def inner(**changes: Any) -> Callable[[Answer], None]:
    return lambda choice: layer(choice).update(changes)


def item(name: str, at: Any, value: Any) -> Callable[[Answer], None]:
    return lambda choice: layer(choice)[name].__setitem__(at, value)


WRONG: list[tuple[Callable[[Answer], None], str]] = [
    (lambda choice: choice["attention_tokens"].pop(), "one entry for each token"),
    (lambda choice: choice.update(attention_tokens=[]), "records came"),
    (lambda choice: choice.update(attention_error="no such luck"), "records came"),
    (entry(query_position=PROMPT), "entries stand at their tokens"),
    (entry(decode_step=1), "entries stand at their tokens"),
    (entry(manifold="odd"), "the zone has a name"),
    (entry(schema_version=9), "entries can be read"),
    (lambda choice: choice["attention_tokens"][4]["layers"].pop("3"), "all layers are there"),
    (item("token_positions", 0, 500), "positions are different and not after the token"),
    (lambda c: item("token_positions", 0, layer(c)["token_positions"][1])(c), "positions are different"),
    (item("attention_scores", 0, 1.5), "scores are in [0, 1]"),
    (item("attention_scores", 0, 0.0), "scores descend"),
    (inner(topk_mass=0.1), "topk_mass is the sum of the scores"),
    (
        lambda c: layer(c).update({n: layer(c)[n][:-1] for n in ("token_positions", "attention_scores")}),
        "8 positions, or all of the mass",
    ),
    (item("fingerprint", 3, 1.5), "bins and entropy are in [0, 1]"),
    (item("fingerprint", 15, 0.01), "no mass before position 0"),
    (shifted, "bins hold the reported scores"),
    (item("fingerprint", 0, 0.9), "local, mid and long mass are sums of bins"),
    (item("spans", "head", 0.9), "span masses add up to the bins"),
    (lambda c: layer(c)["spans"].update(sink=0.5, head=layer(c)["spans"]["head"]), "the entry's spans are the mean"),
    (lambda choice: choice["attention_tokens"][4]["fingerprint"].__setitem__(3, 0.5), "the entry's fingerprint is the"),
    (lambda choice: choice.pop("attention_self_check"), "the server checks itself"),
    (lambda choice: choice.update(attention_self_check={"max_error": None}), "the rebuilt attention output"),
    (lambda choice: choice.update(attention_self_check={"max_error": 0.1}), "the rebuilt attention output"),
    (lambda choice: choice["token_ids"].__setitem__(3, 7), "the tokens are the same with and without"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_a_wrong_answer_is_found(change: Callable[[Answer], None], problem: str) -> None:
    with server(answers(only_with_records(change))) as (url, _):
        report = servercheck.run(url)
    assert not report.ok
    assert any(found.startswith(problem) for found in report.problems), report.problems
    assert "FAILED: " in report.to_text()


def test_a_stream_with_other_records_is_found() -> None:
    def spoil(choice: Answer, streamed: bool) -> None:
        if streamed:
            layer(choice)["fingerprint"][3] += 1e-3

    with server(answers(spoil)) as (url, _):
        problems = servercheck.run(url).problems
    assert any(problem.startswith("the stream has the records of the whole answer") for problem in problems), problems


def test_records_for_who_does_not_ask_are_found() -> None:
    def spoil(choice: Answer, streamed: bool) -> None:
        choice.setdefault("attention_tokens", [])

    with server(answers(spoil)) as (url, _):
        assert any("does not ask" in problem for problem in servercheck.run(url).problems)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ((200, {"choices": []}), "it was accepted"),
        ((400, error("something is wrong")), "something is wrong"),
        ((500, error("attention_mode")), "HTTP 500"),
    ],
)
def test_a_server_that_takes_bad_input_is_found(bad: tuple[int, Any], part: str) -> None:
    good = answers()
    good[TEXT] = lambda body: bad if body["max_tokens"] == 1 and "attention_mode" in body else good[CHAT](body)
    with server(good) as (url, _):
        (problem,) = servercheck.run(url).problems
    assert problem.startswith("bad input is HTTP 400") and "attention_mode='everything'" in problem and part in problem


@pytest.mark.slow
def test_servers_that_cannot_be_checked() -> None:
    ran = command("verify", "--url", f"http://127.0.0.1:{free_port()}/v1")
    assert ran.code == 1 and "FAILED: " in ran.out and "cannot be reached" in ran.out and "refused" in ran.out
    for change, part in (
        ({CAPABILITIES: (404, {})}, "has no attnhook"),
        (answers(schema_version=2), "speaks schema_version 2"),
        ({**answers(), CHAT: (403, error("this server forbids capture"))}, "HTTP 403: this server forbids capture"),
        ({**answers(), TEXT: (200, b"data: {")}, "does not answer in JSON"),
        ({**answers(), CHAT: (200, {"choices": [{"attention_tokens": 3}]})}, "cannot be read: TypeError"),
    ):
        with server({**GOOD, **change}) as (url, _):
            (problem, *_) = servercheck.run(url).problems
        assert part in problem
    refused(command("verify", "--url", "localhost"), "must be an address such as")
    refused(command("verify", "--api-key", "k"), "--api-key is for --url only")
    with server(answers()) as (url, _), pytest.raises(OptionError):
        servercheck.run(url, api_key="a\nb")


def test_an_error_amid_the_stream() -> None:
    def spoil(body: Answer) -> tuple[int, Any]:
        status, answer = reply(body, lambda choice, streamed: None)
        if body.get("stream"):
            answer = answer[: len(answer) // 2].rpartition(b"data: ")[0] + b'data: {"error": {"message": "gone"}}\n\n'
        return status, answer

    with server({**answers(), CHAT: spoil}) as (url, _):
        (problem,) = servercheck.run(url).problems
    assert "ends its stream: gone" in problem


def test_without_a_chat_template_and_fingerprints_only() -> None:
    missing = (400, error("you must provide a chat template if the tokenizer does not define one"))
    with server({**answers(), CHAT: missing}) as (url, _):
        report = servercheck.run(url)
    assert report.ok and "no chat template" in report.sections["answers"]["chat completions"]
    with server(answers(limits={"fingerprint_only": True})) as (url, asked):
        report = servercheck.run(url)
        modes = {body.get("attention_mode") for _, body, _ in asked if body}
    assert "raw" not in modes and report.ok, report.problems


def test_the_bounds_are_those_of_the_backends() -> None:
    known = {str(dtype).removeprefix("torch."): bound for dtype, bound in rebuild._TOLERANCE.items()}
    known["tf32"] = rebuild.tolerance(torch.float32, "cuda")
    assert servercheck.REBUILT.items() <= known.items()
    for dtype in rebuild._TOLERANCE:
        assert rebuild.tolerance(dtype, "cpu") == rebuild._TOLERANCE[dtype]


@pytest.mark.parametrize(("device", "good"), [("cuda", True), ("cpu", False), (None, False)])
def test_float32_on_a_gpu_may_be_tf32(device: str | None, good: bool) -> None:
    def coarse(choice: Answer, streamed: bool) -> None:
        if "attention_self_check" in choice:
            choice["attention_self_check"] = {"max_error": 3e-3}

    with server(answers(coarse, device=device)) as (url, _):
        report = servercheck.run(url)
    assert report.ok is good, report.problems

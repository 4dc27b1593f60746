"""``attnhook probe``: a real tiny model, real files, a real kill; servers that answer as vLLM does."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnhook.analysis import probes
from attnhook.cli import app as cli
from attnhook.probing.run import is_right
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.jsonl import read_jsonl
from attnhook.store import open_store
from tests.backends.vllm.engine import needs_vllm, serve
from tests.client.test_client import CAPABILITIES, CHAT, MODELS, TEXT, server
from tests.helpers import byte_tokenizer, environment, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = Path(sys.executable).with_name("attnhook")
PACKS = ("--packs", "grammar,chat", "--limit", "5", "--new-tokens", "3", "--layers", "all")


def attnhook(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["attnhook", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()


def refused(ran: tuple[int, str, str], *parts: str) -> None:
    code, _, err = ran
    text = " ".join(err.split())
    assert code == 2 and "Traceback" not in err, err
    for part in parts:
        assert part in text, text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    tiny_model(vocab_size=256, max_position_embeddings=400).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, out, err = attnhook("probe", "--model", tiny, "--out", "jsonl:p.jsonl", *PACKS)
    assert code == 0, err
    assert "wrote jsonl:p.jsonl, recorded in p.jsonl.probes" in out
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def keys(path: Path) -> list[tuple[Any, ...]]:
    return [(line["request_id"], line["choice"], line["query_position"]) for line in read_jsonl(path)]


def test_records_tell_their_probe(finished: Path) -> None:
    lines = list(read_jsonl(finished / "p.jsonl"))
    chosen = probes.select(["grammar", "chat"], 5)
    assert len(set(keys(finished / "p.jsonl"))) == len(lines) == 3 * len(chosen)
    for number, probe in enumerate(chosen):
        mine = lines[3 * number : 3 * number + 3]
        assert {line["request_id"] for line in mine} == {probe.request_id} and probes.find(mine[0]["request_id"])
        assert [line["decode_step"] for line in mine] == [0, 1, 2] and list(mine[0]["layers"]) == ["0", "1", "2"]
        assert set(mine[0]["spans"]) == {"sink"}
    # the text as it is: one token a byte, and no template
    assert lines[0]["query_position"] == len(chosen[0].text or "") - 1
    manifest, *done = map(json.loads, (finished / "p.jsonl.probes").read_text().splitlines())
    assert manifest["model"] == "tiny-model" and manifest["options"]["new_tokens"] == 3
    assert manifest["probes"] == probes.digest() and manifest["engine"].startswith("transformers ")
    assert [line["probe"] for line in done] == [probe.request_id for probe in chosen]
    assert done[-1]["size"] == (finished / "p.jsonl").stat().st_size


@pytest.mark.parametrize("written", ["nothing more", "a whole probe", "a part of a probe", "a part of a line"])
def test_resumed_after_any_moment_the_output_is_the_same(copied: Path, tiny: str, written: str) -> None:
    out, journal = copied / "p.jsonl", copied / "p.jsonl.probes"
    whole, lines = out.read_bytes(), journal.read_bytes().splitlines(keepends=True)
    size, next_size = (json.loads(lines[n])["size"] for n in (4, 5))
    journal.write_bytes(b"".join(lines[:5]) + (lines[5][:20] if written == "a whole probe" else b""))
    line_end = whole.index(b"\n", size) + 1
    end = {"nothing more": size, "a whole probe": next_size, "a part of a probe": line_end}.get(written, line_end + 30)
    out.write_bytes(whole[:end])
    code, shown, err = attnhook("probe", "--model", tiny, "--out", "jsonl:p.jsonl", *PACKS, "--resume")
    assert code == 0, err
    assert out.read_bytes() == whole and journal.read_bytes() == b"".join(lines)
    assert "4 probes were there already" in shown and "10" in shown


@pytest.mark.slow
def test_a_killed_run_is_resumed_without_duplicates_or_gaps(
    tiny: str, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journal = tmp_path / "p.jsonl.probes"
    arguments = ("probe", "--model", tiny, "--out", "jsonl:p.jsonl", "--packs", "grammar,chat", *PACKS[4:])
    process = subprocess.Popen(
        [str(COMMAND), *arguments],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 300
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < until, process.stderr and process.stderr.read()
        time.sleep(0.01)
    # the one process that may write
    refused(attnhook(*arguments, "--resume"), "another attnhook probe is writing p.jsonl.probes")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = journal.read_bytes().count(b"\n") - 1
    assert 3 <= done < 72  # amid the run
    refused(attnhook(*arguments), "p.jsonl.probes records a run already", "--resume")
    code, shown, err = attnhook(*arguments, "--resume")
    assert code == 0, err
    expected = [probe.request_id for probe in probes.select(["grammar", "chat"])]
    assert [name for name, *_ in keys(tmp_path / "p.jsonl")] == [name for name in expected for _ in range(3)]
    assert len(set(keys(tmp_path / "p.jsonl"))) == 3 * len(expected)
    assert set(keys(finished / "p.jsonl")) < set(keys(tmp_path / "p.jsonl"))
    assert "72" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "out", ["sqlite:p.db", "parquet:p", "parquet:p?hash_ids=1&every=1s", "jsonl:p.jsonl?rotate=40KB"]
)
def test_a_killed_run_into_any_store_is_resumed_without_duplicates_or_gaps(
    out: str, tiny: str, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = out.partition(":")[2].partition("?")[0]
    journal = tmp_path / f"{name}.probes"
    arguments = ("probe", "--model", tiny, "--out", out, *PACKS)
    process = subprocess.Popen([str(COMMAND), *arguments], env=environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < until, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]))  # two probes are recorded, and at least one more is in the store
    code, _, err = attnhook(*arguments, "--resume")
    assert code == 0 and "may be there twice" not in err, err
    with open_store(out) as store:
        rows = [row for batch in store.fingerprints() for row in batch.to_pylist()]
    expected = keys(finished / "p.jsonl")
    stored = [(row["request_id"], row["choice"], row["query_position"]) for row in rows]
    assert len(stored) == len(set(stored)) == len(expected)
    if "hash_ids" not in out:
        assert set(stored) == set(expected)


def test_resuming_with_more_packs_goes_on(copied: Path, tiny: str) -> None:
    more = ("--packs", "grammar,chat", "--limit", "6", "--new-tokens", "3", "--layers", "all")
    code, _, err = attnhook("probe", "--model", tiny, "--out", "jsonl:p.jsonl", *more, "--resume")
    assert code == 0, err
    assert {name for name, *_ in keys(copied / "p.jsonl")} == {
        probe.request_id for probe in probes.select(["grammar", "chat"], 6)
    }


def test_what_belongs_to_another_run_is_left_alone(copied: Path, tiny: str) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    base = ("probe", "--model", tiny, "--out", "jsonl:p.jsonl", *PACKS)
    refused(attnhook(*base), "records a run already", "--resume", "another output")
    refused(attnhook(*base, "--resume", "--new-tokens", "4"), "its options is", "'new_tokens': 3", "same options")
    refused(attnhook(*base, "--resume", "--dtype", "bfloat16"), "its dtype is 'float32', not 'bfloat16'")
    journal = copied / "p.jsonl.probes"
    journal.write_bytes(before[journal.name].replace(b'"attnhook": "', b'"attnhook": "9.', 1))
    refused(attnhook(*base, "--resume"), "its attnhook is '9.")
    journal.write_bytes(b"hello\n")
    refused(attnhook(*base, "--resume"), "line 1 is not of a run's record", "hello")
    journal.write_bytes(before[journal.name])
    (copied / "p.jsonl").write_bytes(before["p.jsonl"] + b'{"request_id": "chatcmpl-1"}\n')
    refused(attnhook(*base, "--resume"), "this run did not write", "chatcmpl-1")
    (copied / "p.jsonl").write_bytes(before["p.jsonl"][:-1])
    refused(attnhook(*base, "--resume"), "it was changed")
    (copied / "p.jsonl").write_bytes(before["p.jsonl"])
    journal.unlink()
    refused(attnhook(*base), "p.jsonl is there already and no run of attnhook probe wrote it")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {"p.jsonl": before["p.jsonl"]}


def test_bad_options(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        attnhook("probe", "--model", tiny, "--out", "jsonl:a?tokens=1", *PACKS), "probes have no token ids; drop it"
    )
    refused(attnhook("probe"), "--out is missing", "--out probes.db")
    refused(attnhook("probe", "--packs", "nope", "--list"), "pack 'nope' does not exist", "brackets", "chat")
    refused(attnhook("probe", "--out", "jsonl:a", "--limit", "0"), "limit=0")
    refused(attnhook("probe", "--out", "jsonl:a", "--new-tokens", "0"), "--new-tokens 0")
    refused(attnhook("probe", "--out", "jsonl:a", "--top-k", "0"), "top_k=0")
    refused(attnhook("probe", "--out", "nosuch:a"), "unknown sink 'nosuch:a'", "jsonl:")
    refused(attnhook("probe", "--out", "memory:"), "keeps nothing")
    refused(attnhook("probe", "--out", "jsonl:-"), "--state FILE")
    refused(attnhook("probe", "--out", "jsonl:no/a"), "the folder no does not exist")
    refused(attnhook("probe", "--out", "jsonl:a", "--concurrency", "2"), "--concurrency is for --url only")
    url = ("probe", "--out", "jsonl:a", "--url", "http://127.0.0.1:9/v1")
    refused(attnhook(*url, "--dtype", "float32"), "--dtype cannot be used with --url")
    refused(attnhook(*url, "--concurrency", "0"), "concurrency=0")
    refused(attnhook(*url), "cannot be reached")
    assert not list(tmp_path.iterdir())


def test_the_table_of_packs() -> None:
    code, out, _ = attnhook("probe", "--list")
    assert code == 0 and str(len(probes.select())) in out
    for name, pack in probes.packs().items():
        assert any(
            name in line and str(len(pack.probes)) in line and pack.behaviour in line for line in out.splitlines()
        )


def test_what_does_not_fit_is_skipped_and_told(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    packs = ("--packs", "retrieval_far,retrieval_near,grammar", "--limit", "1", "--new-tokens", "2")
    code, shown, err = attnhook("probe", "--model", tiny, "--out", f"jsonl:{out}", "--prompt-rows", *packs)
    assert code == 0, err
    assert "skipped probe/retrieval_far/retrieval_far-0256-00" in shown and "context of 400" in shown
    assert "skipped probe/retrieval_near/retrieval_near-0016-00" in shown
    (grammar,) = probes.select(["grammar"], 1)
    assert [line["decode_step"] for line in read_jsonl(out)].count(None) == len(grammar.text or "") - 1


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [(" copper. The", "copper", True), (" Copper", "copper", True), (" coppersmith", "copper", False),
     (" 90, 92", "90", True), (" 900", "90", False), ("))", ")", True), ("", "x", False),
     (" the copper", "copper", False)],
)  # fmt: skip
def test_right_answers(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


# servers


def answer(body: dict[str, Any], tokens: int) -> tuple[int, dict[str, Any]]:
    """A reply of two generated tokens that looks at position 0."""
    p, new = tokens - 1, 2
    histogram = np.eye(fp.BINS)[fp.bin_of(p)]
    numbers = fp.assemble(histogram[None], np.zeros(1)).astype(np.float32)
    entries = [
        TokenRecord(
            "r", p + step, (2,), np.array([[0]], np.int32), np.array([[0.9]], np.float32), numbers, decode_step=step,
            span_names=tuple(body["attention_spans"]),
            span_mass=np.full((1, len(body["attention_spans"])), 0.5, np.float32),
        ).to_dict()
        for step in range(new)
    ]  # fmt: skip
    choice = {"text": " x", "token_ids": [5] * new, "attention_tokens": entries}
    return 200, {"prompt_token_ids": [1] * tokens, "choices": [choice]}


def served(**changes: Any) -> dict[tuple[str, str], Any]:
    """A server whose tokenizer has a token per word, as far as probes need it."""

    def count(text: str) -> int:
        return 1 + len(text.split())

    return {
        CAPABILITIES: (200, {"engine": {"name": "vllm", "version": "1"}, **changes}),
        MODELS: (200, {"data": [{"id": "smol", "max_model_len": 600}]}),
        ("POST", "/tokenize"): lambda body: (200, {"count": count(body["prompt"])}),
        TEXT: lambda body: answer(body, count(body["prompt"])),
        CHAT: lambda body: answer(body, 30),
    }


def test_a_server_is_asked_for_several_probes_at_once(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    places = threading.Barrier(3, timeout=60)  # opens only when three requests are there together
    answers = served()
    chat = answers[CHAT]
    answers[CHAT] = lambda body: (places.wait(), chat(body))[1]
    packs = ("--packs", "chat,retrieval_near", "--limit", "6", "--concurrency", "3")
    with server(answers) as (url, asked):
        code, _, err = attnhook("probe", "--url", url, "--out", f"jsonl:{out}", *packs)
    assert code == 0, err
    expected = {probe.request_id for probe in probes.select(["chat", "retrieval_near"], 6)}
    assert len(keys(out)) == len(set(keys(out))) == 2 * len(expected)
    assert {name for name, *_ in keys(out)} == expected
    bodies = [body for path, body, _ in asked if path == "/v1/completions"]
    assert len(bodies) == 6 and all(set(body["attention_spans"]) == {"sink", "answer"} for body in bodies)
    for body in bodies:
        start, end = body["attention_spans"]["answer"]
        words = body["prompt"].split()
        distance = len(words) - start  # positions begin with the token before the text
        assert end == start + 1 and min(abs(distance - promised) for promised in (16, 32, 64, 128)) <= 3
    (turns,) = [body["messages"] for path, body, _ in asked if path == "/v1/chat/completions"][:1]
    assert turns[0]["role"] == "user"


def test_a_busy_server_is_waited_for_and_its_limit_kept(tmp_path: Path) -> None:
    refusals, lock, running, most = iter([True, True]), threading.Lock(), [0], [0]
    answers = served(max_concurrent=2)
    text = answers[TEXT]

    def busy(body: dict[str, Any]) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
            refuse = next(refusals, False)
        time.sleep(0.05)  # so that requests at the same time would show
        with lock:
            running[0] -= 1
        return (429, {"error": {"message": "2 requests are capturing"}}) if refuse else text(body)

    answers[TEXT] = busy
    out = tmp_path / "p.jsonl"
    packs = ("--packs", "grammar", "--limit", "8", "--concurrency", "8")
    with server(answers) as (url, _):
        code, _, err = attnhook("probe", "--url", url, "--out", f"jsonl:{out}", *packs)
    assert code == 0, err
    assert len(keys(out)) == 16 and most[0] <= 2


def test_a_failing_server_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    base = ("--out", f"jsonl:{out}", "--packs", "grammar", "--limit", "6", "--concurrency", "1")
    count = [0]
    answers = served()
    text = answers[TEXT]

    def failing(body: dict[str, Any]) -> Any:
        count[0] += 1
        return text(body) if count[0] != 4 else (500, {"error": {"message": "out of memory"}})

    answers[TEXT] = failing
    with server(answers) as (url, _):
        refused(
            attnhook("probe", "--url", url, *base), "HTTP 500: out of memory", "3 of 6 probes are finished", "--resume"
        )
        assert len(keys(out)) == 6
        code, _, err = attnhook("probe", "--url", url, *base, "--resume")
    assert code == 0, err
    assert len(keys(out)) == len(set(keys(out))) == 12
    # another engine is another run
    with server({**served(), CAPABILITIES: (200, {"engine": {"name": "sglang"}})}) as (url, _):
        refused(attnhook("probe", "--url", url, *base, "--resume"), "its engine is 'vllm 1', not 'sglang'")


def test_servers_that_cannot_be_probed(tmp_path: Path) -> None:
    base = ("--out", f"jsonl:{tmp_path / 'p.jsonl'}", "--packs", "grammar", "--limit", "1")
    with server({}) as (url, _):
        refused(attnhook("probe", "--url", url, *base), "has no attnhook", "ATTNHOOK=1 vllm serve")
    assert not list(tmp_path.iterdir())
    with server({**served(), ("POST", "/tokenize"): (200, {"count": 3})}) as (url, _):
        refused(attnhook("probe", "--url", url, *base), "/tokenize counted 3", "distances and spans would be wrong")


@needs_vllm
@pytest.mark.model
@pytest.mark.slow
def test_a_real_server(smol_path: str, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    packs = ("--packs", "retrieval_near,chat", "--limit", "3", "--new-tokens", "4", "--concurrency", "3")
    with serve(tmp_path, smol_path) as running:
        code, _, err = attnhook("probe", "--url", running.url + "/v1", "--out", f"jsonl:{out}", *packs)
    assert code == 0, err
    lines = list(read_jsonl(out))
    assert len(lines) == len(set(keys(out))) == 4 * 6 and {line["model"] for line in lines} == {"smol"}
    near = [line for line in lines if line["request_id"].startswith("probe/retrieval_near/")]
    assert len(near) == 12 and all(0 < line["spans"]["answer"] < 1 for line in near)

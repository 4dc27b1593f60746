"""The GPU check's stages: limits, failures that do not stop the next stage, the report; and that it refuses a CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools.gpu import check, report
from tools.gpu.engines import BOUNDS, Answer, Ask, Job, Judge, cause, mixed, prompts
from tools.gpu.findings import Findings
from tools.gpu.report import Outcome
from tools.gpu.stage import Context
from tools.gpu.stages import NAMES, STAGES, Stage

SCRIPT = """
import os, subprocess, sys, time
from tools.gpu.stage import begin

def run(context):
    context.findings.must("first", True, 1, "1")
    context.findings.bar("speed", False, "0.5", ">= 0.8")
    if {how!r} == "wrong":
        context.findings.must("second", False, 2, "1")
    if {how!r} == "raises":
        raise RuntimeError("a cause | in words")
    if {how!r} == "hangs":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        time.sleep(600)

sys.exit(begin(run))
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes a stage that ends in some way; its module lies in a folder of its own."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def make(how: str, seconds: float = 60.0) -> Stage:
        (folder / f"made_{how}.py").write_text(SCRIPT.format(how=how), encoding="utf-8")
        made = type("Made", (Stage,), {"module": f"made_{how}"})
        return made(how, f"a stage that {how}", seconds, (), seconds)  # type: ignore[no-any-return]

    return make


@pytest.mark.slow  # one stage is stopped at its limit
def test_each_way_a_stage_can_end(stage: object, tmp_path: Path) -> None:
    outcomes = [
        check.run(stage(how, seconds), tmp_path, 300.0, rehearse=True)  # type: ignore[operator]
        for how, seconds in (("ends", 60.0), ("wrong", 60.0), ("raises", 60.0), ("hangs", 20.0))
    ]
    ends, wrong, raises, hangs = outcomes
    assert ends.how == "done" and ends.good and ends.count("missed") == 1
    assert wrong.how == "failed with status 1" and not wrong.good and wrong.count("failed") == 1
    assert raises.how == "failed with status 1" and not raises.good and "a cause | in words" in raises.log
    # what was known before the end is there, and nothing that it started is left
    assert hangs.how == "stopped at its limit" and not hangs.good and hangs.count("ok") == 1
    time.sleep(0.5)
    for process in psutil.process_iter():
        try:
            assert "time.sleep(600)" not in " ".join(process.cmdline())
        except psutil.Error:
            continue
    report.write(tmp_path, {"gpu": "none"}, ["a note"], outcomes, rehearsal=True)
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert told["stages"]["hangs"]["checks"][0]["state"] == "ok"
    assert told["verdict"][-1] == "VERDICT: 1 of 4 stages are right; 4 bars are missed"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Rehearsal on the CPU" in text and "a note" in text and "| speed | 0.5 | >= 0.8 | missed |" in text
    assert text.count("The end of its log") == 3
    assert len(list(tmp_path.glob("*.log"))) + 2 == 4 + 2  # a log for each stage, report.md, report.json


def test_a_stage_without_time_is_not_begun(stage: object, tmp_path: Path) -> None:
    outcome = check.run(stage("ends"), tmp_path, 5.0, rehearse=True)  # type: ignore[operator]
    assert outcome.how == "not begun: 5 s were left" and not outcome.ran and not outcome.good


def test_a_stage_that_checks_nothing_is_not_right() -> None:
    empty, seen = Findings(), Findings()
    seen.see("something", 1)
    for findings in (empty, seen):
        assert not Outcome(STAGES[0], "done", 3.0, findings).good


def test_the_files_that_come_back_are_few() -> None:
    """At most eight: a log for each stage and two reports."""
    assert len(STAGES) + 2 <= 8 and len(set(NAMES)) == len(STAGES)


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="there may be a GPU")
def test_no_gpu_and_unknown_stages_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments, said in (
        ([], "--rehearse runs every stage on the CPU"),
        (["kernel"], "no stage kernel: there are kernels"),
    ):
        with pytest.raises(SystemExit) as stopped:
            check.main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_who_asks_in_a_mixed_batch() -> None:
    ids = prompts(512, 90)
    asks = mixed(ids, {"return_attention_tokens": True}, self_check=True)
    assert [bool(ask.fields) for ask in asks] == [True, True, True, True, False, True, False, True]
    assert all(("attention_self_check" in ask.fields) == bool(ask.fields) for ask in asks)
    assert len({tuple(x) for x in ids}) == 8 and all(3 <= token < 512 for x in ids for token in x)


@pytest.fixture(scope="module")
def captured() -> tuple[object, list[int], Answer]:
    """A tiny model's answer with its rows, as an engine gives it."""
    import torch

    import attnhook
    from tests.helpers import tiny_model

    model = tiny_model(vocab_size=97)
    ids = [(7 * n) % 90 + 3 for n in range(30)]
    with attnhook.capture(layers="all", prompt=True, top_k=8) as records:
        tokens = torch.tensor([ids])
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    rows = sorted(records, key=lambda record: record.query_position)
    return model, ids, Answer(output[0, len(ids) :].tolist(), rows[29:], rows[:29], None, 1e-6, True, 16)


@pytest.mark.parametrize(
    "fault",
    ["none", "a row less", "a row twice", "another step", "an error", "too few tokens", "another's rows", "unasked"],
)
def test_the_judge_sees_what_is_wrong(captured: tuple[object, list[int], Answer], tmp_path: Path, fault: str) -> None:
    from dataclasses import replace

    model, ids, answer = captured
    fields = {"return_attention_tokens": True, "attention_prompt": True, "attention_self_check": True}
    ask = Ask(ids, 4, fields)
    generated = answer.generated
    spoilt = {
        "none": answer,
        "a row less": replace(answer, generated=generated[:-1]),
        "a row twice": replace(answer, prompt=[answer.prompt[0], *answer.prompt]),
        "another step": replace(answer, generated=[replace(generated[0], decode_step=1), *generated[1:]]),
        "an error": replace(answer, error="the step failed"),
        "too few tokens": replace(answer, ids=answer.ids[:-1]),
        "another's rows": replace(
            answer,
            generated=[*generated[:2], replace(generated[1], query_position=31, decode_step=2), *generated[3:]],
        ),
        "unasked": answer,
    }[fault]
    if fault == "unasked":
        ask = Ask(ids, 4)
    findings = Findings()
    job = Job("a job", "float32", {}, [[ask]], cached=True)
    Judge(Context(findings, True, tmp_path), model, "cpu").judge(job, [[spoilt]], tmp_path)
    assert findings.failed is (fault != "none"), findings.checks


def test_graphs_that_kept_nothing_are_seen(captured: tuple[object, list[int], Answer], tmp_path: Path) -> None:
    model, ids, answer = captured
    ask = Ask(ids, 4, {"return_attention_tokens": True, "attention_prompt": True})
    job = Job("a job", "float32", {}, [[ask]], graphs=True)
    for notes, failed in (("", True), ("recorded\n", True), ("recorded\nkept\n", False)):
        (tmp_path / "notes").write_text(notes, encoding="utf-8")
        findings = Findings()
        Judge(Context(findings, True, tmp_path), model, "cpu").judge(job, [[answer]], tmp_path)
        assert findings.failed is failed


def test_the_cause_of_a_failed_engine_is_told() -> None:
    log = "INFO start\n  File x\nValueError: too little memory\nINFO end\n"
    assert cause(log, 1) == "ValueError: too little memory" and cause("nothing", 7) == "status 7"
    assert set(BOUNDS) == {"float32", "tf32", "bfloat16"}


@pytest.mark.slow
def test_the_notes_of_an_engine(tmp_path: Path) -> None:
    """The folder that engines of the check have on their path notes what comes out of the buffers of graphs."""
    import subprocess

    code = (
        "import torch; from attnhook.serving.graphs import KeptQueries; "
        "kept = KeptQueries({0: (1, 2)}, 2, torch.float32, torch.device('cpu')); kept.aim(torch.tensor([1])); "
        "kept.keep(0, torch.ones(2, 1, 2)); kept.get(0, 1); kept.get(5, 1)"
    )
    site = Path(check.__file__).with_name("site")
    root = site.parents[2]
    environ = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{root}", "GPU_CHECK_NOTES": str(tmp_path / "notes")}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    assert (tmp_path / "notes").read_text(encoding="utf-8").split() == ["recorded", "kept"]

"""attnhook.pth: inert without ATTNHOOK, and with it unmodified scripts write records, in real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment, python

NEW, PROMPT = 6, 4

# what a user may have: it knows nothing of attnhook
SCRIPT = f"""
import sys


def build():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = dict(vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=3)
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


class Steps:
    # a streamer: one line per token
    def put(self, value):
        print("step", value.tolist(), flush=True)

    def end(self):
        print("end", flush=True)


def main(new={NEW}, streamer=None):
    model = build()
    import torch

    ids = torch.arange(2, 2 + {PROMPT})[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                         streamer=streamer)
    print(out.tolist(), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["forever"]:
        main(10**6, Steps())
    elif sys.argv[1:] == ["spawn"]:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        process = context.Process(target=main, args=(3,))
        process.start()
        process.join()
        with context.Pool(1) as pool:
            print(pool.map(abs, [-1, 2]), process.exitcode)
    else:
        main()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def positions(path: Path) -> list[int]:
    """Query positions of a JSONL file; each line must be whole."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line)["query_position"] for line in text.splitlines()]


def test_the_pth_is_installed_and_is_one_line_of_the_repository():
    installed = Path(sysconfig.get_path("purelib")) / "attnhook.pth"
    assert installed.read_text() == (ROOT / "attnhook.pth").read_text()
    assert len(installed.read_text().splitlines()) == 1


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_nothing_happens(value):
    code = "import sys; print([name for name in sys.modules if name.partition('.')[0] in ('attnhook', 'numpy')])"
    run = python("-c", code, **({} if value is None else {"ATTNHOOK": value}), ATTNHOOK_TOP_K="nonsense")
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


def test_with_the_variable_it_waits_for_the_engine():
    code = """
        import sys
        from attnhook import lifecycle
        print("torch" in sys.modules, lifecycle.installed()["transformers"].active, lifecycle.sink_stats())
    """
    run = python("-c", code, ATTNHOOK="1", ATTNHOOK_SINKS="memory:")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout == "False False {'memory:': {'queued': 0, 'written': 0, 'dropped': {}}}\n"


@pytest.mark.slow
def test_an_unmodified_script_writes_records_and_prints_the_same(script, tmp_path):
    path = tmp_path / "records.jsonl"
    plain = python(script)
    assert plain.returncode == 0, plain.stderr
    run = python(script, ATTNHOOK="1", ATTNHOOK_SINKS=f"jsonl:{path}", ATTNHOOK_LAYERS="all", ATTNHOOK_PROMPT="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout == plain.stdout
    assert run.stderr == plain.stderr
    assert positions(path) == list(range(PROMPT - 1 + NEW))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["decode_step"] for line in lines] == [None] * (PROMPT - 1) + list(range(NEW))
    assert all(list(line["layers"]) == ["0", "1", "2"] for line in lines)
    assert len({line["request_id"] for line in lines}) == 1


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ATTNHOOK": "2"}, "ATTNHOOK='2': set it to 1"),
        ({"ATTNHOOK": "true"}, "ATTNHOOK='true': set it to 1"),
        ({"ATTNHOOK": "1", "ATTNHOOK_TOP_K": "0"}, "ATTNHOOK_TOP_K=0 must be a whole number from 1 to 256"),
        ({"ATTNHOOK": "1", "ATTNHOOK_LAYER": "all"}, "unknown environment variable ATTNHOOK_LAYER; did you mean"),
        ({"ATTNHOOK": "1", "ATTNHOOK_KERNEL": "cuda"}, "ATTNHOOK_KERNEL='cuda' must be one of"),
        ({"ATTNHOOK": "1", "ATTNHOOK_SINKS": "nosuch:x"}, "unknown sink 'nosuch:x'"),
        ({"ATTNHOOK": "1", "ATTNHOOK_SINKS": "jsonl:/no/such/folder/x"}, "/no/such/folder"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_bad_setting_stops_the_process_with_one_line(environ, named):
    run = python("-c", "print('the script ran')", **environ)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("attnhook: ")
    assert named in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.slow
def test_ctrl_c_in_mid_generate_loses_no_record(script, tmp_path):
    path = tmp_path / "records.jsonl"
    process = subprocess.Popen(
        [sys.executable, script, "forever"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(ATTNHOOK="1", ATTNHOOK_SINKS=f"jsonl:{path}"),
    )
    assert process.stdout is not None
    try:
        for _ in range(40):
            assert process.stdout.readline().startswith("step")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in err.splitlines()[-1]
    assert process.returncode == -signal.SIGINT
    steps = 40 - 1 + out.count("step")  # the first line is the prompt
    found = positions(path)
    assert found == list(range(PROMPT - 1, PROMPT - 1 + len(found)))
    # one more than printed, where the interrupt came between a pass and its token
    assert steps <= len(found) <= steps + 1


@pytest.mark.slow
def test_spawned_children_write_their_records_too(script, tmp_path):
    path = tmp_path / "records.jsonl"
    run = python(script, "spawn", ATTNHOOK="1", ATTNHOOK_SINKS=f"jsonl:{path}")
    assert run.returncode == 0, run.stderr
    child, pool = run.stdout.splitlines()
    assert len(json.loads(child)[0]) == PROMPT + 3
    assert pool == "[1, 2] 0"
    assert positions(path) == list(range(PROMPT - 1, PROMPT - 1 + 3))


def test_every_way_to_start_python_works(tmp_path):
    environ = {"ATTNHOOK": "1", "ATTNHOOK_SINKS": f"jsonl:{tmp_path / 'records.jsonl'}"}
    for arguments in (["-c", "print('ran')"], ["-W", "error", "-X", "dev", "-c", "print('ran')"], ["-m", "this"]):
        run = python(*arguments, **environ)
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""
        assert run.stdout
    # without site-packages there is no .pth, and nothing to complain about
    run = python("-S", "-c", "print('ran')", **environ)
    assert (run.returncode, run.stdout, run.stderr) == (0, "ran\n", "")

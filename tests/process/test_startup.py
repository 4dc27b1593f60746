"""attnhook.pth: inert without ATTNHOOK, and with it unmodified scripts write records, in real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from attnhook.system import switch
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


def test_with_the_variable_nothing_is_imported_before_an_engine_is(tmp_path):
    """Every Python process of the environment starts so, pip's too."""
    out = tmp_path / "records.jsonl"
    code = "import sys; print(*sorted(sys.modules))"
    plain = python("-c", code)
    run = python("-c", code, ATTNHOOK="1", ATTNHOOK_SINKS=f"jsonl:{out}")
    assert (run.returncode, run.stderr) == (0, "")
    more = {*run.stdout.split()} - {*plain.stdout.split()}
    assert {name for name in more if name.startswith("attnhook")} == {
        "attnhook",
        "attnhook.process",
        "attnhook.process.startup",
        "attnhook.system",
        "attnhook.system.moved",
        "attnhook.system.switch",
    }
    assert not {"torch", "numpy", "pluggy", "wrapt", "typing", "re", "logging", "importlib.metadata"} & more
    assert not out.exists()


def test_with_the_variable_a_process_starts_as_fast():
    def seconds(**environ: str) -> float:
        started = time.perf_counter()
        assert python("-c", "pass", **environ).returncode == 0
        return time.perf_counter() - started

    # the fastest of several: this machine may be busy
    plain = min(seconds() for _ in range(7))
    assert min(seconds(ATTNHOOK="1") for _ in range(7)) - plain < 0.1


def test_with_the_variable_it_waits_for_the_engine():
    code = """
        import importlib.util, sys
        assert importlib.util.find_spec("transformers").loader.get_filename()  # to look is not to import
        assert "attnhook.process.lifecycle" not in sys.modules
        import transformers
        lifecycle = sys.modules["attnhook.process.lifecycle"]
        assert transformers.__spec__.loader is transformers.__loader__ or transformers.__loader__ is None
        print("torch" in sys.modules, lifecycle.installed()["transformers"].active, lifecycle.sink_stats())
    """
    run = python("-c", code, ATTNHOOK="1", ATTNHOOK_SINKS="memory:")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout == "False False {'memory:': {'queued': 0, 'written': 0, 'dropped': {}}}\n"


def test_who_uses_the_lifecycle_finds_it_installed():
    code = """
        import attnhook
        from attnhook.process import lifecycle
        print(lifecycle.installed()["transformers"].active, lifecycle.sink_stats())
        attnhook.uninstall()
        import transformers
        print(lifecycle.installed())
    """
    run = python("-c", code, ATTNHOOK="1", ATTNHOOK_SINKS="memory:")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "False {'memory:': {'queued': 0, 'written': 0, 'dropped': {}}}\n{}\n"


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


BAD = pytest.mark.parametrize(
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


@pytest.mark.slow
@BAD
def test_a_bad_setting_is_refused_in_the_log_and_the_script_runs(environ, named):
    code = (
        "import transformers, transformers; from attnhook.process import lifecycle; print('ran', lifecycle.installed())"
    )
    run = python("-c", code, **environ)
    assert (run.returncode, run.stdout) == (0, "ran {}\n"), run.stderr
    assert run.stderr.startswith("attnhook")
    assert named in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.slow
@BAD
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "vllm.entrypoints.cli.main", "serve", "m"),
        ("-m", "vllm.entrypoints.openai.api_server", "--model", "m"),
        ("-m", "sglang.launch_server", "--model-path", "m"),
    ],
    ids=" ".join,
)
def test_a_bad_setting_stops_a_server_with_one_line(environ, named, command):
    if importlib.util.find_spec(command[1].partition(".")[0]) is None:
        pytest.skip("this engine is not installed here")
    run = python(*command, **environ)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("attnhook: ")
    assert named in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr


def test_no_other_program_is_ended():
    for value in ("true", "1"):
        run = python("-m", "pip", "--version", ATTNHOOK=value, ATTNHOOK_TOP_K="nonsense")
        assert (run.returncode, run.stdout[:4]) == (0, "pip ")
        assert run.stderr.count("\n") == (value == "true"), "a wrong switch is told, no engine: nothing else matters"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /usr/bin/vllm serve m", True),
        ("python -u -X dev -W error vllm serve", True),
        ("python vllm.exe serve m", True),
        ("python -um vllm.entrypoints.openai.api_server", True),
        ("python -mvllm serve", True),
        ("python -I -m sglang.launch_server --model-path m", True),
        ("python -m sglang serve --model-path m", True),
        ("python --check-hash-based-pycs always /bin/sglang serve", True),
        ("python /usr/bin/vllm bench serve", False),
        ("python -m vllm.entrypoints.cli.main chat", False),
        ("python serve.py vllm serve", False),
        ("python -c pass vllm serve", False),
        ("python - vllm serve", False),
        ("python -m pip install vllm", False),
        ("python -m", False),
        ("python", False),
        ("", False),
    ],
)
def test_what_serves_an_engine(command, expected):
    assert switch.serving(command.split()) is expected


def test_workers_know_that_a_server_started_them(monkeypatch):
    assert not switch.serving()
    monkeypatch.setenv(switch.SERVING, "1")
    assert switch.serving()


def test_importing_what_attnhook_itself_needs_runs_it_once(tmp_path):
    """An engine that a plugin imports while it is loaded, which is while the engine's import has begun."""
    (tmp_path / "someengine").mkdir()
    (tmp_path / "someengine" / "__init__.py").write_text("import os\nprint('engine runs', __spec__.name)\n")
    (tmp_path / "someplugin.py").write_text("import someengine\nprint('plugin runs', someengine.__name__)\n")
    info = tmp_path / "someplugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someplugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnhook]\nsome = someplugin\n")
    code = """
        import sys
        import someengine
        assert someengine is sys.modules["someengine"] and someengine.__spec__.loader is someengine.__loader__
        print(sorted(sys.modules["attnhook.process.lifecycle"].installed())[0])
        assert not any("attnhook.process" in type(finder).__module__ for finder in sys.meta_path)
    """
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    run = python("-c", code, PYTHONPATH=path, ATTNHOOK="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["engine runs someengine", "plugin runs someengine"]
    assert len(run.stdout.splitlines()) == 3


def test_threads_that_import_the_engine_at_once_find_it_hooked():
    code = """
        import sys, threading
        states = []
        def work():
            import transformers
            states.append(sorted(sys.modules["attnhook.process.lifecycle"].installed()))
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(states) == 8 and all("transformers" in state for state in states), states
    """
    run = python("-c", code, ATTNHOOK="1")
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("AttentionInterface = object\n", "get_interface was not found"),
        (
            "class Closed(type):\n    def __setattr__(cls, *_): raise RuntimeError('closed')\n"
            "class AttentionInterface(metaclass=Closed):\n    def get_interface(self): ...\n",
            "could not be hooked: RuntimeError: closed",
        ),
    ],
)
def test_an_engine_that_cannot_be_hooked_is_refused_in_the_log(tmp_path, source, named):
    """Another package of that name, as a release of the future may be."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "modeling_utils.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    code = """
        import transformers.modeling_utils
        print("ran")
        import attnhook
        try:
            with attnhook.capture():
                pass
        except attnhook.UnsupportedError as error:
            print("capture:", error)
    """
    run = python("-c", code, PYTHONPATH=path, ATTNHOOK="1")
    assert run.returncode == 0, run.stderr
    ran, refused = run.stdout.splitlines()
    assert ran == "ran" and refused.startswith("capture: transformers ")
    assert named in refused
    assert run.stderr.startswith("attnhook is off in this process: "), run.stderr
    assert "RuntimeError" in named or len(run.stderr.splitlines()) == 1  # a fault of ours has its traceback


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_generate_loses_no_record(script, tmp_path, number):
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
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT), err
    assert process.returncode == -number
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


def test_importing_attnhook_imports_nothing_and_its_names_are_there_all_the_same():
    code = """
        import sys
        import attnhook
        assert not {"numpy", "pluggy", "attnhook.capture"} & set(sys.modules)
        assert set(attnhook.__all__) <= set(dir(attnhook))
        import attnhook.capture as renamed, attnhook.process.lifecycle
        from attnhook import capture
        assert callable(attnhook.capture) and attnhook.capture is capture is renamed  # not the module of that name
        assert all(getattr(attnhook, name) is not None for name in attnhook.__all__)
        assert attnhook.options.CaptureOptions().sinks == () and attnhook.__version__[0].isdigit()
        try:
            attnhook.nosuch
        except AttributeError as error:
            print(error)
    """
    run = python("-c", code)
    assert (run.returncode, run.stdout) == (0, "module 'attnhook' has no attribute 'nosuch'\n"), run.stderr

"""install, uninstall and capture: on, off, switched, nested, refused, and never in the model's way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import cache_utils, generation, modeling_utils

import attnhook
from attnhook import OptionError, PluginError, UnsupportedError
from attnhook.capture.session import sessions
from attnhook.kernels import topk
from attnhook.plugins import manager as plugins
from attnhook.process import lifecycle
from attnhook.sinks.memory import MemorySink
from tests.helpers import LAYERS, NEW, PROMPT, generate, python, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = PROMPT - 1 + NEW  # rows of one `generate`, the prompt's included
OWNERS = (
    modeling_utils.AttentionInterface,
    modeling_utils.PreTrainedModel,
    generation.GenerationMixin,
    generation.StoppingCriteriaList,
    generation.LogitsProcessorList,
    cache_utils.Cache,
)
ORIGINAL = {owner: dict(vars(owner)) for owner in OWNERS}


def patched() -> list[str]:
    """Attributes of Transformers that are not its own."""
    return [
        f"{owner.__name__}.{name}"
        for owner, attributes in ORIGINAL.items()
        for name in {*attributes, *vars(owner)} - {"__abstractmethods__", "_abc_impl"}
        if vars(owner).get(name) is not attributes.get(name)
    ]


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    assert patched() == []
    yield
    attnhook.uninstall()
    assert sessions() == ()
    assert lifecycle.installed() == {}
    assert lifecycle._users == 0
    assert patched() == []


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- on and off


def test_install_twice_changes_nothing_and_uninstall_takes_it_back():
    first = attnhook.install()
    assert "transformers" in first and set(first) <= {"transformers", "vllm", "sglang"}
    assert first["transformers"].active
    hooks = first["transformers"].describe()
    assert set(hooks.values()) == {"patched"}
    assert sorted(hooks) == sorted(patched())
    sample = generation.GenerationMixin._sample
    assert sample.__wrapped__ is ORIGINAL[generation.GenerationMixin]["_sample"]

    second = attnhook.install()
    assert second["transformers"] is first["transformers"]
    assert generation.GenerationMixin._sample is sample  # not wrapped again
    assert lifecycle.installed() == first

    attnhook.uninstall()
    assert lifecycle.installed() == {}
    assert not first["transformers"].active
    assert patched() == []
    attnhook.uninstall()  # harmless


def test_uninstall_is_harmless_when_nothing_is_installed(model):
    attnhook.uninstall()
    with attnhook.capture() as records:
        attnhook.uninstall()
        generate(model)
    assert len(records) == NEW


def test_on_and_off_again_and_again(model):
    plain = generate(model)
    for _ in range(3):
        attnhook.install()
        assert generate(model) == plain
        with attnhook.capture(prompt=True) as records:
            assert generate(model) == plain
        assert len(records) == ROWS
        attnhook.uninstall()
        assert generate(model) == plain
    assert len(records) == ROWS  # a closed capture gets no more


def test_install_without_sinks_captures_nothing(model):
    attnhook.install()
    assert sessions() == ()
    assert lifecycle.sink_stats() == {}


def test_a_returned_dict_is_a_copy():
    attnhook.install().clear()
    lifecycle.installed().clear()
    assert "transformers" in lifecycle.installed()


def test_the_same_options_keep_the_sink_and_others_switch(model, tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    attnhook.install(sinks=f"jsonl:{a}")
    generate(model)
    attnhook.install(sinks=[f"jsonl:{a}"])
    generate(model)
    attnhook.install(sinks=f"jsonl:{b}", prompt=True)
    assert len(lines(a)) == 2 * NEW  # all there at once: switching closes the old sink
    generate(model)
    attnhook.install()  # no sinks: nothing is captured any more
    generate(model)
    assert len(lines(a)) == 2 * NEW
    assert len(lines(b)) == ROWS
    assert [line["decode_step"] for line in lines(b)] == [None] * (PROMPT - 1) + list(range(NEW))


def test_install_reads_the_environment(model, tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.setenv("ATTNHOOK_SINKS", f"jsonl:{path}")
    monkeypatch.setenv("ATTNHOOK_TOP_K", "2")
    monkeypatch.setenv("ATTNHOOK_LAYERS", "0")
    attnhook.install(layers=[1])
    generate(model)
    attnhook.uninstall()
    assert len(lines(path)) == NEW
    for line in lines(path):
        assert list(line["layers"]) == ["1"]  # the argument wins
        assert len(line["layers"]["1"]["token_positions"]) == 2


# -- sinks


def test_sinks_get_everything_and_so_does_a_nested_capture(model, tmp_path):
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    attnhook.install(sinks=[f"jsonl:{path}" for path in paths], prompt=True, layers="all", top_k=4)
    generate(model)
    with attnhook.capture(prompt=True, layers="all", top_k=4) as records:
        generate(model)
    with torch.no_grad():
        model(torch.arange(2, 8)[None])
    attnhook.uninstall()

    written = lines(paths[0])
    assert lines(paths[1]) == written
    assert len(written) == 2 * ROWS + 6
    assert [line["query_position"] for line in written] == [*range(ROWS), *range(ROWS), *range(6)]
    assert len({line["request_id"] for line in written}) == 3
    inner = written[ROWS : 2 * ROWS]
    assert [json.loads(json.dumps(record.to_dict())) for record in records] == [
        {key: value for key, value in line.items() if key not in ("request_id", "choice", "model")} for line in inner
    ]
    assert {line["request_id"] for line in inner} == {record.request_id for record in records}
    assert all(list(line["layers"]) == [str(layer) for layer in range(LAYERS)] for line in written)


def test_sink_stats(model, tmp_path):
    urls = [f"jsonl:{tmp_path / 'a.jsonl'}", "memory:"]
    attnhook.install(sinks=urls)
    generate(model)
    stats = lifecycle.sink_stats()
    assert list(stats) == urls
    for sink in stats.values():
        assert sink["queued"] + sink["written"] == NEW
        assert sink["dropped"] == {}
    attnhook.uninstall()
    assert lifecycle.sink_stats() == {}


def test_capture_writes_to_its_own_sinks_too(model, tmp_path):
    path = tmp_path / "records.jsonl"
    with attnhook.capture(sinks=f"jsonl:{path}") as records:
        generate(model)
    assert [line["query_position"] for line in lines(path)] == [record.query_position for record in records]
    assert len(records) == NEW


def test_nested_captures_keep_their_own_options(model):
    with attnhook.capture(layers=[0], prompt=True) as outer:
        with attnhook.capture(layers=[1], stride=2) as inner:
            generate(model)
        generate(model)
    assert [len(outer), len(inner)] == [2 * ROWS, 3]
    assert {record.layers for record in outer} == {(0,)}
    assert [(record.layers, record.decode_step) for record in inner] == [((1,), 0), ((1,), 2), ((1,), 4)]


# -- what goes wrong leaves nothing half-done


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top_k": 0}, OptionError, "top_k=0"),
        ({"topk": 3}, OptionError, "did you mean 'top_k'"),
        ({"sinks": "nosuch:x"}, PluginError, "unknown sink 'nosuch:x'"),
        ({"sinks": ["memory:", "jsonl:/no/such/folder/x"]}, PluginError, "/no/such/folder"),
        ({"sinks": ["memory:", "memory:"]}, PluginError, "named twice"),
    ],
)
def test_a_refused_install_or_capture_leaves_nothing_on(model, options, error, match):
    with pytest.raises(error, match=match):
        attnhook.install(**options)
    with pytest.raises(error, match=match), attnhook.capture(**options):
        pytest.fail("the block must not run")
    assert lifecycle.installed() == {}
    assert sessions() == ()
    assert patched() == []


@pytest.mark.parametrize("options", [{"top_k": 0}, {"sinks": "jsonl:/no/such/folder/x"}])
def test_a_refused_switch_keeps_what_was_on(model, tmp_path, options):
    path = tmp_path / "records.jsonl"
    attnhook.install(sinks=f"jsonl:{path}")
    with pytest.raises(attnhook.AttnhookError):
        attnhook.install(**options)
    generate(model)
    attnhook.uninstall()
    assert len(lines(path)) == NEW


def test_a_bad_on_error_is_refused():
    with (
        pytest.raises(OptionError, match="on_error='ignore' must be 'raise' or 'drop'"),
        attnhook.capture(on_error="ignore"),
    ):
        pytest.fail("the block must not run")


class Backend:
    """An engine that is not there, or whose hooks fail."""

    name = "bad"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def available(self) -> bool:
        return self.error is not None

    def version(self) -> str:
        return "0"

    def install(self, options: object) -> Any:
        assert self.error is not None
        raise self.error


def test_no_engine_at_all_is_an_error_that_names_those_looked_for(monkeypatch):
    monkeypatch.setattr(plugins, "backends", lambda: {"bad": Backend(), "worse": Backend()})
    assert not lifecycle.any_engine()
    with pytest.raises(PluginError, match=r"none of the engines bad, worse is installed.*pip install"):
        attnhook.install()


@pytest.mark.parametrize("error", [UnsupportedError("no hook"), RuntimeError("a bug")])
def test_an_engine_that_fails_to_hook_unhooks_the_others(monkeypatch, error):
    backends = {**plugins.backends(), "bad": Backend(error)}
    monkeypatch.setattr(plugins, "backends", lambda: backends)
    with pytest.raises(type(error), match=str(error)):
        attnhook.install()
    try:
        assert lifecycle.installed() == {}
        assert patched() == []
    finally:
        for installation in lifecycle._installations.values():
            installation.uninstall()
        lifecycle._installations.clear()


class Choosy(Backend):
    """An engine whose hooks depend on the options."""

    name = "choosy"

    def __init__(self) -> None:
        self.on: list[int] = []  # top_k of each installation that is in place
        self.seen: list[int] = []

    def available(self) -> bool:
        return True

    def install(self, options: Any) -> Any:
        top_k = options.request.top_k
        if top_k == 13:
            raise UnsupportedError("not with top_k=13")
        self.on.append(top_k)
        self.seen.append(top_k)
        return ChoosyInstallation(self, top_k)


class ChoosyInstallation:
    active = True

    def __init__(self, backend: Choosy, top_k: int) -> None:
        self.backend, self.top_k = backend, top_k

    def uninstall(self) -> None:
        if self.top_k in self.backend.on:
            self.backend.on.remove(self.top_k)


def test_other_options_reach_the_backends_and_the_same_do_not_again(monkeypatch):
    choosy = Choosy()
    backends = {**plugins.backends(), "choosy": choosy}
    monkeypatch.setattr(plugins, "backends", lambda: backends)
    kept = attnhook.install(top_k=3)["transformers"]
    attnhook.install(top_k=3)
    assert (choosy.on, choosy.seen) == ([3], [3])
    assert attnhook.install(top_k=5)["transformers"] is kept  # its hooks are the same for all options
    assert (choosy.on, choosy.seen) == ([5], [3, 5])
    with pytest.raises(UnsupportedError, match="not with top_k=13"):
        attnhook.install(top_k=13)
    assert choosy.on == [5]  # what was on stays on
    assert attnhook.install(top_k=5)["choosy"].top_k == 5
    attnhook.uninstall()
    assert choosy.on == []


class Interrupted(MemorySink):
    """Ctrl-C comes while it closes, in the thread that waits for it."""

    def close(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        super().close()


@pytest.mark.parametrize("how", ["switch", "uninstall"])
def test_after_ctrl_c_while_a_sink_closes_installing_again_really_does(model, monkeypatch, tmp_path, how):
    path = tmp_path / "records.jsonl"
    real = plugins.sink_classes()
    monkeypatch.setattr(plugins, "sink_classes", lambda: {**real, "interrupted": Interrupted})
    attnhook.install(sinks=["interrupted:", f"jsonl:{path}"])
    generate(model)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            attnhook.install() if how == "switch" else attnhook.uninstall()
    finally:
        signal.signal(signal.SIGINT, before)
    assert lifecycle.sink_stats() == {} and lifecycle.installed() == {} and patched() == []
    attnhook.install(sinks=f"jsonl:{path}")
    generate(model)
    assert lifecycle.flush(60)
    assert lifecycle.sink_stats()[f"jsonl:{path}"] == {"queued": 0, "written": NEW, "dropped": {}}
    assert len(lines(path)) == 2 * NEW


@contextmanager
def in_mid_pass(model: Any, do: Callable[[], object]) -> Iterator[None]:
    """Call ``do`` in every forward pass between the first and the second layer, as another thread might."""
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: do() and None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_a_capture_that_opens_in_mid_pass_leaves_that_pass_alone(model, on_error):
    plain = generate(model)
    with ExitStack() as stack:
        opened: list[Any] = []

        def opens() -> None:
            if not opened:
                capture = attnhook.capture(layers="all", prompt=True, on_error=on_error)
                opened.append(stack.enter_context(capture))

        # hooked already, as in a process where another thread captures
        stack.enter_context(attnhook.capture())
        with in_mid_pass(model, opens):
            assert generate(model) == plain
    assert [record.query_position for record in opened[0]] == list(range(PROMPT, ROWS))
    assert not opened[0].dropped


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_a_capture_that_closes_in_mid_pass_leaves_that_pass_alone(model, on_error):
    plain = generate(model)
    with attnhook.capture(), ExitStack() as stack:
        records = stack.enter_context(attnhook.capture(layers="all", prompt=True, on_error=on_error))
        with in_mid_pass(model, stack.close):
            assert generate(model) == plain
    assert list(records) == []
    assert not records.dropped


def test_threads_that_install_capture_and_uninstall_at_once(model):
    errors: list[BaseException] = []
    ids = torch.arange(2, 8)[None]

    def work(number: int) -> None:
        try:
            for turn in range(15):
                attnhook.install(top_k=1 + (number + turn) % 3)
                with attnhook.capture(prompt=True) as records, torch.no_grad():
                    model(ids)
                assert len(records) >= 6  # other threads' passes too
                attnhook.uninstall()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


# -- drop mode never raises


def breaking(monkeypatch: pytest.MonkeyPatch, error: Exception, calls: range) -> None:
    """Make the kernel raise at these calls of it."""
    original, count = topk.TopKStep.__call__, iter(range(10**6))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if next(count) in calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(topk.TopKStep, "__call__", kernel)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("kernel broke"), "capture_failed"),
        (MemoryError("no memory"), "capture_failed"),
        (UnsupportedError("not known"), "unsupported"),
    ],
)
def test_drop_mode_lets_the_model_run_on_and_counts(model, monkeypatch, caplog, error, reason):
    plain = generate(model)
    breaking(monkeypatch, error, range(10**6))
    with attnhook.capture(on_error="drop", prompt=True, layers="all") as records:
        assert generate(model) == plain
    assert list(records) == []
    assert records.dropped == {reason: ROWS}
    assert [record.message for record in caplog.records if record.name == "attnhook"] == [
        f"dropping attention records ({reason}): {error}"
    ]  # once, not once per token


def test_a_step_that_fails_in_one_layer_gives_no_record_and_the_next_one_works(model, monkeypatch):
    with attnhook.capture(layers="all") as good:
        plain = generate(model)
    breaking(monkeypatch, RuntimeError("kernel broke"), range(LAYERS + 1, LAYERS + 2))  # second step, middle layer
    with attnhook.capture(on_error="drop", layers="all") as records:
        assert generate(model) == plain
    assert records.dropped == {"capture_failed": 1}
    assert [record.decode_step for record in records] == [0, 2, 3, 4]
    expected = [record.to_dict() for record in good if record.decode_step != 1]
    assert [record.to_dict() for record in records] == expected


def test_sinks_drop_and_go_on(model, monkeypatch, tmp_path):
    path = tmp_path / "records.jsonl"
    plain = generate(model)
    breaking(monkeypatch, RuntimeError("kernel broke"), range(1, 3))
    attnhook.install(sinks=f"jsonl:{path}")
    assert generate(model) == plain
    (session,) = sessions()
    assert session.dropped == {"capture_failed": 2}
    attnhook.uninstall()
    assert [line["decode_step"] for line in lines(path)] == [0, 3, 4]


def test_strict_mode_raises_and_the_next_pass_works(model, monkeypatch):
    breaking(monkeypatch, RuntimeError("kernel broke"), range(1, 2))
    with pytest.raises(RuntimeError, match="kernel broke"), attnhook.capture() as records:
        generate(model)
    assert len(records) == 1
    with attnhook.capture() as records:
        generate(model)
    assert len(records) == NEW


def test_one_sessions_failure_is_not_anothers(model, tmp_path):
    path = tmp_path / "records.jsonl"
    attnhook.install(sinks=f"jsonl:{path}")
    with attnhook.capture(layers=[LAYERS], on_error="drop") as records:  # a layer that the model lacks
        generate(model)
    attnhook.uninstall()
    assert list(records) == []
    assert sum(records.dropped.values()) == NEW
    assert len(lines(path)) == NEW


# -- fresh processes


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_is_inside_leaves_no_lock_taken():
    code = """
        import os, sys, threading
        import attnhook
        from attnhook.process import lifecycle
        from attnhook.plugins import manager as plugins
        from attnhook.backends import patching
        core = sys.modules["attnhook.capture.session"]
        attnhook.install(sinks="memory:")
        taken = threading.Event()

        def inside():
            with lifecycle._lock, plugins._lock, patching._lock, core._lock, core.spent._lock:
                taken.set()
                threading.Event().wait()

        threading.Thread(target=inside, daemon=True).start()
        taken.wait()
        pid = os.fork()
        if pid == 0:
            import signal
            signal.alarm(20)  # waits for ever otherwise
            lifecycle.sink_stats()
            with attnhook.capture():
                core.spent.add(0.0)
            attnhook.install()
            attnhook.uninstall()
            import transformers.modeling_utils
            print("went on", flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        os._exit(0)
    """
    run = python("-c", code)
    assert (run.returncode, run.stdout) == (0, "went on\n"), run.stderr


def test_importing_attnhook_imports_no_engine():
    code = """
        import json, sys
        import attnhook
        first = set(sys.modules)
        attnhook.install(); attnhook.uninstall()
        print(json.dumps([sorted(first), sorted(sys.modules)]))
    """
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    for modules in json.loads(run.stdout):
        roots = {name.partition(".")[0] for name in modules}
        assert not roots & {"torch", "transformers", "vllm", "sglang", "triton"}
        assert "attnhook" in roots


@pytest.mark.slow
@pytest.mark.parametrize("order", ["transformers first", "attnhook first"])
def test_works_whichever_is_imported_first(order):
    first, second = "import attnhook; hooked = attnhook.install()", "from transformers import LlamaForCausalLM"
    if order == "transformers first":
        first, second = second, first
    code = f"""
import json
{first}
states = []
if "hooked" in globals():
    states.append(hooked["transformers"].describe())
{second}
from tests.helpers import generate, tiny_model
states.append(hooked["transformers"].describe())
model = tiny_model()
with attnhook.capture(prompt=True) as records:
    generate(model)
attnhook.uninstall()
from transformers import generation
assert not hasattr(generation.GenerationMixin._sample, "__wrapped__")
with attnhook.capture(prompt=True) as again:
    generate(model)
print(json.dumps([states, len(records), len(again)]))
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    states, count, again = json.loads(run.stdout)
    assert (count, again) == (ROWS, ROWS)
    assert set(states[-1].values()) == {"patched"}
    if order == "attnhook first":
        assert set(states[0].values()) == {"waits for the import"}


MISSING = """
import json, os, sys
import attnhook
from attnhook.process import lifecycle
from transformers import generation, modeling_utils
import transformers
from tests.helpers import generate, tiny_model
owners = [
    generation.GenerationMixin, generation.StoppingCriteriaList,
    modeling_utils.AttentionInterface, modeling_utils.PreTrainedModel,
]
ours = os.path.dirname(attnhook.__file__) + os.sep
def wrapped():
    return [f"{o.__name__}.{n}" for o in owners for n, v in vars(o).items()
            if getattr(getattr(v, "__code__", None), "co_filename", "").startswith(ours)]
def without(owner, name):
    saved = vars(owner)[name]
    delattr(owner, name)
    result = {}
    for how in ("install", "capture"):
        try:
            if how == "install":
                attnhook.install(sinks="memory:")
            else:
                with attnhook.capture():
                    pass
            result[how] = None
        except attnhook.UnsupportedError as error:
            result[how] = str(error)
    result["left"] = wrapped()
    result["installed"] = list(lifecycle.installed())
    setattr(owner, name, saved)
    attnhook.uninstall()
    return result
results = {
    name: without(owner, name)
    for owner, name in [
        (generation.GenerationMixin, "_valid_auto_compile_criteria"),
        (generation.GenerationMixin, "_sample"),
        (modeling_utils.AttentionInterface, "get_interface"),
        (modeling_utils, "AttentionInterface"),
        (generation.stopping_criteria, "StoppingCriteriaList"),
    ]
}
# and with everything back in place it works
model = tiny_model()
with attnhook.capture(prompt=True) as records:
    generate(model)
print(json.dumps([transformers.__version__, results, len(records), wrapped()]))
"""


@pytest.mark.slow
def test_a_missing_hook_point_is_named_and_nothing_stays_patched():
    run = python("-c", MISSING)
    assert run.returncode == 0, run.stderr
    version, results, count, left = json.loads(run.stdout)
    assert len(results) == 5
    for name, result in results.items():
        for how in ("install", "capture"):
            message = result[how]
            assert message, f"without {name}, {how} went through"
            assert f"transformers {version}" in message
            assert f"{name} was not found" in message
            assert "pip install" in message
        assert result["left"] == [], f"without {name}"
        assert result["installed"] == []
    assert count == ROWS
    assert left == []


@pytest.mark.slow
def test_a_hook_point_that_is_missing_at_a_later_import_is_named():
    code = """
        import json
        import wrapt
        @wrapt.when_imported("transformers.generation.utils")
        def older(module):
            del module.GenerationMixin._sample
        import attnhook
        attnhook.install()
        chain = []
        try:
            from transformers import LlamaForCausalLM
        except Exception as error:
            while error is not None:
                chain.append(f"{type(error).__name__}: {error}")
                error = error.__cause__
        attnhook.uninstall()
        from transformers import modeling_utils
        assert not hasattr(modeling_utils.AttentionInterface.get_interface, "__wrapped__")
        print(json.dumps(chain))
    """
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    chain = json.loads(run.stdout)
    # Transformers makes an ImportError of whatever an import raises; ours is its cause, and in the traceback
    assert chain[-1].startswith("UnsupportedError: transformers ")
    assert "GenerationMixin._sample was not found" in chain[-1]
    assert "pip install" in chain[-1]

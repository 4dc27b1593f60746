"""Plugins: a real third-party package, installed by pip, and plugins that are broken in each way."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from attnhook.errors import PluginError
from attnhook.plugins import manager as plugins
from attnhook.plugins.hookspecs import hookimpl
from attnhook.sinks.memory import MemorySink
from attnhook.sinks.opening import open_sink
from tests.plugins.installing import installed

HERE = Path(__file__).parents[1]
ROOT = HERE.parent


@pytest.fixture(scope="session")
def thirdparty(tmp_path_factory):
    """A folder into which pip has installed tests/thirdparty."""
    return installed(HERE / "thirdparty", tmp_path_factory)


def python(code: str, *paths: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def ok(run: subprocess.CompletedProcess[str]) -> dict:
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_found_by_its_entry_point_and_listed_after_the_built_ins(thirdparty):
    code = """
        import json, sys
        from attnhook.plugins import manager as plugins
        backends, sinks = list(plugins.backends()), list(plugins.sink_classes())
        heavy = {"attnhook_thirdparty_example.echoengine", "torch", "transformers"} & set(sys.modules)
        print(json.dumps([plugins.manager().has_plugin("thirdparty_example"), backends, sinks, list(heavy)]))
    """
    found, backends, sinks, heavy = ok(python(code, thirdparty))
    assert found
    assert backends.index("transformers") < backends.index("echo")
    assert sinks.index("memory") < sinks.index("jsonl") < sinks.index("csvfile")
    assert not heavy  # looking around imports no engine
    assert "echo" not in ok(python(code))[1]  # nothing of it is attnhook's own


@pytest.mark.slow
def test_its_engine_sink_and_observer_work_together(thirdparty, tmp_path):
    out = tmp_path / "records.csv"
    code = f"""
        import csv, json
        import attnhook, attnhook_thirdparty_example as example
        from attnhook_thirdparty_example import echoengine
        with attnhook.capture(sinks="csvfile:{out}", top_k=4) as records:
            tokens = echoengine.generate([3, 1, 4, 1, 5, 9, 2, 6], 5)
        assert echoengine.generate([3, 1, 4, 1, 5, 9, 2, 6], 5) == tokens  # same without capture, and no records
        assert not hasattr(echoengine.attend, "__wrapped__")  # unhooked again
        assert [r.query_position for r in records.generated] == [7, 8, 9, 10, 11]
        for record in records:
            n = record.query_position + 1
            q, k = echoengine._tables[:, :, tokens[:n]]
            weights = echoengine.attend("", 0, q[:, -1], k).mean(0)
            expected = weights.topk(4)
            got = dict(record.top())
            assert max(abs(weights[s].item() - p) for s, p in got.items()) < 1e-5
            assert abs(sum(got.values()) - expected.values.sum().item()) < 1e-5
        lines = [[r.request_id, str(r.query_position), str(r.top()[0][0]), str(r.top()[0][1])] for r in records]
        assert list(csv.reader(open("{out}"))) == lines, lines
        assert example.seen == [(r.request_id, r.query_position) for r in records]
        print(json.dumps({{"records": len(records)}}))
    """
    assert ok(python(code, thirdparty)) == {"records": 5}


@pytest.mark.slow
def test_its_backend_patches_once_and_takes_it_back(thirdparty):
    code = """
        import json
        from attnhook.plugins import manager as plugins
        from attnhook.options import CaptureOptions
        backend = plugins.backends()["echo"]
        first = backend.install(CaptureOptions())
        assert not first.active  # the engine is not imported yet
        from attnhook_thirdparty_example import echoengine
        assert first.active and first.describe() == {"attnhook_thirdparty_example.echoengine.attend": "patched"}
        once = echoengine.attend
        assert plugins.backends()["echo"].install(CaptureOptions()).active and echoengine.attend is once
        first.uninstall()
        first.uninstall()
        assert not first.active and echoengine.attend is once.__wrapped__
        assert backend.install(CaptureOptions()).active  # the engine is imported: at once
        print(json.dumps({}))
    """
    ok(python(code, thirdparty))


@pytest.mark.slow
def test_its_engine_is_hooked_by_the_environment_alone(thirdparty, tmp_path):
    out = tmp_path / "records.csv"
    code = """
        import json, sys
        assert "attnhook.process.lifecycle" not in sys.modules
        from attnhook_thirdparty_example import echoengine
        echoengine.generate([3, 1, 4, 1, 5, 9, 2, 6], 5)
        print(json.dumps(sorted(sys.modules["attnhook.process.lifecycle"].installed())))
    """
    assert "echo" in ok(python(code, thirdparty, ATTNHOOK="1", ATTNHOOK_SINKS=f"csvfile:{out}"))
    assert len(out.read_text().splitlines()) == 5


def test_its_sink_and_observer_work_through_delivery(thirdparty, tmp_path):
    out = tmp_path / "records.csv"
    code = f"""
        import json
        import numpy as np, attnhook_thirdparty_example as example
        from attnhook import TokenRecord
        from attnhook.sinks.delivery import Delivery
        one = np.ones((1, 1), np.float32)
        record = TokenRecord("r", 7, (0,), one.astype(np.int32), one, np.zeros((1, 20), np.float32))
        with Delivery.from_urls(["csvfile:{out}", "memory:"]) as delivery:
            delivery.put([record] * 3)
            assert delivery.flush(10)
            assert open("{out}").read().splitlines() == ["r,7,1,1.0"] * 3
            assert delivery.sinks["memory:"].records == [record] * 3
        stats = delivery.stats()
        unobserved = Delivery.from_urls(["memory:"], observe=False)
        assert list(unobserved.stats()) == ["memory:"]
        print(json.dumps({{"seen": example.seen, "stats": stats}}))
    """
    result = ok(python(code, thirdparty))
    assert result["seen"] == [["r", 7]] * 3
    written = {"queued": 0, "written": 3, "dropped": {}}
    assert result["stats"] == {
        f"csvfile:{out}": written,
        "memory:": written,
        "observer thirdparty_example": written,
    }


# -- broken plugins, in this process on a plugin manager of their own


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(plugins, "_manager", None)


@pytest.fixture
def distribution(tmp_path, monkeypatch, fresh):
    """Put an installed distribution with one plugin module on sys.path; returns the module's name."""
    monkeypatch.syspath_prepend(tmp_path)
    numbers = itertools.count()

    def make(code: str) -> str:
        name = f"attnhook_broken_{tmp_path.name}_{next(numbers)}".replace("-", "_")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[attnhook]\n{name} = {name}\n")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return name

    return make


def test_a_plugin_whose_import_fails_is_named(distribution):
    name = distribution("import no_such_module_anywhere")
    with pytest.raises(PluginError, match=rf"{name}.*from {name}.*no_such_module_anywhere.*uninstall") as caught:
        plugins.manager()
    assert isinstance(caught.value.__cause__, ImportError)
    with pytest.raises(PluginError):  # and again: half a manager is not kept
        plugins.backends()


def test_a_plugin_with_an_unknown_hook_is_named(distribution):
    name = distribution("""
        from attnhook import hookimpl
        @hookimpl
        def attnhook_tokens(record): ...
    """)
    with pytest.raises(PluginError, match=rf"{name}.*attnhook_tokens"):
        plugins.manager()


def test_a_plugin_with_an_unknown_argument_is_named(distribution):
    name = distribution("""
        from attnhook import hookimpl
        @hookimpl
        def attnhook_token(recrod): ...
    """)
    with pytest.raises(PluginError, match=rf"(?s){name}.*recrod"):
        plugins.manager()


class _Backend:
    name = "transformers"

    def available(self):
        return False

    def version(self):
        return None

    def install(self, options):
        raise NotImplementedError


class _Plugin:
    """Registers the same backend and sink names as the built-ins."""

    @hookimpl
    def attnhook_register_backends(self, register):
        register(_Backend())

    @hookimpl
    def attnhook_register_sinks(self, register):
        register("jsonl", MemorySink)


def test_two_backends_of_one_name_are_an_error(fresh):
    plugins.manager().register(_Plugin())
    with pytest.raises(PluginError, match=r"two backends are called 'transformers'.*Rename one"):
        plugins.backends()


def test_two_sinks_of_one_name_are_an_error(fresh):
    plugins.manager().register(_Plugin())
    with pytest.raises(PluginError, match=r"two sinks are called 'jsonl'.*Rename one"):
        plugins.sink_classes()


class _Nonsense:
    @hookimpl
    def attnhook_register_backends(self, register):
        register(object())

    @hookimpl
    def attnhook_register_sinks(self, register):
        register("nonsense", object)


def test_what_is_no_backend_or_sink_is_an_error(fresh):
    plugins.manager().register(_Nonsense())
    with pytest.raises(PluginError, match="lacks one of name, available, version, install"):
        plugins.backends()
    with pytest.raises(PluginError, match="no subclass of"):
        plugins.sink_classes()


@pytest.mark.parametrize("url", ["nosuch:path", "jsonl", "", ":", "JSONL:path"])
def test_an_unknown_sink_lists_the_known_ones(fresh, url):
    with pytest.raises(PluginError, match=r"memory:.*jsonl:") as caught:
        open_sink(url)
    assert repr(url) in str(caught.value)


# -- pluggy's own call: its order, its wrappers, and whose fault it is


class _Sinks:
    """Registers sinks under the names that it is given."""

    def __init__(self, *names):
        self.names = names

    @hookimpl
    def attnhook_register_sinks(self, register):
        for name in self.names:
            register(name, MemorySink)


@pytest.mark.parametrize("kind", ["wrapper", "hookwrapper"])
def test_a_wrapper_sees_and_changes_what_others_register(fresh, kind):
    class Renames:
        @hookimpl(**{kind: True})
        def attnhook_register_sinks(self, register):
            done.append("before")
            yield
            done.append("after")
            register("last", MemorySink)

    done = []
    plugins.manager().register(_Sinks("theirs"))
    plugins.manager().register(Renames())
    names = list(plugins.sink_classes())
    assert done == ["before", "after"]
    assert names[0] == "memory" and names[-2:] == ["theirs", "last"]


def test_tryfirst_and_trylast_are_heeded(fresh):
    class First(_Sinks):
        @hookimpl(tryfirst=True)
        def attnhook_register_sinks(self, register):
            register("first", MemorySink)

    class Last(_Sinks):
        @hookimpl(trylast=True)
        def attnhook_register_sinks(self, register):
            register("last", MemorySink)

    for plugin in (Last(), First(), _Sinks("between")):
        plugins.manager().register(plugin)
    names = list(plugins.sink_classes())
    assert names[:2] == ["first", "memory"] and names[-2:] == ["between", "last"]


def test_installed_plugins_are_listed_by_name_behind_the_built_ins(distribution):
    names = [
        distribution(f"""
            from attnhook import hookimpl
            from attnhook.sinks.memory import MemorySink
            @hookimpl
            def attnhook_register_sinks(register):
                register("theirs{n}", MemorySink)
        """)
        for n in range(3)
    ]
    assert sorted(names) == names
    found = list(plugins.sink_classes())
    assert found[0] == "memory"
    assert [name for name in found if name.startswith("theirs")] == ["theirs0", "theirs1", "theirs2"]


@pytest.mark.parametrize("wrapper", [False, True])
def test_who_raises_is_named(fresh, wrapper):
    class Broken:
        if wrapper:

            @hookimpl(wrapper=True)
            def attnhook_register_sinks(self, register):
                yield
                raise ZeroDivisionError("by a wrapper")
        else:

            @hookimpl
            def attnhook_register_sinks(self, register):
                raise ZeroDivisionError("by an implementation")

    class Passes:
        @hookimpl(wrapper=True)
        def attnhook_register_sinks(self, register):
            return (yield)  # the error comes through here, and is none of this plugin's

    plugins.manager().register(_Sinks("theirs"), name="innocent")
    plugins.manager().register(Broken(), name="broken")
    plugins.manager().register(Passes(), name="passes")
    said = "by a wrapper" if wrapper else "by an implementation"
    with pytest.raises(
        PluginError,
        match=rf"^attnhook plugin 'broken': attnhook_register_sinks failed: ZeroDivisionError: {said}\. Mend",
    ):
        plugins.sink_classes()


def test_who_takes_a_name_twice_is_named(fresh):
    plugins.manager().register(_Sinks("jsonl"), name="late")
    with pytest.raises(PluginError, match=r"^attnhook plugin 'late': two sinks are called 'jsonl'"):
        plugins.sink_classes()

"""What third parties build on: its names are there, a version keeps them, and newer versions are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import attnhook.plugins
import attnhook.serving
from attnhook import __version__
from attnhook.errors import PluginError
from attnhook.plugins import CONTRACTS, Sink, hookimpl
from attnhook.plugins import manager as plugins
from attnhook.serving import Worker
from tests.helpers import python
from tests.plugins import frozen
from tests.serving.fake import Adapter, Engine


def test_a_contract_is_what_its_version_says():
    for contract, found in frozen.contracts().items():
        kept = json.loads(frozen.path(contract, CONTRACTS[contract]).read_text(encoding="utf-8"))
        assert found == kept, (
            f"the {contract} contract changed: where plugins that fit it no longer do, raise its version in CONTRACTS; "
            "then python -m tests.plugins.frozen"
        )


def test_every_version_is_kept():
    kept = {path.stem for path in frozen.FOLDER.iterdir()}
    assert kept == {f"{contract}-{n}" for contract, newest in CONTRACTS.items() for n in range(1, newest + 1)}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["plugins", "serving"])
def test_importing_is_light_and_every_name_is_there_without_a_warning(package):
    run = python(
        "-W", "error::DeprecationWarning:__main__", "-c", f"""
        import sys
        import attnhook.{package} as package
        assert not {{"torch", "pluggy", "numpy", "transformers"}} & set(sys.modules)
        from attnhook.{package} import *
        missing = [name for name in package.__all__ if name not in globals() or name not in dir(package)]
        print(missing, "transformers" in sys.modules)
        """,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "[] False\n"), run.stderr
    with pytest.raises(AttributeError, match=f"attnhook.{package}.*nosuch"):
        getattr(getattr(attnhook, package), "nosuch")  # noqa: B009


@pytest.mark.slow
def test_type_checkers_of_third_parties_know_the_types(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from attnhook.plugins import NoSuchName, Row\n"
        "from attnhook.serving import Waiting\n"
        "reveal_type(Row('r', 0, 3, None, 0).position)\n"
        "reveal_type(Waiting().take)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", "cache", "theirs.py"]
    # elsewhere than in this source tree, so that attnhook is a package that is installed
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    for said in ('note: Revealed type is "int"', "-> attnhook.serving.wire.Share", 'no attribute "NoSuchName"'):
        assert said in run.stdout, run.stdout + run.stderr


# -- versions


class _Backend:
    name = "newer"

    def __init__(self, contract: object) -> None:
        self.contract = contract


class _Sink(Sink):
    def open(self, config):
        pass

    def write(self, batch):
        pass


@pytest.fixture
def register(monkeypatch):
    """Register a backend or a sink class on a plugin manager of the test's own."""
    monkeypatch.setattr(plugins, "_manager", None)

    def add(backend: object = None, sink: object = None) -> None:
        class Plugin:
            @hookimpl
            def attnhook_register_backends(self, register):
                if backend is not None:
                    register(backend)

            @hookimpl
            def attnhook_register_sinks(self, register):
                if sink is not None:
                    register("newer", sink)

        plugins.manager().register(Plugin(), name="of_tomorrow")

    return add


def _refusal(what: str, contract: str) -> str:
    return re.escape(
        f"{what} was written for version 2 of the {contract} contract, and attnhook {__version__} knows versions up to "
        "1: install a newer attnhook, or a release of the plugin for version 1"
    )


def test_a_backend_of_a_newer_contract_is_refused(register):
    register(_Backend(2))
    with pytest.raises(PluginError, match="attnhook plugin 'of_tomorrow': " + _refusal("backend 'newer'", "backend")):
        plugins.backends()


def test_a_sink_of_a_newer_contract_is_refused(register):
    register(sink=type("Newer", (_Sink,), {"contract": 2}))
    with pytest.raises(PluginError, match="attnhook plugin 'of_tomorrow': " + _refusal("sink 'newer'", "sink")):
        plugins.sink_classes()


def test_an_adapter_of_a_newer_contract_is_refused():
    class Newer(Adapter):
        contract = 2

    engine = Engine()
    with pytest.raises(PluginError, match=_refusal("the adapter of Fake", "adapter")):
        Worker(Newer(engine, engine.adapter.ranks))


@pytest.mark.parametrize("stated", [0, -1, "1", None, True, 1.0])
def test_a_version_that_is_none_is_refused(register, stated):
    register(_Backend(stated))
    with pytest.raises(PluginError, match=rf"contract={stated!r}: state a version of the backend contract, 1 to 1"):
        plugins.backends()


def test_servers_that_are_one_text_are_refused(register):
    backend = _Backend(1)
    backend.servers = "tinyserve"
    backend.available = backend.version = backend.install = lambda *_: None
    register(backend)
    with pytest.raises(PluginError, match=r"backend 'newer': servers='tinyserve' is one text: write \('tinyserve',\)"):
        plugins.backends()


def test_what_states_the_known_version_or_none_is_taken(register):
    register(sink=type("Stated", (_Sink,), {"contract": 1}))
    assert "newer" in plugins.sink_classes()
    assert _Sink.contract == 1

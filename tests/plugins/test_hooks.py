"""The table of hooks: places that releases have or lack, what is put in place, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from attnhook.errors import UnsupportedError
from attnhook.plugins.hooks import MARK, Hook, Hooks
from attnhook.plugins.patching import EngineInstallation


class Runner:
    """What an engine's module has."""

    def run(self) -> str:
        return "engine"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """An engine of two modules, and an adapter's file of wrappers, all importable."""

    def wrap_run(original: Any) -> Any:
        def run(self: Any) -> str:
            return f"hooked {original(self)}"

        return run

    found = {}
    for name in ("engine_a", "engine_b", "an_adapter", "an_adapter.worker"):
        module = ModuleType(name)
        module.__spec__ = type("Spec", (), {"name": name, "loader": None, "origin": None})()  # type: ignore[assignment]
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        found[name] = module
    found["engine_a"].Runner = type("Runner", (Runner,), {"run": Runner.run})  # type: ignore[attr-defined]
    found["an_adapter.worker"].wrap_run = wrap_run  # type: ignore[attr-defined]
    yield found


def table(*hooks: Hook) -> Hooks:
    return Hooks("an_adapter", hooks, lambda: "engine 7.1", "engine 8: pip install 'engine>=8'")


def installed(hooks: Hooks) -> EngineInstallation:
    installation = EngineInstallation("engine", "7.1", hooks.patchers(), hooks.wanted)
    installation.start()
    return installation


def test_a_hook_is_put_in_place_marked_and_taken_back(modules: dict[str, Any]) -> None:
    hooks = table(Hook("worker.wrap_run", ("engine_a:Runner.run",)))
    runner = modules["engine_a"].Runner
    installation = installed(hooks)
    assert runner().run() == "hooked engine" and getattr(runner.run, MARK) == "worker.wrap_run"
    hooks.check_in_place(("worker.",))
    installation.uninstall()
    assert runner().run() == "engine"
    with pytest.raises(UnsupportedError, match=r"engine 7.1: engine_a.Runner.run was not found.*engine 8"):
        hooks.check_in_place(("worker.",))
    hooks.check_in_place(("frontend.",))  # which this process need not have


def test_of_several_places_the_first_that_a_release_has(modules: dict[str, Any]) -> None:
    runner = modules["engine_a"].Runner
    newer = Hook("worker.wrap_run", ("engine_a:Runner.go", "engine_a:Runner.run"))
    installation = installed(table(newer))
    assert runner().run() == "hooked engine"
    installation.uninstall()
    elsewhere = Hook("worker.wrap_run", ("engine_gone:Runner.run", "engine_a:Runner.run"))
    hooks = table(elsewhere)
    hooks.check_modules()
    installation = installed(hooks)
    assert runner().run() == "hooked engine"
    installation.uninstall()


def test_a_place_that_is_missing_is_refused_or_left_out(modules: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"engine 7.1: .*Runner.go was not found.*engine 8"):
        installed(table(Hook("worker.wrap_run", ("engine_a:Runner.go",))))
    installation = installed(table(Hook("worker.wrap_run", ("engine_a:Runner.go",), needed=False)))
    assert not hasattr(modules["engine_a"].Runner, "go")
    installation.uninstall()


def test_what_a_newer_release_does_itself_is_left_to_it(modules: dict[str, Any]) -> None:
    runner = modules["engine_a"].Runner
    hooks = table(Hook("worker.wrap_run", ("engine_a:Runner.run",), unless="Runner.better"))
    installation = installed(hooks)
    assert runner().run() == "hooked engine"
    installation.uninstall()
    runner.__annotations__ = {"better": "bool"}  # as a dataclass's field without a default
    installation = installed(hooks)
    assert runner().run() == "engine"
    installation.uninstall()


def test_a_module_that_a_release_has_not_is_named(modules: dict[str, Any]) -> None:
    hooks = table(Hook("worker.wrap_run", ("engine_gone.runner:Runner.run",)))
    with pytest.raises(UnsupportedError, match=r"engine 7.1: its module engine_gone.runner was not found"):
        hooks.check_modules()
    table(Hook("worker.wrap_run", ("engine_gone.runner:Runner.run",), needed=False)).check_modules()

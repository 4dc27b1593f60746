"""What backends learn of the process's options: those of `install`, then others, the old ones after a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

import attnhook
from attnhook.errors import PluginError, UnsupportedError
from attnhook.options import CaptureOptions
from attnhook.plugins import EngineInstallation
from attnhook.plugins import manager as plugins
from attnhook.process import lifecycle
from tests.helpers import ROOT, python
from tests.plugins.installing import installed


class _Engine:
    """A backend that notes what happens to it; ``refuses`` is a top k that it will not have."""

    def __init__(self, name: str, *, any_options: bool = False, refuses: int = 0) -> None:
        self.name, self.any_options, self.refuses = name, any_options, refuses
        self.log: list[Any] = []

    def available(self) -> bool:
        return True

    def version(self) -> str:
        return "1"

    def install(self, options: CaptureOptions) -> EngineInstallation:
        if options.request.top_k == self.refuses:
            raise UnsupportedError(f"{self.name}: no top k of {self.refuses}")
        self.log.append(options.request.top_k)
        engine = self

        class Installation(EngineInstallation):
            def uninstall(self) -> None:
                engine.log.append("uninstalled")
                super().uninstall()

        installation = Installation(self.name, "1", {}, "1", any_options=self.any_options)
        installation.start()
        return installation


@pytest.fixture
def engines(monkeypatch):
    """Only these engines are there."""

    def use(*engines: Any) -> None:
        monkeypatch.setattr(plugins, "backends", lambda: {engine.name: engine for engine in engines})

    yield use
    attnhook.uninstall()


def test_other_options_of_install_reach_a_backend(engines):
    told, not_told = _Engine("told"), _Engine("not told", any_options=True)
    engines(told, not_told)
    attnhook.install(top_k=4)
    attnhook.install(top_k=4)
    attnhook.install(top_k=8)
    assert told.log == [4, "uninstalled", 8]
    assert not_told.log == [4]
    attnhook.uninstall()
    assert told.log[3:] == not_told.log[1:] == ["uninstalled"]


def test_install_reaches_a_backend_that_a_capture_has_installed(engines):
    engine = _Engine("engine")
    engines(engine)
    with attnhook.capture(top_k=2):
        attnhook.install(top_k=8)
        assert engine.log == [2, "uninstalled", 8]
        with attnhook.capture(top_k=3):
            assert engine.log == [2, "uninstalled", 8]  # a block's own options are in its session
    attnhook.install(top_k=8)
    attnhook.uninstall()
    assert engine.log == [2, "uninstalled", 8, "uninstalled"]


@pytest.mark.parametrize("by_capture", [False, True])
def test_where_one_refuses_all_have_the_old_ones(engines, by_capture):
    first, second = _Engine("first"), _Engine("second", refuses=8)
    engines(first, second)
    if by_capture:
        with attnhook.capture(top_k=4):
            with pytest.raises(UnsupportedError, match="second: no top k of 8"):
                attnhook.install(top_k=8)
            attnhook.install(top_k=5)  # which they are told, since those of 8 were not taken
    else:
        attnhook.install(top_k=4)
        with pytest.raises(UnsupportedError, match="second: no top k of 8"):
            attnhook.install(top_k=8)
        attnhook.install(top_k=5)
    assert [entry for entry in first.log if entry != "uninstalled"] == [4, 8, 4, 5]
    assert [entry for entry in second.log if entry != "uninstalled"] == [4, 4, 5]


# -- a backend with a bug


def test_a_backend_that_raises_by_mistake_is_named(engines, monkeypatch):
    good, bad = _Engine("good"), _Engine("bad")
    engines(good, bad)
    for method in ("available", "install"):
        with monkeypatch.context() as patch:
            patch.setattr(bad, method, lambda *_: 1 / 0)
            with pytest.raises(
                PluginError, match=rf"backend 'bad': {method} failed: ZeroDivisionError: .*Mend its plugin"
            ):
                attnhook.install()
        assert lifecycle.installed() == {}
    assert good.log == [32, "uninstalled"]  # hooked, and unhooked again when the other failed


def test_an_uninstall_that_raises_leaves_no_other_engine_hooked(engines, monkeypatch):
    bad, good = _Engine("bad"), _Engine("good")
    engines(bad, good)
    attnhook.install()
    monkeypatch.setattr(lifecycle.installed()["bad"], "uninstall", lambda: 1 / 0)
    with pytest.raises(PluginError, match="backend 'bad': uninstall failed: ZeroDivisionError"):
        attnhook.uninstall()
    assert good.log == [32, "uninstalled"] and lifecycle.installed() == {}


def test_what_is_no_installation_is_refused(engines, monkeypatch):
    bad = _Engine("bad")
    engines(bad)
    monkeypatch.setattr(bad, "install", lambda options: None)
    with pytest.raises(PluginError, match="backend 'bad': install gave None, which has no uninstall"):
        attnhook.install()


@pytest.mark.slow
def test_the_third_partys_backend_is_told(tmp_path_factory):
    site = installed(ROOT / "tests" / "thirdparty", tmp_path_factory)
    code = f"""
        import json, sys
        sys.path.insert(0, {str(site)!r})
        import attnhook
        from attnhook_thirdparty_example import echoengine
        found = []
        for k in (4, 8):
            installation = attnhook.install(top_k=k)["echo"]
            found += [installation.options.request.top_k, installation.active]
        with attnhook.capture(top_k=2) as records:
            echoengine.generate([3, 1, 4, 1, 5], 2)
        found += [len(records), len(records[0].top()), installation.options.request.top_k]
        attnhook.uninstall()
        print(json.dumps(found + [installation.active]))
    """
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [4, True, 8, True, 2, 2, 8, False]

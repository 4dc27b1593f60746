"""Environment variables of plugins: those that they register are known, all others are refused as misspelt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnhook.errors import OptionError, PluginError
from attnhook.options import CaptureOptions
from attnhook.plugins import hookimpl
from attnhook.plugins import manager as plugins
from tests.helpers import ROOT, python
from tests.plugins.installing import installed

NAME = "ATTNHOOK_THIRDPARTY_EXAMPLE_DELIMITER"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(ROOT / "tests" / "thirdparty", tmp_path_factory)


def _written(site: Path, out: Path, **environ: str) -> tuple[int, str]:
    """What the example's sink writes of one record, or the error's last line."""
    code = f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        import numpy as np
        import attnhook
        from attnhook import TokenRecord
        from attnhook.sinks import outlet
        attnhook.install(sinks="csvfile:{out}")
        one = np.ones((1, 1), np.float32)
        outlet.publish([TokenRecord("r", 7, (0,), one.astype(np.int32), one, np.zeros((1, 20), np.float32))])
        attnhook.uninstall()
        print(open("{out}").read().strip())
    """
    run = python("-c", code, **environ)
    return run.returncode, (run.stdout or run.stderr).strip().splitlines()[-1]


def test_a_plugin_reads_its_variable(site, tmp_path):
    assert _written(site, tmp_path / "records.csv", **{NAME: ";"}) == (0, "r;7;1;1.0")


def test_a_bad_value_is_the_plugins_to_refuse(site, tmp_path):
    status, said = _written(site, tmp_path / "records.csv", **{NAME: "abc"})
    assert status == 1 and said.endswith(f"OptionError: {NAME}='abc' must be one sign, such as ;")


def test_a_misspelt_one_is_refused_with_the_name_that_was_meant(site, tmp_path):
    status, said = _written(site, tmp_path / "records.csv", ATTNHOOK_THIRDPARTY_EXAMPLE_DELIMITR=";")
    assert status == 1
    assert said.endswith(f"unknown environment variable ATTNHOOK_THIRDPARTY_EXAMPLE_DELIMITR; did you mean {NAME!r}?")


def test_commands_know_them_too(site):
    code = f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        sys.argv = ["attnhook", "run", "--max-new-tokens", "0", "Hello"]
        from attnhook.cli.app import main
        main()
    """
    run = python("-c", code, **{NAME: ";"})
    assert (run.returncode, run.stderr) == (2, "error: --max-new-tokens 0 must be at least 1\n")


def test_without_it_the_variable_is_unknown():
    with pytest.raises(OptionError, match=f"unknown environment variable {NAME}"):
        CaptureOptions.resolve(environ={NAME: ";"}, plugins=plugins.variables)


def test_plugins_are_asked_only_for_what_attnhook_does_not_know():
    def fail() -> set[str]:
        raise AssertionError("plugins were loaded")

    environ = {"ATTNHOOK": "1", "ATTNHOOK_TOP_K": "3", "ATTNHOOK_SINKS": "", "PATH": "/bin"}
    assert CaptureOptions.resolve(environ=environ, plugins=fail).request.top_k == 3
    assert json.loads(python("-c", """
        import json, sys
        from attnhook.options import CaptureOptions
        CaptureOptions.resolve()
        print(json.dumps("attnhook.plugins.manager" in sys.modules))
    """, ATTNHOOK_TOP_K="3").stdout) is False  # fmt: skip


@pytest.mark.parametrize("name", ["ATTNHOOK_LAYER", "ATTNHOOK_OTHER_PORT", "ATTNHOOK_MY_PLUGIN_", "MY_PLUGIN_PORT"])
def test_a_name_that_is_not_the_plugins_is_refused(monkeypatch, name):
    monkeypatch.setattr(plugins, "_manager", None)

    class Plugin:
        @hookimpl
        def attnhook_register_variables(self, register):
            register("ATTNHOOK_MY_PLUGIN_PORT")
            register(name)

    plugins.manager().register(Plugin(), name="my-plugin")
    with pytest.raises(PluginError, match=rf"attnhook plugin 'my-plugin': variable '{name}' must begin with ATTNHOOK_"):
        plugins.variables()

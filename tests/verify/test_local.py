"""``attnhook verify`` of this process: every engine that can checks itself, a third party's too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnhook.options import CaptureOptions
from attnhook.plugins import SelfCheck
from attnhook.plugins import manager as plugins
from attnhook.verify import local
from tests.helpers import ROOT, byte_tokenizer, python, tiny_model
from tests.plugins.installing import installed


class _Engine:
    """A backend whose engine is there, and which is asked to check itself."""

    def __init__(self, name: str, check: Any) -> None:
        self.name, self.check = name, check
        self.asked: list[str | None] = []

    def available(self) -> bool:
        return True

    def version(self) -> str:
        return "1"

    def install(self, options: CaptureOptions) -> Any:
        return self

    active = False

    def describe(self) -> dict[str, str]:
        return {"a.place": "patched"}

    def uninstall(self) -> None:
        pass

    def self_check(self, model: str | None) -> Any:
        self.asked.append(model)
        if isinstance(self.check, Exception):
            raise self.check
        return self.check


@pytest.fixture
def engines(monkeypatch):
    """Only these engines are there."""

    def use(*engines: Any) -> None:
        monkeypatch.setattr(plugins, "backends", lambda: {engine.name: engine for engine in engines})

    return use


def test_every_engine_is_asked_and_one_that_fails_keeps_no_other(engines):
    one = _Engine("one", SelfCheck("check of one", {"rows": "5"}, ["2 rows are missing"]))
    two = _Engine("two", RuntimeError("it broke"))
    three = _Engine("three", SelfCheck("check of three", {"rows": "7"}))
    engines(one, two, three)
    report = local.run("some/model")
    assert one.asked == two.asked == three.asked == ["some/model"]
    assert report.sections["check of one"] == {"rows": "5"} and report.sections["check of three"] == {"rows": "7"}
    assert report.problems == [
        "one: 2 rows are missing", "two: the check broke off: RuntimeError: it broke"
    ]  # fmt: skip
    assert report.sections["hooks"]["two: a.place"] == "patched"


def test_two_checks_of_one_title_are_both_reported(engines):
    engines(*(_Engine(name, SelfCheck("self-check", {"of": name})) for name in ("one", "two")))
    report = local.run()
    assert report.sections["self-check"] == {"of": "one"} and report.sections["two: self-check"] == {"of": "two"}
    assert report.ok


def test_what_is_no_result_is_a_problem(engines):
    engines(_Engine("one", {"ok": True}))
    assert local.run().problems == [
        "its self_check gave {'ok': True}, which is no attnhook.plugins.SelfCheck: mend the plugin"
    ]


def test_an_environment_where_nothing_can_be_checked_is_not_ok(engines):
    class Silent(_Engine):
        self_check = None  # type: ignore[assignment]

    engines(Silent("silent", None))
    (problem,) = local.run().problems
    assert problem.startswith("no engine that can check itself is installed here: pip install 'attnhook[transformers]'")


@pytest.mark.slow
def test_a_third_partys_engine_checks_itself(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    site = installed(ROOT / "tests" / "thirdparty", tmp_path_factory)
    tiny_model(vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run = python(
        "-c", f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        sys.argv = ["attnhook", "verify", "--model", {str(tmp_path)!r}, "--json"]
        from attnhook.cli.app import main
        main()
        """,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["self-check of echo"]["records"] == "5"
    assert float(report["self-check of echo"]["largest |dP|"]) < 1e-5
    assert report["self-check against eager attention"]["top-k lists equal up to ties"] == "100.00%"
    assert report["hooks"]["echo: attnhook_thirdparty_example.echoengine.attend"] == "patched"
    assert report["plugins"] == {"thirdparty_example": "loaded"} and report["ok"]

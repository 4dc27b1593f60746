"""Opening what a URL names: a sink that fails in its own way is named, and so is its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from attnhook.errors import PluginError
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import open_sink


class Clumsy(Sink):
    """A third party's sink that checks nothing."""

    fault: Exception = PermissionError(13, "Permission denied")

    def open(self, config: str) -> None:
        raise self.fault

    def write(self, batch: Sequence[TokenRecord]) -> None:
        raise AssertionError("it never opened")


class Unmade(Clumsy):
    def __init__(self) -> None:
        raise KeyError("HOME")


@pytest.fixture(autouse=True)
def _two_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "sink_classes", lambda: {"clumsy": Clumsy, "unmade": Unmade})


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("clumsy:x", r"Clumsy\) failed to open: PermissionError: .*Permission denied"),
        ("unmade:", "Unmade.*KeyError: 'HOME'"),
    ],
)
def test_what_it_raises_names_the_sink(url: str, part: str) -> None:
    with pytest.raises(PluginError, match=f"sink {url.partition(':')[0]}: .*{part}.*mend its plugin") as caught:
        open_sink(url)
    assert caught.value.__cause__ is not None


def test_its_own_plugin_error_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PluginError("clumsy: no such folder; make it")
    monkeypatch.setattr(Clumsy, "fault", own)
    with pytest.raises(PluginError) as caught:
        open_sink("clumsy:x")
    assert caught.value is own


def test_what_an_url_hides_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: Any, config: str) -> None:
        raise ValueError(f"cannot reach {config}")

    monkeypatch.setattr(Clumsy, "open", connect)
    with pytest.raises(PluginError, match="cannot reach") as caught:
        open_sink("clumsy:https://user:s3cret@example.org/x")
    assert "s3cret" not in str(caught.value)

"""Old names of modules: they are the new modules, and say so once."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

import pytest

import attnhook
from attnhook.system import moved
from tests.helpers import python

#: What `attnhook.records` had besides `TokenRecord` and what makes records of records.
OF_RECORDS = {
    "record.row": (
        "MODES", "Mode", "PHASES", "RowName", "SCHEMA_VERSION", "TOKENS_VERSION", "ThinkPhase", "VERSIONS",
    ),
    "record.layout": ("HEADER_FIELDS", "MAGIC", "NAME_SEPARATOR", "row_size"),
    "record.packing": ("has_tokens", "layers_of", "pack_rows", "row_without_tokens", "with_phase"),
}  # fmt: skip


@pytest.mark.parametrize("old", moved.MODULES)
def test_an_old_name_is_the_new_module(old):
    new = import_module(f"attnhook.{moved.MODULES[old]}")
    sys.modules.pop(f"attnhook.{old}", None)
    with pytest.warns(
        DeprecationWarning, match=f"attnhook.{old} is attnhook.{moved.MODULES[old]} now; the old name goes"
    ) as told:
        found = __import__(f"attnhook.{old}", fromlist=["x"])
    assert found is new
    assert told[0].filename == __file__
    assert new.__spec__ is not None and new.__spec__.name == f"attnhook.{moved.MODULES[old]}"


@pytest.mark.parametrize(
    ("package", "name", "home"),
    [
        ("capture", "StepCapture", "capture.step"),
        ("capture", "sessions", "capture.session"),
        ("plugins", "backends", "plugins.manager"),
        ("plugins", "open_sink", "sinks.opening"),
        ("backends", "Backend", "plugins.contracts"),
        ("verify", "run", "verify.local"),
        ("cli", "main", "cli.app"),
        *(("records", name, home) for home, names in OF_RECORDS.items() for name in names),
        ("sinks.delivery", "BATCH", "sinks.record_writers"),
        ("system.addresses", "shown", "system.addresses:masked"),
        ("options", "shown", "options:quoted"),
    ],
)
def test_an_old_name_of_a_function_is_the_new_one(package, name, home):
    home, _, new = home.partition(":")
    module = sys.modules.get(f"attnhook.{package}") or import_module(f"attnhook.{package}")
    with pytest.warns(DeprecationWarning, match=f"{name} is attnhook.{home}.{new or name} now; the old name goes"):
        found = getattr(module, name)
    assert found is getattr(import_module(f"attnhook.{home}"), new or name)
    with pytest.raises(AttributeError, match="nosuch"):
        getattr(module, "nosuch")  # noqa: B009


def test_as_scripts_wrote_it():
    code = """
        import warnings
        warnings.simplefilter("ignore")
        import attnhook
        from attnhook import lifecycle, records
        from attnhook.records import TokenRecord
        from attnhook.sinks import Sink
        from attnhook.capture import Row, Session, StepCapture, sessions, wants_row
        from attnhook.client import Client
        from attnhook.analysis.zones import classify, without_sink
        import attnhook.fingerprint as fp
        assert attnhook.lifecycle.dropped() == {} and records.TokenRecord is TokenRecord is attnhook.TokenRecord
        assert fp.SIZE == 20
        print("ok")
    """
    run = python("-c", code)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr


def test_what_was_never_there_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="nosuch"):
        import_module("attnhook.nosuch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attnhook.record.fingerprint is import_module("attnhook.record.fingerprint")

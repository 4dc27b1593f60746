"""Fixtures of the engines' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import BESIDE_OTHERS


@pytest.fixture(scope="session")
def smol_replies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what each server that has run answered to `same_json.BODY`; all workers of a run share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if BESIDE_OTHERS else base) / "same-json"
    folder.mkdir(exist_ok=True)
    return folder

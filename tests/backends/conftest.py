"""Fixtures of the engines' tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def smol_replies() -> dict[str, Any]:
    """What each server that has run answered to `same_json.BODY`; one runs after the other."""
    return {}

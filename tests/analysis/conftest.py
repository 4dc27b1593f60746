"""One small map, made once for all that only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnhook.analysis.manifold.run import discover
from benchmarks.planted import planted
from tests.analysis.maps import SMALL, records, write


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,500 fingerprints of 12 kinds, in a data set."""
    folder = tmp_path_factory.mktemp("planted")
    fingerprints, kinds = planted(1500, seed=5)
    return write(f"parquet:{folder / 'store'}", records(fingerprints, [f"{kind}-request" for kind in kinds]))


@pytest.fixture(scope="session")
def small_map(planted_store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted discovery in that store; not to be changed."""
    return discover(planted_store, tmp_path_factory.mktemp("map") / "found", SMALL).folder

"""Records for the tests of sinks and stores, and a small disk."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from tests.helpers import python
from tests.record.samples import token_records


def record(position: int = 0, **changes: object) -> TokenRecord:
    """A raw record of two layers with a span; different positions have different fingerprints."""
    histogram = np.zeros((2, fp.BINS), np.float32)
    histogram[:, position % fp.BINS] = 0.75
    histogram[:, (position + 5) % fp.BINS] += 0.25
    values: dict = {
        "request_id": "r",
        "query_position": position,
        "layers": (3, 29),
        "token_positions": np.array([[position, -1], [position, 0]], np.int32),
        "attention_scores": np.array([[0.75, 0], [0.5, 0.25]], np.float32),
        "fingerprints": fp.assemble(histogram, np.array([0.25, 0.5])),
        "model": "org/model",
        "span_names": ("document",),
        "span_mass": np.array([[0.5], [0.125]], np.float32),
    }
    return TokenRecord(**{**values, **changes})


def with_ids(position: int = 0, **changes: object) -> TokenRecord:
    """`record` with token ids."""
    ids = np.array([[position + 100, -1], [position + 100, 7]], np.int32)
    return record(position, **{"token_ids": ids, "query_token": position + 100, **changes})


def lean(position: int = 0, **changes: object) -> TokenRecord:
    """What a server in fingerprint mode captures: one layer, no positions."""
    whole = record(position)
    values: dict = {
        "layers": (29,),
        "token_positions": np.zeros((1, 0), np.int32),
        "attention_scores": np.zeros((1, 0), np.float32),
        "fingerprints": whole.fingerprints[:1],
        "mode": "fingerprint",
        "span_names": (),
        "span_mass": np.zeros((1, 0), np.float32),
    }
    return record(position, **{**values, **changes})


@st.composite
def batches(draw: st.DrawFn, max_size: int = 6) -> list[TokenRecord]:
    """Any records, lean ones among them, with keys that differ."""
    plain: dict = {}
    ids: dict = {"token_ids": st.just(np.zeros((1, 0), np.int32)), "query_token": st.integers(-1, 2**31 - 1)}
    anything = token_records() | st.one_of(
        st.builds(
            lean,
            st.integers(0, 2**31 - 1),
            decode_step=st.none() | st.integers(0, 2**31 - 1),
            layers=st.tuples(st.integers(0, 2**15 - 1)),
            think_phase=st.sampled_from(["think", "output"]),
            **more,
        )
        for more in (plain, ids)
    )
    return draw(st.lists(anything, min_size=1, max_size=max_size, unique_by=lambda record: record.key))


def assert_rows(rows: list[dict], records: list[TokenRecord]) -> None:
    assert len(rows) == len(records)
    for row, whole in zip(rows, records, strict=True):
        assert (row["request_id"], row["choice"], row["query_position"]) == whole.key
        assert (row["model"], row["decode_step"], row["zone"]) == (whole.model, whole.decode_step, whole.zone)
        np.testing.assert_array_equal(np.array(row["fingerprint"], np.float32), whole.fingerprint)


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of that size; skips the test where none can be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def write_around_a_fork(url: str) -> None:
    """A process opens the sink and writes record 0, its forked child record 1, and then it record 2."""
    run = python(
        "-W", "ignore", "-c",
        f"""
        import os
        from attnhook.sinks import open_sink
        from tests.sinks.samples import record
        sink = open_sink("{url}")
        sink.write([record(0)])
        child = os.fork()
        if child == 0:
            sink.write([record(1)])
            sink.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        sink.write([record(2)])
        sink.close()
        """,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr

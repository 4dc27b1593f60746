"""Arrays and JSON that anybody may have written: refused in one line, without taking much memory."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from attnhook.system import untrusted
from tests.store.test_hostile_stores import in_linux, peak, refused


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_arrays_come_back(tmp_path):
    given = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text": np.array(["x", "yz"]),
        "empty": np.zeros((0, 20), np.float32),
        "scalar": np.array(1.5),
        "flag": np.array([True]),
    }
    found = untrusted.arrays(npz(tmp_path / "a.npz", **given))
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


@pytest.mark.slow
@in_linux
def test_half_a_megabyte_that_would_take_half_a_gigabyte(tmp_path):
    path = tmp_path / "model.npz"
    code = "import numpy as np; np.savez_compressed(sys.argv[1], a=np.zeros(2**26))"
    peak(code, str(path))
    assert path.stat().st_size < 600_000
    read = """
from pathlib import Path
from attnhook.analysis.manifold.artifact import read_arrays
from attnhook.errors import RecordError
try:
    read_arrays(Path(sys.argv[1]))
except RecordError as error:
    assert "unpacks" in str(error) and "67,108,864 are allowed" in str(error), error
else:
    raise SystemExit("it was read")
"""
    assert peak(read, str(path)) < 300


@pytest.mark.parametrize("shape", ["(10**12,)", "(1000000000000,)", "(-1,)", "(2,)", "(" * 3000 + ")" * 3000, "'x'"])
def test_a_header_that_announces_something_else(tmp_path, shape):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(ValueError, match=r"a\.npy"):
        untrusted.arrays(tmp_path / "a.npz")


def test_pickles_and_things_that_are_no_archive(tmp_path):
    with pytest.raises(ValueError, match="not plain numbers"):
        untrusted.arrays(npz(tmp_path / "o.npz", a=np.array([{}], object)))
    with pytest.raises(ValueError, match="not plain numbers"):
        untrusted.arrays(npz(tmp_path / "s.npz", a=np.zeros(1, [("x", "i4")])))
    for content in (b"", b"PK", b"text", npz(tmp_path / "w.npz", a=np.zeros(99)).read_bytes()[:-60]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError):
            untrusted.arrays(tmp_path / "x.npz")


DEEP = "[" * 100_000 + "]" * 100_000


def test_deep_json_in_every_file_that_analysis_reads(tmp_path):
    from attnhook.analysis.drift import baseline
    from attnhook.analysis.manifold import artifact
    from attnhook.probing.journal import _parse
    from attnhook.record.zones import Thresholds

    path = tmp_path / artifact.MANIFEST
    path.write_text(DEEP)
    assert "nested too deeply" in refused(lambda: artifact.read_manifest(tmp_path))
    assert "nested too deeply" in refused(lambda: Thresholds.load(path))
    assert "line 1 is not of a run's record" in refused(lambda: _parse(path, [DEEP.encode()]))
    text = np.frombuffer(DEEP.encode(), np.uint8)
    digest = np.frombuffer(hashlib.sha256(DEEP.encode()).digest(), np.uint8)
    others = dict.fromkeys(("mean", "spread", "whitening", "thresholds"), np.zeros(2))
    drift = npz(tmp_path / "baseline.npz", manifest=text, manifest_sha256=digest, **others)
    assert "nested too deeply" in refused(lambda: baseline.load(drift))

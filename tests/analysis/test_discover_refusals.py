"""What discovery refuses, and that nothing is lost then."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
import subprocess
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnhook.analysis.manifold import artifact
from attnhook.analysis.manifold.checkpoint import Checkpoint
from attnhook.analysis.manifold.run import discover
from attnhook.analysis.manifold.settings import Settings
from attnhook.errors import AttnhookError, OptionError, PluginError, RecordError
from attnhook.record.arrow import VERSION_KEY
from benchmarks.planted import planted
from tests.analysis.maps import SMALL, Stop, contents, records, write
from tests.sinks.samples import small_disk


def store_of(path, count=150, **changes) -> str:
    return write(f"sqlite:{path}", records(planted(count)[0], ["r"] * count, **changes))


def test_too_few(tmp_path):
    with pytest.raises(OptionError, match=r"has 99 fingerprints; a map needs 100 or more"):
        discover(store_of(tmp_path / "x.db", 99), tmp_path / "out", SMALL)
    with pytest.raises(OptionError, match=r"has 0 fingerprints with these --model and --layers"):
        discover(store_of(tmp_path / "y.db"), tmp_path / "other", replace(SMALL, model="nobody's"))
    assert not (tmp_path / "out").exists()


def test_constant_columns(tmp_path):
    same = np.repeat(planted(1)[0], 200, axis=0)
    with pytest.raises(OptionError, match="hardly differ: of 20 columns none vary by more than 1e-05"):
        discover(write(f"sqlite:{tmp_path / 'x.db'}", records(same, ["r"] * 200)), tmp_path / "out", SMALL)


def test_few_distinct(tmp_path):
    few = np.repeat(planted(20)[0], 20, axis=0)
    with pytest.raises(OptionError, match="20 distinct fingerprints; a map needs 100"):
        discover(write(f"sqlite:{tmp_path / 'x.db'}", records(few, ["r"] * 400)), tmp_path / "out", SMALL)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 7.0])
def test_a_damaged_fingerprint_is_named(tmp_path, value):
    path = tmp_path / "x.db"
    store = store_of(path)
    damaged = planted(1)[0][0]
    damaged[5] = value
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE records SET fingerprint = ? WHERE query_position = ?", (damaged.tobytes(), 2048 + 77)
        )
    connection.close()
    with pytest.raises(RecordError, match=r"record 'r', choice 0, position 2125 is damaged \(d2 is"):
        discover(store, tmp_path / "out", SMALL)


@pytest.mark.slow
def test_several_models_only_where_asked_for(tmp_path):
    store = store_of(tmp_path / "x.db", model="org/first")
    write(store, records(planted(150, seed=1)[0], ["s"] * 150, model="org/second"))
    with pytest.raises(OptionError, match=r"several models \(org/first, org/second\): name one with --model"):
        discover(store, tmp_path / "out", SMALL)
    both = discover(store, tmp_path / "both", replace(SMALL, allow_mixed=True, repeats=0))
    assert both.manifest["models"] == {"org/first": 150, "org/second": 150}
    one = discover(store, tmp_path / "one", replace(SMALL, model="org/second", repeats=0))
    assert one.manifest["models"] == {"org/second": 150}


def test_means_over_different_layers_only_where_asked_for(tmp_path):
    prints = planted(300)[0]
    store = write(f"sqlite:{tmp_path / 'x.db'}", records(prints[:150], ["r"] * 150))
    write(store, records(prints[150:, None].repeat(2, axis=1), ["s"] * 150))
    with pytest.raises(
        OptionError, match=r"different layers \(\[0\] \(150 rows\), \[0, 1\] \(150 rows\).*--layers all"
    ):
        discover(store, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
    assert discover(store, tmp_path / "both", replace(SMALL, allow_mixed=True, repeats=0)).manifest["rows"] == 300
    apart = discover(store, tmp_path / "apart", replace(SMALL, layers="all", repeats=0))
    assert apart.manifest["rows"] == 450


def test_a_newer_schema_in_the_store(tmp_path):
    store = write(f"parquet:{tmp_path / 'store'}", records(planted(150)[0], ["r"] * 150))
    (file,) = (tmp_path / "store").rglob("*.parquet")
    table = pq.read_table(file)
    newer = file.with_name(file.name.replace(".parquet", "-newer.parquet"))
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, VERSION_KEY: b"4"}), newer)
    with pytest.raises(RecordError, match=r"schema version 4; this attnhook reads 3: upgrade"):
        discover(store, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_no_store(tmp_path):
    with pytest.raises(PluginError, match="is no store"):
        discover("memory:", tmp_path / "out", SMALL)
    with pytest.raises(PluginError):
        discover(f"sqlite:{tmp_path / 'none.db'}", tmp_path / "out", SMALL, force=True)


@pytest.mark.parametrize("changes", [{"sample": 99}, {"seed": -1}, {"neighbours": 1}, {"variance": 1.5}, {"epochs": 9}])
def test_settings_out_of_range(changes):
    with pytest.raises(OptionError, match=f"{next(iter(changes))}=.* must be from"):
        Settings(**changes)


def test_nothing_is_overwritten(tmp_path, planted_store):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="is not empty: name another folder, or replace it with --force"):
        discover(planted_store, out, SMALL)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(KeyboardInterrupt):
        discover(planted_store, out, SMALL, force=True, progress=Stop("picture"))
    assert (out / "mine.txt").read_text() == "mine"
    with pytest.raises(OptionError, match="is not empty"):
        discover(planted_store, out, SMALL, resume=True)  # force was not said again
    found = discover(planted_store, out, SMALL, resume=True, force=True)
    assert not (out / "mine.txt").exists() and found.manifest["rows"] == 1500
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OptionError, match="is a file"):
        discover(planted_store, file, SMALL)


def test_an_unfinished_run_goes_on_only_as_it_began(tmp_path, planted_store, small_map):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        discover(planted_store, out, SMALL, progress=Stop("assign"))
    with pytest.raises(OptionError, match="has an unfinished run: go on with --resume, or begin anew with --force"):
        discover(planted_store, out, SMALL)
    with pytest.raises(OptionError, match=r"was begun with seed=0, now it is 1"):
        discover(planted_store, out, replace(SMALL, seed=1), resume=True)
    # a file that is not what it was is made again, and what comes after it
    (tmp_path / "out.partial" / "sample.npz").write_bytes(b"")
    again = Stop()
    discover(planted_store, out, SMALL, resume=True, progress=again)
    assert again.seen[0] == "sample" and contents(out) == contents(small_map)


def test_two_processes_do_not_share_a_folder(tmp_path, planted_store):
    held = Checkpoint(tmp_path / "out", {}, resume=False, force=False)
    with pytest.raises(PluginError, match="used by another process"):
        discover(planted_store, tmp_path / "out", SMALL, force=True)
    held.close()


def test_no_space_left(tmp_path, planted_store, small_map):
    with small_disk(tmp_path / "small", 400) as disk:
        with pytest.raises(AttnhookError, match=r"No space left.*Make room and go on with --resume"):
            discover(planted_store, disk / "out", SMALL)
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        discover(planted_store, disk / "out", SMALL, resume=True)
        assert contents(disk / "out") == contents(small_map)


def test_a_disk_that_fails_at_the_end(tmp_path, planted_store, monkeypatch):
    out = tmp_path / "out"

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("attnhook.analysis.manifold.stages.picture.page", full)
        with pytest.raises(AttnhookError, match=r"No space left.*as it was"):
            discover(planted_store, out, SMALL)
    assert not out.exists() and not (tmp_path / "out.partial" / "artifact" / "map.html").exists()


@pytest.fixture
def copy(small_map, tmp_path):
    """A copy of the small map that may be damaged."""
    return shutil.copytree(small_map, tmp_path / "copy")


def rewrite(folder, change, *, sign=True) -> None:
    """Change the manifest; with ``sign`` its digest fits afterwards."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["digest"] = artifact.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_artifact_loads(copy):
    model, manifest = artifact.load(copy)
    assert len(model.points) == manifest["sample"] == 400


def test_tampered_files(copy):
    rewrite(copy, lambda m: m["quality"].update(trustworthiness=1.0), sign=False)
    with pytest.raises(RecordError, match="was changed after it was written"):
        artifact.load(copy)


def test_a_tampered_model(copy):
    arrays = artifact.read_arrays(copy / "model.npz")
    arrays["labels"] = arrays["labels"][::-1].copy()
    artifact.write_arrays(copy / "model.npz", arrays)
    with pytest.raises(RecordError, match=r"model.npz is not what manifest.json says: its SHA-256 is"):
        artifact.load(copy)


def test_a_newer_format(copy):
    rewrite(copy, lambda m: m.update(format=2))
    with pytest.raises(RecordError, match="has format 2; this attnhook reads 1: upgrade attnhook"):
        artifact.load(copy)
    rewrite(copy, lambda m: m.update(format=1, fingerprint_schema=2))
    with pytest.raises(RecordError, match="fitted on fingerprints of schema 2"):
        artifact.load(copy)


def test_an_artifact_runs_nothing(copy, tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harmed"), "w")

    np.savez(copy / "model.npz", labels=np.array([Harm()], dtype=object), allow_pickle=True)
    rewrite(copy, lambda m: m["files"].update({"model.npz": artifact.sha256(copy / "model.npz")}))
    with pytest.raises(RecordError, match="holds no plain arrays"):
        artifact.load(copy)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["points", "embedding", "labels", "scale"])
def test_arrays_that_do_not_fit(copy, name):
    arrays = artifact.read_arrays(copy / "model.npz")
    arrays[name] = arrays[name][:-1]
    artifact.write_arrays(copy / "model.npz", arrays)
    rewrite(copy, lambda m: m["files"].update({"model.npz": artifact.sha256(copy / "model.npz")}))
    with pytest.raises(RecordError, match="has shape"):
        artifact.load(copy)


def test_files_outside_the_folder(copy):
    rewrite(copy, lambda m: m["files"].update({"../elsewhere": "0"}))
    with pytest.raises(RecordError, match="a file outside its folder"):
        artifact.verify(copy, artifact.read_manifest(copy))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "1"}', "\x00", "[" * 100_000])
def test_no_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(RecordError, match="manifest"):
        artifact.load(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(PluginError, match="holds no discovery"):
        artifact.load(copy)


def test_parquet_of_the_artifact_is_read_by_anyone(small_map):
    assert pq.read_table(small_map / "points.parquet").schema.field("fingerprint").type == pa.list_(pa.float32(), 20)

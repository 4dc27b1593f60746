"""The classifier says what the batch run said, from any thread, and takes up a new map."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from attnhook.analysis import explain
from attnhook.analysis.classify import FingerprintClassifier
from attnhook.analysis.manifold import artifact
from attnhook.analysis.manifold.fit import Components
from attnhook.analysis.manifold.run import discover
from attnhook.errors import PluginError, RecordError
from attnhook.record import fingerprint as fp
from benchmarks.planted import KINDS, planted
from tests.analysis.maps import SMALL, stored
from tests.collector.processes import collect


def same(first, second) -> bool:
    names = ("cluster", "probability", "zone", "confidence", "xy", "far")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.slow
def test_it_agrees_with_the_batch_run_to_the_bit(small_map):
    rows = stored(small_map)
    found = FingerprintClassifier(small_map).places(rows)
    points, batch = (pq.read_table(small_map / f"{name}.parquet") for name in ("points", "assignments"))
    assert np.array_equal(found.cluster, batch["cluster"].to_numpy())
    assert np.array_equal(found.probability, batch["probability"].to_numpy())
    assert np.array_equal(found.confidence, batch["zone_confidence"].to_numpy())
    assert np.array_equal(found.far, batch["far"].to_numpy())
    assert np.array_equal(found.xy, np.stack([points["x"].to_numpy(), points["y"].to_numpy()], axis=1))
    assert len(np.unique(found.cluster)) > 5 and found.probability.std() > 0


def test_a_sampled_fingerprint_keeps_its_own_place(small_map):
    model, _ = artifact.load(small_map)
    sampled = pq.read_table(small_map / "points.parquet")["sampled"].to_numpy()
    places = FingerprintClassifier(small_map).places(stored(small_map)[sampled])
    np.testing.assert_allclose(places.xy, model.embedding, atol=1e-3)
    assert np.array_equal(places.cluster, model.labels)


def test_a_row_is_the_same_alone_and_among_others(small_map):
    classifier = FingerprintClassifier(small_map, workers=2)
    rows = planted(20_000, seed=9)[0]
    whole = classifier.places(rows)
    for i in (0, 1, 16383, 16384, 19999):
        assert same(classifier.places(rows[i : i + 1]), _part(whole, slice(i, i + 1)))
    assert same(classifier.places(rows[7:5000]), _part(whole, slice(7, 5000)))
    assert classifier.places([]).cluster.shape == (0,)
    assert classifier.classify(np.zeros((0, fp.SIZE), np.float32)) == []


def _part(found, part):
    return type(found)(**{name: value[part] for name, value in vars(found).items()})


def test_what_is_like_nothing_in_the_sample_is_far_and_in_no_cluster(small_map):
    histogram = np.zeros((1, fp.BINS))
    histogram[:, -1] = 1  # 32768 tokens back; the map is of 4096
    histogram[:, 9] = 0
    strange = fp.assemble(histogram, np.array([0.99]))
    classifier = FingerprintClassifier(small_map)
    found = classifier.places(strange)
    assert found.far.all() and (found.cluster == -1).all() and (found.probability == 0).all()
    assert classifier.classify(strange)[0]["label"] == "none"
    assert classifier.places(planted(2000, seed=8)[0]).far.mean() < 0.02


def test_bad_input(small_map):
    classifier = FingerprintClassifier(small_map)
    rows = planted(10)[0]
    rows[3, 2] = np.nan
    with pytest.raises(RecordError, match="fingerprint 3: long_mass is nan"):
        classifier.places(rows)
    with pytest.raises(RecordError, match=r"shape \[N, 20\]"):
        classifier.places(rows[:, :19])
    with pytest.raises(RecordError, match="20 numbers"):
        classifier.places([["a"] * 20])
    with pytest.raises(PluginError, match="holds no discovery"):
        FingerprintClassifier(small_map.parent)


def test_hot_reload_under_threads(planted_store, small_map, tmp_path):
    out = shutil.copytree(small_map, tmp_path / "map")
    other = discover(planted_store, tmp_path / "other", replace(SMALL, seed=3, repeats=0)).folder
    rows = stored(small_map)
    expected = [FingerprintClassifier(folder).places(rows) for folder in (small_map, other)]
    assert not same(*expected)
    classifier = FingerprintClassifier(out, reload_seconds=0.0)
    stop = threading.Event()

    def ask() -> list[int]:
        seen = []
        while not stop.is_set():
            found = classifier.places(rows)
            seen.append(next(i for i, one in enumerate(expected) if same(found, one)))  # never a mixture
        return seen

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask) for _ in range(3)]
        try:
            _until(lambda: same(classifier.places(rows), expected[0]))
            shutil.rmtree(out)  # for a moment there is none, and the map before stays
            _until(lambda: classifier.problem is not None)
            assert same(classifier.places(rows), expected[0])
            shutil.copytree(other, out)
            _until(lambda: same(classifier.places(rows), expected[1]))
        finally:
            stop.set()
        for one in asked:
            seen = one.result(timeout=60)
            assert seen == sorted(seen) and seen
    assert classifier.manifest["settings"]["seed"] == 3
    _until(lambda: classifier.places(rows[:1]) is not None and classifier.problem is None)
    (out / "model.npz").write_bytes(b"damaged")
    (out / "manifest.json").touch()
    _until(lambda: classifier.places(rows[:1]) is not None and classifier.problem is not None)
    assert "is not what manifest.json says" in str(classifier.problem)
    assert same(classifier.places(rows), expected[1])


def _until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_collector_serves_it(small_map, tmp_path):
    rows = stored(small_map)[:50]
    wanted = FingerprintClassifier(small_map).classify(rows)
    with collect(tmp_path, "--store", "sqlite:x.db", "--artifact", str(small_map)) as server:
        body = json.dumps({"fingerprints": rows.tolist(), "classifier": "clusters"}).encode()
        status, reply = server.get("/classify", data=body)
        assert status == 200 and json.loads(reply)["results"] == wanted
        body = json.dumps({"fingerprints": [[float("nan")] * 20], "classifier": "clusters"}).encode()
        status, reply = server.get("/classify", data=body)
        assert status == 400 and b"no JSON" in reply  # which has no NaN
        body = json.dumps({"fingerprints": [[7.0] * 20], "classifier": "clusters"}).encode()
        status, reply = server.get("/classify", data=body)
        assert status == 400 and b"fingerprint 0" in reply
        body = json.dumps({"fingerprints": rows.tolist()}).encode()
        assert json.loads(server.get("/classify", data=body)[1])["results"][0]["label"] in wanted[0]["zone"]
    with (
        pytest.raises(RuntimeError, match="holds no discovery"),
        collect(tmp_path, "--store", "sqlite:y.db", "--artifact", str(tmp_path)),
    ):
        pass


def test_a_sentence_names_what_is_unusual(small_map):
    sink = planted(20, kinds=KINDS[11:])[0]
    for row in sink:
        said = explain.explain(row, small_map)
        assert f"attention 2048-4095 tokens back ({row[fp.HISTOGRAM][11]:.0%}, mean " in said
        assert "standard deviations from the mean along component" in said
        assert said.count(".") >= 1 and "\n" not in said and said.endswith(".")
    assert FingerprintClassifier(small_map).explain(sink[0]) == explain.explain(sink[0], small_map)


def test_the_sentence_rests_on_the_fitted_loadings(small_map):
    parts = artifact.load(small_map)[0].components
    said = explain.sentence(parts, parts.center)
    assert said.startswith("Nothing stands out: it is within 0.0 standard deviations")
    # a component made of one number puts that number into the sentence, and no other
    for index, words in ((fp.ENTROPY, "higher entropy"), (fp.LOCAL, "more local attention")):
        directions = np.zeros((1, fp.SIZE))
        directions[0, index] = 1
        made = Components(np.zeros(fp.SIZE), np.full(fp.SIZE, 0.1), directions, np.ones(1), np.ones(1))
        row = np.zeros(fp.SIZE)
        row[[fp.ENTROPY, fp.LOCAL, fp.HISTOGRAM.start]] = 0.5, 1, 1
        told = explain.sentence(made, row)
        assert words in told and told.count("mean 0") == 1
    with pytest.raises(RecordError):
        explain.sentence(parts, np.full(fp.SIZE, np.nan))
    with pytest.raises(RecordError, match="shape"):
        explain.sentence(parts, np.zeros((1, fp.SIZE)))


def test_it_needs_no_umap(small_map):
    from tests.helpers import python

    code = f"""
        import sys
        from attnhook.analysis.classify import FingerprintClassifier
        import numpy as np
        row = np.zeros((1, 20), np.float32)
        row[0, [0, 4]] = 1
        print(FingerprintClassifier({str(Path(small_map))!r}).places(row).zone, sorted(
            {{"umap", "hdbscan", "numba", "sklearn", "matplotlib", "torch"}} & set(sys.modules)))
    """
    done = python("-c", code)
    assert done.stdout.strip() == "[0] []", done.stdout + done.stderr

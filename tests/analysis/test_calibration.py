"""Calibration: planted truth, planted nonsense, closed forms, and the command on a real probe run."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from attnhook.analysis import probes
from attnhook.analysis.calibration import judge as judging
from attnhook.analysis.calibration.fit import fit, predictions
from attnhook.analysis.calibration.report import MEAN
from attnhook.analysis.calibration.rows import Rows, collect
from attnhook.analysis.calibration.run import calibrate
from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record import zones
from attnhook.record.zones import ZONE_NAMES, Thresholds
from tests.probing.test_probe import attnhook as command
from tests.probing.test_probe import refused

_CENTRE = {"syntax_floor": 1, "semantic_bridge": 5, "long_range": 9, "structure_ripple": 5, "diffuse": 5}


def planted(per_probe=4, *, noise=0.05, seed=0, shuffle=False):
    """Rows of all probes whose fingerprints show what they should; with ``shuffle``, those of another probe."""
    rng = np.random.default_rng(seed)
    chosen = tuple(probes.select())
    names = [probes.ZONES[one.behaviour] or rng.choice(ZONE_NAMES) for one in chosen]
    if shuffle:
        names = [names[i] for i in rng.permutation(len(names))]
    which = np.repeat(np.arange(len(chosen)), per_probe)
    histogram = np.full((len(which), fp.BINS), noise / fp.BINS)
    for row, probe in enumerate(which):
        histogram[row, _CENTRE[names[probe]]] += 1 - noise
    shown = np.array([names[probe] for probe in which])
    entropy = np.where(shown == "diffuse", 0.95, 0.5) + rng.normal(0, 0.01, len(which))
    regular = np.where(shown == "structure_ripple", 0.3, 0.02) + rng.normal(0, 0.005, len(which))
    prints = fp.assemble(histogram, entropy)
    return Rows(
        fingerprints=np.stack([prints, prints], axis=1),
        whole=prints,
        periodicity=np.stack([regular, regular], axis=1),
        keys=rng.integers(50, 60, len(which)),
        probe=which,
        control=np.zeros(len(which), bool),
        probes=chosen,
        layers=(3,),
        model="planted",
        left_out=Counter(),
    )


def test_planted_zones_are_found_and_supported():
    rows = planted()
    found = calibrate(rows)
    judged = found.fitted[MEAN]
    assert judged.balanced > 0.99
    assert all(found.supported.values())
    assert judged.chance == pytest.approx(0.2, abs=0.02)
    assert judged.p_value < 0.002
    assert found.references["fingerprint and periodicity"].balanced > 0.99
    assert found.references["visible keys"].balanced < 0.4
    assert judged.confusion.sum() == (rows.labels[rows.of_half("held-out").probe] >= 0).sum()
    np.testing.assert_allclose(judged.rates.sum(axis=1), 1)


def test_fingerprints_of_other_probes_support_nothing():
    found = calibrate(planted(shuffle=True))
    judged = found.fitted[MEAN]
    assert judged.balanced < judged.chance_bound + 0.05
    assert sum(found.supported.values()) <= 1  # each with a chance of 1 in 40


def test_a_fit_finds_a_threshold_that_the_default_misses():
    rows = planted()
    part = rows.of_half("fit")
    shifted = dataclasses.replace(part, periodicity=part.periodicity / 3)  # 0.1 in place of 0.3
    codes = predictions(shifted, zones.DEFAULTS)[:, -1]
    before = judging.recalls(shifted, codes)
    fitted = fit(shifted)
    after = judging.recalls(shifted, predictions(shifted, fitted)[:, -1])
    assert before[zones.STRUCTURE_RIPPLE] < 0.1 < 0.9 < after[zones.STRUCTURE_RIPPLE]
    assert fitted.ripple_periodicity < 0.1
    assert fitted == fit(shifted)


def test_the_same_seed_gives_the_same_report():
    rows = planted()
    assert calibrate(rows).markdown() == calibrate(rows).markdown()
    json.dumps(calibrate(rows, seed=1).figures(), allow_nan=False)


def test_a_zone_with_too_few_probes_is_not_judged():
    rows = planted()
    far = [i for i, one in enumerate(rows.probes) if one.behaviour == "long"]
    found = calibrate(rows.where(~np.isin(rows.probe, far[2:])))
    assert found.supported["long_range"] is False
    assert "long_range" in found.thin
    assert np.isnan(found.fitted[MEAN].recall[zones.LONG_RANGE])
    assert found.thresholds.long_mass == zones.DEFAULTS.long_mass
    assert "not judged" in found.markdown()
    assert found.fitted[MEAN].chance == pytest.approx(0.25, abs=0.02)
    with pytest.raises(RecordError, match="fewer than two zones"):
        calibrate(rows.where(rows.labels[rows.probe] == zones.DIFFUSE))


@pytest.mark.parametrize("wrong", [0, 3])
def test_wrong_answers_are_advised_only_where_some_were_left_out(wrong):
    """With --wrong-too none is left out, and that advice would name what was given."""
    rows = planted()
    few = rows.where(rows.labels[rows.probe] == zones.DIFFUSE)
    with pytest.raises(RecordError, match="run more packs with attnhook probe") as refusal:
        calibrate(dataclasses.replace(few, left_out=Counter(grammar=wrong)))
    assert ("count the 3 that were answered wrongly too, with --wrong-too" in str(refusal.value)) == bool(wrong)
    assert ("--wrong-too" in str(refusal.value)) == bool(wrong)


def test_a_zone_that_its_controls_get_too_is_not_supported():
    rows = planted()
    extra = np.isin(rows.probe, [i for i, one in enumerate(rows.probes) if one.behaviour == "long"])
    control = np.zeros(len(extra), bool)
    control[np.flatnonzero(extra)[::2]] = True
    found = calibrate(dataclasses.replace(rows, control=control))
    assert found.fitted[MEAN].recall[zones.LONG_RANGE] > 0.99
    assert found.controls["long_range"].rate > 0.99
    assert not found.supported["long_range"]
    assert found.supported["diffuse"]


def test_every_probe_has_the_same_weight():
    rows = planted(per_probe=2)
    labels = rows.labels
    wrong = np.flatnonzero(labels == zones.SYNTAX_FLOOR)[::2]
    # a probe with fewer rows counts as much as one with all of them
    fewer = rows.where(~(np.isin(rows.probe, wrong) & (np.arange(len(rows.probe)) % 2 == 1)))
    for part in (rows, fewer):
        codes = np.where(np.isin(part.probe, wrong), zones.DIFFUSE, np.maximum(labels[part.probe], 0))
        np.testing.assert_allclose(judging.recalls(part, codes), [0.5, 1, 1, 1, 1])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A store of real records: the default model on three probes of each half of two packs."""
    store = f"sqlite:{tmp_path_factory.mktemp('run') / 'probes.db'}"
    code, _, err = command(
        *("probe", "--out", store, "--packs", "grammar,lists", "--limit", "6", "--new-tokens", "2"), "--prompt-rows"
    )
    assert code == 0, err
    return store


@pytest.mark.model
def test_the_command_on_a_real_run(real, tmp_path):
    out = tmp_path / "out"
    code, printed, err = command("calibrate", real, "--out", out, "--wrong-too")
    assert code == 0, err
    assert "balanced accuracy" in printed
    report = (out / "report.md").read_text()
    assert "not judged" in report and "Zones of SmolLM2-135M-Instruct" in report
    table = Thresholds.load(out / "thresholds.json")
    assert zones.classify_many(np.zeros((1, 20)), thresholds=table)[0].shape == (1,)
    figures = json.loads((out / "figures.json").read_text())
    assert figures["probes"] == {"local, fit": 3, "local, held-out": 3, "periodic, fit": 3, "periodic, held-out": 3}
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    refused(command("calibrate", real, "--out", out), "is there already")
    again = command("calibrate", real, "--out", tmp_path / "b", "--wrong-too", "--thresholds", out / "thresholds.json")
    assert again[0] == 0, again[2]
    assert Thresholds.load(tmp_path / "b" / "thresholds.json") == table
    refused(command("calibrate", real, "--out", tmp_path / "c", "--state", tmp_path / "no"), "name it with --state")


@pytest.mark.model
def test_collected_rows_of_a_real_run(real):
    from attnhook.store import open_store

    with open_store(real) as store:
        records = list(store.records())
    right = {record.request_id: None for record in records}
    rows = collect(records, right)
    assert rows.units == (*(f"layer {layer}" for layer in records[0].layers), "mean")
    np.testing.assert_allclose(rows.fingerprints[:, :-1].mean(axis=1), rows.fingerprints[:, -1], atol=1e-6)
    # the sink's mass is gone, and nothing else
    for i in (0, len(rows.probe) // 2, len(rows.probe) - 1):
        request_id = rows.probes[rows.probe[i]].request_id
        record = next(r for r in records if r.request_id == request_id and r.query_position + 1 == rows.keys[i])
        lost = record.fingerprints[:, fp.HISTOGRAM].sum(axis=1) - rows.fingerprints[i, :-1, fp.HISTOGRAM].sum(axis=1)
        np.testing.assert_allclose(lost, record.span_mass[:, 0], atol=1e-5)
    wrong = dict.fromkeys(right, False)
    with pytest.raises(RecordError, match=r"answers of all 12 finished probes are wrong; count them with --wrong-too"):
        collect(records, wrong)
    with pytest.raises(RecordError, match="of no finished probe") as refusal:
        collect(records, {})
    assert "--wrong-too" not in str(refusal.value)
    assert len(collect(records, wrong, wrong_too=True).probe) == len(rows.probe)

"""The drift monitor: false alarms as stated, planted drifts found, states, files, commands."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest

from attnhook.analysis import drift
from attnhook.analysis.drift import Baseline, DriftMonitor, DriftSettings
from attnhook.cli import app as cli
from attnhook.errors import AttnhookError, OptionError, PluginError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.opening import open_sink
from benchmarks import drift as made
from tests.sinks.samples import small_disk

QUICK = DriftSettings(window=10, false_alarm_rate=0.05, horizon=50, simulations=400)


def interval(rate: float, runs: int) -> tuple[float, float]:
    """Where 99.9% of the shares of ``runs`` runs lie that are alarms with that probability."""
    half = 3.29 * np.sqrt(rate * (1 - rate) / runs)
    return rate - half, rate + half


@pytest.fixture(scope="module")
def large() -> Baseline:
    return drift.fit(made.traffic(np.random.default_rng(0), 5000), settings=made.SETTINGS)


@pytest.fixture(scope="module")
def small() -> Baseline:
    return drift.fit(made.traffic(np.random.default_rng(1), 200), settings=QUICK, model="m", rows="generated")


# -- the rate


@pytest.mark.slow
def test_1000_runs_without_drift_raise_as_many_alarms_as_stated(large):
    rate = large.settings.false_alarm_rate
    low, high = interval(rate, 1000)
    assert low < made.false_alarms(large, 1000, seed=3) / 1000 < high


@pytest.mark.slow
def test_the_rate_holds_for_small_baselines_whose_error_counts():
    found = sum(made.false_alarms(made.fresh_baseline(150, seed), 20, seed=20_000 + seed) for seed in range(50))
    low, high = interval(0.05, 1000)
    assert low < found / 1000 < high


def test_neighbours_that_are_alike_need_blocks():
    rng = np.random.default_rng(5)

    def traffic(requests: int) -> np.ndarray:
        """What one user asks comes in a row of 10 requests that are alike."""
        users = made.traffic(rng, -(-requests // 10)).repeat(10, axis=0)[:requests]
        return 0.7 * users + 0.3 * made.traffic(rng, requests)

    settings = replace(QUICK, window=20)
    past = traffic(4000)
    alone, together = drift.fit(past, settings=settings), drift.fit(past, settings=replace(settings, block=40))
    length = settings.window + settings.horizon - 1
    runs = np.stack([traffic(length + 10)[start : start + length] for start in rng.integers(0, 10, 400)])
    rates = [float((made.statistics(base, runs).max(axis=1) > base.alarm).mean()) for base in (alone, together)]
    assert alone.autocorrelation > 0.5
    assert rates[0] > 0.3  # six times what was stated, which is why fit warns
    assert interval(0.05, 400)[0] < rates[1] < interval(0.05, 400)[1]


@pytest.mark.parametrize(("shift", "share", "median"), [(0.5, 0.9, 100), (1.0, 0.99, 50), (2.0, 0.99, 25)])
def test_planted_drifts_are_found(large, shift, share, median):
    found = made.delays(large, shift, 300, seed=4)
    assert np.isfinite(found).mean() >= share
    assert np.median(found) <= median


def test_the_monitor_computes_the_statistic_that_was_calibrated(large):
    means = made.traffic(np.random.default_rng(7), 1200)
    expected = made.statistics(large, means)
    monitor, seen = DriftMonitor(large), []
    for mean in means:
        monitor.add_request(mean)
        if (statistic := monitor.status().statistic) is not None:
            seen.append(statistic)
    assert np.allclose(seen, expected, rtol=1e-6)


# -- rows, requests, states


def test_rows_in_any_batches_become_the_means_of_requests(small):
    rng = np.random.default_rng(2)
    rows = {f"r{i}": made.traffic(rng, int(rng.integers(1, 6))).astype(np.float32) for i in range(30)}
    whole = DriftMonitor(small)
    for own in rows.values():
        whole.add_request(own.mean(axis=0, dtype=np.float64))
    parts = DriftMonitor(small, idle_seconds=5)
    pending = [(name, row) for name, own in rows.items() for row in own]
    for start in range(0, len(pending), 7):
        batch = pending[start : start + 7]
        parts.add(np.stack([row for _, row in batch]), [name for name, _ in batch], now=start / 10)
    assert parts.status().open_requests > 0
    parts.finish_idle(now=1e6)
    assert parts.status().open_requests == 0
    assert parts.status().requests == 30
    assert parts.status().statistic == pytest.approx(whole.status().statistic)


def test_nonsense_is_refused_and_nothing_is_taken(small):
    monitor = DriftMonitor(small)
    row = made.traffic(np.random.default_rng(2), 1)
    for bad in (row[:, :5], row.repeat(2, axis=0), row * np.nan):
        with pytest.raises(RecordError):
            monitor.add(bad, ["r"], now=0)
    with pytest.raises(RecordError, match="20 finite numbers"):
        monitor.add_request(np.full(20, np.inf))
    assert monitor.status().open_requests == monitor.status().requests == 0


def test_states_go_up_at_once_and_down_late():
    eye = np.zeros((1, fp.SIZE))
    eye[0, fp.ENTROPY] = 1
    base = Baseline(
        DriftSettings(window=2),
        "",
        "all",
        200,
        np.zeros(20),
        np.ones(20),
        eye,
        warning=8.0,
        alarm=18.0,
        autocorrelation=0,
    )
    monitor = DriftMonitor(base)

    def state(statistic: float) -> str:
        mean = np.zeros(fp.SIZE)
        mean[fp.ENTROPY] = np.sqrt(statistic / 2)
        monitor.add_request(mean)
        return monitor.add_request(mean)  # a window full of it; the first one is half the way

    steps = [0, 6, 9, 6, 3, 19, 15, 9, 6, 9, 3, 30]
    states = [state(statistic) for statistic in steps]
    assert states == [
        "ok",
        "ok",
        "warning",
        "warning",
        "ok",
        "alarm",
        "alarm",
        "alarm",
        "warning",
        "warning",
        "ok",
        "alarm",
    ]
    assert (monitor.status().alarms, monitor.status().warnings) == (2, 3)
    assert monitor.status().moved[0][0] == "entropy"


# -- bad input


def test_what_cannot_be_a_baseline_is_refused():
    means = made.traffic(np.random.default_rng(3), 200)
    with pytest.raises(OptionError, match=r"99 requests are too few .* at least 100"):
        drift.fit(means[:99], settings=QUICK)
    with pytest.raises(OptionError, match="at least 400 are needed"):
        drift.fit(means, settings=replace(QUICK, window=100))
    broken = means.copy()
    broken[5, 3] = np.nan
    with pytest.raises(RecordError, match="request 5: entropy is nan"):
        drift.fit(broken, settings=QUICK)
    with pytest.raises(RecordError, match="all 200 requests have the same"):
        drift.fit(means[:1].repeat(200, axis=0), settings=QUICK)
    with pytest.raises(RecordError, match=r"shape \[R, 20\]"):
        drift.fit(means[:, :3], settings=QUICK)
    for wrong in ({"window": 1}, {"false_alarm_rate": 0.9}, {"simulations": 100, "false_alarm_rate": 0.01}):
        with pytest.raises(OptionError):
            replace(DriftSettings(), **wrong)


def test_constant_numbers_take_no_part():
    means = made.traffic(np.random.default_rng(3), 300)
    means[:, -3:] = 0.25
    base = drift.fit(means, settings=QUICK)
    assert (base.whitening[:, -3:] == 0).all() and np.isfinite(base.whitening).all()
    assert (base.spread[-3:] == 0).all()


# -- the file


def test_a_file_gives_back_the_baseline(small, tmp_path):
    path = tmp_path / "base.npz"
    drift.save(small, path)
    back = drift.load(path)
    for name, value in small.__dict__.items():
        assert np.array_equal(getattr(back, name), value), name
    with pytest.raises(OptionError, match="nothing is overwritten"):
        drift.save(small, path)
    again = drift.fit(made.traffic(np.random.default_rng(1), 200), settings=QUICK, model="m", rows="generated")
    assert (again.alarm, again.warning) == (small.alarm, small.warning)  # the seed decides


def _changed(path, **changes) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    manifest = json.loads(arrays["manifest"].tobytes())
    manifest.update(changes.pop("manifest", {}))
    text = json.dumps(manifest).encode()
    arrays["manifest"] = np.frombuffer(text, np.uint8)
    arrays["manifest_sha256"] = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    np.savez(path, **{**arrays, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": {"format_version": 2}}, "format version 2 .* upgrade attnhook"),
        ({"manifest": {"fingerprint_schema": 2}}, "fingerprint schema 2"),
        ({"manifest": {"format": "other"}}, "something else"),
        ({"manifest": {"settings": {}}}, "no baseline, is damaged or was changed"),
        ({"thresholds": np.array([1.0, 2.0])}, "thresholds is not what its manifest says"),
        ({"mean": np.zeros(3)}, "mean is not what"),
        ({"manifest_sha256": np.zeros(32, np.uint8)}, "digest"),
    ],
)
def test_a_newer_or_changed_file_is_refused(small, tmp_path, changes, message):
    path = tmp_path / "base.npz"
    drift.save(small, path)
    _changed(path, **changes)
    with pytest.raises(PluginError, match=message):
        drift.load(path)


def test_damage_anywhere_is_refused_or_harmless(small, tmp_path):
    path = tmp_path / "base.npz"
    drift.save(small, path)
    data = path.read_bytes()
    for place in range(0, len(data), 61):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            back = drift.load(path)
        except PluginError:
            continue
        assert back.alarm == small.alarm and np.array_equal(back.whitening, small.whitening)  # the zip's own fields
    for size in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(PluginError):
            drift.load(path)


def test_loading_runs_no_code(small, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "base.npz"
    drift.save(small, path)
    _changed(path, mean=np.array([Trap()], object))
    with pytest.raises(PluginError):
        drift.load(path)
    for content in (pickle.dumps(Trap()), _npy(np.zeros(3))):
        path.write_bytes(content)
        with pytest.raises(PluginError):
            drift.load(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(PluginError, match="cannot be read"):
        drift.load(tmp_path / "nothing")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_full_disk_leaves_nothing_behind(small, tmp_path):
    with small_disk(tmp_path / "disk", 8) as disk:
        (disk / "filler").write_bytes(b"x" * 8192)
        with pytest.raises(AttnhookError, match="No space left"):
            drift.save(small, disk / "base.npz")
        assert [path.name for path in disk.iterdir()] == ["filler"]


# -- the commands


def write_requests(
    url: str, means: np.ndarray, model: str = "m", layers: tuple[int, ...] = (0,), first: int = 0
) -> None:
    """A store with two generated rows of each request, in order."""
    nothing = np.zeros((len(layers), 0))
    sink = open_sink(url)
    records = [
        TokenRecord(
            request_id=f"{model}-{i}",
            query_position=position,
            layers=layers,
            token_positions=nothing.astype(np.int32),
            attention_scores=nothing.astype(np.float32),
            fingerprints=np.tile(mean.astype(np.float32), (len(layers), 1)),
            decode_step=position,
            mode="fingerprint",
            model=model,
            span_mass=nothing.astype(np.float32),
        )
        for i, mean in enumerate(means, first)
        for position in range(2)
    ]
    sink.write(records)
    sink.close()


def attnhook(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one command."""
    monkeypatch.setattr("sys.argv", ["attnhook", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_fit_and_check(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(11)
    monkeypatch.chdir(tmp_path)
    write_requests("sqlite:past.db", made.traffic(rng, 400))
    write_requests("sqlite:same.db", made.traffic(rng, 60))
    write_requests("sqlite:moved.db", np.concatenate([made.traffic(rng, 30), made.traffic(rng, 60, shift=2)]))
    fit = ("drift", "fit", "past.db", "--out", "base.npz", "--window", "20", "--horizon", "50")
    code, out, err = attnhook(monkeypatch, capsys, *fit)
    assert code == 0, err
    assert "400 requests" in out and "0.01 of runs of 50 requests without drift raise an alarm" in out

    code, out, err = attnhook(monkeypatch, capsys, "drift", "check", "same.db", "--baseline", "base.npz")
    assert (code, out.splitlines()[0]) == (0, "60 requests: 0 alarms, 0 warnings"), err
    code, out, err = attnhook(monkeypatch, capsys, "drift", "check", "moved.db", "--baseline", "base.npz", "--json")
    assert code == 1, err
    found = json.loads(out)
    assert (found["state"], found["alarms"]) == ("alarm", 1)
    assert 30 < found["first_alarm"]["requests"] <= 60
    # 64..127 tokens: where the drift takes from, and the next bin
    assert {one["name"] for one in found["moved"]} & {"d64", "d128"}

    code, out, err = attnhook(monkeypatch, capsys, *fit)
    assert code == 2 and "nothing is overwritten" in err
    code, out, err = attnhook(
        monkeypatch, capsys, "drift", "check", "same.db", "--baseline", "base.npz", "--model", "x"
    )
    assert code == 2 and re.search("0 requests of x .* window needs 20", err)
    code, out, err = attnhook(monkeypatch, capsys, "drift", "fit", "nothing.db", "--out", "b.npz")
    assert code == 2 and "'nothing.db' is no store" in err


def test_fit_refuses_a_mixture_and_warns_of_neighbours(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(12)
    monkeypatch.chdir(tmp_path)
    write_requests("sqlite:two.db", made.traffic(rng, 30).repeat(10, axis=0), "a")
    write_requests("sqlite:two.db", made.traffic(rng, 10), "b")
    fit = ("drift", "fit", "two.db", "--window", "10", "--simulations", "2000", "--horizon", "20")
    code, _, err = attnhook(monkeypatch, capsys, *fit, "--out", "base.npz")
    assert code == 2 and "rows of 2 models: 'a' (600 rows), 'b' (20 rows)" in err
    assert not (tmp_path / "base.npz").exists()
    code, _, err = attnhook(monkeypatch, capsys, *fit, "--out", "base.npz", "--model", "a")
    assert code == 0 and "neighbouring requests are alike" in err
    assert drift.load(tmp_path / "base.npz").model == "a"
    code, _, err = attnhook(monkeypatch, capsys, *fit, "--out", "mixed.npz", "--mixed")
    assert code == 0 and drift.load(tmp_path / "mixed.npz").model == ""


def test_other_layers_are_refused_and_no_drift(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(13)
    monkeypatch.chdir(tmp_path)
    write_requests("sqlite:past.db", made.traffic(rng, 200), layers=(3, 7))
    write_requests("sqlite:same.db", made.traffic(rng, 30), "m", (3, 7))
    write_requests("sqlite:other.db", made.traffic(rng, 30), "m", (7,))
    fit = ("drift", "fit", "--window", "10", "--simulations", "2000", "--horizon", "20", "--out")
    code, _, err = attnhook(monkeypatch, capsys, *fit, "base.npz", "past.db")
    assert code == 0 and drift.load(tmp_path / "base.npz").layers == (3, 7), err
    check = ("drift", "check", "--baseline", "base.npz")
    assert attnhook(monkeypatch, capsys, *check, "same.db")[0] == 0
    code, _, err = attnhook(monkeypatch, capsys, *check, "other.db")
    assert code == 2 and "which is of [3, 7]: [7] (60 rows)" in err

    write_requests("sqlite:past.db", made.traffic(rng, 20), "m", (5,), 200)
    code, _, err = attnhook(monkeypatch, capsys, *fit, "both.npz", "past.db")
    assert code == 2 and re.search(r"different layers.*: \[3, 7\] \(400 rows\), \[5\] \(40 rows\).*--mixed", err), err
    code, _, err = attnhook(monkeypatch, capsys, *fit, "both.npz", "past.db", "--mixed")
    assert code == 0 and drift.load(tmp_path / "both.npz").layers == (), err
    assert attnhook(monkeypatch, capsys, "drift", "check", "--baseline", "both.npz", "other.db")[0] == 0

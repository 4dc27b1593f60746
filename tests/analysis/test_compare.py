"""The comparison: sums by request, intervals and p-values that hold, planted differences, reports, refusals."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from attnhook.analysis.compare import Settings, Side, Source, compare, read, report, sides
from attnhook.analysis.compare import statistics as numbers
from attnhook.analysis.compare.distances import energy_distance, jensen_shannon
from attnhook.analysis.compare.resampling import bootstrap_sums, estimate, holm, labels
from attnhook.cli import app as cli
from attnhook.errors import AttnhookError, OptionError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record import zones
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.opening import open_sink
from tests.sinks.samples import small_disk

LAYERS = (3, 29)
QUICK = Settings(resamples=200, permutations=199)


def request(
    rng: np.random.Generator, name: str, *, rows: int = 6, far: float = 0.0, model: str = "m"
) -> list[TokenRecord]:
    """A request whose rows are alike; ``far`` moves mass to larger distances. Half of the rows are prompt rows."""
    own = rng.standard_gamma(np.exp(-0.5 * np.abs(np.arange(fp.BINS) - rng.integers(1, 6) - far)) + 0.02)
    records = []
    for i in range(rows):
        position = 200 + i
        histogram = rng.dirichlet(own * 20, size=2).astype(np.float32)
        sink = histogram[:, [fp.bin_of(position)]] * 0.5
        records.append(
            TokenRecord(
                request_id=name,
                query_position=position,
                layers=LAYERS,
                token_positions=np.zeros((2, 1), np.int32),
                attention_scores=sink,
                fingerprints=fp.assemble(histogram, rng.uniform(0.2, 0.6, 2).astype(np.float32)),
                decode_step=None if i < rows // 2 else i,
                model=model,
                sink_mass=sink[:, 0],
            )
        )
    return records


def store(url: str, requests: list[list[TokenRecord]]) -> str:
    """A store with these requests."""
    sink = open_sink(url)
    for records in requests:
        sink.write(records)
    sink.close()
    return url


def of_before_0_2(requests: list[list[TokenRecord]], *, span: bool) -> list[list[TokenRecord]]:
    """The same records as attnhook stored them before it kept the sink's mass; ``span``: as `attnhook probe` did."""
    return [
        [
            replace(record, sink_mass=None, span_names=("sink",), span_mass=record.sink_mass[:, None])
            if span
            else replace(record, sink_mass=None)
            for record in records
        ]
        for records in requests
    ]


def probes(seed: int, count: int = 40, **changes: object) -> list[list[TokenRecord]]:
    """Requests of two packs."""
    rngs = [np.random.default_rng([seed, i]) for i in range(count)]  # the i-th probes of equal seeds are alike
    return [request(rng, f"probe/{'ab'[i % 2]}/{i}", **changes) for i, rng in enumerate(rngs)]  # type: ignore[arg-type]


def made_side(rng: np.random.Generator, requests: int, *, rows: int = 20, share: float = 0.3) -> Side:
    """A side without a store: each request has a probability of its own of rows in zone 0, ``share`` on average."""
    own = rng.beta(2 * share, 2 * (1 - share), requests)
    first = rng.binomial(rows, own)
    counts = np.zeros((requests, len(zones.ZONE_NAMES)), np.int64)
    counts[:, 0], counts[:, 1] = first, rows - first
    sample = rng.dirichlet(np.ones(fp.BINS), requests)
    prints = fp.assemble(sample, rng.random(requests))
    return Side(
        label="made",
        source=Source("made"),
        models={"made": requests * rows},
        layer_sets={(): requests * rows},
        requests=tuple(f"r{i:05d}" for i in range(requests)),
        left_out=0,
        rows=np.full(requests, rows),
        without_sink=False,
        zones=counts,
        sums=prints * rows,
        sink_rows=np.zeros(requests, np.int64),
        sink=np.zeros(requests),
        layers=(),
        layer_rows=np.zeros((requests, 0), np.int64),
        layer_sums=np.zeros((requests, 0, fp.SIZE)),
        layer_sink_rows=np.zeros((requests, 0), np.int64),
        layer_sink=np.zeros((requests, 0)),
        sample=prints.astype(np.float32),
        sample_request=np.arange(requests),
    )


# -- distances and resampling


def test_jensen_shannon_has_its_known_values():
    assert jensen_shannon(np.array([1.0, 3.0]), np.array([2.0, 6.0])) == pytest.approx(0)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 5.0])) == pytest.approx(1)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(0.311278, abs=1e-6)
    assert jensen_shannon(np.zeros((2, 3)), np.ones((2, 3))).tolist() == [0, 0]


def test_jensen_shannon_is_that_of_scipy():
    from scipy.spatial.distance import jensenshannon

    rng = np.random.default_rng(5)
    a, b = rng.random((2, 50, 16)) * (rng.random((2, 50, 16)) > 0.3)
    assert jensen_shannon(a, b) == pytest.approx(jensenshannon(a, b, 2, axis=-1) ** 2, abs=1e-12)


def test_energy_distance_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, fp.SIZE)).astype(np.float32) for n in (30, 24))
    y[:, 0] += 0.5
    x[:, 7] = y[:, 7] = 0.25
    found = energy_distance(rng, (x, y), (np.arange(30) // 3, np.arange(24) // 2), permutations=99, paired=False)
    spread = np.concatenate([x, y]).astype(float).std(axis=0)
    scale = np.where(np.arange(fp.SIZE) == 7, 0, 1 / np.where(spread > 0, spread, 1))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([np.linalg.norm((p - q) * scale) for p in a.astype(float) for q in b.astype(float)]))

    energy = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    assert found.energy == pytest.approx(energy, rel=1e-6)
    assert found.distance.value == pytest.approx(energy / (2 * mean(x, y)), rel=1e-6)
    assert found.constant == (fp.NAMES[7],)
    assert (found.rows, found.requests) == ((30, 24), (10, 12))
    with pytest.raises(RecordError, match="all 54 fingerprints are the same"):
        energy_distance(rng, (x * 0, y * 0), (np.arange(30), np.arange(24)), permutations=99, paired=False)


def test_labels_deal_whole_requests():
    rng = np.random.default_rng(0)
    dealt = np.concatenate([*labels(rng, 3, 5, permutations=400, paired=False)])
    assert dealt.shape == (400, 8) and (dealt.sum(axis=1) == 3).all()
    assert np.abs(dealt.mean(axis=0) - 3 / 8).max() < 0.1
    dealt = np.concatenate([*labels(rng, 4, 4, permutations=400, paired=True)])
    assert (dealt[:, :4] + dealt[:, 4:] == 1).all() and np.abs(dealt.mean(axis=0) - 0.5).max() < 0.1


def test_holm_corrects_as_in_the_textbook():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_intervals_hold_because_requests_are_resampled():
    """Rows of a request are alike: intervals that resample rows would be far too narrow."""
    rng = np.random.default_rng(3)
    hits = {"requests": 0, "rows": 0}
    for _ in range(200):
        side = made_side(rng, 60)
        table = np.column_stack([side.rows, side.zones[:, 0]]).astype(float)
        whole = np.ones((side.total, 2))
        whole[:, 1] = np.arange(side.total) < side.zones[:, 0].sum()
        for name, sums in (("requests", table), ("rows", whole)):
            drawn, _ = next(bootstrap_sums(rng, sums, sums, resamples=300, paired=True))
            found = estimate(0, drawn[:, 1] / drawn[:, 0], 0.95)
            hits[name] += found.low <= 0.3 <= found.high
    assert 180 <= hits["requests"] <= 199
    assert hits["rows"] < 120


@pytest.mark.parametrize("design", ["independent", "paired"])
def test_p_values_without_a_difference_are_as_rare_as_they_say(design):
    rng = np.random.default_rng(4)
    found = [
        compare(made_side(rng, 24), made_side(rng, 24), replace(QUICK, design=design, permutations=99, resamples=100))
        for _ in range(200)
    ]
    for p in (
        [one.zones[0].p for one in found],
        [one.jensen_shannon.p for one in found],
        [one.energy.distance.p for one in found],
    ):
        assert 2 <= sum(x <= 0.05 for x in p) <= 22  # 10 expected
        assert 70 <= sum(x <= 0.5 for x in p) <= 130


def test_a_planted_difference_is_found_with_its_size():
    rng = np.random.default_rng(6)
    found = compare(made_side(rng, 300, share=0.30), made_side(rng, 300, share=0.45), replace(QUICK, permutations=999))
    zone = found.zones[0]
    assert zone.difference.low < -0.15 < zone.difference.high < 0
    assert zone.p_holm <= 0.01 and found.zones[2].p == 1.0


# -- reading


def test_a_side_sums_what_its_records_say(tmp_path, monkeypatch):
    requests = probes(1, 12)
    url = store(f"sqlite:{tmp_path}/a.db", requests)
    side = read(Source(url), name="A")
    assert side.requests == tuple(sorted(records[0].request_id for records in requests))
    assert (side.label, side.layers, side.total) == ("m", LAYERS, 72)
    for records in requests:
        i = side.requests.index(records[0].request_id)
        assert side.sums[i] == pytest.approx(sum(r.free_fingerprint.astype(float) for r in records), abs=1e-5)
        assert side.zones[i].tolist() == [sum(r.zone == name for r in records) for name in zones.ZONE_NAMES]
        assert side.sink[i] == pytest.approx(sum(record.sink_mass.mean() for record in records))
        free = [freed(record) for record in records]
        assert side.layer_sums[i] == pytest.approx(sum(own.astype(float) for own in free), abs=1e-5)
        assert side.layer_sink[i] == pytest.approx(sum(record.sink_mass for record in records), abs=1e-5)
        own = {record.free_fingerprint.tobytes() for record in records}
        assert {row.tobytes() for row in side.sample[side.sample_request == i]} == own
    monkeypatch.setattr(sides, "_BATCH", 7)
    again = read(Source(url), name="A")
    parquet = read(Source(store(f"parquet:{tmp_path}/a", requests)), name="A")
    for other in (again, parquet):
        for name, value in vars(side).items():
            if isinstance(value, np.ndarray):
                assert np.allclose(getattr(other, name), value), name
    assert read(Source(url), name="A", rows="prompt").total == read(Source(url), name="A", rows="generated").total == 36


def freed(record: TokenRecord) -> np.ndarray:
    """A record's fingerprints [L, 20] without position 0."""
    p = np.full(len(record.layers), record.query_position)
    without = zones.without_key(record.fingerprints, record.sink_mass, p, p + 1)
    return np.where(record.sink_mass[:, None] > 0, without, record.fingerprints)  # 0: hidden by the layer's window


def test_the_sink_stays_where_it_is_asked_to_or_is_not_told(tmp_path):
    requests = probes(1, 12)
    new = store(f"sqlite:{tmp_path}/new.db", requests)
    probed = store(f"sqlite:{tmp_path}/probed.db", of_before_0_2(requests, span=True))
    old = store(f"sqlite:{tmp_path}/old.db", of_before_0_2(requests, span=False))
    free, spans, whole = (read(Source(url), name="A") for url in (new, probed, old))
    assert (free.without_sink, spans.without_sink, whole.without_sink) == (True, True, False)
    assert (free.knows_sink, spans.knows_sink, whole.knows_sink) == (True, True, False)
    for name in ("zones", "sums", "sample", "layer_sums", "sink", "layer_sink"):
        assert np.allclose(getattr(free, name), getattr(spans, name)), name
    asked = read(Source(new), name="A", with_sink=True)
    for name in ("zones", "sums", "sample", "layer_sums"):
        assert np.array_equal(getattr(asked, name), getattr(whole, name)), name
    assert not asked.without_sink and asked.knows_sink
    assert not np.allclose(asked.sums, free.sums)
    with pytest.raises(
        OptionError, match=r"side A \(sqlite:.*new.db\) is without .*, side B \(.*old.db\) does not tell"
    ):
        compare(free, whole, QUICK)
    assert "does not" not in "".join(compare(asked, whole, QUICK).notes)
    both = store(f"sqlite:{tmp_path}/both.db", requests)
    store(both, [[replace(r, request_id=r.request_id + "x") for r in rs] for rs in of_before_0_2(requests, span=False)])
    with pytest.raises(OptionError, match=r"some rows tell their attention .* and others do not.*--with-sink"):
        read(Source(both), name="A")
    assert read(Source(both), name="A", with_sink=True).total == 144


def test_rows_of_one_layer_without_a_record_tell_the_sink_too(tmp_path):
    requests = [
        [replace(r, mode="fingerprint", layers=(3,), token_positions=r.token_positions[:1, :0],
                 attention_scores=r.attention_scores[:1, :0], fingerprints=r.fingerprints[:1],
                 sink_mass=r.sink_mass[:1])
         for r in records]
        for records in probes(1, 12)
    ]  # fmt: skip
    side = read(Source(store(f"sqlite:{tmp_path}/a.db", requests)), name="A")
    assert side.without_sink and side.layers == (3,)
    for i, name in enumerate(side.requests):
        records = next(records for records in requests if records[0].request_id == name)
        assert side.layer_sums[i, 0] == pytest.approx(sum(freed(r)[0].astype(float) for r in records), abs=1e-5)
        assert side.sums[i] == pytest.approx(side.layer_sums[i, 0], abs=1e-5)


def test_a_mass_that_does_not_fit_is_refused(tmp_path):
    requests = probes(1, 12)
    requests[3][2] = replace(requests[3][2], sink_mass=np.array([0.9, 0.9], np.float32))
    url = f"sqlite:{tmp_path}/a.db"
    store(url, requests[:3])
    with pytest.raises(RecordError):  # no store takes it
        store(url, requests[3:4])


def test_beyond_the_limit_a_random_part_of_the_requests_is_kept(tmp_path):
    requests = probes(1, 40, rows=2)
    forward = read(Source(store(f"sqlite:{tmp_path}/a.db", requests)), name="A", max_requests=15)
    backward = read(Source(store(f"sqlite:{tmp_path}/b.db", requests[::-1])), name="A", max_requests=15)
    assert forward.requests == backward.requests and len(forward.requests) == 15 and forward.left_out == 25
    assert np.array_equal(forward.zones, backward.zones)
    other = read(Source(f"sqlite:{tmp_path}/a.db"), name="A", max_requests=15, seed=1)
    assert other.requests != forward.requests


def test_a_mixture_is_refused_unless_asked_for(tmp_path):
    url = store(f"sqlite:{tmp_path}/a.db", [*probes(1, 12), request(np.random.default_rng(9), "x", model="other")])
    with pytest.raises(OptionError, match=r"rows of 2 models: 'm' \(72 rows\), 'other' \(6 rows\).*--a-model.*--mixed"):
        read(Source(url), name="A")
    assert read(Source(url, model="m"), name="A").total == 72
    assert read(Source(url), name="A", mixed=True).models == {"m": 72, "other": 6}
    single = [replace(r, layers=(3,), token_positions=r.token_positions[:1], attention_scores=r.attention_scores[:1],
                      fingerprints=r.fingerprints[:1], sink_mass=r.sink_mass[:1])
              for r in request(np.random.default_rng(9), "y")]  # fmt: skip
    url = store(f"sqlite:{tmp_path}/b.db", [*probes(1, 12), single])
    with pytest.raises(OptionError, match=r"different layers.*\[3, 29\] \(72 rows\), \[3\] \(6 rows\)"):
        read(Source(url), name="B")
    assert read(Source(url), name="B", mixed=True).layer_rows.sum(axis=0).tolist() == [78, 72]


def test_damaged_and_newer_stores_are_refused(tmp_path):
    url = store(f"sqlite:{tmp_path}/a.db", probes(1, 12))
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("UPDATE records SET fingerprint = ? WHERE id = 30", (np.full(20, np.nan, "<f4").tobytes(),))
    with pytest.raises(RecordError, match=r"side A \(sqlite:.*rows 0 to 71: fingerprint 29: local_mass is nan"):
        read(Source(url), name="A")

    store(f"sqlite:{tmp_path}/b.db", probes(1, 12))
    with sqlite3.connect(tmp_path / "b.db") as database:
        data = bytearray(database.execute("SELECT record FROM records WHERE id = 3").fetchone()[0])
        data[2] = 9  # the version byte
        database.execute("UPDATE records SET record = ? WHERE id = 3", (bytes(data),))
    with pytest.raises(RecordError, match=r"side B .*schema version 9; this attnhook reads 1 to 8: upgrade"):
        read(Source(f"sqlite:{tmp_path}/b.db"), name="B")

    path = tmp_path / "c.jsonl"
    store(f"jsonl:{path}", probes(1, 12))
    lines = path.read_text().splitlines()
    lines[5] = (
        lines[5]
        .replace('"schema_version": 1', '"schema_version": 3')
        .replace('"schema_version":1', '"schema_version":3')
    )
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordError, match="schema version '3'"):
        read(Source(f"jsonl:{path}"), name="A")


def test_too_few_requests_are_refused(tmp_path):
    url = store(f"sqlite:{tmp_path}/a.db", probes(1, 9))
    side = read(Source(url), name="A")
    with pytest.raises(OptionError, match="has 9 requests; intervals over fewer than 10"):
        compare(side, side, QUICK)
    with pytest.raises(OptionError, match="no rows of model 'x'"):
        read(Source(url, model="x"), name="A")
    rng = np.random.default_rng(0)
    a, b = made_side(rng, 20), replace(made_side(rng, 20), requests=tuple(f"other{i}" for i in range(20)))
    with pytest.raises(OptionError, match="only 0 request ids are on both sides"):
        compare(a, b, replace(QUICK, design="paired"))
    for wrong in ({"resamples": 3}, {"confidence": 1.0}, {"design": "both"}):
        with pytest.raises(OptionError):
            Settings(**wrong)  # type: ignore[arg-type]


# -- the whole


def test_the_same_probes_are_compared_in_pairs(tmp_path):
    a = store(f"sqlite:{tmp_path}/a.db", probes(1, 40))
    b = store(f"sqlite:{tmp_path}/b.db", [*probes(1, 39, far=2.0), request(np.random.default_rng(2), "probe/b/other")])
    found = compare(read(Source(a), name="A"), read(Source(b), name="B"), QUICK)
    assert found.paired and found.without_partner == (1, 1) and found.a.requests == found.b.requests
    alone = compare(read(Source(a), name="A"), read(Source(b), name="B"), replace(QUICK, design="independent"))
    assert not alone.paired and alone.without_partner == (0, 0)
    widths = [one.means["local"][2].high - one.means["local"][2].low for one in (found, alone)]
    assert widths[0] < widths[1]  # what pairs have in common does not widen the interval
    assert [row.pack for row in found.packs] == ["a", "b"] and found.jensen_shannon.p < 0.05
    assert [row.layer for row in found.layer_differences] == list(LAYERS)
    local = found.layer_differences[0].measures["local"]
    assert local.value == pytest.approx(
        found.depths[0][0].measures["local"].value - found.depths[1][0].measures["local"].value
    )
    same = compare(found.a, found.a, QUICK)
    assert max(same.jensen_shannon.value, same.energy.distance.value) < 1e-12
    assert {row.p for row in same.zones} == {1.0} and same.energy.distance.p == 1.0


class _Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def attnhook(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one command."""
    monkeypatch.setattr("sys.argv", ["attnhook", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.slow
def test_the_command_writes_a_report_that_is_the_same_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store("sqlite:both.db", probes(1, 30, model="one <b>|bold</b>"))
    store(
        "sqlite:both.db",
        [[replace(r, request_id=r.request_id + "x") for r in rs] for rs in probes(2, 30, far=1, model="two")],
    )
    command = ["compare", "both.db", "sqlite:both.db", "--a-model", "one <b>|bold</b>", "--b-model", "two"]
    command += ["--resamples", "200", "--permutations", "199", "--seed", "7", "--out"]
    files = []
    for _ in range(2):
        code, out, err = attnhook(monkeypatch, capsys, *command, "report")
        assert code == 0, err
        assert "without the sink, position 0" in " ".join(out.split()) and "semantic_bridge" in out
        found = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
        files.append(found)
        for path in (tmp_path / "report").iterdir():
            path.unlink()
        (tmp_path / "report").rmdir()
    assert files[0] == files[1]
    drawings = {"zones.svg", "distances.svg", "layers.svg"}
    assert set(files[0]) == {"comparison.md", "comparison.html", "comparison.json", *drawings}

    result = json.loads(files[0]["comparison.json"])
    assert result["without_sink"] is True and result["sink_mass"]["a"]["value"] > 0
    assert result["design"] == "independent" and result["sides"]["b"]["models"] == {"two": 180}
    shares = [row["a"]["value"] for row in result["zones"]]
    assert sum(shares) == pytest.approx(1)
    assert all(f"{100 * share:.1f} [" in files[0]["comparison.md"].decode() for share in shares)

    page = _Tags()
    page.feed(files[0]["comparison.html"].decode())
    names = [tag for tag, _ in page.tags]
    assert names.count("svg") == 3 and not {"script", "link", "img", "iframe", "b"} & set(names)
    outside = [
        v
        for _, a in page.tags
        for k, v in a.items()
        if k.split(":")[-1] in ("href", "src") and not str(v).startswith("#")
    ]
    assert outside == []


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store("sqlite:a.db", probes(1, 12))
    store("sqlite:few.db", probes(1, 1))
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (("a.db", "sqlite:a.db"), "same rows of a.db: give filters such as --a-model and --b-model"),
        (("a.db", "a.db", "--a-model", "m", "--b-model", "m"), "same rows of a.db: give the sides different filters"),
        (("a.db", "b.db"), "'b.db' is no store"),
        (("a.db", "sqlite:b.db"), "b.db"),
        (("a.db", "a.db", "--b-since", "2020-01-01", "--out", "there"), "nothing is overwritten"),
        (("a.db", "a.db", "--b-since", "2020-01-01", "--out", "x/y"), "the folder x does not exist"),
        (("a.db", "a.db", "--b-since", "yesterday"), "--b-since 'yesterday' must be a time"),
        (("a.db", "a.db", "--b-since", "2020-01-01", "--rows", "some"), "must be one of all, prompt, generated"),
        (
            ("a.db", "a.db", "--b-since", "2100-01-01"),
            "side B (sqlite:a.db) has no rows among the 0 that --b-since let through: check the store and --b-since",
        ),
        (
            ("a.db", "few.db"),
            "side B (sqlite:few.db) has 1 requests; intervals over fewer than 10 mean nothing: store more\n",
        ),
        (("a.db", "few.db", "--b-model", "m", "--b-since", "2020-01-01"), "or widen --b-model and --b-since\n"),
        (("a.db", "a.db", "--b-until", "2100-01-01", "--resamples", "1"), "resamples=1 must be from 100"),
    ):
        code, out, err = attnhook(monkeypatch, capsys, "compare", *arguments)
        assert code == 2 and not out, err
        assert message in err and len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if ".db" not in path.name) == ["there"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    rng = np.random.default_rng(0)
    found = compare(made_side(rng, 20), made_side(rng, 20), QUICK)
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(AttnhookError, match=r"No space left .* free bytes"):
            report.write(found, disk / "report", command="compare")
        assert list(disk.iterdir()) == []
    report.write(found, tmp_path / "report", command="compare")
    with pytest.raises(OptionError, match="nothing is overwritten"):
        report.write(found, tmp_path / "report", command="compare")


def test_steps_are_told_in_order():
    rng = np.random.default_rng(0)
    told: list[tuple[str, int, int]] = []
    compare(made_side(rng, 20), made_side(rng, 20), QUICK, progress=lambda *step: told.append(step))
    assert [done for _, done, _ in told] == list(range(len(told))) and told[-1] == ("done", 6, 6)
    assert numbers.MEASURES.keys() == {"local", "mid", "long", "entropy"}

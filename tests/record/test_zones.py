import dataclasses
import json
import math
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnhook.errors import OptionError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record import zones
from attnhook.record.zones import ZONE_NAMES, classify, classify_many


def fingerprint(weights):
    """Fingerprint of a row from its attention by distance, ``weights[d]``; a sum below 1 is kept."""
    a = np.asarray(weights, np.float64)
    histogram = np.zeros(fp.BINS)
    np.add.at(histogram, [fp.bin_of(d) for d in range(len(a))], a)
    p = a[a > 0] / a.sum() if a.sum() else a[a > 0]
    entropy = -(p * np.log(p)).sum() / math.log(len(a)) if len(a) > 1 else 0.0
    return fp.assemble(histogram, np.asarray(entropy))


def row(visible, *parts):
    """Attention by distance over ``visible`` keys: the sum of (mass, {distance: weight} or function) parts."""
    d = np.arange(visible)
    a = np.zeros(visible)
    for mass, shape in parts:
        if callable(shape):
            w = shape(d).astype(np.float64)
        else:
            w = np.zeros(visible)
            w[list(shape)] = list(shape.values())
        a += mass * w / w.sum()
    return a


def decay(tau):
    return lambda d: np.exp(-d / tau)


def bump(centre, width):
    return lambda d: np.exp(-0.5 * ((d - centre) / width) ** 2)


def comb(period, first=1):
    return lambda d: (d % period == 0) & (d >= first)


def band(start, end):
    return lambda d: (d >= start) & (d < end)


ARCHETYPES = {
    "previous tokens": ("syntax_floor", row(1000, (1, decay(2)))),
    "previous tokens, short row": ("syntax_floor", row(24, (1, decay(2)))),
    "bracket 5 back": ("syntax_floor", row(400, (0.9, {5: 1}), (0.1, decay(3)))),
    "single key": ("syntax_floor", row(1, (1, {0: 1}))),
    "bump at 60": ("semantic_bridge", row(1000, (1, bump(60, 5)))),
    "wide bump at 100": ("semantic_bridge", row(1000, (1, bump(100, 20)))),
    "needle at 40": ("semantic_bridge", row(2000, (0.9, {40: 1}), (0.1, decay(3)))),
    "d >= 1000": ("long_range", row(4096, (1, bump(1500, 30)))),
    "needle at 5000": ("long_range", row(8192, (0.9, {5000: 1}), (0.1, decay(3)))),
    "sink": ("long_range", row(3000, (0.9, {2999: 1}), (0.1, decay(3)))),
    "uniform over 2000": ("diffuse", row(2000, (1, band(0, 2000)))),
    "uniform over 1100": ("diffuse", row(1100, (1, band(0, 1100)))),
    "uniform over 200": ("diffuse", row(200, (1, band(0, 200)))),
    "uniform over 60000": ("diffuse", row(60000, (1, band(0, 60000)))),
}


@pytest.mark.parametrize("name", ARCHETYPES)
def test_archetypes_have_their_zone_with_high_confidence(name):
    expected, a = ARCHETYPES[name]
    zone = classify(fingerprint(a))
    assert zone.name == expected
    assert zone.confidence > 0.9


@pytest.mark.parametrize("name", ARCHETYPES)
def test_a_learned_sink_changes_nothing_but_the_scale(name):
    expected, a = ARCHETYPES[name]
    whole, part = classify(fingerprint(a)), classify(fingerprint(0.15 * a))
    assert part.name == whole.name == expected
    assert part.confidence == pytest.approx(whole.confidence, abs=0.02)


def test_two_keys_are_local_and_not_diffuse():
    for a in ([0.5, 0.5], [0.7, 0.3], [0.3, 0.7]):
        assert classify(fingerprint(a)).name == "syntax_floor"


def test_a_few_visible_keys_are_not_diffuse_but_many_are():
    names = [classify(fingerprint(np.full(n, 1 / n))).name for n in (1, 2, 4, 8, 32, 128)]
    assert names == ["syntax_floor"] * 4 + ["diffuse"] * 2


def test_no_attention_at_all_is_diffuse():
    assert classify(np.zeros(20)).name == "diffuse"
    confidences = [classify(fingerprint(m * row(50, (1, {3: 1})))).confidence for m in (1, 1e-3, 1e-6)]
    assert [classify(fingerprint(m * row(50, (1, {3: 1})))).name for m in (1, 1e-6)] == ["syntax_floor", "diffuse"]
    assert confidences[1] == pytest.approx(0.5, abs=0.05)
    assert min(confidences[0], confidences[2]) > 0.95


@pytest.mark.parametrize(("near", "far"), [(2, 40), (2, 600), (40, 600)])
def test_two_bands_tie_in_proportion_to_their_thresholds(near, far):
    names = {2: "syntax_floor", 40: "semantic_bridge", 600: "long_range"}
    t = zones.DEFAULTS
    mass = {2: t.local_mass, 40: t.mid_mass, 600: t.long_mass}
    half = mass[near] / (mass[near] + mass[far])

    def at(share):
        return classify(fingerprint(row(1000, (share, {near: 1}), (1 - share, {far: 1}))))

    assert at(half).confidence == pytest.approx(0.5, abs=0.02)
    assert at(half + 0.02).name == names[near]
    assert at(half - 0.02).name == names[far]


def test_three_bands_tie_at_a_third():
    t = zones.DEFAULTS
    third = classify(fingerprint(row(1000, (1, {2: t.local_mass, 40: t.mid_mass, 600: t.long_mass}))))
    assert third.confidence == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [(0, "syntax_floor"), (7, "syntax_floor"), (8, "semantic_bridge"), (255, "semantic_bridge"), (256, "long_range")],
)
def test_band_edges(distance, expected):
    assert classify(fingerprint(row(1000, (1, {distance: 1})))).name == expected


def test_diffuse_needs_its_entropy():
    t = zones.DEFAULTS
    spread = fingerprint(row(1000, (1, band(0, 1000))))
    names = []
    for step in (-3, 3):
        f = spread.copy()
        f[fp.ENTROPY] = t.diffuse_entropy + step * t.diffuse_entropy_softness
        names.append(classify(f).name)
    assert names[0] != "diffuse"
    assert names[1] == "diffuse"


SPREAD = fingerprint(row(1000, (0.3, decay(2)), (0.3, {40: 1}), (0.4, {600: 1})))


def test_no_fingerprint_alone_is_a_ripple():
    comb = np.arange(1, 513) % 8 == 0
    for f in (SPREAD, fingerprint(comb / comb.sum())):
        assert classify(f).name != "structure_ripple"


def test_ripple_rests_on_the_measured_periodicity():
    t = zones.DEFAULTS
    steps = t.ripple_periodicity + t.ripple_softness * np.array([-4, -2, 4, 10])
    codes, confidence = classify_many(np.tile(SPREAD, (4, 1)), periodicity=steps)
    assert (codes == zones.STRUCTURE_RIPPLE).tolist() == [False, False, True, True]
    assert confidence[3] > 0.95
    unknown, sure = classify_many(np.tile(SPREAD, (2, 1)), periodicity=np.array([np.nan, 0]))
    assert ZONE_NAMES[unknown[0]] == ZONE_NAMES[unknown[1]] == classify(SPREAD).name
    assert sure[0] == pytest.approx(classify(SPREAD).confidence)


@pytest.mark.parametrize("bad", [np.zeros(2), np.zeros((1, 1)), np.array([-0.1]), np.array([1.1])])
def test_a_periodicity_that_is_none_is_refused(bad):
    with pytest.raises(RecordError, match=r"periodicity has shape .* for 1 fingerprints"):
        classify_many(SPREAD[None], periodicity=bad)


def test_thresholds_are_saved_and_loaded(tmp_path):
    path = tmp_path / "t.json"
    table = dataclasses.replace(zones.DEFAULTS, local_mass=0.7)
    table.save(path, model="m")
    assert zones.Thresholds.load(path) == table
    content = json.loads(path.read_text())
    assert content["notes"] == {"model": "m"}
    for change, message in (
        (content | {"attnhook_thresholds": 2}, "format 2; this attnhook reads 1"),
        ({"local_mass": 1}, "format None"),
        ([], "format None"),
        (content | {"thresholds": content["thresholds"] | {"new": 1.0}}, "unknown or missing thresholds: new"),
        (content | {"thresholds": {"local_mass": 0.5}}, "unknown or missing thresholds: .*sharpness"),
        (content | {"thresholds": content["thresholds"] | {"sharpness": 0}}, "sharpness is 0; it must be a positive"),
        (content | {"thresholds": content["thresholds"] | {"sharpness": "2"}}, "sharpness is '2'"),
        (content | {"thresholds": content["thresholds"] | {"sharpness": math.nan}}, "sharpness is nan"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(OptionError, match=message):
            zones.Thresholds.load(path)
    path.write_text("no JSON")
    with pytest.raises(OptionError, match="cannot read thresholds"):
        zones.Thresholds.load(path)
    with pytest.raises(OptionError, match="cannot read thresholds"):
        zones.Thresholds.load(tmp_path / "none.json")


def test_without_key_is_the_fingerprint_of_the_other_keys():
    rng = np.random.default_rng(0)
    rows, lengths = [], np.array([1, 2, 3, 17, 300, 1000])
    for n in lengths:
        a = rng.dirichlet(np.full(n, 0.2)) * 0.5
        a[-1] += 0.5  # the sink, at the largest distance
        rows.append(a)
    got = zones.without_key(
        np.stack([fingerprint(a) for a in rows]), np.array([a[-1] for a in rows]), lengths - 1, lengths
    )
    for n, a, f in zip(lengths, rows, got, strict=True):
        assert f.dtype == np.float32
        histogram = fingerprint(np.append(a[:-1], 0))[fp.HISTOGRAM]
        np.testing.assert_allclose(f[fp.HISTOGRAM], histogram, atol=1e-6)
        if n > 2:
            np.testing.assert_allclose(f[fp.ENTROPY], fingerprint(a[:-1])[fp.ENTROPY], atol=2e-6)
        classify(f)


def test_without_key_brings_out_what_the_sink_hides():
    a = row(3000, (0.6, {2999: 1}), (0.4, {60: 1, 61: 2, 62: 1}))
    f = fingerprint(a)[None]
    assert classify(f[0]).name == "long_range"
    rest = zones.without_key(f, np.array([0.6]), np.array([2999]), np.array([3000]))
    assert classify(rest[0]) == ("semantic_bridge", pytest.approx(1, abs=0.01))


def test_without_key_refuses_a_score_of_another_row():
    f = fingerprint(row(3000, (1, decay(3))))[None]
    with pytest.raises(RecordError, match=r"row 0: score 0\.6 exceeds the mass 0 of its bin 2048-4095"):
        zones.without_key(f, np.array([0.6]), np.array([2999]), np.array([3000]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5, 1.5])
@pytest.mark.parametrize("column", [fp.LOCAL, fp.ENTROPY, 4, 19])
def test_a_bad_number_is_named(value, column):
    rows = np.tile(fingerprint(row(100, (0.5, decay(3)))), (5, 1))
    rows[3, column] = value
    with pytest.raises(RecordError, match=rf"fingerprint 3: {fp.NAMES[column]} is {value:g}, outside \[0, 1\]"):
        classify_many(rows)
    assert issubclass(RecordError, ValueError)


def test_a_bad_number_in_a_later_chunk_is_named_by_its_row():
    rows = np.tile(fingerprint(row(100, (1, decay(3)))), (40_000, 1))
    rows[39_999, fp.ENTROPY] = math.nan
    with pytest.raises(RecordError, match="fingerprint 39999: entropy is nan"):
        classify_many(rows)


def test_too_much_mass_is_refused():
    f = np.zeros(20)
    f[fp.HISTOGRAM] = 0.1
    with pytest.raises(RecordError, match=r"fingerprint 0: its histogram sums to 1\.6"):
        classify(f)


def test_rounding_is_forgiven():
    f = fingerprint(row(1000, (1, decay(2)))).astype(np.float16).astype(np.float64)
    f[fp.HISTOGRAM.stop - 1] = -1e-4
    assert classify(f).name == "syntax_floor"


@pytest.mark.parametrize("bad", [np.zeros(19), np.zeros((1, 20)), np.zeros(()), [], ["a"] * 20, [[1], [2, 3]], None])
def test_classify_refuses_wrong_shapes(bad):
    with pytest.raises(RecordError):
        classify(bad)


@pytest.mark.parametrize("bad", [np.zeros(20), np.zeros((3, 19)), np.zeros((2, 3, 20)), np.zeros((0, 19)), 3.0])
def test_classify_many_refuses_wrong_shapes(bad):
    with pytest.raises(RecordError, match="shape"):
        classify_many(bad)


@pytest.mark.parametrize("none", [[], np.zeros((0, 20)), np.zeros((0, 20), np.float32)])
def test_no_fingerprints(none):
    codes, confidence = classify_many(none)
    assert codes.shape == confidence.shape == (0,)
    assert (codes.dtype, confidence.dtype) == (np.int8, np.float32)
    assert zones.shares(codes) == dict.fromkeys(ZONE_NAMES, 0.0)


def test_lists_and_integers_are_fingerprints_too():
    first = [1, 0, 0, 0, 1, *[0] * 15]
    assert classify(first) == classify(np.array(first, np.float32))


def test_shares():
    assert zones.shares(np.array([0, 0, 3, 4], np.int8)) == {
        "syntax_floor": 0.5,
        "semantic_bridge": 0.0,
        "structure_ripple": 0.0,
        "long_range": 0.25,
        "diffuse": 0.25,
    }
    with pytest.raises(RecordError, match="0 to 4, got -1 to 5"):
        zones.shares(np.array([-1, 5]))


def test_thresholds_are_one_frozen_table():
    with pytest.raises(dataclasses.FrozenInstanceError):
        zones.DEFAULTS.local_mass = 0.9
    a = fingerprint(row(1000, (0.55, {2: 1}), (0.45, {40: 1})))[None]
    even = dataclasses.replace(zones.DEFAULTS, local_mass=0.5)
    stricter = dataclasses.replace(zones.DEFAULTS, local_mass=0.7)
    assert classify_many(a, thresholds=even)[0][0] == zones.SYNTAX_FLOOR
    assert classify_many(a, thresholds=stricter)[0][0] == zones.SEMANTIC_BRIDGE


def luminance(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def test_every_zone_has_a_meaning_and_a_colour_for_light_and_dark():
    assert tuple(zones.MEANINGS) == tuple(zones.COLOURS) == ZONE_NAMES
    assert len(set(zones.COLOURS.values())) == len(ZONE_NAMES)
    for colour in zones.COLOURS.values():
        assert 1.05 / (luminance(colour) + 0.05) >= 3
        assert (luminance(colour) + 0.05) / (luminance("#121212") + 0.05) >= 3


# any non-negative histogram of mass <= 1 with any entropy: more than real rows can give
histograms = hnp.arrays(np.float64, (fp.BINS,), elements=st.floats(0, 1))
fingerprints = st.builds(
    lambda h, mass, entropy: fp.assemble(h * (mass / max(h.sum(), 1e-9)) if h.sum() else h, np.asarray(entropy)),
    histograms,
    st.floats(0, 1),
    st.floats(0, 1),
)


@settings(deadline=None)
@given(fingerprints)
def test_confidence_is_a_number_between_uniform_and_one(f):
    zone = classify(f)
    assert zone.name in ZONE_NAMES
    assert 0.2 - 1e-6 <= zone.confidence <= 1


@settings(deadline=None, max_examples=50)
@given(st.lists(fingerprints, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_rows_are_independent(rows, random):
    codes, confidence = classify_many(np.stack(rows))
    assert [(ZONE_NAMES[c], float(x)) for c, x in zip(codes, confidence, strict=True)] == [classify(f) for f in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    codes_, confidence_ = classify_many(np.stack(rows)[order])
    np.testing.assert_array_equal(codes_, codes[order])
    np.testing.assert_array_equal(confidence_, confidence[order])


@settings(deadline=None, max_examples=100)
@given(fingerprints, hnp.arrays(np.float64, (fp.SIZE,), elements=st.floats(-1, 1)), st.sampled_from([1e-4, 1e-5, 1e-6]))
def test_a_small_change_changes_the_confidence_a_little(f, direction, size):
    f = f.astype(np.float64)
    assume(f[fp.HISTOGRAM].sum() > 0.1)
    moved = np.clip(f + size * direction, 0, 1)
    before, after = classify(f), classify(moved)
    assert abs(before.confidence - after.confidence) < 2000 * size + 1e-6
    if before.name != after.name:
        assert min(before.confidence, after.confidence) < 0.5 + 2000 * size


def test_the_path_between_two_archetypes_has_no_jump():
    ends = [fingerprint(a).astype(np.float64) for _, a in ARCHETYPES.values()]
    steps = np.linspace(0, 1, 501)
    for one in ends:
        for other in ends:
            path = steps
            for _ in range(2):  # a jump would stay as large, however closely one looks
                _, confidence = classify_many(np.outer(1 - path, one) + np.outer(path, other))
                worst = int(np.abs(np.diff(confidence)).argmax())
                path = np.linspace(path[worst], path[worst + 1], 501)
            assert np.abs(np.diff(confidence)).max() < 0.01


def test_a_hundred_thousand_a_second():
    rng = np.random.default_rng(0)
    rows = fp.assemble(rng.dirichlet(np.full(16, 0.3), 50_000), rng.random(50_000))
    best = min(_seconds(classify_many, rows) for _ in range(3))
    assert len(rows) / best > 1e5


def _seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start

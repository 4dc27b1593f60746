"""What a comparison states, computed from two sides: zone shares, profiles by layer and by pack, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from attnhook.analysis.compare.comparison import (
    MEASURES,
    Comparison,
    Depth,
    Design,
    LayerDifference,
    PackRow,
    Settings,
    ZoneRow,
)
from attnhook.analysis.compare.distances import Distance, Energy, against_null, energy_distance, jensen_shannon
from attnhook.analysis.compare.resampling import Estimate, bootstrap_sums, estimate, holm, labels, p_value
from attnhook.analysis.compare.sides import MIN_REQUESTS, Side
from attnhook.errors import OptionError
from attnhook.record import fingerprint as fp
from attnhook.record.zones import ZONE_NAMES

_PROBE = "probe/"
_PAIRED_SHARE = 0.9  # of the requests of the side that has fewer must have a partner
_ENERGY_ROWS = 3000  # fingerprints of each side
_MIN_PACK = 5  # requests of each side in a pack that is compared by itself

Progress = Callable[[str, int, int], None]


def compare(a: Side, b: Side, settings: Settings | None = None, *, progress: Progress = lambda *_: None) -> Comparison:
    """Compare two sides.

    Both are compared as they were read: without the attention sink, or with it. The same sides and settings give the
    same result. ``progress`` is called with the name of a step and how many
    steps are done, of how many.

    Raises OptionError where there are too few requests, no pairs for a paired design, or one side is without the sink
    and the other is not, and RecordError where all fingerprints are the same.
    """
    settings = settings or Settings()
    whole = a, b
    for name, side in (("A", a), ("B", b)):
        _enough(name, side, len(side.requests), "requests")
    _refuse_other_sink(a, b)
    a, b, paired = _matched(a, b, settings.design)
    known = a.knows_sink and b.knows_sink
    steps = ["zone shares", "means", "layers", "histograms", "energy distance", "packs"]

    def begin(step: str) -> None:
        progress(step, steps.index(step), len(steps))

    begin("zone shares")
    zones = _zone_rows(a, b, settings, paired)
    begin("means")
    means = _means(a, b, settings, paired, known)
    begin("layers")
    depths, differences = _layers(a, b, settings, paired)
    begin("histograms")
    shannon = _shannon(a, b, settings, paired, 4)
    begin("energy distance")
    energy = _energy(a, b, settings, paired)
    begin("packs")
    packs = _packs(a, b, settings, paired)
    progress("done", len(steps), len(steps))
    return Comparison(
        a=a,
        b=b,
        settings=settings,
        paired=paired,
        without_partner=(len(whole[0].requests) - len(a.requests), len(whole[1].requests) - len(b.requests)),
        zones=zones,
        without_sink=a.without_sink,
        sink=means.pop("sink", None),
        means=means,
        histograms=(_histogram(a), _histogram(b)),
        jensen_shannon=shannon,
        energy=energy,
        depths=depths,
        layer_differences=differences,
        packs=packs,
        notes=_notes(whole, a, b, known, energy),
    )


def _enough(name: str, side: Side, count: int, what: str) -> None:
    if count < MIN_REQUESTS:
        filters = side.source.filters(name)
        raise OptionError(
            name.lower(),
            f"side {name} ({side.source.url}) has {count} {what}; intervals over fewer than {MIN_REQUESTS} mean "
            f"nothing: store more{filters and f', or widen {filters}'}",
        )


def _refuse_other_sink(a: Side, b: Side) -> None:
    if a.without_sink != b.without_sink:
        (free, first), (other, second) = sorted((("A", a), ("B", b)), key=lambda one: not one[1].without_sink)
        raise OptionError(
            "with_sink",
            f"side {free} ({first.source.url}) is without the attention sink, side {other} ({second.source.url}) does "
            "not tell its attention on position 0 (it is of attnhook before 0.2): capture it anew, or leave the sink "
            "in both with --with-sink",
        )


def _matched(a: Side, b: Side, design: Design) -> tuple[Side, Side, bool]:
    """The sides as they are compared, and whether they are paired by request id."""
    if design == "independent":
        return a, b, False
    places_a, places_b = ({name: i for i, name in enumerate(side.requests)} for side in (a, b))
    shared = [name for name in a.requests if name in places_b]
    if design == "auto":
        probes = all(name.startswith(_PROBE) for name in shared)  # other ids may be the same by chance
        enough = len(shared) >= max(MIN_REQUESTS, _PAIRED_SHARE * min(len(a.requests), len(b.requests)))
        if not (probes and enough):
            return a, b, False
    elif len(shared) < MIN_REQUESTS:
        raise OptionError(
            "design",
            f"only {len(shared)} request ids are on both sides, too few for pairs (at least {MIN_REQUESTS}): choose "
            "--design independent",
        )
    index = [np.array([places[name] for name in shared]) for places in (places_a, places_b)]
    return a.take(index[0]), b.take(index[1]), True


def _rng(settings: Settings, step: int) -> np.random.Generator:
    """A generator for each step: what one step draws does not depend on the others."""
    return np.random.default_rng([settings.seed, step])


def _zone_rows(a: Side, b: Side, settings: Settings, paired: bool) -> list[ZoneRow]:
    step = 1
    tables = [np.column_stack([side.rows, side.zones]).astype(np.float64) for side in (a, b)]
    estimates = _ratios(tables[0], tables[1], settings, paired, step)
    pooled = np.concatenate(tables)
    observed = np.abs(_ratio(tables[0].sum(axis=0)) - _ratio(tables[1].sum(axis=0)))
    dealt = []
    for in_a in labels(_rng(settings, 10 + step), *map(len, tables), permutations=settings.permutations, paired=paired):
        sums = in_a @ pooled
        dealt.append(np.abs(_ratio(sums) - _ratio(pooled.sum(axis=0) - sums)))
    null = np.concatenate(dealt)
    p = np.array([p_value(float(observed[i]), null[:, i]) for i in range(len(ZONE_NAMES))])
    return [
        ZoneRow(name, *estimates[i], p=float(p[i]), p_holm=float(corrected))
        for i, (name, corrected) in enumerate(zip(ZONE_NAMES, holm(p).tolist(), strict=True))
    ]


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 1 + k], the number of rows first, as means [..., k]; NaN where there are no rows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means: np.ndarray = sums[..., 1:] / sums[..., :1]
    return means


def _ratios(
    a: np.ndarray, b: np.ndarray, settings: Settings, paired: bool, step: int
) -> list[tuple[Estimate, Estimate, Estimate]]:
    """Means over rows of A, of B and their difference, for each column of tables [R, 1 + k] (rows first)."""
    values = _ratio(a.sum(axis=0)), _ratio(b.sum(axis=0))
    drawn: list[tuple[np.ndarray, np.ndarray]] = [
        (_ratio(x), _ratio(y))
        for x, y in bootstrap_sums(_rng(settings, step), a, b, resamples=settings.resamples, paired=paired)
    ]
    from_a, from_b = (np.concatenate([part[i] for part in drawn]) for i in (0, 1))
    level = settings.confidence
    return [
        (
            estimate(float(values[0][i]), from_a[:, i], level),
            estimate(float(values[1][i]), from_b[:, i], level),
            estimate(float(values[0][i] - values[1][i]), from_a[:, i] - from_b[:, i], level),
        )
        for i in range(a.shape[1] - 1)
    ]


def _means(
    a: Side, b: Side, settings: Settings, paired: bool, known: bool
) -> dict[str, tuple[Estimate, Estimate, Estimate]]:
    columns = list(MEASURES.values())
    tables = [
        np.column_stack([side.rows, side.sums[:, columns], *([side.sink] if known else [])]).astype(np.float64)
        for side in (a, b)
    ]
    names = [*MEASURES, *(["sink"] if known else [])]
    return dict(zip(names, _ratios(tables[0], tables[1], settings, paired, 3), strict=True))


def _histogram(side: Side) -> tuple[float, ...]:
    mean = side.sums[:, fp.HISTOGRAM].sum(axis=0) / side.total
    return tuple(mean.tolist())


def _shannon(a: Side, b: Side, settings: Settings, paired: bool, step: int) -> Distance:
    pooled = np.concatenate([side.sums[:, fp.HISTOGRAM] for side in (a, b)])
    observed = float(jensen_shannon(*(side.sums[:, fp.HISTOGRAM].sum(axis=0) for side in (a, b))))
    dealt = labels(
        _rng(settings, step), len(a.requests), len(b.requests), permutations=settings.permutations, paired=paired
    )
    null = np.concatenate([jensen_shannon(sums := in_a @ pooled, pooled.sum(axis=0) - sums) for in_a in dealt])
    return against_null(observed, null)


def _energy(a: Side, b: Side, settings: Settings, paired: bool) -> Energy:
    """Of at most `_ENERGY_ROWS` fingerprints a side, some of each request, or one of each of some requests."""
    rng = _rng(settings, 5)
    sides = [a, b]
    if max(len(a.requests), len(b.requests)) > _ENERGY_ROWS:
        drawn = [np.sort(rng.permutation(len(s.requests))[:_ENERGY_ROWS]) for s in sides]
        sides = [side.take(drawn[0 if paired else i]) for i, side in enumerate(sides)]
    samples, owners = [], []
    for side in sides:
        each = max(1, _ENERGY_ROWS // len(side.requests))
        starts = np.searchsorted(side.sample_request, side.sample_request)
        first = np.arange(len(side.sample)) - starts < each  # the sample is in random order within a request
        samples.append(side.sample[first])
        owners.append(side.sample_request[first])
    return energy_distance(
        rng, (samples[0], samples[1]), (owners[0], owners[1]), permutations=settings.permutations, paired=paired
    )


def _layer_table(side: Side, place: int) -> tuple[np.ndarray, list[str]]:
    """Table [R, 1 + k] of one layer and the names of its columns; ``sink`` where all its rows know it."""
    columns = list(MEASURES.values())
    parts = [side.layer_rows[:, place], side.layer_sums[:, place][:, columns]]
    names = list(MEASURES)
    if (side.layer_sink_rows[:, place] == side.layer_rows[:, place]).all():
        parts.append(side.layer_sink[:, place])
        names.append("sink")
    return np.column_stack(parts).astype(np.float64), names


def _layers(
    a: Side, b: Side, settings: Settings, paired: bool
) -> tuple[tuple[list[Depth], list[Depth]], list[LayerDifference]]:
    same = a.layers == b.layers
    depths: tuple[list[Depth], list[Depth]] = ([], [])
    differences = []
    for i, side in enumerate((a, b)):
        for place, layer in enumerate(side.layers):
            table, names = _layer_table(side, place)
            found = _ratios(table, table, settings, True, 1000 * (i + 1) + layer)
            total = side.layer_rows[:, place].sum()
            histogram = side.layer_sums[:, place, fp.HISTOGRAM].sum(axis=0) / max(total, 1)
            measures = {name: estimates[0] for name, estimates in zip(names, found, strict=True)}
            depths[i].append(Depth(layer, int(total), measures, tuple(histogram.tolist())))
    for place, layer in enumerate(a.layers if same else ()):
        (of_a, names_a), (of_b, names_b) = _layer_table(a, place), _layer_table(b, place)
        names = names_a if len(names_a) <= len(names_b) else names_b
        width = 1 + len(names)
        found = _ratios(of_a[:, :width], of_b[:, :width], settings, paired, 3000 + layer)
        shannon = jensen_shannon(np.array(depths[0][place].histogram), np.array(depths[1][place].histogram))
        measures = {name: estimates[2] for name, estimates in zip(names, found, strict=True)}
        differences.append(LayerDifference(layer, measures, float(shannon)))
    return depths, differences


def _packs(a: Side, b: Side, settings: Settings, paired: bool) -> list[PackRow]:
    members = [_by_pack(side.requests) for side in (a, b)]
    shared = [pack for pack in members[0] if min(len(found.get(pack, [])) for found in members) >= _MIN_PACK]
    rows = []
    columns = list(MEASURES.values())
    for number, pack in enumerate(shared):
        x, y = (side.take(np.array(found[pack])) for side, found in zip((a, b), members, strict=True))
        tables = [np.column_stack([side.rows, side.sums[:, columns]]).astype(np.float64) for side in (x, y)]
        found = _ratios(tables[0], tables[1], settings, paired, 5000 + number)
        differences = {name: estimates[2] for name, estimates in zip(MEASURES, found, strict=True)}
        distance = _shannon(x, y, settings, paired, 6000 + number)
        rows.append((pack, (len(x.requests), len(y.requests)), differences, distance))
    corrected = holm(np.array([row[3].p for row in rows])).tolist()
    return [PackRow(*row, p_holm=p) for row, p in zip(rows, corrected, strict=True)]


def _by_pack(requests: Iterable[str]) -> dict[str, list[int]]:
    """Places of the probes of each pack, among request ids ``probe/<pack>/<id>``."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(requests):
        parts = name.split("/")
        if name.startswith(_PROBE) and len(parts) == 3:
            found.setdefault(parts[1], []).append(place)
    return dict(sorted(found.items()))


def _notes(whole: Sequence[Side], a: Side, b: Side, known: bool, energy: Energy) -> list[str]:
    """What a reader of the numbers has to know."""
    notes = []
    for name, before, side in (("A", whole[0], a), ("B", whole[1], b)):
        if before.left_out:
            notes.append(
                f"Side {name}: {before.left_out} requests beyond the first {len(before.requests)} drawn are left out."
            )
        if (alone := len(before.requests) - len(side.requests)) > 0.1 * len(before.requests):
            notes.append(f"Side {name}: {alone} of {len(before.requests)} requests have no partner and are left out.")
        if len(side.requests) < 30:
            notes.append(f"Side {name} has {len(side.requests)} requests: its intervals are too narrow, as a rule.")
        if len(side.models) > 1:
            notes.append(f"Side {name} mixes rows of {len(side.models)} models.")
        if len(side.layer_sets) > 1:
            notes.append(f"Side {name} mixes rows of different captured layers.")
        if () in side.layer_sets:
            notes.append(f"Side {name} has rows that do not tell their layers: they are not in the layer profiles.")
    if a.layers != b.layers:
        notes.append(
            f"A's layers are {list(a.layers)}, B's {list(b.layers)}: a record is the mean over its layers, so zone "
            "shares and distances compare these layers, not whole models."
        )
    if not a.without_sink:
        why = "was asked to stay (--with-sink)" if known else "is not told by these stores (of attnhook before 0.2)"
        notes.append(
            f"The attention sink is not taken out: it {why}. long_range and the distances may say no more than how "
            "much attention lies on position 0."
        )
    if energy.constant:
        notes.append(f"Constant in all rows, so left out of the energy distance: {', '.join(energy.constant)}.")
    return notes

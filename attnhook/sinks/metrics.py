"""Prometheus metrics of a `Tally` and of counts by label, for the ``prometheus:`` sink and the collector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from attnhook.record.tally import BOUNDS, Tally


def registry(families: Callable[[], Iterable[Metric]]) -> CollectorRegistry:
    """A registry of its own that asks ``families`` at each scrape: the process's other metrics stay out."""

    class Families(Collector):
        def collect(self) -> Iterable[Metric]:
            return families()

    own = CollectorRegistry(auto_describe=False)
    own.register(Families())
    return own


def of_tally(tally: Tally) -> Iterator[Metric]:
    """What was counted about the records themselves."""
    snapshot, by_zone, sums = tally.totals()
    counter = CounterMetricFamily("attnhook_records", "Token records seen, by kind of row.", labels=["row"])
    counter.add_metric(["prompt"], snapshot["prompt_records"])
    counter.add_metric(["generated"], snapshot["records"] - snapshot["prompt_records"])
    yield counter
    zones = CounterMetricFamily("attnhook_zone_records", "Token records by zone.", labels=["zone"])
    for name, count in by_zone.items():
        zones.add_metric([name], count)
    yield zones
    yield gauge(
        "attnhook_zone_share",
        "Share of a zone among the records of the last minute.",
        "zone",
        snapshot["recent"]["zones"],
    )
    entropy = HistogramMetricFamily("attnhook_entropy_ratio", "Entropy of the attention, over its maximum.")
    entropy.add_metric([], *_buckets(snapshot["histograms"]["entropy"]["counts"], sums["entropy"]))
    yield entropy
    mass = HistogramMetricFamily("attnhook_mass_ratio", "Attention mass by distance band.", labels=["band"])
    for band in ("local", "mid", "long"):
        mass.add_metric([band], *_buckets(snapshot["histograms"][band]["counts"], sums[band]))
    yield mass


def counter(name: str, text: str, label: str, counts: Mapping[str, float]) -> Metric:
    """A counter with one label; ``name`` is without ``_total``."""
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """A gauge with one label."""
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _buckets(counts: list[int], total: float) -> tuple[list[tuple[str, float]], float]:
    seen, buckets = 0, []
    for bound, count in zip([*map(str, BOUNDS.tolist()), "+Inf"], counts, strict=True):
        seen += count
        buckets.append((bound, float(seen)))
    return buckets, total

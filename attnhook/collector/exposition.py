"""The collector's counts as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from attnhook.collector.drift import STATES
from attnhook.sinks import metrics

if TYPE_CHECKING:
    from attnhook.collector.service import Collector


def families(collector: Collector) -> Iterator[Metric]:
    """Everything for one scrape. No metric names a request or a producer."""
    stats = collector.stats()
    records, stores = stats["records"], stats["stores"]
    yield from metrics.of_tally(collector.tally)
    for name, text, value in (
        ("received_records", "Records that came, repeated ones not counted.", records["received"]),
        ("lost_records", "Records that producers sent and that never came.", records["lost"]),
        ("repeated_records", "Records that came again.", records["repeated"]),
        ("stranger_connections", "Connections that do not speak ZeroMQ.", stats["messages"]["strangers"]),
        ("producers", "Producers that were ever heard of.", stats["producers"]["seen"]),
        ("journal_failures", "Entries that the journal's disk did not take.", stats["journal"]["failed"]),
    ):
        yield CounterMetricFamily(f"attnhook_collector_{name}", text, value)
    for name, text, counts in (
        ("closed_connections", "Connections that the collector closed.", stats["connections"]["closed"]),
        ("rejected_messages", "Messages that are no frames.", stats["messages"]["rejected"]),
        ("bad_records", "Records that are damaged.", records["bad"]),
        ("producer_dropped_records", "Records that producers say they dropped.", stats["producers"]["dropped"]),
    ):
        yield metrics.counter(f"attnhook_collector_{name}", text, "reason", counts)
    dropped = CounterMetricFamily(
        "attnhook_store_dropped_records", "Records that a store did not get.", labels=["store", "reason"]
    )
    for store, reasons in records["dropped"].items():
        for reason, count in reasons.items():
            dropped.add_metric([store, reason], count)
    yield dropped
    for name, text, key in (
        ("written_records", "Records written to a store.", "written"),
        ("write_retries", "Writes that failed and were tried again.", "retries"),
    ):
        yield metrics.counter(f"attnhook_store_{name}", text, "store", {url: s[key] for url, s in stores.items()})
    queued = {url: store["queued_bytes"] for url, store in stores.items()}
    yield metrics.gauge("attnhook_store_queued_bytes", "Bytes of records that wait for a store.", "store", queued)
    if "drift" in stats:
        yield from _of_drift(stats["drift"])
    yield GaugeMetricFamily("attnhook_collector_connections", "Open connections.", stats["connections"]["open"])
    yield GaugeMetricFamily("attnhook_collector_journal_bytes", "Size of the journal.", stats["journal"]["bytes"])
    yield GaugeMetricFamily("attnhook_collector_up_ratio", "1 while all is well.", float(not stats["problems"]))
    yield GaugeMetricFamily("attnhook_collector_uptime_seconds", "Time since the start.", stats["uptime_seconds"])


def _of_drift(drift: dict[str, Any]) -> Iterator[Metric]:
    """The drift monitor's state; the statistic is left out until the window is full."""
    states = {state: float(state == drift["state"]) for state in STATES}
    yield metrics.gauge("attnhook_drift_state", "1 for the state that the drift monitor is in.", "state", states)
    if drift["statistic"] is not None:
        text = "Squared distance of the latest requests from the baseline."
        yield GaugeMetricFamily("attnhook_drift_statistic", text, drift["statistic"])
    thresholds = {level: drift[level] for level in ("warning", "alarm")}
    yield metrics.gauge("attnhook_drift_threshold", "Statistic from which a state begins.", "state", thresholds)
    for name, text, key in (
        ("alarms", "Times that the drift monitor raised an alarm.", "alarms"),
        ("warnings", "Times that the drift monitor began to warn.", "warnings"),
        ("requests", "Finished requests that the drift monitor has seen.", "requests"),
    ):
        yield CounterMetricFamily(f"attnhook_drift_{name}", text, drift[key])
    text = "Records that the drift monitor did not look at."
    yield metrics.counter("attnhook_drift_skipped_records", text, "reason", drift["skipped"])

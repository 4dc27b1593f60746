"""Drift: is the attention of the latest requests that of a baseline?

    baseline = fit(means, model="m", settings=DriftSettings(window=50))   # [R, 20] means of R requests' fingerprints
    monitor = DriftMonitor(baseline)
    monitor.add(fingerprints, request_ids, now=time.monotonic())          # as they come
    monitor.status().state                                                # "ok", "warning" or "alarm"

The unit is a request, represented by the mean of its fingerprints: rows of one request depend on each other, requests
are taken to be independent. The statistic is the squared Mahalanobis distance of the mean over the latest ``window``
requests from the baseline's mean. ``false_alarm_rate`` is the probability that a run of ``horizon`` requests that
comes from where the baseline came from has one alarm or more, whatever the number of looks.
"""

from attnhook.analysis.drift.baseline import Baseline, DriftSettings, fit, load, save
from attnhook.analysis.drift.monitor import DriftMonitor, Status

__all__ = ["Baseline", "DriftMonitor", "DriftSettings", "Status", "fit", "load", "save"]

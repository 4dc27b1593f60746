"""How often the drift monitor raises a false alarm, and how soon it finds drifts of given sizes.

    python -m benchmarks.drift [--runs 1000]

Requests are made up: a third of them of another kind than the rest, means of 20-number fingerprints. A drift moves the
mean distance of attention: part of each histogram is moved one bin further, as much as makes the mean over requests
of one bin move by the given number of its standard deviations over requests. Everything is seeded.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from attnhook.analysis.drift import Baseline, DriftSettings, fit
from attnhook.record import fingerprint as fp

SETTINGS = DriftSettings(window=50, false_alarm_rate=0.05, horizon=200)
SMALL = DriftSettings(window=20, false_alarm_rate=0.05, horizon=50, simulations=400)  # for many baselines
_PROFILES = np.stack([np.linspace(8, 1, fp.BINS), np.linspace(1, 8, fp.BINS)])
_SOURCE = 6  # the bin that a drift takes from


def traffic(rng: np.random.Generator, requests: int, *, shift: float = 0.0) -> np.ndarray:
    """Means of the fingerprints of requests, float64 [requests, 20]; ``shift`` in standard deviations of one bin."""
    profiles = _PROFILES[(rng.random(requests) < 1 / 3).astype(int)]
    histogram = rng.standard_gamma(profiles)
    histogram /= histogram.sum(axis=1, keepdims=True)
    if shift:
        spread = 0.0304  # of that bin over requests, measured on a million of them
        moved = np.minimum(shift * spread, histogram[:, _SOURCE])
        histogram[:, _SOURCE] -= moved
        histogram[:, _SOURCE + 1] += moved
    return fp.assemble(histogram, rng.beta(4, 6, requests)).astype(np.float64)


def statistics(baseline: Baseline, means: np.ndarray) -> np.ndarray:
    """The statistic of every full window of means [..., n, 20], float64 [..., n - window + 1]."""
    window = baseline.settings.window
    summed = np.cumsum(means, axis=-2)
    sums = summed[..., window - 1 :, :].copy()
    sums[..., 1:, :] -= summed[..., :-window, :]
    return baseline.statistic(sums / window, window)


def fresh_baseline(requests: int, seed: int) -> Baseline:
    """A baseline of its own for each seed: over many of them the rate includes a baseline's error."""
    means = traffic(np.random.default_rng([1, seed]), requests)
    return fit(means, settings=replace(SMALL, seed=seed))


def false_alarms(baseline: Baseline, runs: int, *, seed: int) -> int:
    """How many of ``runs`` runs of ``horizon`` windows without drift raise an alarm."""
    settings = baseline.settings
    rng = np.random.default_rng(seed)
    length = settings.window + settings.horizon - 1
    means = traffic(rng, runs * length).reshape(runs, length, fp.SIZE)
    return int((statistics(baseline, means).max(axis=1) > baseline.alarm).sum())


def delays(baseline: Baseline, shift: float, runs: int, *, seed: int) -> np.ndarray:
    """Requests from the beginning of a drift to the alarm, float64 [runs]; infinite beyond ``horizon``."""
    settings = baseline.settings
    rng = np.random.default_rng(seed)
    before = traffic(rng, runs * settings.window).reshape(runs, settings.window, fp.SIZE)
    after = traffic(rng, runs * settings.horizon, shift=shift).reshape(runs, settings.horizon, fp.SIZE)
    over = statistics(baseline, np.concatenate([before, after], axis=1))[:, 1:] > baseline.alarm
    return np.where(over.any(axis=1), over.argmax(axis=1) + 1.0, np.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    print(f"window {SMALL.window}, horizon {SMALL.horizon}, stated rate {SMALL.false_alarm_rate:.0%}")
    for requests in (150, 500):
        found = sum(false_alarms(fresh_baseline(requests, seed), 1, seed=10_000 + seed) for seed in range(runs))
        print(f"{runs} baselines of {requests} requests, a run each: {found} raise an alarm")
    print(f"\nwindow {SETTINGS.window}, horizon {SETTINGS.horizon}, stated rate {SETTINGS.false_alarm_rate:.0%}")
    baseline = fit(traffic(np.random.default_rng(0), 5000), settings=SETTINGS)
    print(f"one baseline of 5000 requests: {false_alarms(baseline, runs, seed=3)} of {runs} runs raise an alarm")
    for shift in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        found_after = delays(baseline, shift, runs, seed=4)
        share = np.isfinite(found_after).mean()
        median = np.quantile(found_after, 0.5, method="inverted_cdf")
        print(f"drift of {shift:4.2f} spreads: found in {share:6.1%} of runs, median after {median:.0f} requests")


if __name__ == "__main__":
    main()

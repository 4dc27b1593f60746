"""Fitting the zones' thresholds to probe packs, and judging them on the probes left out: ``attnhook calibrate``."""

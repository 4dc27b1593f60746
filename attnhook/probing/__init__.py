"""Running the probe packs of `attnhook.analysis.probes` through a model: ``attnhook probe``."""

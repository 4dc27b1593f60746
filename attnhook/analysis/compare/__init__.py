"""Comparing two sets of stored records: two models, or two versions, quantisations, prompts or engines."""

from attnhook.analysis.compare.comparison import Comparison, Settings
from attnhook.analysis.compare.sides import Side, Source, read
from attnhook.analysis.compare.statistics import compare

__all__ = ["Comparison", "Settings", "Side", "Source", "compare", "read"]

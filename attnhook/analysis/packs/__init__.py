"""The texts of the probe packs: data files, and seeded generators. `attnhook.analysis.probes` is the way in.

All text was written for attnhook, or is generated from word lists written for it, under its licence.
"""

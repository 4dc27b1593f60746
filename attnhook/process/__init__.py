"""Turning attnhook on in a process: at its start, by `install`, or for a block by `capture`."""

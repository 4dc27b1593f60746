"""Asking a server from Python."""

from attnhook.client.client import Client, Exchange, Reply

__all__ = ["Client", "Exchange", "Reply"]

"""Opening the sink that a URL names."""

from __future__ import annotations

from attnhook.errors import PluginError, naming
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.system.addresses import hiding


def open_sink(url: str, *, listen_later: bool = False) -> Sink:
    """Open the sink that ``scheme:config`` names; with ``listen_later`` a `ListeningSink` waits for its first record.

    The options ``fingerprints=1``, ``hash_ids=1`` and ``tokens=1`` work with every sink: `attnhook.sinks.privacy` sees
    to them, and to it that no sink gets token ids unasked. Raises PluginError where the scheme is unknown (listing the
    known ones), the sink cannot open, or it has no use for token ids and is asked for them.
    """
    with hiding(url):
        return _open_sink(url, listen_later)


def _open_sink(url: str, listen_later: bool) -> Sink:
    from attnhook.sinks import privacy
    from attnhook.sinks.listening import ListeningSink

    scheme, colon, config = url.partition(":")
    classes = plugins.sink_classes()
    if scheme not in classes or not colon:
        known = ", ".join(f"{name}:" for name in classes)
        raise PluginError(f"unknown sink {url!r}: write scheme:config, with one of the schemes {known}")
    config, rules = privacy.take(scheme, config)
    kind = classes[scheme]
    what = f"sink {scheme}: ({kind.__module__}.{kind.__qualname__}) failed to open"
    remedy = "; change what its URL names, or mend its plugin"
    with naming(what, remedy):
        sink = privacy.PrivateSink(kind(), rules)
    if rules.tokens and not sink.inner.keeps_tokens:
        raise PluginError(f"sink {url}: tokens=1 has nothing to add: {scheme}: keeps no token ids; drop it")
    if listen_later and isinstance(sink.inner, ListeningSink):
        sink.inner.later = True
    with naming(what, remedy):
        sink.open(config)
    return sink

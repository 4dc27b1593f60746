"""`capture`: records of what runs inside a block."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attnhook.capture.key_mass import KeyMasses, KeySums
from attnhook.capture.session import Session
from attnhook.errors import OptionError, UnsupportedError
from attnhook.options import CaptureOptions
from attnhook.plugins import manager as plugins
from attnhook.process import lifecycle
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import outlet

logger = logging.getLogger("attnhook")


class Captured(list[TokenRecord]):
    """Records of a `capture()` block, in the order in which their rows were computed.

    ``dropped`` counts rows that were left out, by reason: ``nan``, ``max_tokens``, ...
    ``key_mass`` has the sums by key of each request, where they were asked for: see `KeyMass`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()
        self.key_mass = KeyMasses(None)

    @property
    def generated(self) -> list[TokenRecord]:
        """Records of generated tokens, in order."""
        return [record for record in self if not record.is_prompt]

    @property
    def prompt(self) -> list[TokenRecord]:
        """Records of prompt rows, in order."""
        return [record for record in self if record.is_prompt]


@contextmanager
def capture(
    *, model: object = None, sinks: str | Sequence[str] = (), on_error: str = "raise", **options: Any
) -> Iterator[Captured]:
    """Capture every forward pass that runs inside the block, in any thread of this process.

    Parameters
    ----------
    model
        Only forward passes of this model, or of the models that it wraps (PEFT, ``torch.compile``, DataParallel, a
        module of your own, a pipeline); default: all.
    sinks
        Sink URLs (``"jsonl:records.jsonl"``) that get the records too. Where one has ``tokens=1`` the records in the
        list have token ids as well.
    on_error
        ``"raise"`` (default): what cannot be captured exactly raises UnsupportedError out of the model
        call. ``"drop"``: the model runs on, ``records.dropped`` counts the rows by reason.
    **options
        ``top_k`` (1..256, default 32), ``layers`` (``"last"``, ``"auto"``, ``"all"`` or ints), ``heads``
        (ints, or {layer: ints}), ``mode``, ``prompt`` (bool), ``rows`` (these rows of the prompt too: (start, end)
        positions and names of spans), ``stride``, ``max_tokens``, ``spans`` ({name: (start, end)}),
        ``mask_prefix``, ``per_head`` (some of ``"spans"``, ``"fingerprint"``, ``"sink"``, ``"top"``, ``"lse"``: told of
        every query head too), ``top_k_per_head`` (1..16), ``key_mass`` (``"mean"``, ``"kv_head"``: the captured rows'
        attention summed up by key, in ``records.key_mass``); unset ones come from ``ATTNHOOK_*`` or the defaults.

    Yields
    ------
    Captured
        A list of `TokenRecord` that fills as tokens are generated.

    Raises
    ------
    OptionError, UnsupportedError, PluginError
    """

    if on_error not in ("raise", "drop"):
        raise OptionError("on_error", f"on_error={on_error!r} must be 'raise' or 'drop'")
    resolved = CaptureOptions.resolve({**options, "sinks": sinks}, plugins=plugins.variables)
    if model is not None:
        model = plugins.model_in(model)
    records = Captured()
    delivery = outlet.open_delivery(resolved)  # observers too, unless install() shows them everything

    def deliver(batch: Sequence[TokenRecord]) -> None:
        records.extend(batch)
        if delivery is not None:
            delivery.put(batch)

    strict, tokens = on_error == "raise", delivery is not None and delivery.tokens
    sums, asked = None, resolved.request
    if asked.key_mass:
        sums = KeySums(kv_heads=asked.key_mass == "kv_head", mask_prefix=asked.mask_prefix)
        records.key_mass = KeyMasses(sums)
    session = Session(asked, deliver, strict=strict, model=model, dropped=records.dropped, tokens=tokens, key_sums=sums)
    try:
        with lifecycle.hooks(resolved), session:
            yield records
        if sums is not None:
            _check(sums, records, session)
        if session.alone and not records and not records.dropped:
            # nothing but what has no records ran in the block
            name, why = next(iter(session.alone.items()))
            session.refuse(why, session.ran.get(name) or 1)
        elif session.ran and not records and not records.dropped:
            ran = ", ".join(f"{name} ({count} forward passes)" for name, count in session.ran.items())
            logger.warning(
                "capture() ended without a record, although models ran inside: %s%s", ran,
                "" if model is None else f". model= asked for passes of {_name(model)} alone",
            )  # fmt: skip
    finally:
        if delivery is not None:
            delivery.close()


def _check(sums: KeySums, records: Captured, session: Session) -> None:
    """Refuse where a backend has not told the key mass of what it captured."""
    try:
        sums.check(Counter((record.request_id, record.choice) for record in records))
    except UnsupportedError as error:
        records.key_mass = KeyMasses(None)
        session.refuse(error, 0)


def _name(model: object) -> str:
    """The class of the model that a session wants, or those of several."""
    return " or ".join(type(one).__name__ for one in (model if isinstance(model, tuple) else (model,)))

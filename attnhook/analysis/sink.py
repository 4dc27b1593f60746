"""A store's rows without the attention sink: whether they are taken so, and their fingerprints then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnhook.errors import OptionError, RecordError
from attnhook.record.arrow import fingerprints_of
from attnhook.record.block import read_rows
from attnhook.record.sink_mass import free_means
from attnhook.record.token_record import TokenRecord

if TYPE_CHECKING:
    import pyarrow as pa

#: What `told` and `free_fingerprints` read of a store.
COLUMNS = ("query_position", "fingerprint", "layer", "record", "sink_mass")


class SinkChoice:
    """Whether a store's rows are taken without the attention sink: all of them or none, as means cannot be mixed.

    They are where each row tells its attention on position 0, unless ``with_sink``. ``where`` names the store in
    messages.
    """

    def __init__(self, where: str, *, with_sink: bool = False) -> None:
        self._where, self._with_sink = where, with_sink
        self.out: bool | None = None  # None: no row has been seen

    def is_out(self, told: np.ndarray) -> bool:
        """That of further rows, ``told`` bool [N] which of them tell. Raises OptionError where only some rows do."""
        if self._with_sink or not len(told):
            return bool(self.out)
        every = bool(told.all())
        if told.any() != every or self.out not in (None, every):
            raise OptionError(
                "with_sink",
                f"{self._where}: some rows tell their attention on position 0 and others do not (those of attnhook "
                "before 0.2, and JSON lines of several layers that are not in mode 'raw'): leave it in all of them "
                "with --with-sink, or choose rows of one kind",
            )
        self.out = every
        return every


def told(batch: pa.RecordBatch) -> np.ndarray:
    """bool [N]: rows whose fingerprint can be freed of the sink, from the columns `COLUMNS` of a store."""
    known, record, layer = (
        batch.column(name).is_valid().to_numpy(zero_copy_only=False) for name in ("sink_mass", "record", "layer")
    )
    # of a mean over layers alone the sink cannot be taken out
    found: np.ndarray = known & (record | layer)
    return found


def free_fingerprints(batch: pa.RecordBatch) -> np.ndarray:
    """Means over the layers of rows that are `told`, each layer without position 0; float32 [N, 20].

    Raises RecordError where a row's record is damaged.
    """
    found = fingerprints_of(batch).copy()
    positions = batch.column("query_position").to_numpy()
    records = batch.column("record").to_pylist()
    lean = np.array([record is None for record in records], bool)
    if lean.any():
        mass = batch.column("sink_mass").to_numpy(zero_copy_only=False).astype(np.float32)[lean]
        found[lean], sound = free_means(found[lean][:, None], mass[:, None], positions[lean])
        if not sound.all():
            at = int(np.flatnonzero(lean)[sound.argmin()])
            raise RecordError(
                f"row {at} at position {positions[at]} is damaged: its sink_mass {mass[sound.argmin()]:.6g} is more "
                "than its fingerprint has there; remove it"
            )
    rows = [record for record in records if record is not None]
    block, bad = read_rows(rows)
    if bad:
        for row in rows:
            _ = TokenRecord.from_bytes(row).zone  # raises, with the record's name
    found[~lean] = block.free_fingerprints()[0]
    return found

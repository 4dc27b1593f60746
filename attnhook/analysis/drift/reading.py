"""Requests of a store, one by one, as the means of their fingerprints."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime

import numpy as np

from attnhook.analysis import sink
from attnhook.analysis.sink import SinkChoice
from attnhook.errors import OptionError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import fingerprints_of, layer_sets
from attnhook.store import open_store

ROWS = ("all", "prompt", "generated")
_MAX_OPEN = 10_000


def means(
    url: str,
    *,
    model: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    rows: str = "all",
    models: Counter[str] | None = None,
    layers: Counter[tuple[int, ...]] | None = None,
    choice: SinkChoice | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[np.ndarray]:
    """Mean of the fingerprints of each request, float64 [20], in the order of their last rows.

    A request of which no row came while 10,000 others did counts as finished. ``models`` and ``layers``, where given,
    count the rows of each model and of each set of captured layers. ``choice`` decides whether rows are taken without
    the attention sink; without one they are taken as they are. Raises RecordError where a fingerprint is not finite or
    the store is damaged, OptionError where only some rows tell the sink.
    """
    import pyarrow as pa

    if rows not in ROWS:
        raise OptionError("rows", f"rows={rows!r} must be one of {', '.join(ROWS)}")
    filters = {"model": model, "since": since, "until": until}
    waiting: OrderedDict[str, np.ndarray] = OrderedDict()  # sum of 20 and number of rows
    seen = 0
    with open_store(url) as store:
        total = store.count(**filters)  # type: ignore[arg-type]
        columns: tuple[str, ...] = ("request_id", "decode_step", "model", "fingerprint")
        if layers is not None:
            columns += ("layer", "record")
        if choice is not None:
            columns = tuple(dict.fromkeys((*columns, *sink.COLUMNS)))
        for batch in store.fingerprints(**filters, columns=columns):  # type: ignore[arg-type]
            free = choice is not None and choice.is_out(sink.told(batch))
            numbers = (sink.free_fingerprints(batch) if free else fingerprints_of(batch)).astype(np.float64)
            if not np.isfinite(numbers).all():
                row = int(np.argwhere(~np.isfinite(numbers))[0][0])
                raise RecordError(f"{url}, row {seen + row}: its fingerprint holds NaN or infinity; remove the record")
            if rows != "all":
                prompt = batch.column("decode_step").is_null().to_numpy(zero_copy_only=False)
                wanted = prompt if rows == "prompt" else ~prompt
            else:
                wanted = np.ones(len(numbers), bool)
            ids = batch.column("request_id").to_pylist()
            if models is not None:
                models.update(batch.column("model").to_pylist())
            if layers is not None:
                layers.update(layer_sets(batch.filter(pa.array(wanted))))
            for i in np.flatnonzero(wanted).tolist():
                sums = waiting.pop(ids[i], None)
                if sums is None:
                    sums = np.zeros(fp.SIZE + 1)
                sums[: fp.SIZE] += numbers[i]
                sums[fp.SIZE] += 1
                waiting[ids[i]] = sums
            while len(waiting) > _MAX_OPEN:
                yield _mean(waiting.popitem(last=False)[1])
            seen += batch.num_rows
            progress(seen, max(total, seen))
    while waiting:
        yield _mean(waiting.popitem(last=False)[1])


def _mean(sums: np.ndarray) -> np.ndarray:
    mean: np.ndarray = sums[: fp.SIZE] / sums[fp.SIZE]
    return mean

"""The attention sink, position 0: fingerprints as if it were not there, by exact arithmetic.

Language models park a third to a half of their attention on position 0, which does nothing (Xiao et al. 2023). With it
inside, zones and maps are pictures of the row's position. A row's ``sink_mass`` is that attention, so it can be taken
out of each layer's fingerprint; of a mean over layers it cannot.
"""

from __future__ import annotations

import numpy as np

from attnhook.record import fingerprint as fp

TOLERANCE = 0.01  # rounding by which a mass may exceed that of its bin
_TINY = 1e-12


def without_key(
    fingerprints: np.ndarray, mass: np.ndarray, distances: np.ndarray, visible: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One layer's fingerprints, float32 [N, 20], without one key of each row, and whether that can be.

    ``fingerprints`` [N, 20], the key's attention ``mass`` [N], its ``distances`` [N] to the row and the number of
    ``visible`` keys [N], that one included. The result is the fingerprint of the other keys' attention (whose sum is
    then below 1): with S the sum of all and m the key's mass, the entropy over the others follows from
    ``H = H(m / S) + (1 - m / S) H'``. It cannot be (bool [N]) where the mass is negative, not a number, or more than
    its bin's.
    """
    rows = np.asarray(fingerprints, np.float64)
    bins = np.searchsorted(fp.BIN_STARTS, distances, side="right") - 1
    index = np.arange(len(rows))
    histogram, entropy = rows[:, fp.HISTOGRAM].copy(), rows[:, fp.ENTROPY]
    sound = (mass >= 0) & (mass <= histogram[index, bins] + TOLERANCE)
    total = histogram.sum(axis=1)
    histogram[index, bins] = np.maximum(histogram[index, bins] - mass, 0)
    part = np.clip(mass / np.maximum(total, _TINY), 0, 1)
    rest = 1 - part
    with np.errstate(invalid="ignore"):  # what is not a number is not sound
        nats = (entropy * np.log(visible) + part * np.log(np.maximum(part, _TINY))) / np.maximum(rest, _TINY)
        nats += np.log(np.maximum(rest, _TINY))
    left = np.log(np.maximum(np.asarray(visible) - 1, 2))
    there = (np.asarray(visible) > 2) & (rest > _TINY)
    return fp.assemble(histogram, np.where(there, np.clip(nats / left, 0, 1), 0)), sound


def without_sink(
    fingerprints: np.ndarray, sink_mass: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints float32 [N, L, 20] without position 0, and whether that can be, bool [N].

    ``sink_mass`` is [N, L], ``positions`` [N] are the rows'. The row at position 0 sees nothing else and stays as it
    is, as does a layer whose window hides position 0: its sink mass is 0, as that of a visible position 0 only is where
    its probability is below the smallest float32.
    """
    # the last position plus one is none of int32
    at = np.broadcast_to(np.asarray(positions, np.int64)[:, None], sink_mass.shape)
    there = (at > 0) & (sink_mass != 0)  # NaN too, which is not sound
    freed, sound = np.array(fingerprints, np.float32), np.ones(sink_mass.shape, bool)
    sound[at == 0] = np.isfinite(sink_mass[at == 0])
    if there.any():
        freed[there], sound[there] = without_key(freed[there], sink_mass[there], at[there], at[there] + 1)
    return freed, np.asarray(sound.all(axis=1))


def free_means(fingerprints: np.ndarray, sink_mass: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the layers of `without_sink`, float32 [N, 20], and whether that can be, bool [N]."""
    freed, sound = without_sink(fingerprints, sink_mass, positions)
    mean: np.ndarray = freed.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean, sound

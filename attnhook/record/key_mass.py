"""The key mass of one sequence: what it is, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnhook.errors import RecordError
from attnhook.record.numbers import decoded, encoded, rounded


class KeyMass(dict[int, np.ndarray]):
    """The key mass of one sequence by layer: float32 [keys], or [kv heads, keys].

    Element s is the sum, over the captured rows, of the attention that a row gives position s: of the mean over the
    selected heads, or of the mean over the query heads of each kv head. NaN below ``mask_prefix``. ``rows`` is how many
    rows were added up.
    """

    def __init__(self, layers: Mapping[int, np.ndarray], rows: int) -> None:
        super().__init__(layers)
        self.rows = rows

    def to_list(self, encoding_format: str = "float") -> list[dict[str, Any]]:
        """The JSON of ``choices[i].attention_key_mass``: an object for each layer; None where a number is NaN.

        ``encoding_format`` as of `TokenRecord.to_dict`: in base64 NaN is NaN.
        """
        return [self.entry(layer, encoding_format) for layer in self]

    def entry(self, layer: int, encoding_format: str = "float") -> dict[str, Any]:
        """The JSON of one layer."""
        mass = self[layer]
        if encoding_format == "base64":
            return {"layer": layer, "rows": self.rows, "mass": encoded(mass)}
        hidden = np.isnan(mass)
        numbers = np.array(rounded(np.where(hidden, 0, mass)), object)
        numbers[hidden] = None
        return {"layer": layer, "rows": self.rows, "mass": numbers.tolist()}

    @classmethod
    def from_list(cls, entries: Sequence[Mapping[str, Any]]) -> KeyMass:
        """What `to_list` made. Raises RecordError for anything else."""
        try:
            layers = {int(entry["layer"]): np.array(decoded(entry["mass"]), np.float32) for entry in entries}
            (rows,) = {int(entry["rows"]) for entry in entries}
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"damaged attention_key_mass: {error}; pass it as it came") from error
        if rows < 0 or len(layers) != len(entries) or any(mass.ndim not in (1, 2) for mass in layers.values()):
            raise RecordError("damaged attention_key_mass: layers twice, or no list of numbers; pass it as it came")
        return cls(layers, rows)

"""Numbers of a record in JSON: how they are written, and what is checked when they are read."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Put = Callable[[np.ndarray], Any]  # writes an array

#: The JSON carries probabilities to 7 decimals: half the bytes; 5e-8 is far below the numerics contract.
DECIMALS = 7
_TYPES = {"int32": "<i4", "float32": "<f4"}
_MAX_NUMBERS = 2**26  # of one array in base64
_MAX_ENTRIES = 2**22  # positions of one record that is read from JSON


def rounded(array: np.ndarray) -> Any:
    """The numbers of an array as lists, rounded."""
    return np.round(array.astype(np.float64), DECIMALS).tolist()


def listed(array: np.ndarray) -> Any:
    """The numbers of an array as lists: whole ones as they are, others rounded."""
    return array.tolist() if array.dtype.kind == "i" else rounded(array)


def encoded(array: np.ndarray) -> dict[str, Any]:
    """The numbers of an array as base64 of little-endian int32 or float32, in full, with their type and shape."""
    dtype = "int32" if array.dtype.kind == "i" else "float32"
    data = np.ascontiguousarray(array, _TYPES[dtype]).tobytes()
    return {"dtype": dtype, "shape": [*array.shape], "base64": base64.b64encode(data).decode("ascii")}


#: How arrays are written in JSON, by the name of the format: `listed` or `encoded`.
FORMATS: dict[str, Put] = {"float": listed, "base64": encoded}


def decoded(value: Any) -> Any:
    """An array that `encoded` wrote; anything else as it is. Raises ValueError or TypeError for a damaged one."""
    if not isinstance(value, Mapping) or "base64" not in value:
        return value
    dtype, shape = _TYPES[value["dtype"]], value["shape"]
    if not isinstance(shape, list) or not all(map(is_count, shape)) or math.prod(shape) > _MAX_NUMBERS:
        raise ValueError(f"shape {str(shape)[:80]} of an array in base64")
    data = base64.b64decode(value["base64"], validate=True)
    if len(data) != 4 * math.prod(shape):
        raise ValueError(f"{len(data)} bytes of an array of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape)


def decoded_lists(value: Any) -> Any:
    """The same as lists; of positions without what stands behind the last."""
    array = decoded(value)
    if not isinstance(array, np.ndarray):
        return array
    return [own[own >= 0].tolist() for own in array] if array.ndim == 2 and array.dtype.kind == "i" else array.tolist()


def finite(numbers: np.ndarray) -> np.ndarray:
    """The same numbers. Raises ValueError where one is NaN or infinite."""
    if not np.isfinite(numbers).all():
        raise ValueError("a number that is not finite")
    return numbers


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 that int32 holds."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def positions_and_scores(
    positions: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    what: str,
    *,
    least: int = 0,
    most: int = _MAX_ENTRIES,
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of positions and of their scores, as many of each, as arrays int32 and float32 [n, k].

    k is the most positions of one, or ``least``; shorter ones end in -1 and 0. Raises ValueError or TypeError, as where
    one has more than ``most``; ``what`` they are of, in its message.
    """
    k = max(least, *map(len, positions)) if positions else least
    if len(positions) * k > _MAX_ENTRIES:  # one long list among many short ones would take all memory
        raise ValueError(f"{len(positions)} {what} of up to {k} positions; {_MAX_ENTRIES} in all are read")
    if k > most:
        raise ValueError(f"{len(positions)} {what} of up to {k} positions; up to {most} are read")
    where = np.full((len(positions), k), -1, np.int32)
    found = np.zeros((len(positions), k), np.float32)
    for i, (own, values) in enumerate(zip(positions, scores, strict=True)):
        if not all(map(is_count, own)):
            raise ValueError(f"token_positions {own}")
        where[i, : len(own)] = own
        found[i, : len(own)] = np.array(values, np.float32).reshape(len(own))
    return where, finite(found)

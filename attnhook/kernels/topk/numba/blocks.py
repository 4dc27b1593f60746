"""What compiled jobs are called with: blocks of words, and tables of rows and caches. Each is described once, here.

Python fills them by name and numba's loops read them by the same name: a word in the wrong place would be a wrong
address, and corrupt memory. A name that is not described is refused on both sides.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from numba import from_dtype, types

from attnhook.record.fingerprint import BIN_STARTS

PART = 512  # keys of a unit of work of `dots.dot_job`

_PYTHON = {"__init__.py", "again.py", "jobs.py", "kernel.py", "per_key.py"}  # files here of which nothing is compiled


class Words(ctypes.Structure):
    """int64 words: sizes, and addresses of C-contiguous arrays whose type and shape stand behind them."""

    __slots__ = ()  # a name that is none of the words is refused, not kept as an attribute

    # counters that all threads of a job share; `Job.run` clears them
    next_unit: int
    next_thread: int


W = TypeVar("W", bound=Words)


def _laid_out(kind: type[W]) -> type[W]:
    """Words in the order in which a class and its bases name them."""
    classes = [base for base in reversed(kind.__mro__) if issubclass(base, Words)]
    kind._fields_ = [(name, ctypes.c_int64) for base in classes for name in inspect.get_annotations(base)]
    return kind


@_laid_out
class DotWords(Words):
    """Of `dots.dot_job`."""

    __slots__ = ()

    rows: int
    heads: int
    kv_heads: int
    dim: int
    layers: int
    parts: int  # units of work a row, of the longest
    table: int  # ROW [rows]
    queries: int  # float32 [rows, heads, dim]
    pools: int  # POOL [layers]
    scales: int  # float32 [layers, kv_heads]
    logits: int  # float32 [logit_count]
    logit_count: int


@_laid_out
class RowWords(Words):
    """Of `loops.row_job`."""

    __slots__ = ()

    rows: int
    heads: int
    requests: int
    layers: int
    table: int  # ROW [rows]
    logits: int  # float32 [logit_count]; overwritten
    logit_count: int
    # the softmax of each layer
    sinks: int  # float32 [layers, sink_heads]
    sink_heads: int  # 0 where no layer has any
    slopes: int  # float32 [layers, slope_heads]
    slope_heads: int  # 0 where no layer has any
    softcaps: int  # float32 [layers]
    # what is wanted of each request
    top_k: int
    masks: int  # uint8 [requests, heads]
    report_from: int  # int64 [requests]
    spans: int  # int64 [requests, span_count, 2]
    span_count: int
    # what is found
    results: int
    positions: int  # int32 [results, top_k]
    scores: int  # float32 [results, top_k]
    histogram: int  # float32 [results, BINS]
    entropy: int  # float32 [results]
    span_mass: int  # float32 [results, span_count]
    # of each head: 0 or as many as there are
    head_tops: int
    head_top_k: int
    head_positions: int  # int32 [results, head_tops, head_top_k]
    head_scores: int  # float32 [results, head_tops, head_top_k]
    head_prints: int
    head_histogram: int  # float32 [results, head_prints, BINS]
    head_entropy: int  # float32 [results, head_prints]
    head_masses: int
    head_span_mass: int  # float32 [results, head_masses, span_count]
    head_norms: int
    head_lse: int  # float32 [results, head_norms]
    # of each key: sums to which a row's attention is added, by its place in ROW
    key_groups: int  # 1: the mean over the selected heads; else the kv heads
    group_heads: int  # query heads of each; 0 where the mean is wanted
    dense: int  # float32 [results, dense_width]
    dense_width: int  # 0: what is above is wanted; else the attention itself, and nothing else
    # what a thread works in
    scratch: int  # scratch_bytes for each thread
    scratch_bytes: int
    scratch_keys: int
    lanes: int


@_laid_out
class AimWords(Words):
    """Of `aim.aim_job`: what a call brings, and from ``size`` on what it finds."""

    __slots__ = ()

    rows: int
    layers: int
    heads: int
    requests: int
    columns: int
    positions: int  # int64 [rows], with ``window``; or 0
    window: int
    seen: int  # int64 [rows]: keys that each row sees, with ``first_seen``; or 0
    first_seen: int  # int64 [rows]
    pages_from: int  # int32, ``page_stride`` from one request to the next; 0 leaves the pages as they are
    page_stride: int
    table: int  # ROW [layers, rows]
    pages: int  # int64 [requests, columns]
    found: int  # float32 [found_count]: the results of all rows, positions first
    found_count: int
    position_count: int
    size: int  # logits of one layer
    parts: int  # units of work of the longest row
    longest: int  # keys of the longest row


def dtype_of(words: type[Words]) -> np.dtype[Any]:
    """A class of words as numpy and numba see it."""
    return np.dtype(words)


_PLACES = dict(dtype_of(RowWords).fields or {})
#: Where the counters are in every class of words, in bytes: `intrinsics.fetch_add` wants their address.
NEXT_UNIT, NEXT_THREAD = (_PLACES[name][1] for name in ("next_unit", "next_thread"))

#: A row whose logits are computed, or to be.
ROW = np.dtype(
    [
        ("offset", np.int64),  # of the first head's first logit
        ("stride", np.int64),  # logits from one head to the next
        ("keys", np.int64),  # that it sees
        ("first", np.int64),  # position of the first of them
        ("request", np.int64),
        ("layer", np.int64),
        ("result", np.int64),  # where its results go
        ("key_mass", np.int64),  # address of float32 [key_groups, key_stride]; 0: its keys' sums are not wanted
        ("key_stride", np.int64),
        ("key_first", np.int64),  # place there of the first key that it sees
    ]
)

#: The key cache of a layer; strides in elements.
POOL = np.dtype(
    [
        ("cache", np.int64),
        ("element_size", np.int64),
        ("page_stride", np.int64),
        ("slot_stride", np.int64),
        ("head_stride", np.int64),
        ("dim_stride", np.int64),
        ("page_size", np.int64),
        ("pages", np.int64),  # int64 [requests, columns]
        ("columns", np.int64),
    ]
)


def argument_of(words: type[Words], *tables: np.dtype[Any]) -> Any:
    """numba's type of a job's one argument, whose ``words`` are at its address.

    numba keeps what it compiled by this type and by the date of the one file that the job is in. So the type has more
    in it, which nobody reads: the tables, and what all files here say. Compiled code that takes the memory for
    something else, or that calls what has changed since, is then never found.
    """
    unread = [(f"table_{n}", table) for n, table in enumerate(tables)]
    return from_dtype(np.dtype([("words", dtype_of(words)), *unread, (f"sources_{_sources()}", np.int64)]))


def signature(words: type[Words], *tables: np.dtype[Any]) -> Any:
    """The signature of a job: a C function of one address."""
    return types.void(types.CPointer(argument_of(words, *tables)))


@cache
def _sources() -> str:
    """A digest of all that is compiled here."""
    digest = hashlib.sha256(repr(BIN_STARTS).encode())
    for file in sorted(files(__package__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py") and file.name not in _PYTHON:
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

"""Zones as if the key at position 0 were not there: those of the other keys."""

from __future__ import annotations

import numpy as np
import pytest

from attnhook.record.answer import SINK
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import without_sink
from attnhook.record.zones import classify
from tests.record.samples import a_record
from tests.record.test_zones import fingerprint


def captured(position: int, *layers: np.ndarray) -> TokenRecord:
    """The record of a row from each layer's attention on the keys 0 to ``position``, with the sink's span."""
    return a_record(
        query_position=position,
        layers=tuple(range(len(layers))),
        token_positions=np.zeros((len(layers), 0), np.int32),
        attention_scores=np.zeros((len(layers), 0), np.float32),
        fingerprints=np.stack([fingerprint(keys[::-1]) for keys in layers]),
        span_names=("document", SINK),
        span_mass=np.array([[0.5, keys[0]] for keys in layers], np.float32),
    )


def attention(position: int, sink: float, around: int) -> np.ndarray:
    """Attention on the keys 0 to ``position``: ``sink`` on the first, the rest on the eight keys up to ``around``."""
    keys = np.zeros(position + 1)
    keys[around - 7 : around + 1] = (1 - sink) / 8
    keys[0] = sink
    return keys


def test_the_zone_is_that_of_the_other_keys():
    near = captured(400, attention(400, 0.9, 400), attention(400, 0.8, 400))
    far = captured(400, attention(400, 0.9, 300), attention(400, 0.0, 300))
    assert [near.zone, far.zone] == ["long_range", "semantic_bridge"]
    zones = without_sink([near, far], SINK)
    assert [zone.name for zone in zones] == ["syntax_floor", "semantic_bridge"]
    for zone, around, sinks in zip(zones, (400, 300), ((0.9, 0.8), (0.9, 0.0)), strict=True):
        others = []
        for sink in sinks:
            keys = attention(400, sink, around)[1:]  # what is left keeps its mass
            others.append(fingerprint((keys if sink else attention(400, sink, around))[::-1]))
        assert zone.confidence == pytest.approx(classify(np.mean(others, axis=0)).confidence, abs=1e-5)


def test_a_row_that_sees_only_position_0_keeps_it():
    first = captured(0, np.ones(1))
    (zone,) = without_sink([first], SINK)
    assert zone == classify(first.fingerprint)


def test_a_record_without_the_span_is_named():
    assert without_sink([], SINK) == []
    with pytest.raises(KeyError, match=r"cmpl-1.*has no span 'sink'.*spans=\{'sink': \(0, 1\)\}"):
        without_sink([a_record()], SINK)

"""Session metrics: closed forms, hypothesis, a real model, and the command on real stores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnhook
from attnhook.analysis import session
from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import without_sink
from attnhook.sinks.opening import open_sink
from tests.probing.test_probe import attnhook as command
from tests.probing.test_probe import refused


def record(position, layers, *, request_id="r", k=None, **more):
    """A record from one {position: score} per layer."""
    k = k or max(map(len, layers))
    positions, scores = np.full((len(layers), k), -1, np.int32), np.zeros((len(layers), k), np.float32)
    for i, layer in enumerate(layers):
        best = sorted(layer.items(), key=lambda item: -item[1])
        positions[i, : len(best)] = [p for p, _ in best]
        scores[i, : len(best)] = [s for _, s in best]
    prints = np.zeros((len(layers), fp.SIZE), np.float32)
    prints[:, [fp.LOCAL, fp.HISTOGRAM.start]] = 1  # all at distance 0; positions and scores are what is tested
    return TokenRecord(request_id, position, tuple(range(len(layers))), positions, scores, prints, **more)


def test_gini_closed_forms():
    assert session.gini(np.ones(7)) == pytest.approx(0, abs=1e-12)
    for n in (1, 2, 10, 1000):
        assert session.gini(np.eye(n)[0]) == pytest.approx((n - 1) / n)
    assert session.gini(np.array([1, 3])) == pytest.approx(0.25)  # |1 - 3| * 2 / (2 * 4 * 2)


@given(st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=40).filter(lambda x: sum(x) > 1e-6))
def test_gini_is_half_the_relative_mean_difference(amounts):
    x = np.array(amounts)
    expected = np.abs(x[:, None] - x).sum() / (2 * x.size * x.sum())
    assert session.gini(x) == pytest.approx(expected, abs=1e-9)
    assert session.gini(7 * x[::-1]) == pytest.approx(session.gini(x), abs=1e-9)


@pytest.mark.parametrize("bad", [[], [0, 0], [1, -1], [np.nan, 1], [np.inf, 1]])
def test_gini_refuses_what_has_none(bad):
    with pytest.raises(ValueError, match="non-negative amounts"):
        session.gini(np.array(bad, float))


def test_consensus_closed_forms():
    one = {3: 0.5, 7: 0.25}
    assert session.consensus(record(9, [one, one, one])) == pytest.approx(1)
    assert session.consensus(record(9, [one, {1: 0.5, 2: 0.25}])) == 0
    assert session.consensus(record(9, [one])) is None
    # pairs: 1, 0 and 0
    assert session.consensus(record(9, [one, one, {1: 0.5}])) == pytest.approx(1 / 3)
    assert session.consensus(record(9, [{3: 0.5}, {3: 0.25, 4: 0.25}])) == pytest.approx(0.25 / 0.75)


def test_consensus_without_the_sink():
    rows = record(9, [{0: 0.8, 3: 0.1}, {0: 0.8, 5: 0.1}])
    assert session.consensus(rows) == pytest.approx(0.8)
    assert session.consensus(rows, without_sink=True) == 0
    assert session.consensus(record(9, [{0: 0.8}, {0: 0.8}]), without_sink=True) is None


def test_hubness_of_one_hub_and_of_even_attention():
    hub = session.measure([record(p, [{2: 0.9}]) for p in range(4, 10)])
    assert (hub.visible, hub.hubs) == (10, ((2, 1.0),))
    assert hub.hubness == pytest.approx(9 / 10)
    assert hub.hubness_without_sink == pytest.approx(8 / 9)
    even = session.measure([record(p, [{p: 0.5}]) for p in range(10)])
    assert even.hubness == pytest.approx(0, abs=1e-7)
    assert even.consensus is None
    assert session.measure([record(p, [{0: 0.5}]) for p in range(5)]).hubness_without_sink is None


def test_rows_are_put_in_order_and_attention_is_the_mean_over_layers():
    rows = [record(p, [{0: 0.5, 1: 0.25}, {1: 0.75}]) for p in (5, 3, 4)]
    assert session.attended(rows)[:3] == pytest.approx([0.75, 1.5, 0])
    found = session.measure(rows)
    assert [moment.query_position for moment in found.moments] == [3, 4, 5]
    assert found.coverage == pytest.approx(0.75)
    assert sum(found.zone_shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no records"),
        ([record(3, [{0: 1}]), record(4, [{0: 1}], request_id="s")], "of one request"),
        ([record(3, [{0: 1}]), record(4, [{0: 1}], choice=1)], "of one request and choice"),
        ([record(3, [{0: 1}]), record(3, [{0: 1}])], "there twice"),
        ([record(3, [{0: 1}]), record(4, [{0: 1}, {0: 1}])], "same layers in every row"),
        ([record(3, [{0: 1}], mode="fingerprint")], "fingerprints only, without the attended positions"),
        ([record(3, [{}], k=2)], "every one is masked"),
    ],
)
def test_what_cannot_be_measured_is_refused(rows, message):
    with pytest.raises(RecordError, match=message):
        session.measure(rows)


@pytest.fixture(scope="module")
def real(smol, tokenizer):
    """Records of a real answer, prompt rows too."""
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt").input_ids
    with (
        torch.no_grad(),
        attnhook.capture(model=smol, layers="auto", top_k=64, prompt=True, spans={session.SINK: (0, 1)}) as records,
    ):
        smol.generate(ids, max_new_tokens=6, do_sample=False)
    return list(records)


@pytest.mark.model
def test_a_real_answer(real):
    found = session.measure(real)
    assert found.sink_left_out
    assert found.coverage == pytest.approx(1, abs=1e-5)  # k is larger than the context: nothing is outside
    assert found.hubs[0][0] == 0  # the attention sink
    assert found.hubness > found.hubness_without_sink > 0
    assert 0 < found.consensus_without_sink < found.consensus < 1
    assert [m.zone for m in found.moments] == [z.name for z in without_sink(real, session.SINK)]
    assert [m.entropy for m in found.moments] == [pytest.approx(float(r.fingerprint[3])) for r in real]
    dense = np.zeros((len(real), len(found.layers), found.visible))
    for i, row in enumerate(real):
        for layer in range(len(found.layers)):
            for position, score in row.top(found.layers[layer]):
                dense[i, layer, position] = score
    np.testing.assert_allclose(session.attended(real), dense.mean(axis=1).sum(axis=0), rtol=1e-6)


@pytest.mark.model
def test_the_command(real, tmp_path):
    store = f"sqlite:{tmp_path / 'r.db'}"
    sink = open_sink(store)
    sink.write(real)
    sink.close()
    request_id = real[0].request_id
    code, out, err = command("session", store, request_id, "--prompt")
    assert code == 0, err
    assert "hubness" in out and "consensus" in out and "■" in out
    code, out, err = command("session", store, request_id, "--json", "--prompt")
    assert code == 0, err
    assert json.loads(out) == json.loads(json.dumps(session.measure(real).to_dict()))
    code, out, err = command("session", store, request_id, "--json")
    assert len(json.loads(out)["moments"]) == 6
    refused(command("session", store, "nobody"), "no records of request 'nobody'")
    refused(command("session", store, request_id, "--choice", "3"), "no choice 3; it has [0]")


@pytest.mark.model
def test_a_store_of_fingerprints_says_what_is_missing(real, tmp_path):
    store = f"sqlite:{tmp_path / 'f.db'}"
    sink = open_sink(f"{store}?fingerprints=1")
    sink.write(real)
    sink.close()
    refused(
        command("session", store, real[0].request_id, "--prompt"),
        "fingerprints only, without the attended positions that hubness and consensus need",
        "fingerprints=1",
    )

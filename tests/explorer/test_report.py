"""The HTML report as a file: what is in it, what is not, and how it gets there."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnhook.errors import AttnhookError, OptionError
from attnhook.explorer import report as report_module
from attnhook.explorer.report import render, write
from attnhook.record import fingerprint as fp
from tests.explorer.samples import ANSWER, LAYERS, LEGEND, PROMPT, K, hostile_report, make_records, make_report


class Page(HTMLParser):
    """Every element of a page with its attributes, and the text of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._open: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = (tag, dict(attrs))
        self.elements.append(self._open)

    def handle_endtag(self, tag: str) -> None:
        self._open = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attrs = self._open
        if tag in self.inline:
            if "id" in attrs:
                self.blocks[str(attrs["id"])] = data
            else:
                self.inline[tag].append(data)

    @property
    def meta(self) -> Any:
        return json.loads(self.blocks["meta"])

    @property
    def policy(self) -> str:
        found = [a["content"] for _, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(found) == 1
        return str(found[0])

    def array(self, name: str, dtype: str, *shape: int) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.blocks[name]), dtype).reshape(shape)

    def values(self, name: str, *shape: int) -> np.ndarray:
        return (self.array(name, "<u2", *shape) / 65535.0) ** 2


def test_page_loads_nothing_and_forbids_the_network() -> None:
    page = Page(render(make_report()))
    loading = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "xlink:href"}
    assert [(tag, attrs) for tag, attrs in page.elements if loading & attrs.keys()] == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.elements}
    assert not re.search(r"url\(|@import", page.inline["style"][0])
    forbidden = r"https?:|fetch\(|XMLHttpRequest|WebSocket|import\(|innerHTML|eval\("
    assert not re.search(forbidden, page.inline["script"][0])
    assert page.policy.startswith("default-src 'none';")
    assert "unsafe" not in page.policy


def test_policy_allows_exactly_the_inlined_script_and_style() -> None:
    page = Page(render(make_report()))
    for tag in ("script", "style"):
        (inline,) = page.inline[tag]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy


def test_hostile_text_adds_no_element_and_survives() -> None:
    plain, hostile = Page(render(make_report())), Page(render(hostile_report()))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.meta["tokens"] == hostile_report().tokens
    assert hostile.meta["legend"][0]["name"] == "near</script><b>"


@pytest.mark.parametrize("prompt_rows", [True, False])
def test_data_round_trip(prompt_rows: bool) -> None:
    records = make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=prompt_rows)
    report = make_report(records[::-1])  # in any order
    page = Page(render(report))
    meta = page.meta
    assert meta["tokens"] == report.tokens
    assert meta["rows"] == [r.query_position for r in records]
    assert meta["steps"] == [r.decode_step for r in records]
    assert meta["layers"] == list(LAYERS)
    assert [meta["legend"][zone]["name"] for zone in meta["zones"]] == report.zones[::-1]
    assert meta["confidence"] == pytest.approx(report.zone_confidence[::-1])
    assert [b["label"] for b in meta["bins"]] == [fp.bin_label(i) for i in range(fp.BINS)]
    assert meta["positionBytes"] == 2
    for i in range(len(LAYERS)):
        positions = page.array(f"positions-{i}", "<u2", len(records), K).astype(np.int32)
        scores = page.values(f"scores-{i}", len(records), K)
        numbers = page.values(f"fingerprints-{i}", len(records), fp.SIZE)
        for row, record in enumerate(records):
            expected = record.token_positions[i]
            np.testing.assert_array_equal(positions[row], np.where(expected < 0, 0xFFFF, expected))
            np.testing.assert_allclose(scores[row], record.attention_scores[i], atol=1.6e-5)
            np.testing.assert_allclose(numbers[row], record.fingerprints[i], atol=1.6e-5)


def test_bins_know_their_mass() -> None:
    groups: dict[str, float] = defaultdict(float)
    record = make_records(600, 1, (0,), 4, prompt_rows=True)[-1]
    bins = Page(render(make_report())).meta["bins"]
    for mass, described in zip(record.fingerprint[fp.HISTOGRAM], bins, strict=True):
        groups[described["mass"]] += float(mass)
    local, mid, long = record.fingerprint[:3]
    assert groups == pytest.approx({"local": local, "mid": mid, "long": long}, abs=1e-6)


def test_small_scores_keep_their_relative_precision() -> None:
    values = np.geomspace(1e-4, 1, 500).astype(np.float32)
    stored = report_module._quantise(values).astype(np.float64)
    np.testing.assert_allclose((stored / 65535) ** 2, values, rtol=1.6e-3, atol=0)
    np.testing.assert_allclose((stored / 65535) ** 2, values, rtol=0, atol=1.6e-5)


def test_wide_positions_take_four_bytes() -> None:
    (record,) = make_records(3, 2, (0,), 2, prompt_rows=False)
    far = dataclasses.replace(record, query_position=70_000, token_positions=np.array([[69_999, -1]], np.int32))
    page = Page(render(make_report([far], tokens=["x"] * 70_001)))
    assert page.meta["positionBytes"] == 4
    assert page.array("positions-0", "<u4", 2).tolist() == [69_999, 0xFFFFFFFF]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("zones", {"zones": ["near"]}),
        ("zone_confidence", {"zone_confidence": []}),
        ("zone_confidence", {"zone_confidence": [float("nan")] * (PROMPT + ANSWER - 1)}),
        ("zone_legend", {"zone_legend": {"near": LEGEND["near"]}}),
        ("prompt_length", {"prompt_length": 99}),
        ("records", {"tokens": ["x"] * (PROMPT + 3)}),
    ],
)
def test_parts_that_do_not_fit_are_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as error:
        render(make_report(**changes))
    assert error.value.field == field


def test_records_of_two_requests_are_refused() -> None:
    records = make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=False)
    with pytest.raises(OptionError, match="two records have query position"):
        render(make_report([*records, records[0]]))
    with pytest.raises(OptionError, match=r"has layers \[3, 7\]"):
        short = make_records(PROMPT + ANSWER, PROMPT, LAYERS[:2], K, prompt_rows=True)[0]
        render(make_report([*records, short]))


def test_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    write(make_report(), target)
    assert target.read_text(encoding="utf-8") == render(make_report())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AttnhookError, match=r"report\.html'?: No space left on device\. Name a file"):
        write(make_report(title="Renamed"), target)
    assert "Renamed" not in target.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(AttnhookError, match="No such file or directory"):
        write(make_report(), tmp_path / "missing" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(AttnhookError, match="directory"):
        write(make_report(), tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(AttnhookError, match="empty name"):
        write(make_report(), "")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_write_into_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(AttnhookError, match="Permission denied"):
        write(make_report(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_large_report_stays_small(large: Path) -> None:
    entries = 3999 * 30 * (32 * 4 + fp.SIZE * 2)
    assert large.stat().st_size < entries * 4 / 3 + 500_000

"""The HTML report in a real browser, with real mouse, touch and keyboard events."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnhook.explorer.report import Report, write
from attnhook.record import fingerprint as fp
from tests.explorer.samples import ANSWER, HOSTILE, LAYERS, LEGEND, PROMPT, K, hostile_report, make_records, make_report

Show = Callable[..., Any]


@pytest.fixture
def show(browser: Callable[..., Any], tmp_path: Path) -> Iterator[Show]:
    """Write a report, open it, give the browser; afterwards the page must have had nothing to complain about."""
    opened = []

    def shown(report: Report | Path, fragment: str = "", **screen: Any) -> Any:
        path = report if isinstance(report, Path) else tmp_path / "report.html"
        if isinstance(report, Report):
            write(report, path)
        if opened:  # opening a page forgets what the last one said
            assert opened[-1].complaints() == []
        opened.append(browser(path, fragment, **screen))
        return opened[-1]

    yield shown
    for page in opened:
        assert page.complaints() == []


def lit(page: Any) -> dict[int, float]:
    """The highlighted tokens and their strength."""
    found = page.eval("[...document.querySelectorAll('.lit')].map(e => [e.index, +e.style.getPropertyValue('--a')])")
    return {token: strength for token, strength in found}


def listed(page: Any) -> list[list[str]]:
    """The visible lines of the panel's list: text, position, distance, score."""
    lines: list[list[str]] = page.eval(
        "[...document.querySelectorAll('#items li:not([hidden]) button')]"
        ".map(b => [...b.children].map(c => c.textContent))"
    )
    return lines


def text(page: Any, selector: str) -> str:
    return str(page.eval(f"document.querySelector({selector!r}).textContent"))


def choose_layer(page: Any, value: str) -> None:
    page.eval(f"document.getElementById('layer').value = {value!r}")
    page.eval("document.getElementById('layer').dispatchEvent(new Event('change'))")
    page.settle()


def expected_lines(pairs: list[tuple[int, float]], row: int) -> list[list[str]]:
    return [
        [f" w{s}", str(s), str(row - s), f"{a:.4f}" if a >= 0.00095 else f"{a:.1e}".replace("e-0", "e-")]
        for s, a in pairs
    ]


def stored(value: float) -> float:
    """A score as the page holds it."""
    return float((np.rint(np.sqrt(value) * 65535) / 65535) ** 2)


def test_hover_shows_where_the_row_before_looked(show: Show) -> None:
    report = make_report()
    page = show(report)
    for token in (PROMPT + 5, 4, PROMPT + ANSWER - 1):
        page.hover(f"#t{token}")
        record = report.records[token - 1]
        assert record.query_position == token - 1
        pairs = [(s, stored(a)) for s, a in record.top()]
        assert listed(page) == expected_lines(pairs, token - 1)
        strengths = {s: (a / pairs[0][1]) ** 0.5 for s, a in pairs}
        assert lit(page) == pytest.approx({s: v for s, v in strengths.items() if v >= 0.03}, abs=0.006)
        assert text(page, "#where").startswith(f"position {token} · ")
        assert text(page, "#zone b") == report.zones[token - 1]
        assert float(text(page, "#zone span")) == pytest.approx(report.zone_confidence[token - 1], abs=0.006)
        assert float(text(page, "#mass")) == pytest.approx(record.topk_mass[-1], abs=2e-4)
        assert float(text(page, "#entropy")) == pytest.approx(record.fingerprints[-1][fp.ENTROPY], abs=1e-3)
        for name, index in (("local", fp.LOCAL), ("mid", fp.MID), ("long", fp.LONG)):
            assert float(text(page, f".mass.{name} b")) == pytest.approx(record.fingerprints[-1][index], abs=1e-3)
        labels = page.eval("[...document.querySelectorAll('#histogram .label')].map(e => e.textContent)")
        assert labels == [fp.bin_label(i) for i in range(fp.BINS)]
    assert page.eval("document.querySelectorAll('.pinned').length") == 0


def test_first_token_and_uncaptured_rows_say_so(show: Show) -> None:
    page = show(make_report(make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=False)))
    assert text(page, "#where") == f"position {PROMPT} · answer token 0"  # shown without being asked
    page.hover("#t3")
    assert text(page, "#missing").startswith("Not captured: no record of the row at position 2, which precedes")
    assert lit(page) == {}
    page.hover("#t0")
    assert "no row precedes the first token" in text(page, "#missing")
    page.click("#mode-by")
    page.hover("#t0")
    assert len(listed(page)) == ANSWER


def test_layer_choice_and_mean(show: Show) -> None:
    report = make_report()
    page = show(report)
    token = PROMPT + 8
    record = report.records[token - 1]
    page.click(f"#t{token}")
    page.eval("document.getElementById('layer-slider').focus()")
    for layer in (7, 3):
        page.key("ArrowLeft")
        assert page.eval("document.getElementById('layer').selectedOptions[0].text") == f"layer {layer}"
        assert listed(page) == expected_lines([(s, stored(a)) for s, a in record.top(layer)], token - 1)
    choose_layer(page, "-1")
    sums: dict[int, float] = defaultdict(float)
    for layer in LAYERS:
        for s, a in record.top(layer):
            sums[s] += stored(a) / len(LAYERS)
    best = sorted(sums.items(), key=lambda pair: -pair[1])
    lines = listed(page)
    assert [line[1] for line in lines] == [str(s) for s, _ in best]
    assert [float(line[3]) for line in lines] == pytest.approx([a for _, a in best], abs=1e-4)
    assert float(text(page, "#entropy")) == pytest.approx(record.fingerprint[fp.ENTROPY], abs=1e-3)
    assert text(page, "#mass-name") == "reported mass"


def test_hiding_the_sink_rescales_the_highlight_and_no_number(show: Show) -> None:
    page = show(make_report())
    page.click(f"#t{PROMPT + 6}")
    before, mass = listed(page), text(page, "#mass")
    assert before[0][1] == "0"
    assert lit(page)[0] == 1
    page.click("#hide-sink")
    assert listed(page) == before[1:]
    assert text(page, "#mass") == mass
    strengths = lit(page)
    assert 0 not in strengths
    assert strengths[int(before[1][1])] == 1
    assert text(page, "#note") == f"sink hidden: “ w0” at 0, {before[0][3]}"


def test_attended_by_is_the_reverse(show: Show) -> None:
    report = make_report()
    page = show(report)
    page.click("#mode-by")
    for token in (0, 5, PROMPT + 2):
        page.hover(f"#t{token}")
        looked = [
            (r.query_position + 1, stored(a), r.query_position - token)
            for r in report.records
            for s, a in r.top()
            if s == token
        ]
        looked.sort(key=lambda entry: -entry[1])
        assert [(int(line[1]), int(line[2])) for line in listed(page)] == [(t, d) for t, _, d in looked]
        assert [float(line[3]) for line in listed(page)] == pytest.approx([a for _, a, _ in looked], abs=1e-4)
        assert set(lit(page)) <= {t for t, _, _ in looked}
        assert text(page, "#list-name") == f"Attended by {len(looked)}"


def test_pin_with_mouse_and_keys(show: Show) -> None:
    page = show(make_report())
    page.click(f"#t{PROMPT + 3}")
    page.hover(f"#t{PROMPT + 9}")  # a pin holds; the other token is only ringed and its score told
    assert page.eval("document.querySelector('.pinned.at').index") == PROMPT + 3
    assert f"“ w{PROMPT + 9}” at {PROMPT + 9}: not reported" in text(page, "#probe")
    page.hover("#items li:nth-child(2) button")
    assert page.eval("document.querySelector('.t.ring').index") == int(listed(page)[1][1])
    page.key("ArrowRight")
    page.key("ArrowRight")
    page.key("ArrowLeft")
    assert text(page, "#where") == f"position {PROMPT + 4} · answer token 4"
    assert text(page, "#status").startswith(f"“ w{PROMPT + 4}”, position {PROMPT + 4}, ")
    assert page.eval("document.getElementById('text').getAttribute('aria-activedescendant')") == f"t{PROMPT + 4}"
    page.key("Escape")
    assert page.eval("document.querySelectorAll('.pinned').length") == 0
    page.click(f"#t{PROMPT + 3}")
    page.click(f"#t{PROMPT + 3}")  # the second one unpins
    assert page.eval("document.querySelectorAll('.pinned').length") == 0
    page.key("b")
    assert page.eval("document.body.dataset.direction") == "by"
    page.key("b")
    page.click("#items li:nth-child(1) button")
    assert text(page, "#where").startswith("position 0 ")


def test_arrows_move_between_lines_and_from_the_keyboard_alone(show: Show) -> None:
    tokens = [f" w{i}\n" if i % 5 == 4 else f" w{i}" for i in range(PROMPT + ANSWER)]
    page = show(make_report(tokens=tokens))
    page.eval("document.getElementById('text').focus()")
    page.key("ArrowRight")  # the first one pins what is shown
    assert text(page, "#where").startswith(f"position {PROMPT} ")
    page.key("ArrowDown")
    assert text(page, "#where").startswith("position 15 ")
    page.key("ArrowDown")
    assert text(page, "#where").startswith("position 20 ")
    page.key("ArrowUp")
    assert text(page, "#where").startswith("position 15 ")


def test_phone(show: Show) -> None:
    page = show(make_report(), size=(390, 844), phone=True)
    assert page.eval("document.documentElement.scrollWidth") <= 390
    page.tap(f"#t{PROMPT + 3}")
    assert page.eval("document.querySelector('.pinned').index") == PROMPT + 3
    assert len(lit(page)) > 1
    # the panel is below the text and covers none of the token
    assert page.eval(
        "document.querySelector('.pinned').getBoundingClientRect().bottom"
        " <= document.querySelector('aside').getBoundingClientRect().top"
    )
    page.tap(f"#t{PROMPT + 3}")
    assert page.eval("document.querySelectorAll('.pinned').length") == 0


def test_overview_selects_a_row(show: Show) -> None:
    page = show(make_report())
    left, top, width, height = page.eval(
        "(() => { const r = document.querySelector('canvas').getBoundingClientRect();"
        " return [r.left, r.top, r.width, r.height]; })()"
    )
    rows = PROMPT + ANSWER - 1
    page.click("canvas", at=(left + width / 2, top + height * (17.5 / rows)))
    assert text(page, "#where").startswith("position 18 ")
    # the sink's column is darker than an empty place above the diagonal
    picture = page.eval(
        "(() => { const c = document.querySelector('canvas');"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    green = np.reshape(picture, (rows, rows + 1, 4))[:, :, 1]
    assert (green[:, 0] < green[0, -1]).all()


def test_zones(show: Show) -> None:
    report = make_report()
    page = show(report)
    answer = report.zones[PROMPT - 1 :]
    shares = {name: f"{answer.count(name) / len(answer):.0%}" for name in LEGEND}
    found = page.eval("[...document.querySelectorAll('#legend button')].map(b => b.textContent)")
    assert found == [name + share for name, share in shares.items()]
    page.click("#legend button")
    dimmed = page.eval("[...document.querySelectorAll('.dim')].map(e => e.index)")
    assert dimmed == [0] + [i + 1 for i, zone in enumerate(report.zones) if zone != "near"]
    page.click("#legend button")
    assert page.eval("document.querySelectorAll('.dim').length") == 0


def test_the_address_restores_the_view(show: Show) -> None:
    page = show(make_report(), "#token=14&layer=mean&direction=by&sink=hidden")
    assert text(page, "#where").startswith("position 14 ")
    assert page.eval("[document.body.dataset.direction, document.getElementById('layer').value]") == ["by", "-1"]
    page.click("#mode-to")
    page.key("ArrowRight")
    assert page.eval("location.hash") == "#token=15&layer=mean&sink=hidden"


def test_hostile_text_in_the_browser(show: Show) -> None:
    page = show(hostile_report())
    for token in range(len(HOSTILE)):
        page.hover(f"#t{token}")
    page.click("#t9")
    assert page.eval("[typeof window.hacked, document.images.length, document.scripts.length]") == [
        "undefined",
        0,
        2 + 3 * len(LAYERS),
    ]
    shown = page.eval("[...document.querySelectorAll('.t')].slice(0, 8).map(e => e.textContent)")
    assert shown[0] == HOSTILE[0]
    assert shown[4:] == ["\ufffd", "👩‍🔬", "∅", "␀␛"]


def test_whitespace_is_visible(show: Show) -> None:
    tokens = ["a", " ", "\n", "\n\n", "  ", "\t", " b", "c\n"] + ["x"] * (PROMPT + ANSWER - 8)
    page = show(make_report(tokens=tokens))
    shown = page.eval("[...document.querySelectorAll('.t')].slice(0, 8).map(e => e.textContent)")
    assert shown == ["a", "·", "↵\n", "↵\n↵\n", "··", "⇥\t", " b", "c↵\n"]


def test_a_row_after_the_text_has_a_place(show: Show) -> None:
    records = make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=False)
    last = dataclasses.replace(records[-1], query_position=PROMPT + ANSWER - 1, decode_step=ANSWER)
    page = show(make_report([*records, last]))
    page.hover(f"#t{PROMPT + ANSWER}")
    assert text(page, "#where") == "after the text"
    assert len(listed(page)) == K


def test_reports_without_positions_or_without_records(show: Show) -> None:
    bare = [
        dataclasses.replace(
            r, token_positions=r.token_positions[:, :0], attention_scores=r.attention_scores[:, :0], mode="fingerprint"
        )
        for r in make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=False)
    ]
    page = show(make_report(bare))
    page.hover(f"#t{PROMPT + 2}")
    assert (listed(page), text(page, "#note")) == ([], "this row reports no positions")
    assert 0 < float(text(page, "#entropy")) < 1
    page = show(make_report([]))
    page.hover("#t3")
    assert "Not captured" in text(page, "#missing")
    assert text(show(make_report([], tokens=[], prompt_length=0)), "#where") == "This report holds no record."


def test_named_spans(show: Show) -> None:
    records = [
        dataclasses.replace(r, span_names=("system", "doc<1>"), span_mass=np.full((3, 2), 0.25, np.float32) * [1, 2])
        for r in make_records(PROMPT + ANSWER, PROMPT, LAYERS, K, prompt_rows=True)
    ]
    page = show(make_report(records))
    page.hover("#t9")
    assert page.eval("[...document.querySelectorAll('#spans div')].map(d => d.textContent)") == [
        "system0.2500",
        "doc<1>0.5000",
    ]


def test_dark_and_light_are_both_readable(show: Show) -> None:
    for dark in (False, True):
        page = show(make_report(), dark=dark)
        page.hover(f"#t{PROMPT + 6}")
        pairs = page.eval(
            "(() => { const c = (s, p) => getComputedStyle(document.querySelector(s))[p].match(/[0-9.]+/g).map(Number);"
            " const paper = c('body', 'backgroundColor');"
            " const [panel, hit] = [c('aside', 'backgroundColor'), c('#t0', 'backgroundColor')];"
            " return [['body', paper], ['#where', panel], ['.t.lit', hit]]"
            ".map(([s, behind]) => [c(s, 'color'), behind]); })()"
        )
        for ink, behind in pairs:
            assert contrast(ink[:3], behind[:3]) >= 4.5
        assert (luminance(pairs[0][1][:3]) < 0.2) == dark


def luminance(colour: list[float]) -> float:
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
def test_a_link_into_a_large_report_scrolls_there(show: Show, large: Path) -> None:
    for screen in ({}, {"size": (390, 844), "phone": True}):
        page = show(large, "#token=3500", **screen)
        page.until("document.querySelector('.pinned') && document.querySelector('.pinned').index === 3500")
        for _ in range(5):
            page.settle()
        top, bottom, limit = page.eval(
            "(() => { const [r, a] = ['.pinned', 'aside'].map(s => document.querySelector(s).getBoundingClientRect());"
            " return [r.top, r.bottom, innerWidth > 900 ? innerHeight : a.top]; })()"
        )
        assert 0 <= top < bottom <= limit


@pytest.mark.slow
def test_large_report_stays_responsive(show: Show, large: Path) -> None:
    page = show(large)
    elements = page.eval("document.querySelectorAll('*').length")
    times = page.eval(
        """(async () => {
          const times = [];
          for (let i = 0; i < 40; i++) {
            const token = document.getElementById("t" + (3000 + i * 7));
            token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
            times.push(await new Promise((done) => requestAnimationFrame((begin) => {
              document.body.offsetHeight; // style and layout, too
              done(performance.now() - begin);
            })));
          }
          return times;
        })()"""
    )
    # typically a few milliseconds; the bound leaves room for a busy machine
    assert np.median(times) < 100
    choose_layer(page, "-1")
    page.click("#mode-by")
    page.hover("#t0")
    assert text(page, "#list-name") == "Attended by 3,999"
    assert page.eval("document.querySelectorAll('*').length") == elements  # no node is made or thrown away

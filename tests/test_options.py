"""Options: one precedence, and an error that names field, value and allowed range for everything else."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook.errors import AttnhookError, OptionError
from attnhook.kernels import topk
from attnhook.options import (
    KERNELS,
    CaptureOptions,
    RequestOptions,
    check_heads,
    check_reach,
    check_rows,
    enabled,
    parse_heads,
    parse_layers,
    resolve_choice,
    resolve_layers,
    shown,
)

# field: (JSON name, value), argument, (variable, text, value)
SOURCES: dict[str, tuple[tuple[str, Any], Any, tuple[str, str, Any]]] = {
    "top_k": (("top_k_attention", 1), 256, ("ATTNHOOK_TOP_K", "7", 7)),
    "layers": (("attention_layers", [3, -1]), "auto", ("ATTNHOOK_LAYERS", "0, 14,-1", (0, 14, -1))),
    "heads": (("attention_heads", [0]), [8, 3], ("ATTNHOOK_HEADS", "1,2", (1, 2))),
    "mode": (("attention_mode", "sketch"), "fingerprint", ("ATTNHOOK_MODE", "sketch", "sketch")),
    "prompt": (("attention_prompt", False), True, ("ATTNHOOK_PROMPT", "1", True)),
    "rows": (("attention_rows", [[3, 9]]), [[0, 4]], ("ATTNHOOK_ROWS", "[[0, 40]]", ((0, 40),))),
    "stride": (("attention_stride", 2), 10**6, ("ATTNHOOK_STRIDE", "3", 3)),
    "max_tokens": (("attention_max_tokens", 1), 10**7, ("ATTNHOOK_MAX_TOKENS", "5", 5)),
    "spans": (
        ("attention_spans", {"a": [0, 1]}),
        {"b": (4, 9)},
        ("ATTNHOOK_SPANS", '{"c": [0, 40]}', {"c": (0, 40)}),
    ),
    "mask_prefix": (("attention_mask_prefix", 0), 2**31 - 1, ("ATTNHOOK_MASK_PREFIX", "40", 40)),
    "per_head": (
        ("attention_per_head", ["top"]),
        ["spans", "lse"],
        ("ATTNHOOK_PER_HEAD", "top, sink", ("sink", "top")),
    ),
    "top_k_per_head": (("attention_top_k_per_head", 1), 16, ("ATTNHOOK_TOP_K_PER_HEAD", "3", 3)),
    "key_mass": (("attention_key_mass", "mean"), "kv_head", ("ATTNHOOK_KEY_MASS", "kv_head", "kv_head")),
    "encoding_format": (
        ("attention_encoding_format", "float"),
        "base64",
        ("ATTNHOOK_ENCODING_FORMAT", "base64", "base64"),
    ),
    "self_check": (("attention_self_check", False), True, ("ATTNHOOK_SELF_CHECK", "1", True)),
}
JSON_NAMES = {field: request[0] for field, (request, _, _) in SOURCES.items()}
VARIABLES = {field: variable[0] for field, (_, _, variable) in SOURCES.items()}
DEFAULTS = {
    "top_k": 32,
    "layers": "last",
    "heads": None,
    "mode": "raw",
    "prompt": False,
    "rows": (),
    "stride": 1,
    "max_tokens": 4096,
    "spans": {},
    "mask_prefix": 0,
    "per_head": (),
    "top_k_per_head": 1,
    "key_mass": None,
    "encoding_format": "float",
    "self_check": False,
}


def stored(value: Any) -> Any:
    """A value as RequestOptions keeps it."""
    if isinstance(value, list):
        return tuple(tuple(one) if isinstance(one, list) else one for one in value)
    if isinstance(value, dict):
        return {name: tuple(bounds) for name, bounds in value.items()}
    return value


# -- precedence


def test_every_field_is_covered_here():
    assert list(SOURCES) == list(DEFAULTS) == list(RequestOptions.__dataclass_fields__)
    assert vars(RequestOptions.resolve(environ={})) == DEFAULTS


@pytest.mark.parametrize("field", SOURCES)
def test_request_beats_argument_beats_environment_beats_default(field):
    (key, request), argument, (variable, text, parsed) = SOURCES[field]
    for has_request, has_argument, has_variable in itertools.product([True, False], repeat=3):
        got = RequestOptions.resolve(
            request={key: request} if has_request else {},
            arguments={field: argument} if has_argument else {},
            environ={variable: text} if has_variable else {},
        )
        expected = request if has_request else argument if has_argument else parsed if has_variable else DEFAULTS[field]
        assert vars(got) == {**DEFAULTS, field: stored(expected)}


def test_the_process_environment_is_read_and_none_turns_it_off(monkeypatch):
    monkeypatch.setenv("ATTNHOOK_TOP_K", "9")
    assert RequestOptions.resolve().top_k == CaptureOptions.resolve().request.top_k == 9
    assert RequestOptions.resolve(environ={}).top_k == 32


def test_process_options():
    environ = {"ATTNHOOK_SINKS": "jsonl:a.jsonl, memory:,", "ATTNHOOK_QUEUE_SIZE": "10", "ATTNHOOK_TOP_K": "3"}
    got = CaptureOptions.resolve(environ=environ)
    assert (got.sinks, got.queue_size, got.request.top_k) == (("jsonl:a.jsonl", "memory:"), 10, 3)
    got = CaptureOptions.resolve({"sinks": "memory:5", "queue_size": 20, "top_k": 4}, environ)
    assert (got.sinks, got.queue_size, got.request.top_k) == (("memory:5",), 20, 4)
    assert CaptureOptions.resolve({"sinks": ()}, environ).sinks == ()
    assert CaptureOptions.resolve({"sinks": ["a:", "b:"]}, {}).sinks == ("a:", "b:")
    assert CaptureOptions.resolve(environ={"ATTNHOOK_SINKS": " "}) == CaptureOptions()
    assert CaptureOptions.resolve({"stride": 2}, {"ATTNHOOK": "1", "ATTNHOOK_CACHE": "/x", "ATTNHOOK_KERNEL": ""})


def test_what_resolve_got_is_not_changed():
    arguments, environ = {"sinks": ["memory:"], "queue_size": 3, "top_k": 2}, {"ATTNHOOK_TOP_K": "3"}
    CaptureOptions.resolve(arguments, environ)
    assert arguments == {"sinks": ["memory:"], "queue_size": 3, "top_k": 2}
    assert environ == {"ATTNHOOK_TOP_K": "3"}


def test_other_fields_of_a_request_are_left_alone():
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "return_attention_tokens": True,
        "logprobs": None,
        # names of our arguments are other people's fields here
        "top_k": 0,
        "max_tokens": -5,
        "prompt": "some text",
        "mode": "chat",
        "heads": "x",
    }
    assert vars(RequestOptions.resolve(request=body, environ={})) == DEFAULTS
    assert RequestOptions.resolve(request={**body, "top_k_attention": 3}, environ={}).top_k == 3


def test_duplicates_go_and_none_means_all_heads():
    got = RequestOptions.resolve(arguments={"layers": [3, 1, 3], "heads": (2, 2, 0)}, environ={})
    assert (got.layers, got.heads) == ((3, 1), (2, 0))
    overridden = RequestOptions.resolve({"attention_heads": None}, {"heads": [1]}, {"ATTNHOOK_HEADS": "2"})
    assert overridden.heads is None


# -- bad values

# field: text that tells the allowed range, then values that are refused
BAD: dict[str, tuple[str, list[Any]]] = {
    "top_k": ("whole number from 1 to 256", [0, -1, 257, True, False, 1.0, "8", None, [8]]),
    "layers": (
        '"last", "auto", "all" or a list of layer numbers such as [0, 14, -1]',
        [[], (), "first", "", "0,1", 3, True, [0, "1"], [1.0], [True], None, {}, {"0": 1}, b"\x01", [[0]]],
    ),
    "heads": (
        "non-empty list of whole numbers from 0 up",
        [[], (), "0", "all", 3, False, [-1], [0, -1], [True], [1.5], [None], b"\x01", {}, {"0": 1}],
    ),
    "mode": ("one of raw, sketch, fingerprint", ["", "RAW", "full", 0, True, None, ["raw"], {}]),
    "prompt": ("true or false", [0, 1, "true", "", None, [True]]),
    "rows": (
        "list of [start, end] positions, 0 <= start < end < 2**31, or span names",
        [
            "question",
            "",
            3,
            True,
            None,
            {},
            {"a": [0, 1]},
            b"ab",
            [3],
            [[]],
            [[1]],
            [[0, 1, 2]],
            [[2, 2]],
            [[3, 2]],
            [[-1, 2]],
            [[0, 2**31]],
            [[0.0, 1]],
            [[False, True]],
            [None],
            [[0, 4], 7],
            [b"ab"],
        ],
    ),
    "stride": ("whole number from 1 to 1000000", [0, -1, 10**6 + 1, True, 1.0, "1", None]),
    "max_tokens": ("whole number from 0 to 10000000", [-1, 10**7 + 1, True, 1.0, "1", None]),
    "mask_prefix": (f"whole number from 0 to {2**31 - 1}", [-1, 2**31, True, 0.0, "0", None]),
    "per_head": (
        "list of spans, fingerprint, sink, top, lse",
        ["top", "", 3, True, None, {}, {"top": 1}, [1], [None], ["tops"], [["top"]], b"top"],
    ),
    "top_k_per_head": ("whole number from 1 to 16", [0, -1, 17, True, 1.0, "1", None]),
    "key_mass": ("one of mean, kv_head, or false", ["", "max", 0, 1, True, ["mean"], {}, b"mean"]),
    "encoding_format": ("one of float, base64", ["", "hex", 0, True, None, ["float"], {}]),
    "self_check": ("true or false", [0, 1, "true", "", None, [True]]),
}
BAD_SPANS: list[tuple[Any, str, str]] = [
    # value, what of it is shown, what is allowed
    *((value, repr(value), "map names to [start, end]") for value in ([], [["a", 0, 1]], "a", 3, None, True)),
    *(
        ({"a": bounds}, f"'a': {bounds!r}", "[start, end] positions, 0 <= start < end")
        for bounds in ([], [1], [0, 1, 2], [2, 2], [3, 2], [-1, 2], [0, 2**31], [0.0, 1], [False, True], ["0", "1"])
    ),
    *(({"a": bounds}, f"'a': {bounds!r}", "[start, end]") for bounds in (None, 3, "01", {"start": 0, "end": 1}, b"ab")),
    *(
        ({name: [0, 1]}, repr(name), "a name of 1 to 255 bytes of UTF-8 without control characters")
        for name in ("", "a\x1fb", "a\nb", "\ud800", "x" * 256, "é" * 128, 3)
    ),
    ({str(i): [0, 1] for i in range(256)}, "256 spans", "at most 255"),
]


def refused(error: pytest.ExceptionInfo[OptionError], field: str, shown: str, allowed: str) -> None:
    """The error names the field as the caller wrote it, the value and what is allowed, in one line."""
    message = str(error.value)
    assert error.value.field == field
    assert isinstance(error.value, AttnhookError)
    assert isinstance(error.value, ValueError)
    assert field in message
    assert shown in message
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, (_, values) in BAD.items() for value in values], ids=repr
)
def test_a_bad_value_is_refused_by_name(field, value):
    allowed = BAD[field][0]
    with pytest.raises(OptionError) as caught:
        RequestOptions.resolve(arguments={field: value}, environ={})
    refused(caught, field, f"{field}={value!r}", allowed)
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve({field: value}, {})
    refused(caught, field, f"{field}={value!r}", allowed)
    key = JSON_NAMES[field]
    with pytest.raises(OptionError) as caught:
        RequestOptions.resolve(request={key: value}, environ={})
    refused(caught, key, f"{key}={value!r}", allowed)


@pytest.mark.parametrize(("value", "shown", "allowed"), BAD_SPANS, ids=lambda value: repr(value)[:30])
def test_bad_spans_are_refused_by_name(value, shown, allowed):
    for field, sources in {
        "spans": {"arguments": {"spans": value}},
        "attention_spans": {"request": {"attention_spans": value}},
    }.items():
        with pytest.raises(OptionError) as caught:
            RequestOptions.resolve(**sources, environ={})
        refused(caught, field, shown, allowed)


def test_spans_that_are_just_allowed():
    spans = {f"{i}" + "x" * 252: [0, 1] for i in range(100, 355)} | {"Ünï 文 \N{ROCKET}": [0, 2**31 - 1]}
    spans.pop("100" + "x" * 252)
    assert len(spans) == 255
    got = RequestOptions.resolve(arguments={"spans": spans}, environ={}).spans
    assert got == {name: tuple(bounds) for name, bounds in spans.items()}


BAD_VARIABLES: list[tuple[str, str, list[str]]] = [
    # variable, text that tells the allowed range, refused values
    ("ATTNHOOK_TOP_K", BAD["top_k"][0], ["abc", "", "1.5", "8,9"]),
    ("ATTNHOOK_LAYERS", "last, auto, all or layer numbers such as 0,14,-1", ["", "first", "0,,1", "0;1", "1.5"]),
    ("ATTNHOOK_HEADS", "head numbers such as 0,3", ["", "last", "all", "0,", "1-3", "{", "{1: [2]}"]),
    ("ATTNHOOK_ROWS", 'JSON such as [[0, 40], "question"]', ["", "0:4", "[[0, 4]", "[" * 99999]),
    ("ATTNHOOK_MODE", BAD["mode"][0], ["", "Raw", "1"]),
    ("ATTNHOOK_PROMPT", "0 or 1", ["", "true", "yes", "2"]),
    ("ATTNHOOK_STRIDE", BAD["stride"][0], ["x", ""]),
    ("ATTNHOOK_MAX_TOKENS", BAD["max_tokens"][0], ["x", "1e3"]),
    ("ATTNHOOK_MASK_PREFIX", BAD["mask_prefix"][0], ["x", "0x10"]),
    ("ATTNHOOK_SELF_CHECK", "0 or 1", ["", "true", "2"]),
    ("ATTNHOOK_SPANS", 'JSON such as {"system": [0, 40]}', ["", "{", "a=0:4", "{'a': [0, 1]}", "[" * 99999]),
    ("ATTNHOOK_QUEUE_SIZE", "whole number from 1 to 100000000", ["", "x", "1e3"]),
    ("ATTNHOOK_KERNEL", "one of compiled, naive, torch, triton", ["Triton", "cuda"]),
]
BAD_PARSED: list[tuple[str, str, str, str]] = [
    # variable, text, value as shown, text that tells the allowed range
    *(("ATTNHOOK_TOP_K", text, text, BAD["top_k"][0]) for text in ("0", "257", "-1")),
    *(("ATTNHOOK_STRIDE", text, text, BAD["stride"][0]) for text in ("0", "1000001")),
    *(("ATTNHOOK_MAX_TOKENS", text, text, BAD["max_tokens"][0]) for text in ("-1", "10000001")),
    ("ATTNHOOK_MASK_PREFIX", "-1", "-1", BAD["mask_prefix"][0]),
    ("ATTNHOOK_HEADS", "-1", "(-1,)", "whole numbers from 0 up"),
    ("ATTNHOOK_HEADS", '{"3": 1}', "{'3': 1}", "or such lists by layer number"),
    ("ATTNHOOK_ROWS", "null", "None", "list of [start, end] positions"),
    ("ATTNHOOK_QUEUE_SIZE", "0", "0", "whole number from 1 to 100000000"),
    *(
        ("ATTNHOOK_SPANS", text, shown, "map names to [start, end]")
        for text, shown in {"[]": "[]", "null": "None", "NaN": "nan", "3": "3"}.items()
    ),
    *(("ATTNHOOK_SINKS", text, f"{text.split(',')}", "sink URLs such as jsonl:") for text in ("jsonl", "a:,b")),
]


@pytest.mark.parametrize(
    ("variable", "text", "shown", "allowed"),
    [(name, text, shown(text), allowed) for name, allowed, texts in BAD_VARIABLES for text in texts] + BAD_PARSED,
    ids=lambda value: value[:30],
)
def test_a_bad_variable_is_refused_by_name(variable, text, shown, allowed):
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve(environ={variable: text})
    refused(caught, variable, f"{variable}={shown}", allowed)


def test_a_self_check_is_for_servers():
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve({"self_check": True}, {})
    refused(caught, "self_check", "self_check=True", "attnhook verify")
    assert not CaptureOptions.resolve({"self_check": False}, {}).request.self_check
    assert CaptureOptions.resolve(environ={"ATTNHOOK_SELF_CHECK": "1"}).request.self_check


def test_an_encoding_is_for_servers():
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve({"encoding_format": "base64"}, {})
    refused(caught, "encoding_format", "encoding_format='base64'", "records in this process are arrays")


def test_a_bad_span_in_a_variable_is_refused_by_name():
    with pytest.raises(OptionError) as caught:
        RequestOptions.resolve(environ={"ATTNHOOK_SPANS": '{"a": [0, 1e400]}'})
    refused(caught, "ATTNHOOK_SPANS", "'a': [0, inf]", "0 <= start < end")


@pytest.mark.parametrize("value", [None, 3, "records.jsonl", "", ["memory:", 3], ["memory"], {"memory:": 1}, b"a:"])
def test_bad_sinks_are_refused_by_name(value):
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve({"sinks": value}, {})
    refused(caught, "sinks", f"sinks={value!r}", "sink URLs such as jsonl:records.jsonl")


@pytest.mark.parametrize("value", [0, 10**8 + 1, True, 1.0, "5", None])
def test_a_bad_queue_size_is_refused_by_name(value):
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve({"queue_size": value}, {})
    refused(caught, "queue_size", f"queue_size={value!r}", "whole number from 1 to 100000000")


@pytest.mark.parametrize(
    ("sources", "field", "hint"),
    [
        ({"arguments": {"topk": 3}}, "topk", "did you mean 'top_k'"),
        (
            {"arguments": {"xyz": 3}},
            "xyz",
            "known: encoding_format, heads, key_mass, layers, mask_prefix, max_tokens, mode, per_head, prompt, rows",
        ),
        ({"request": {"attention_layer": "all"}}, "attention_layer", "did you mean 'attention_layers'"),
        ({"request": {"attention_xyz_zyx": 1}}, "attention_xyz_zyx", ""),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(sources, field, hint):
    with pytest.raises(OptionError) as caught:
        RequestOptions.resolve(**sources, environ={})
    refused(caught, field, f"unknown {'option' if 'arguments' in sources else 'field'} {field!r}", hint)


def test_an_unknown_variable_is_refused_with_a_suggestion():
    with pytest.raises(OptionError) as caught:
        CaptureOptions.resolve(environ={"ATTNHOOK_LAYER": "all", "PATH": "/bin", "ATTNHOOKED": "x"})
    refused(caught, "ATTNHOOK_LAYER", "unknown environment variable", "did you mean 'ATTNHOOK_LAYERS'")
    with pytest.raises(OptionError, match="known: ATTNHOOK_API_KEY, ATTNHOOK_CACHE, "):
        CaptureOptions.resolve(environ={"ATTNHOOK_XXXXXXXXXX": ""})


def test_a_bad_variable_is_an_error_even_where_it_is_overridden():
    with pytest.raises(OptionError, match="ATTNHOOK_TOP_K"):
        RequestOptions.resolve({"top_k_attention": 3}, {"top_k": 3}, {"ATTNHOOK_TOP_K": "0"})


@pytest.mark.parametrize("text", ["", "0", "1", None])
def test_enabled(text):
    assert enabled({} if text is None else {"ATTNHOOK": text}) is (text == "1")


@pytest.mark.parametrize("text", ["2", "true", "yes", " 1", "01", "-1"])
def test_a_bad_switch_is_refused(text):
    with pytest.raises(OptionError) as caught:
        enabled({"ATTNHOOK": text})
    refused(caught, "ATTNHOOK", f"ATTNHOOK={text!r}", "set it to 1")


def test_the_kernels_are_those_that_exist():
    assert topk.KERNELS is KERNELS  # one list, not two that agree
    for name in KERNELS:
        assert CaptureOptions.resolve(environ={"ATTNHOOK_KERNEL": name})


# -- nothing but an OptionError, whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(list(SOURCES)), JSON)
def test_any_json_is_an_option_or_an_option_error(field, value):
    key = JSON_NAMES[field]
    try:
        got = RequestOptions.resolve(request={key: value}, environ={})
    except OptionError as error:
        assert error.field == key
        assert key in str(error)
    else:
        if field == "key_mass" and value is False:
            assert got.key_mass is None
            return
        if field == "heads" and isinstance(value, dict):
            assert got.heads == {int(layer): tuple(dict.fromkeys(heads)) for layer, heads in value.items()}
            assert got.layers == tuple(got.heads)
            return
        if field == "rows":
            assert {p for start, end in got.rows for p in (start, end - 1)} <= {p for one in value for p in range(*one)}
            return
        assert type(getattr(got, field)) is type(stored(value))
        assert getattr(got, field) == (tuple(dict.fromkeys(value)) if isinstance(value, list) else stored(value))


@given(st.sampled_from(sorted(VARIABLES.values())), st.text(max_size=10) | JSON.map(json.dumps))
def test_any_text_of_a_variable_is_an_option_or_an_option_error(variable, text):
    try:
        RequestOptions.resolve(environ={variable: text})
    except OptionError as error:
        assert error.field == variable
        assert variable in str(error)


# -- chosen rows, and heads by layer


def test_chosen_rows_are_ranges_ascending_and_apart_whatever_named_them():
    spans = {"question": [20, 24], "document": [4, 9]}
    rows = ["question", [0, 2], (8, 12), "document", [30, 31]]
    got = RequestOptions.resolve(arguments={"rows": rows, "spans": spans}, environ={})
    assert got.rows == ((0, 2), (4, 12), (20, 24), (30, 31))
    # a name is that of a span whoever told it
    got = RequestOptions.resolve({"attention_rows": ["a"]}, environ={"ATTNHOOK_SPANS": '{"a": [3, 5]}'})
    assert got.rows == ((3, 5),)
    assert RequestOptions.resolve({"attention_rows": []}, environ={"ATTNHOOK_ROWS": "[[0, 4]]"}).rows == ()


@pytest.mark.parametrize(
    ("spans", "message"),
    [({}, "attention_rows: 'b' is no span: there are no spans"), ({"a": [0, 3]}, "'b' is no span: the spans are 'a'")],
)
def test_rows_of_a_span_that_is_not_there_are_refused(spans, message):
    with pytest.raises(OptionError, match=message):
        RequestOptions.resolve({"attention_rows": ["b"], "attention_spans": spans}, environ={})


def test_no_generated_rows_go_with_rows_of_the_prompt_only():
    assert RequestOptions.resolve({"attention_max_tokens": 0, "attention_prompt": True}, environ={}).max_tokens == 0
    assert RequestOptions.resolve(arguments={"max_tokens": 0, "rows": [(0, 3)]}, environ={}).rows == ((0, 3),)
    with pytest.raises(OptionError) as caught:
        RequestOptions.resolve({"attention_max_tokens": 0}, environ={})
    refused(caught, "attention_max_tokens", "attention_max_tokens=0", "ask for rows too")


def test_chosen_rows_beyond_the_prompt_are_refused_by_name():
    check_rows(((0, 2), (8, 10)), 10)
    with pytest.raises(
        OptionError, match=r"rows: \[8, 11\] reaches beyond the prompt, whose positions are 0..9"
    ) as caught:
        check_rows(((0, 2), (8, 11)), 10)
    assert caught.value.field == "rows"


def test_heads_by_layer_name_the_layers_unless_these_are_named():
    got = RequestOptions.resolve({"attention_heads": {"3": [1, 1, 0], "-1": [2]}}, environ={})
    assert got.heads == {3: (1, 0), -1: (2,)} and got.layers == (3, -1)
    got = RequestOptions.resolve(arguments={"heads": {3: (1,)}, "layers": "all"}, environ={})
    assert got.heads == {3: (1,)} and got.layers == "all"
    assert RequestOptions.resolve(environ={"ATTNHOOK_HEADS": '{"2": [4]}'}).layers == (2,)


def test_heads_by_layer_become_those_of_the_layers_own_numbers():
    assert resolve_choice((-1, 3), {-1: (2,), 3: (0,)}, range(30)) == ((3, 29), {3: (0,), 29: (2,)})
    assert resolve_choice("last", (1, 2), range(30)) == ((29,), (1, 2))
    assert resolve_choice("all", None, range(3)) == ((0, 1, 2), None)
    check_heads({3: (0, 8)}, 9)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({4: (0,)}, "heads: layer 4 is not captured: the captured layers are 3, 29; name it among them"),
        ({30: (0,)}, "heads: layer 30 does not exist: the model's attention layers are 0..29"),
        ({29: (0,), -1: (1,)}, "heads: layer 29 is named twice, as -1 too"),
    ],
)
def test_heads_of_a_layer_that_is_not_captured_are_refused(heads, message):
    with pytest.raises(OptionError, match=message):
        resolve_choice((3, 29), heads, range(30))
    with pytest.raises(OptionError, match="heads: head 9 of layer 3 does not exist"):
        check_heads({3: (9,)}, 9)


# -- as typed by a person


def test_parse_layers_and_heads():
    assert [parse_layers("--layers", text) for text in ("last", "auto", "all")] == ["last", "auto", "all"]
    assert parse_layers("--layers", "0,14, -1") == (0, 14, -1)
    assert parse_heads("--heads", "0, 3") == (0, 3)
    assert parse_heads("--heads", ' {"12": [0, 3]}') == {"12": [0, 3]}
    with pytest.raises(OptionError) as caught:
        parse_layers("--layers", "frist")
    refused(caught, "--layers", "'frist'", "last, auto, all or layer numbers such as 0,14,-1")
    with pytest.raises(OptionError) as caught:
        parse_heads("--heads", "last")
    refused(caught, "--heads", "'last'", "head numbers such as 0,3")


# -- layers and heads of a model

HYBRID = [11, 3, 7]  # attention layers of a model whose others are recurrent


@pytest.mark.parametrize(
    ("spec", "available", "expected"),
    [
        ("last", range(30), (29,)),
        ("last", HYBRID, (11,)),
        ("last", [0], (0,)),
        ("all", range(3), (0, 1, 2)),
        ("all", HYBRID, (3, 7, 11)),
        ("auto", range(30), (6, 14, 21, 29)),
        ("auto", range(4), (0, 1, 2, 3)),
        ("auto", range(2), (0, 1)),
        ("auto", HYBRID, (3, 7, 11)),
        ("auto", range(0, 60, 5), (10, 25, 40, 55)),
        ((0, 14, -1), range(30), (0, 14, 29)),
        ((-1, 29, 0, -30, 0), range(30), (0, 29)),
        ((-1, -3, 7), HYBRID, (3, 7, 11)),
        ((-1,), [5], (5,)),
    ],
)
def test_resolve_layers(spec, available, expected):
    assert resolve_layers(spec, available) == expected


@pytest.mark.parametrize(
    ("spec", "available", "bad", "have"),
    [
        ((30,), range(30), 30, "0..29 (or -30..-1 from the end)"),
        ((0, -31), range(30), -31, "0..29 (or -30..-1 from the end)"),
        ((4,), HYBRID, 4, "3, 7, 11 (or -3..-1 from the end)"),
        ((-4,), HYBRID, -4, "3, 7, 11 (or -3..-1 from the end)"),
        ((0,), [5], 0, "5 (or -1..-1 from the end)"),
    ],
)
def test_a_layer_that_the_model_lacks(spec, available, bad, have):
    with pytest.raises(OptionError) as caught:
        resolve_layers(spec, available, "attention_layers")
    refused(caught, "attention_layers", f"layer {bad} does not exist", have)


@given(st.sets(st.integers(0, 200), min_size=1, max_size=80), st.data())
def test_any_layers_come_out_ascending_and_spread(available, data):
    layers = sorted(available)
    chosen = data.draw(st.lists(st.integers(-len(layers), -1) | st.sampled_from(layers), min_size=1, max_size=9))
    got = resolve_layers(tuple(chosen), data.draw(st.permutations(layers)))
    assert list(got) == sorted({layers[i] if i < 0 else i for i in chosen})
    auto = resolve_layers("auto", layers)
    assert len(auto) == min(4, len(layers))
    assert auto[-1] == layers[-1]
    gaps = [b - a for a, b in itertools.pairwise([-1, *(layers.index(layer) for layer in auto)])]
    assert max(gaps) - min(gaps) <= 1


def test_check_heads():
    check_heads(None, 9)
    check_heads((0, 8), 9)
    with pytest.raises(OptionError) as caught:
        check_heads((0, 9), 9, "attention_heads")
    refused(caught, "attention_heads", "head 9 does not exist", "0..8")


def test_spans_that_no_token_can_reach() -> None:
    check_reach({"answer": (9, 2**31 - 1), "prompt": (0, 5)}, 10)
    with pytest.raises(OptionError, match=r"attention_spans: 'a': \[10, 11\] begins beyond .* 0\.\.9"):
        check_reach({"prompt": (0, 5), "a": (10, 11)}, 10, "attention_spans")

"""``attnhook verify --url``: a running server, checked over HTTP by what must hold for every exact answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnhook.client.client import Client
from attnhook.errors import AttnhookError, RecordError, ServerError
from attnhook.record import fingerprint as fp
from attnhook.record.row import SCHEMA_VERSION
from attnhook.record.token_record import TokenRecord
from attnhook.record.zones import ZONE_NAMES
from attnhook.system.addresses import masked
from attnhook.verify.report import Report, own_versions

#: Largest self-check error that is the engine's own rounding; a dtype that is not told gets the widest.
#: "tf32": float32 on a GPU, where engines multiply in TF32.
REBUILT = {"float32": 1e-3, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 4e-2}
#: Largest difference of a probability between two answers with the same tokens, which need not share a batch.
REPEATED = {"float32": 1e-4, "tf32": 1e-2}

TOP_K, NEW = 8, 12
PROMPT = (
    "The brig Halcyon brought 212 barrels of olive oil from Lisbon. The schooner Marigold took salted cod to Bergen. "
    "Tell me which ship brought what."
)
_SINK, _HEAD, _REST = "sink", "head", "rest"
_SPANS = {_SINK: [0, 1], _HEAD: [0, 7], _REST: [7, 2**31 - 1]}
_EXACT = 1e-6  # what 7 decimals lose in a short sum
_SUM = 1e-4  # what float32 loses in a long one
_BAD: tuple[tuple[str, Any], ...] = (
    ("top_k_attention", 100_000),
    ("attention_spans", {"a": [5, 2]}),
    ("attention_mode", "everything"),
    ("attention_layer", "all"),  # misspelt
)
_PATHS = {"chat completions": "/v1/chat/completions", "text completions": "/v1/completions"}


@dataclass
class Findings:
    """Checks by name: how often each was made and failed, and what the first failure looked like."""

    made: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def check(self, name: str, good: object, seen: object = "") -> bool:
        """Count one check; ``seen`` says what was seen instead."""
        self.made[name] += 1
        if not good:
            self.failed[name] += 1
            self.first.setdefault(name, str(seen))
        return bool(good)

    def lines(self) -> dict[str, str]:
        """One line for each check."""
        return {
            name: f"FAILED {self.failed[name]} of {count}" if self.failed[name] else f"ok ({count})"
            for name, count in self.made.items()
        }

    def problems(self) -> list[str]:
        """One sentence for each check that failed."""
        return [
            f"{name}: failed {n} of {self.made[name]} times, first: {self.first[name]}"
            for name, n in self.failed.items()
        ]


@dataclass
class Reply:
    """What one request brought, whole or put together from its stream."""

    ids: list[int] | None = None
    prompt: int | None = None
    tokens: int | None = None
    text: str = ""
    entries: list[dict[str, Any]] | None = None
    checks: list[Any] = field(default_factory=list)  # attention_self_check, one for each chunk that has one
    error: str | None = None

    def add(self, answer: Mapping[str, Any]) -> None:
        """Take in a whole answer or one chunk."""
        usage = answer.get("usage") or {}
        self.prompt = usage.get("prompt_tokens", self.prompt)
        self.tokens = usage.get("completion_tokens", self.tokens)
        for choice in answer.get("choices") or ():
            said = choice.get("message") or choice.get("delta") or choice
            parts = (said.get(name) for name in ("reasoning", "reasoning_content", "content", "text"))
            self.text += "".join(part for part in parts if isinstance(part, str))
            if choice.get("token_ids") is not None:
                self.ids = [*(self.ids or ()), *choice["token_ids"]]
            if "attention_tokens" in choice:
                self.entries = [*(self.entries or ()), *choice["attention_tokens"]]
            if "attention_self_check" in choice:
                self.checks.append(choice["attention_self_check"])
            self.error = self.error or choice.get("attention_error")

    @property
    def said(self) -> Any:
        """What two equal answers have in common: token ids, or the text where the server tells none."""
        return self.text if self.ids is None else self.ids


def run(url: str, *, model: str | None = None, api_key: str | None = None, attention_key: str | None = None) -> Report:
    """Check one server; failures become ``problems``. Raises OptionError for a bad address or key."""
    client = Client(url, api_key=api_key, attention_key=attention_key)
    report = Report()
    report.sections["versions"] = own_versions()
    report.sections["server"] = {"url": masked(url)}
    try:
        _check(client, model, report)
    except AttnhookError as error:
        report.problems.append(str(error))
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # an answer that nobody could foresee
        report.problems.append(f"{client.shown} answered what cannot be read: {type(error).__name__}: {error}")
    return report


def _check(client: Client, model: str | None, report: Report) -> None:
    told = client.capabilities()
    engine, limits = told.get("engine") or {}, told.get("limits") or {}
    name = client.model(model)
    dtype, layers = told.get("dtype"), told.get("layers")
    report.sections["server"] |= {
        "attnhook": str(told.get("attnhook")),
        "engine": " ".join(str(part) for part in engine.values() if part),
        "model": name,
        "dtype": str(dtype or "not told"),
        "device": str(told.get("device") or "not told"),
        "attention layers": "not told" if layers is None else str(len(layers)),
        "query heads": str(told.get("query_heads") or "not told"),
        **{f"limit: {limit}": str(value) for limit, value in limits.items()},
    }
    if told.get("schema_version") != SCHEMA_VERSION:
        raise ServerError(
            f"{client.shown} speaks schema_version {told.get('schema_version')!r}, this attnhook {SCHEMA_VERSION}: use "
            "the same attnhook on both sides"
        )
    if dtype == "float32" and told.get("device") == "cuda":
        dtype = "tf32"
    findings = Findings()
    lines: dict[str, str] = {}
    report.sections["answers"], report.sections["checks"] = lines, {}
    only = "fingerprint" if limits.get("fingerprint_only") else "raw"
    try:
        for what, path in _PATHS.items():
            try:
                lines[what] = _answers(client, path, name, only, layers, dtype, findings, report)
            except ServerError as error:
                why = _no_chats(error) if "chat" in path else None
                if why is None:
                    raise
                lines[what] = f"not checked: {why}"
        _bad_input(client, name, layers, findings)
    finally:
        report.sections["checks"] = findings.lines()
        report.problems += findings.problems()


def _no_chats(error: ServerError) -> str | None:
    """Why a server holds no chats, where that is what an error says; its text completions are checked all the same."""
    if error.status == 400 and "chat template" in str(error):
        return "the model has no chat template"
    return "the server has no such route" if error.status == 404 else None


def _answers(
    client: Client, path: str, model: str, mode: str, layers: Any, dtype: Any, findings: Findings, report: Report
) -> str:
    """The same question four times: it must be answered and captured alike. A line about what was compared."""
    said = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    plain = {"model": model, **said, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    if "chat" not in path:
        plain["return_token_ids"] = True  # SGLang refuses it in streams of chats: there the text must do
    ask = {
        **plain, "return_attention_tokens": True, "top_k_attention": TOP_K, "attention_layers": "all",
        "attention_heads": None, "attention_mode": mode, "attention_prompt": False, "attention_stride": 1,
        "attention_max_tokens": 4096, "attention_mask_prefix": 0, "attention_spans": _SPANS,
        "attention_self_check": True,
    }  # fmt: skip
    client.post(path, {**plain, "max_tokens": 1})  # from now on the prefix cache knows the prompt, in all four
    without, whole, stream, again = Reply(), Reply(), Reply(), Reply()
    without.add(client.post(path, plain))
    whole.add(client.post(path, ask))
    for chunk in client.stream(path, {**ask, "stream": True, "stream_options": {"include_usage": True}}):
        stream.add(chunk)
    again.add(client.post(path, plain))
    findings.check("a request that does not ask gets no records", without.entries is again.entries is None)
    for reply in (again, whole, stream):
        findings.check("the tokens are the same with and without", reply.said == without.said, f"{path}: {reply.said}")
    worst: list[float] = []
    for reply, how in ((whole, path), (stream, f"{path}, streamed")):
        if findings.check("records came", reply.entries and not reply.error, f"{how}: {reply.error or 'none'}"):
            check_entries(findings, reply, how, layers, raw=mode == "raw")
            worst += _self_checks(findings, reply, how, REBUILT.get(str(dtype), max(REBUILT.values())))
    if whole.entries and stream.entries:
        far = _difference(whole.entries, stream.entries)
        allowed = REPEATED.get(str(dtype), max(REBUILT.values()))
        findings.check("the stream has the records of the whole answer", far <= allowed, f"{path}: {far:.1e}")
        report.sections["answers"][f"{path}: stream - whole"] = f"{far:.1e} (allowed {allowed:.0e})"
    if worst:
        most = max(worst)
        bound = REBUILT.get(str(dtype), max(REBUILT.values()))
        report.sections["answers"][f"{path}: self-check"] = f"{most:.1e} (allowed {bound:.0e})"
    return f"{len(whole.entries or ())} tokens x {len(layers) if layers else '?'} layers"


def _self_checks(findings: Findings, reply: Reply, how: str, bound: float) -> list[float]:
    """The errors that the server tells; a missing one is a failure."""
    findings.check("the server checks itself", reply.checks, f"{how}: no attention_self_check in the reply")
    found = [check.get("max_error") if isinstance(check, dict) else None for check in reply.checks]
    for error in found:
        good = isinstance(error, float | int) and 0 <= error <= bound
        findings.check("the rebuilt attention output is the engine's", good, f"{how}: {error} (allowed {bound:.0e})")
    return [float(error) for error in found if isinstance(error, float | int)]


def _bad_input(client: Client, model: str, layers: Any, findings: Findings) -> None:
    bad = [*_BAD, *([("attention_layers", [len(layers) + 10**6])] if layers else [])]
    for name, value in bad:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "return_attention_tokens": True, name: value}
        try:
            client.post("/v1/completions", body)
            seen = "it was accepted"
        except ServerError as error:
            if error.status is None:
                raise
            seen = "" if error.status == 400 and name in str(error) else str(error)
        findings.check("bad input is HTTP 400 that names the field", not seen, f"{name}={value!r}: {seen}")


def check_entries(findings: Findings, reply: Reply, how: str, layers: Sequence[int] | None, *, raw: bool) -> None:
    """Everything that must hold between the numbers of a reply's entries."""
    entries = reply.entries or []
    tokens = reply.tokens if reply.ids is None else len(reply.ids)
    findings.check("one entry for each token", len(entries) == tokens, f"{how}: {len(entries)} for {tokens} tokens")
    for step, entry in enumerate(entries):
        where = f"{how}, token {step}"
        place = (entry.get("decode_step"), entry.get("query_position"))
        first = entries[0]["query_position"] if reply.prompt is None else reply.prompt - 1
        findings.check("entries stand at their tokens", place == (step, first + step), f"{where}: {place}")
        findings.check("the zone has a name", entry.get("manifold") in ZONE_NAMES, f"{where}: {entry.get('manifold')}")
        if not raw:
            numbers = np.array(entry["fingerprint"], np.float64)
            findings.check(
                "a fingerprint has 20 numbers in [0, 1]", numbers.shape == (fp.SIZE,) and _within(numbers), where
            )
            continue
        try:
            record = TokenRecord.from_dict(entry)
        except RecordError as error:
            findings.check("entries can be read", False, f"{where}: {error}")
            continue
        findings.check("entries can be read", True)
        if layers is not None:
            findings.check("all layers are there", record.layers == tuple(layers), f"{where}: {record.layers}")
        _check_record(findings, entry, record, where)


def _check_record(findings: Findings, entry: Mapping[str, Any], record: TokenRecord, where: str) -> None:
    position, numbers = record.query_position, record.fingerprints.astype(np.float64)
    histogram, total = numbers[:, fp.HISTOGRAM], numbers[:, fp.HISTOGRAM].sum(axis=1)
    for i, layer in enumerate(record.layers):
        at = f"{where}, layer {layer}"
        kept = record.token_positions[i] >= 0
        places, scores = record.token_positions[i][kept], record.attention_scores[i][kept].astype(np.float64)
        findings.check(
            "positions are different and not after the token",
            len(set(places.tolist())) == len(places) and (places <= position).all(),
            f"{at}: {places.tolist()} at {position}",
        )
        findings.check("scores are in [0, 1]", _within(scores), f"{at}: {scores.tolist()}")
        findings.check("scores descend", (np.diff(scores) <= 0).all(), f"{at}: {scores.tolist()}")
        mass = float(entry["layers"][str(layer)]["topk_mass"])
        findings.check("topk_mass is the sum of the scores", abs(mass - scores.sum()) <= _EXACT, f"{at}: {mass}")
        findings.check(
            f"{TOP_K} positions, or all of the mass",
            len(places) == TOP_K or (len(places) < TOP_K and mass >= total[i] - _SUM),
            f"{at}: {len(places)} positions with {mass} of {total[i]}",
        )
        findings.check(
            "bins and entropy are in [0, 1], and bins sum to at most 1",
            _within(numbers[i]) and 0 < total[i] <= 1 + _SUM,
            f"{at}: sum {total[i]}, entropy {numbers[i][fp.ENTROPY]}",
        )
        reach = fp.bin_of(position)
        findings.check("no mass before position 0", histogram[i][reach + 1 :].sum() <= _EXACT, f"{at}: at {position}")
        if (places <= position).all():
            bins = [fp.bin_of(int(position - place)) for place in places]
            reported = np.bincount(bins, scores, fp.BINS)
            findings.check("bins hold the reported scores", (reported <= histogram[i] + _SUM).all(), at)
        spans = dict(zip(record.span_names, record.span_mass[i].tolist(), strict=True))
        if findings.check("span masses are there", set(spans) == set(_SPANS), f"{at}: {sorted(spans)}"):
            parts = spans[_HEAD] + spans[_REST]
            findings.check("span masses add up to the bins", abs(parts - total[i]) <= _SUM, f"{at}: {parts}")
            sink = dict(zip(places.tolist(), scores.tolist(), strict=True)).get(0, spans[_SINK])
            findings.check("a span of one position has its score", abs(sink - spans[_SINK]) <= _SUM, f"{at}: {sink}")
    again = fp.assemble(histogram, numbers[:, fp.ENTROPY])
    findings.check("local, mid and long mass are sums of bins", np.abs(again - numbers).max() <= _SUM, where)
    off = float(np.abs(np.array(entry["fingerprint"], np.float64) - numbers.mean(axis=0)).max())
    findings.check("the entry's fingerprint is the mean over its layers", off <= _EXACT, f"{where}: off by {off:.1e}")
    named = {name: record.span_mass[:, i].mean() for i, name in enumerate(record.span_names)}
    off = max((abs(entry["spans"][name] - mass) for name, mass in named.items()), default=0.0)
    findings.check("the entry's spans are the mean over its layers", off <= _EXACT, f"{where}: off by {off:.1e}")


def _difference(whole: Sequence[Mapping[str, Any]], stream: Sequence[Mapping[str, Any]]) -> float:
    """Largest difference of a number that both tell; infinity where they tell of other tokens or layers."""
    if len(whole) != len(stream):
        return math.inf
    worst = 0.0
    for one, other in zip(whole, stream, strict=True):
        if any(one[name] != other[name] for name in ("decode_step", "query_position", "think_phase")):
            return math.inf
        if one.get("layers", {}).keys() != other.get("layers", {}).keys():
            return math.inf
        pairs = [(one["fingerprint"], other["fingerprint"])]
        for layer, numbers in one.get("layers", {}).items():
            mine, theirs = (dict(_scores(x)) for x in (numbers, other["layers"][layer]))
            both = [place for place in mine if place in theirs]  # near the k-th score there may be others
            pairs.append(([mine[p] for p in both], [theirs[p] for p in both]))
            pairs.append((numbers["fingerprint"], other["layers"][layer]["fingerprint"]))
            pairs.append(([numbers["topk_mass"]], [other["layers"][layer]["topk_mass"]]))
        worst = max(worst, *(float(np.abs(np.subtract(a, b)).max(initial=0)) for a, b in pairs))
    return worst


def _scores(layer: Mapping[str, Any]) -> Iterable[tuple[int, float]]:
    return zip(layer["token_positions"], layer["attention_scores"], strict=True)


def _within(numbers: np.ndarray) -> bool:
    return bool(((numbers >= 0) & (numbers <= 1 + _EXACT)).all())

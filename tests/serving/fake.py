"""A server engine of random tensors: real attention over a real paged cache, in milliseconds.

Each token of a request has queries, keys and values that depend on the token and the layer alone. `Engine.run`
computes a pass as servers do: some tokens of each request, pages anywhere in the pool, all layers one after the
other. Ranks are threads, each with its part of the heads or of the layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from attnhook.capture.ranks import Ranks
from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import PagedKeys
from attnhook.options import RequestOptions
from attnhook.plugins.engine import Computed, EngineAdapter, LayerShape, LayerView, ModelShape
from attnhook.record.token_record import TokenRecord
from attnhook.serving.wire import Share, pack_options
from attnhook.serving.worker import Worker

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY = 4, 4, 2, 8, 50
PAGE, PAGES, SCALE = 4, 64, DIM**-0.5

_seed = torch.Generator().manual_seed(0)
QUERIES = torch.randn(LAYERS, VOCABULARY, HEADS, DIM, generator=_seed)
KEYS = torch.randn(LAYERS, VOCABULARY, KV_HEADS, DIM, generator=_seed)
VALUES = torch.randn(LAYERS, VOCABULARY, KV_HEADS, DIM, generator=_seed)
_ORDER = torch.randperm(PAGES, generator=_seed).tolist()  # in which pages are given out

T = TypeVar("T")


def probabilities(tokens: Sequence[int], layer: int, heads: slice = slice(None)) -> torch.Tensor:
    """[n, n] by the definition: mean over heads of softmax(q k / sqrt(D)), row by row."""
    q = QUERIES[layer, list(tokens)]
    k = KEYS[layer, list(tokens)].repeat_interleave(HEADS // KV_HEADS, dim=1)
    z = SCALE * torch.einsum("qhd,khd->hqk", q, k)
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    return torch.softmax(z.masked_fill(hidden, -torch.inf), dim=-1)[heads].mean(0)


@dataclass
class Request:
    """One request; ``prompt`` tokens of it came from the client."""

    name: str
    tokens: list[int]
    prompt: int
    options: RequestOptions | None = None  # None: it does not ask
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # tokens that are in the cache

    @property
    def packed(self) -> str:
        assert self.options is not None
        return str(pack_options(self.options))


class Part(NamedTuple):
    """Some tokens of one request, as one pass computes them."""

    request: Request
    tokens: int
    drafts: int = 0  # of them so many are speculated


class Call(NamedTuple):
    """One attention call."""

    layer: int
    q: torch.Tensor | None  # [N, heads * D], as engines have it
    out: torch.Tensor | None
    table: torch.Tensor


class Adapter(EngineAdapter[list[Part], Call]):
    """Reads an `Engine`; tests break it by its attributes."""

    engine = "Fake"

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self.of, self.ranks = engine, ranks
        self.break_rows: Callable[[list[Part]], None] = lambda batch: None
        self.break_keys: Callable[[Call], None] = lambda call: None

    def shape(self) -> ModelShape:
        layers = {number: LayerShape(self.of.heads, DIM) for number in self.of.layers}
        return ModelShape(
            "fake-4",
            layers,
            torch.float32,
            torch.device("cpu"),
            graphs=False,
            graph_rows=8,
            ranks=self.ranks,
            kv_heads=KV_HEADS,
        )

    def rows(self, batch: list[Part]) -> Iterator[Computed]:
        start = source = 0
        for part in batch:
            request = part.request
            if request.options is not None:
                end = request.computed + part.tokens
                sampled = 0 if end < request.prompt else 1 + part.drafts
                yield Computed(
                    request.name, request.packed, source, start, request.computed, part.tokens, sampled,
                    request.prompt - 1,
                )  # fmt: skip
            start, source = start + part.tokens, source + 1
        self.break_rows(batch)

    def queries(self, call: Call) -> torch.Tensor:
        assert call.q is not None
        return call.q.view(len(call.q), self.of.heads, DIM)

    def keys(self, call: Call) -> LayerView:
        self.break_keys(call)
        softmax = {"scale": SCALE, "softcap": 0.0, "window": -1, "sinks": None, "alibi_slopes": None}
        k, v = (
            PagedKeys(pool, self.of.table, PAGE, (pool.stride(0), pool.stride(1), pool.stride(2), 1), self.of.kv_heads)
            for pool in (self.of.k[call.layer], self.of.v[call.layer])
        )
        return LayerView(k, v, softmax)

    def output(self, call: Call) -> torch.Tensor | None:
        return None if call.out is None else call.out.view(len(call.out), self.of.heads, DIM)

    def without_tensors(self, call: Call) -> Call:
        return call._replace(q=None, out=None)


class Engine:
    """One rank of the engine: ``rank`` of ``size`` has a part of the heads, ``stage`` of ``stages`` of the layers."""

    def __init__(self, ranks: Ranks | None = None, *, avoids_graphs: bool = False) -> None:
        ranks = Ranks() if ranks is None else ranks
        self.heads, self.kv_heads = HEADS // ranks.size, KV_HEADS // ranks.size
        self._q = slice(ranks.rank * self.heads, (ranks.rank + 1) * self.heads)
        self._kv = slice(ranks.rank * self.kv_heads, (ranks.rank + 1) * self.kv_heads)
        each = LAYERS // ranks.stage_count
        self.layers = range(ranks.stage * each, (ranks.stage + 1) * each)
        self.k, self.v = ({n: torch.zeros(PAGES, PAGE, self.kv_heads, DIM) for n in self.layers} for _ in range(2))
        self._free = iter(_ORDER)
        self.table = torch.zeros(0, 0, dtype=torch.int32)
        self.adapter = Adapter(self, ranks)
        self.adapter.can_avoid_graphs = avoids_graphs
        self.worker = Worker(self.adapter)

    def run(self, *parts: Part | tuple[Request, int]) -> dict[str, Share]:
        """Compute a pass; what comes of it for each request that asks."""
        batch = [Part(*part) for part in parts]
        self.worker.rest()
        asking = [part.request.name for part in batch if part.request.options is not None]
        if asking:
            self.worker.begin(batch, asking)
        self._place(batch)
        for layer in self.layers:
            if not self.worker.replays or layer not in (self.worker.kept or ()):
                self._attend(layer, batch)
            else:  # a graph runs the same, and writes the queries where they are kept
                assert self.worker.kept is not None
                self.worker.kept.keep(layer, self.adapter.queries(self._attended(layer, batch)))
        shares = self.worker.finish()
        for part in batch:
            part.request.computed += part.tokens - part.drafts
        return {name: Share.unpack(packed) for name, packed in shares.items()}

    def _place(self, batch: list[Part]) -> None:
        for request, tokens, _ in batch:
            while len(request.pages) * PAGE < request.computed + tokens:
                request.pages.append(next(self._free))
        most = max(len(request.pages) for request, _, _ in batch)
        rows = [[*request.pages, *[0] * (most - len(request.pages))] for request, _, _ in batch]
        self.table = torch.tensor(rows, dtype=torch.int32)

    def _attend(self, layer: int, batch: list[Part]) -> None:
        self.worker.see(layer, self._attended(layer, batch))

    def _attended(self, layer: int, batch: list[Part]) -> Call:
        """Keys and values go into the pool, and every row attends to those up to its own."""
        q, out = [], []
        for request, tokens, _ in batch:
            end = request.computed + tokens
            for position in range(request.computed, end):
                page, slot = request.pages[position // PAGE], position % PAGE
                self.k[layer][page, slot] = KEYS[layer, request.tokens[position], self._kv]
                self.v[layer][page, slot] = VALUES[layer, request.tokens[position], self._kv]
            for position in range(request.computed, end):
                one = QUERIES[layer, request.tokens[position], self._q]
                seen = request.tokens[: position + 1]
                k, v = (x[layer, seen, self._kv].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (KEYS, VALUES))
                p = torch.softmax(SCALE * torch.einsum("hd,khd->hk", one, k), dim=-1)
                q.append(one)
                out.append(torch.einsum("hk,khd->hd", p, v))
        return Call(layer, torch.stack(q).flatten(1), torch.stack(out).flatten(1), self.table)


class Board:
    """Where ranks that are threads leave each other what they say."""

    def __init__(self, size: int, stages: int) -> None:
        self.size, self.stages = size, stages
        self._barriers = {("stage", n): threading.Barrier(size, timeout=20) for n in range(stages)}
        self._barriers |= {("rank", n): threading.Barrier(stages, timeout=20) for n in range(size)}
        self._said: dict[tuple[str, int], dict[int, Any]] = {group: {} for group in self._barriers}

    def exchange(self, group: tuple[str, int], place: int, value: T) -> list[T]:
        """What all members of a group say, in their order."""
        said, barrier = self._said[group], self._barriers[group]
        said[place] = value
        barrier.wait()
        found = [said[n] for n in sorted(said)]
        barrier.wait()
        return found


class ThreadRanks(Ranks):
    """`Ranks` of threads of one process; ``board.lose`` makes one that fails as lost processes do."""

    def __init__(self, board: Board, rank: int, stage: int) -> None:
        super().__init__()
        self.size, self.rank, self.stage_count, self.stage = board.size, rank, board.stages, stage
        self._board = board

    def everywhere(self, heads: dict[int, int]) -> dict[int, int]:
        stages = self._board.exchange(("rank", self.rank), self.stage, heads)
        return {layer: count * self.size for stage in stages for layer, count in sorted(stage.items())}

    def agree(self, what: int) -> bool:
        return len({what, *self._in_stage(what)}) == 1

    def total(self, tensor: torch.Tensor) -> bool:
        parts = self._in_stage(tensor.clone())
        if self.rank == 0:
            tensor.copy_(torch.stack(parts).sum(0))
        return self.rank == 0

    def collect(self, mine: Any) -> list[Any]:
        said = self._in_stage(mine)
        return said if self.rank == 0 else []

    def join(self, mine: Any) -> list[Any]:
        said = self._board.exchange(("rank", self.rank), self.stage, mine)
        return said if self.stage == self.stage_count - 1 else []

    def _in_stage(self, value: T) -> list[T]:
        return self._board.exchange(("stage", self.stage), self.rank, value)


def on_ranks(size: int, stages: int, work: Callable[[Engine], dict[str, Share]]) -> dict[str, Share]:
    """Let every rank of an engine do the same work; what the one that answers has."""
    board = Board(size, stages)

    def run(rank: int, stage: int) -> dict[str, Share]:
        return work(Engine(ThreadRanks(board, rank, stage)))

    with ThreadPoolExecutor(size * stages) as pool:
        running = [pool.submit(run, rank, stage) for stage in range(stages) for rank in range(size)]
        results = [one.result(timeout=60) for one in running]
    answering = [result for result in results if result]
    if len(answering) > 1:
        raise UnsupportedError(f"{len(answering)} ranks answered")
    return answering[0] if answering else {}


def records(rows: Sequence[bytes]) -> list[TokenRecord]:
    """The records of packed rows; those that were not wanted are left out."""
    return [TokenRecord.from_bytes(row) for row in rows if row]


def check(request: Request, found: TokenRecord) -> None:
    """A record against the definition: positions, scores, histogram's sum."""
    p = found.query_position
    for n, layer in enumerate(found.layers):
        row = probabilities(request.tokens[: p + 1], layer)[p]
        kept = found.token_positions[n] >= 0
        positions, scores = found.token_positions[n][kept].tolist(), found.attention_scores[n][kept]
        assert torch.allclose(torch.from_numpy(scores.copy()), row[positions], atol=1e-6)
        best = torch.sort(row, descending=True).values[: len(positions)]
        assert torch.allclose(torch.from_numpy(scores.copy()), best, atol=1e-6)
        assert abs(float(found.fingerprints[n][4:].sum()) - 1) < 1e-5

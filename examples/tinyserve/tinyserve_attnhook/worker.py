"""In each rank: the model and its passes as attnhook's engine kit sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from attnhook.plugins import Computed, EngineAdapter, LayerShape, LayerView, ModelShape, PagedKeys, Ranks
from attnhook.serving import KEY, Share, Worker, safely, warm_up
from tinyserve_attnhook.requests import arrived

_WAIT = timedelta(seconds=60)  # longest that one rank waits for what another has captured


class Call(NamedTuple):
    """One layer's attention in one pass."""

    layer: int
    q: torch.Tensor
    output: torch.Tensor


class Adapter(EngineAdapter[Any, Call]):
    """Reads a `tinyserve.model.Model` and its `Batch`es."""

    engine = "tinyserve"
    contract = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self.table = torch.zeros(0, 0, dtype=torch.int32)  # the pages of each request that asks

    def shape(self) -> ModelShape:
        model, ranks = self.model, Ranks()
        if model.size > 1:
            own = dist.new_group(timeout=_WAIT)  # what fails in it does not hurt the engine's
            ranks = Ranks(tensor=own, tensor_cpu=own)
        layers = dict.fromkeys(range(model.layers), LayerShape(model.heads, model.dim))
        return ModelShape(model.name, layers, torch.float32, torch.device("cpu"), ranks=ranks)

    def rows(self, batch: Any) -> Iterator[Computed]:
        pages: list[list[int]] = []
        start = 0
        for part in batch.parts:
            if KEY in part.extra:
                yield Computed(
                    part.request, part.extra[KEY], len(pages), start, part.first, len(part.tokens), int(part.samples),
                    part.prompt - 1,
                )  # fmt: skip
                pages.append(part.pages)
            start += len(part.tokens)
        width = max(map(len, pages))
        self.table = torch.tensor([[*some, *[0] * (width - len(some))] for some in pages], dtype=torch.int32)

    def queries(self, call: Call) -> torch.Tensor:
        return call.q

    def keys(self, call: Call) -> LayerView:
        keys, values = (
            PagedKeys(cache[call.layer], self.table, cache.shape[2], cache[call.layer].stride(), self.model.kv_heads)
            for cache in (self.model.keys, self.model.values)
        )
        return LayerView(keys, values, {"scale": self.model.dim**-0.5})

    def output(self, call: Call) -> torch.Tensor:
        return call.output


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Model.__init__``: a worker for each model."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from tinyserve_attnhook import hooks

        original(self, *args, **kwargs)
        hooks.check_in_place(("worker.",))
        self.attnhook = Worker(Adapter(self))
        warm_up()

    return __init__


def wrap_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``Model.forward``: one pass, whose rows wait for their tokens afterwards."""

    @wraps(original)
    def forward(self: Any, batch: Any) -> torch.Tensor:
        worker: Worker[Any, Call] | None = getattr(self, "attnhook", None)
        if worker is None:  # made before the hooks were there
            return original(self, batch)
        worker.rest()
        worker.forget(batch.ended)
        asking = [part.request for part in batch.parts if KEY in part.extra]
        if asking:
            worker.begin(batch, asking)
        try:
            logits = original(self, batch)
        except BaseException:
            worker.abandon()
            raise
        for request, packed in (safely(worker.finish) or {}).items():
            arrived(request, Share.unpack(packed))
        return logits

    return forward


def wrap_attend(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``Model.attend``: the queries of a layer whose keys are in the cache."""

    @wraps(original)
    def attend(self: Any, layer: int, q: torch.Tensor, batch: Any) -> torch.Tensor:
        output = original(self, layer, q, batch)
        worker: Worker[Any, Call] | None = getattr(self, "attnhook", None)
        if worker is not None and worker.sees:
            worker.see(layer, Call(layer, q, output))
        return output

    return attend

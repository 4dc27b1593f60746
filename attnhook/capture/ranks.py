"""The other workers that hold parts of the model, and what they must tell each other about a captured pass.

Tensor-parallel ranks have a part of every layer's heads: their attention is added up before anything is
selected from it. Pipeline stages have a part of the layers: their records are joined in the last stage, whose
first rank answers for all. A rank on which something goes wrong keeps in step with the others and says so.
One that falls out of step all the same must not stop the engine: what is exchanged here goes through groups of our own,
in which nobody waits longer than `WAIT`, and after that nobody waits again.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from attnhook.errors import UnsupportedError

logger = logging.getLogger("attnhook")

T = TypeVar("T")

#: Longest that one rank waits for another. The first call of a kernel may be compiling on it.
WAIT = timedelta(seconds=60)
_TAG = 0x6174  # ours among an engine's own messages between stages


class Ranks:
    """Groups of torch.distributed that this worker is in; without any it is alone.

    Parameters
    ----------
    tensor
        Ranks that share every layer, on the device of the queries.
    tensor_cpu
        The same ranks, for tensors in main memory.
    stages
        Ranks of one place in all pipeline stages, in order, for tensors in main memory.
    """

    def __init__(self, *, tensor: Any = None, tensor_cpu: Any = None, stages: Any = None) -> None:
        self._tensor, self._tensor_cpu, self._stages = tensor, tensor_cpu, stages
        self.size = 1 if tensor is None else dist.get_world_size(tensor)
        self.rank = 0 if tensor is None else dist.get_rank(tensor)
        self.stage_count = 1 if stages is None else dist.get_world_size(stages)
        self.stage = 0 if stages is None else dist.get_rank(stages)
        #: Why nothing is exchanged any more, once the ranks have lost each other.
        self.lost: str | None = None
        self._sending: list[tuple[Any, torch.Tensor]] = []

    @classmethod
    def of(cls, tensor: Any, stages: Any) -> Ranks:
        """From an engine's tensor and pipeline groups, which have world_size, device_group and cpu_group.

        All workers call it. Sums stay on the engine's own group where that is on a GPU.
        """
        own = _own(tensor.cpu_group) if tensor.world_size > 1 else None
        on_cpu = own is not None and dist.get_backend(tensor.device_group) == "gloo"
        return cls(
            tensor=None if own is None else own if on_cpu else tensor.device_group,
            tensor_cpu=own,
            stages=_own(stages.cpu_group) if stages.world_size > 1 else None,
        )

    @property
    def answers(self) -> bool:
        """Whether this worker's answer is the engine's."""
        return self.rank == 0 and self.stage == self.stage_count - 1

    def everywhere(self, heads: dict[int, int]) -> dict[int, int]:
        """Layer -> query heads of the whole model, from what each worker has of it; all workers call it once."""
        found = [heads]
        if self.stage_count > 1:
            found = [{}] * self.stage_count
            dist.all_gather_object(found, heads, group=self._stages)
        whole = {layer: count * self.size for stage in found for layer, count in stage.items()}
        return dict(sorted(whole.items()))

    def agree(self, what: int) -> bool:
        """Whether all ranks of this stage come with the same number, which is not negative."""
        if self.size == 1:
            return what >= 0
        seen = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        mine = torch.tensor([what], dtype=torch.int64)
        self._together(lambda: dist.all_gather(seen, mine, group=self._tensor_cpu))
        return what >= 0 and all(int(x) == what for x in seen)

    def total(self, tensor: torch.Tensor) -> bool:
        """Add a tensor up over the ranks of this stage; True in the first, which has the sum."""
        if self.size > 1:
            first = dist.get_global_rank(self._tensor, 0)
            self._together(lambda: dist.reduce(tensor, first, group=self._tensor))
        return self.rank == 0

    def collect(self, mine: Any) -> list[Any]:
        """What every rank of this stage has to say, in the first rank; empty in the others."""
        if self.size == 1:
            return [mine]
        said: list[Any] | None = [None] * self.size if self.rank == 0 else None
        first = dist.get_global_rank(self._tensor_cpu, 0)
        self._together(lambda: dist.gather_object(mine, said, first, group=self._tensor_cpu))
        return said or []

    def join(self, mine: Any) -> list[Any]:
        """What the first rank of every stage has to say, in the last stage; empty in the others."""
        if self.stage_count == 1:
            return [mine]
        if self.stage == self.stage_count - 1:
            return [*self._together(lambda: [self._receive(stage) for stage in range(self.stage)]), mine]
        self._together(lambda: self._send(mine))
        return []

    def _together(self, exchange: Callable[[], T]) -> T:
        """What all ranks do at the same time. Raises UnsupportedError where one of them did not, now or before."""
        if self.lost is None:
            try:
                return exchange()
            except RuntimeError as error:  # torch.distributed's, of a wait that ended without the others
                reason = str(error).splitlines()[0][:200]
                self.lost = (
                    f"the workers of this model lost each other in capturing ({reason}) and capture no more: restart "
                    "the server, whose log says why"
                )
                logger.error("attnhook: %s", self.lost)
        raise UnsupportedError(self.lost)

    def _send(self, value: Any) -> None:
        """To the last stage, which need not listen yet: the next pass may start before it has got here."""
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        last = dist.get_global_rank(self._stages, self.stage_count - 1)
        for part in (torch.tensor([len(data)]), data):
            self._sending.append((dist.isend(part, last, group=self._stages, tag=_TAG), part))

    def _receive(self, stage: int) -> Any:
        source = dist.get_global_rank(self._stages, stage)
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, source, group=self._stages, tag=_TAG)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, source, group=self._stages, tag=_TAG)
        return pickle.loads(data.numpy().tobytes())


def _own(group: Any) -> Any:
    """A group of the same ranks that is ours alone: an exchange that fails in it does not hurt the engine's."""
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, timeout=WAIT, backend="gloo", use_local_synchronization=True)

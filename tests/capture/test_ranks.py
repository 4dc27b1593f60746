"""Workers that wait for each other, and one that does not come."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment

# rank 1 leaves after the first exchange; rank 0 goes on as an engine would
PROGRAM = """
import datetime, os, sys, time
import torch, torch.distributed as dist
from types import SimpleNamespace
from attnhook.errors import UnsupportedError
from attnhook.serving import ranks

ranks.WAIT = datetime.timedelta(seconds=3)
rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
engine = dist.new_group([0, 1], backend="gloo")
tensor = SimpleNamespace(world_size=2, cpu_group=engine, device_group=engine)
ours = ranks.Ranks.of(tensor, SimpleNamespace(world_size=1))
assert ours.agree(7) and not ours.agree(rank)
total = torch.full((3,), rank + 1.0)
if ours.total(total):
    assert total.tolist() == [3.0] * 3
assert ours.collect(rank) == ([0, 1] if rank == 0 else [])
dist.barrier(engine)
if rank == 0:
    began = time.monotonic()
    for exchange in (lambda: ours.agree(7), lambda: ours.total(total), lambda: ours.collect(1)):
        try:
            exchange()
        except UnsupportedError as error:
            assert "lost each other" in str(error), error
        else:
            raise SystemExit("rank 0 exchanged something with nobody")
    took = time.monotonic() - began
    assert took < 20, took
seen = [torch.zeros(1), torch.zeros(1)]
dist.all_gather(seen, torch.tensor([float(rank)]), group=engine)  # the engine's own exchange goes on
assert [float(x) for x in seen] == [0.0, 1.0]
print("done", flush=True)
os._exit(0)  # torch may abort while it takes a group down that has timed out
"""


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [worker.communicate(timeout=100)[0] for worker in workers]
    assert [text.strip().splitlines()[-1] for text in said] == ["done", "done"], said

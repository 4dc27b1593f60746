"""Tensor parallelism: rank 0 has the scheduler and sends each batch to the other ranks, which are its children."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tinyserve.model import Batch, Model, check


def start(path: str, name: str, pages: int, size: int) -> Model:
    """The first rank's model; with ``size`` > 1 the others run in processes of their own, which end with this one."""
    if size == 1:
        return Model(path, name, pages)
    check(path, size)  # before there are other processes
    store = os.path.join(tempfile.mkdtemp(prefix="tinyserve"), "store")
    for rank in range(1, size):
        torch.multiprocessing.get_context("spawn").Process(
            target=_follow, args=(path, name, pages, rank, size, store), daemon=True
        ).start()
    return _join(path, name, pages, 0, size, store)


def send(batch: Batch) -> None:
    """Tell the other ranks what is computed next."""
    if dist.is_initialized():
        dist.broadcast_object_list([batch])


def _join(path: str, name: str, pages: int, rank: int, size: int, store: str) -> Model:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nobody outside this machine is listened to
    # an idle server waits as long as it takes
    group: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(days=365)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **group)
    return Model(path, name, pages, rank, size)


def _follow(path: str, name: str, pages: int, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    model = _join(path, name, pages, rank, size, store)
    while True:
        batches: list[Any] = [None]
        dist.broadcast_object_list(batches)
        model.forward(batches[0])

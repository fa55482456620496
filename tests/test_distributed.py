"""DDP and FSDP2 over gloo, two processes: one plan, one basis, and the losses of a single process with the global batch."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import actpass

from . import models
from .helpers import eager_actcomp

pytestmark = pytest.mark.distributed

STEPS, WORLD = 3, 2
OPTIONS = {"method": "haar", "rank": 8, "profitable_only": False}


def batch() -> torch.Tensor:
    return torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))


def train(run: nn.Module, parameters: Any, x: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = run(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def compile_blocks(model: models.Transformer) -> None:
    """FSDP2's way: each layer a region of its own, and the rest as it is."""
    for block in model.blocks:
        block.compile(backend=eager_actcomp(OPTIONS))


def ddp(model: models.Transformer) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: models.Transformer) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def worker(rank: int, kind: str, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model, _ = models.transformer()
    wrapped = ddp(model) if kind == "ddp" else fsdp2(model)
    if kind == "ddp":
        run: Any = torch.compile(wrapped, backend=eager_actcomp(OPTIONS))
    else:
        compile_blocks(model)
        run = wrapped
    losses = train(run, wrapped.parameters(), batch().chunk(WORLD)[rank])
    total = torch.tensor(losses)
    dist.all_reduce(total)
    report = actpass.report(wrapped)
    projected = sum(s.method is not None for r in report.regions for s in r.sites)
    result = {"losses": (total / WORLD).tolist(), "hash": report.plan_hash, "active": report.active, "projected": projected}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_with_the_global_batch(kind: str, tmp_path: Path):
    model, _ = models.transformer()
    if kind == "ddp":
        want = train(torch.compile(model, backend=eager_actcomp(OPTIONS)), model.parameters(), batch())
    else:
        compile_blocks(model)
        want = train(model, model.parameters(), batch())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (kind, port, str(tmp_path)), nprocs=WORLD)
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(WORLD)]
    assert ranks[0]["hash"] == ranks[1]["hash"] != ""
    for result in ranks:
        assert result["active"]
        assert result["projected"] > 0
        # Another basis on one rank would move the losses by percents; the order of a float32 mean moves the last digits.
        assert result["losses"] == pytest.approx(want, rel=1e-5)

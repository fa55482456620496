"""Two processes over gloo agree on the plan and on the bases without a word, and learn what one process learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import actpass

from . import models
from .helpers import EPS, eager_actcomp, projected

RANK, STEPS, WORLD = 4, 3, 2
OPTIONS = {"method": "haar", "rank": RANK, "profitable_only": False}

# A rank's mean over half the batch, averaged over the ranks, sums in another order than one mean over all: sqrt(log2 T) EPS
# a reduction, and three steps carry it on through some 50 operators each: sqrt(150) = 12 EPS, twice that for the loss.
ROUNDING = 24 * EPS


def data(step: int) -> torch.Tensor:
    """The global batch of a step."""
    return torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, run: Any, part: slice) -> dict[str, Any]:
    """Three steps of SGD on a part of the global batch: losses, the last gradients in full, and what the report says."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = run(data(step)[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    grads = {n: p.grad for n, p in model.named_parameters()}
    report = actpass.report(model)
    return {
        "losses": torch.stack(losses),
        "grads": {n.removeprefix("module."): getattr(g, "full_tensor", lambda g=g: g)() for n, g in grads.items()},
        "plan_hash": report.plan_hash,
        "regions": len(report.regions),
        "active": all(r.active for r in report.regions),
        "projected": sorted(projected(report)),
        "text": str(report),
    }


def worker(rank: int, strategy: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    model, _ = models.transformer(layers=2)
    run = STRATEGIES[strategy](model)
    part = slice(rank * 4, rank * 4 + 4)
    result = train(run if isinstance(run, nn.Module) else model, run, part)
    dist.all_reduce(result["losses"], op=dist.ReduceOp.AVG if False else dist.ReduceOp.SUM)
    result["losses"] /= WORLD
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.05)
    return torch.compile(wrapped, backend=eager_actcomp(OPTIONS))


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return torch.compile(model, backend=eager_actcomp(OPTIONS))


def fsdp2_regional(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    for block in model.blocks:
        block.compile(backend=eager_actcomp(OPTIONS))
        fully_shard(block)
    fully_shard(model)
    return model


STRATEGIES = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2_regional": fsdp2_regional}


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(strategy: str, tmp_path: Path) -> None:
    model, _ = models.transformer(layers=2)
    want = train(model, torch.compile(model, backend=eager_actcomp(OPTIONS)), slice(None))
    torch.multiprocessing.spawn(worker, (strategy, str(tmp_path)), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(WORLD)]
    for got in ranks:
        print(got["text"], got["regions"], got["projected"], got["plan_hash"])
        print((got["losses"]-want["losses"])/want["losses"], want["losses"])
        print({n: int(torch.linalg.matrix_rank(g, rtol=1e-4)) for n,g in got["grads"].items() if g.dim()==2})
    assert 0

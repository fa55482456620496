"""DDP and FSDP2 over gloo, two processes: one plan, one basis, and the losses of one process with the global batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import actpass
from actpass.runtime.step_counter import STEP_COUNTER

from . import models
from .helpers import EPS, eager_actcomp, once, projected

pytestmark = pytest.mark.distributed

STEPS, WORLD, RANK = 3, 2, 4
OPTIONS = {"projection": "haar", "rank": RANK, "skip_unprofitable": False}

# A mean over half the batch, averaged over the ranks, adds in another order than a mean over all: log2(T) EPS / 2 = 4 EPS for
# T <= 256 terms. Three steps and some 50 operators each carry it into the loss: sqrt(150) EPS / 2 = 6 EPS more; twice that.
# Another basis on one rank moves the loss by percents.
LOSS = 20 * EPS


def transformer() -> tuple[nn.Module, torch.Tensor]:
    model, _ = models.transformer(layers=2)
    return model, torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))


def wide_mlp() -> tuple[nn.Module, torch.Tensor]:
    """Its second layer fills DDP's first bucket of 1 MiB, so that Dynamo cuts the graph in two before our backend sees it."""
    torch.manual_seed(0)
    return models.MLP(hidden=528), torch.randn(64, 24, generator=torch.Generator().manual_seed(3))


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=eager_actcomp(OPTIONS))


def by_layer(model: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=eager_actcomp(OPTIONS))
    return model


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)


def fsdp2(model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "ddp": (wide_mlp, ddp, whole),
    "fsdp2": (transformer, fsdp2, by_layer),
}


def train(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Three steps of SGD: the losses, the rank of every projected gradient in the last step, and what the report says."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    report = actpass.report(model)
    touched = tuple(projected(report))
    grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return {
        "losses": torch.stack(losses),
        "ranks": {bare(n): int(torch.linalg.matrix_rank(g, rtol=1e-4)) for n, g in grads.items() if n.endswith(touched)},
        "plan_hash": report.plan_hash,
        "inactive": [r.inactive_because for r in report.regions if not r.active],
    }


def bare(name: str) -> str:
    """A parameter's name without the wrappers' prefixes."""
    return name.replace("_orig_mod.", "").replace("module.", "")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for case, (make, distribute, compiled) in CASES.items():
        STEP_COUNTER.steps = 0
        model, x = make()
        result = train(compiled(distribute(model)), x.chunk(WORLD)[rank])
        dist.all_reduce(result["losses"])
        torch.save({**result, "losses": result["losses"] / WORLD}, Path(folder, f"{case}-{rank}.pt"))
    torch.save(learn(rank), Path(folder, f"learned-{rank}.pt"))
    torch.save(resume(rank, folder), Path(folder, f"resumed-{rank}.pt"))
    dist.destroy_process_group()


def learn(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """Fifty steps of DDP through learned subspaces, each rank with batches of its own."""
    torch.compiler.reset()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    model, _ = wide_mlp()
    options = {"projection": "prac", "rank": 2 * RANK, "refresh_interval": 3, "skip_unprofitable": False}
    run = torch.compile(ddp(model), backend=eager_actcomp(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(rank)
    for _ in range(50):
        optimizer.zero_grad()
        run(torch.randn(32, 24, generator=draw) * torch.linspace(1, 0.1, 24)).backward()
        optimizer.step()
    found = actpass.state_dict(run)["subspaces"]
    return {
        "subspaces": {f"{name}/{k}": s["state"] for name, own in found.items() for k, s in own.items()},
        "moves": {f"{name}/{k}": torch.tensor(s["moves"]) for name, own in found.items() for k, s in own.items()},
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
    }


def resume(rank: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters under FSDP2 after six steps, after three and three of a resumed run, and of one without the subspaces."""
    from torch.distributed.fsdp import fully_shard

    def start() -> tuple[Any, torch.optim.Optimizer]:
        torch.compiler.reset()
        STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), models.MLP())
        model[1].compile(
            backend=eager_actcomp({"projection": "prac", "rank": 2 * RANK, "refresh_interval": 2}, skip_unprofitable=False)
        )
        fully_shard(model[1])
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def go(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, torch.Tensor]:
        for i in steps:
            optimizer.zero_grad()
            model(torch.randn(32, 24, generator=torch.Generator().manual_seed(2 * i + rank))).backward()
            optimizer.step()
        return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}

    found = {"straight": go(*start(), range(6))}
    first, stepped = start()
    go(first, stepped, range(3))
    assert len(actpass.report(first).subspaces) == 3
    path = Path(folder, f"checkpoint-{rank}.pt")
    torch.save(actpass.state_dict(first), path)
    for name in ("resumed", "without"):
        model, optimizer = start()
        model.load_state_dict(first.state_dict())
        optimizer.load_state_dict(copy.deepcopy(stepped.state_dict()))
        state = torch.load(path, weights_only=True)
        actpass.load_state_dict(model, state if name == "resumed" else {**state, "subspaces": {}})
        found[name] = go(model, optimizer, range(3, 6))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their results, ``{case}-{rank}.pt``. They start once for all cases."""
    return once(tmp_path_factory, "ranks", lambda folder: torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_with_the_global_batch(case: str, folder: Path) -> None:
    make, _, compiled = CASES[case]
    model, x = make()
    want = train(compiled(model), x)
    first, second = (torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first["plan_hash"] == second["plan_hash"] != ""
    assert first["plan_hash"].count("-") == 1  # two regions: DDP's buckets; the layer that takes data, and the other
    for got in (first, second):
        assert not got["inactive"]
        assert float(((got["losses"] - want["losses"]) / want["losses"]).abs().max()) <= LOSS
        # the mean of two gradients in one subspace is in it; had the ranks drawn two, its rank were twice as high
        assert got["ranks"] == want["ranks"]
        assert set(got["ranks"].values()) == {RANK}


def test_ranks_learn_one_subspace_bit_for_bit(folder: Path) -> None:
    first, second = (torch.load(folder / f"learned-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert {name.partition("/")[0] for name in first["subspaces"]} == {"up.weight", "mid.weight"}
    assert all(int(m) > 16 for m in first["moves"].values())
    for what in ("subspaces", "parameters"):
        assert all(torch.equal(first[what][n], second[what][n]) for n in first[what])


def test_a_run_that_resumes_under_fsdp2_is_bitwise_the_one_that_was_not_stopped(folder: Path) -> None:
    for rank in range(WORLD):
        found = torch.load(folder / f"resumed-{rank}.pt", weights_only=True)
        assert all(torch.equal(found["resumed"][n], want) for n, want in found["straight"].items())
        assert not torch.equal(found["without"]["1.mid.weight"], found["straight"]["1.mid.weight"])  # or it could not fail

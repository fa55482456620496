"""Ranks compare their plans when they compile: equal ones pass, others are an error and no hang."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import actpass
from actpass.options import parse
from actpass.runtime import plan_agreement as ranks

from . import models
from .helpers import eager_actcomp, once

WORLD = 2
BUDGETS = {"equal": (0.5, 0.5), "different": (1.0, 0.2)}
SMALL = {"min_tensor_bytes": 0}


def tower() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    return models.Transformer(1), torch.randn(2, 16, 32)


def ddp(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend=eager_actcomp(options))


def fsdp2(model: Any, options: dict[str, Any]) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
        block.compile(backend=eager_actcomp(options))
    return fully_shard(model)


DISTRIBUTED: dict[str, Callable[..., nn.Module]] = {"ddp": ddp, "fsdp2": fsdp2}


def forward(distribute: Callable[..., nn.Module], budget: float) -> str:
    """What became of a forward: the plan's hash, or the error. No collective follows that a rank could wait in for another:
    each unshards, and compiles, and only then may raise."""
    torch.compiler.reset()
    model, x = tower()
    try:
        distribute(model, {**SMALL, "memory_budget": budget})(x.requires_grad_())
    except Exception as error:
        return f"error: {getattr(error, 'inner_exception', error)}"
    return actpass.report(model).plan_hash


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for kind, distribute in DISTRIBUTED.items():
        for case, budgets in BUDGETS.items():
            dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}-{case}", rank=rank, world_size=WORLD)
            found[f"{kind}-{case}"] = forward(distribute, budgets[rank])
            dist.destroy_process_group()
    torch.save(found, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank, what became of each case. Ends the processes, and fails, if they are not done in time."""

    def fill(folder: Path) -> None:
        context = torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD, join=False)
        done = any(context.join(timeout=1) for _ in range(240))
        for process in context.processes:
            process.terminate()
        assert done, "a rank hangs"

    folder = once(tmp_path_factory, "compared", fill)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_equal_plans_pass_and_different_ones_are_an_error_on_the_later_rank(kind: str, found: list[dict[str, str]]):
    first, second = (f[f"{kind}-equal"] for f in found)
    assert first == second
    assert len(first) == 16
    errors = [f[f"{kind}-different"] for f in found if f[f"{kind}-different"].startswith("error")]
    (error,) = errors
    assert "ranks have different plans for the region with the inputs (float32[2, 16, 32])" in error
    assert "of rank 0" in error
    assert "of rank 1" in error
    assert "norm1.weight" in error
    assert "options={'plan': path}" in error


def compiled(**options: Any) -> actpass.Report:
    torch.compiler.reset()
    model, inputs = models.mlp()
    try:
        torch.compile(model, backend=eager_actcomp(options))(**inputs)
    except Exception as error:
        raise getattr(error, "inner_exception", error) from None
    return actpass.report(model)


class Group:
    """A process group of two, of which this process plays every rank in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str = "gloo") -> None:
        self.store, self.rank = dist.HashStore(), 0
        facts = {"is_initialized": True, "get_world_size": 2, "get_backend": backend}
        for name, value in facts.items():
            monkeypatch.setattr(dist, name, lambda value=value: value)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(ranks, "get_default_store", lambda: self.store)

    def enter(self, rank: int) -> None:
        self.rank = rank
        ranks._compiled.clear()


@pytest.mark.slow
def test_the_nth_compilation_of_a_graph_is_compared_with_the_others_nth(monkeypatch: pytest.MonkeyPatch):
    group = Group(monkeypatch)
    for rank in range(2):
        group.enter(rank)
        assert compiled(**SMALL).plan_hash != compiled(policy="exact").plan_hash  # the same graph, under other options
    group.enter(1)
    with pytest.raises(actpass.PlanError, match=r"of rank 1, against .* of rank 0"):
        compiled(policy="exact")


def test_a_given_plan_makes_ranks_of_different_budgets_agree(monkeypatch: pytest.MonkeyPatch):
    plan = compiled(**SMALL).plan
    group = Group(monkeypatch)
    for rank, budget in enumerate(("1GiB", "2GiB")):
        group.enter(rank)
        assert compiled(plan=plan, memory_budget=budget).plan_hash == plan.hash


@pytest.mark.parametrize(("backend", "world"), [("fake", 2), ("gloo", 1)])
def test_without_other_ranks_nothing_is_compared(backend: str, world: int, monkeypatch: pytest.MonkeyPatch):
    Group(monkeypatch, backend)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(ranks, "get_default_store", None)  # a call of it would fail
    compiled(**SMALL)
    assert compiled(policy="exact").active


def test_a_store_that_is_gone_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    group = Group(monkeypatch)

    def gone(*_: Any) -> bytes:
        raise dist.DistNetworkError("connection reset")

    monkeypatch.setattr(group, "store", type("Store", (), {"compare_set": gone})())
    with pytest.warns(actpass.ActpassWarning, match="could not compare the plans of the ranks: connection reset"):
        compiled(**SMALL)


def test_an_automatic_budget_is_the_same_on_cards_that_have_nearly_as_much_free(monkeypatch: pytest.MonkeyPatch):
    total = 32 * 2**30

    def budget(free: int) -> Any:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
        return parse({"memory_budget": "auto"}).memory_budget

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget(30 * 2**30) == budget(30 * 2**30 - 300 * 2**20) == 29 * 2**30  # with 1.6 GiB left free
        assert budget(20 * 2**30) == 19 * 2**30

"""Low-rank gradients between two processes over gloo: what goes over the wire, and that it is the dense gradient's mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import actpass.optim
from actpass.distributed import reduce_low_rank
from actpass.low_rank_gradient import LowRankGradient
from actpass.memory.resident import resident
from actpass.runtime import regions
from actpass.runtime.step_counter import STEP_COUNTER

from . import models
from .helpers import EPS, eager_actcomp, error, once
from .test_distributed import bare

pytestmark = pytest.mark.distributed

WORLD, RANK = 2, 4
HAAR = {"projection": "haar", "rank": RANK, "skip_unprofitable": False}
# frozen: as it is with low-rank gradients, so that dense ones lie in the same bases
PRAC = {"projection": "prac", "rank": RANK, "skip_unprofitable": False, "activation_rank": None, "resample": "every_refresh"}
# A gradient is a sum over T = 32 tokens and 2 ranks that is taken in another order, and goes through a basis of N <= 40 rows
# before the mean and not after it: log2(64) + log2(40) roundings of EPS / 2 that add up at the worst, three such layers deep;
# twice that, for both are rounded.
ROUNDING = 3 * (6 + 6) * EPS


class Wire(TorchDispatchMode):
    """Bytes of every collective, DDP's from C++ among them: what is given to each."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.nbytes += sum(x.nbytes for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def batches(rank: int, count: int) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return (torch.randn(32, 24, generator=draw) for _ in range(count))


def outside(model: nn.Module, backend: Any, **how: Any) -> Any:
    return torch.compile(DistributedDataParallel(model, **how), backend=backend)


def inside(model: nn.Module, backend: Any, **how: Any) -> Any:
    return DistributedDataParallel(torch.compile(model, backend=backend), **how)  # pyright: ignore[reportArgumentType]


def train(
    rank: int, options: dict[str, Any], *, low_rank: bool, compiled: Callable[..., Any] = outside, micro: int = 1,
    optimizer: Callable[..., Any] | None = None, steps: int = 2, finalizes: bool = False, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """What the last step leaves: gradients (dense), coefficients, bytes of its collectives without and with synchronization."""
    torch.compiler.reset()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    torch.manual_seed(rank)  # of rank 0, DDP gives to all
    model = models.MLP()
    run = compiled(model, eager_actcomp({**options, **({"weight_gradient_format": "low_rank"} if low_rank else {})}), **how)
    ddp = getattr(run, "_orig_mod", run)
    if finalizes:
        ddp.require_manual_backward_finalization = True
    if low_rank:
        reduce_low_rank(run)
    step = (optimizer or torch.optim.SGD)(model.parameters(), lr=1e-2)
    silent, wire, norm = Wire(), Wire(), torch.zeros(())
    for _ in range(steps):
        step.zero_grad()
        silent, wire = Wire(), Wire()
        for i, x in enumerate(batches(rank, micro)):
            last = i == micro - 1
            with nullcontext() if last else ddp.no_sync():
                loss = run(x)
                with wire if last else silent:
                    loss.backward()
                    if finalizes:
                        ddp.finalize_backward()  # raises where the reducer has done it
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        step.step()
    gradients = {bare(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "gradients": {n: g.dense() if isinstance(g, LowRankGradient) else g for n, g in gradients.items()},
        "coefficients": {n: g.coefficients for n, g in gradients.items() if isinstance(g, LowRankGradient) and g.is_factored},
        "parameters": {bare(n): p.detach() for n, p in model.named_parameters()},
        "bytes": wire.nbytes,
        "silent_bytes": silent.nbytes,
        "norm": norm,
        "notes": len(actpass.report(run).notes),
    }


CASES: dict[str, dict[str, Any]] = {
    "seeded": {"options": HAAR},
    "accumulated": {"options": HAAR, "micro": 3, "compiled": inside},
    "find-unused": {"options": HAAR, "find_unused_parameters": True, "gradient_as_bucket_view": True, "micro": 2},
    "static-graph": {"options": HAAR, "static_graph": True, "compiled": inside},
    "learned": {"options": PRAC, "steps": 3, "micro": 2, "gradient_as_bucket_view": True},
}
if hasattr(DistributedDataParallel, "require_manual_backward_finalization"):  # torch 2.15
    CASES["finalized-by-the-caller"] = {"options": HAAR, "finalizes": True}
    CASES["lazy-buckets"] = {"options": HAAR, "lazy_bucket_allocation": True}
OPTIMIZERS = ("AdamW", "OasisAdamW")


class Experts(nn.Module):
    """The second is for rank 0 alone."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.first, self.second = models.MLP(), models.MLP()
        self.first.compile(backend=backend)
        self.second.compile(backend=backend)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.first(x) + self.second(x) if both else self.first(x)


def unused(rank: int, low_rank: bool) -> list[dict[str, torch.Tensor]]:
    """The gradients of two steps in which rank 1 does not use the second expert; it has zeros before one, and none before the
    other."""
    torch.compiler.reset()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    torch.manual_seed(0)
    model = Experts(eager_actcomp({**HAAR, **({"weight_gradient_format": "low_rank"} if low_rank else {})}))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    if low_rank:
        reduce_low_rank(ddp)
    step = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []
    for both, set_to_none in ((True, True), (rank == 0, False), (rank == 0, True)):
        step.zero_grad(set_to_none=set_to_none)
        ddp(next(batches(rank, 1)), both).backward()
        found.append({n: p.grad.clone() + 0 for n, p in model.named_parameters() if p.grad is not None})
        step.step()
    assert not low_rank or all(isinstance(p.grad, LowRankGradient) and p.grad.is_factored
                               for p in model.parameters() if p.dim() == 2)  # fmt: skip
    return found[1:]


def desynchronized(rank: int, options: dict[str, Any], seed: int) -> str:
    """What the backward says where rank 1 has another seed."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = DistributedDataParallel(models.MLP())
    reduce_low_rank(model)
    run = torch.compile(model, backend=eager_actcomp({**options, "weight_gradient_format": "low_rank", "seed": seed * rank}))
    with pytest.raises(actpass.PlanError) as raised:
        run(next(batches(0, 1))).backward()
    return str(raised.value)


def nothing_called() -> dict[str, Any]:
    torch.compiler.reset()
    model = models.MLP()
    ddp = DistributedDataParallel(model)
    run = torch.compile(ddp, backend=eager_actcomp({**HAAR, "weight_gradient_format": "low_rank"}))
    with pytest.warns(actpass.ActpassWarning, match=r"dense, in its buckets.*Call actpass\.distributed\.reduce_low_rank"):
        run(next(batches(0, 1))).backward()
    run(next(batches(0, 1))).backward()  # warnings are errors here: it is said once
    before, buckets = str(actpass.report(run)), []
    model.register_forward_hook(torch.compiler.disable(lambda *_: buckets.append(resident(list(model.parameters())).buckets)))
    reduce_low_rank(ddp)
    reduce_low_rank(run)  # nothing more
    run.zero_grad()
    run(next(batches(0, 1))).backward()
    with ddp.join(), pytest.raises(ValueError, match=r"does not go with ddp\.join\(\)"):
        run(next(batches(0, 1)))
    with pytest.raises(ValueError, match=r"is a copy of one .* Copy ddp\.module, wrap the copy"):
        copy.deepcopy(ddp)(next(batches(0, 1)))
    return {
        "before": before,
        "after": str(actpass.report(run)),
        "kept": isinstance(model.mid.weight.grad, LowRankGradient),
        "buckets": buckets[0],
    }


def sharded(rank: int, low_rank: bool) -> dict[str, Any]:
    torch.compiler.reset()
    STEP_COUNTER.steps, STEP_COUNTER.calls = 0, 0
    from torch.distributed.fsdp import fully_shard

    regions.clear()  # its own are found by name
    torch.manual_seed(0)
    model: Any = fully_shard(models.MLP())
    model.compile(backend=eager_actcomp({**HAAR, **({"weight_gradient_format": "low_rank"} if low_rank else {})}))
    warned = pytest.warns(actpass.ActpassWarning, match="FSDP2 makes low-rank gradients dense, in its reduce-scatter")
    with warned if low_rank else nullcontext():
        model(next(batches(rank, 1))).backward()
    grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    return {"gradients": {n: g.full_tensor() for n, g in grads.items()}, "report": str(actpass.report(model))}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)

    def save(name: str, result: Any) -> None:
        torch.save(result, Path(folder, f"{name}-{rank}.pt"))

    for case, how in CASES.items():
        save(case, [train(rank, low_rank=low, **how) for low in (False, True)])
    for name in OPTIMIZERS:
        save(name, train(rank, PRAC, low_rank=True, steps=3, optimizer=getattr(actpass.optim, name)))
    save("unused", [unused(rank, low) for low in (False, True)])
    save("seed", [desynchronized(rank, HAAR, 1), desynchronized(rank, PRAC, 1)])
    save("nothing", nothing_called())
    save("fsdp2", [sharded(rank, low) for low in (False, True)])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """By name, what each rank has left. Two processes start once for all."""
    folder = once(tmp_path_factory, "low-rank", lambda to: torch.multiprocessing.spawn(worker, (str(to),), nprocs=WORLD))

    def load(name: str) -> tuple[Any, Any]:
        first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD))
        return first, second

    return load


Results = Callable[[str], tuple[Any, Any]]
WEIGHTS = {"up.weight": (40, 24), "mid.weight": (40, 40), "down.weight": (16, 40)}


@pytest.mark.parametrize("case", CASES)
def test_coefficients_are_reduced_in_place_of_dense_gradients(case: str, results: Results):
    first, second = results(case)
    for dense, low in (first, second):
        assert low["coefficients"].keys() == WEIGHTS.keys()
        for name, want in dense["gradients"].items():
            assert error(low["gradients"][name], want) <= ROUNDING, name
        assert error(low["norm"], dense["norm"]) <= ROUNDING
    for a, b in zip(first, second, strict=True):
        for what in ("coefficients", "gradients", "parameters"):
            assert all(torch.equal(a[what][n], b[what][n]) for n in a[what])


@pytest.mark.parametrize("case", CASES)
def test_bytes_between_ranks_are_those_of_the_coefficients(case: str, results: Results):
    dense, low = results(case)[0]
    rest = dense["bytes"] - sum(4 * m * n for m, n in WEIGHTS.values())  # biases, and DDP's map of unused parameters
    assert rest >= 4 * (40 + 40 + 16)
    unused_map = 4 * len(WEIGHTS) if "find_unused_parameters" in CASES[case] else 0
    assert low["bytes"] == rest - unused_map + sum(4 * m * RANK for m, _ in WEIGHTS.values()) + 16
    assert low["silent_bytes"] == dense["silent_bytes"] == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_alike_on_all_ranks(name: str, results: Results):
    first, second = results(name)
    assert first["coefficients"].keys() == WEIGHTS.keys()
    assert all(torch.equal(first["parameters"][n], second["parameters"][n]) for n in first["parameters"])


def test_a_rank_that_does_not_use_a_weight_takes_part_with_zeros(results: Results):
    (dense, low), (_, others) = results("unused")
    for want, got, other in zip(dense, low, others, strict=True):
        assert want.keys() == got.keys() == other.keys()
        for name in want:
            assert error(got[name], want[name]) <= ROUNDING, name
            assert torch.equal(got[name], other[name])


def test_different_bases_are_an_error_on_all_ranks(results: Results):
    first, second = results("seed")
    assert first == second
    for message in first:
        assert "the gradients of 'up.weight' can't be averaged: they lie in different bases" in message
        assert "on rank 0" in message
        assert "on rank 1" in message


def test_what_ddp_makes_dense_is_said_once_and_reported(results: Results):
    for got in results("nothing"):
        assert "note: DistributedDataParallel makes low-rank gradients dense" in got["before"]
        assert "note: DistributedDataParallel" not in got["after"]
        assert got["kept"]
        assert got["buckets"] == 4 * (40 + 40 + 16)  # of the biases


def test_fsdp2_makes_them_dense_and_says_so(results: Results):
    for dense, low in results("fsdp2"):
        assert all(torch.equal(low["gradients"][n], want) for n, want in dense["gradients"].items())
        assert "note: FSDP2 makes low-rank gradients dense" in low["report"]
        assert "note:" not in dense["report"]


def test_only_a_ddp_can_reduce():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.parallel\.DistributedDataParallel, not Linear\. Wrap"):
        reduce_low_rank(nn.Linear(4, 4))

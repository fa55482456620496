"""What FSDP2 makes of parameters, gradients and optimizer state: reckoned, and on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actpass.extrapolation.fsdp import KernelEvent, Optimizer, Sharded, Unit
from actpass.extrapolation.layer_map import TRACED
from actpass.extrapolation.layer_names import Stack

from .test_folding import llama

WORLD = 2
PATH = "model.model.layers"


def test_a_shard_is_padded_to_whole_rows():
    unit = Unit(((5, 3), (4,), ()), 2)
    assert unit.nbytes == 2 * (15 + 4 + 1)
    assert unit.shard(2).shapes == ((3, 3), (2,), ())
    assert unit.padded_bytes(2) == 2 * 2 * (9 + 2 + 1)
    assert Optimizer(2, "all").scratch_bytes(100, 30) == 200
    assert Optimizer(2, "largest").scratch_bytes(100, 30) == 60
    assert Optimizer(2, "none").state_bytes(100, 3) == 212
    assert Optimizer(0, "none").state_bytes(100, 3) == 0


def test_a_backward_holds_one_layers_gradients_whole_and_the_buffer_of_the_one_before():
    """By hand: root 8, two layers of 4, over 2 ranks, one byte an element; activations of 10."""
    sharded = Sharded(Unit(((8,),), 1), [Unit(((4,),), 1)] * 2, 2)
    moments = [
        KernelEvent(None, 10 + 8, ((None, 8),)),  # the head
        KernelEvent(1, 10 + 12, ((1, 4),)),
        KernelEvent(0, 10 + 16, ((0, 4),)),
    ]
    forward = sharded.forward_peak([KernelEvent(0, 3), KernelEvent(1, 5)])
    assert (forward.activations, forward.parameters) == (3, 8 + 4 + 4)  # layer 1 arrives while layer 0 runs
    peak = sharded.backward_peak(moments)  # while layer 0 runs
    assert peak.activations == 10
    assert peak.gradients == 8 + 2 + 4  # the root's, whole; layer 1's, sharded; its own
    assert peak.parameters == 8 + 4
    assert peak.buffer == 4  # layer 1's
    lighter = sharded.backward_peak([*moments, KernelEvent(None, 26)])
    assert lighter.total == peak.total
    last = sharded.backward_peak([*moments[:2], KernelEvent(0, 10 + 16, ((0, 4),)), KernelEvent(None, 40)])
    assert (last.activations, last.gradients, last.buffer) == (24, 8 + 2 + 2, 4)
    assert last.parameters == 8 + 4  # the last that ran


def worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    model, inputs = odd()
    for layer in model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs).backward()
    optimizer.step()
    parameters = list(model.parameters())
    state = [t for p in parameters for t in optimizer.state[p].values()]
    gradients = [p.grad for p in parameters]
    found = {"parameters": storages(parameters), "gradients": storages(gradients), "state": storages(state)}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def odd() -> Any:
    """A model some of whose parameters can't be divided by two."""
    model, inputs = llama(TRACED)
    for layer in model.model.model.layers:  # pyright: ignore
        layer.input_layernorm.register_parameter("extra", torch.nn.Parameter(torch.zeros(7, 3)))
        layer.register_forward_hook(lambda m, _, out: out + m.input_layernorm.extra.sum())
    return model, inputs


def storages(tensors: list[Any]) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


@pytest.mark.distributed
def test_two_processes_allocate_what_is_reckoned(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    model, _ = odd()
    root, layers = Stack(PATH, TRACED).units(model)
    sharded, optimizer = Sharded(root, layers, WORLD), Optimizer(2, "none")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first["parameters"] == second["parameters"] == sharded.parameters
    assert first["gradients"] == second["gradients"] == sharded.parameters
    assert first["state"] == optimizer.state_bytes(sharded.parameters, sharded.count)
    # the state of the last rank's rows is not padded: of 7 rows it has 3
    assert first["state"] - second["state"] == TRACED * 2 * 3 * 4
    assert sharded.parameters > sum(p.numel() * 4 for p in model.parameters()) / WORLD


@pytest.mark.parametrize("layers", [TRACED, 40])
def test_units_of_the_deep_model_are_those_of_the_traced_layers(layers: int):
    model, _ = llama(TRACED)
    root, units = Stack(PATH, layers).units(model)
    assert len(units) == layers
    one = sum(p.numel() * 4 for p in model.model.model.layers[2].parameters())  # pyright: ignore
    assert {u.nbytes for u in units} == {one}
    assert root.nbytes == sum(p.numel() * 4 for p in model.parameters()) - TRACED * one

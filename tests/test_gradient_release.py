"""One optimizer for each parameter, which steps within the backward and lets go of the gradient: one step of the clock, one
plan, and where layers are compiled one by one fewer gradients at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import actpass
from actpass.memory.profiler import measure
from actpass.runtime import replan
from actpass.runtime.step_counter import STEP_COUNTER

from .helpers import EPS

WIDTH, TOKENS, LAYERS = 64, 16, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.checkpoints = checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)  # pyright: ignore[reportAssignmentType]
        return x.square().mean()


def compiled(model: Blocks, layers: bool, **options: Any) -> Any:
    """In one graph, or layer by layer, beside which checkpoints run in eager mode."""
    if not layers:
        return torch.compile(model, backend="actcomp", options={"min_tensor_bytes": 0, **options})
    for block in model.blocks:
        block.compile(backend="actcomp", options={"min_tensor_bytes": 0, **options})
    return model


def release(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers that step each parameter as soon as its gradient is whole."""
    made = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        made[parameter].step()
        parameter.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return list(made.values())


def batch(step: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("layers", [False, True], ids=["whole", "layers"])
def test_a_step_within_the_backward_is_one_step_of_the_clock(layers: bool, checkpoints: bool):
    """Between the steps of two layers' parameters a checkpoint runs a layer again, which draws."""
    model = Blocks(checkpoints)
    run = compiled(model, layers)
    release(model)
    for step in range(3):
        run(batch(step)).backward()
        assert (STEP_COUNTER.steps, STEP_COUNTER.calls) == (step + 1, 0)


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("layers", [False, True], ids=["whole", "layers"])
def test_it_trains_as_an_optimizer_behind_the_backward(layers: bool):
    want, model = Blocks(), Blocks()
    optimizer = torch.optim.AdamW(want.parameters(), lr=1e-2)
    run = compiled(model, layers, policy="exact")
    release(model)
    losses: list[tuple[float, float]] = []
    for step in range(6):
        optimizer.zero_grad()
        plain = want(batch(step))
        plain.backward()
        optimizer.step()
        loss = run(batch(step))
        loss.backward()
        assert all(p.grad is None for p in model.parameters())
        losses.append((loss.item(), plain.item()))
    # some 30 operators a step that round by EPS / 2 each, as random: sqrt(30 * 6) EPS / 2 = 7 EPS, which Adam's division by
    # the root of small second moments makes more of: 8 times
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=54 * EPS)
    assert losses[-1][0] < losses[0][0]


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_a_budget_counts_all_optimizers_and_plans_over_whole_steps(checkpoints: bool):
    """Where it planned when the first parameter was stepped, the layers before it were not in the plan: with checkpoints each
    layer was taken for a step of its own."""
    model = Blocks(checkpoints)
    run = compiled(model, layers=True, memory_budget=4_000_000)
    optimizers = release(model)
    for step in range(3):
        run(batch(step)).backward()
    assert len(replan._last) == (2 if checkpoints else 1) * LAYERS
    state = sum(t.nbytes for o in optimizers for values in o.state.values() for t in values.values())
    parameters = sum(p.nbytes for p in model.parameters())
    assert state == 2 * parameters + 4 * len(optimizers)
    totals = actpass.report(model).totals
    assert totals.resident_bytes is not None
    assert state + parameters <= totals.resident_bytes <= state + parameters + 2 * batch(0).nbytes


@pytest.mark.usefixtures("no_codegen")
def test_a_budget_that_cannot_be_met_is_an_error_out_of_the_backward_or_the_next_call():
    model = Blocks()
    parameters = sum(p.nbytes for p in model.parameters())
    run = compiled(model, layers=True, memory_budget=int(3.05 * parameters))
    release(model)

    def train() -> None:
        for step in range(3):
            run(batch(step)).backward()

    with pytest.raises(actpass.BudgetError, match="can't be met"):
        train()


@pytest.mark.codegen
@pytest.mark.slow
def test_gradients_go_layer_by_layer_where_layers_are_compiled_so():
    """A graph returns all of its gradients at once, and so one graph of all layers has all of them alive before the first is
    stepped."""

    def peak(layers: bool, released: bool) -> int:
        torch.compiler.reset()
        model = Blocks()
        run = compiled(model, layers, policy="exact")
        optimizers = release(model) if released else [torch.optim.AdamW(model.parameters(), lr=1e-2)]

        def step(i: int) -> None:
            run(batch(i)).backward()
            if not released:
                optimizers[0].step()
                optimizers[0].zero_grad()

        for i in range(2):
            step(i)
        return measure(lambda: step(2)).peak_bytes

    gradients = sum(p.nbytes for p in Blocks().parameters())
    together, apart = peak(layers=True, released=False), peak(layers=True, released=True)
    # a layer's gradients and a step's scratch are left; activations of 16 tokens are little beside them
    assert together > gradients
    assert apart < together - 0.5 * gradients
    assert peak(layers=False, released=True) > gradients

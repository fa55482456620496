"""Budgets in bytes of peak: compiled by Inductor, measured by allocation events."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.measure import measure
from actpass.runtime.resident import resident

from .test_liveness import llama


class Stage(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        layers = (nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.one, self.two = nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(x)
        return x + self.two(x)


class Broken(nn.Module):
    """Three stages with a graph break behind each of the first two."""

    def __init__(self, width: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (Stage(width, hidden) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        x = self.second(x)
        torch._dynamo.graph_break()
        return self.third(x).square().mean()


def broken() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Broken(), {"x": torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))}


def train(build: Any, budget: Any, steps: int = 2) -> tuple[nn.Module, int, int]:
    """(model, predicted, measured): of the whole process of a step with AdamW, parameters and state counted in."""
    torch.compiler.reset()
    model, inputs = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="actcomp", options={"memory_budget": budget})

    def step() -> None:
        compiled(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(steps):
        step()
    there = resident([*model.parameters(), *model.buffers(), *inputs.values()]).total
    totals = actpass.report(model).totals
    assert totals.resident_bytes == pytest.approx(there, rel=1e-3)  # a region sees no buffer that it doesn't read
    assert totals.peak_bytes is not None
    return model, there + totals.peak_bytes, there + measure(step).peak_bytes


def least_of(build: Any) -> int:
    with pytest.raises(Exception, match="can't be met") as raised:
        train(build, 2)
    least = getattr(raised.value, "inner_exception", raised.value).least
    assert isinstance(least, int)
    return least


@pytest.mark.parametrize("build", [llama, broken])
def test_no_budget_is_exceeded_and_a_larger_one_gives_a_peak_no_smaller(build: Any):
    least = least_of(build)
    peaks = []
    for budget in (least, int(1.2 * least), 10 * least):
        model, predicted, measured = train(build, budget)
        assert measured <= budget
        again = actpass.report(model).totals.extra_matmuls
        assert predicted == pytest.approx(measured, rel=0.1 if again else 0.05)
        peaks.append(measured)
    assert all(a <= 1.05 * b for a, b in itertools.pairwise(peaks))
    assert peaks[0] < peaks[-1]


def test_only_parts_whose_plan_changed_are_compiled_again():
    least = least_of(broken)
    torch._dynamo.utils.counters.clear()
    model, _, _ = train(broken, 10 * least, steps=3)
    report = actpass.report(model)
    assert len(report.regions) == 3
    assert all(not any(s["codec"] != "keep" for s in r.plan["storages"]) for r in report.regions)  # all of it fits


def test_gradients_accumulated_before_the_first_step_count_once():
    from actpass.runtime.steps import _once

    assert _once(["a", "b", "c"] * 4) == ["a", "b", "c"]
    assert _once(["a", "a", "a"]) == ["a", "a", "a"]
    assert _once(["a", "b", "a"]) == ["a", "b", "a"]

"""A budget of upstream's that the user's code gives to a part of the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass

from .helpers import eager_actcomp, error

region_budget = getattr(torch.autograd.graph, "region_activation_memory_budget", None)


class Budgeted(nn.Module):
    """With logits that weigh: the loss goes to pieces, which no annotation covers."""

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.budget = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64), budget

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():  # upstream raises
            return self.loss(x)
        assert region_budget is not None
        with region_budget(self.budget):
            return self.loss(x)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(self.norm(x))))
        return (x @ self.up.weight.T).logsumexp(-1).mean()


@pytest.mark.skipif(region_budget is None, reason="this torch has no such budget")
@pytest.mark.parametrize("options", [{"policy": "exact"}, {"codec": "int8"}, {"memory_budget": 0.5}], ids=str)
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_the_pass_is_active_in_a_region_with_a_budget(budget: float, options: dict[str, Any]):
    expected, x = Budgeted(budget), torch.randn(8, 32, 64)
    model = copy.deepcopy(expected)
    expected(x).backward()
    torch.compile(model, backend=eager_actcomp({"min_tensor_bytes": 0, **options}))(x).backward()
    report = actpass.report(model)
    assert report.active
    assert report.totals.saved_bytes <= report.totals.saved_bytes_default
    limit = 1e-5 if options.get("policy") == "exact" else 0.05
    assert error(model.up.weight.grad, expected.up.weight.grad) < limit

"""A flip is rebuilt from what it flips, as any other move is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import actpass
from actpass.options import options_for

from .helpers import error


class Flipped(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.a, self.b, self.dims = nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False), dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h.flip(*self.dims) if self.dims else h).square().mean()


def test_one_side_of_a_flip_is_stored():
    x = torch.randn(4, 16, 64)
    stored = {
        dims: actpass.explain(Flipped(*dims), x, options={**options_for(m), "min_tensor_bytes": 0}).totals.saved_bytes
        for m in ("exact", "int8")
        for dims in ((), (-1,), (1,), (0, 2))
    }
    assert len(set(stored.values())) == 1, stored


@pytest.mark.codegen
def test_flips_are_compiled_bit_for_bit():
    expected, x = Flipped(0, 2), torch.randn(4, 16, 64)
    model, stock = copy.deepcopy(expected), copy.deepcopy(expected)
    expected(x).backward()
    loss = torch.compile(model, backend="actcomp", options={"policy": "exact"})(x)
    loss.backward()
    assert torch.equal(loss, torch.compile(stock)(x))
    assert error(model.a.weight.grad, expected.a.weight.grad) < 1e-6

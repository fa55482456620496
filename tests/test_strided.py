"""Low-bit forms of a part of a wider tensor, whose rows have gaps between them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass
from actpass.options import options_for

from .helpers import eager_actcomp, error


class Parts(nn.Module):
    """A part of what one layer makes is stored beside a whole tensor of the same shape, whose code it must not share."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back, self.norm = nn.Linear(128, 292), nn.Linear(128, 128), nn.LayerNorm(128)
        self.register_buffer("scale", torch.rand(292) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.back(F.silu((self.wide(self.norm(x)) * self.scale)[..., 4:132]))
        return x.square().mean()


@pytest.mark.parametrize("method", ["int16", "int8", "int4"])
def test_a_part_with_gaps_is_coded(method: str):
    expected, x = Parts(), torch.randn(2, 64, 128)
    model = copy.deepcopy(expected)
    expected(x).backward()
    options = {**options_for(method), "min_tensor_bytes": 0, "rounding": "nearest"}
    torch.compile(model, backend=eager_actcomp(options))(x).backward()
    report = actpass.report(model)
    assert report.active
    parts = [s for s in report.regions[0].plan["storages"] if "slice" in s["node"] and s["shape"] == [2, 64, 128]]
    assert {s["codec"] for s in parts} == {method}
    limit = {"int16": 1e-3, "int8": 0.05, "int4": 0.5}[method]
    assert error(model.wide.weight.grad, expected.wide.weight.grad) < limit

"""Operators are known by what they are: one of somebody's own may have any name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actpass

NAMES = (
    "attention_scale",
    "flash_attention_backward",
    "_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    "my_backward",
    "sum",
    "mean",
    "var_mean",
    "logsumexp",
    "embedding",
    "getitem",
    "linalg_solve",
    "tangents",
    "primals_1",
)


@pytest.fixture
def foreign(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Half of a tensor, by an operator of another namespace and a name that torch's own have."""
    name = request.param
    library = torch.library.Library("actpass_tests", "FRAGMENT")
    for suffix, sign in (("", 0.5), ("_grad", 0.5)):
        library.define(f"{name}{suffix}(Tensor x) -> Tensor")
        library.impl(f"{name}{suffix}", lambda x, sign=sign: x * sign, "CompositeExplicitAutograd")
        torch.library.register_fake(f"actpass_tests::{name}{suffix}", torch.empty_like, lib=library)
    half, grad = (getattr(torch.ops.actpass_tests, f"{name}{suffix}") for suffix in ("", "_grad"))
    torch.library.register_autograd(f"actpass_tests::{name}", lambda ctx, g: grad(g), lib=library)
    yield half
    library._destroy()


class Halved(nn.Module):
    def __init__(self, half: Any) -> None:
        super().__init__()
        self.a, self.b, self.half = nn.Linear(64, 96), nn.Linear(96, 32), half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.half(F.gelu(self.a(x)))).square().mean()


@pytest.mark.parametrize("foreign", NAMES, indirect=True)
def test_a_foreign_operator_is_none_of_torchs(foreign: Any):
    """It is neither run again, nor taken for attention or a reduction, under a budget that would run either again."""
    x = torch.randn(128, 64)
    report = actpass.explain(Halved(foreign), x, options={"memory_budget": 0.4, "min_tensor_bytes": 0})
    assert report.active
    assert report.totals.extra_attention == 0
    sites = [s for s in report.regions[0].sites if "actpass_tests" in s.op]
    assert sites
    assert {s.kind for s in sites} <= {"pointwise", "linear input"}
    assert all(s.bytes_after for s in sites)

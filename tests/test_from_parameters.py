"""What derives from parameters alone: rebuilt where that is free, exact where it is not, never coded."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import actpass
from actpass.options import options_for

from . import models
from .helpers import eager_actcomp, error


class Heads(nn.Module):
    """An einsum over weights of three axes copies them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(4, 64, 16) * 0.1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (torch.einsum("bth,ehk->betk", x, w) for w in (self.q, self.k))
        return torch.einsum("betk,besk->bets", q, k).softmax(-1).square().sum()


class Attended(Heads):
    """The backward reads queries, keys and weights of the attention, 8192 bytes each, and the copies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (torch.einsum("bth,ehk->betk", x, w) for w in (self.q, self.k))
        return torch.einsum("bets,bsh->beth", torch.einsum("betk,besk->bets", q, k).softmax(-1), x)


class Factors(nn.Module):
    """A weight that is the product of two parameters and a cast of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.a, self.b = nn.Parameter(torch.randn(96, 8)), nn.Parameter(torch.randn(8, 64))
        self.base = nn.Parameter(torch.randn(96, 64, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x).relu() @ (self.a @ self.b + self.base.float()).t()).square().mean()


class LookedUp(nn.Module):
    """Frozen weights of 4 bits: two codes in a byte, a table of 16 numbers, and a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(96, 8)
        self.codes = nn.Parameter(torch.randint(0, 256, (96, 32), dtype=torch.uint8), requires_grad=False)
        self.register_buffer("table", torch.linspace(-1, 1, 16))
        self.scale = nn.Parameter(torch.rand(96, 1), requires_grad=False)

    def weight(self) -> torch.Tensor:
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).view(96, 64)
        return self.table[codes.to(torch.int32)] * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x).relu() @ self.weight().t()).relu()).square().mean()


def sites(model: nn.Module, x: torch.Tensor, **options: Any) -> dict[tuple[int, ...], Any]:
    """By shape, what crosses or crossed; exact or in low bits."""
    report = actpass.explain(model, x, options={"min_tensor_bytes": 0, **options})
    return {s.shape: s for s in report.regions[0].sites if s.bytes_after}


@pytest.mark.parametrize(
    "options", [{"policy": "auto"}, {"policy": "exact"}, {"codec": "int4"}, {"memory_budget": 0.4}], ids=str
)
def test_copies_of_parameters_are_rebuilt(options: dict[str, Any]):
    """The copies of the weights have 64 x 4 x 16 elements; nothing else has an axis of 4 beside one of 64."""
    shapes = sites(Heads(), torch.randn(2, 16, 64, requires_grad=True), **options)
    assert not [s for s in shapes if 64 in s and 4 in s], shapes


@pytest.mark.parametrize("options", [{"policy": "auto"}, {"memory_budget": 0.5}], ids=str)
def test_copies_of_parameters_take_no_bytes_and_cost_no_accuracy(options: dict[str, Any]):
    """They alone are large enough to be coded; what the budget asks for is met without them."""
    expected, x, weights = Attended(), torch.randn(2, 16, 64), torch.randn(2, 4, 16, 64)
    model, x1, x2 = copy.deepcopy(expected), x.clone().requires_grad_(), x.clone().requires_grad_()
    exact = actpass.explain(model, x1, options={"policy": "exact"}).totals
    assert exact.saved_bytes == 3 * 8192
    assert exact.saved_bytes <= 0.5 * exact.saved_bytes_default
    (expected(x2) * weights).sum().backward()
    (torch.compile(model, backend=eager_actcomp(options))(x1) * weights).sum().backward()
    assert actpass.report(model).saved_bytes <= exact.saved_bytes
    for got, want in ((x1, x2), (model.q, expected.q), (model.k, expected.k)):
        assert error(got.grad, want.grad) < 1e-6


@pytest.mark.parametrize("method", ["auto", "int4"])
def test_a_product_of_parameters_is_neither_coded_nor_run_again(method: str):
    report = actpass.explain(Factors(), torch.randn(48, 32), options={**options_for(method), "min_tensor_bytes": 0})
    (site,) = [s for s in report.regions[0].sites if s.shape in ((96, 64), (64, 96)) and s.bytes_after]
    assert site.codec is None
    assert "parameters alone" in site.reason
    assert report.totals.extra_matmuls == 0


@pytest.mark.parametrize(
    "options", [{"policy": "auto"}, {"policy": "exact"}, {"codec": "int4"}, {"memory_budget": 0.3}], ids=str
)
def test_weights_in_few_bits_are_dequantised_again(options: dict[str, Any]):
    """The weight, as large as what is stored beside it, is no part of it; nor are its codes as indices."""
    model, x = LookedUp(), torch.randn(48, 32)
    report = actpass.explain(model, x, options={"min_tensor_bytes": 0, **options})
    weights = [s for s in report.regions[0].sites if math.prod(s.shape) == 96 * 64]
    assert any(s.bytes_before for s in weights)
    assert not any(s.bytes_after for s in weights)
    other = copy.deepcopy(model)
    torch.compile(model, backend=eager_actcomp({**options, "min_tensor_bytes": 0}))(x).backward()
    other(x).backward()
    if options == {"policy": "exact"}:
        assert error(model.first.weight.grad, other.first.weight.grad) < 1e-6
    assert error(model.last.weight.grad, other.last.weight.grad) < 0.3


class Joined(nn.Module):
    """A weight that is two buffers, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(96, 8)
        self.register_buffer("upper", torch.randn(48, 64))
        self.register_buffer("lower", torch.randn(48, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x).relu() @ torch.cat([self.upper, self.lower]).t()).relu()).square().mean()


def test_buffers_may_move_between_forward_and_backward():
    """As an average of weights does; what the forward joined is stored, as in eager mode."""
    model, x = Joined(), torch.randn(48, 32)
    other = copy.deepcopy(model)
    for m, call in ((model, torch.compile(model, backend=eager_actcomp({"policy": "exact"}))), (other, other)):
        loss = call(x)
        m.upper.mul_(0.9)
        loss.backward()
    assert error(model.first.weight.grad, other.first.weight.grad) < 1e-6


def test_parameters_are_static_beside_the_seed():
    """Upstream's cut counts the bytes of an input that it saves, but not of a parameter; Inductor's default is the same cut,
    whether the region takes a seed or not."""
    x = torch.randn(2, 16, 64, requires_grad=True)
    default = [actpass.explain(Heads(), x, options={**options_for(m)}).totals.saved_bytes_default for m in ("exact", "int8")]
    assert default[0] == default[1]


@pytest.mark.parametrize(
    ("batch", "options", "kept"),
    [
        (128, {"policy": "exact"}, True),
        (1, {"policy": "exact"}, False),
        (128, {"policy": "exact", "memory_budget": 0.5}, False),
    ],
    ids=["few beside the rest", "many", "under a budget"],
)
def test_weights_in_half_precision_are_stored_where_they_are_few_bytes(batch: int, options: dict[str, Any], kept: bool):
    """To cast them again takes a kernel each."""
    model, _ = models.transformer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = actpass.explain(model, x=torch.randn(batch, 16, 32), options=options)
    copies = [s for s in report.regions[0].sites if s.bytes_after and "a cast again takes a kernel" in s.reason]
    weights = [p for n, p in model.named_parameters() if p.dim() == 2]
    assert sum(s.bytes_after for s in copies) == (2 * sum(w.numel() for w in weights) if kept else 0)
    assert all(s.codec is None for s in copies)

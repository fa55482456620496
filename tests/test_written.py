"""Inputs that the forward writes to: the backward reads what the forward read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actpass.torch_compat import functorch_config

from .helpers import eager_actcomp, error


class _Updated(nn.Module):
    """A layer and a buffer that the forward reads, perhaps only for the backward, and then writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)
        self.register_buffer("state", torch.tensor([0.1, 0.2, 0.3, 0.4]))


class Router(_Updated):
    """A selection by a bias, as in a mixture of experts that balances its load."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.linear(x).sigmoid()
        hot = F.one_hot((p.detach() + self.state).argmax(-1), 4).to(x.dtype)
        with torch.no_grad():
            self.state.add_(torch.tensor([3.0, 0.0, 0.0, 0.0]))
        return (p * hot).sum()


class UpdatedFirst(_Updated):
    """The update comes before the use: the backward must not repeat it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.state.add_(1.0)
        return (self.linear(x) * self.state).sin().mean()


class Queue(_Updated):
    """Read as a matrix through a view of it, and written to in part."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        loss = (h @ self.state.clone().t()).square().mean()
        with torch.no_grad():
            self.state[:2] = h.detach()[:2]
        return loss


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale.clone())
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale = ctx.saved_tensors
        return gradients[0] * scale * x, None


class BackwardOnly(_Updated):
    """Nothing in the forward reads the value, not even what is written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Scaled.apply(self.linear(x), self.state)
        with torch.no_grad():
            self.state.copy_(torch.arange(4.0))
        return y.square().mean()


class Broken(_Updated):
    """What is written to wants a gradient, and the caller of the region copies it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        torch._dynamo.graph_break()
        y = (h * 2).clone().sin()
        h.mul_(2)
        return (y + h).square().mean()


MODELS = (Router, UpdatedFirst, Queue, BackwardOnly, Broken)


@pytest.mark.parametrize("options", [{"policy": "exact"}, {"policy": "auto"}, {"memory_budget": 0.7}], ids=str)
@pytest.mark.parametrize("build", MODELS)
def test_backward_reads_what_the_forward_read(build: type[_Updated], options: dict[str, Any]):
    """Tensors here are below ``min_tensor_bytes``: all forms are exact."""
    expected, x = build(), torch.randn(16, 8)
    model = copy.deepcopy(expected)
    expected(x).backward()
    torch.compile(model, backend=eager_actcomp(options))(x).backward()
    assert error(model.linear.weight.grad, expected.linear.weight.grad) < 1e-6
    assert error(model.state, expected.state) < 1e-6


@pytest.mark.codegen
@pytest.mark.short_tier
def test_compiled_backward_reads_what_the_forward_read():
    """Inductor keeps the copy apart from the input."""
    expected, x = Router(), torch.randn(16, 8)
    model = copy.deepcopy(expected)
    expected(x).backward()
    torch.compile(model, backend="actcomp", options={"policy": "exact"})(x).backward()
    assert error(model.linear.weight.grad, expected.linear.weight.grad) < 1e-6
    assert error(model.state, expected.state) < 1e-6


@pytest.mark.parametrize("options", [{"policy": "exact"}, {"policy": "auto"}], ids=str)
def test_nothing_is_read_late_where_upstream_would_save_inputs_alone(options: dict[str, Any]):
    expected, x = Router(), torch.randn(16, 8)
    model = copy.deepcopy(expected)
    expected(x).backward()
    with functorch_config.patch(activation_memory_budget=0.0):
        torch.compile(model, backend=eager_actcomp(options))(x).backward()
    assert error(model.linear.weight.grad, expected.linear.weight.grad) < 1e-6

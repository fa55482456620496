"""A product as an operator of this package, and the row that says what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actpass.ir.op_rules import OpRule, register_op_rule


@torch.library.custom_op("actpass_plugin::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> Tensor:
    """``x * y``, of one shape."""
    return x * y


@gate.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    return gate(gradient, y), gate(gradient, x)


gate.register_autograd(_backward, setup_context=_setup)
register_op_rule(
    torch.ops.actpass_plugin.gate.default, OpRule(linear=((0,), (1,)), pointwise=True, domain="keeps_zero"), __name__
)

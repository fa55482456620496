"""Sums of one-hot rows are taken without a loop, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from actpass.passes.base import Stage
from actpass.passes.sum_one_hots import SumOneHots
from actpass.pipeline import run_pass

from .helpers import assert_equal
from .tracing import JointGraph, state_of, trace

aten = torch.ops.aten
LABELS = torch.tensor([[0, 3, -100, 16], [-100, 5, 5, 1]])
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Head(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(8, 17), loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(x).flatten(0, 1), LABELS.flatten())


def matched(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A one-hot of the user's own, in which a label that is no word is a row of zeros."""
    one_hot = torch.where(labels[:, None] == torch.arange(17), 2.0, 0.0)
    weight = logits.mean(-1, keepdim=True).sin()
    return (logits * (one_hot * weight).sum(-1, keepdim=True)).mean()


LOSSES: dict[str, Loss] = {
    "mean": F.cross_entropy,
    "sum": lambda a, b: F.cross_entropy(a, b, reduction="sum"),
    "each": lambda a, b: (F.cross_entropy(a, b, reduction="none") * torch.linspace(-1, 1, 8)).sum(),
    "bfloat16": lambda a, b: F.cross_entropy(a.bfloat16(), b).float(),
    "matched": matched,
}


def loops_over_one_hots(joint: JointGraph) -> int:
    """Sums of a product one factor of which is a choice between two numbers."""
    sums = joint.gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    products = [p for n in sums if (p := before_casts(n.all_input_nodes[0])).target is aten.mul.Tensor]
    return sum(any(before_casts(a).target is aten.where.self for a in p.all_input_nodes) for p in products)


def before_casts(node: fx.Node) -> fx.Node:
    while node.target is torch.ops.prims.convert_element_type.default:
        node = node.all_input_nodes[0]
    return node


def rewritten(joint: JointGraph) -> JointGraph:
    state = state_of(joint)
    after = run_pass(SumOneHots(), replace(state, stages=(Stage("traced", state.graphs),)))
    return replace(joint, gm=after.joint.gm)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sum_of_one_hots_is_one_number_to_the_bit(name: str) -> None:
    joint = trace(Head(LOSSES[name]), {"x": torch.randn(2, 4, 8)})
    done = rewritten(joint)
    assert loops_over_one_hots(joint) == (2 if name == "matched" else 1)
    assert loops_over_one_hots(done) == 0
    before, after = joint.run_joint(), done.run_joint()
    assert_equal(dict(enumerate(after)), dict(enumerate(before)))


def one_hot_times(dtype: torch.dtype, number: float, row: torch.Tensor) -> Loss:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        numbers = torch.full((), number, dtype=dtype), torch.zeros((), dtype=dtype)
        one_hot = torch.where(labels[:, None] == torch.arange(17), *numbers)
        return (logits.sum(-1, keepdim=True) * (one_hot * row).sum(-1, keepdim=True)).sum().float()

    return loss


ROW = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None] / 3


@pytest.mark.parametrize(
    "loss",
    [
        one_hot_times(torch.float64, 0.1, ROW),
        one_hot_times(torch.int64, 16777217, ROW),
        one_hot_times(torch.float32, 1.0, ROW.float() * float("inf")),
    ],
    ids=["float64", "large int", "not finite"],
)
def test_the_number_is_that_of_the_sum(loss: Loss) -> None:
    joint = trace(Head(loss), {"x": torch.randn(2, 4, 8)})
    done = rewritten(joint)
    assert (loops_over_one_hots(joint), loops_over_one_hots(done)) == (1, 0)
    for a, b in zip(joint.run_joint(), done.run_joint(), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_sums_of_other_forms_are_read() -> None:
    """Of no axis, of all without a list."""
    joint = trace(Head(lambda a, b: a.square().mean().sum(-1) + torch.sum(a, dim=None)), {"x": torch.randn(2, 4, 8)})
    rewritten(joint)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: F.cross_entropy(a, b, label_smoothing=0.1),
        lambda a, b: F.cross_entropy(a, b, weight=torch.linspace(0.5, 2, 17)),
        lambda a, b: (torch.where(b[:, None] == torch.arange(17), 2.0, 1.0) * a.sum(-1, keepdim=True)).sum(-1).square().mean(),
        lambda a, b: (torch.where(b[:, None] == torch.arange(1, 18), 2.0, 0.0) * a.sum(-1, keepdim=True)).sum(-1).sin().mean(),
        lambda a, b: (torch.where(b[:, None] + 0.5 == torch.arange(17), 2.0, 0.0) * a.sum(-1, keepdim=True)).sum(-1).mean(),
        lambda a, b: (torch.where(b[:, None] == torch.arange(17).byte(), 2.0, 0.0) * a.sum(-1, keepdim=True)).sum(-1).mean(),
        lambda a, b: (
            (torch.where(b[:, None] == torch.arange(17), 0.1, 0.0).bfloat16().float() * a.sum(-1, keepdim=True)).sum(-1).mean()
        ),
    ],
    ids=[
        "smoothed",
        "weighted words",
        "other than zero",
        "not from zero",
        "labels between",
        "positions that wrap",
        "two casts",
    ],
)
def test_what_is_no_one_hot_stays(loss: Loss) -> None:
    joint = trace(Head(loss), {"x": torch.randn(2, 4, 8)})
    assert loops_over_one_hots(rewritten(joint)) == loops_over_one_hots(joint)

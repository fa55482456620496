"""Values that are scattered into zeros and then added: scattered onto what they are added to, and only they."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.ir.graph_inputs import GraphInputs
from actpass.ir.joint_graph import Joint
from actpass.passes.scatter_onto_sums import scatter_onto_sums

from .helpers import EPS, eager_actcomp, error, step

aten = torch.ops.aten
ROWS, WIDTH, TOKENS = 12, 4, 12
Combine = Callable[[Tensor, Tensor, Tensor], Any]


def scattered(base: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    return aten._unsafe_masked_index_put_accumulate(base, tokens[:, None] > 2, [tokens], values)


def traced(combine: Combine, base: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Joint, list[Tensor]]:
    """combine: of the scatter, of another tensor, and of the values that are scattered."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ROWS, (TOKENS,), generator=draw)
    values, other = (torch.randn(ROWS, WIDTH, generator=draw).to(dtype) for _ in range(2))

    def function(tokens: Tensor, tangents: Tensor, other: Tensor) -> Any:
        values = tangents * 3
        return combine(scattered(torch.full((ROWS, WIDTH), base, dtype=dtype), tokens, values), other * 2, values)

    return Joint(make_fx(function)(tokens, values, other), GraphInputs((), ()), 0), [tokens, values, other]


@pytest.mark.parametrize("combine", [lambda a, b, _: a + b, lambda a, b, _: b + a], ids=["first", "second"])
def test_the_sum_is_the_same(combine: Combine):
    joint, given = traced(combine)
    want = joint.gm(*given)
    scatter_onto_sums(joint)
    joint.gm.graph.lint()
    joint.gm.recompile()
    assert not any(n.target is aten.add.Tensor for n in joint.gm.graph.nodes)
    assert error(joint.gm(*given), want) < 16 * EPS


LEFT: dict[str, tuple[Any, ...]] = {
    "read by another, too": (lambda a, b, _: (a + b, a * 2),),
    "twice itself": (lambda a, *_: a + a,),
    "onto its own values": (lambda a, b, values: a + values,),
    "onto a view of its values": (lambda a, b, values: a + values.view(WIDTH, ROWS).view(ROWS, WIDTH),),
    "with a factor": (lambda a, b, _: torch.add(a, b, alpha=2),),
    "spread over the sum": (lambda a, b, _: a + b[:1],),
    "of another dtype": (lambda a, b, _: a + b.double(),),
    "of few bits": (lambda a, b, _: a + b, 0.0, torch.bfloat16),
    "onto ones": (lambda a, b, _: a + b, 1.0),
    "of a number": (lambda a, *_: a + 1.0,),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_another_sum_is_left_alone(name: str):
    joint, given = traced(*LEFT[name])
    want = joint.gm(*given)
    before = [n.target for n in joint.gm.graph.nodes]
    scatter_onto_sums(joint)
    assert [n.target for n in joint.gm.graph.nodes] == before
    torch.testing.assert_close(joint.gm(*given), want, rtol=0, atol=0)


class Twice(nn.Module):
    """Reads its embedding twice, and is its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 24)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(x) + self.embed(x)) * self.embed(x.flip(-1))
        return nn.functional.cross_entropy((hidden @ self.embed.weight.t()).flatten(0, 1), y.flatten())


def test_an_embedding_that_is_read_more_than_once():
    torch.manual_seed(0)
    model = Twice()
    batch = {name: torch.randint(0, 500, (4, 75)) for name in ("x", "y")}
    _, want = step(model, model, batch)
    _, got = step(torch.compile(model, backend=eager_actcomp({"policy": "exact"})), model, batch)
    assert all(error(got[n], want[n]) < 64 * EPS for n in want)

"""Values that are scattered into zeros and then added: scattered onto what they are added to, and only they."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from actpass.graph.scatters import scatter_onto_sums

from .helpers import EPS, error

aten = torch.ops.aten
ROWS, WIDTH, TOKENS = 12, 4, 30


def masked(base: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    return aten._unsafe_masked_index_put_accumulate(base, tokens[:, None] > 2, [tokens], values)


def put(base: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    return aten.index_put(base, [tokens], values, True)


def put_over(base: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    return aten.index_put(base, [tokens], values)


def traced(scatter: Callable[..., Tensor], combine: Callable[[Tensor, Tensor], Any]) -> tuple[Any, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ROWS, (TOKENS,), generator=draw)
    values, other = torch.randn(TOKENS, WIDTH, generator=draw), torch.randn(ROWS, WIDTH, generator=draw)

    def function(tokens: Tensor, values: Tensor, other: Tensor) -> Any:
        return combine(scatter(torch.full((ROWS, WIDTH), 0.0), tokens, values), other * 2)

    return make_fx(function)(tokens, values, other), [tokens, values, other]


def adds(gm: Any) -> int:
    return sum(n.target is aten.add.Tensor for n in gm.graph.nodes)


@pytest.mark.parametrize("scatter", [masked, put])
@pytest.mark.parametrize("combine", [lambda a, b: a + b, lambda a, b: b + a], ids=["first", "second"])
def test_the_sum_is_the_same(scatter: Any, combine: Any):
    gm, given = traced(scatter, combine)
    want = gm(*given)
    scatter_onto_sums(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert adds(gm) == 0
    assert error(gm(*given), want) < 16 * EPS


LEFT: dict[str, tuple[Any, Any]] = {
    "written over, not added": (put_over, lambda a, b: a + b),
    "read by another, too": (put, lambda a, b: (a + b, a * 2)),
    "with a factor": (put, lambda a, b: torch.add(a, b, alpha=2)),
    "spread over the sum": (put, lambda a, b: a + b[:1]),
    "of another dtype": (put, lambda a, b: a + b.double()),
    "onto ones": (lambda base, *rest: put(base + 1, *rest), lambda a, b: a + b),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_another_sum_is_left_alone(name: str):
    gm, given = traced(*LEFT[name])
    want = gm(*given)
    before = [n.target for n in gm.graph.nodes]
    scatter_onto_sums(gm.graph)
    assert [n.target for n in gm.graph.nodes] == before
    gm.recompile()
    torch.testing.assert_close(gm(*given), want, rtol=0, atol=0)

"""FLOPs and re-run counts of a partitioned graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from actpass.ir.joint_graph import rule_of, value
from actpass.ir.op_queries import factors_of, is_attention, is_matmul
from actpass.torch_compat import size_hint


@dataclass(frozen=True, slots=True)
class MatmulCount:
    """flops: of the backward's matmuls, fused attention not counted. extra_matmuls, extra_attention: how many the backward
    runs again that the forward ran already."""

    flops: int
    extra_matmuls: int
    extra_attention: int


OF_A_BASIS = "actpass_basis"
"""In a node's meta: it makes a basis."""


def count_matmuls(forward: fx.Graph, backward: fx.Graph) -> MatmulCount:
    """Count the matmuls of a partitioned pair of graphs, but those that make bases."""
    in_forward = {n.name for n in forward.nodes if n.op == "call_function"}
    calls = [n for n in backward.nodes if n.op == "call_function" and OF_A_BASIS not in n.meta]
    again = [n for n in calls if n.name in in_forward]
    return MatmulCount(
        flops=sum(matmul_flops(n) for n in calls),
        extra_matmuls=sum(is_matmul(n) for n in again),
        extra_attention=sum(is_attention(n) for n in again),
    )


def matmul_flops(node: fx.Node) -> int:
    """2 x the multiply-adds of a matmul node; 0 for any other. A grouped matmul touches each token once."""
    if not is_matmul(node):
        return 0
    a, b = map(value, factors_of(node))
    rows = math.prod(size_hint(s) for s in a.shape)
    return 2 * rows * size_hint(b.shape[-1])


def attention_flops(node: fx.Node) -> int:
    """FLOPs of a fused attention's two products, or its backward's five; masks are not counted as savings. 0 for any other."""
    row = rule_of(node).attention
    if row is None:
        return 0
    q, k = (value(node.args[i]) for i in (row.query, row.key))  # pyright: ignore[reportArgumentType]
    rows = math.prod(size_hint(s) for s in q.shape)
    return (10 if row.is_backward else 4) * rows * size_hint(k.shape[-2])

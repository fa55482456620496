"""FLOPs and re-run counts of a partitioned graph."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.ir.joint_graph import value
from actpass.ir.op_queries import MATMULS
from actpass.torch_compat import size_hint

_NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _overloads(names: Iterable[str]) -> frozenset[Any]:
    """torch's own operators of these names, as far as this version has them."""
    packets = (getattr(torch.ops.aten, name, None) for name in names)
    return frozenset(p.default for p in packets if p is not None)


_FORWARD = (*_NAMES, "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward")
_BACKWARD = (
    *(f"{name}_backward" for name in _NAMES),
    "_flash_attention_backward",
    "_efficient_attention_backward",
    "_cudnn_attention_backward",
)
ATTENTION_BACKWARD = _overloads(_BACKWARD) | {torch.ops.higher_order.flex_attention_backward}
ATTENTION = _overloads(_FORWARD) | {torch.ops.higher_order.flex_attention} | ATTENTION_BACKWARD
"""Fused attention, forward and backward: operators, not names, which anyone may give to an operator of their own. A new one is
one name."""


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


def is_matmul(node: fx.Node) -> bool:
    return node.target in MATMULS


def is_attention(node: fx.Node) -> bool:
    """Whether ``node`` is a fused attention operator (not one of the tensors that come out of it)."""
    return node.target in ATTENTION


def matmul_flops(node: fx.Node) -> int:
    """2 x the multiply-adds of a matmul node; 0 for any other. A grouped matmul touches each token once."""
    if node.target not in MATMULS:
        return 0
    i, j = MATMULS[node.target]
    a, b = (value(node.args[k]) for k in (i, j))  # pyright: ignore[reportArgumentType]
    rows = math.prod(size_hint(s) for s in a.shape)
    return 2 * rows * size_hint(b.shape[-1])

"""What the backward does with a saved tensor: the proof behind the word "unbiased".

A saved tensor enters the backward graph as an input. We propagate the polynomial degree of that input, all others being
fixed: copies, casts, sums and slices keep it, a product adds the degrees of its factors, every other function makes it
infinite. If no gradient has a degree above one, the backward is linear in the tensor, and an unbiased codec gives an
unbiased gradient (arXiv 2605.01255: compression is safe on linear operators and not on others).
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from actpass.graph.joint import CASTS, builtin_name, is_view, value

aten = torch.ops.aten

UseKind = Literal["contraction", "linear", "nonlinear"]

_KEEPS_DEGREE = CASTS | {
    aten.clone.default,
    aten.neg.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.mean.default,
    aten.cat.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.constant_pad_nd.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.embedding_dense_backward.default,
    aten.mul.Scalar,
    aten.div.Scalar,
}
_ADDS = {aten.add.Tensor, aten.sub.Tensor}
_MULTIPLIES = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.dot.default, aten.mv.default}
_LINEAR_ARGUMENTS = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": (3, 4),
    "_scaled_dot_product_flash_attention_backward": (3, 4),
    "_scaled_dot_product_efficient_attention_backward": (3, 5),
    "_scaled_dot_product_cudnn_attention_backward": (3, 4),
    "_flash_attention_backward": (3, 4),
    "_efficient_attention_backward": (3, 5),
}
"""Fused attention backward -> positions of `v` and `out`. They enter as dS = P * (dO v^T - rowsum(dO * out)) only, and dO, the
first argument, enters linearly, so the gradient has the degrees of dO and of the higher of both together."""
SCORES_OF = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": ((1, 2), (3,), 5),
    "_scaled_dot_product_flash_attention_backward": ((1, 2), (3,), 5),
    "_scaled_dot_product_efficient_attention_backward": ((1, 2), (3,), 6),
    "_scaled_dot_product_cudnn_attention_backward": ((1, 2), (3,), 5),
    "_flash_attention_backward": ((1, 2), (3,), 5),
    "_efficient_attention_backward": ((1, 2), (3,), 10),
    "flex_attention_backward": ((0, 1), (2,), 4),
}
"""Fused attention backward -> positions of q and k, of v, and of the logsumexp of their scores."""
WRITES = {
    aten.index_put.default: (0, 2),
    aten._unsafe_index_put.default: (0, 2),
    aten._unsafe_masked_index_put_accumulate.default: (0, 3),
    aten.scatter_add.default: (0, 3),
    aten.scatter.src: (0, 3),
    aten.index_add.default: (0, 3),
}
"""What writes values at places -> positions of what is written to and of the values."""


@dataclass(frozen=True, slots=True)
class Use:
    """One backward consumer of a saved tensor. op: its operator. kind: see DESIGN, "use"."""

    op: str
    kind: UseKind


def classify_uses(tensor: fx.Node, contractions: Iterable[str]) -> tuple[tuple[Use, ...], bool]:
    """The uses of ``tensor`` (an input of a backward graph), and whether the backward is linear in it as a whole.

    contractions: names of the weight-gradient matmuls. Reading stops as soon as a degree above one is found.
    """
    names = frozenset(contractions)
    uses = tuple(
        Use(str(user.target), "contraction" if user.name in names else _kind({user: _degree(user, {via: 1.0})}))
        for user, via in consumers(tensor)
    )
    linear = all(u.kind != "nonlinear" for u in uses) and _max_degree({tensor: 1.0}) <= 1.0
    return uses, linear


def consumers(tensor: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(consumer, the view or cast of ``tensor`` that it reads), through views and casts."""
    found: list[tuple[fx.Node, fx.Node]] = []
    todo = [tensor]
    while todo:
        node = todo.pop(0)
        for user in node.users:
            if is_view(user) or user.target in CASTS:
                todo.append(user)
            elif user.op != "output":
                found.append((user, node))
    return found


def _kind(start: dict[fx.Node, float]) -> UseKind:
    return "linear" if _max_degree(start) <= 1.0 else "nonlinear"


def _max_degree(start: dict[fx.Node, float]) -> float:
    """The largest degree that any output has in the start nodes; returns early once a degree exceeds one."""
    degrees = dict(start)
    if any(d > 1.0 for d in degrees.values()):
        return math.inf
    todo = [user for node in start for user in node.users]
    heapq.heapify(todo)  # in the graph's order
    while todo:
        node = heapq.heappop(todo)
        if node in degrees or node.op == "output":
            continue
        degree = _degree(node, degrees)
        if degree > 1.0:
            return degree
        if degree > 0.0:
            degrees[node] = degree
            for user in node.users:
                heapq.heappush(todo, user)
    return max(degrees.values())


def _degree(node: fx.Node, degrees: dict[fx.Node, float]) -> float:
    def of(argument: Any) -> float:
        if isinstance(argument, fx.Node):
            return degrees.get(argument, 0.0)
        if isinstance(argument, list | tuple):
            return max((of(a) for a in argument), default=0.0)
        return 0.0

    target: Any = node.target
    args = node.args
    if target in CASTS and not value(node).dtype.is_floating_point:
        return math.inf
    if is_view(node) or target in _ADDS or target in _KEEPS_DEGREE:
        return max(of(a) for a in args)
    if target is aten.where.self:
        return math.inf if of(args[0]) else max(of(args[1]), of(args[2]))
    if target in _MULTIPLIES:
        return of(args[0]) + of(args[1])
    if target is aten.div.Tensor:
        return math.inf if of(args[1]) else of(args[0])
    if target is operator.getitem:
        return of(args[0])
    places = WRITES.get(target)
    if places is not None and not any(of(a) for i, a in enumerate(args) if i not in places):
        return max(of(args[i]) for i in places)
    places = _LINEAR_ARGUMENTS.get(builtin_name(node))
    if places is not None and not any(of(a) for i, a in enumerate(args) if i not in (0, *places)):
        return of(args[0]) + max(of(args[i]) for i in places)
    return math.inf

"""Take the sum of a one-hot row, times a number of the row, without its loop: it is the number times what is hot.

The gradient of cross entropy is softmax less a one-hot, and log-softmax's own formula adds the one-hot's row up, over all
words: a pass over as many elements as the logits have, though of nothing that is read. All terms but one are zeros (or, where
the number is not finite, NaN, which 0 times it is, too), so the result is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import rule_of, value
from actpass.passes.base import GraphPass, RegionState

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True, slots=True)
class _OneHots:
    """Rows of ``dtype`` that are ``number`` where the position along the last axis is that of ``index``, which has a 1 there,
    and else 0."""

    index: fx.Node
    number: float
    dtype: torch.dtype


@dataclass(frozen=True)
class SumOneHots(GraphPass):
    name: str = "sum_one_hots"

    def run(self, state: RegionState) -> RegionState:
        found = [(n, made) for n in _sums(state.joint.gm.graph) if (made := _factors(n)) is not None]
        if not found:
            return state
        gm, copies = copy_module(state.joint.gm)
        editor = GraphEditor(gm)
        for node, (one_hots, of_row) in found:
            new = copies[node]
            given = [copies[one_hots.index], copies[of_row]]
            new.replace_all_uses_with(editor.splice(_summed(node, one_hots), given, after=new, like=new))
        editor.clean()
        return state.with_graph(gm)


def _sums(graph: fx.Graph) -> list[fx.Node]:
    """The sums over the last axis alone."""
    found: list[fx.Node] = []
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        axes: Any = node.args[1]
        count = value(node.all_input_nodes[0]).dim()
        if axes and count and [d % count for d in axes] == [count - 1]:
            found.append(node)
    return found


def _factors(node: fx.Node) -> tuple[_OneHots, fx.Node] | None:
    """The one-hot rows that ``node`` sums, and the tensor of a number a row that they are multiplied by."""
    product = _product(node)
    factors: Any = product.args
    if product.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in factors):
        return None
    for first, second in (factors, factors[::-1]):
        one_hots, of_row = _one_hots(first), _of_rows(second)
        if one_hots is None or of_row is None:
            continue
        shape = value(product).shape
        if shape[-1] == value(first).shape[-1] and shape[:-1] in [value(n).shape[:-1] for n in (one_hots.index, of_row)]:
            return one_hots, of_row
    return None


def _product(node: fx.Node) -> fx.Node:
    """What ``node`` sums, before a cast."""
    return _before_cast(node.all_input_nodes[0])


def _before_cast(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if rule_of(node).cast and value(node).is_floating_point() else node


def _one_hots(node: fx.Node) -> _OneHots | None:
    node = _before_cast(node)
    if node.target is not aten.where.self:
        return None
    choice: Any = node.args
    is_hot, hot, cold = choice
    if _number(cold) != 0 or _number(hot) is None or is_hot.target is not aten.eq.Tensor:
        return None
    for labels, positions in (is_hot.args, is_hot.args[::-1]):
        index = _of_rows(labels)
        if index is None or value(index).is_floating_point():
            continue
        if value(index).dim() == value(node).dim() and _counts(positions):
            return _OneHots(index, _number(hot), value(node).dtype)
    return None


def _number(node: Any) -> Any:
    """What each element of ``node`` is, if that is a number in the code."""
    fill = rule_of(node).fill if isinstance(node, fx.Node) else None
    number = None if fill is None else node.args[fill]
    return number if isinstance(number, int | float) else None


def _counts(node: fx.Node) -> bool:
    """Whether ``node`` is 0, 1, 2, ... along its last axis, and has no other. One alone is no sum."""
    length = value(node).shape[-1] if value(node).dim() else 1
    while node.target in (aten.view.default, aten.unsqueeze.default):
        node = node.all_input_nodes[0]
    is_by_ones = node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1
    is_wide = value(node).dtype in (torch.int32, torch.int64)
    return bool(node.target is prims.iota.default and is_by_ones and is_wide and node.args[0] == length != 1)


def _of_rows(node: fx.Node) -> fx.Node | None:
    """What ``node`` has for each row, once, if it is the same at all positions."""
    source = node.all_input_nodes[0] if node.target is aten.expand.default else node
    return source if value(source).dim() > 0 and value(source).shape[-1] == 1 else None


def _summed(node: fx.Node, one_hots: _OneHots) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    product, summed_dtype = value(_product(node)), value(node.all_input_nodes[0]).dtype
    length, keeps_axis = product.shape[-1], value(node).dim() == product.dim()

    def summed(index: torch.Tensor, of_row: torch.Tensor) -> torch.Tensor:
        is_a_position = (index >= 0) & (index < length)
        number, zero = (torch.full((), n, dtype=one_hots.dtype, device=index.device) for n in (one_hots.number, 0))
        hot = torch.where(is_a_position, number, zero).to(product.dtype)
        made = (hot * of_row + 0 * of_row).to(summed_dtype).to(value(node).dtype)
        return made if keeps_axis else made.squeeze(-1)

    return summed

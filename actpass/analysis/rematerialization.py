"""What the backward can run again: the matmuls and fused attentions that a saved tensor takes to be rebuilt, and the sums at
which all of a model's paths meet, the natural places to start from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from actpass.ir.joint_graph import Joint, builtin_name, is_view, rule_of, tensor_bytes, value
from actpass.ir.op_cost import attention_flops, matmul_flops
from actpass.ir.op_queries import is_attention, is_matmul, is_pointwise, is_reduction
from actpass.torch_compat import OpOverload, arguments_of, size_hint

aten = torch.ops.aten


@dataclass(frozen=True)
class Recomputation:
    """A joint graph, read for what can be run again in its backward."""

    joint: Joint

    @cached_property
    def forward(self) -> list[fx.Node]:
        """What the forward's outputs are computed from, in order; not what the forward computes for the backward alone."""
        needed: set[fx.Node] = set()
        todo = list(self.joint.forward_outputs)
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo.extend(node.all_input_nodes)
        return [n for n in self.joint.gm.graph.nodes if n in needed]

    @cached_property
    def hidden(self) -> frozenset[fx.Node]:
        """Forward nodes that depend on data and on a parameter."""
        learned = set(self.joint.parameter_path)
        for node in self.forward:
            if any(a in learned for a in node.all_input_nodes):
                learned.add(node)
        return self.joint.activations & learned

    @cached_property
    def residual_sums(self) -> tuple[fx.Node, ...]:
        """The sums of two hidden states through which every path from the inputs to the loss goes: the residual stream behind
        each of its additions."""
        position = {n: i for i, n in enumerate(self.forward)}
        found: list[fx.Node] = []
        reach = -1  # the last reader of anything before
        for node in self.forward:
            if node not in self.hidden:
                continue
            sources = {a for a in node.all_input_nodes if a in self.hidden}
            own = node.meta.get("recompute") is None  # not what the user's checkpointing decides
            if own and reach == position[node] and node.target is aten.add.Tensor and len(sources) == 2:
                found.append(node)
            reach = max(reach, *(position[u] for u in node.users if u in position), position[node])
        return tuple(found)

    def extra_bytes(self, total: fx.Node) -> int | None:
        """How many bytes more it takes to store ``total``, a sum, than to store what it is rebuilt from: of the ways up from it
        to something that never runs again, whose values nobody else reads, the one that is widest where it is narrowest. None
        if there is no such way. Where it is 0, storing the sum in place of an addend costs nothing."""
        return self._excess(total, tensor_bytes)

    def extra_elements(self, total: fx.Node) -> int | None:
        """As `extra_bytes`, for elements: what it takes more where all are stored in one format."""
        return self._excess(total, lambda n: size_hint(value(n).numel()) if tensor_bytes(n) else 0)

    def _excess(self, total: fx.Node, size: Callable[[fx.Node], int]) -> int | None:
        widest: int | None = None
        todo = [(total, size(total))]
        while todo:
            node, width = todo.pop()
            if node.meta.get("recompute") is not None:  # the user's checkpointing decides what runs again
                continue
            if not rule_of(node).recomputable:
                widest = max(width, widest or 0)
                continue
            for a in node.all_input_nodes:
                if a in self.hidden and len(a.users) == 1:
                    todo.append((a, min(width, size(a) or width)))
        return None if widest is None else size(total) - widest

    @cached_property
    def anchors(self) -> frozenset[str]:
        """Every second residual sum, of the two halves the one that costs more to rebuild: what stays stored when everything
        between is run again. Without them the last layer's backward would start from the first layer."""
        halves = [[n for i, n in enumerate(self.residual_sums) if i % 2 == half] for half in (0, 1)]
        others = set(self.residual_sums)
        costs = [sum(self.flops(self.producers(n, others - {n}) or ()) for n in half) for half in halves]
        return frozenset(n.name for n in halves[costs[1] >= costs[0]])

    def producers(self, node: fx.Node, available: Collection[fx.Node]) -> tuple[fx.Node, ...] | None:
        """The matmuls and fused attentions to run again to rebuild ``node`` from ``available`` and what needs none; None if
        something on the way can't be run again with the same result: a random operator, an exponential (with a statistic
        of the exact value it would be off by a factor), what is neither matmul nor loop, what the user's own checkpointing
        decided."""
        found: dict[fx.Node, None] = {}
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if current not in self.hidden or (current in available and current is not node):
                continue
            if current.meta.get("recompute") is not None:
                return None
            if is_matmul(current) or is_attention(current):
                if not _is_repeatable(current):
                    return None
                found[current] = None
                continue
            if not rule_of(current).reruns and current.target is not operator.getitem:
                return None
            new = [a for a in current.all_input_nodes if a not in seen]
            seen.update(new)
            todo.extend(new)
        return tuple(sorted(found, key=self._position.__getitem__))

    def scores_behind(self, node: fx.Node) -> fx.Node | None:
        """The one product of two activations that ``node`` is a function of, with statistics of it (a softmax's): the scores of
        attention that is not fused. None if there is no such, or another activation enters that is learned."""
        scores: fx.Node | None = None
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if current not in self.hidden:
                continue
            if current.meta.get("recompute") is not None:
                return None
            if is_matmul(current):
                if scores not in (None, current) or sum(a in self.joint.activations for a in current.all_input_nodes) < 2:
                    return None
                scores = current
                continue
            if not (is_pointwise(current) or is_reduction(current)):
                return None
            new = [a for a in current.all_input_nodes if a not in seen]
            seen.update(new)
            todo.extend(new)
        return scores if scores is not None and _is_repeatable(scores) else None

    def softmax_of(self, scores: fx.Node) -> tuple[fx.Node, ...]:
        """``scores`` and what is reduced of it along a dimension (a softmax's maximum and sum), which only run again together
        are of one and the same product; none if nothing is exponentiated."""
        below, reductions, exponentiated = {scores}, list[fx.Node](), False
        for node in self.forward:
            if not any(a in below for a in node.all_input_nodes):
                continue
            if is_reduction(node):
                if not isinstance(node.meta["val"], torch.Tensor):  # a maximum with its places, a variance with its mean
                    return ()
                if size_hint(value(node).numel()) > 1:  # a loss is no statistic
                    reductions.append(node)
                    below.add(node)
            elif is_pointwise(node) or is_view(node):
                below.add(node)
                exponentiated |= rule_of(node).exponential
        return (scores, *reductions) if exponentiated else ()

    @cached_property
    def _position(self) -> dict[fx.Node, int]:
        return {n: i for i, n in enumerate(self.joint.gm.graph.nodes)}

    def flops(self, nodes: Collection[fx.Node]) -> int:
        return sum(matmul_flops(n) + attention_flops(n) for n in nodes)


def _is_repeatable(node: fx.Node) -> bool:
    """Whether a second run gives the same: an operator of torch's own without dropout."""
    target: Any = node.target
    if not isinstance(target, OpOverload) or not builtin_name(node):
        return False
    for i, argument in enumerate(arguments_of(target)):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return isinstance(given, int | float) and given == 0
    return True


def attention_behind(statistic: fx.Node) -> fx.Node | None:
    """The fused attention whose logsumexp ``statistic`` is."""
    while is_view(statistic) or (is_pointwise(statistic) and len(statistic.all_input_nodes) == 1):
        statistic = statistic.all_input_nodes[0]
    if statistic.target is not operator.getitem or not is_attention(statistic.all_input_nodes[0]):
        return None
    return statistic.all_input_nodes[0]

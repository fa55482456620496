"""Find every weight-gradient contraction dW = dy^T x, and say why a matmul that looks like one is left alone.

The rule goes backward from the gradients, not forward from the matmuls: "a matmul of a backward value with a forward
value" also matches dX = dy W and every attention product, and nothing would fail but the gradients. From each
*parameter's* gradient output we walk up through operators that only move, cast or add numbers. The matmuls where that
walk ends are the contractions, provided that

- one operand depends on a tangent (dy) and the other does not (x);
- x depends on data: a value made of parameters alone is a weight;
- nothing else reads the matmul: all its readers lie on the walk, so that only weight gradients can change;
- every other contribution to the same gradient is a contraction, too: a weight that is also an embedding is left alone;
- x is not inside activation checkpointing (it is recomputed, and saves nothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actpass.ir.joint_graph import Joint, module_path, rule_of, storage_root, value
from actpass.ir.op_queries import factors_of, is_matmul
from actpass.torch_compat import size_hint

aten = torch.ops.aten

_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


@dataclass(frozen=True, slots=True)
class WeightGradientMatmul:
    """One weight-gradient matmul.

    node: name of the matmul. x: name of the operand with the tokens. left: whether x is the first factor (dW^T = x^T dy).
    parameters: paths of the parameters whose gradient this is. groups E, tokens T, width N, out M at the traced shape
    (E = 1 but for batched experts, whose T is per expert). rank_multiple: the kernel takes only multiples of it.
    """

    node: str
    x: str
    left: bool
    parameters: tuple[str, ...]
    groups: int
    tokens: int
    width: int
    out: int
    rank_multiple: int = 1

    @property
    def flops(self) -> int:
        """FLOPs of dy^T x."""
        return 2 * self.groups * self.tokens * self.width * self.out


@dataclass(frozen=True, slots=True)
class WeightGradientMatmuls:
    """What `find_weight_gradient_matmuls` saw: the contractions, and (matmul node, parameter path, reason) for each one left
    alone."""

    contractions: tuple[WeightGradientMatmul, ...]
    rejected: tuple[tuple[str, str, str], ...]


@dataclass
class _Leaf:
    node: fx.Node
    parameters: list[str]
    reason: str | None = None


def find_weight_gradient_matmuls(joint: Joint) -> WeightGradientMatmuls:
    """Read ``joint`` (after common-subexpression elimination) and return every weight-gradient contraction in it."""
    leaves: dict[fx.Node, _Leaf] = {}
    on_walk: set[fx.Node] = set()
    unread: list[tuple[str, str, str]] = []
    for primal, gradient in joint.gradients:
        path = joint.parameter_path.get(primal)
        if path is None:
            continue
        ends, walked = _walk_up(gradient)
        on_walk |= walked
        tied = _other_contribution(joint, ends)
        if value(primal).dim() >= 2 and not any(_looks_like_contraction(joint, end) for end in ends):
            unread.append((ends[0].name, path, f"its gradient comes from {_op_name(ends[0])}, which is no matmul that is read"))
        for end in ends:
            if _looks_like_contraction(joint, end):
                leaf = leaves.setdefault(end, _Leaf(end, []))
                leaf.parameters.append(path)
                leaf.reason = leaf.reason or tied
    for leaf in leaves.values():
        leaf.reason = leaf.reason or _unusable(joint, leaf.node, on_walk)
    order = {n: i for i, n in enumerate(joint.gm.graph.nodes)}
    ordered = sorted(leaves.values(), key=lambda leaf: order[leaf.node])
    return WeightGradientMatmuls(
        tuple(_contraction(joint, leaf) for leaf in ordered if leaf.reason is None),
        (*((leaf.node.name, leaf.parameters[0], leaf.reason) for leaf in ordered if leaf.reason is not None), *unread),
    )


def _walk_up(gradient: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
    """Where the contributions to a gradient come from, and the nodes on the way (the gradient included)."""
    ends: dict[fx.Node, None] = {}
    walked: set[fx.Node] = set()
    todo = [gradient]
    while todo:
        node = todo.pop()
        sources = _moved(node)
        if sources is None or _adds(node):
            ends[node] = None
        if sources is not None and node not in walked:
            walked.add(node)
            todo.extend(sources)
    return list(ends), walked


def _moved(node: fx.Node) -> list[fx.Node] | None:
    """The inputs whose numbers ``node`` only moves, casts or adds; None if it does anything else."""
    if node.op != "call_function":
        return None
    row = rule_of(node)
    if row.moves is not None or row.cast:
        return node.all_input_nodes
    if _adds(node):
        return [node.all_input_nodes[0]] if not node.kwargs else None
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        return node.all_input_nodes if len(node.all_input_nodes) == 2 else None
    if node.target is aten.sum.dim_IntList and _sums_batches(node):
        return [node.all_input_nodes[0]]
    return None


def _adds(node: fx.Node) -> bool:
    """Whether something is added to the product that ``node`` is: one more contribution to the same gradient."""
    row = rule_of(node).matmul
    return row is not None and row.addend is not None


def _sums_batches(node: fx.Node) -> bool:
    """Whether a sum only adds the batches of one bmm: a weight that was broadcast over a batch."""
    source = node.all_input_nodes[0]
    return source.target is aten.bmm.default and list(node.args[1]) == [0]  # pyright: ignore[reportArgumentType]


def _looks_like_contraction(joint: Joint, node: fx.Node) -> bool:
    if not is_matmul(node):
        return False
    a, b = factors_of(node)
    return (a in joint.backward) != (b in joint.backward) and (a in joint.activations or b in joint.activations)


def _other_contribution(joint: Joint, ends: list[fx.Node]) -> str | None:
    for end in ends:
        constant = end not in joint.backward
        if not constant and not _looks_like_contraction(joint, end):
            return f"tied: the same parameter's gradient also comes from {_op_name(end)}"
    return None


def _unusable(joint: Joint, node: fx.Node, on_walk: set[fx.Node]) -> str | None:
    reader = _other_reader(joint, node, on_walk)
    if reader is not None:
        return f"its result is also read by {reader}, not only by a weight gradient"
    if _adds(node) and node.kwargs:
        return "scales its product or its addend (alpha, beta)"
    if not _plain_shapes(node):
        return "factors of this grouped matmul are not both two-dimensional"
    x = factors_of(node)[1 if factors_of(node)[0] in joint.backward else 0]
    if not value(x).is_floating_point():
        return f"x is {value(x).dtype}, not a floating-point tensor"
    if node.target is aten._scaled_mm.default:
        return "the model's own matmul in fp8"
    if any(n.meta.get("recompute") in _RECOMPUTED for n in (x, storage_root(x))):
        return "inside activation checkpointing: x is recomputed and saves nothing"
    if not isinstance(_width(joint, node), int):
        return "the feature width is dynamic"
    return None


def _other_reader(joint: Joint, matmul: fx.Node, on_walk: set[fx.Node]) -> str | None:
    """Who reads the numbers of ``matmul``, moved or not, for anything but a sum that is a parameter's gradient."""
    parameters = {g for primal, g in joint.gradients if primal in joint.parameter_path}
    others = {*joint.forward_outputs, *(g for primal, g in joint.gradients if primal not in joint.parameter_path)}
    todo, seen = [matmul], {matmul}
    while todo:
        node = todo.pop()
        if node in others:
            return "an output that is no weight gradient"
        for user in node.users:
            if user.op == "output":
                if node not in parameters:
                    return "an output that is no weight gradient"
            elif user not in on_walk or node not in (_moved(user) or ()) or (_adds(user) and node in factors_of(user)):
                return _op_name(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return None


def _plain_shapes(node: fx.Node) -> bool:
    a, b = factors_of(node)
    row = rule_of(node).matmul
    return value(a).dim() == value(b).dim() == (3 if row is not None and row.batched else 2)


def _width(joint: Joint, node: fx.Node) -> Any:
    a, b = factors_of(node)
    return value(a).shape[-2] if b in joint.backward else value(b).shape[-1]


def _contraction(joint: Joint, leaf: _Leaf) -> WeightGradientMatmul:
    a, b = factors_of(leaf.node)
    left = b in joint.backward
    x, dy = (a, b) if left else (b, a)
    val, dw = value(x), value(leaf.node)
    groups = size_hint(dw.shape[0]) if dw.dim() == 3 else 1
    tokens = size_hint(val.shape[-1] if left else val.shape[-2])
    row = rule_of(leaf.node).matmul
    grouped = row is not None and row.grouped
    return WeightGradientMatmul(
        node=leaf.node.name,
        x=x.name,
        left=left,
        parameters=tuple(leaf.parameters),
        groups=groups,
        tokens=-(-tokens // groups) if grouped else tokens,
        width=size_hint(val.shape[-2] if left else val.shape[-1]),
        out=size_hint(value(dy).shape[-1] if left else value(dy).shape[-2]),
        rank_multiple=max(1, 16 // val.element_size()) if grouped else 1,
    )


def _op_name(node: fx.Node) -> str:
    name = str(node.target)
    where = module_path(node)
    return f"{name} in {where}" if where else name

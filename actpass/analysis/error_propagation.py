"""How the backward reads a tensor, as far as an error in it matters: in an exponent, as a factor of attention's scores, where
something is divided by it or compared with it, or in an operator that nobody here knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from actpass.analysis.linearity import consumers
from actpass.ir.joint_graph import is_view, rule_of, value
from actpass.ir.op_queries import FOR_CODES, is_cast, is_matmul, is_pointwise
from actpass.ir.op_rules import OP_RULES
from actpass.plan import RECOMPUTED_SCORE, SCORE, Role
from actpass.torch_compat import OpOverload, size_hint

aten = torch.ops.aten

_PASSES_A_ZERO = ("keeps_zero", "offset", "clamps")
_TORCH_NAMESPACES = ("aten", "prims")

Read = tuple[str | None, Role, fx.Node | None]
"""How a fused attention's backward reads a tensor: as a `SCORE` or `RECOMPUTED_SCORE` or neither, in which role, with which
logsumexp."""


class ErrorPropagation:
    """How a backward graph reads its tensors. One sweep from its end says from which nodes an exponential, attention or a
    step is reached at all: only those are followed, for what a tensor enters meets the gradients of all layers before.

    exponentiated: whose exponential is taken, behind any pointwise operators; but for a sigmoid's, which adds one to it and is
    bounded, and for that of a square, a Gaussian's (GELU).
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.exponentiated: set[fx.Node] = set()
        self._attended: set[fx.Node] = set()
        self._stepped: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if any(self._exponentiates(user, node) for user in node.users):
                self.exponentiated.add(node)
            passed = [user for user in node.users if is_pointwise(user)]
            if any(self._attends(user, node) for user in node.users) or not self._attended.isdisjoint(passed):
                self._attended.add(node)
            moved = [*passed, *filter(_moves_elements, node.users)]
            if any(map(_is_step, passed)) or not self._stepped.isdisjoint(moved):
                self._stepped.add(node)

    def _exponentiates(self, user: fx.Node, node: fx.Node) -> bool:
        if _is_square(user, node) and all(_is_negated(u) for u in user.users):
            return False
        if rule_of(user).exponential and not all(_adds_number(u) for u in user.users):
            return True
        return user in self.exponentiated and _is_floating(user) and (is_pointwise(user) or is_view(user))

    def _attends(self, user: fx.Node, node: fx.Node) -> bool:
        queries, values, _ = _places(user)
        return any(user.args[i] is node for i in (*queries, *values)) or (is_matmul(user) and user in self.exponentiated)

    def attention_reads(self, tensor: fx.Node, learned: set[str]) -> list[Read]:
        """Where a fused attention's backward reads ``tensor`` as its q, k or v, behind views, copies and rotations, or a
        product that is run again and exponentiated reads it as a factor. learned: names of what depends on a parameter."""
        found: list[Read] = []
        todo, seen = [tensor], {tensor}
        while todo:
            node = todo.pop()
            for user in node.users if node in self._attended else ():
                queries, values, place = _places(user)
                statistic: Any = user.args[place] if place is not None else None
                if any(user.args[i] is node for i in queries):
                    exact = statistic is None or not _is_formed_again(statistic)
                    found.append((SCORE if exact else RECOMPUTED_SCORE, "score", statistic))
                elif any(user.args[i] is node for i in values):
                    found.append((None, "value", statistic))
                elif is_matmul(user) and user in self.exponentiated:
                    found.append((RECOMPUTED_SCORE if _softmax_is_formed_again(user, learned) else SCORE, "score", None))
                if is_pointwise(user) and user not in seen:
                    seen.add(user)
                    todo.append(user)
        return found

    def ill_conditioned_use(self, tensor: fx.Node | None) -> str | None:
        """An operator that a small error in ``tensor`` can throw far off: what divides by it, takes a root or a logarithm of it
        (behind an addition of a tensor, a reduction or a bounded function a zero is gone), compares it for equality with the
        exact maximum, makes an index of it, or factors it as a matrix. A comparison is found behind any pointwise operator, and
        behind what moves elements."""
        if tensor is None:
            return None
        if tensor in self._stepped:
            return next(str(n.target) for n in _pointwise_below(tensor, moved=True) if _is_step(n))
        todo = [tensor]
        seen = set(todo)
        while todo:
            node = todo.pop()
            for user in node.users:
                if _is_fragile(user, node):
                    return str(user.target)
                passes = rule_of(user).domain in _PASSES_A_ZERO or is_cast(user) or _adds_number(user) or is_view(user)
                if passes and user not in seen:
                    seen.add(user)
                    todo.append(user)
        return None


def _places(user: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Where ``user`` takes q and k, v, and a logsumexp, if it is a fused attention's backward."""
    row = rule_of(user).attention
    if row is None or not row.is_backward:
        return (), (), None
    return (row.query, row.key), (row.value,), row.logsumexp


def _is_step(node: fx.Node) -> bool:
    return rule_of(node).domain == "step" and FOR_CODES not in node.meta


def _softmax_is_formed_again(scores: fx.Node, learned: set[str]) -> bool:
    """Whether nothing smaller that may be a statistic of ``scores``, a maximum or a sum, comes from the forward: a mask does
    not depend on a parameter."""
    below, size = _pointwise_below(scores), size_hint(value(scores).numel())
    for other in {a for n in below for a in n.all_input_nodes} - below:
        val = other.meta.get("val")
        if isinstance(val, torch.Tensor) and val.dtype.is_floating_point and size_hint(val.numel()) < size:
            source = other
            while is_view(source) or (is_pointwise(source) and source.all_input_nodes):
                source = next((a for a in source.all_input_nodes if a.name in learned), source.all_input_nodes[0])
            if source.op == "placeholder" and source.name in learned:
                return False
    return True


def _is_formed_again(statistic: Any) -> bool:
    """Whether the backward computes ``statistic`` itself."""
    while isinstance(statistic, fx.Node) and (is_view(statistic) or is_pointwise(statistic)):
        statistic = statistic.all_input_nodes[0]
    return isinstance(statistic, fx.Node) and statistic.op != "placeholder"


def opaque_users(tensor: fx.Node | None) -> set[str]:
    """Operators that read ``tensor``, through views and casts, and are neither torch's own nor have a row."""
    targets = [user.target for user, _ in consumers(tensor)] if tensor is not None else []
    overloads: list[OpOverload[..., Any]] = [t for t in targets if isinstance(t, OpOverload)]
    return {str(t) for t in overloads if t.namespace not in _TORCH_NAMESPACES and str(t) not in OP_RULES}


def _is_fragile(user: fx.Node, node: fx.Node) -> bool:
    row = rule_of(user)
    if FOR_CODES in user.meta:
        return False
    if row.domain in ("unbounded", "step"):
        return True
    if row.divisor is not None:
        return user.args[row.divisor] is node
    if user.target is aten.pow.Tensor_Scalar:
        return not _is_whole(user.args[1])
    return row.cast and not value(user).dtype.is_floating_point


def _is_whole(exponent: object) -> bool:
    return isinstance(exponent, int | float) and exponent >= 0 and float(exponent).is_integer()


def _is_floating(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype.is_floating_point


def _is_square(user: fx.Node, node: fx.Node) -> bool:
    squared = user.target is aten.pow.Tensor_Scalar and bool(user.args[1] == 2)
    return squared or (user.target is aten.mul.Tensor and user.args[:2] == (node, node))


def _is_negated(node: fx.Node) -> bool:
    factor = node.args[1] if node.target in (aten.mul.Tensor, aten.mul.Scalar) else None
    return node.target is aten.neg.default or (isinstance(factor, int | float) and factor < 0)


def _pointwise_below(tensor: fx.Node, *, moved: bool = False) -> set[fx.Node]:
    """All that is computed of ``tensor`` by pointwise operators alone; ``moved``: or by what moves elements."""
    todo, found = [tensor], set[fx.Node]()
    while todo:
        users = todo.pop().users
        new = [u for u in users if u not in found and (is_pointwise(u) or (moved and _moves_elements(u)))]
        found.update(new)
        todo.extend(new)
    return found


def _moves_elements(node: fx.Node) -> bool:
    """Whether ``node`` has elements of its argument, in other places: joined, flipped, selected by an index."""
    row = rule_of(node)
    return row.moves is not None or (row.recomputable and row.matmul is None)


def _adds_number(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not isinstance(node.args[1], fx.Node)

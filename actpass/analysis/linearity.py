"""What the backward does with a saved tensor: the proof behind the word "unbiased".

A saved tensor enters the backward graph as an input. We propagate the polynomial degree of that input, all others being
fixed: copies, casts, sums and slices keep it, a product adds the degrees of its factors, every other function makes it
infinite. If no gradient has a degree above one, the backward is linear in the tensor, and an unbiased codec gives an
unbiased gradient (arXiv 2605.01255: compression is safe on linear operators and not on others).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import fx

from actpass.ir.joint_graph import is_view, rule_of, value
from actpass.ir.op_queries import FOR_CODES, OF_A_SCALE, is_cast

UseKind = Literal["contraction", "linear", "nonlinear"]


@dataclass(frozen=True, slots=True)
class Use:
    """One backward consumer of a saved tensor. op: its operator. kind: see docs/design/linearity.md; "contraction": in a
    weight-gradient matmul."""

    op: str
    kind: UseKind


class Uses:
    """What a backward graph does with each of its inputs, found in one sweep over its nodes.

    A *start* is an input, or a consumer of one together with the view or cast that it reads; every start has a bit. The sweep
    carries, for each node, the starts in which it has degree one, and gathers those in which some node has a higher one.
    """

    def __init__(self, graph: fx.Graph) -> None:
        inputs = graph.find_nodes(op="placeholder")
        self._consumers = {n: consumers(n) for n in inputs}
        reads = dict.fromkeys(pair for found in self._consumers.values() for pair in found)
        self._bit: dict[Any, int] = {start: 1 << i for i, start in enumerate((*inputs, *reads))}
        self._nonlinear = self._sweep(graph, reads)

    def _sweep(self, graph: fx.Graph, reads: Iterable[tuple[fx.Node, fx.Node]]) -> int:
        read_by: dict[fx.Node, list[fx.Node]] = {}
        for user, via in reads:
            read_by.setdefault(user, []).append(via)
        degree_one: dict[fx.Node, int] = {}
        nonlinear = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                degree_one[node] = self._bit[node]
            elif node.op != "output":
                starts = ({via: self._bit[node, via]} for via in read_by.get(node, ()))
                found = [_degree(node, known) for known in (degree_one, *starts)]
                higher = _union(more for _, more in found)
                nonlinear |= higher
                degree_one[node] = _union(one for one, _ in found) & ~higher
        return nonlinear

    def of(self, tensor: fx.Node, contractions: Iterable[str]) -> tuple[tuple[Use, ...], bool]:
        """The uses of ``tensor`` (an input of the graph), and whether the backward is linear in it as a whole. contractions:
        names of the weight-gradient matmuls."""
        names = frozenset(contractions)
        found = self._consumers[tensor]
        kinds: list[UseKind] = ["contraction" if user.name in names else self._kind((user, via)) for user, via in found]
        uses = tuple(Use(str(user.target), kind) for (user, _), kind in zip(found, kinds, strict=True))
        return uses, "nonlinear" not in kinds and self._kind(tensor) == "linear"

    def _kind(self, start: Any) -> UseKind:
        return "nonlinear" if self._bit[start] & self._nonlinear else "linear"


def consumers(tensor: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(consumer, the view or cast of ``tensor`` that it reads), through views and casts."""
    found: list[tuple[fx.Node, fx.Node]] = []
    todo = [tensor]
    while todo:
        node = todo.pop(0)
        for user in node.users:
            if is_view(user) or is_cast(user):
                todo.append(user)
            elif user.op != "output":
                found.append((user, node))
    return found


def _degree(node: fx.Node, degree_one: Mapping[fx.Node, int]) -> tuple[int, int]:
    """The starts in which ``node`` has degree one, and those in which it has a higher one. degree_one: of its inputs."""
    reached = _union(degree_one.get(a, 0) for a in node.all_input_nodes)
    if not reached:
        return 0, 0

    def of(argument: Any) -> int:
        if isinstance(argument, fx.Node):
            return degree_one.get(argument, 0)
        if isinstance(argument, list | tuple):
            return _union(map(of, cast(Sequence[Any], argument)))
        return 0

    args = node.args
    if FOR_CODES in node.meta:
        return (0 if OF_A_SCALE in node.meta else reached), 0
    if is_cast(node) and not value(node).dtype.is_floating_point:
        return 0, reached
    if is_view(node) or node.target is operator.getitem:
        return of(args), 0
    groups = rule_of(node).linear
    if not groups:
        return 0, reached
    factors = [_union(of(args[i]) for i in group if i < len(args)) for group in groups]
    higher = _union(of(a) for i, a in enumerate(args) if not any(i in group for group in groups))
    for a, b in itertools.combinations(factors, 2):
        higher |= a & b
    return _union(factors), higher


def _union(sets: Iterable[int]) -> int:
    union = 0
    for members in sets:
        union |= members
    return union

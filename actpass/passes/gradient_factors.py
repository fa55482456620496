"""Weight gradients that are in factors: which coefficients they are lifted from, moved and cast on their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from actpass.codecs import LEARNED
from actpass.ir.joint_graph import rule_of, value
from actpass.passes.base import RegionState
from actpass.plan import Decision

aten = torch.ops.aten

_MOST_TERMS = 64
"""Of a sum that stays in factors. A weight that is used in more places has a dense gradient."""


@dataclass(frozen=True)
class GradientFactors:
    """nodes: coefficients somewhere in the graph, one for each use of the weight, which are added up. left: whether they are
    the second factor of what they lift to. swapped: whether the gradient is the transpose of that. dtypes: what it is cast to,
    in order."""

    nodes: tuple[fx.Node, ...]
    basis: fx.Node
    decision: Decision
    left: bool
    swapped: bool = False
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def way(self) -> Any:
        """Equal for coefficients that may be added: through one basis, which a seeded method has for all of one size."""
        d = self.decision
        basis = (d.projection, d.width, d.rank, d.projection_scaling, d.site if d.projection in LEARNED else None)
        return basis, self.left, self.swapped, self.dtypes

    @property
    def basis_first(self) -> bool:
        """Whether the basis is the first factor of the gradient, G = P C (N, M)."""
        return self.left != self.swapped

    def of(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """C of the gradient, from what its ``nodes`` hold: (R, M) if the `basis_first`, or (M, R)."""
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole.transpose(-1, -2) if self.swapped else whole

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        for dtype in self.dtypes:
            tensor = tensor.to(dtype)
        return tensor


def find_gradient_factors(state: RegionState) -> list[tuple[fx.Node, GradientFactors]]:
    """(primal, its coefficients) for each parameter whose gradient is one rewritten contraction, or a sum of several through
    one basis."""
    known: dict[fx.Node, GradientFactors | None] = {}
    for node in state.joint.gm.graph.nodes:
        known[node] = _factors_of(node, state, known)
    gradients = [(p, known[g]) for p, g in state.joint.gradients if p in state.joint.parameter_path]
    return [(primal, found) for primal, found in gradients if found is not None and value(primal).dim() in (2, 3)]


def _factors_of(node: fx.Node, state: RegionState, known: Mapping[fx.Node, GradientFactors | None]) -> GradientFactors | None:
    """The coefficients of a gradient, if ``node`` is one. known: what was found of all nodes before it."""
    if node in state.lifts:
        lift = state.lifts[node]
        return GradientFactors((lift.factor,), lift.basis, lift.decision, lift.contraction.left)
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        a, b = (known[n] if isinstance(n, fx.Node) else None for n in node.args)
        if a is None or b is None or a.way != b.way or len(a.nodes) + len(b.nodes) > _MOST_TERMS:
            return None
        return replace(a, nodes=(*a.nodes, *b.nodes))
    row = rule_of(node)
    if not row.cast and row.moves not in ("copy", "permute", "reshape"):
        return None
    source = node.all_input_nodes[0]
    inner = known[source]
    if inner is None or row.moves == "copy":
        return inner
    if row.cast:
        if value(node).device != value(source).device:
            return None
        return replace(inner, dtypes=(*inner.dtypes, value(node).dtype))
    if row.moves == "permute":
        dims = value(source).dim()
        order = _order(node, dims)
        if order == tuple(range(dims)):
            return inner
        swap = (*range(dims - 2), dims - 1, dims - 2)
        return replace(inner, swapped=not inner.swapped) if order == swap else None
    return inner if tuple(value(node).shape) == tuple(value(source).shape) else None


def _order(node: fx.Node, dims: int) -> tuple[int, ...]:
    places = list(range(dims))
    if node.target is aten.permute.default:
        given: Any = node.args[1]
        return tuple(int(i) % dims for i in given)
    a, b = (0, 1) if node.target is aten.t.default else (int(i) % dims for i in node.args[1:3])  # pyright: ignore[reportArgumentType]
    places[a], places[b] = places[b], places[a]
    return tuple(places)

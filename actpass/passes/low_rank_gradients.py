"""Leave weight gradients in their factors: the backward returns the coefficients C, and G = C Pᵀ is never formed.

A parameter's gradient qualifies if it is one rewritten contraction, or a sum of several through one basis, moved and cast on
its way. In the compiled region its coefficients come back as the gradient of an input of their own
(`actpass.low_rank_gradient.Coefficients`), which hands them on to the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from actpass.codecs import LEARNED
from actpass.errors import GraphUnsupported
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import rule_of, size_hint, value
from actpass.ir.outputs import output_values, set_output_values
from actpass.ir.traversal import ancestors
from actpass.passes.base import RegionState
from actpass.plan import Decision, FactoredGradient

aten = torch.ops.aten


@dataclass(frozen=True)
class _Found:
    """Coefficients that are somewhere in the graph. swapped: whether the gradient is the transpose of what they lift to.
    dtypes: what it is cast to, in order."""

    nodes: tuple[fx.Node, ...]
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


@dataclass(frozen=True)
class LowRankGradients:
    """Where the inputs that get the coefficients have arrived, the graph returns these in place of the gradients."""

    name: str = "low_rank_gradients"
    serves: str | None = "projections"

    def run(self, state: RegionState) -> RegionState:
        if not (state.plan.projections and state.config.keeps_low_rank_gradients):
            return state
        state = state.on_a_copy() if state.joint.coefficients else state
        joint, paths = state.joint, state.joint.parameter_path
        found = [(primal, f) for primal, f in _candidates(state) if state.decides.is_factored(paths[primal])]
        factored = tuple(_factored(paths[primal], primal, f) for primal, f in found)
        state = replace(state, plan=replace(state.plan, low_rank_gradients=factored))
        if not joint.coefficients:
            return state
        if len(joint.coefficients) != len(factored):
            raise GraphUnsupported(
                f"places for {len(joint.coefficients)} low-rank gradients arrived, and there are {len(factored)}"
            )
        inserted = _return(state, found)
        return replace(state.with_graph(joint.gm), inserted=inserted)

    def check(self, before: RegionState, after: RegionState) -> None:
        """Forward outputs but the sketches read no inserted node."""
        own = (o for o in after.joint.forward_outputs if o not in after.sketches)
        if ancestors(own).intersection(after.inserted):
            raise AssertionError("low-rank gradients reached an output of the forward")


def _candidates(state: RegionState) -> Iterator[tuple[fx.Node, _Found]]:
    known: dict[fx.Node, _Found | None] = {}
    for node in state.joint.gm.graph.nodes:
        known[node] = _coefficients(node, state, known)
    for primal, gradient in state.joint.gradients:
        if primal in state.joint.parameter_path:
            found = known[gradient]
            if found is not None and value(primal).dim() in (2, 3):
                yield primal, found


_MOST_TERMS = 64
"""Of a sum that stays in factors. A weight that is used in more places has a dense gradient."""


def _coefficients(node: fx.Node, state: RegionState, known: Mapping[fx.Node, _Found | None]) -> _Found | None:
    """The coefficients of a gradient, if ``node`` is one. known: what was found of all nodes before it."""
    if node in state.lifts:
        factor, contraction, decision = state.lifts[node]
        return _Found((factor,), decision, contraction.left)
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


def _factored(path: str, primal: fx.Node, found: _Found) -> FactoredGradient:
    rank, left = found.decision.rank, found.left != found.swapped
    assert rank is not None
    *outer, rows, columns = (size_hint(s) for s in value(primal).shape)
    shape = (*outer, rank, columns) if left else (*outer, rows, rank)
    return FactoredGradient(path, found.decision.site, "left" if left else "right", shape)


def _return(state: RegionState, found: Sequence[tuple[fx.Node, _Found]]) -> frozenset[fx.Node]:
    """Return coefficients in place of gradients, in place. Returns all that passes have inserted."""
    joint, editor = state.joint, GraphEditor(state.joint.gm)
    values = output_values(editor.graph)
    places = {p: joint.num_fwd_outputs + i for i, p in enumerate(joint.primals)}
    for (primal, coefficients), factored, place in zip(found, state.plan.low_rank_gradients, joint.coefficients, strict=True):
        if tuple(value(place).shape) != factored.shape:
            raise GraphUnsupported(f"a place of {tuple(value(place).shape)} arrived for coefficients of {factored.shape}")

        def collect(*parts: torch.Tensor, _found: _Found = coefficients) -> torch.Tensor:
            whole = parts[0]
            for part in parts[1:]:
                whole = whole + part
            whole = whole.transpose(-1, -2) if _found.swapped else whole
            for dtype in _found.dtypes:
                whole = whole.to(dtype)
            return whole.contiguous()

        last = max(coefficients.nodes)
        values[places[primal]] = None
        values[places[place]] = editor.splice(collect, coefficients.nodes, after=last, like=last)
    set_output_values(editor.graph, values)
    editor.clean()
    return frozenset(n for n in (*state.inserted, *editor.inserted) if not n._erased)

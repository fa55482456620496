"""Leave weight gradients in their factors: the backward returns the coefficients C, and G = C Pᵀ is never formed.

A parameter's gradient qualifies if it is one rewritten contraction, or a sum of several through one basis, moved and cast on
its way. In the compiled region its coefficients come back as the gradient of an input of their own
(`actpass.low_rank_gradient.Coefficients`), which hands them on to the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from actpass.errors import GraphUnsupported
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import size_hint, value
from actpass.ir.outputs import output_values, set_output_values
from actpass.ir.traversal import ancestors
from actpass.passes.base import RegionState
from actpass.passes.gradient_factors import GradientFactors, find_gradient_factors
from actpass.plan import FactoredGradient


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
        found = [(primal, f) for primal, f in find_gradient_factors(state) if state.decides.is_factored(paths[primal])]
        factored = tuple(_factored(paths[primal], primal, f) for primal, f in found)
        state = replace(state, plan=replace(state.plan, low_rank_gradients=factored))
        if not joint.coefficients:
            return state
        if len(joint.coefficients) != len(factored):
            raise GraphUnsupported(
                f"places for {len(joint.coefficients)} low-rank gradients arrived, and there are {len(factored)}"
            )
        inserted = _return(state, found)
        left = {n: lift for n, lift in state.lifts.items() if not n._erased}
        return replace(state.with_graph(joint.gm), inserted=inserted, lifts=left)

    def check(self, before: RegionState, after: RegionState) -> None:
        """Forward outputs but the sketches read no inserted node."""
        own = (o for o in after.joint.forward_outputs if o not in after.sketches)
        if ancestors(own).intersection(after.inserted):
            raise AssertionError("low-rank gradients reached an output of the forward")


def _factored(path: str, primal: fx.Node, found: GradientFactors) -> FactoredGradient:
    rank = found.decision.rank
    assert rank is not None
    *outer, rows, columns = (size_hint(s) for s in value(primal).shape)
    shape = (*outer, rank, columns) if found.basis_first else (*outer, rows, rank)
    return FactoredGradient(path, found.decision.site, "left" if found.basis_first else "right", shape)


def _return(state: RegionState, found: Sequence[tuple[fx.Node, GradientFactors]]) -> frozenset[fx.Node]:
    """Return coefficients in place of gradients, in place. Returns all that passes have inserted."""
    joint, editor = state.joint, GraphEditor(state.joint.gm)
    values = output_values(editor.graph)
    places = {p: joint.num_fwd_outputs + i for i, p in enumerate(joint.primals)}
    for (primal, coefficients), factored, place in zip(found, state.plan.low_rank_gradients, joint.coefficients, strict=True):
        if tuple(value(place).shape) != factored.shape:
            raise GraphUnsupported(f"a place of {tuple(value(place).shape)} arrived for coefficients of {factored.shape}")

        def collect(*parts: torch.Tensor, _found: GradientFactors = coefficients) -> torch.Tensor:
            return _found.cast(_found.of(parts)).contiguous()

        last = max(coefficients.nodes)
        values[places[primal]] = None
        values[places[place]] = editor.splice(collect, coefficients.nodes, after=last, like=last)
    set_output_values(editor.graph, values)
    editor.clean()
    return frozenset(n for n in (*state.inserted, *editor.inserted) if not n._erased)

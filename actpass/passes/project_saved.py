"""Store what crosses the cut as its projection onto a learned subspace, whatever the backward does with it: the forward returns
z = x P, the backward starts from x_hat = z P^T, which it forms in front of the first use.

Works on the two graphs that upstream's partitioner made, as `actpass.passes.quantize_saved` does, which may code z in turn. The
backward gets the subspace (an input of the region, never a saved copy) and draws the same basis from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from actpass.analysis.partitioned import PartitionedGraph
from actpass.codecs import decode
from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import value
from actpass.ir.op_cost import OF_A_BASIS
from actpass.passes.base import RegionState
from actpass.passes.bases import Bases, LearnedBasis, Sketches, seed_of, subspaces_of
from actpass.passes.boundary import Boundary, check_outputs
from actpass.passes.in_batches import most_beside
from actpass.plan import Decision
from actpass.torch_compat import rename

_OWN = "actpass_"
"""What the names of inserted nodes begin with: a name that both passes have would pass for something that is run again."""


@dataclass(frozen=True)
class ProjectSaved:
    """Where the subspaces have not arrived yet, zeros stand for the bases."""

    name: str = "project_saved"
    serves: str | None = "projections"

    def run(self, state: RegionState) -> RegionState:
        decisions, tensors = state.decides.decide_decoded(state)
        plan = replace(state.plan, decisions=(*state.plan.decisions, *decisions))
        state = replace(state, plan=plan, decoded={d.site: tensors[d.site] for d in plan.decoded})
        if not plan.decoded:
            return state
        storing = _Storing(state)
        projected = storing.project(plan.decoded)
        storing.rebuild(projected)
        sketches = storing.sketches.take()
        return replace(
            state,
            cut=storing.close(),
            payloads={**state.payloads, **{p.decision: p.z.name for p in projected}},
            inserted=state.inserted | storing.inserted,
            sketches=state.sketches | sketches,
        )

    def check(self, before: RegionState, after: RegionState) -> None:
        """The forward's own outputs but the sketches are the same nodes and read no inserted one; of the decoded tensors none
        crosses, and each one's projection does."""
        plan, cut = after.plan, after.partitioned
        if plan.decoded:
            check_outputs(before.partitioned, cut, after.inserted, after.sketches, after.count)
            crossing = {s.holder for s in cut.saved} | {s.name for s in cut.saved}
            left = [node for node, t in after.decoded.items() if crossing.intersection((node, *t.saved_for_backward))]
            if left or not {after.payloads[d] for d in plan.decoded} <= crossing:
                raise GraphUnsupported(f"{left[0] if left else 'nothing'} crosses, where a projection should")


@dataclass(frozen=True)
class _Projected:
    """A tensor ``x`` of the forward whose projection ``z`` crosses in its place. arrived: z in the backward. basis: what is
    drawn there to rebuild x, before its first reader."""

    decision: Decision
    x: fx.Node
    z: fx.Node
    arrived: fx.Node
    basis: LearnedBasis


class _Storing:
    def __init__(self, state: RegionState) -> None:
        most = most_beside(state.joint, state.default_bytes)
        self.tensors, self.boundary = state.decoded, Boundary(state.partitioned, state.count)
        self.forward = state.with_graph(self.boundary.forward.module).joint
        self.subspaces = subspaces_of(state.joint, state.plan)
        self.bases = Bases(self.boundary.forward, most), Bases(self.boundary.backward, most)
        self.sketches = Sketches(self.boundary.forward, self.forward, most)

    def project(self, decisions: Sequence[Decision]) -> list[_Projected]:
        """Let projections cross in place of tensors. Each has random numbers that no other has: two may be multiplied."""
        wanted = [self._in_forward(d, number) for number, d in enumerate(decisions, 1)]
        return [self._project(w, basis) for w, basis in zip(wanted, self.bases[0].learned(wanted), strict=True)]

    def _in_forward(self, decision: Decision, number: int) -> LearnedBasis:
        x = self.boundary.before[decision.site]
        state = self.boundary.before[self.subspaces[decision].name] if decision in self.subspaces else None
        seed = seed_of(decision, self.forward.seed if state is None else self.forward.learned_seed)
        return LearnedBasis(decision, value(x).dtype, state, seed, x.next, number)

    def _project(self, wanted: LearnedBasis, basis: fx.Node) -> _Projected:
        boundary, decision, state = self.boundary, wanted.decision, wanted.state
        x, crossing, behind = boundary.before[decision.site], self.tensors[decision.site].saved_for_backward, boundary.behind
        z = boundary.forward.splice(torch.matmul, [x, basis], after=x, like=x)
        rename(z, f"{_OWN}z")  # no name that another node has in the backward
        self.sketches.want(decision, x, z, state, flat=True)
        inputs = [n for n in (state, wanted.seed) if n is not None]
        passed = [n for n in inputs if n.name not in behind]  # a forward passes its inputs on, once
        reader = boundary.first_reader(crossing)
        arrived, *others = boundary.send(crossing, [z, *passed], free=state)
        behind |= {n.name: new for n, new in zip(passed, others, strict=True)}
        state, seed = None if state is None else behind[state.name], behind[wanted.seed.name]
        return _Projected(decision, x, z, arrived, replace(wanted, state=state, seed=seed, before=reader))

    def rebuild(self, projected: Sequence[_Projected]) -> None:
        """Form each tensor in the backward, in front of its first use."""
        editor = self.boundary.backward
        for p, basis in zip(projected, self.bases[1].learned([p.basis for p in projected]), strict=True):
            reader, crossing = p.basis.before, self.tensors[p.decision.site].saved_for_backward
            # the product that rebuilds x is no matmul of the model
            x_hat = editor.splice(decode, [p.arrived, basis], after=reader.prev, like=reader, marks={OF_A_BASIS: True})
            self.boundary.show(crossing, p.x, x_hat)

    @property
    def inserted(self) -> frozenset[fx.Node]:
        return frozenset(self.boundary.forward.inserted | self.boundary.backward.inserted)

    def close(self) -> PartitionedGraph:
        self.boundary.forward.name_inserted(_OWN)
        self.boundary.backward.name_inserted(_OWN)
        return self.boundary.close()

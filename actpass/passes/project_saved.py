"""Store what crosses the cut as its projection onto a learned subspace, whatever the backward does with it: the forward returns
z = x P, the backward starts from x_hat = z P^T, which it forms in front of the first use.

Works on the two graphs that upstream's partitioner made, as `actpass.passes.quantize_saved` does, which may code z in turn. The
backward gets the subspace (an input of the region, never a saved copy) and draws the same basis from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from actpass.analysis.partitioned import PartitionedGraph
from actpass.codecs import LEARNED, decode
from actpass.errors import GraphUnsupported
from actpass.ir.joint_graph import value
from actpass.ir.op_cost import OF_A_BASIS
from actpass.passes.base import RegionState
from actpass.passes.bases import Bases, Sketches, subspaces_of
from actpass.passes.boundary import Boundary, check_outputs
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
        payloads = {d: storing.store(d, number) for number, d in enumerate(plan.decoded, 1)}
        return replace(
            state,
            cut=storing.close(),
            payloads={**state.payloads, **payloads},
            inserted=state.inserted | storing.inserted,
            sketches=state.sketches | storing.sketches.taken,
        )

    def check(self, before: RegionState, after: RegionState) -> None:
        """The forward's own outputs but the sketches are the same nodes and read no inserted one; of the decoded tensors none
        crosses, and each one's projection does; every subspace that arrived has a projection."""
        plan, cut, subspaces = after.plan, after.partitioned, after.joint.subspaces
        if plan.decoded:
            check_outputs(before.partitioned, cut, after.inserted, after.sketches, after.count)
            crossing = {s.holder for s in cut.saved} | {s.name for s in cut.saved}
            left = [node for node, t in after.decoded.items() if crossing.intersection((node, *t.saved_for_backward))]
            if left or not {after.payloads[d] for d in plan.decoded} <= crossing:
                raise GraphUnsupported(f"{left[0] if left else 'nothing'} crosses, where a projection should")
        if subspaces and len(subspaces) != sum(d.projection in LEARNED for d in plan.projections):
            raise GraphUnsupported(f"{len(subspaces)} subspaces arrived for {len(plan.projections)} projections")


class _Storing:
    def __init__(self, state: RegionState) -> None:
        self.tensors, self.boundary = state.decoded, Boundary(state.partitioned, state.count)
        self.forward = state.with_graph(self.boundary.forward.module).joint
        self.subspaces = subspaces_of(state.joint, state.plan)
        self.bases = Bases(self.boundary.forward), Bases(self.boundary.backward)
        self.sketches = Sketches(self.boundary.forward, self.forward)

    def store(self, decision: Decision, number: int) -> str:
        """Let the projection of a tensor cross in its place; returns its name. number: of its random numbers, which no
        other tensor has: two may be multiplied."""
        boundary, tensor = self.boundary, self.tensors[decision.site]
        x, behind = boundary.before[decision.site], boundary.behind
        state = boundary.before[self.subspaces[decision].name] if decision in self.subspaces else None
        seed = self.forward.seed if state is None else self.forward.learned_seed
        basis = self.bases[0].learned(decision, value(x).dtype, (state, seed), x, number)
        z = boundary.forward.splice(torch.matmul, [x, basis], after=x, like=x)
        rename(z, f"{_OWN}z")  # no name that another node has in the backward
        self.sketches.take(decision, x, z, state, flat=True)
        passed = [n for n in (state, seed) if n is not None and n.name not in behind]  # a forward passes its inputs on, once
        arrived, *others = boundary.send(tensor.saved_for_backward, [z, *passed], free=state)
        behind |= {n.name: new for n, new in zip(passed, others, strict=True)}
        drawn_from = None if state is None else behind[state.name], None if seed is None else behind[seed.name]
        self._rebuild(decision, x, drawn_from, arrived, number)
        return z.name

    def _rebuild(
        self, decision: Decision, x: fx.Node, drawn_from: tuple[fx.Node | None, fx.Node | None], z: fx.Node, number: int
    ) -> None:
        """Form x_hat in the backward, in front of its first use."""
        crossing, editor = self.tensors[decision.site].saved_for_backward, self.boundary.backward
        reader = self.boundary.first_reader(crossing)
        basis = self.bases[1].learned(decision, value(x).dtype, drawn_from, reader.prev, number)
        # the product that rebuilds x is no matmul of the model
        x_hat = editor.splice(decode, [z, basis], after=reader.prev, like=reader, marks={OF_A_BASIS: True})
        self.boundary.show(crossing, x, x_hat)

    @property
    def inserted(self) -> frozenset[fx.Node]:
        return frozenset(self.boundary.forward.inserted | self.boundary.backward.inserted)

    def close(self) -> PartitionedGraph:
        self.boundary.forward.name_inserted(_OWN)
        self.boundary.backward.name_inserted(_OWN)
        return self.boundary.close()

"""Carry a plan out in the joint graph, before the cut: dW = dy^T x becomes (dy^T (x P)) P^T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from actpass.analysis.weight_gradients import WeightGradientMatmul
from actpass.codecs import LEARNED, contract, encode
from actpass.errors import GraphUnsupported
from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import Joint, rule_of, value
from actpass.ir.traversal import ancestors
from actpass.passes.base import Lift, RegionState
from actpass.passes.bases import Bases, LearnedBasis, Sketches, seed_of, subspaces_of
from actpass.passes.in_batches import most_beside
from actpass.plan import Decision, Plan

BACKWARD_ONLY = {"partitioner_tag": "must_be_in_backward"}


@dataclass(frozen=True)
class ProjectWeightGradients:
    """One z = x P for all readers of x. Where the subspaces have not arrived yet (the compiler asks which there will be), a
    basis of zeros stands for a learned one."""

    name: str = "project_weight_gradients"
    serves: str | None = "projections"

    def run(self, state: RegionState) -> RegionState:
        plan = Plan(state.decides.decide_gradients())
        state = replace(state, plan=plan)
        if not plan.projections:
            return state
        projecting = _Projecting(state.with_graph(copy_module(state.joint.gm)[0]).joint, state)
        projecting.draw_learned(plan.contracted)
        for decision in plan.contracted:
            projecting.carry_out(decision)
        editor, sketches = projecting.editor, projecting.sketches.take()
        editor.clean()
        return replace(
            state.with_graph(editor.module),
            inserted=frozenset(editor.inserted),
            payloads=projecting.payloads,
            sketches=sketches,
            lifts=projecting.lifts,
        )

    def check(self, before: RegionState, after: RegionState) -> None:
        """Forward outputs but the sketches, input gradients and the gradients of unplanned parameters read no inserted node."""
        joint = after.joint
        planned = {path for d in after.plan.projections for path in d.parameters}
        free = [g for primal, g in joint.gradients if joint.parameter_path.get(primal) not in planned]
        read = ancestors([*(o for o in joint.forward_outputs if o not in after.sketches), *free])
        touched = read.intersection(after.inserted)
        if touched:
            raise AssertionError(f"the rewrite reached a value that it must not change, through {min(touched)}")


@dataclass
class _Projecting:
    joint: Joint
    state: RegionState
    payloads: dict[Decision, str] = field(default_factory=dict[Decision, str])
    lifts: dict[fx.Node, Lift] = field(default_factory=dict[fx.Node, Lift])
    learned: dict[Decision, fx.Node] = field(default_factory=dict[Decision, fx.Node])

    def __post_init__(self) -> None:
        self.editor = GraphEditor(self.joint.gm)
        most = most_beside(self.joint, self.state.default_bytes)
        self.bases, self.sketches = Bases(self.editor, most), Sketches(self.editor, self.joint, most)
        self.subspaces = subspaces_of(self.joint, self.state.plan)
        self.nodes = {n.name: n for n in self.joint.gm.graph.nodes}
        self.found: Mapping[str, WeightGradientMatmul] = {c.node: c for c in self.state.finding.contractions}

    def draw_learned(self, decisions: Sequence[Decision]) -> None:
        """Draw the learned bases, in the order of what they project."""
        learned = sorted((d for d in decisions if d.projection in LEARNED), key=lambda d: self.nodes[d.site])
        wanted = [self._learned(d, self.nodes[d.site]) for d in learned]
        self.learned = dict(zip(learned, self.bases.learned(wanted), strict=True))

    def _learned(self, decision: Decision, x: fx.Node) -> LearnedBasis:
        subspace = self.subspaces.get(decision)
        seed = seed_of(decision, self.joint.seed if subspace is None else self.joint.learned_seed)
        return LearnedBasis(decision, value(x).dtype, subspace, seed, x.next)

    def carry_out(self, decision: Decision) -> None:
        members, x = [self.found[name] for name in decision.matmuls], self.nodes[decision.site]
        basis = self.learned.get(decision) or self.bases.seeded(decision, x, self.joint.seed)
        z = self._payload(x, basis, decision, members[0].left)
        self.sketches.want(decision, x, z, self.subspaces.get(decision), left=members[0].left)
        for contraction in members:
            self._replace(contraction, z, basis, decision)

    def _payload(self, x: fx.Node, basis: fx.Node, decision: Decision, left: bool) -> fx.Node:
        def project(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
            return encode(x.transpose(-1, -2) if left else x, basis)

        marks = BACKWARD_ONLY if decision.project_in == "backward" else None
        z = self.editor.splice(project, [x, basis], after=x, like=x, marks=marks)
        self.payloads[decision] = z.name
        return z

    def _replace(self, contraction: WeightGradientMatmul, z: fx.Node, basis: fx.Node, decision: Decision) -> None:
        """Put the factored gradient where the contraction's matmul was."""
        matmul = self.nodes[contraction.node]
        row = rule_of(matmul).matmul
        assert row is not None
        i, j = row.factors
        dy = matmul.args[j if contraction.left else i]
        has_addend = row.addend is not None
        unadorned = torch.ops.aten.mm.default if value(z).dim() == 2 else torch.ops.aten.bmm.default
        product: Any = unadorned if has_addend else matmul.target
        others = matmul.args[:1] if has_addend else matmul.args[2:]

        def coefficients(z: torch.Tensor, dy: torch.Tensor, *others: Any) -> torch.Tensor:
            return product(*((z.transpose(-1, -2), dy) if contraction.left else (dy, z)), *others)

        def gradient(coefficients: torch.Tensor, basis: torch.Tensor, *addend: torch.Tensor) -> torch.Tensor:
            found = contract(coefficients, basis, left=contraction.left)
            return addend[0] + found if addend else found

        given = [z, dy, *(() if has_addend else others)]
        factor = self.editor.splice(coefficients, given, after=matmul, like=matmul)
        given = [factor, basis, *(others if has_addend else ())]
        new = self.editor.splice(gradient, given, after=matmul, like=matmul)
        old = value(matmul)
        if value(new).shape != old.shape or value(new).dtype != old.dtype:
            raise GraphUnsupported(f"{matmul.name}: {tuple(value(new).shape)} in place of {tuple(old.shape)}")
        matmul.replace_all_uses_with(new)
        if not has_addend:
            self.lifts[new] = Lift(factor, basis, contraction, decision)

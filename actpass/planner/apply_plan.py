"""Follow a plan that is given: find the region it is for, and check everything it asks for against the graph.

What a hand may have edited is refused with a reason (`PlanError`) where the graph does not allow it, and never replaced by
something else. What a plan leaves out is exact: a tensor that it does not name is stored as it is, a weight gradient that it
does not name is formed exactly. A tensor that it names and that is not stored any more, because the plan itself runs again
what made it or stores a projection in its place, is told in a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.analysis.projection_sites import find_projection_sites
from actpass.analysis.saved_tensors import EARLY_GRADIENT
from actpass.analysis.weight_gradients import WeightGradientMatmul
from actpass.codecs import LEARNED, QUANTIZERS
from actpass.errors import BudgetError, LogitsReturned, PlanError
from actpass.ir.fingerprint import fingerprint, plain_inputs
from actpass.ir.joint_graph import Joint, storage_root
from actpass.ir.op_queries import is_attention, is_matmul, is_reduction
from actpass.options import Config, TensorOptions
from actpass.passes.base import RegionState
from actpass.plan import EXPONENTIAL, RECOMPUTED_SCORE, SAVE, SCORE, Candidate, CodecSet, Decision, Plan, SavedTensor, Storage
from actpass.plan.multi_region import OperatingPoint
from actpass.plan.store import store
from actpass.plan_file import ModelPlan
from actpass.planner.peak_budget import PeakBudget
from actpass.planner.plan_source import CarryOut, decodable
from actpass.planner.region import PartitionPlan, Region, sizes_in

_SHOWN = 8
"""Names that an error lists at most."""


@dataclass(frozen=True)
class Following:
    """A plan that is given."""

    given: Plan
    is_given: bool = True

    def loss_rows(self, config: Config) -> int | bool:
        return self.given.chunk_rows

    def check_loss(self, state: RegionState) -> None:
        if self.given.chunk_rows and state.chunked is None:
            why = state.why_whole or "no logits weigh"
            raise PlanError(f"the plan forms the loss in chunks, which is not possible: {why}.")

    def plan(self, region: Region, carry_out: CarryOut, peak: PeakBudget | None) -> tuple[PartitionPlan, RegionState]:
        choice = choose(region, self.given)
        done = carry_out(GivenPlan(region, choice, self.given))
        return check_budget(region, choice, done.partitioned, done.plan.storages, peak), done


@dataclass(frozen=True)
class GivenPlan:
    """What ``given`` says of ``region``, checked against the graph."""

    region: Region
    choice: PartitionPlan
    given: Plan
    is_given: bool = True

    def decide_gradients(self) -> tuple[Decision, ...]:
        region = self.region
        candidates = find_projection_sites(region.joint, region.finding, self.choice.cut, grouping(self.given))
        return decide(region, self.given, candidates)

    def is_factored(self, parameter: str) -> bool:
        return parameter in {g.parameter for g in self.given.low_rank_gradients}

    def decide_decoded(self, state: RegionState) -> tuple[tuple[Decision, ...], Mapping[str, SavedTensor]]:
        if not self.given.decoded:
            return (), {}
        tensors, owners = decodable(self.region, state)
        return decide_decoded(self.given, list(tensors.values()), owners), tensors

    def decide_storages(self, state: RegionState) -> tuple[tuple[Storage, ...], tuple[str, ...]]:
        """None while it is only asked which subspaces the region will take: the graph that forms are of comes with them."""
        if not state.joint.subspaces and any(d.projection in LEARNED for d in state.plan.projections):
            return (), ()
        return forms(self.region, self.given, state.joint, state.partitioned, state.plan.decisions)


def find(plan: ModelPlan, joint: Joint) -> Plan:
    """The region of ``plan`` that is for this joint graph. Raises `PlanError` if there is none, and `LogitsReturned` if the
    logits of ``joint`` are deferred: what has no region for them may have one for whole ones."""
    try:
        return _find(plan, joint)
    except PlanError as error:
        if joint.inputs.deferred:
            raise LogitsReturned(f"{error}") from error
        raise


def _find(plan: ModelPlan, joint: Joint) -> Plan:
    graph = fingerprint(joint)
    found = [r for r in plan.regions if r.graph == graph]
    if len({r.hash for r in found}) > 1:
        raise PlanError(f"the plan has {len(found)} regions for the graph {graph} that differ. Allowed: one, or equal ones.")
    if found:
        return found[0]
    inputs = plain_inputs(joint)
    same = [r for r in plan.regions if sorted(t for _, t in r.inputs) == sorted(t for _, t in inputs)]
    why = (
        "its inputs have the same shapes, but the graph is another: the model, its dtype, autocast, whether two inputs are one "
        "tensor, or a version of torch or of the model's library has changed"
        if same
        else f"the plan's regions have the inputs {' or '.join(_shown(r.inputs) for r in plan.regions[:_SHOWN]) or '(none)'}"
    )
    raise PlanError(
        f"the plan has no region for the graph {graph} with the inputs {_shown(inputs)}: {why}. A plan is for one model and "
        "one shape. Make one for this: actpass.explain(model, ..., options=...).plan, or actpass.report(model).plan after a "
        "step."
    )


def _shown(inputs: Sequence[tuple[str, str]]) -> str:
    return f"({', '.join(text for _, text in inputs)})"


def choose(region: Region, plan: Plan) -> PartitionPlan:
    """The cut that ``plan`` asks for. Raises `PlanError` for what can't be run again or held."""
    nodes = {n.name: n for n in region.joint.gm.graph.nodes}
    for name in plan.must_save:
        _check_kept(region.joint, nodes, name)
    if plan.recompute:
        _check_again(region, nodes, plan)
    constraints = PartitionConstraints(plan.recompute_materialized, frozenset(plan.recompute), frozenset(plan.must_save))
    untouched = constraints == PartitionConstraints(recompute_materialized=False) and not plan.chunk_rows
    return PartitionPlan(constraints, region.default if untouched else region.cut(constraints), {})


def _node(nodes: dict[str, fx.Node], name: str, where: str) -> fx.Node:
    if name not in nodes:
        raise PlanError(f"{where} names {name!r}, which is not in the graph. Take the names from the plan or the report.")
    return nodes[name]


def _check_kept(joint: Joint, nodes: dict[str, fx.Node], name: str) -> None:
    node = _node(nodes, name, "must_save")
    if node.op != "call_function" or node in joint.backward:
        raise PlanError(f"must_save names {name!r}, which is no value that the forward computes. Allowed: those.")
    if node.meta.get("recompute") is not None:
        raise PlanError(
            f"must_save names {name!r}, which lies inside the user's own activation checkpointing. Remove it from must_save."
        )


def _check_again(region: Region, nodes: dict[str, fx.Node], plan: Plan) -> None:
    """By the rule of a search (`actpass.plan.storage_options`): only what a tensor takes to be rebuilt that crosses when
    nothing is run again, and a query or key only together with its attention."""
    for name in plan.recompute:
        node = _node(nodes, name, "recompute")
        if not (is_matmul(node) or is_attention(node) or is_reduction(node)) or node in region.joint.backward:
            raise PlanError(
                f"recompute names {name!r}, which is {node.target}. Allowed: matmuls and fused attentions of the forward, and "
                "with the scores of one that is not fused its statistics. All else is recomputed anyway where that is free."
            )
    allowed: set[str] = set()
    scores: dict[str, tuple[str, str]] = {}
    for constraints in _starts(region, plan):
        for t in region.saved(region.joint, region.cut(constraints), region.recomputation):
            if t.role == "score" and t.attention is not None:
                scores.update(dict.fromkeys(t.recompute, (t.node, t.attention)))
            else:
                allowed.update(t.recompute, t.of_factors)
            missing = sorted(set(t.of_factors) - set(plan.recompute))
            if missing and len(missing) < len(t.of_factors):
                raise PlanError(
                    f"recompute names {_some(sorted(set(t.of_factors) - set(missing)))} without {_some(missing)}. Scores and "
                    "their softmax's statistics are of one another: name all of them, or none."
                )
    for name in plan.recompute:
        if name not in allowed and name not in scores:
            raise PlanError(
                f"recompute names {name!r}, which can't be recomputed with the same result, or to no end: something random, an "
                "exponential, a custom operator or the user's own checkpointing lies between it and what is stored, or it is "
                f"of the residual stream. Allowed here: {_some(sorted({*allowed, *scores}))}."
            )
        tensor, attention = scores.get(name, ("", name))
        if name not in allowed and attention not in plan.recompute:
            raise PlanError(
                f"recompute names {name!r}, which makes the query or key {tensor!r}, without its attention {attention!r}, "
                f"whose logsumexp is that of the exact ones. Name {attention!r} as well, or neither."
            )


def _starts(region: Region, plan: Plan) -> Iterator[PartitionConstraints]:
    """The cuts, nothing run again, from which a search may have come to ``plan``."""
    yield PartitionConstraints(plan.recompute_materialized)
    sums = frozenset(n.name for n in region.recomputation.residual_sums)
    if plan.recompute_materialized and sums:
        yield PartitionConstraints(plan.recompute_materialized, must_save=sums)
    if plan.must_save and frozenset(plan.must_save) != sums:
        yield PartitionConstraints(plan.recompute_materialized, must_save=frozenset(plan.must_save))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more


def grouping(plan: Plan) -> Callable[[WeightGradientMatmul], Hashable]:
    """By which contractions that read one tensor are one candidate: by the plan's decisions."""
    of = _by_matmul(plan)
    return lambda c: of.get(c.node)


def _by_matmul(plan: Plan) -> dict[str, Decision]:
    return {m: d for d in plan.decisions for m in d.matmuls}


def decide(region: Region, plan: Plan, candidates: Sequence[Candidate]) -> tuple[Decision, ...]:
    """The decisions of ``plan`` over ``candidates``, which were grouped by it. Raises `PlanError`."""
    known = {c.node for c in region.finding.contractions}
    alone = {matmul: reason for matmul, _, reason in region.finding.rejected}
    for d in plan.decisions:
        for m in d.matmuls:
            if m not in known:
                why = alone.get(m, "it is not in the graph, or no weight gradient")
                raise PlanError(f"a decision on {d.site!r} names the matmul {m!r}, which can't be projected: {why}.")
    of = _by_matmul(plan)
    asked = [(c, of.get(c.matmuls[0])) for c in candidates]
    for c, d in asked:
        if d is not None:
            _check_decision(c, d)
    return tuple(_decision(c, d, [e for other, e in asked if other.base == c.base], candidates) for c, d in asked)


def _check_decision(c: Candidate, d: Decision) -> None:
    if d.site != c.name or set(d.matmuls) != set(c.matmuls):
        raise PlanError(
            f"the decision on {d.site!r} names the matmuls {', '.join(d.matmuls)}. Allowed: matmuls that read one tensor from "
            f"one side, and its name; {c.matmuls[0]!r} reads {c.name!r}."
        )
    if d.wgrad is not None and c.fp8_obstacle is not None:
        raise PlanError(f"the decision on {d.site!r} has wgrad {d.wgrad!r}, which is not possible: {c.fp8_obstacle}.")
    if d.rank is not None and (d.rank > c.width or (d.rank % c.rank_multiple and d.rank != c.width)):
        multiple = f" that {c.rank_multiple} divides" if c.rank_multiple > 1 else ""
        raise PlanError(f"the decision on {d.site!r} has the rank {d.rank}. Allowed: an int in [1, {c.width}]{multiple}.")


def _decision(c: Candidate, d: Decision | None, siblings: list[Decision | None], candidates: Sequence[Candidate]) -> Decision:
    """siblings: what is asked for all that read the storage that ``c`` reads."""
    if d is None or d.project_in is None:
        return Decision(c.name, c.matmuls, c.parameters, None, "exact, as the plan says")
    in_forward = d.project_in == "forward"
    members = [m for m in candidates if m.base == c.base]
    leaves = all(m.frees for m in members) and all(s is not None and s.project_in == "forward" for s in siblings)
    pairs = [(m, s) for m, s in zip(members, siblings, strict=True) if s is not None]
    payloads = sum(m.fp8_bytes if s.wgrad is not None else m.payload_bytes(s.rank or 0) for m, s in pairs)
    if in_forward and not (leaves and payloads < c.x_bytes):
        why = (
            f"its payloads take {payloads} bytes of {c.x_bytes}"
            if leaves
            else "something else needs it whole, or it is not stored"
        )
        raise PlanError(
            f'the decision on {d.site!r} has project_in "forward", but that frees nothing: {why}. Allowed: "backward".'
        )
    stored, formed = ("z is", "projected") if d.wgrad is None else ("its codes in fp8 are", "cast to fp8")
    freed = f"{stored} stored in place of x: {c.x_bytes - payloads} bytes freed"
    return replace(
        d,
        matmuls=c.matmuls,
        parameters=c.parameters,
        reason=freed if in_forward else f"{formed} in the backward, as the plan says",
        width=c.width,
        extra_flops=c.flops_at(d.rank) - c.flops if d.rank is not None else 0,
    )


def decide_decoded(plan: Plan, tensors: Sequence[SavedTensor], owners: Mapping[str, str]) -> tuple[Decision, ...]:
    """The decisions of ``plan`` on ``tensors`` that are decoded from their projections. owners: as `find_owners` has them.
    Raises `PlanError`."""
    by_node, decided = {t.node: t for t in tensors}, list[Decision]()
    for d in plan.decoded:
        t = by_node.get(d.site)
        if t is None or d.site not in owners:
            why = "it does not cross from forward to backward" if t is None else "its last axis is not one of features"
            raise PlanError(f"a decision decodes {d.site!r}, which is not possible: {why}. Remove it.")
        if t.obstacle is not None or t.role is not None or {SCORE, RECOMPUTED_SCORE, EXPONENTIAL} & set(t.kinds):
            why = t.obstacle or "fused attention or an exponential of the backward reads it"
            raise PlanError(f"a decision decodes {_tensor(t)}, which is not possible: {why}. Remove it.")
        width, rank = t.shape[-1], d.rank or 0
        if d.projection not in LEARNED or not rank < width:
            raise PlanError(
                f"the decision on {d.site!r} has the projection {d.projection!r} and the rank {d.rank}. Allowed: "
                f"{', '.join(LEARNED)}, and an int in [1, {width - 1}]."
            )
        flops, owner = 4 * t.elements * rank, (owners[d.site],)
        reason = "decoded from its projection, as the plan says"
        decided.append(replace(d, parameters=owner, reason=reason, width=width, extra_flops=flops, linear=t.linear))
    return tuple(decided)


def forms(
    region: Region, plan: Plan, joint: Joint, cut: PartitionedGraph, decisions: Sequence[Decision]
) -> tuple[tuple[Storage, ...], tuple[str, ...]]:
    """In which form ``plan`` stores what crosses ``cut`` of ``joint``, and notes on its entries for what does not cross. Raises
    `PlanError` for a form that is not possible."""
    tensors = region.saved(joint, cut)
    entries = {s.node: s for s in plan.storages}
    sizes, codecs = sizes_in(cut), CodecSet.of(QUANTIZERS)

    def form(t: SavedTensor) -> Storage:
        entry = entries.get(t.node)
        if entry is None or not entry.coded:
            reason = t.obstacle or ("kept, as the plan says" if entry is not None else "kept: the plan does not name it")
            return replace(store(t, TensorOptions(policy="exact"), sizes, None, codecs), reason=reason)
        request = TensorOptions(
            policy="exact",
            codec=entry.codec,
            group_size=entry.group_size,
            rounding=entry.rounding,
            hadamard_rotation=entry.hadamard_rotation,
            forced=True,
        )
        _check_form(t, entry, codecs)
        stored = store(t, request, sizes, entry.codec, codecs)
        if not stored.coded:
            raise PlanError(
                f"the plan stores {_tensor(t)} in {entry.codec}, which {stored.reason}. Allowed: save, or fewer bits."
            )
        return replace(stored, forced=entry.forced)

    storages = tuple(form(t) for t in tensors)
    crossing = {t.node for t in tensors}
    idle = [s for s in plan.storages if s.node not in crossing]
    return storages, tuple(_notes(region, plan, joint, idle, cut, decisions))


def _tensor(t: SavedTensor) -> str:
    return f"{t.node!r} ({t.paths[0] or 'no module'}, {'x'.join(map(str, t.shape))} {t.dtype})"


def _check_form(t: SavedTensor, entry: Storage, codecs: CodecSet) -> None:
    def refuse(why: str, allowed: str) -> PlanError:
        return PlanError(f"the plan stores {_tensor(t)} in {entry.codec}, which is not possible: {why}. Allowed: {allowed}.")

    if t.obstacle is not None:
        raise refuse(t.obstacle, SAVE)
    if entry.forced:
        return
    if EXPONENTIAL in t.kinds:
        raise refuse("its error becomes a factor, the backward exponentiates it", f'{SAVE}, or any form with "forced": true')
    for kind in t.kinds:
        safe = codecs.safe_for(kind)
        if safe is not None and entry.codec not in safe:
            raise refuse(
                "it is a query or key of fused attention, whose backward exponentiates their product"
                + (" with the logsumexp of the exact ones" if kind == SCORE else ""),
                f'{", ".join((SAVE, *safe))}, or any form with "forced": true',
            )


def _notes(
    region: Region, plan: Plan, joint: Joint, idle: Sequence[Storage], cut: PartitionedGraph, decisions: Sequence[Decision]
) -> Iterator[str]:
    nodes = {**{n.name: n for n in region.joint.gm.graph.nodes}, **{n.name: n for n in joint.gm.graph.nodes}}
    stored = {nodes[name] for s in cut.saved for name in (s.name, s.base) if name in nodes}
    projected = {storage_root(nodes[d.site]) for d in decisions if d.project_in == "forward"}
    for s in idle:
        node = _node(nodes, s.node, "storages")
        root = storage_root(node)
        made = region.recomputation.producers(root, stored) if root in region.recomputation.hidden else None
        if made and {n.name for n in made} <= set(plan.recompute):
            yield f"{s.node} of the plan is not stored: the backward runs {', '.join(n.name for n in made)} again"
        elif root in projected:
            yield f"{s.node} of the plan is not stored: its projection is"
        elif not s.coded:
            yield f"{s.node} of the plan is not stored: it is recomputed exactly from what is"
        else:
            raise PlanError(
                f"the plan stores {s.node!r} in {s.codec}, but it does not cross from forward to backward: the backward "
                f"recomputes it exactly, or does not read it. Remove its entry, or add {s.node!r} to must_save."
            )


def check_budget(
    region: Region, choice: PartitionPlan, done: PartitionedGraph, tensors: Sequence[Storage], peak: PeakBudget | None
) -> PartitionPlan:
    """``choice``, if what it became is within the budget that is given beside the plan. Raises `BudgetError`."""
    budget = region.config.memory_budget
    plan, other = ("the plan that is given", ", or another plan") if region.config.plan else ("what was decided", "")
    if peak is not None:
        needed = peak.needs(done)
        if needed > peak.nbytes:
            raise BudgetError(
                f"memory_budget={peak.nbytes} bytes of peak does not hold {plan}, which needs {needed} bytes: "
                f"{peak.resident}, and {done.peak_bytes} predicted above them (and a margin). Use memory_budget={needed} or "
                f"more{other}.",
                needed,
            )
        level = OperatingPoint(0, 0, done.footprint)
        return replace(choice, levels=(level,) if peak.part else ())
    if isinstance(budget, float):
        early = sum(s.nbytes for s in tensors if s.reason == EARLY_GRADIENT)
        stored, default = sum(s.stored_bytes for s in tensors) - early, region.default.saved_bytes
        if stored > budget * default:
            least = math.ceil(100 * stored / max(default, 1)) / 100
            raise BudgetError(
                f"memory_budget={budget} does not hold {plan}, which saves {stored} of the {default} bytes "
                f"that Inductor's default saves for backward. Use memory_budget={least:.2f} or more{other}.",
                least,
            )
    return choice


def refusal(reason: str) -> PlanError:
    """For a plan that turns out not to work when it is carried out."""
    return PlanError(
        f"the plan that is given can't be followed: {reason}. Compile without it, and start from actpass.report(model).plan."
    )

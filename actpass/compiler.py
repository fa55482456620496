"""The pipeline from a joint graph to a partitioned pair of graphs and a record of what was done.

This is the only file that knows all rooms::

    chunk     logits and loss -> pieces of rows               chunking
    read      joint graph -> contractions, cuts               graph/, partition
    budget    where to cut, what to store how -> Choice       budget, plan/
    choose    contractions, tensors that cross -> Plan        plan/
    rewrite   Plan -> joint graph                             rewrite
    cut       upstream min-cut                                partition
    swap      what crosses -> low-bit codes                   saved, swap
    verify    what must not have changed has not              verify
    describe  cuts + plan -> Record                           report/
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from actpass import verify
from actpass._torch import fx_graph_cse
from actpass.budget import Choice, PeakBudget, Region, choose_cut
from actpass.chunking import Chunked, chunk
from actpass.config import Config
from actpass.errors import ActpassError, ActpassWarning, GraphUnsupported
from actpass.graph import Contraction, Finding, GraphInputs, Joint, classify_uses, find_contractions
from actpass.graph.copying import copy_module
from actpass.graph.joint import storage_root, value
from actpass.partition import Cut, Cuts, Setting, cut
from actpass.plan import Candidate, Plan, Storage, choose
from actpass.report.record import Record, describe, describe_fallback
from actpass.rewrite import Rewritten, rewrite
from actpass.swap import swap


@dataclass(frozen=True)
class Compiled:
    """The graphs to hand to Inductor, what was done, the cut that they are, every stage's graph by name, and the joint graph as
    it came."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    record: Record
    cut: Cut
    stages: dict[str, fx.GraphModule]
    traced: Traced


@dataclass(frozen=True)
class Traced:
    """A joint graph before anything is decided. default: Inductor's own cut of it."""

    joint: Joint
    joint_inputs: Sequence[object]
    kwargs: Mapping[str, Any]
    config: Config
    default: Cut


def compile_joint(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    config: Config,
    inputs: GraphInputs,
    partition_kwargs: Mapping[str, Any],
    peak: PeakBudget | None = None,
) -> Compiled:
    """Partition ``gm`` as ``config`` asks. A graph that can't be read falls back to the stock cut, with a warning and the
    reason in the record; a mistake in the options raises. peak: the budget, if it is one of peak bytes."""
    joint = _prepare(gm, inputs, partition_kwargs)
    default = cut(joint, joint_inputs, partition_kwargs, Setting(rebuild=False))
    traced = Traced(joint, joint_inputs, partition_kwargs, config, default)
    try:
        return _compile(traced, peak)
    except ActpassError as error:
        if not isinstance(error, GraphUnsupported):
            raise
        reason = f"{error}"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"actpass left a region to Inductor alone, because {reason}", ActpassWarning, stacklevel=2)
    record = describe_fallback(joint, default, config, reason)
    return Compiled(default.forward, default.backward, record, default, {"joint": joint.gm}, traced)


def _prepare(gm: fx.GraphModule, inputs: GraphInputs, partition_kwargs: Mapping[str, Any]) -> Joint:
    """A private copy of the joint graph without dead code and without duplicates (under autocast q, k and v each carry a
    cast of one tensor)."""
    copy, _ = copy_module(gm)
    copy.graph.eliminate_dead_code()
    copy.graph = fx_graph_cse(copy.graph)
    static = frozenset(partition_kwargs.get("static_lifetime_input_indices") or ())
    return Joint(copy, inputs, partition_kwargs["num_fwd_outputs"], static)


def read(traced: Traced, default_bytes: int | None = None) -> tuple[Region, Chunked | None, str | None]:
    """What a plan can be made for: the joint graph, with its loss in pieces if that pays (how, or why not). default_bytes: what
    Inductor's default saves, which the logits are weighed against, if it is not the traced graph's own."""
    joint, config, default = traced.joint, traced.config, traced.default
    chunked, why_whole = None, None
    if config.chunk_loss and config.memory_budget != 1.0:
        try:
            chunked = chunk(joint, default.saved_bytes if default_bytes is None else default_bytes)
        except GraphUnsupported as error:
            why_whole = str(error)
    joint = chunked.joint if chunked is not None else joint
    finding = find_contractions(joint)
    region = Region(joint, traced.joint_inputs, traced.kwargs, config, finding, default, chunked is not None)
    return region, chunked, why_whole


def _compile(traced: Traced, peak: PeakBudget | None) -> Compiled:
    region, chunked, why_whole = read(traced)
    whole, joint, config = traced.joint, region.joint, traced.config
    choice = choose_cut(region, lambda choice: finish(region, choice).swapped, peak)
    done = finish(region, choice)
    if done.off is not None:
        warnings.warn(f"actpass: {done.off}", ActpassWarning, stacklevel=2)
    cuts = Cuts(traced.default, choice.cut, done.final, done.swapped)
    record = describe(whole, joint, region.finding, done.plan, cuts, done.rewritten, config, chunked, why_whole)
    if choice.note is not None:
        record = replace(record, notes=(*record.notes, choice.note))
    if peak is not None:
        resident = replace(record.totals, resident_bytes=peak.resident.total)
        record = replace(record, totals=resident, levels=choice.levels)
    if done.off is not None:
        record = replace(record, active=False, inactive_because=done.off)
    forward, backward = done.swapped.forward, done.swapped.backward
    stages = {"joint": joint.gm, "rewritten": done.joint.gm, "forward": forward, "backward": backward}
    return Compiled(forward, backward, record, done.swapped, stages, traced)


@dataclass(frozen=True)
class Finished:
    """plan: what was chosen. joint, rewritten, final: after the contractions were rewritten. swapped: with what crosses in its
    stored form. off: what could not be done, and why."""

    plan: Plan
    joint: Joint
    rewritten: Rewritten
    final: Cut
    swapped: Cut
    off: str | None


def finish(region: Region, choice: Choice) -> Finished:
    """Carry out what was chosen, the projections first."""
    joint, finding, config = region.joint, region.finding, region.config
    candidates = _candidates(joint, finding, choice.cut, config)
    plan = choose(candidates, config.treatment_of_any, profitable_only=config.profitable_only)
    changed, done, final, off = joint, Rewritten(), choice.cut, None
    if plan.projections:
        try:
            changed, done, final = _project(region, choice, plan)
        except GraphUnsupported as error:
            off, plan = f"the projections of this region are off: {error}", Plan()
    storages = region.storages(changed, replace(choice, cut=final))
    try:
        swapped = _swap(changed, final, storages)
    except GraphUnsupported as error:
        off = f"{off + '; ' if off else ''}the low-bit forms of this region are off: {error}"
        storages, swapped = (), final
    again = tuple(sorted(choice.setting.again))
    return Finished(replace(plan, storages=storages, again=again), changed, done, final, swapped, off)


def _project(region: Region, choice: Choice, plan: Plan) -> tuple[Joint, Rewritten, Cut]:
    """The joint graph with the planned weight gradients formed through projections, what was done, and its cut."""
    joint = region.joint
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    roots = {d.site: storage_root(nodes[d.site]).name for d in plan.decisions}
    changed = Joint(copy_module(joint.gm)[0], joint.inputs, joint.num_fwd_outputs, joint.static)
    done = rewrite(changed, region.finding.contractions, plan)
    verify.only_planned_gradients_changed(changed, plan, done)
    final = cut(changed, region.joint_inputs, region.kwargs, choice.setting)
    verify.crosses_as_planned(final, choice.cut, plan, done, roots)
    return changed, done, final


def _swap(joint: Joint, cut: Cut, storages: tuple[Storage, ...]) -> Cut:
    coded = [s for s in storages if s.coded]
    if not coded:
        return cut
    swapped, inserted = swap(cut, coded, joint.num_fwd_outputs)
    verify.stored_as_planned(cut, swapped, storages, inserted, joint.num_fwd_outputs)
    return swapped


def _candidates(joint: Joint, finding: Finding, exact: Cut, config: Config) -> list[Candidate]:
    """Group the contractions by the tensor they read, the side they read it from, and the treatment they get."""
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    groups: dict[Any, list[Contraction]] = {}
    for c in finding.contractions:
        groups.setdefault((c.x, c.left, c.width, config.treatment_of(c.parameters)[0]), []).append(c)
    names = [c.node for c in finding.contractions]
    return [_candidate(nodes[members[0].x], members, exact, names) for members in groups.values()]


def _candidate(x: fx.Node, members: list[Contraction], exact: Cut, contractions: list[str]) -> Candidate:
    first, root = members[0], storage_root(x)
    return Candidate(
        name=x.name,
        matmuls=tuple(c.node for c in members),
        parameters=tuple(p for c in members for p in c.parameters),
        groups=first.groups,
        tokens=first.tokens,
        width=first.width,
        outs=tuple(c.out for c in members),
        root=root.name,
        x_bytes=sum(s.nbytes for s in exact.saved if s.root == root.name),
        element_size=value(x).element_size(),
        rank_multiple=max(c.rank_multiple for c in members),
        frees=_only_contracted(exact, root.name, contractions),
    )


def _only_contracted(exact: Cut, root: str, contractions: list[str]) -> bool:
    """Whether the exact cut saves the storage of ``root`` for weight gradients and nothing else."""
    crossing = [s for s in exact.saved if s.root == root]
    if not crossing or any(s.user_visible for s in crossing):
        return False
    placeholders = {n.name: n for n in exact.backward.graph.find_nodes(op="placeholder")}
    uses = [use for s in crossing for use in classify_uses(placeholders[s.name], contractions)[0]]
    return bool(uses) and all(use.kind == "contraction" for use in uses)

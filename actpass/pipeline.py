"""The pipeline from a joint graph to a partitioned pair of graphs and a record of what was done.

This is the only file that knows all rooms::

    chunk     logits and loss -> pieces of rows               chunking
    read      joint graph -> contractions, cuts               graph/, partition
    budget    where to cut, what to store how -> Choice       budget, plan/ (or follow, where a plan is given)
    choose    contractions, tensors that cross -> Plan        plan/
    rewrite   Plan -> joint graph                             rewrite
    factor    weight gradients -> their coefficients          factor
    cut       upstream min-cut                                partition
    decode    what crosses with other uses -> projections     decode
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

from actpass.analysis.partitioned import Cut, Cuts
from actpass.analysis.projection_sites import find_candidates, find_owners
from actpass.analysis.weight_gradients import find_contractions
from actpass.codecs import LEARNED
from actpass.errors import ActpassError, ActpassWarning, BudgetError, GraphUnsupported, LogitsReturned, PlanError
from actpass.ir.copying import copy_module
from actpass.ir.fingerprint import fingerprint, plain_inputs
from actpass.ir.graph_inputs import GraphInputs
from actpass.ir.joint_graph import Joint, module_path, storage_root, value
from actpass.ir.traversal import ancestors
from actpass.options.config import Config
from actpass.passes import verify
from actpass.passes.chunked_loss import Chunked, chunk
from actpass.passes.low_rank_gradients import factor_gradients
from actpass.passes.partition import Setting, cut
from actpass.passes.project_saved import decode_saved
from actpass.passes.project_weight_gradients import Rewritten, rewrite, spell_flips, subspaces_of
from actpass.passes.quantize_saved import swap
from actpass.passes.save_written_inputs import save_what_is_read
from actpass.plan import Factored, Plan, Storage, choose, choose_decoded
from actpass.plan.multi_region import Level
from actpass.plan_file import ModelPlan
from actpass.planner import apply_plan as follow
from actpass.planner.budget import Choice, PeakBudget, Region, choose_cut
from actpass.reporting.record import Record, describe, describe_fallback
from actpass.torch_compat import fusion_gate_growth, inductor_config, merge_duplicates


@dataclass(frozen=True)
class Decided:
    """What was decided, of a region that was not left to Inductor. whole: the joint graph before its loss went to pieces."""

    whole: Joint
    region: Region
    choice: Choice


@dataclass(frozen=True)
class Compiled:
    """The graphs to hand to Inductor, what was done, the cut that they are, every stage's graph by name, and the joint graph as
    it came. decided: None if the region was left to Inductor."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    record: Record
    cut: Cut
    stages: dict[str, fx.GraphModule]
    traced: Traced
    decided: Decided | None = None


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
    decided: Plan | None = None,
) -> Compiled:
    """Partition ``gm`` as ``config`` asks. peak: the budget, if it is one of peak bytes. decided: the plan, if a search has
    found it for the same graph.

    A graph that can't be read falls back to the stock cut, with a warning and the reason in the record. Raises for a mistake in
    the options, for a given plan that can't be followed, `BudgetError` where the stock cut does not fit a budget of peak bytes
    (but under ``fallback="warn"``), and whatever a bug of the pass raises: under ``fallback="warn"`` that falls back, too."""
    traced, given = None, decided
    try:
        joint = _prepare(gm, inputs, partition_kwargs)
        if config.plan is not None:
            given = _find(config.plan, joint)
        default = cut(joint, joint_inputs, partition_kwargs, Setting(rebuild=False))
        traced = Traced(joint, joint_inputs, partition_kwargs, config, default)
        return _compile(traced, peak, given)
    except Exception as error:
        unreadable = isinstance(error, GraphUnsupported)
        if isinstance(error, PlanError) and decided is not None:
            raise AssertionError(f"a plan that was searched for can't be followed: {error}") from error
        expected = isinstance(error, ActpassError) or config.fallback == "error"
        if traced is None or (expected and not unreadable):
            raise
        cause, reason = error, f"{error}" if unreadable else f"{type(error).__name__}: {error}"
    if given is not None and decided is None and not given.is_default:
        raise follow.refusal(reason) from cause
    return _left_to_inductor(traced, peak, reason)


def _left_to_inductor(traced: Traced, peak: PeakBudget | None, reason: str) -> Compiled:
    """The region as Inductor cuts it. Raises `BudgetError` where that exceeds a budget of peak bytes, but under
    ``fallback="warn"``."""
    config, default = traced.config, traced.default
    fits = peak is not None and peak.needs(default) <= peak.nbytes
    if peak is not None and not fits and config.fallback == "error":
        raise _does_not_fit(peak, default, reason)
    if config.searches and not fits:
        reason = f"{reason}; its memory_budget is not held"
    warnings.warn(f"actpass left a region to Inductor alone, because {reason}", ActpassWarning, stacklevel=2)
    record = describe_fallback(traced.joint, default, config, reason)
    if peak is not None and fits:  # it has no choice, but counts in one plan over all parts of a step
        record = _under(peak, replace(record, levels=(Level(default.saved_bytes, 0, default.footprint),)))
    return Compiled(default.forward, default.backward, record, default, {"joint": traced.joint.gm}, traced)


def _does_not_fit(peak: PeakBudget, default: Cut, reason: str) -> BudgetError:
    needed = peak.needs(default)
    return BudgetError(
        f"memory_budget={peak.nbytes} bytes of peak can't be met: the pass can't change this region, because {reason}, and as "
        f"Inductor cuts it it needs {needed} bytes: {peak.resident}, and above them {default.peak_bytes} predicted (and a "
        f"margin). Use memory_budget={needed} or more, a smaller batch, or options={{'fallback': 'warn'}}, which trains over "
        "the budget, with a warning.",
        needed,
    )


def _under(peak: PeakBudget, record: Record) -> Record:
    totals = replace(record.totals, resident_bytes=peak.resident.total, scratch_bytes=peak.resident.scratch)
    return replace(record, totals=totals)


def _find(plan: ModelPlan, joint: Joint) -> Plan:
    """As `follow.find`. What has no region for a graph with deferred logits may have one for that with whole ones."""
    try:
        return follow.find(plan, joint)
    except PlanError as error:
        if joint.inputs.deferred:
            raise LogitsReturned(f"{error}") from error
        raise


def _prepare(gm: fx.GraphModule, inputs: GraphInputs, partition_kwargs: Mapping[str, Any]) -> Joint:
    """A private copy of the joint graph without dead code and without duplicates (under autocast q, k and v each carry a
    cast of one tensor), in which the backward reads no input that the forward writes to. As in the partitioner, what only the
    forward needs is merged with nothing that gradients need: it would be saved for them."""
    copy, _ = copy_module(gm)
    spell_flips(copy)
    copy.graph.eliminate_dead_code()
    outputs: Any = copy.graph.output_node().args[0]
    needed = ancestors(o for o in outputs[partition_kwargs["num_fwd_outputs"] :] if isinstance(o, fx.Node))
    copy.graph = merge_duplicates(copy.graph, needed.__contains__)
    static = frozenset(partition_kwargs.get("static_lifetime_input_indices") or ())
    save_what_is_read(Joint(copy, inputs, partition_kwargs["num_fwd_outputs"], static))
    return Joint(copy, inputs, partition_kwargs["num_fwd_outputs"], static)


def read(
    traced: Traced, default_bytes: int | None = None, given: Plan | None = None
) -> tuple[Region, Chunked | None, str | None]:
    """What a plan can be made for: the joint graph, with its loss in pieces if that pays (how, or why not), or if the ``given``
    plan has it so. default_bytes: what Inductor's default saves, which the logits are weighed against, if it is not the traced
    graph's own."""
    joint, config, default = traced.joint, traced.config, traced.default
    chunked, why_whole = None, None
    if given.chunk_rows if given is not None else config.chunk_loss and config.memory_budget != 1.0:
        rows = given.chunk_rows if given is not None else None if config.chunk_loss is True else config.chunk_loss
        try:
            chunked = chunk(joint, default.saved_bytes if default_bytes is None else default_bytes, rows)
        except GraphUnsupported as error:
            why_whole = str(error)
    if joint.inputs.deferred and chunked is None and given is None:
        raise LogitsReturned(why_whole or "they do not weigh")
    if given is not None and given.chunk_rows and chunked is None:
        raise PlanError(f"the plan forms the loss in pieces, which is not possible: {why_whole or 'no logits weigh'}.")
    joint = chunked.joint if chunked is not None else joint
    finding = find_contractions(joint)
    region = Region(
        joint, traced.joint_inputs, traced.kwargs, config, finding, default, chunked.rows if chunked is not None else 0
    )
    return region, chunked, why_whole


def _compile(traced: Traced, peak: PeakBudget | None, given: Plan | None) -> Compiled:
    region, chunked, why_whole = read(traced, given=given)
    whole, joint, config = traced.joint, region.joint, traced.config
    if given is not None:
        choice = follow.choose(region, given)
        done = finish(region, choice, given)
        choice = follow.check_budget(region, choice, done.swapped, done.plan.storages, peak)
    else:
        choice = choose_cut(region, lambda choice: finish(region, choice).swapped, peak)
        done = finish(region, choice)
    if done.off is not None:
        warnings.warn(f"actpass: {done.off}", ActpassWarning, stacklevel=2)
    cuts = Cuts(traced.default, choice.cut, done.final, done.swapped)
    plan = replace(done.plan, graph=fingerprint(whole), inputs=plain_inputs(whole))
    record = describe(whole, joint, region.finding, plan, cuts, done.rewritten, config, chunked, why_whole)
    notes = (*done.notes, *([choice.note] if choice.note is not None else []))
    record = replace(record, notes=(*record.notes, *notes))
    if peak is not None:
        record = _under(peak, replace(record, levels=choice.levels, limited=choice.limited))
    if done.off is not None:
        record = replace(record, active=False, inactive_because=done.off)
    forward, backward = done.swapped.forward, done.swapped.backward
    stages = {"joint": joint.gm, "rewritten": done.joint.gm, "forward": forward, "backward": backward}
    return Compiled(forward, backward, record, done.swapped, stages, traced, Decided(whole, region, choice))


@dataclass(frozen=True)
class Finished:
    """plan: what was chosen. joint, rewritten, final: after the contractions were rewritten. swapped: with what crosses in its
    stored form. off: what could not be done, and why. notes: what the user should know of it."""

    plan: Plan
    joint: Joint
    rewritten: Rewritten
    final: Cut
    swapped: Cut
    off: str | None
    notes: tuple[str, ...] = ()


def finish(region: Region, choice: Choice, given: Plan | None = None) -> Finished:
    """Carry out what was chosen, the projections first. given: the plan, if it was not searched for."""
    joint, finding, config = region.joint, region.finding, region.config
    if given is not None:
        candidates = find_candidates(joint, finding, choice.cut, follow.grouping(given))
        plan = Plan(follow.decide(region, given, candidates))
    else:
        candidates = region.candidates(choice.cut)
        profitable_only = config.profitable_only and not config.factors_gradients
        plan = choose(candidates, config.treatment_of_any, profitable_only=profitable_only, ranks=choice.ranks)
    changed, done, final, off, notes = joint, Rewritten(), choice.cut, None, ()
    if plan.projections:
        try:
            changed, done, final, factored = _project(region, choice, plan, given)
            plan = replace(plan, factored=factored)
        except GraphUnsupported as error:
            if given is not None:
                raise
            off, plan = f"the projections of this region are off: {error}", Plan()
    try:
        plan, final, done = _decode(region, changed, final, plan, done, given)
        if joint.subspaces and len(joint.subspaces) != sum(d.method in LEARNED for d in plan.projections):
            raise GraphUnsupported(f"{len(joint.subspaces)} subspaces arrived for {len(plan.projections)} projections")
    except GraphUnsupported as error:
        if given is not None:
            raise
        off = f"{off + '; ' if off else ''}the projections of this region are off: {error}"
        changed, done, final, plan = joint, Rewritten(), choice.cut, Plan()
    if given is not None and not joint.subspaces and any(d.method in LEARNED for d in plan.projections):
        storages = ()  # which subspaces it will take is all that is asked; the graph that the forms are of comes with them
    elif given is not None:
        storages, notes = follow.forms(region, given, changed, final, plan.decisions)
    else:
        storages = region.storages(changed, replace(choice, cut=final))
    try:
        swapped = _swap(changed, final, storages)
    except GraphUnsupported as error:
        if given is not None:
            raise
        off = f"{off + '; ' if off else ''}the low-bit forms of this region are off: {error}"
        storages, swapped = (), final
    return Finished(_whole(plan, storages, region, choice.setting), changed, done, final, swapped, off, notes)


def _whole(plan: Plan, storages: tuple[Storage, ...], region: Region, setting: Setting) -> Plan:
    """The decisions of ``plan`` with all else that was chosen."""
    again, keep = tuple(sorted(setting.again)), tuple(sorted(setting.keep))
    nodes = {n.name: n for n in region.joint.gm.graph.nodes}
    modules = tuple((name, module_path(nodes[name])) for name in sorted({*again, *keep}))
    return replace(
        plan,
        storages=storages,
        again=again,
        keep=keep,
        modules=modules,
        rebuild=setting.rebuild,
        chunk_rows=region.chunk_rows,
        seeded=region.joint.seed is not None,
        least_shared_bytes=inductor_config.score_fusion_memory_threshold,
        peak_growth=fusion_gate_growth(),
    )


def _project(
    region: Region, choice: Choice, plan: Plan, given: Plan | None
) -> tuple[Joint, Rewritten, Cut, tuple[Factored, ...]]:
    """The joint graph with the planned weight gradients formed through projections, what was done, its cut, and the gradients
    that stay in their factors."""
    joint = region.joint
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    roots = {d.site: storage_root(nodes[d.site]).name for d in plan.decisions}
    changed = Joint(copy_module(joint.gm)[0], joint.inputs, joint.num_fwd_outputs, joint.static)
    done = rewrite(changed, region.finding.contractions, plan)
    verify.only_planned_gradients_changed(changed, plan, done)
    factored: tuple[Factored, ...] = ()
    if region.config.factors_gradients:
        asked = None if given is None else {g.parameter for g in given.factored}
        factored = factor_gradients(changed, done, lambda path: asked is None or path in asked)
        changed = Joint(changed.gm, joint.inputs, joint.num_fwd_outputs, joint.static)
    final = cut(changed, region.joint_inputs, region.kwargs, choice.setting)
    verify.crosses_as_planned(final, choice.cut, plan, done, roots)
    return changed, done, final, factored


def _decode(
    region: Region, joint: Joint, cut: Cut, plan: Plan, done: Rewritten, given: Plan | None
) -> tuple[Plan, Cut, Rewritten]:
    """``plan`` with the tensors that cross ``cut`` of ``joint`` as projections and are decoded, the cut with them, and what was
    done in all."""
    config = region.config
    if not (given.decoded if given is not None else config.decodes):
        return plan, cut, done
    known = {n.name for n in region.joint.gm.graph.nodes}  # and not a projection that is stored for a weight gradient
    tensors = [t for t in region.saved(joint, cut) if {t.node, t.root} <= known]
    paths = {path: value(node).dim() for node, path in region.joint.parameter_path.items()}
    owners = find_owners(region.joint, region.finding, cut, tensors, paths)
    if given is not None:
        decisions = follow.decide_decoded(given, tensors, owners)
    else:
        decisions = choose_decoded(tensors, owners, config.treatment_of_any, profitable_only=config.profitable_only)
    plan = replace(plan, decisions=(*plan.decisions, *decisions))
    if not plan.decoded:
        return plan, cut, done
    by_node = {t.node: t for t in tensors}
    decoded, more = decode_saved(joint, cut, by_node, plan.decoded, subspaces_of(joint, plan))
    verify.decoded_as_planned(cut, decoded, [by_node[d.site] for d in plan.decoded], more, joint.num_fwd_outputs)
    return plan, decoded, Rewritten(done.inserted | more.inserted, {**done.payloads, **more.payloads}, done.sketches)


def _swap(joint: Joint, cut: Cut, storages: tuple[Storage, ...]) -> Cut:
    coded = [s for s in storages if s.coded]
    if not coded:
        return cut
    swapped, inserted = swap(cut, coded, joint.num_fwd_outputs)
    verify.stored_as_planned(cut, swapped, storages, inserted, joint.num_fwd_outputs)
    return swapped

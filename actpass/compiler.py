"""The pipeline from a joint graph to a partitioned pair of graphs and a record of what was done.

This is the only file that knows all rooms::

    chunk     logits and loss -> pieces of rows               chunking
    read      joint graph -> contractions, cuts               graph/, partition
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
from actpass.chunking import chunk
from actpass.config import Config
from actpass.errors import ActpassError, ActpassWarning, BudgetError, GraphUnsupported
from actpass.graph import Contraction, Finding, GraphInputs, Joint, classify_uses, find_contractions
from actpass.graph.copying import copy_module
from actpass.graph.joint import storage_root, value
from actpass.partition import Cut, Cuts, Setting, cut
from actpass.plan import PRECISIONS, Candidate, Plan, Precision, SavedTensor, Storage, choose, choose_storage
from actpass.report.record import Record, describe, describe_fallback
from actpass.rewrite import Rewritten, rewrite
from actpass.saved import find_saved
from actpass.swap import layout_of, swap

BUDGETS = tuple(i / 20 for i in range(20))
"""Upstream `activation_memory_budget` levels, from re-running everything upward, for when free recomputation is not enough."""


@dataclass(frozen=True)
class Compiled:
    """The graphs to hand to Inductor, what was done, the cut that they are, and every stage's graph by name."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    record: Record
    cut: Cut
    stages: dict[str, fx.GraphModule]


def compile_joint(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    config: Config,
    inputs: GraphInputs,
    partition_kwargs: Mapping[str, Any],
) -> Compiled:
    """Partition ``gm`` as ``config`` asks. A graph that can't be read falls back to the stock cut, with a warning and the
    reason in the record; a mistake in the options raises."""
    joint = _prepare(gm, inputs, partition_kwargs)
    default = cut(joint, joint_inputs, partition_kwargs, Setting(rebuild=False))
    try:
        return _compile(joint, joint_inputs, config, partition_kwargs, default)
    except ActpassError as error:
        if not isinstance(error, GraphUnsupported):
            raise
        reason = f"{error}"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"actpass left a region to Inductor alone, because {reason}", ActpassWarning, stacklevel=2)
    record = describe_fallback(joint, default, config, reason)
    return Compiled(default.forward, default.backward, record, default, {"joint": joint.gm})


def _prepare(gm: fx.GraphModule, inputs: GraphInputs, partition_kwargs: Mapping[str, Any]) -> Joint:
    """A private copy of the joint graph without dead code and without duplicates (under autocast q, k and v each carry a
    cast of one tensor)."""
    copy, _ = copy_module(gm)
    copy.graph.eliminate_dead_code()
    copy.graph = fx_graph_cse(copy.graph)
    static = frozenset(partition_kwargs.get("static_lifetime_input_indices") or ())
    return Joint(copy, inputs, partition_kwargs["num_fwd_outputs"], static)


def _compile(joint: Joint, joint_inputs: Sequence[object], config: Config, kwargs: Mapping[str, Any], default: Cut) -> Compiled:
    whole, chunked, why_whole = joint, None, None
    if config.chunk_loss and config.memory_budget != 1.0:
        try:
            chunked = chunk(joint, default.saved_bytes)
        except GraphUnsupported as error:
            why_whole = str(error)
    if chunked is not None:
        joint = chunked.joint
    finding = find_contractions(joint)
    setting, precision, exact = _exact_cut(joint, joint_inputs, config, kwargs, default, finding, chunked is not None)
    if chunked is not None and setting.activation_memory_budget is not None:
        joint, chunked, why_whole = whole, None, "the budget runs operators again, and would run the pieces again, too"
        finding = find_contractions(joint)
        setting, precision, exact = _exact_cut(joint, joint_inputs, config, kwargs, default, finding, False)
    plan = choose(_candidates(joint, finding, exact, config), config.treatment_of_any, profitable_only=config.profitable_only)
    off: str | None = None
    changed, done, final = joint, Rewritten(), exact
    if plan.projections:
        try:
            changed, done, final = _project(joint, joint_inputs, kwargs, setting, finding, plan, exact)
        except GraphUnsupported as error:
            off, plan = f"the projections of this region are off: {error}", Plan()
    storages = _storages(changed, final, finding, config, precision)
    try:
        swapped = _swap(changed, final, storages)
    except GraphUnsupported as error:
        off = f"{off + '; ' if off else ''}the low-bit forms of this region are off: {error}"
        storages, swapped = (), final
    if off is not None:
        warnings.warn(f"actpass: {off}", ActpassWarning, stacklevel=2)
    plan = replace(plan, storages=storages)
    cuts = Cuts(default, exact, final, swapped)
    record = describe(whole, joint, finding, plan, cuts, done, config, chunked, why_whole)
    if off is not None:
        record = replace(record, active=False, inactive_because=off)
    stages = {"joint": joint.gm, "rewritten": changed.gm, "forward": swapped.forward, "backward": swapped.backward}
    return Compiled(swapped.forward, swapped.backward, record, swapped, stages)


def _project(
    joint: Joint,
    joint_inputs: Sequence[object],
    kwargs: Mapping[str, Any],
    setting: Setting,
    finding: Finding,
    plan: Plan,
    exact: Cut,
) -> tuple[Joint, Rewritten, Cut]:
    """The joint graph with the planned weight gradients formed through projections, what was done, and its cut."""
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    roots = {d.site: storage_root(nodes[d.site]).name for d in plan.decisions}
    changed = Joint(copy_module(joint.gm)[0], joint.inputs, joint.num_fwd_outputs, joint.static)
    done = rewrite(changed, finding.contractions, plan)
    verify.only_planned_gradients_changed(changed, plan, done)
    final = cut(changed, joint_inputs, kwargs, setting)
    verify.crosses_as_planned(final, exact, plan, done, roots)
    return changed, done, final


def _storages(joint: Joint, cut: Cut, finding: Finding, config: Config, precision: Precision) -> tuple[Storage, ...]:
    """In which form everything that crosses ``cut`` is stored."""
    weights = {c.node: c.parameters for c in finding.contractions}
    nodes = {n.name: n for n in cut.forward.graph.nodes}

    def stored_bytes(tensor: SavedTensor, codec: str, group: int | None) -> int | None:
        layout = layout_of(value(nodes[tensor.node]), codec, group)
        return layout.nbytes if layout is not None else None

    tensors = find_saved(cut, joint, weights, config.smallest)
    return choose_storage(tensors, config.treatment_of_any, stored_bytes, precision)


def _swap(joint: Joint, cut: Cut, storages: tuple[Storage, ...]) -> Cut:
    coded = [s for s in storages if s.coded]
    if not coded:
        return cut
    swapped, inserted = swap(cut, coded, joint.num_fwd_outputs)
    verify.stored_as_planned(cut, swapped, storages, inserted, joint.num_fwd_outputs)
    return swapped


def _exact_cut(
    joint: Joint,
    joint_inputs: Sequence[object],
    config: Config,
    kwargs: Mapping[str, Any],
    default: Cut,
    finding: Finding,
    is_chunked: bool,
) -> tuple[Setting, Precision, Cut]:
    """Where to cut, and how much precision ``auto`` may give up: the first of `PRECISIONS` that meets the budget on the cut
    that re-runs no matmul, and then the fewest bits with the least that upstream's knapsack re-runs.

    Bytes are counted as they will be stored.
    """

    def stored(c: Cut, precision: Precision) -> int:
        return sum(s.stored_bytes for s in _storages(joint, c, finding, config, precision))

    budget = config.memory_budget
    if budget == 1.0:
        return Setting(rebuild=False), "exact", default
    setting = Setting(rebuild=True)
    free = cut(joint, joint_inputs, kwargs, setting)
    if not is_chunked and stored(free, "auto") > stored(default, "auto"):
        setting, free = Setting(rebuild=False), default
    if budget is None:
        return setting, "auto", free
    least = default.saved_bytes
    for precision in PRECISIONS:
        least = min(least, stored(free, precision))
        if least <= budget * default.saved_bytes:
            return setting, precision, free
    found: tuple[Setting, Precision, Cut] | None = None
    low, high = 0, len(BUDGETS) - 1
    while low <= high:  # the highest level, so the least re-run, that fits
        level = (low + high) // 2
        setting = Setting(rebuild=True, activation_memory_budget=BUDGETS[level])
        less = cut(joint, joint_inputs, kwargs, setting)
        size = stored(less, "int4")
        least = min(least, size)
        if size <= budget * default.saved_bytes:
            found = (setting, "int4", less)
            low = level + 1
        else:
            high = level - 1
    if found is not None:
        return found
    raise BudgetError(
        f"memory_budget={budget} asks to save {budget * default.saved_bytes:.0f} of the {default.saved_bytes} bytes that "
        f"Inductor's default saves for backward. The least that method={config.treatment.method!r} reaches here is {least} "
        f"bytes: use memory_budget={least / max(default.saved_bytes, 1) + 0.005:.2f} or more."
    )


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

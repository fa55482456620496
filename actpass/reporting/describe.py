"""Describe what became of a region, as its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from actpass.analysis.linearity import Use
from actpass.analysis.partitioned import PartitionedGraph, Saved
from actpass.codecs import ALL_PROJECTIONS, LEARNED
from actpass.codecs.quantizers.float8 import E4M3
from actpass.ir.fingerprint import fingerprint, plain_inputs
from actpass.ir.joint_graph import Joint, module_path, rule_of, source_line, storage_root, tensor_bytes
from actpass.ir.op_cost import count_matmuls
from actpass.ir.op_queries import is_attention, is_matmul, is_reduction
from actpass.ir.op_rules import RULES
from actpass.options import Config
from actpass.passes.base import RegionState
from actpass.plan import KEPT, Decision, Plan, Storage
from actpass.reporting.notes import loss_notes, missing_rules, region_notes
from actpass.reporting.peak_breakdown import curves_of
from actpass.reporting.record import Record, SiteRow, Totals
from actpass.torch_compat import size_hint


def describe(whole: Joint, joint: Joint, done: RegionState) -> Record:
    """The record of a region that was compiled by plan. whole: the joint graph that Inductor's default was cut from. joint:
    the one that was planned, perhaps with its loss in chunks. done: what became of it."""
    plan, cuts, finding, config = done.plan, done.cuts, done.finding, done.config
    now = {n.name: n for n in joint.gm.graph.nodes}
    nodes = {**{n.name: n for n in whole.gm.graph.nodes}, **now}
    root_of = {d.site: storage_root(nodes[d.site]).name for d in plan.decisions}
    before, crossing, stored = _by_root(cuts.default.saved), _by_root(cuts.final.saved), _stored(cuts.final, plan)
    contractions = [*(c.node for c in finding.contractions), *cuts.final.casts]
    recomputed = _recomputed(cuts.final)
    rows: dict[str, SiteRow] = {}
    for root in [n for n in nodes if n in before or n in crossing or n in root_of.values()]:
        uses = _uses(root, cuts.final if root in crossing else cuts.default, contractions)
        form, reason = _form(joint, nodes[root], root in crossing, uses, cuts.final)
        if root not in now:
            form, reason = "chunk", "never formed: the loss and its gradients are formed in chunks of rows"
        elif form == "recompute":
            reason = _why_recomputed(root, recomputed.get(root, frozenset()), done)
        rows[root] = replace(_row(nodes[root], before.get(root, 0), stored.get(root, 0), uses), form=form, reason=reason)
    for decision in plan.decisions:
        root = root_of[decision.site]
        rows[root] = _with_decision(rows[root], decision, done, stored)
    payloads = {z: root_of[d.site] for made in (done.payloads, done.scales) for d, z in made.items()}
    for saved in cuts.final.saved:
        if saved.base not in nodes and saved.base not in payloads:
            rows[saved.base] = _state_row(saved, cuts.final)
    codes = {done.payloads[d] for d in plan.from_codes} | set(done.scales.values())
    for storage in (s for s in plan.storages if s.base not in codes):
        root = payloads.get(storage.base, storage.base)
        rows[root] = _with_storage(rows[root], storage)
    return Record(
        active=True,
        inactive_because=None,
        options=config.tensor_options.described if config.plan is None else "plan",
        sites=tuple(rows.values()),
        totals=_totals(cuts.default, cuts.swapped),
        plan=plan.to_dict(),
        plan_hash=plan.hash,
        rejected=finding.rejected,
        notes=(
            *loss_notes(done),
            *region_notes(plan, rows.values(), cuts, config, finding, joint.inputs.deferred),
            *missing_rules(joint, rows.values()),
        ),
        parameters=_parameters(joint),
        whole=joint.inputs.whole,
        **_memory(cuts.default, cuts.swapped, joint, plan, rows),
    )


def describe_fallback(joint: Joint, default: PartitionedGraph, config: Config, reason: str) -> Record:
    """The record of a region that was left to Inductor alone."""
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    before = _by_root(default.saved)
    rows = (
        replace(_row(nodes[root], nbytes, nbytes, _uses(root, default, [])), form="save", reason="region left to Inductor")
        for root, nbytes in before.items()
        if root in nodes
    )
    plan = Plan(seeded=joint.seed is not None, graph=fingerprint(joint), inputs=plain_inputs(joint))
    return Record(
        active=False,
        inactive_because=reason,
        options=config.tensor_options.described if config.plan is None else "plan",
        sites=tuple(rows),
        totals=_totals(default, default),
        plan=plan.to_dict(),
        plan_hash=plan.hash,
        parameters=_parameters(joint),
        whole=joint.inputs.whole,
        **_memory(default, default, joint, Plan(), {}),
    )


def describe_unknown(config: Config, reason: str) -> Record:
    """The record of a region that the pass failed on before it had a cut of it."""
    plan = Plan()
    return Record(
        active=False,
        inactive_because=reason,
        options=config.tensor_options.described if config.plan is None else "plan",
        sites=(),
        totals=Totals(None, 0, 0, 0, 0, 0, 0),
        plan=plan.to_dict(),
        plan_hash=plan.hash,
        notes=("what Inductor saves of this region is not known, and not in the sums below",),
    )


def _by_root(saved: Iterable[Saved]) -> dict[str, int]:
    total: dict[str, int] = {}
    for s in saved:
        total[s.base] = total.get(s.base, 0) + s.nbytes
    return total


def _stored(final: PartitionedGraph, plan: Plan) -> dict[str, int]:
    """Bytes by root, as they are stored."""
    total = _by_root(final.saved)
    for s in plan.coded:
        total[s.base] += s.stored_bytes - s.nbytes
    return total


def _uses(root: str, where: PartitionedGraph, contractions: list[str]) -> tuple[Use, ...]:
    arrived = [where.arrived[s.name] for s in where.crossing.get(root, ()) if s.name in where.arrived]
    found = [u for node in arrived for u in where.uses.of(node, contractions)[0]]
    return tuple(dict.fromkeys(found))


def _row(node: fx.Node, bytes_before: int, bytes_after: int, uses: tuple[Use, ...]) -> SiteRow:
    val = node.meta["val"]
    tensor = val if isinstance(val, torch.Tensor) else None
    return SiteRow(
        name=node.name,
        module=module_path(node),
        source=source_line(node),
        op=str(node.target),
        kind=_kind(node, uses),
        shape=tuple(size_hint(s) for s in tensor.shape) if tensor is not None else (),
        dtype=str(tensor.dtype).removeprefix("torch.") if tensor is not None else "",
        uses=uses,
        form="save",
        projection=None,
        rank=None,
        codec=None,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        unbiased=True,
        relative_variance=0.0,
        extra_flops=0,
        reason="",
    )


_ATTENTION = frozenset(str(operator) for operator, row in RULES.items() if row.attention is not None)


def _kind(node: fx.Node, uses: tuple[Use, ...]) -> str:
    if _ATTENTION.intersection(u.op for u in uses):
        return "attention"
    if is_matmul(node):
        return "matmul output"
    if any(u.kind == "contraction" for u in uses):
        return "linear input"
    return "statistics" if is_reduction(node) else rule_of(node).told_as or "pointwise"


def _form(joint: Joint, node: fx.Node, kept: bool, uses: tuple[Use, ...], cut: PartitionedGraph) -> tuple[str, str]:
    if node in (joint.seed, joint.learned_seed):
        return "state", "the step's seed" if node is joint.seed else "the seed of learned bases"
    if node.op == "placeholder":
        return "input", "an input of the region: never saved"
    if kept:
        return "save", _why_kept(joint, node, uses, cut)
    return "recompute", ""


def _recomputed(cut: PartitionedGraph) -> dict[str, frozenset[fx.Node]]:
    """What the backward computes a second time, and the matmuls and fused attentions that it takes."""
    in_forward = {n.name for n in cut.forward.graph.nodes if n.op == "call_function"}
    found: dict[str, frozenset[fx.Node]] = {}
    for node in (n for n in cut.backward.graph.nodes if n.op == "call_function" and n.name in in_forward):
        own = frozenset([node] if is_matmul(node) or is_attention(node) else [])
        found[node.name] = own.union(*(found.get(a.name, frozenset()) for a in node.all_input_nodes))
    return found


def _why_recomputed(root: str, through: frozenset[fx.Node], done: RegionState) -> str:
    matmuls = sum(map(is_matmul, through))
    how = f"{matmuls} matmuls and {len(through) - matmuls} attention" if through else "no matmul or attention"
    why = f"{done.reasons[root]}; " if root in done.reasons else ""
    return f"{why}recomputed exactly from what is saved, with {how}"


def _why_kept(joint: Joint, root: fx.Node, uses: tuple[Use, ...], cut: PartitionedGraph) -> str:
    if any(s.user_visible for s in cut.crossing.get(root.name, ())):
        return "also returned to the caller"
    if joint.is_narrow_copy(root):
        return "few bytes beside the rest, and a cast again takes a kernel"
    kinds = sorted({u.kind for u in uses})
    return f"recomputing it would not be free; uses: {', '.join(kinds)}" if kinds else "recomputing it would not be free"


def _with_storage(row: SiteRow, s: Storage) -> SiteRow:
    """``row`` with the form in which (a part of) it is stored. Reasons of one tensor's parts are told once."""
    if not s.coded:
        known = s.reason in row.reason or s.reason == KEPT
        return row if known or row.form in ("state", "input") else replace(row, reason=f"{row.reason}; kept: {s.reason}")
    biased = "" if s.unbiased else "; biased"
    reason = f"stored in {s.codec}, {s.rounding} rounding; {s.reason}{biased}"
    return replace(
        row,
        form="quantize" if row.form == "save" else row.form,
        codec=s.codec if row.codec in (None, s.codec) else f"{row.codec}, {s.codec}",
        unbiased=row.unbiased and s.unbiased,
        reason=reason if row.form == "save" else row.reason if reason in row.reason else f"{row.reason}; {reason}",
    )


def _with_decision(row: SiteRow, d: Decision, done: RegionState, after: dict[str, int]) -> SiteRow:
    config = done.config
    if d.matmuls:
        kind = "linear input" if row.kind == "pointwise" else row.kind
        row = replace(row, parameters=row.parameters + d.parameters, kind=kind)
    elif d.projects:
        return replace(
            row,
            form="project",
            decoded=f"{d.projection} {d.rank}/{d.width}",
            bytes_after=row.bytes_after + after.get(done.payloads[d], 0),
            unbiased=row.unbiased and _is_unbiased(d, config),
            reason=f"{d.reason}{'' if _is_unbiased(d, config) else '; biased'}",
        )
    if d.wgrad is not None:
        return _with_codes(row, d, done, after)
    if d.projection is None or d.rank is None:
        return row if d.projection is None and d.reason == KEPT else replace(row, reason=f"{row.reason}; {d.reason}")
    in_forward = d.project_in == "forward"
    stored = after.get(done.payloads[d], 0) if in_forward else 0
    return replace(
        row,
        form="project" if in_forward else row.form,
        projection=d.projection if row.projection in (None, d.projection) else f"{row.projection}, {d.projection}",
        rank=max(d.rank, row.rank or 0),
        bytes_after=row.bytes_after + stored,
        unbiased=row.unbiased and _is_unbiased(d, config),
        relative_variance=max(row.relative_variance, ALL_PROJECTIONS[d.projection].relative_variance(d.width, d.rank)),
        extra_flops=row.extra_flops + d.extra_flops,
        reason=d.reason if in_forward else f"{row.reason}; {d.reason}",
    )


def _with_codes(row: SiteRow, d: Decision, done: RegionState, after: dict[str, int]) -> SiteRow:
    row = replace(row, wgrad=d.wgrad, unbiased=row.unbiased and d.rounding == "stochastic")
    reason = f"{d.reason}; {d.rounding} rounding"
    if d.project_in == "backward":
        return replace(row, reason=f"{row.reason}; {reason}")
    stored = after.get(done.payloads[d], 0) + after.get(done.scales[d], 0)
    return replace(row, form="quantize", codec=E4M3.name, bytes_after=row.bytes_after + stored, reason=reason)


def _is_unbiased(d: Decision, config: Config) -> bool:
    """Whether the expected gradient is the exact one."""
    if d.projection in LEARNED:
        return d.linear and LEARNED[d.projection].unbiased and config.resamples_every_step
    return d.projection_scaling == "unbiased"


def _state_row(saved: Saved, cut: PartitionedGraph) -> SiteRow:
    node = next(n for n in cut.forward.graph.nodes if n.name == saved.base)
    return replace(_row(node, 0, saved.nbytes, ()), form="state", reason="a basis that both passes read")


def _memory(
    default: PartitionedGraph, final: PartitionedGraph, joint: Joint, plan: Plan, rows: Mapping[str, SiteRow]
) -> dict[str, Any]:
    """The predictions."""

    def kind_of(node: fx.Node) -> str:
        row = rows.get(storage_root(node).name)
        return row.kind if row is not None else _kind(storage_root(node), ())

    own = sum(tensor_bytes(n) for n in joint.forward_outputs if n in joint.state)  # where sketches are returned
    stock = default.footprint
    stock = replace(stock, forward=stock.forward - own, backward=stock.backward - own, returned=stock.returned - own)
    curves = curves_of(default, final, joint, plan, kind_of)
    return {"footprint_default": stock, "footprint": final.footprint, "curves": curves}


def _totals(default: PartitionedGraph, final: PartitionedGraph) -> Totals:
    stock = count_matmuls(default.forward.graph, default.backward.graph)
    ours = count_matmuls(final.forward.graph, final.backward.graph)
    return Totals(
        saved_bytes_eager=None,
        saved_bytes_default=default.saved_bytes,
        saved_bytes=final.saved_bytes,
        backward_matmul_flops_default=stock.flops,
        backward_matmul_flops=ours.flops,
        extra_matmuls=ours.extra_matmuls,
        extra_attention=ours.extra_attention,
        traffic_bytes_default=sum(t.traffic for t in default.timelines),
        traffic_bytes=sum(t.traffic for t in final.timelines),
        kernels_default=sum(t.kernels for t in default.timelines),
        kernels=sum(t.kernels for t in final.timelines),
    )


def _parameters(joint: Joint) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((path, tuple(size_hint(s) for s in node.meta["val"].shape)) for node, path in joint.parameter_path.items())

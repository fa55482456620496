"""What other budgets would give for a region: stock PyTorch's levels, and the choices of a budget within some capacities."""

from __future__ import annotations

from torch import fx

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.analysis.rematerialization import Recomputation
from actpass.analysis.saved_tensors import EARLY_GRADIENT
from actpass.ir.op_queries import is_attention, is_matmul
from actpass.passes.partition import cut
from actpass.pipeline import PlanResult
from actpass.plan.pareto import Point, Tradeoff
from actpass.planner.budget import alternatives
from actpass.planner.region import PartitionPlan, Region

STOCK = tuple(i / 10 for i in range(10, -1, -1))
"""Levels of ``activation_memory_budget``."""
CAPACITIES = 10


def tradeoff(decided: PlanResult) -> Tradeoff:
    """Both curves of a region, and the point that was chosen. Makes a cut for each level, seconds for a large model. Weight
    gradients are taken as exact: what a projection costs is not in the error."""
    region, recomputation = decided.region, Recomputation(decided.whole)
    ours = tuple(_point(region, choice, capacity) for capacity, choice in alternatives(region, CAPACITIES))
    chosen = _point(region, decided.choice, 0)
    tensors = region.saved(region.joint, decided.choice.cut)
    return Tradeoff(
        region.step_flops,
        sum(t.elements for t in tensors),
        sum(t.nbytes for t in tensors if t.obstacle == EARLY_GRADIENT),
        tuple(_stock(decided, recomputation, level) for level in STOCK),
        ours,
        chosen,
    )


def _stock(decided: PlanResult, recomputation: Recomputation, level: float) -> Point:
    region = decided.region
    found = cut(
        decided.whole, region.joint_inputs, region.kwargs, PartitionConstraints(recompute_materialized=False, stock=level)
    )
    return Point(level, found.saved_bytes, 0.0, recomputation.flops(_run_again(found)))


def _point(region: Region, choice: PartitionPlan, capacity: int) -> Point:
    tensors = region.saved(region.joint, choice.cut, region.recomputation)
    storages = region.storages(region.joint, choice)
    costs = region.costs(choice.cut, tensors)
    error, flops = 0.0, float(region.recomputation.flops(_run_again(choice.cut)))
    for t, s in zip(tensors, storages, strict=True):
        error += costs.error_of_form(t, s.codec)
        flops += costs.flops_of_form(t, s.codec, s.stored_bytes)
    uncoded = choice.cut.saved_bytes - sum(s.nbytes for s in storages)  # the seed
    return Point(capacity, uncoded + sum(s.stored_bytes for s in storages), error, flops)


def _run_again(cut: PartitionedGraph) -> list[fx.Node]:
    """The matmuls and fused attentions of the forward that are in the backward as well."""
    in_forward = {n.name for n in cut.forward.graph.nodes if n.op == "call_function"}
    return [n for n in cut.backward.graph.nodes if n.name in in_forward and (is_matmul(n) or is_attention(n))]

"""The cut that runs no matmul again, from which every search starts."""

from __future__ import annotations

from actpass.analysis.partitioned import PartitionConstraints
from actpass.ir.joint_graph import tensor_bytes, value
from actpass.planner.region import PartitionPlan, Region
from actpass.torch_compat import size_hint

_FEW_COPIES = 1 / 20
"""Weights in half precision are saved, as Inductor saves them, up to this share of what else is stored."""


def no_recompute_partition(region: Region) -> PartitionPlan:
    """The cut that runs no matmul again and has the fewest bytes, as they will be stored.

    The residual stream is asked for as such where that costs nothing: upstream would as soon save every addend of it, which
    the backward then adds up, layer by layer, and holds. Of attention that is not fused the weights are asked for where they
    take less: upstream would as soon save the scores, which it exponentiates again, and which have no low-bit form.
    Weights in half precision are saved where they are few bytes beside the rest: to cast them again takes a kernel each,
    0.4 % of a step of a 350M Llama of 32,768 tokens for 2 % of its peak.
    """
    copies = _weight_copies(region)
    free = _free_cut(region, copies)
    nbytes = sum(s.nbytes for s in free.cut.saved if s.base in copies)
    if nbytes > _FEW_COPIES * (_stored(region, free) - nbytes):
        free = _free_cut(region, frozenset())
    weights = _attention_weights(region)
    if weights:
        constraints = PartitionConstraints(recompute_materialized=True, must_save=free.constraints.must_save | weights)
        free = min(free, PartitionPlan(constraints, region.cut(constraints), None), key=lambda choice: _stored(region, choice))
    default = PartitionPlan(PartitionConstraints(recompute_materialized=False), region.default, None)
    if not region.chunk_rows and _stored(region, free) > _stored(region, default):
        return default
    return free


def _free_cut(region: Region, copies: frozenset[str]) -> PartitionPlan:
    """The residual stream is asked for where that takes no more bytes. Mostly the graph says so, or the cut without asking;
    if not, both are cut.

    Without a budget it is asked for as well where its addends are only narrower, as in mixed precision. In few bits all take
    the same. As they are the sums take twice the bytes of what a layer adds, but whatever reads the stream would read all that
    was added since the last sum that is stored, and in kernels of its own where that is more than one kernel reads: 3 % of a
    step of a Llama on a GPU, for a tenth of what is saved.
    """
    sums = region.recomputation.residual_sums
    more = {n.name: region.recomputation.extra_bytes(n) for n in sums}
    plain, kept = (
        PartitionConstraints(recompute_materialized=True, must_save=copies),
        PartitionConstraints(recompute_materialized=True, must_save=copies.union(more)),
    )
    narrower = not region.config.searches and not any(region.recomputation.extra_elements(n) != 0 for n in sums)
    if narrower or not any(n != 0 for n in more.values()):
        return PartitionPlan(kept, region.cut(kept), None)
    found = region.cut(plain)
    recompute = [more[n.name] for n in found.backward.graph.nodes if n.op == "call_function" and n.name in more]
    if not recompute:  # each that is needed is stored as it is
        return PartitionPlan(kept, found, None)
    first = max(map(tensor_bytes, sums))  # what the others are rebuilt from
    if None not in recompute and sum(n or 0 for n in recompute) > first:
        return PartitionPlan(plain, found, None)
    choices = PartitionPlan(kept, region.cut(kept), None), PartitionPlan(plain, found, None)
    return min(choices, key=lambda choice: choice.cut.saved_bytes)


def _weight_copies(region: Region) -> frozenset[str]:
    """The parameters cast to fewer bytes that Inductor's default saves, if bytes are not limited, and if they are a small share
    even of what that saves: it needs no cut to know."""
    if region.config.searches:
        return frozenset()
    nodes = {n.name: n for n in region.joint.gm.graph.nodes}
    copies = [s for s in region.default.saved if s.base in nodes and region.joint.is_narrow_copy(nodes[s.base])]
    few = sum(s.nbytes for s in copies) <= _FEW_COPIES * region.default.saved_bytes
    return frozenset(s.base for s in copies) if few else frozenset()


def _attention_weights(region: Region) -> frozenset[str]:
    """What Inductor's default saves of a softmax over attention's scores."""
    nodes = {n.name: n for n in region.joint.gm.graph.nodes}
    saved = [nodes[name] for name in {s.base: None for s in region.default.saved} if name in nodes]
    found: set[str] = set()
    for node in saved:
        scores = region.recomputation.scores_behind(node)
        if scores in (None, node) or not region.recomputation.softmax_of(scores):
            continue
        if size_hint(value(node).numel()) >= size_hint(value(scores).numel()):  # and no statistic
            found.add(node.name)
    return frozenset(found)


def _stored(region: Region, choice: PartitionPlan) -> int:
    return sum(s.stored_bytes for s in region.storages(region.joint, choice))

"""Weight-gradient contractions -> candidates: tensors whose projection could be stored, or contracted, in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from actpass.analysis.partitioned import PartitionedGraph
from actpass.analysis.saved_tensors import Scores
from actpass.analysis.weight_gradients import WeightGradientMatmul, WeightGradientMatmuls
from actpass.codecs.fp8_contraction import CASTABLE, MULTIPLE, codes_bytes, scaled_by_row
from actpass.ir.joint_graph import Joint, module_path, storage_root, value
from actpass.ir.op_queries import factors_of
from actpass.plan import Candidate, SavedTensor
from actpass.torch_compat import size_hint

NARROW = 8
"""A weight is narrow if one of its sides is this many times shorter than the longer side of the region's weights in the middle:
ranks of adapters are 1/32 to 1/500 of the hidden width; keys and values that several queries share are at most this narrow."""


def find_projection_sites(
    joint: Joint,
    finding: WeightGradientMatmuls,
    exact: PartitionedGraph,
    tensor_options_of: Callable[[WeightGradientMatmul], Hashable],
) -> list[Candidate]:
    """Group the contractions by the tensor they read, the side they read it from, and the treatment they get. exact: the cut
    that says what is stored, with every contraction as it is."""
    nodes = {n.name: n for n in joint.gm.graph.nodes}
    groups: dict[Any, list[WeightGradientMatmul]] = {}
    for c in finding.contractions:
        groups.setdefault((c.x, c.left, c.width, tensor_options_of(c)), []).append(c)
    names = [c.node for c in finding.contractions]
    longer = sorted(max(c.width, c.out) for c in finding.contractions)
    typical = longer[len(longer) // 2] if longer else 0
    return [_candidate(nodes, members, exact, names, typical) for members in groups.values()]


def find_owners(
    joint: Joint,
    finding: WeightGradientMatmuls,
    cut: PartitionedGraph,
    tensors: Sequence[SavedTensor],
    paths: Mapping[str, int],
) -> dict[str, str]:
    """The parameter that a subspace of a crossing tensor belongs to, by the tensor's node, where its last axis is one of
    features: it has as many rows and as wide ones as what a weight reads or makes, its memory is in their order, it is no
    product of two activations (attention scores), and a value of the forward. paths: the axes of each of the region's
    parameters; the nearest one is taken, of several the first of those with the most."""
    shapes = {(c.groups * c.tokens, n) for c in finding.contractions for n in (c.width, c.out)}
    nodes = {n.name: n for n in cut.forward.graph.nodes}
    scores = Scores.of(joint)
    matrices_first = sorted(paths, key=lambda p: (-paths[p], p))
    found: dict[str, str] = {}
    for t in tensors:
        node = nodes[t.node]
        val = value(node)
        if val.dim() < 2 or (math.prod(t.shape[:-1]), t.shape[-1]) not in shapes or size_hint(val.stride(-1)) != 1:
            continue
        if not (scores.behind(node) or _is_of_the_backward(nodes[t.base])):
            found[t.node] = _nearest(module_path(nodes[t.base]), matrices_first)
    return found


def _is_of_the_backward(node: fx.Node) -> bool:
    """Whether autograd made ``node`` for the backward alone (a factor of a derivative, which upstream may compute early)."""
    return "backward" in str(node.meta.get("partitioner_tag", ""))


def _nearest(module: str, paths: Sequence[str]) -> str:
    """The first of ``paths`` in ``module``, or in the smallest module around it that has any. A wrapper's own name may stand
    in front of the module's."""
    steps = module.split(".")
    for end in range(len(steps), 0, -1):
        for start in (0, 1):
            above = "".join(f"{step}." for step in steps[start:end])
            inside = [p for p in paths if above and p.startswith(above)]
            if inside:
                return inside[0]
    return paths[0]


def _candidate(
    nodes: Mapping[str, fx.Node],
    members: list[WeightGradientMatmul],
    exact: PartitionedGraph,
    contractions: list[str],
    typical: int,
) -> Candidate:
    first = members[0]
    x, matmuls = nodes[first.x], [nodes[c.node] for c in members]
    root = storage_root(x)
    return Candidate(
        name=x.name,
        matmuls=tuple(c.node for c in members),
        parameters=tuple(p for c in members for p in c.parameters),
        groups=first.groups,
        tokens=first.tokens,
        width=first.width,
        outs=tuple(c.out for c in members),
        base=root.name,
        x_bytes=sum(s.nbytes for s in exact.crossing.get(root.name, ())),
        element_size=value(x).element_size(),
        rank_multiple=max(c.rank_multiple for c in members),
        frees=_only_contracted(exact, root.name, contractions),
        narrow=min(first.width, max(c.out for c in members)) * NARROW < typical,
        fp8_obstacle=_fp8_obstacle(matmuls),
        fp8_bytes=codes_bytes(first.width, first.tokens, by_row=all(scaled_by_row(value(m).dtype) for m in matmuls)),
    )


def _fp8_obstacle(matmuls: Sequence[fx.Node]) -> str | None:
    """Why ``matmuls``, weight gradients that read one tensor, can't be matmuls in fp8; None: they can."""
    for matmul in matmuls:
        factors = [value(a) for a in factors_of(matmul)]
        if value(matmul).dim() != 2:
            return "batched or grouped, and a matmul in fp8 takes two matrices"
        foreign = next((v.dtype for v in (*factors, value(matmul)) if v.dtype not in CASTABLE), None)
        if foreign is not None:
            return f"a factor of {str(foreign).removeprefix('torch.')}"
        sizes = [*factors[0].shape, factors[1].shape[-1]]
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return f"sizes that change from call to call, and a matmul in fp8 takes multiples of {MULTIPLE}"
        odd = next((size for size in sizes if size % MULTIPLE), None)
        if odd is not None:
            return f"{odd} is no multiple of {MULTIPLE}, which a matmul in fp8 takes"
    if len({value(m).dtype for m in matmuls}) > 1:
        return "gradients of more than one dtype"
    return None


def _only_contracted(exact: PartitionedGraph, root: str, contractions: list[str]) -> bool:
    """Whether the exact cut saves the storage of ``root`` for weight gradients and nothing else."""
    crossing = exact.crossing.get(root, ())
    if not crossing or any(s.user_visible for s in crossing):
        return False
    uses = [use for s in crossing for use in exact.uses.of(exact.arrived[s.name], contractions)[0]]
    return bool(uses) and all(use.kind == "contraction" for use in uses)

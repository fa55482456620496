"""One joint graph while it is planned: what crosses a cut of it, what storing that takes, and the plan to carry out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.analysis.projection_sites import find_projection_sites
from actpass.analysis.rematerialization import Recomputation
from actpass.analysis.saved_tensors import find_saved
from actpass.analysis.weight_gradients import WeightGradientMatmuls
from actpass.codecs import QUANTIZERS
from actpass.ir.joint_graph import Joint, module_path, value
from actpass.options import Config
from actpass.passes.partition import cut
from actpass.passes.quantize_saved import layout_of
from actpass.plan import Candidate, CodecSet, SavedTensor, Storage, choose, choose_storage
from actpass.plan.multi_region import OperatingPoint
from actpass.plan.sensitivity import Sensitivity
from actpass.plan.storage_options import Costs
from actpass.plan.store import StoredBytes

CAST = "its codes in fp8 are stored, which its weight gradients are formed of"


@dataclass(frozen=True)
class PartitionPlan:
    """constraints, cut: where the joint graph is cut. codecs: by node, the form of what ``auto`` decides; None: its own rule.
    note: what the user should know of it. levels: what else a part of a step could be, for one plan over all parts. ranks: of
    the projections that take theirs from the budget, by `Candidate.key`; None: there is no limit. limited: whether a larger
    budget of peak bytes may give another. reasons: by node, why a policy recomputes it."""

    constraints: PartitionConstraints
    cut: PartitionedGraph
    codecs: Mapping[str, str | None] | None
    note: str | None = None
    levels: tuple[OperatingPoint, ...] = ()
    ranks: Mapping[str, int] | None = None
    limited: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def key(self) -> Hashable:
        """Equal for choices that are carried out alike."""
        codecs, ranks = (None if m is None else tuple(sorted(m.items(), key=str)) for m in (self.codecs, self.ranks))
        return self.constraints, codecs, ranks


@dataclass(frozen=True)
class Region:
    """One joint graph on its way. default: Inductor's own cut of it (before the loss went to pieces, if it did).
    chunk_rows: of a piece of the loss; 0: it is formed whole."""

    joint: Joint
    joint_inputs: Sequence[object]
    kwargs: Mapping[str, Any]
    config: Config
    finding: WeightGradientMatmuls
    default: PartitionedGraph
    chunk_rows: int
    _saved: dict[tuple[int, bool], tuple[PartitionedGraph, list[SavedTensor]]] = field(
        default_factory=dict[tuple[int, bool], tuple[PartitionedGraph, list[SavedTensor]]], compare=False, repr=False
    )

    def cut(self, constraints: PartitionConstraints) -> PartitionedGraph:
        return cut(self.joint, self.joint_inputs, self.kwargs, constraints)

    def tensors(self, cut: PartitionedGraph) -> list[SavedTensor]:
        """What crosses ``cut``, and what it takes to run it again. What is cast for its weight gradients is as large as its
        codes, and has no other form."""
        found = self.saved(self.joint, cut, self.recomputation)
        sizes = self._bytes_of_codes(cut) if self.config.contracts_codes else {}
        return [replace(t, nbytes=sizes.pop(t.base, 0), obstacle=CAST) if t.base in sizes else t for t in found]

    def _bytes_of_codes(self, cut: PartitionedGraph) -> dict[str, int]:
        """By the node that allocated it, the bytes of the codes in fp8 that are stored in place of what crosses ``cut``."""
        candidates = self.candidates(cut)
        decided = choose(candidates, self.config.tensor_options_of_any).decisions
        sizes: dict[str, int] = {}
        for c, d in zip(candidates, decided, strict=True):
            if d.wgrad is not None and d.project_in == "forward":
                sizes[c.base] = sizes.get(c.base, 0) + c.fp8_bytes
        return sizes

    def sizes(self, cut: PartitionedGraph) -> StoredBytes:
        return sizes_in(cut)

    @cached_property
    def recomputation(self) -> Recomputation:
        return Recomputation(self.joint)

    @cached_property
    def step_flops(self) -> int:
        """FLOPs of the matmuls and fused attentions of one step without recomputation, those of the loss's pieces with them."""
        graphs = (self.default.forward.graph, self.default.backward.graph)
        return sum(self.recomputation.flops(list(g.nodes)) for g in graphs)

    @cached_property
    def _weights(self) -> dict[str, tuple[str, ...]]:
        return {c.node: c.parameters for c in self.finding.contractions}

    def saved(self, joint: Joint, cut: PartitionedGraph, recomputation: Recomputation | None = None) -> list[SavedTensor]:
        """What crosses ``cut`` of ``joint``: of this one (each cut is read once), or of what was rewritten of it."""
        key = id(cut), recomputation is not None
        if joint is self.joint and key in self._saved:
            return self._saved[key][1]
        weights = {**self._weights, **cut.casts}
        found = find_saved(cut, joint, weights, self.config.min_tensor_bytes, recomputation)
        if joint is self.joint:
            self._saved[key] = cut, found  # the cut as well: an id without its owner may come again
        return found

    def costs(self, cut: PartitionedGraph, tensors: Sequence[SavedTensor]) -> Costs:
        """What forms of ``tensors``, which cross ``cut``, are weighed by."""
        return Costs(self.step_flops, sum(t.elements for t in tensors), CodecSet.of(QUANTIZERS), self._measured(cut, tensors))

    def _measured(self, cut: PartitionedGraph, tensors: Sequence[SavedTensor]) -> dict[str, Sensitivity]:
        """By node, what a calibration says of ``tensors``. Only how they compare: all together weigh their share of all
        elements, against which `NOISE_PER_STEP` was set."""
        sensitivities, nodes = self.config.sensitivities, {n.name: n for n in cut.forward.graph.nodes}
        if sensitivities is None:
            return {}
        rows = {t.node: sensitivities.find(module_path(nodes[t.node]), t.node) for t in tensors}
        known = {node: row for node, row in rows.items() if row is not None}
        elements = sum(t.elements for t in tensors if t.node in known) / max(sum(t.elements for t in tensors), 1)
        scale = elements / (sum(row.factor for row in known.values()) or 1.0)
        return {node: replace(row, factor=row.factor * scale) for node, row in known.items()}

    def candidates(self, cut: PartitionedGraph) -> list[Candidate]:
        """What a projection could do to the weight gradients, where ``cut`` says what is stored."""
        return find_projection_sites(self.joint, self.finding, cut, lambda c: self.config.tensor_options_of_any(c.parameters))

    def storages(self, joint: Joint, choice: PartitionPlan) -> tuple[Storage, ...]:
        """In which form everything that crosses is stored."""
        tensors = self.saved(joint, choice.cut)
        return choose_storage(
            tensors, self.config.tensor_options_of_any, sizes_in(choice.cut), CodecSet.of(QUANTIZERS), choice.codecs
        )


def sizes_in(cut: PartitionedGraph) -> StoredBytes:
    """Bytes of a tensor that crosses ``cut`` in a codec and a group size."""
    nodes = {n.name: n for n in cut.forward.graph.nodes}

    def stored_bytes(tensor: SavedTensor, codec: str, group: int | None) -> int | None:
        layout = layout_of(value(nodes[tensor.node]), codec, group)
        return layout.nbytes if layout is not None else None

    return stored_bytes

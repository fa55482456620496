"""Plan a model of many identical layers from a few that were traced, at the cost of these.

Nothing here decides: the search is that of `actpass.planner.budget`, over the tensors of *all* layers, each of which has its
own form. What is folded is only what has to be traced. Layers that end up in one form (the same tensors run again, the same
codecs) are read from one cut of the traced model in which every layer has that form, and the kernels of the deep model are put
together from those of these cuts (`actpass.extrapolation.unroll`), so that its peak is found as for any other graph: with
Inductor's order of all its kernels, and with gradients that pile up layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.codecs import QUANTIZERS
from actpass.extrapolation.folded_graph import Block, FoldedCut
from actpass.extrapolation.layer_map import MIDDLE, Fold
from actpass.extrapolation.layer_names import Names, Stack
from actpass.ir.joint_graph import module_path
from actpass.options import Config
from actpass.passes.base import RegionState
from actpass.pipeline import WITHIN_LAYERS, carry_out, read
from actpass.plan import CodecSet, Decision, Plan, SavedTensor, Storage
from actpass.plan.storage_options import Costs
from actpass.plan.store import StoredBytes
from actpass.planner.budget import within_peak
from actpass.planner.free_cut import no_recompute_partition
from actpass.planner.peak_budget import Limit
from actpass.planner.plan_source import SearchedPlan
from actpass.planner.region import PartitionPlan, sizes_in
from actpass.planner.storage_search import Search
from actpass.reporting.describe import describe
from actpass.reporting.record import Record, SiteRow


@dataclass(frozen=True)
class LayerKind:
    """Layers that store alike. rows: what each of them saves, or would under Inductor's default. recompute: modules whose
    matmul or attention the backward recomputes."""

    layers: tuple[int, ...]
    rows: tuple[SiteRow, ...]
    recompute: tuple[str, ...]


@dataclass(frozen=True)
class FoldedPlan:
    """A plan for the deep model. kinds: of its layers. rest: what lies in no layer. default: Inductor's own cut."""

    plan: Plan
    cut: FoldedCut
    default: FoldedCut
    kinds: tuple[LayerKind, ...]
    rest: LayerKind
    notes: tuple[str, ...]


class FoldedRegion:
    """The joint graph of a model of `TRACED` layers, read as that of a deep one. Raises `GraphUnsupported` if the layers that
    are to stand for all others are not alike."""

    def __init__(self, traced: RegionState, stack: Stack) -> None:
        self.stack, self.fold = stack, Fold(stack.layers)
        self.whole = traced.joint
        names = Names(self.whole.gm.graph, stack)
        assert traced.default is not None
        default = Block(traced.default, traced.default, self.whole.num_fwd_outputs, stack, names)
        self.default = FoldedCut(self.fold, (default,) * stack.layers, default)
        self.region, self._state = read(traced, self.default.saved_bytes)
        self.names = Names(self.region.joint.gm.graph, stack)
        self.place, self.middle = self.names.place, self.names.middle
        self._cuts: dict[PartitionConstraints, tuple[PartitionedGraph, Block, list[SavedTensor]]] = {}
        self._finished: dict[Any, tuple[PartitionPlan, RegionState, Block]] = {}
        self._carried: dict[tuple[int, ...], FoldedCut] = {}
        self._copied: dict[str, tuple[PartitionedGraph, SavedTensor]] = {}

    @property
    def config(self) -> Config:
        return self.region.config

    # ---------------------------------------------------------------------------------------------------------- names

    def _deep_names(self, name: str, layer: int | None) -> tuple[str, ...]:
        """What the traced node ``name`` is called in the deep model, seen from the copy that is ``layer``."""
        owner, like = self.place[name]
        if owner is None:
            return (name,)
        return tuple(f"{like}@{where}" for where in self.fold.seen_from(layer, owner))

    def _by_layer(self, names: Iterable[str]) -> dict[int | None, frozenset[str]]:
        """Names of the deep model by layer, without it."""
        found: dict[int | None, set[str]] = {}
        for name in names:
            own, _, layer = name.partition("@")
            found.setdefault(int(layer) if layer else None, set()).add(own)
        return {layer: frozenset(own) for layer, own in found.items()}

    def _traced_names(self, own: frozenset[str], everywhere: frozenset[str], deep: frozenset[str]) -> frozenset[str]:
        """The nodes of the traced model that stand for ``own`` of one layer, in all of its layers. everywhere: those outside of
        layers. deep: all names of the deep model, for nodes that only the first or last layer has."""
        alike = {by[name] for by in self.middle.values() for name in own if name in by}
        single = {n for n, (layer, like) in self.place.items() if layer is not None and like == n and layer != MIDDLE}
        ends = {n for n in single if f"{n}@{self.fold.deep(self._layer(n))[0]}" in deep}
        return frozenset(alike | ends | everywhere)

    def _layer(self, name: str) -> int:
        layer, _ = self.place[name]
        assert layer is not None
        return layer

    # ------------------------------------------------------------------------------------------- what a search asks for

    def costs(self, cut: FoldedSetting, tensors: Sequence[SavedTensor]) -> Costs:
        return Costs(self.step_flops, sum(t.elements for t in tensors), CodecSet.of(QUANTIZERS))

    @cached_property
    def step_flops(self) -> int:
        flops: Counter[int | None] = Counter()
        for node in self.whole.gm.graph.nodes:  # with the head, which a loss in pieces hides
            layer, _ = self.place.get(node.name, (None, ""))
            flops[layer] += self.region.recomputation.flops([node])
        return flops[None] + sum(flops[self.fold.traced(layer)] for layer in range(self.fold.layers))

    def deep_setting(self, constraints: PartitionConstraints) -> PartitionConstraints:
        """A setting of the traced model in which all layers are cut alike, as one of the deep model."""

        def deep(names: frozenset[str]) -> frozenset[str]:
            return frozenset(d for n in names for d in self._deep_names(n, None))

        return replace(constraints, recompute=deep(constraints.recompute), must_save=deep(constraints.must_save))

    def settings(self, constraints: PartitionConstraints) -> tuple[list[PartitionConstraints], PartitionConstraints]:
        """For each layer of the deep model the setting of the traced one that cuts all layers as this one; and that for all
        else."""
        recompute, must_save = self._by_layer(constraints.recompute), self._by_layer(constraints.must_save)
        none: frozenset[str] = frozenset()
        known: dict[Any, PartitionConstraints] = {}

        def traced(layer: int) -> PartitionConstraints:
            key = recompute.get(layer, none), must_save.get(layer, none)
            if key not in known:
                known[key] = PartitionConstraints(
                    constraints.recompute_materialized,
                    self._traced_names(key[0], recompute.get(None, none), constraints.recompute),
                    self._traced_names(key[1], must_save.get(None, none), constraints.must_save),
                    part=bool(constraints.recompute),
                )
            return known[key]

        settings = [traced(layer) for layer in range(self.fold.layers)]
        return settings, settings[-1]

    def _cut(self, constraints: PartitionConstraints) -> tuple[PartitionedGraph, Block, list[SavedTensor]]:
        if constraints not in self._cuts:
            where = self.region.cut(constraints)
            self._cuts[constraints] = where, self._block(where, where), self.region.tensors(where)
        return self._cuts[constraints]

    def _block(self, cut: PartitionedGraph, before: PartitionedGraph) -> Block:
        return Block(cut, before, self.whole.num_fwd_outputs, self.stack, self.names)

    def cut(self, constraints: PartitionConstraints) -> FoldedSetting:
        return FoldedSetting(constraints, *self.settings(constraints))

    def tensors(self, cut: FoldedSetting) -> list[SavedTensor]:
        """All that crosses, layer by layer."""
        found = [self._copy(t, None, cut.rest) for t in self._cut(cut.rest)[2] if self.place[t.base][0] is None]
        for layer, constraints in enumerate(cut.layers):
            own = [t for t in self._cut(constraints)[2] if self.place[t.base][0] == self.fold.traced(layer)]
            found += [self._copy(t, layer, constraints) for t in own]
        return found

    def _copy(self, t: SavedTensor, layer: int | None, constraints: PartitionConstraints) -> SavedTensor:
        def name(traced: str) -> str:
            return self._deep_names(traced, layer)[0]

        copy = replace(
            t,
            node=name(t.node),
            saved_for_backward=tuple(map(name, t.saved_for_backward)),
            base=name(t.base),
            paths=t.paths if layer is None else tuple(self.stack.moved(p, layer) for p in t.paths),
            recompute=tuple(map(name, t.recompute)),
            of_factors=tuple(map(name, t.of_factors)),
            attention=name(t.attention) if t.attention is not None else None,
        )
        self._copied[copy.node] = self._cut(constraints)[0], t
        return copy

    def sizes(self, cut: FoldedSetting) -> StoredBytes:
        known: dict[tuple[int, str, str, int | None], int | None] = {}
        copied = dict(self._copied)  # as they are now: another cut may hold other tensors under these names

        def stored_bytes(tensor: SavedTensor, codec: str, group: int | None) -> int | None:
            where, traced = copied[tensor.node]
            key = id(where), traced.node, codec, group
            if key not in known:
                known[key] = sizes_in(where)(traced, codec, group)
            return known[key]

        return stored_bytes

    # --------------------------------------------------------------------------------------------------------- a choice

    def free(self) -> PartitionPlan:
        """What runs nothing again, as `actpass.planner.free_cut.no_recompute_partition`."""
        found = no_recompute_partition(self.region)
        constraints = self.deep_setting(found.constraints)
        return replace(found, constraints=constraints, cut=self.cut(constraints))

    def finished(
        self, choice: PartitionPlan
    ) -> tuple[list[tuple[PartitionPlan, RegionState, Block]], tuple[PartitionPlan, RegionState, Block]]:
        """``choice`` carried out: for each layer on the traced model with all layers like this one; and for the rest."""
        codecs = choice.codecs
        by_layer: dict[int | None, dict[str, str | None]] = {}
        for name, form in (codecs or {}).items():
            own, _, layer = name.partition("@")
            by_layer.setdefault(int(layer) if layer else None, {})[own] = form
        cut: Any = choice.cut
        found = [
            self._finish(constraints, None if codecs is None else by_layer.get(layer, {}), codecs)
            for layer, constraints in enumerate(cut.layers)
        ]
        return found, found[-1]

    def _finish(
        self, constraints: PartitionConstraints, own: Mapping[str, str | None] | None, deep: Mapping[str, str | None] | None
    ) -> tuple[PartitionPlan, RegionState, Block]:
        """own: forms of one layer. deep: of all; None: the method's own rule for all."""
        where, _, tensors = self._cut(constraints)
        codecs: dict[str, str | None] | None = None
        if own is not None and deep is not None:
            codecs = {}
            for t in tensors:
                layer, like = self.place[t.node]
                single = deep.get(self._deep_names(t.node, None)[0])
                codecs[t.node] = own[like] if layer is not None and like in own else single
        key = constraints, tuple(sorted(codecs.items())) if codecs is not None else None
        if key not in self._finished:
            choice = PartitionPlan(constraints, where, codecs)
            done = carry_out(SearchedPlan(self.region, choice), self._state, WITHIN_LAYERS)
            self._finished[key] = choice, done, self._block(done.cuts.swapped, done.cuts.final)
        return self._finished[key]

    def carry_out(self, choice: PartitionPlan) -> FoldedCut:
        """The cut of the deep model that ``choice`` ends in."""
        layers, rest = self.finished(choice)
        blocks = tuple(block for _, _, block in layers)
        key = tuple(map(id, (*blocks, rest[2])))
        if key not in self._carried:
            self._carried[key] = FoldedCut(self.fold, blocks, rest[2])
        return self._carried[key]

    @cached_property
    def search(self) -> Search[FoldedRegion]:
        return Search(self, self.free())

    def choose(self, limit: Limit) -> PartitionPlan:
        """The choice for a budget of peak bytes. Raises `BudgetError` if nothing meets it: then not every capacity was looked
        at, which takes seconds each, and one between may need somewhat less than what the error says."""
        return within_peak(self.search, self.carry_out, limit)

    # --------------------------------------------------------------------------------------------------------- in words

    def describe(self, choice: PartitionPlan) -> FoldedPlan:
        layers, rest = self.finished(choice)
        different = {id(done): done for _, done, _ in (*layers, rest)}
        records = {key: describe(self.whole, self.region.joint, done) for key, done in different.items()}
        kinds: dict[Any, list[int]] = {}
        for layer, (chosen, done, _) in enumerate(layers):
            traced = self.fold.traced(layer)
            key = self._rows(records[id(done)], traced), self._again(chosen, traced)
            kinds.setdefault(key, []).append(layer)
        found = tuple(LayerKind(tuple(members), rows, recompute) for (rows, recompute), members in kinds.items())
        record = records[id(rest[1])]
        others = LayerKind((), self._rows(record, None), self._again(rest[0], None))
        return FoldedPlan(self._plan(layers, rest), self.carry_out(choice), self.default, found, others, record.notes)

    def _rows(self, record: Record, layer: int | None) -> tuple[SiteRow, ...]:
        """The rows of one traced layer, without what tells it from others."""
        rows: list[SiteRow] = []
        for row in record.sites:
            owner, path = self.stack.place(row.module)
            if owner == layer:
                own = tuple(self.stack.place(p)[1] for p in row.parameters)
                rows.append(replace(row, name="", module=path, reason="", source="", parameters=own))
        return tuple(rows)

    def _again(self, choice: PartitionPlan, layer: int | None) -> tuple[str, ...]:
        nodes = {n.name: n for n in self.region.joint.gm.graph.nodes}
        recompute = [nodes[name] for name in sorted(choice.constraints.recompute) if self.place[name][0] == layer]
        return tuple(sorted(self.stack.place(module_path(n))[1] for n in recompute))

    def _plan(
        self, layers: Sequence[tuple[PartitionPlan, RegionState, Block]], rest: tuple[PartitionPlan, RegionState, Block]
    ) -> Plan:
        """The plan of the deep model, with all its layers spelled out."""
        parts = [(None, rest), *enumerate(layers)]
        decisions, storages, recompute = list[Decision](), list[Storage](), list[str]()
        for layer, (choice, done, _) in parts:
            traced = None if layer is None else self.fold.traced(layer)

            def name(node: str, layer: int | None = layer) -> str:
                return self._deep_names(node, layer)[0] if node in self.place else f"{node}@{layer}"

            for s in done.plan.storages:
                if self._layer_in(done, s.base) == traced:
                    moved = tuple(map(name, s.saved_for_backward))
                    storages.append(replace(s, node=name(s.node), saved_for_backward=moved, base=name(s.base)))
            for d in done.plan.decisions:
                if self.place[d.site][0] == traced:
                    matmuls = tuple(map(name, d.matmuls))
                    paths = tuple(self.stack.moved(p, layer) if layer is not None else p for p in d.parameters)
                    decisions.append(replace(d, site=name(d.site), matmuls=matmuls, parameters=paths))
            recompute += [name(n) for n in sorted(choice.constraints.recompute) if self.place[n][0] == traced]
        return Plan(tuple(decisions), tuple(storages), tuple(recompute))

    def _layer_in(self, done: RegionState, name: str) -> int | None:
        if name in self.place:
            return self.place[name][0]
        node = next(n for n in done.cuts.final.forward.graph.nodes if n.name == name)
        return self.stack.place(module_path(node))[0]


@dataclass(frozen=True)
class FoldedSetting:
    """A cut of the deep model that was not looked at yet. layers, rest: see `FoldedRegion.settings`."""

    constraints: PartitionConstraints
    layers: list[PartitionConstraints]
    rest: PartitionConstraints

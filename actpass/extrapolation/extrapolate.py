"""Plan a model of many identical layers from a few that were traced, at the cost of these.

Nothing here decides: the search is that of `actpass.planner.budget`, over the tensors of *all* layers, each of which has its
own form. What is folded is only what has to be traced. Layers that end up in one form (the same tensors run again, the same
codecs) are read from one cut of the traced model in which every layer has that form, and the kernels of the deep model are put
together from those of these cuts (`actpass.extrapolation.unroll`), so that its peak is found as for any other graph: with
Inductor's order of all its kernels, and with gradients that pile up layer by layer.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import torch
from torch import fx

from actpass.analysis.partitioned import Cut, Saved, Setting
from actpass.codecs import errors
from actpass.errors import BudgetError, GraphUnsupported
from actpass.extrapolation.fsdp import Moment, Optimizer, RankPeak, Sharded, Unit
from actpass.extrapolation.layer_map import MIDDLE, TRACED, Fold
from actpass.extrapolation.unroll import Key, Layered, Unrolled, unroll
from actpass.ir.joint_graph import module_path, tensor_bytes
from actpass.ir.outputs import output_values
from actpass.memory.footprint import MARGIN, Footprint, step_peak
from actpass.memory.liveness import Timeline
from actpass.memory.liveness import read as read_kernels
from actpass.options.config import Config
from actpass.passes.base import RegionState
from actpass.passes.partition import returned
from actpass.pipeline import carry_out, read
from actpass.plan import Plan, SavedTensor
from actpass.plan.policy import StoredBytes
from actpass.plan.storage_options import Costs
from actpass.planner.budget import Choice, Limit, Search, free_choice, sizes_in, within_peak
from actpass.planner.plan_source import SearchedPlan
from actpass.reporting.record import Record, SiteRow, describe
from actpass.torch_compat import invoke_subgraph


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers that repeat. path: of the module list that holds them, in the traced model. group: how many of its members
    make up one layer here (of a model whose layers take turns, as many as take turns). layers: how many of these the deep
    model has."""

    path: str
    layers: int
    group: int = 1

    def place(self, path: str) -> tuple[int | None, str]:
        """(traced layer, path inside of it) of what the module at ``path`` makes; None and the path itself outside of all."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?=\.|$)", path)
        if found is None:
            return None, path
        layer, member = divmod(int(found[1]), self.group)
        return layer, f"{self.path}.{member if self.group > 1 else '*'}{path[found.end() :]}"

    def places(self, graph: fx.Graph) -> dict[fx.Node, tuple[int | None, str]]:
        """`place` of every node. A sum of gradients, which no module makes, lies where the last of its terms does."""
        places: dict[fx.Node, tuple[int | None, str]] = {}
        order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            path = module_path(node)
            terms = sorted(node.all_input_nodes, key=order.__getitem__) if node.op == "call_function" and not path else ()
            places[node] = places[terms[-1]] if terms else self.place(path)
        return places

    @property
    def depth(self) -> int:
        """Members of the list in the model to trace."""
        return TRACED * self.group

    def units(self, model: torch.nn.Module) -> tuple[Unit, list[Unit]]:
        """The parameters of the deep model, read from the traced one: those outside of all layers, and those of each layer."""
        shapes: dict[int | None, list[tuple[int, ...]]] = {None: [], **{i: [] for i in range(TRACED)}}
        sizes = {p.element_size() for p in model.parameters()}
        if len(sizes) != 1:
            raise GraphUnsupported(f"the parameters have elements of {sorted(sizes)} bytes. Give all of them one dtype.")
        for name, parameter in model.named_parameters():
            shapes[self.place(name)[0]].append(tuple(parameter.shape))
        units = {layer: Unit(tuple(own), min(sizes)) for layer, own in shapes.items()}
        fold = Fold(self.layers)
        return units[None], [units[fold.traced(layer)] for layer in range(self.layers)]

    def moved(self, path: str, layer: int) -> str:
        """``path`` in another ``layer``."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?=\.|$)", path)
        if found is None:
            return path
        return f"{self.path}.{layer * self.group + int(found[1]) % self.group}{path[found.end() :]}"


class Names:
    """What the nodes of a traced joint graph are called in the deep model.

    place: by node (its layer, the node of the middle layer that it is like; its own name if it is like none). middle: for every
    traced layer its nodes by those of the middle one.
    """

    def __init__(self, graph: fx.Graph, stack: Stack) -> None:
        members: dict[int | None, list[tuple[str, tuple[str, str]]]] = {layer: [] for layer in (None, *range(TRACED))}
        for node, (layer, path) in stack.places(graph).items():
            members[layer].append((node.name, (path, str(node.target))))
        self.place: dict[str, tuple[int | None, str]] = {name: (None, name) for name, _ in members[None]}
        self.middle: dict[int, dict[str, str]] = {}
        for layer in range(TRACED):
            own, middle = members[layer], members[MIDDLE]
            is_near = abs(layer - MIDDLE) <= 1
            if not middle or (is_near and Counter(kind for _, kind in own) != Counter(kind for _, kind in middle)):
                raise GraphUnsupported(
                    f"the layers of {stack.path!r} are not alike: number {layer} of {TRACED} traced has {len(own)} operators, "
                    f"number {MIDDLE} has {len(middle)}. A model whose layers differ can't be planned from a few of them."
                )
            pairs = _by_occurrence(own, middle) if is_near else _by_sequence(own, middle)
            self.middle[layer] = {like: name for name, like in pairs}
            self.place |= {name: (layer, name) for name, _ in own} | {name: (layer, like) for name, like in pairs}


_Members = list[tuple[str, tuple[str, str]]]
"""(node, what it is): equal for nodes of two layers that are alike."""


def _by_occurrence(own: _Members, middle: _Members) -> list[tuple[str, str]]:
    """(node, the middle layer's node) of two layers that have as many nodes of each kind."""
    queues: dict[Any, list[str]] = {}
    for name, kind in reversed(middle):
        queues.setdefault(kind, []).append(name)
    return [(name, queues[kind].pop()) for name, kind in own]


def _by_sequence(own: _Members, middle: _Members) -> list[tuple[str, str]]:
    """The same for layers of which one may have nodes that the other has not."""
    matcher = SequenceMatcher(None, [kind for _, kind in own], [kind for _, kind in middle], autojunk=False)
    blocks = [(own[a : a + n], middle[b : b + n]) for a, b, n in matcher.get_matching_blocks()]
    return [(name, like) for a, b in blocks for (name, _), (like, _) in zip(a, b, strict=True)]


class Block:
    """A cut of the traced model, to take layers from. before: the cut before what crosses it was coded."""

    def __init__(self, cut: Cut, before: Cut, outputs: int, stack: Stack, names: Names) -> None:
        self.cut, self.before, self.outputs, self.stack, self.names = cut, before, outputs, stack, names

    @cached_property
    def forward(self) -> Layered:
        places = self._places(self.cut.forward.graph, self.before.forward.graph, {})
        return Layered(read_kernels(self.cut.forward), places)

    @cached_property
    def backward(self) -> Layered:
        crossing = [n for n in output_values(self.cut.forward.graph)[self.outputs :] if isinstance(n, fx.Node)]
        inputs = self.cut.backward.graph.find_nodes(op="placeholder")
        arrived = {n: self.forward.place[source] for n, source in zip(inputs, crossing, strict=False)}
        places = self._places(self.cut.backward.graph, self.before.backward.graph, arrived)
        return Layered(read_kernels(self.cut.backward, self.cut.arrives), places)

    def _places(
        self, graph: fx.Graph, before: fx.Graph, arrived: Mapping[fx.Node, tuple[int | None, Key]]
    ) -> dict[fx.Node, tuple[int | None, Key]]:
        """Layer and key of every node. What was inserted to code or project a tensor lies where that does; what reads none of
        a layer (a basis) where it was inserted, though it may serve others, too."""
        own = {n.name for n in before.nodes}
        free: set[fx.Node] = set()
        counts: Counter[Key] = Counter()
        found: dict[fx.Node, tuple[int | None, Key]] = {}
        for node, (layer, path) in self.stack.places(graph).items():
            if node in arrived:
                found[node] = arrived[node]
                continue
            if node.name in own and node.name in self.names.place:
                layer, like = self.names.place[node.name]
                found[node] = layer, (path, like)
                continue
            sources = [found[a] for a in reversed(node.all_input_nodes) if found[a][0] is not None and a not in free]
            if not sources:
                free.add(node)
            layer, base = sources[0] if sources else (layer, (path,))
            if arrived and _is_decoded(node):  # the same as the tensor in a layer where it is exact
                found[node] = layer, base[:2]
                continue
            key = (*base, str(node.target))
            counts[layer, key] += 1
            found[node] = layer, (*key, counts[layer, key])
        return found

    def layer_of(self, saved: Saved) -> int | None:
        return self._layers[saved.holder if saved.holder in self._layers else saved.name]

    def by_layer(self, nbytes_of: Callable[[Saved], int]) -> Counter[int | None]:
        """A sum over all that crosses."""
        sums: Counter[int | None] = Counter()
        for s in self.cut.saved:
            sums[self.layer_of(s)] += nbytes_of(s)
        return sums

    def returned_by_layer(self) -> Counter[int | None]:
        """Bytes that the caller gets."""
        sums: Counter[int | None] = Counter()
        for node in returned(self.cut.forward, self.outputs):
            sums[self._layers[node.name]] += tensor_bytes(node)
        return sums

    @cached_property
    def _layers(self) -> dict[str, int | None]:
        return {n.name: layer for n, (layer, _) in self.forward.place.items()}


def _is_decoded(node: fx.Node) -> bool:
    """Whether ``node``, which was inserted into a backward, is a tensor that was stored in few bits."""
    return node.target is operator.getitem and node.all_input_nodes[0].target is invoke_subgraph


@dataclass(frozen=True)
class FoldedCut:
    """A cut of the deep model. blocks: for each of its layers the cut that it is taken from. rest: that of all else."""

    fold: Fold
    blocks: tuple[Block, ...]
    rest: Block

    def _sum(self, by_layer: Callable[[Block], Counter[int | None]]) -> int:
        blocks = {id(block): block for block in (*self.blocks, self.rest)}  # most layers share one
        sums = {key: by_layer(block) for key, block in blocks.items()}
        layers = (sums[id(b)][self.fold.traced(i)] for i, b in enumerate(self.blocks))
        return sums[id(self.rest)][None] + sum(layers)

    @cached_property
    def saved_bytes(self) -> int:
        return self._sum(lambda b: b.by_layer(lambda s: s.nbytes))

    @cached_property
    def unrolled(self) -> tuple[Unrolled, Unrolled]:
        """The kernels of the forward, and those of the backward."""
        forward = unroll(self.fold, [b.forward for b in self.blocks], self.rest.forward, downwards=False)
        return forward, unroll(self.fold, [b.backward for b in self.blocks], self.rest.backward, downwards=True)

    @cached_property
    def timelines(self) -> tuple[Timeline, Timeline]:
        forward, backward = self.unrolled
        return forward.program.timeline(), backward.program.timeline()

    @cached_property
    def footprint(self) -> Footprint:
        """As `Cut.footprint`."""
        kept = self._sum(lambda b: b.by_layer(lambda s: 0 if s.user_visible else s.nbytes))
        return self.rest.cut.footprint_of(self.timelines, kept, self.returned_bytes)

    @cached_property
    def returned_bytes(self) -> int:
        """As `Cut.returned_bytes`."""
        return self._sum(Block.returned_by_layer)

    @property
    def peak_bytes(self) -> int:
        return step_peak([self.footprint])

    @cached_property
    def largest_at_peak(self) -> tuple[tuple[str, int], ...]:
        """(what, bytes) of what is in use at the predicted peak, of all layers together, the largest first."""
        forward, backward = self.timelines
        at_forward = forward.peak > backward.peak + self.returned_bytes
        timeline, unrolled = (forward, self.unrolled[0]) if at_forward else (backward, self.unrolled[1])
        program = unrolled.program
        label = {c.name: c.label + (" (stays)" if c in program.outputs else "") for c in program.bytes}
        sums: Counter[str] = Counter()
        for name, nbytes in timeline.live:
            sums[label[name]] += nbytes
        return tuple(sorted(sums.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def at_peak(self) -> tuple[int, int, int]:
        """Bytes at the predicted peak: of gradients that are there already (or, in the forward, of nothing), of what is saved,
        and of all else, which is what runs."""
        forward, backward = self.timelines
        at_forward = forward.peak > backward.peak + self.returned_bytes
        timeline, unrolled = (forward, self.unrolled[0]) if at_forward else (backward, self.unrolled[1])
        program, live = unrolled.program, dict(timeline.live)
        stays = sum(live.get(c.name, 0) for c in program.outputs)
        saved = stays if at_forward else sum(live.get(c.name, 0) for c in program.freed)
        gradients = 0 if at_forward else stays
        return gradients, saved, self.peak_bytes - gradients - saved

    @cached_property
    def moments(self) -> tuple[list[Moment], list[Moment]]:
        """Layer by layer, as under FSDP, where a layer's hooks let no kernel of another one come between."""
        forward, backward = (self._moments(u) for u in self.unrolled)
        return forward, [replace(m, level=m.level + self.returned_bytes) for m in backward]

    def _moments(self, unrolled: Unrolled) -> list[Moment]:
        program = unrolled.program
        found = []
        for kernel, level in zip(program.kernels, program.run(program.kernels, {}).levels, strict=True):
            left = [w for w in kernel.writes if w in program.outputs]
            gradients: Counter[int | None] = Counter()
            for w in left:
                gradients[w.layer] += program.bytes[w]
            found.append(Moment(unrolled.layer_of[kernel], level, tuple(gradients.items())))
        return found


@dataclass(frozen=True)
class ShardedBudget:
    """A budget of the peak bytes of each rank under FSDP2. inputs: bytes of a batch and of buffers, which every rank has."""

    nbytes: int
    sharded: Sharded
    optimizer: Optimizer
    inputs: int = 0

    @property
    def resident(self) -> int:
        """Bytes that are there all the time: sharded parameters, optimizer state, inputs."""
        parameters = self.sharded.parameters
        return self.inputs + parameters + self.optimizer.state_bytes(parameters, self.sharded.count)

    def peak(self, cut: FoldedCut) -> RankPeak:
        """Of a forward and its backward, above what is resident."""
        forward, backward = cut.moments
        peaks = self.sharded.forward_peak(forward), self.sharded.backward_peak(backward)
        return max(peaks, key=lambda peak: peak.total)

    @property
    def step(self) -> int:
        """Bytes above what is resident while the optimizer steps."""
        return self.sharded.parameters + self.optimizer.scratch_bytes(self.sharded.parameters, self.sharded.largest)

    def needs(self, cut: FoldedCut) -> int:
        return max(self.resident + math.ceil(self.peak(cut).total * (1 + MARGIN)), self.floor(cut))

    def floor(self, cut: FoldedCut) -> int:
        """Bytes that no choice changes."""
        return self.resident + self.step

    def error(self, cut: FoldedCut, method: str) -> BudgetError:
        needed, peak = self.needs(cut), self.peak(cut)
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak on each of {self.sharded.ranks} ranks can't be met. The least that "
            f"method={method!r} reaches here is {needed} bytes: {self.resident} of sharded parameters, optimizer state and "
            f"inputs, and the larger of {self.step} while the optimizer steps and {peak.total} predicted (and a margin) while "
            f"the backward runs: {peak.parameters} of whole parameters, {peak.gradients} of gradients, {peak.buffer} of "
            f"buffers and {peak.activations} of activations. Use memory_budget={needed} or more, more ranks, or a smaller "
            "batch.",
            needed,
        )


@dataclass(frozen=True)
class LayerKind:
    """Layers that store alike. rows: what each of them saves, or would under Inductor's default. again: modules whose matmul or
    attention the backward runs again."""

    layers: tuple[int, ...]
    rows: tuple[SiteRow, ...]
    again: tuple[str, ...]


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
        self._cuts: dict[Setting, tuple[Cut, Block, list[SavedTensor]]] = {}
        self._finished: dict[Any, tuple[Choice, RegionState, Block]] = {}
        self._carried: dict[tuple[int, ...], FoldedCut] = {}
        self._copied: dict[str, tuple[Cut, SavedTensor]] = {}

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
        return Costs(self.step_flops, sum(t.elements for t in tensors), errors())

    @cached_property
    def step_flops(self) -> int:
        flops: Counter[int | None] = Counter()
        for node in self.whole.gm.graph.nodes:  # with the head, which a loss in pieces hides
            layer, _ = self.place.get(node.name, (None, ""))
            flops[layer] += self.region.recomputation.flops([node])
        return flops[None] + sum(flops[self.fold.traced(layer)] for layer in range(self.fold.layers))

    def deep_setting(self, setting: Setting) -> Setting:
        """A setting of the traced model in which all layers are cut alike, as one of the deep model."""

        def deep(names: frozenset[str]) -> frozenset[str]:
            return frozenset(d for n in names for d in self._deep_names(n, None))

        return replace(setting, again=deep(setting.again), keep=deep(setting.keep))

    def settings(self, setting: Setting) -> tuple[list[Setting], Setting]:
        """For each layer of the deep model the setting of the traced one that cuts all layers as this one; and that for all
        else."""
        again, keep = self._by_layer(setting.again), self._by_layer(setting.keep)
        none: frozenset[str] = frozenset()
        known: dict[Any, Setting] = {}

        def traced(layer: int) -> Setting:
            key = again.get(layer, none), keep.get(layer, none)
            if key not in known:
                known[key] = Setting(
                    setting.rebuild,
                    self._traced_names(key[0], again.get(None, none), setting.again),
                    self._traced_names(key[1], keep.get(None, none), setting.keep),
                    part=bool(setting.again),
                )
            return known[key]

        settings = [traced(layer) for layer in range(self.fold.layers)]
        return settings, settings[-1]

    def _cut(self, setting: Setting) -> tuple[Cut, Block, list[SavedTensor]]:
        if setting not in self._cuts:
            where = self.region.cut(setting)
            self._cuts[setting] = where, self._block(where, where), self.region.tensors(where)
        return self._cuts[setting]

    def _block(self, cut: Cut, before: Cut) -> Block:
        return Block(cut, before, self.whole.num_fwd_outputs, self.stack, self.names)

    def cut(self, setting: Setting) -> FoldedSetting:
        return FoldedSetting(setting, *self.settings(setting))

    def tensors(self, cut: FoldedSetting) -> list[SavedTensor]:
        """All that crosses, layer by layer."""
        found = [self._copy(t, None, cut.rest) for t in self._cut(cut.rest)[2] if self.place[t.root][0] is None]
        for layer, setting in enumerate(cut.layers):
            own = [t for t in self._cut(setting)[2] if self.place[t.root][0] == self.fold.traced(layer)]
            found += [self._copy(t, layer, setting) for t in own]
        return found

    def _copy(self, t: SavedTensor, layer: int | None, setting: Setting) -> SavedTensor:
        def name(traced: str) -> str:
            return self._deep_names(traced, layer)[0]

        copy = replace(
            t,
            node=name(t.node),
            crossing=tuple(map(name, t.crossing)),
            root=name(t.root),
            paths=t.paths if layer is None else tuple(self.stack.moved(p, layer) for p in t.paths),
            again=tuple(map(name, t.again)),
            of_factors=tuple(map(name, t.of_factors)),
            attention=name(t.attention) if t.attention is not None else None,
        )
        self._copied[copy.node] = self._cut(setting)[0], t
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

    def free(self) -> Choice:
        """What runs nothing again, as `actpass.planner.budget.free_choice`."""
        found = free_choice(self.region)
        setting = self.deep_setting(found.setting)
        return replace(found, setting=setting, cut=self.cut(setting))

    def finished(self, choice: Choice) -> tuple[list[tuple[Choice, RegionState, Block]], tuple[Choice, RegionState, Block]]:
        """``choice`` carried out: for each layer on the traced model with all layers like this one; and for the rest."""
        codecs = choice.codecs
        by_layer: dict[int | None, dict[str, str | None]] = {}
        for name, form in (codecs or {}).items():
            own, _, layer = name.partition("@")
            by_layer.setdefault(int(layer) if layer else None, {})[own] = form
        cut: Any = choice.cut
        found = [
            self._finish(setting, None if codecs is None else by_layer.get(layer, {}), codecs)
            for layer, setting in enumerate(cut.layers)
        ]
        return found, found[-1]

    def _finish(
        self, setting: Setting, own: Mapping[str, str | None] | None, deep: Mapping[str, str | None] | None
    ) -> tuple[Choice, RegionState, Block]:
        """own: forms of one layer. deep: of all; None: the method's own rule for all."""
        where, _, tensors = self._cut(setting)
        codecs: dict[str, str | None] | None = None
        if own is not None and deep is not None:
            codecs = {}
            for t in tensors:
                layer, like = self.place[t.node]
                single = deep.get(self._deep_names(t.node, None)[0])
                codecs[t.node] = own[like] if layer is not None and like in own else single
        key = setting, tuple(sorted(codecs.items())) if codecs is not None else None
        if key not in self._finished:
            choice = Choice(setting, where, codecs)
            done = carry_out(SearchedPlan(self.region, choice), self._state)
            self._finished[key] = choice, done, self._block(done.cuts.swapped, done.cuts.final)
        return self._finished[key]

    def carry_out(self, choice: Choice) -> FoldedCut:
        """The cut of the deep model that ``choice`` ends in."""
        layers, rest = self.finished(choice)
        blocks = tuple(block for _, _, block in layers)
        key = tuple(map(id, (*blocks, rest[2])))
        if key not in self._carried:
            self._carried[key] = FoldedCut(self.fold, blocks, rest[2])
        return self._carried[key]

    @cached_property
    def search(self) -> Search:
        return Search(self, self.free())

    def choose(self, limit: Limit) -> Choice:
        """The choice for a budget of peak bytes. Raises `BudgetError` if nothing meets it: then not every capacity was looked
        at, which takes seconds each, and one between may need somewhat less than what the error says."""
        return within_peak(self.search, self.carry_out, limit)

    # --------------------------------------------------------------------------------------------------------- in words

    def describe(self, choice: Choice) -> FoldedPlan:
        layers, rest = self.finished(choice)
        different = {id(done): done for _, done, _ in (*layers, rest)}
        records = {key: describe(self.whole, self.region.joint, done) for key, done in different.items()}
        kinds: dict[Any, list[int]] = {}
        for layer, (chosen, done, _) in enumerate(layers):
            traced = self.fold.traced(layer)
            key = self._rows(records[id(done)], traced), self._again(chosen, traced)
            kinds.setdefault(key, []).append(layer)
        found = tuple(LayerKind(tuple(members), rows, again) for (rows, again), members in kinds.items())
        record = records[id(rest[1])]
        others = LayerKind((), self._rows(record, None), self._again(rest[0], None))
        return FoldedPlan(self._plan(layers, rest), self.carry_out(choice), self.default, found, others, record.notes)

    def _rows(self, record: Record, layer: int | None) -> tuple[SiteRow, ...]:
        """The rows of one traced layer, without what tells it from others."""
        rows = []
        for row in record.sites:
            owner, path = self.stack.place(row.module)
            if owner == layer:
                own = tuple(self.stack.place(p)[1] for p in row.parameters)
                rows.append(replace(row, name="", module=path, reason="", source="", parameters=own))
        return tuple(rows)

    def _again(self, choice: Choice, layer: int | None) -> tuple[str, ...]:
        nodes = {n.name: n for n in self.region.joint.gm.graph.nodes}
        again = [nodes[name] for name in sorted(choice.setting.again) if self.place[name][0] == layer]
        return tuple(sorted(self.stack.place(module_path(n))[1] for n in again))

    def _plan(self, layers: Sequence[tuple[Choice, RegionState, Block]], rest: tuple[Choice, RegionState, Block]) -> Plan:
        """The plan of the deep model, with all its layers spelled out."""
        parts = [(None, rest), *enumerate(layers)]
        decisions, storages, again = [], [], []
        for layer, (choice, done, _) in parts:
            traced = None if layer is None else self.fold.traced(layer)

            def name(node: str, layer: int | None = layer) -> str:
                return self._deep_names(node, layer)[0] if node in self.place else f"{node}@{layer}"

            for s in done.plan.storages:
                if self._layer_in(done, s.root) == traced:
                    moved = tuple(map(name, s.crossing))
                    storages.append(replace(s, node=name(s.node), crossing=moved, root=name(s.root)))
            for d in done.plan.decisions:
                if self.place[d.site][0] == traced:
                    matmuls = tuple(map(name, d.matmuls))
                    paths = tuple(self.stack.moved(p, layer) if layer is not None else p for p in d.parameters)
                    decisions.append(replace(d, site=name(d.site), matmuls=matmuls, parameters=paths))
            again += [name(n) for n in sorted(choice.setting.again) if self.place[n][0] == traced]
        return Plan(tuple(decisions), tuple(storages), tuple(again))

    def _layer_in(self, done: RegionState, name: str) -> int | None:
        if name in self.place:
            return self.place[name][0]
        node = next(n for n in done.cuts.final.forward.graph.nodes if n.name == name)
        return self.stack.place(module_path(node))[0]


@dataclass(frozen=True)
class FoldedSetting:
    """A cut of the deep model that was not looked at yet. layers, rest: see `FoldedRegion.settings`."""

    setting: Setting
    layers: list[Setting]
    rest: Setting

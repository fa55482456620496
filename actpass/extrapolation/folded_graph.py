"""A partitioned deep model, put together from those of a traced one: what it saves, and what it takes over a step."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from actpass.analysis.partitioned import PartitionedGraph, Saved
from actpass.extrapolation.fsdp import KernelEvent
from actpass.extrapolation.layer_map import Fold
from actpass.extrapolation.layer_names import Names, Stack
from actpass.extrapolation.unroll import Key, Layered, Unrolled, unroll
from actpass.ir.joint_graph import tensor_bytes
from actpass.ir.outputs import output_values
from actpass.memory.footprint import Footprint, step_peak
from actpass.memory.liveness import read as read_kernels
from actpass.memory.program import Timeline
from actpass.passes.partition import returned
from actpass.torch_compat import invoke_subgraph


class Block:
    """A cut of the traced model, to take layers from. before: the cut before what crosses it was coded."""

    def __init__(self, cut: PartitionedGraph, before: PartitionedGraph, outputs: int, stack: Stack, names: Names) -> None:
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
        """As `PartitionedGraph.footprint`."""
        kept = self._sum(lambda b: b.by_layer(lambda s: 0 if s.user_visible else s.nbytes))
        return self.rest.cut.footprint_of(self.timelines, kept, self.returned_bytes)

    @cached_property
    def returned_bytes(self) -> int:
        """As `PartitionedGraph.returned_bytes`."""
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
    def moments(self) -> tuple[list[KernelEvent], list[KernelEvent]]:
        """Layer by layer, as under FSDP, where a layer's hooks let no kernel of another one come between."""
        forward, backward = (self._moments(u) for u in self.unrolled)
        return forward, [replace(m, level=m.level + self.returned_bytes) for m in backward]

    def _moments(self, unrolled: Unrolled) -> list[KernelEvent]:
        program = unrolled.program
        found: list[KernelEvent] = []
        for kernel, level in zip(program.kernels, program.run(program.kernels, {}).levels, strict=True):
            left = [w for w in kernel.writes if w in program.outputs]
            gradients: Counter[int | None] = Counter()
            for w in left:
                gradients[w.layer] += program.bytes[w]
            found.append(KernelEvent(unrolled.layer_of[kernel], level, tuple(gradients.items())))
        return found

"""The kernels of a deep model, put together from those of a few traced layers (`actpass.extrapolation.layer_map`): what it
takes in memory is then found as for any graph, with the order of its kernels chosen anew for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from actpass.extrapolation.layer_map import Fold
from actpass.memory.kernel import Kernel
from actpass.memory.program import Program, in_order

Key = tuple[Any, ...]
"""What a tensor is in its layer: the same for all layers that are alike, however they were cut. Its module's path first."""


@dataclass(eq=False, slots=True)
class Copy:
    """One layer's copy of a tensor. layer: None for what lies in no layer. label: its name and the module that it is made in,
    alike for all copies."""

    name: str
    op: str
    meta: dict[str, Any]
    layer: int | None
    label: str


@dataclass(frozen=True)
class Layered:
    """A traced graph's kernels, and where each of its tensors lies: in which traced layer (None: in none), and as which."""

    program: Program
    place: Mapping[fx.Node, tuple[int | None, Key]]

    @cached_property
    def running(self) -> dict[Kernel, int | None]:
        """The layer that runs when a kernel does: its own, unless it stands apart from most of that (a mask that the first
        layer makes is made again where the last one needs it) or has none; None before all layers."""
        layer_of = {k: self.place[k.node][0] for k in self.program.kernels}
        positions: dict[int, list[int]] = {}
        for kernel, layer in layer_of.items():
            if layer is not None:
                positions.setdefault(layer, []).append(kernel.position)
        middle = {layer: statistics.median(found) for layer, found in positions.items()}
        running: dict[Kernel, int | None] = {}
        last: int | None = None
        for kernel in sorted(self.program.kernels, key=lambda k: k.position):
            layer = layer_of[kernel]
            if layer is not None and not _is_apart(kernel.position, layer, middle):
                last = layer
            running[kernel] = last
        return running

    @cached_property
    def moment(self) -> dict[Kernel, float]:
        """How far the layer has got that runs when a kernel does, from 0 to 1: alike for graphs that differ in length."""
        span: dict[int | None, list[int]] = {}
        for kernel, layer in self.running.items():
            span.setdefault(layer, []).append(kernel.position)
        ends = {layer: (min(found), max(found)) for layer, found in span.items()}
        return {k: (k.position - ends[u][0]) / max(ends[u][1] - ends[u][0], 1) for k, u in self.running.items()}


def _is_apart(position: int, layer: int, middle: Mapping[int, float]) -> bool:
    """Whether the middle of another layer lies between ``position`` and that of its own."""
    low, high = sorted((float(position), middle[layer]))
    return any(low < m < high for m in middle.values())


@dataclass(frozen=True)
class Unrolled:
    """program: of the deep model. layer_of: the layer of each of its kernels."""

    program: Program
    layer_of: dict[Kernel, int | None]


def unroll(fold: Fold, block_of: Sequence[Layered], rest: Layered, *, downwards: bool) -> Unrolled:
    """block_of: for each layer of the deep model, the graph whose traced layer it is a copy of: those layers are alike in form.
    rest: the graph of what lies in no layer. downwards: whether the last layer runs first (a backward)."""
    return _Unrolling(fold, downwards, block_of).run(rest)


_Placed = tuple[tuple[int, float, int], int | None, Kernel]
"""What kernels are sorted by, the layer, the kernel."""


@dataclass
class _Unrolling:
    fold: Fold
    downwards: bool
    blocks: Sequence[Layered]
    copies: dict[tuple[int | None, Key], Copy] = field(default_factory=dict[tuple[int | None, Key], Copy])
    kernels: list[_Placed] = field(default_factory=list[_Placed])
    nbytes: dict[Copy, int] = field(default_factory=dict[Copy, int])
    believed: dict[Copy, int] = field(default_factory=dict[Copy, int])
    freed: dict[Copy, None] = field(default_factory=dict[Copy, None])
    outputs: set[Copy] = field(default_factory=set[Copy])
    inlined: dict[Copy, dict[Copy, None]] = field(default_factory=dict[Copy, dict[Copy, None]])

    def run(self, rest: Layered) -> Unrolled:
        self._add(rest, None, None)
        for layer, graph in enumerate(self.blocks):
            self._add(graph, self.fold.traced(layer), layer)
        self.kernels.sort(key=lambda item: item[0])
        known = {*self.freed, *self.believed, *(w for _, _, k in self.kernels for w in k.writes)}
        for position, (_, _, kernel) in enumerate(self.kernels):
            kernel.position = position
            kernel.reads = [r for r in kernel.reads if r in known]  # where layers of two forms meet
        kernels = in_order([k for _, _, k in self.kernels])
        program = Program(kernels, self.nbytes, self.believed, list(self.freed), self.outputs, self.inlined)
        return Unrolled(program, {k: layer for _, layer, k in self.kernels})

    def _add(self, graph: Layered, traced: int | None, layer: int | None) -> None:
        """Copy what lies in the layer ``traced`` of ``graph``, as ``layer``."""
        program, place = graph.program, graph.place

        def copies(node: fx.Node) -> list[Copy]:
            owner, key = place[node]
            if owner is None:
                return [self._copy(node, None, key)]
            return [self._copy(node, where, key) for where in self.fold.seen_from(layer, owner)]

        def each(nodes: Sequence[fx.Node]) -> list[Copy]:
            return list(dict.fromkeys(c for n in nodes for c in copies(n)))

        for kernel in program.kernels:
            if place[kernel.node][0] == traced:
                self.kernels.append((self._slot(graph, kernel, layer), layer, self._kernel(kernel, each, program)))
        for node in program.freed:
            if place[node][0] == traced:
                self.freed |= dict.fromkeys(copies(node)[:1])
                self._note(program, node, copies(node)[:1])
        for node, believed in program.believed.items():
            if place[node][0] == traced:
                self.believed |= dict.fromkeys(copies(node)[:1], believed)
                self._note(program, node, copies(node)[:1])
        self.outputs |= {c for n in program.outputs if n in place and place[n][0] == traced for c in copies(n)[:1]}

    def _kernel(self, kernel: Kernel, each: Callable[[Sequence[fx.Node]], list[Copy]], program: Program) -> Kernel:
        copy = Kernel(each([kernel.node])[0], 0, kernel.loops, kernel.scratch)
        copy.writes, copy.reads, copy.members = each(kernel.writes), each(kernel.reads), each(kernel.members)
        copy.size, copy.unwritten, copy.zeroed = kernel.size, kernel.unwritten, each(kernel.zeroed)
        copy.allocates, copy.traffic, copy.kernels = kernel.allocates, kernel.traffic, kernel.kernels
        for node in dict.fromkeys((*kernel.writes, *kernel.members)):
            made = each([node])
            self._note(program, node, made)
            self.inlined |= {c: dict.fromkeys(each(list(program.inlined[node]))) for c in made}
            self.outputs |= set(made) if node in program.outputs else set()
        return copy

    def _note(self, program: Program, node: fx.Node, copies: Sequence[Copy]) -> None:
        self.nbytes |= dict.fromkeys(copies, program.bytes[node])

    def _copy(self, node: fx.Node, layer: int | None, key: Key) -> Copy:
        found = self.copies.get((layer, key))
        if found is None:
            label = f"{str(node.target).removesuffix('.default')} in {key[0] or 'no module'}"
            name = node.name if layer is None else f"{node.name}@{layer}"
            found = self.copies[layer, key] = Copy(name, node.op, node.meta, layer, label)
        return found

    def _slot(self, graph: Layered, kernel: Kernel, layer: int | None) -> tuple[int, float, int]:
        """Where a kernel stands in the order of the graph: among those of the layer that runs then, be it its own or not. If
        that layer has another form here, it is not known when it needs the kernel: it comes last, and earlier if it is read.
        """
        running = graph.running[kernel]
        if running is None:
            known = layer is None or self.blocks[self._turn(0)] is graph
            turn = -1
        else:
            where = self.fold.seen_from(layer, running)[0 if self.downwards else -1]
            known = where == layer or self.blocks[where] is graph
            turn = self._turn(where)
        if known:
            return turn, graph.moment[kernel], kernel.position
        return self.fold.layers if layer is None else self._turn(layer), 1.0, kernel.position

    def _turn(self, layer: int) -> int:
        """When ``layer`` runs (or which layer runs at that turn), from 0."""
        return self.fold.layers - 1 - layer if self.downwards else layer

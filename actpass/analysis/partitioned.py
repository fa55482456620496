"""A partitioned joint graph: what crosses it, and what its forward and backward take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from actpass.analysis.linearity import Uses
from actpass.ir.op_queries import FOR_CODES
from actpass.memory.footprint import Footprint, step_peak
from actpass.memory.liveness import timeline
from actpass.memory.program import Timeline


@dataclass(frozen=True, slots=True)
class PartitionConstraints:
    """How to cut.

    recompute_materialized: lift upstream's rule that a value which a backward matmul materialises is never recomputed. The
    rule is the only reason why weight-gradient operands (norm outputs, activation products) are saved; without it they are
    rebuilt from a neighbour by pointwise operators: no extra matmul, no attention, exact. And lift the rule that a value is
    not recomputed whose readers lie on both sides of a matmul ("used far apart"): with dropout in front of an adapter the
    input of a layer is read by the layer and, behind it, by the dropout, and no norm or activation function would be rebuilt
    (2.13 and 2.15).
    recompute: forward nodes (matmuls, fused attentions) that the backward may run again, where that saves bytes. must_save:
    nodes that are stored, whatever the bytes. stock: upstream's own ``activation_memory_budget``; None: the user's. part:
    whether the graph stands for a part of a deeper one in which something runs again: upstream cuts all of that in another way.
    """

    recompute_materialized: bool
    recompute: frozenset[str] = frozenset()
    must_save: frozenset[str] = frozenset()
    stock: float | None = None
    part: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that crosses from forward to backward.

    name: the node that crosses. base: the node that allocated its storage. holder: the node whose memory is kept alive: the
    root, or the tensor itself where it is a part that is computed on its own. nbytes: bytes of that memory, 0 if another
    crossing tensor shows it and was counted. user_visible: whether the caller holds the storage as well.
    """

    name: str
    base: str
    holder: str
    nbytes: int
    user_visible: bool


@dataclass(frozen=True)
class PartitionedGraph:
    """A partitioned joint graph. saved: what crosses, parameters and inputs excluded (the seeds count).
    kept_input_bytes: inputs that another region computed and that the backward reads. seeds: nodes of the step's seed
    and of that of learned bases, if there are any.
    arrives: input of the backward -> the memory that it shows, for all that the backward frees behind its last use: what
    crosses, and tangents. returned_bytes: what the caller holds while the backward runs. passed_bytes: of gradients of inputs
    that another region computed. tangent_bytes: of gradients that the backward is given."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[Saved, ...]
    kept_input_bytes: int
    seeds: tuple[str, ...]
    arrives: Mapping[str, str]
    returned_bytes: int
    passed_bytes: int
    tangent_bytes: int

    @property
    def saved_bytes(self) -> int:
        return sum(s.nbytes for s in self.saved)

    @cached_property
    def crossing(self) -> Mapping[str, tuple[Saved, ...]]:
        """By the node that allocated it, what of a memory crosses."""
        found: dict[str, tuple[Saved, ...]] = {}
        for s in self.saved:
            found[s.base] = (*found.get(s.base, ()), s)
        return found

    @cached_property
    def arrived(self) -> Mapping[str, fx.Node]:
        """The inputs of the backward, by name."""
        return {n.name: n for n in self.backward.graph.find_nodes(op="placeholder")}

    @cached_property
    def timelines(self) -> tuple[Timeline, Timeline]:
        """Live bytes over the forward and over the backward, see `actpass.memory.liveness`."""
        return timeline(self.forward), timeline(self.backward, self.arrives)

    @cached_property
    def casts(self) -> Mapping[str, tuple[str, ...]]:
        """By node of the backward that reads a tensor to cast it for weight gradients, the parameters that these are of."""
        return {n.name: n.meta[FOR_CODES] for n in self.backward.graph.nodes if FOR_CODES in n.meta}

    @cached_property
    def uses(self) -> Uses:
        """What the backward does with what crosses."""
        return Uses(self.backward.graph)

    @property
    def footprint(self) -> Footprint:
        """What a forward and its backward take above what is there before them (parameters, optimizer state, inputs)."""
        kept = sum(s.nbytes for s in self.saved if not s.user_visible)
        return self.footprint_of(self.timelines, kept, self.returned_bytes)

    def footprint_of(self, timelines: tuple[Timeline, Timeline], kept: int, returned: int) -> Footprint:
        """That of a region whose caller gets and gives what that of this one does."""
        forward, backward = timelines
        return Footprint(
            forward=forward.peak,
            backward=backward.peak + returned,
            kept=kept,
            returned=returned,
            gradients=backward.kept - self.passed_bytes,
            passed=self.passed_bytes,
            tangents=self.tangent_bytes,
        )

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of a step that consists of this region."""
        return step_peak([self.footprint])

    @property
    def largest_at_peak(self) -> tuple[tuple[str, int], ...]:
        """(node, bytes) of what is in use at the predicted peak, the largest first."""
        forward, backward = self.timelines
        return (forward if forward.peak > backward.peak + self.returned_bytes else backward).live

    @property
    def roots(self) -> frozenset[str]:
        return frozenset(s.base for s in self.saved)


@dataclass(frozen=True)
class PartitionStages:
    """The cuts of one region: Inductor's default, the one with everything exact, the one after the contractions were rewritten,
    and that with what crosses it in its stored form."""

    default: PartitionedGraph
    exact: PartitionedGraph
    final: PartitionedGraph
    swapped: PartitionedGraph

"""What a pass is, and what it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import fx

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph, PartitionStages
from actpass.analysis.weight_gradients import WeightGradientMatmul, WeightGradientMatmuls
from actpass.ir.copying import copy_module
from actpass.ir.joint_graph import Joint
from actpass.ir.outputs import output_values
from actpass.options import Config
from actpass.plan import Decision, Plan, SavedTensor, Storage

NOTHING_FOUND, NOTHING_PLANNED = WeightGradientMatmuls((), ()), Plan()
INDUCTORS_OWN = PartitionConstraints(recompute_materialized=False)


@dataclass(frozen=True)
class Lift:
    """A weight gradient that is formed of coefficients and a basis: what it was, and what was decided on it."""

    factor: fx.Node
    basis: fx.Node
    contraction: WeightGradientMatmul
    decision: Decision


class PlanSource(Protocol):
    """Who decides, pass by pass: a search, or a plan that is given. is_given: all that it says must be possible."""

    @property
    def is_given(self) -> bool: ...

    def decide_gradients(self) -> tuple[Decision, ...]:
        """Which weight gradients are formed through projections."""
        ...

    def is_factored(self, parameter: str) -> bool:
        """Whether the gradient of ``parameter`` stays in its factors, if it can."""
        ...

    def decide_decoded(self, state: RegionState) -> tuple[tuple[Decision, ...], Mapping[str, SavedTensor]]:
        """Which tensors that cross the cut are stored as projections, and those tensors by node."""
        ...

    def decide_storages(self, state: RegionState) -> tuple[tuple[Storage, ...], tuple[str, ...]]:
        """In which form all that crosses the cut is stored, and notes."""
        ...


class Pass(Protocol):
    """One step from a joint graph to what Inductor compiles. A frozen value: its fields are its options.

    name: of the pass and of its stage. serves: what is given up (all passes that serve it are undone) where the graph does not
    allow it and no plan is given; None: the whole region is.
    """

    @property
    def name(self) -> str: ...

    @property
    def serves(self) -> str | None: ...

    def run(self, state: RegionState) -> RegionState:
        """The next state. The graphs of ``state`` stay as they are. Raises `GraphUnsupported` where the graph does not allow
        it."""
        ...

    def check(self, before: RegionState, after: RegionState) -> None:
        """Raises `AssertionError` for what must hold whatever the graph, and `GraphUnsupported` where upstream's partitioner
        chose otherwise than the plan."""
        ...


@dataclass(frozen=True)
class GraphPass:
    """A pass for which the whole region is given up, and that leaves what the graph takes and how much it returns as it is."""

    name: str
    serves: str | None = None

    def check(self, before: RegionState, after: RegionState) -> None:
        inputs, outputs = zip(*(_interface(s.joint.gm.graph) for s in (before, after)), strict=True)
        if inputs[0] != inputs[1] or outputs[0] != outputs[1]:
            raise AssertionError(f"{self.name} changed what the joint graph takes or returns")


def _interface(graph: fx.Graph) -> tuple[list[str], int]:
    return [n.name for n in graph.find_nodes(op="placeholder")], len(output_values(graph))


@dataclass(frozen=True)
class Stage:
    """What a pass made. graphs: by kind: the joint graph, or forward and backward. seconds: that run and check took."""

    name: str
    graphs: Mapping[str, fx.GraphModule]
    seconds: float = 0.0


@dataclass(frozen=True)
class Chunked:
    """A head in pieces. logits_bytes: of the tensor that is no longer formed. pieces: how many. rows: of a piece, the last may
    have fewer."""

    logits_bytes: int
    pieces: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class RegionState:
    """A region between two passes.

    joint: its joint graph as it is now. joint_inputs, kwargs: what the partitioner is given beside it. default: Inductor's own
    cut. default_bytes: what that saves. loss_rows: rows of a piece of the loss; True: as many as suit; 0: it stays whole.
    chunked: the pieces that it is in. why_whole: why it is not.
    finding: the weight gradients that may be projected. source: who decides. constraints: how to cut. reasons: by node, why it
    is recomputed, where a policy says. exact: the cut with all
    exact. cut: where the graph is cut now. uncoded: that cut before anything was stored in fewer bits. plan: what was decided
    so far. decoded: the tensors that are stored as projections, by node. inserted: nodes of passes. payloads: a projected
    decision -> node of its z; one of codes -> node of these. scales: one of codes -> node of their scale. sketches: nodes that
    are returned for learned subspaces. lifts: a weight gradient as it is formed now -> what it is formed of; without those that
    something is added to in the same matmul, and none once they are formed in batches. notes: what the user should know. off:
    what was given up, and why. stages: what each pass made.
    """

    joint: Joint
    joint_inputs: Sequence[object]
    kwargs: Mapping[str, Any]
    config: Config
    default: PartitionedGraph | None = None
    default_bytes: int = 0
    loss_rows: int | bool = False
    chunked: Chunked | None = None
    why_whole: str | None = None
    finding: WeightGradientMatmuls = NOTHING_FOUND
    source: PlanSource | None = None
    constraints: PartitionConstraints = INDUCTORS_OWN
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])
    exact: PartitionedGraph | None = None
    cut: PartitionedGraph | None = None
    uncoded: PartitionedGraph | None = None
    plan: Plan = NOTHING_PLANNED
    decoded: Mapping[str, SavedTensor] = field(default_factory=dict[str, SavedTensor])
    inserted: frozenset[fx.Node] = frozenset()
    payloads: Mapping[Decision, str] = field(default_factory=dict[Decision, str])
    scales: Mapping[Decision, str] = field(default_factory=dict[Decision, str])
    sketches: frozenset[fx.Node] = frozenset()
    lifts: Mapping[fx.Node, Lift] = field(default_factory=dict[fx.Node, Lift])
    notes: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()

    @property
    def decides(self) -> PlanSource:
        assert self.source is not None, "nothing is decided yet"
        return self.source

    @property
    def partitioned(self) -> PartitionedGraph:
        assert self.cut is not None, "the region is not cut yet"
        return self.cut

    @property
    def cuts(self) -> PartitionStages:
        """Where the region was and is cut."""
        assert self.default is not None, "nothing is to be compared with"
        assert self.exact is not None, "where to cut is not decided yet"
        return PartitionStages(self.default, self.exact, self.uncoded or self.partitioned, self.partitioned)

    @property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """Those that the last pass made."""
        if self.cut is None:
            return {"joint": self.joint.gm}
        return {"forward": self.cut.forward, "backward": self.cut.backward}

    @property
    def count(self) -> int:
        """How many of the joint graph's outputs are the forward's."""
        return self.joint.num_fwd_outputs

    def with_graph(self, gm: fx.GraphModule) -> RegionState:
        """With ``gm`` for its joint graph."""
        joint = self.joint
        return replace(self, joint=Joint(gm, joint.inputs, joint.num_fwd_outputs, joint.static))

    def on_a_copy(self) -> RegionState:
        """With a copy of its joint graph, to be edited."""
        gm, now = copy_module(self.joint.gm, same_names=True)
        return replace(
            self.with_graph(gm),
            inserted=frozenset(now[n] for n in self.inserted),
            sketches=frozenset(now[n] for n in self.sketches),
            lifts={now[n]: replace(lift, factor=now[lift.factor], basis=now[lift.basis]) for n, lift in self.lifts.items()},
        )

"""What is in memory over a step, and at its peak, in words."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from actpass.analysis.partitioned import PartitionedGraph
from actpass.analysis.saved_tensors import EARLY_GRADIENT
from actpass.ir.joint_graph import Joint, is_tangent, module_path, storage_root, tensor_bytes
from actpass.ir.outputs import output_values
from actpass.memory.memory_curve import Curve, Curves, Held, Lifetime, Lifetimes, thin
from actpass.memory.program import Life, Timeline
from actpass.plan import Plan
from actpass.torch_compat import invoke_subgraph

_LARGEST = 3
_LEAST_SHARE = 1 / 4096
"""Of a region's peak: the lifetimes of smaller tensors are not recorded."""


def curve_of(cut: PartitionedGraph) -> Curve:
    """The live bytes of a region that is cut so; the maxima are those of ``cut.footprint``."""
    forward, backward = cut.timelines
    footprint = cut.footprint
    behind = [level + cut.returned_bytes for level in backward.levels]
    return Curve(thin(forward.levels), thin(behind), footprint.held, footprint.gradients, footprint.passed, footprint.tangents)


def curves_of(
    default: PartitionedGraph, final: PartitionedGraph, joint: Joint, plan: Plan, kind_of: Callable[[fx.Node], str]
) -> Curves:
    """The curves of Inductor's default and of the plan. joint: the graph that was planned. kind_of: the kind of a tensor of the
    forward, from its node."""
    words = _Words(final, joint, plan, kind_of)
    forward, backward = final.timelines
    at_forward = [words.in_forward(words.forward[name], nbytes) for name, nbytes in forward.live]
    at_backward = [words.in_backward(words.backward[name], nbytes) for name, nbytes in backward.live]
    return Curves(
        plan=curve_of(final),
        default=curve_of(default),
        at_forward_peak=_largest(at_forward),
        at_backward_peak=_largest([*at_backward, *words.returned]),
        lifetimes=_lifetimes(words),
    )


def _lifetimes(words: _Words) -> Lifetimes:
    """A tensor that crosses is one, from the forward into the backward; what is returned is there until the backward ends."""
    forward, backward = words.cut.timelines
    between, end = len(forward.levels), len(forward.levels) + len(backward.levels)
    least = max(int(_LEAST_SHARE * words.cut.peak_bytes), 1)
    stays = {n.name for n in words.gradients}
    arriving = {words.root_of(words.cut.arrives[x.node]): x for x in backward.lives if x.node in words.cut.arrives}
    joined: set[str] = set()
    found: list[Lifetime] = []

    def until(life: Life) -> int | None:
        return between + life.end if life.end is not None else None if life.node in stays else end

    def add(node: fx.Node, held: Held, start: int, last: int | None) -> None:
        op = _operator(node)
        found.append(Lifetime(what=held.what, module=held.module, op=op, nbytes=held.nbytes, start=start, end=last))

    for life in forward.lives:
        later, last = arriving.get(life.node), life.end
        if last is None and later is not None and later.nbytes == life.nbytes:
            joined.add(later.node)
            last = until(later)
        elif last is None:
            last = end if later is None else between
        if life.nbytes >= least:
            node = words.forward[life.node]
            add(node, words.in_forward(node, life.nbytes), life.start, last)
    for life in backward.lives:
        if life.nbytes >= least and life.node not in joined:
            node = words.backward[life.node]
            add(node, words.in_backward(node, life.nbytes), between + life.start, until(life))
    return Lifetimes(
        forward_steps=between,
        backward_steps=end - between,
        forward_peak=_highest(forward),
        backward_peak=between + _highest(backward),
        least_bytes=least,
        tensors=tuple(found),
    )


def _operator(node: fx.Node) -> str:
    """The operator that makes ``node``, as torch writes it; empty for an input."""
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "call_function" else ""


def _highest(timeline: Timeline) -> int:
    return max(range(len(timeline.levels)), key=timeline.levels.__getitem__, default=0)


def _largest(found: list[Held]) -> tuple[Held, ...]:
    return tuple(sorted(found, key=lambda h: -h.nbytes)[:_LARGEST])


@dataclass(frozen=True)
class _Words:
    """Words for the nodes of a partitioned pair of graphs."""

    cut: PartitionedGraph
    joint: Joint
    plan: Plan
    kind_of: Callable[[fx.Node], str]

    @cached_property
    def forward(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.cut.forward.graph.nodes}

    @cached_property
    def backward(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.cut.backward.graph.nodes}

    @cached_property
    def codes(self) -> Mapping[str, tuple[str, fx.Node]]:
        """What crosses in few bits, by the name that crosses -> (codec, the tensor)."""
        coded = {s.node: s.codec for s in self.plan.coded}
        planned = {n.name for n in self.joint.gm.graph.nodes}
        found: dict[str, tuple[str, fx.Node]] = {}
        for saved in self.cut.saved:
            call = _call(self.forward[saved.name])
            if call is not None and saved.name not in planned:
                tensor = next((a for a in call.all_input_nodes if a.op != "get_attr"), call)
                while tensor.name not in coded and tensor.all_input_nodes:
                    tensor = tensor.all_input_nodes[0]
                if tensor.name in coded:
                    found[saved.name] = coded[tensor.name], tensor
        return found

    @cached_property
    def early(self) -> frozenset[str]:
        """Gradients that the forward forms together with the loss."""
        return frozenset(s.base for s in self.plan.storages if s.reason == EARLY_GRADIENT)

    @cached_property
    def gradients(self) -> dict[fx.Node, str]:
        """What the backward returns for a parameter -> the parameter's path."""
        path = self.joint.parameter_path
        pairs = zip(self.joint.primals, output_values(self.cut.backward.graph), strict=False)
        return {storage_root(o): path[p] for p, o in pairs if p in path and isinstance(o, fx.Node)}

    @cached_property
    def of_tangents(self) -> frozenset[fx.Node]:
        """What the backward computes from a gradient."""
        reached: set[fx.Node] = set()
        for node in self.cut.backward.graph.nodes:
            starts = is_tangent(node) or (
                node.op == "placeholder" and self.root_of(self.saved_for_backward(node)) in self.early
            )
            if starts or any(a in reached for a in node.all_input_nodes):
                reached.add(node)
        return frozenset(reached)

    @cached_property
    def returned(self) -> list[Held]:
        """What the caller holds while the backward runs."""
        outputs = output_values(self.cut.forward.graph)[: self.joint.num_fwd_outputs]
        roots = dict.fromkeys(storage_root(o) for o in outputs if isinstance(o, fx.Node))
        made = [n for n in roots if n.op == "call_function"]
        return [Held(f"returned {self.kind_of(n)}", _module(n), tensor_bytes(n)) for n in made]

    def saved_for_backward(self, node: fx.Node) -> str:
        """The forward's name of what arrives in the backward as ``node``."""
        return self.cut.arrives.get(node.name, node.name)

    def root_of(self, name: str) -> str | None:
        """What allocated the memory of the forward's node ``name``, if it has one."""
        return storage_root(self.forward[name]).name if name in self.forward else None

    def in_forward(self, node: fx.Node, nbytes: int) -> Held:
        if node.name in self.codes:
            codec, tensor = self.codes[node.name]
            return Held(f"{self.kind_of(tensor)} in {codec}", _module(tensor), nbytes)
        if node.name in self.early or _call(node) is not None:
            return Held("gradient formed with the loss", _module(node), nbytes)
        return Held(self.kind_of(node), _module(node), nbytes)

    def in_backward(self, node: fx.Node, nbytes: int) -> Held:
        if node in self.gradients:
            return Held("gradient of", self.gradients[node], nbytes)
        if node.op == "placeholder" and self.saved_for_backward(node) in self.forward:
            return self.in_forward(self.forward[self.saved_for_backward(node)], nbytes)
        code = self._decoded(node)
        if code is not None:
            _, tensor = self.codes[code]
            return Held(f"decoded {self.kind_of(tensor)}", _module(tensor), nbytes)
        if node in self.of_tangents:
            return Held("gradient in", _module(node), nbytes)
        return Held(f"recomputed {self.kind_of(node)}", _module(node), nbytes)

    def _decoded(self, node: fx.Node) -> str | None:
        """The codes that ``node`` was decoded from by a function of their own."""
        call = _call(node)
        arrived = map(self.saved_for_backward, call.all_input_nodes) if call is not None else ()
        return next((name for name in arrived if name in self.codes), None)


def _call(node: fx.Node) -> fx.Node | None:
    """The call of a shared function of which ``node`` is a result: an encoder, a decoder, a piece of the loss."""
    call = next(iter(node.all_input_nodes), None)
    return call if call is not None and call.target is invoke_subgraph else None


def _module(node: fx.Node) -> str:
    """Its module, or that of what it is made from: a sum of gradients has none of its own."""
    near = [node, *node.all_input_nodes, *node.users]
    return next((path for n in near if (path := module_path(n))), "")

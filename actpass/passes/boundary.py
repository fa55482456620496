"""Replace what crosses a cut: the forward returns something else, the backward forms the tensor of it before its first use.

Works on copies of the two graphs that upstream's partitioner made. Only what is saved is touched: the forward's own outputs
read nothing that is inserted, which `check_outputs` proves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from actpass.analysis.partitioned import PartitionedGraph, Saved
from actpass.ir.copying import copy_module
from actpass.ir.editor import GraphEditor
from actpass.ir.joint_graph import tensor_bytes, value
from actpass.ir.outputs import output_descriptions, output_values, set_output_values
from actpass.ir.traversal import ancestors


class Boundary:
    """Edits both graphs of ``cut``. before, behind: the nodes of the forward and of the backward by name."""

    def __init__(self, cut: PartitionedGraph, num_fwd_outputs: int) -> None:
        forward, to_forward = copy_module(cut.forward)
        backward, to_backward = copy_module(cut.backward)
        self.forward, self.backward = GraphEditor(forward), GraphEditor(backward)
        self.before = {old.name: new for old, new in to_forward.items()}
        self.behind = {old.name: new for old, new in to_backward.items()}
        self._cut, self._num_fwd_outputs = cut, num_fwd_outputs
        self._returned: dict[str, tuple[fx.Node, ...]] = {}
        self._saved: dict[str, list[fx.Node]] = {}
        self._arrived: dict[str, str] = {}

    def send(self, crossing: Sequence[str], nodes: Sequence[fx.Node], free: fx.Node | None = None) -> list[fx.Node]:
        """Let ``nodes`` of the forward cross in place of the views ``crossing`` of one tensor; returns what arrives. free: an
        input of the region, which costs no memory."""
        first, arrived = self.behind[crossing[0]], list[fx.Node]()
        meta = {k: v for k, v in first.meta.items() if k not in ("val", "tensor_meta")}
        for node in nodes:
            with self.backward.graph.inserting_before(first):
                arrived.append(self.backward.graph.placeholder(node.name))
            arrived[-1].meta = {**meta, "val": value(node)}
        self._returned |= dict.fromkeys(crossing, ()) | {crossing[0]: tuple(nodes)}
        self._saved[crossing[0]] = [n for n in nodes if n is not free]
        self._arrived |= {new.name: n.name for new, n in zip(arrived, nodes, strict=True) if n is not free}
        return arrived

    def first_reader(self, crossing: Sequence[str]) -> fx.Node:
        return min(user for name in crossing for user in self.behind[name].users)

    def show(self, crossing: Sequence[str], x: fx.Node, formed: fx.Node) -> None:
        """Let the backward read ``formed`` where it read the views ``crossing`` of ``x``."""
        for name in crossing:
            self.behind[name].replace_all_uses_with(self.backward.views(self.before[name], x, formed))
            self.backward.graph.erase_node(self.behind[name])

    def close(self) -> PartitionedGraph:
        """The cut as it is now."""
        graph, count = self.forward.graph, self._num_fwd_outputs
        outputs, descriptions = output_values(graph), output_descriptions(graph)
        descriptions = descriptions or [None] * len(outputs)
        new, described = outputs[:count], descriptions[:count]
        for node, description in zip(outputs[count:], descriptions[count:], strict=True):
            mine = self._returned.get(node.name, (node,)) if isinstance(node, fx.Node) else (node,)
            new.extend(mine)
            described.extend(description for _ in mine)
        set_output_values(graph, new, described)
        self.forward.module.recompile()
        self.backward.module.recompile()
        saved = (c for s in self._cut.saved for c in (self._codes(s.name) if s.name in self._returned else [s]))
        arrives = {k: v for k, v in self._cut.arrives.items() if k not in self._returned} | self._arrived
        return replace(
            self._cut, forward=self.forward.module, backward=self.backward.module, saved=tuple(saved), arrives=arrives
        )

    def _codes(self, name: str) -> list[Saved]:
        return [Saved(c.name, c.name, c.name, tensor_bytes(c), user_visible=False) for c in self._saved.get(name, ())]


def check_outputs(
    before: PartitionedGraph, after: PartitionedGraph, inserted: Iterable[fx.Node], sketches: frozenset[fx.Node], count: int
) -> None:
    """The first ``count`` outputs of the forward, but the ``sketches``, are the same nodes and read nothing ``inserted``.
    Raises `AssertionError` otherwise: a bug."""
    now, was = (output_values(c.forward.graph)[:count] for c in (after, before))
    own = [(new, old) for new, old in zip(now, was, strict=True) if new not in sketches]
    touched = ancestors(new for new, _ in own if isinstance(new, fx.Node)).intersection(inserted)
    if touched or any(str(new) != str(old) for new, old in own):
        raise AssertionError("what is stored in another form reached an output of the forward")

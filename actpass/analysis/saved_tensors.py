"""The tensors that cross a cut, as things that can be stored in another form: what shows one memory, what the backward does
with it, and what stands in the way of storing it in few bits."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.analysis.error_propagation import ErrorPropagation, Read, opaque_users
from actpass.analysis.linearity import consumers
from actpass.analysis.partitioned import PartitionedGraph, Saved
from actpass.analysis.rematerialization import Recomputation, attention_behind
from actpass.ir.joint_graph import Joint, module_path, rule_of, storage_root, tensor_bytes, value
from actpass.ir.op_queries import is_attention, is_matmul, is_pointwise, is_reduction
from actpass.ir.products import is_sum_in_place
from actpass.plan import EXPONENTIAL, RECOMPUTED_SCORE, Role, SavedTensor
from actpass.torch_compat import invoke_subgraph, size_hint

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HUGE = 1e8
"""Numbers in a model's code beyond this are masks, but for the bounds of clamps, which nothing comes near."""
_CLAMPS = {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}
EARLY_GRADIENT = "a gradient, formed in the forward with the loss"


def find_saved(
    cut: PartitionedGraph,
    joint: Joint,
    contractions: Mapping[str, tuple[str, ...]],
    min_tensor_bytes: int,
    recomputation: Recomputation | None = None,
) -> list[SavedTensor]:
    """Every memory that crosses ``cut`` but the seeds', in the order of the forward's outputs.

    contractions: weight-gradient matmul -> paths of the weights. min_tensor_bytes: bytes below which a tensor stays as it is.
    recomputation: of ``joint``, if it shall be said what could be run again.
    """
    by_holder: dict[str, list[Saved]] = {}
    for s in (s for s in cut.saved if s.base not in cut.seeds):
        by_holder.setdefault(s.holder, []).append(s)
    reading = _Reading(cut, joint, contractions, min_tensor_bytes, recomputation)
    return [reading.tensor(holder, members) for holder, members in by_holder.items()]


class _Reading:
    def __init__(
        self,
        cut: PartitionedGraph,
        joint: Joint,
        contractions: Mapping[str, tuple[str, ...]],
        min_tensor_bytes: int,
        recomputation: Recomputation | None,
    ) -> None:
        self.contractions, self.min_tensor_bytes, self.recomputation = contractions, min_tensor_bytes, recomputation
        self.joint = {n.name: n for n in joint.gm.graph.nodes}
        self.available = {self.joint[name] for s in cut.saved for name in (s.name, s.base) if name in self.joint}
        self.forward = {n.name: n for n in cut.forward.graph.nodes}
        self.backward = cut.arrived
        self.uses, self.readers = cut.uses, ErrorPropagation(cut.backward.graph)
        self.learned = self._reach({n.name for n in joint.parameter_path})
        self.scores = Scores.of(joint)
        drawn = {n.name for n in joint.gm.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())}
        self.given = self._reach(self.scores.data | drawn)
        self.infinite = self._infinite()
        self.masked = self._masked()

    def _reach(self, start: Set[str]) -> set[str]:
        reached = set(start)
        for node in self.forward.values():
            if any(a.name in reached for a in node.all_input_nodes):
                reached.add(node.name)
        return reached

    def _infinite(self) -> set[str]:
        """Values that an infinite or huge number in the code may have reached: masks, whatever operator writes them."""
        reached: set[str] = set()
        for node in self.forward.values():
            numbers = pytree.tree_leaves((node.args, dict(node.kwargs)))
            literal = node.target not in _CLAMPS and any(map(_is_huge, numbers))
            tainted = literal or any(a.name in reached for a in node.all_input_nodes)
            if tainted and not rule_of(node).bounded and not is_attention(node) and not is_reduction(node):
                reached.add(node.name)
        return reached

    def tensor(self, holder: str, members: list[Saved]) -> SavedTensor:
        names = tuple(m.name for m in members)
        node = self.forward[names[0] if len(names) == 1 else holder]
        arrived = [self.backward[n] for n in names if n in self.backward]
        read = [self.uses.of(n, self.contractions) for n in arrived]
        root = self.forward[members[0].base]
        weights = [path for n in arrived for user, _ in consumers(n) for path in self.contractions.get(user.name, ())]
        reads = [found for n in arrived for found in self.readers.attention_reads(n, self.learned)]
        kinds = {
            *(u.kind for uses, _ in read for u in uses),
            *self._exponential(arrived),
            *(kind for kind, _, _ in reads if kind),
        }
        obstacle = self._obstacle(node, members)
        is_small = obstacle is None and tensor_bytes(node) < self.min_tensor_bytes
        recompute, of_factors = self._again(root, members, exponential=EXPONENTIAL in kinds) if obstacle is None else ((), ())
        factors = self._missing_factors(of_factors[0], self.available) if of_factors else []
        attention, role = self._attention(root, reads)
        return SavedTensor(
            node=node.name,
            saved_for_backward=names,
            base=root.name,
            nbytes=sum(m.nbytes for m in members),
            kinds=tuple(sorted(kinds)),
            linear=bool(read) and all(linear for _, linear in read),
            paths=tuple(dict.fromkeys((module_path(root), *weights))),
            obstacle=f"smaller than {self.min_tensor_bytes} bytes" if is_small else obstacle,
            recompute=tuple(n.name for n in recompute),
            recompute_flops=self._flops(recompute),
            of_factors=tuple(n.name for n in of_factors),
            of_factors_flops=self._flops(of_factors),
            factors=sum(size_hint(value(a).numel()) for a in factors),
            attention=attention,
            role=role,
            elements=size_hint(value(node).numel()),
            shape=tuple(size_hint(s) for s in value(node).shape),
            dtype=str(value(node).dtype).removeprefix("torch."),
            joins=(_is_touched_by_a_loop(root), all(map(is_read_by_loops, arrived))) if is_on_gpu(node) else None,
        )

    def _exponential(self, arrived: list[fx.Node]) -> set[str]:
        return set() if self.readers.exponentiated.isdisjoint(arrived) else {EXPONENTIAL}

    def _again(self, root: fx.Node, members: list[Saved], *, exponential: bool) -> _Rerun:
        """What is run again to rebuild ``root`` from what else crosses; and from its own factors, if it is the product of two
        activations that a softmax exponentiates: attention that is not fused."""
        if self.recomputation is None or root.name not in self.joint or root.name in self.recomputation.anchors:
            return (), ()
        own, node = {self.joint[name] for m in members for name in (m.name, m.base)}, self.joint[root.name]
        others = self.available - own
        made = None if exponential else self.recomputation.producers(node, others)
        scores = self.recomputation.scores_behind(node) if made is None else None
        softmax = self.recomputation.softmax_of(scores) if scores is not None else ()
        if scores is None or not softmax:
            return made or (), ()
        behind = [self.recomputation.producers(a, others) for a in self._missing_factors(scores, others)]
        return (*(n for found in behind for n in found or ()), *softmax) if behind and all(behind) else (), softmax

    def _missing_factors(self, scores: fx.Node, available: set[fx.Node]) -> list[fx.Node]:
        return [a for a in scores.all_input_nodes if not {a, storage_root(a)} & available]

    def _flops(self, nodes: tuple[fx.Node, ...]) -> int:
        return self.recomputation.flops(nodes) if self.recomputation else 0

    def _attention(self, root: fx.Node, reads: list[Read]) -> tuple[str | None, Role | None]:
        """The fused attention whose q, k, v or output the tensor is, if its backward reads the logsumexp of the forward."""
        if root.target is operator.getitem and is_attention(root.all_input_nodes[0]):
            return root.all_input_nodes[0].name, "output"
        roles: dict[str, Role] = {}
        for kind, role, statistic in reads:
            behind = attention_behind(self.forward[statistic.name]) if statistic and statistic.name in self.forward else None
            if behind is not None and kind != RECOMPUTED_SCORE and roles.get(behind.name) != "score":
                roles[behind.name] = role
        return next(iter(roles.items()), (None, None))

    def _obstacle(self, node: fx.Node, members: list[Saved]) -> str | None:
        val = value(node)
        if val.dtype not in _FLOATS:
            return f"{str(val.dtype).removeprefix('torch.')}: only floating point has a low-bit form"
        if any(m.user_visible for m in members):
            return "also returned to the caller, who keeps it alive"
        if node.name not in self.learned:
            return "depends on no parameter: a mask, a table or an input's statistics"
        if node.name not in self.given:
            return "derives from parameters alone"
        if _is_early_gradient(node):
            return EARLY_GRADIENT
        if _is_statistic(node):
            return "a statistic of each row"
        if node.name in self.infinite or node.name in self.masked:
            return "may hold the -inf of a mask"
        foreign = sorted({u for m in members for u in opaque_users(self.backward.get(m.name))})
        if foreign:
            return f"read by {foreign[0]}, which is not one of torch's own operators"
        fragile = next((op for m in members if (op := self.readers.ill_conditioned_use(self.backward.get(m.name)))), None)
        if fragile is not None:
            return f"read by {fragile}, which a small error can throw far off"
        if len(members) > 1 and any(not self._is_shown_by(node, self.forward[m.name]) for m in members):
            return "its views depend on sizes that only the forward knows"
        return None

    def _is_shown_by(self, node: fx.Node, view: fx.Node) -> bool:
        """Whether ``view`` is reached from ``node`` by views whose arguments are plain numbers."""
        while view is not node:
            if len(view.all_input_nodes) != 1:
                return False
            view = view.all_input_nodes[0]
        return True

    def _masked(self) -> set[str]:
        """Values into which a mask may have written -inf: a choice between tensors, or attention scores to which a tensor was
        added that no parameter enters; and what pointwise operators make of such values, but for exp, whose exp(-inf) is an
        ordinary zero."""
        reached: set[str] = set()
        for node in self.forward.values():
            sources = [a for a in node.all_input_nodes if a.name in self.learned]
            passes = is_pointwise(node) and node.target is not aten.exp.default
            if self._writes_a_mask(node, sources) or (passes and any(a.name in reached for a in sources)):
                reached.add(node.name)
        return reached

    def _writes_a_mask(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether ``node`` itself may write -inf. sources: those of its inputs that a parameter enters."""
        row = rule_of(node)
        if row.chooses:
            filled = [a for a in node.all_input_nodes[1:] if a.name not in self.learned]
            if not all(map(_is_constant, filled)):
                return True
        added = [a for a in node.all_input_nodes if a not in sources]
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and added and any(map(self.scores.behind, sources)):
            return True
        return row.matmul is not None and row.matmul.addend is not None and node.args[row.matmul.addend] in added


@dataclass(frozen=True)
class Scores:
    """Which values are, but for pointwise operators, products of two activations. data: the names of activations."""

    data: frozenset[str]

    @classmethod
    def of(cls, joint: Joint) -> Scores:
        return cls(frozenset(n.name for n in joint.activations))

    def behind(self, node: fx.Node, passes: Callable[[fx.Node], bool] = is_pointwise) -> bool:
        """Whether such a product is behind ``node``, through operators that ``passes``."""
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if is_matmul(current) and sum(a.name in self.data for a in current.all_input_nodes) > 1:
                return True
            if passes(current):
                new = [a for a in current.all_input_nodes if a not in seen]
                seen.update(new)
                todo.extend(new)
        return False


def is_on_gpu(node: fx.Node) -> bool:
    return value(node).device.type == "cuda"


def is_read_by_loops(tensor: fx.Node) -> bool:
    """Whether all that reads ``tensor`` are loops, which can decode it for themselves; a library's kernel can't."""
    return all(is_pointwise(user) or is_reduction(user) for user, _ in consumers(tensor))


def _is_touched_by_a_loop(node: fx.Node) -> bool:
    """Whether a loop makes or reads ``node``, and so can make codes of it, too."""
    return is_pointwise(node) or is_reduction(node) or any(is_pointwise(u) or is_reduction(u) for u, _ in consumers(node))


def _is_early_gradient(node: fx.Node) -> bool:
    """Whether ``node`` came out of a piece of the loss (`actpass.passes.chunked_loss`), perhaps joined or scaled since."""
    while node.target is not operator.getitem:
        if node.target is not aten.cat.default and not (is_pointwise(node) and len(node.all_input_nodes) == 1):
            return False
        node = node.all_input_nodes[0]
    source = node.all_input_nodes[0]
    return source.target is invoke_subgraph or is_sum_in_place(source)


def _is_statistic(node: fx.Node) -> bool:
    """Whether ``node`` holds one number for each row of something larger: a reduction, or pointwise operators behind one; any
    output of fused attention but the first."""
    val = value(node)
    if val.dim() > 0 and size_hint(val.shape[-1]) == 1:
        return True
    while is_pointwise(node):
        count = size_hint(val.numel())
        inputs = [a for a in node.all_input_nodes if tensor_bytes(a) and size_hint(value(a).numel()) == count]
        if len(inputs) != 1:
            return False
        node = inputs[0]
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return is_reduction(source) or (is_attention(source) and bool(node.args[1] != 0))
    return is_reduction(node)


_Rerun = tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]
"""What is run again from all else that crosses, and from the factors of a product (`SavedTensor.of_factors`)."""


def _is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is one number written in the code; a huge one makes a mask of all that it reaches (`_infinite`)."""
    return rule_of(node).fill is not None


def _is_huge(argument: object) -> bool:
    return isinstance(argument, float) and (math.isinf(argument) or abs(argument) >= _HUGE)

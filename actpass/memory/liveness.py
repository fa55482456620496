"""Live bytes while a partitioned graph runs, as Inductor will run it: what is fused, in which order, what is overwritten.

The model, after torch/_inductor (scheduler.py, memory.py, graph.py; torch 2.13 and 2.15):

- Matmuls, fused attention and whatever has no loop form are kernels of their own and read from memory. Pointwise operators
  and copies are loops, inlined into each loop that reads them; such a value is in memory only if it is an output, if what is
  no loop reads it (then from there on: loops before compute it for themselves), or if it is long. What a reduction yields is
  in memory, and random numbers are, unless all that reads them is fused with them. A sum at indices (the gradient of an
  embedding) is a loop over its values: what they are computed from stays while the sum is allocated. The zeros that it starts
  from are written by another, which can run at any time before.
- Some loops are one kernel (`actpass.memory.fusion`): its results are allocated together, and its inputs freed behind all of
  them. On a CPU so are all loops between two kernels that are none: one C++ function. There a loop over all elements, in the
  order in which they lie, is not fused with a sum of rows.
- Of several orders (the graph's, least memory first, breadth first, depth first) the one with the least peak runs.
- A result takes over the memory of an input of the same size whose last and only reader it is. Memory that is free again
  stays allocated for a later result of its size, if its operator does not make its own, as long as what Inductor takes for the
  peak (which knows of no memory that is taken over) does not rise; under a budget memory does not stay (`allow_buffer_reuse`).
- A saved tensor and a tangent are freed behind their last reader; outputs stay.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.ir.joint_graph import is_view, rule_of, storage_root, tensor_bytes, value
from actpass.ir.op_queries import factors_of, is_cast, is_pointwise, is_reduced_by_row, is_reduction
from actpass.memory.fusion import Fusion
from actpass.memory.kernel import Kernel
from actpass.memory.program import Program, Timeline, in_order
from actpass.torch_compat import (
    inductor_config,
    invoke_subgraph,
    loop_limits,
    needs_fallback_due_to_atomic_add_limitations,
    size_hint,
)

aten = torch.ops.aten

_INTO_MEMORY = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, invoke_subgraph)
"""Operators without a loop form that write where they are told; all others make memory for their results."""
_READS_AGAIN, _LENGTH_WITH_CHOICES = 4, 8
"""A loop that is read more than once is written to memory if it reads more than this, or computes more with choices in it."""
_RESIDENT = ("primals_", "arg", "fwd_rng_state", "bwd_rng_state", "tangents")
"""Inputs whose names begin so are resident to Inductor."""


def timeline(gm: fx.GraphModule, freed: Mapping[str, str] | None = None) -> Timeline:
    """The live bytes of ``gm``. freed: inputs that count and are freed behind their last reader (a backward's saved tensors
    and tangents), by name -> the memory that they show, of which several may show one; all other inputs are resident."""
    return read(gm, freed).timeline()


def read(gm: fx.GraphModule, freed: Mapping[str, str] | None = None) -> Program:
    """What `timeline` runs."""
    return _Reading(gm, freed or {}).program


class _Reading:
    """Finds the kernels of one graph. The names are those of `Program`, which is made of them."""

    def __init__(self, gm: fx.GraphModule, freed: Mapping[str, str]) -> None:
        self.gm = gm
        self.called: dict[str, Timeline] = {}
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.outputs = {storage_root(o) for o in pytree.tree_leaves(self.nodes[-1].args[0]) if isinstance(o, fx.Node)}
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        shown: dict[str, fx.Node] = {}
        self.shows = {n: shown.setdefault(freed[n.name], n) for n in inputs if n.name in freed}
        self.bytes = Counter({n: tensor_bytes(n) for n in self.nodes})
        for node, first in self.shows.items():
            if node is not first:
                self.bytes[first] += self.bytes.pop(node)
        self.freed = list(shown.values())
        self.limits = {on_cpu: loop_limits(on_cpu=on_cpu) for on_cpu in (False, True)}
        self.users = {n: _users(n) for n in self.nodes if not is_view(n)}
        self.sums = {n: product for n in self.nodes if (product := _product_in(n, self.users)) is not None}
        self.stored, self.inlined = self._inline()
        self.bytes |= {n: _padded_bytes(n) for n in self.stored if n.op == "call_function" and self._is_loop(n)}
        last = {r: n for n in self.nodes if n in self.stored for r in self.inlined[n]}
        self.believed = {n: _believed(n, last.get(n)) for n in inputs if not n.name.startswith(_RESIDENT)}
        kernels = self._fused(self._kernels())
        by_element = {n: self._copied_by(n) if _scatters(n) else read for n, read in self.inlined.items()}
        self.program = Program(kernels, self.bytes, self.believed, self.freed, self.outputs, by_element)

    def _inline(self) -> tuple[dict[fx.Node, int], dict[fx.Node, dict[fx.Node, None]]]:
        """The nodes whose values are in memory -> the position from which on; and for every node what its value is computed
        from in memory (an ordered set)."""
        stored: dict[fx.Node, int] = {}
        read: dict[fx.Node, dict[fx.Node, None]] = {}
        loop: dict[fx.Node, set[fx.Node]] = {}  # the operators that compute it from there
        for node in self.nodes:
            inputs: dict[fx.Node, None] = {}
            operators = {node}
            for a in node.all_input_nodes:
                root = storage_root(a)
                root = self.shows.get(root, root)
                if stored.get(root, len(self.nodes)) <= self.position[node] or root.op != "call_function":
                    inputs |= {root: None}
                else:
                    inputs |= read[root]
                    operators |= loop[root]
            read[node] = {n: None for n in inputs if n.op != "get_attr"}
            loop[node] = operators
            users = self.users.get(node)
            if users is None or node.op != "call_function":
                continue
            if node in self.sums.values():  # computed in the kernel of the sum
                continue
            count, length = len(read[node]), len(operators) + len(read[node])
            several = len(users) > 1
            dear = any(map(_is_heavy, operators)) or self._is_long(operators)
            again = (several and count > _READS_AGAIN) or (dear and (several or self._is_spread(node)))
            written = rule_of(node).realised == "buffer"
            yields_memory = is_reduction(node) or _scatters(node) or node.target is operator.getitem or written
            is_value = self._is_loop(node) and not yields_memory
            needed = node in self.outputs or any(self._reads_memory(u, node) for u in users)
            most_reads, most_operators = self.limits[_makes_one_on_cpu(node)]
            at_once = again or count > most_reads or length > most_operators
            if not is_value or at_once or (needed and self._is_stored_at_once(node, read)):
                stored[node] = self.position[node]
            elif needed:
                stored[node] = min(self.position[u] for u in users if self._reads_memory(u, node))
        return stored, read

    def _is_stored_at_once(self, node: fx.Node, read: Mapping[fx.Node, Mapping[fx.Node, None]]) -> bool:
        """Whether a value that is needed in memory is there before what needs it is reached; what reads it until then computes
        it for itself. What a matmul adds to its product gets there where the matmul runs."""
        if len(node.users) < 2:
            return False
        reads = sum(_elements(r) > 1 for r in read[node])
        return any(u.op == "output" or u.target is aten.mm.default for u in node.users) or (
            reads > 1 and any(not is_view(u) and u not in self.sums and self._reads_memory(u, node) for u in node.users)
        )

    def _is_loop(self, node: fx.Node) -> bool:
        return _is_loop(node) and node not in self.sums

    def _is_spread(self, node: fx.Node) -> bool:
        """Whether an element of ``node`` is read for several of what reads it: a key for several queries, a row's scale for
        all of the row."""
        read = [u for u in node.users if isinstance(u.meta.get("val"), torch.Tensor) and (is_view(u) or is_pointwise(u))]
        return any(_elements(u) > _elements(node) or (is_view(u) and self._is_spread(u)) for u in read)

    def _is_long(self, operators: set[fx.Node]) -> bool:
        """Whether a loop takes many instructions: a concatenation makes a choice and a masked read of each of its inputs."""
        return any(o.target is aten.cat.default for o in operators) and len(operators) > _LENGTH_WITH_CHOICES

    def _reads_memory(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` reads ``node`` from memory: it is no loop, and does more than to write into a copy of it."""
        if self._is_loop(user):
            return False
        copied = user.args[0] if rule_of(user).writes else None
        return any(storage_root(a) is node for a in user.all_input_nodes if a is not copied) or user.op == "output"

    def _kernels(self) -> list[Kernel]:
        kernels: dict[fx.Node, Kernel] = {}
        flat = self._flat()
        for node in sorted(self.stored, key=lambda n: (self.stored[n], self.position[n])):
            owner = node
            while owner.target is operator.getitem:
                owner = owner.all_input_nodes[0]
            if owner not in kernels:
                kernels[owner] = Kernel(owner, self.stored[owner], self._loops(owner))
                kernels[owner].scratch = _scratch(owner)
                kernels[owner].flat = owner in flat
                called = self._call(owner)
                if called is not None:
                    kernels[owner].scratch, kernels[owner].traffic = called.peak, called.traffic
                    kernels[owner].kernels = called.kernels
                kernels[owner].reads = [r for r in self.inlined[owner] if isinstance(r.meta.get("val"), torch.Tensor)]
                kernels[owner].allocates = kernels[owner].loops is None and owner.target not in _INTO_MEMORY
            if self.bytes[node]:
                kernels[owner].writes.append(node)
                if _scatters(node) and not self._read_by(node.all_input_nodes[0]):
                    kernels[owner].zeroed.append(node)
        return list(kernels.values())

    def _read_by(self, node: fx.Node) -> dict[fx.Node, None]:
        """What a loop that reads ``node`` reads from memory."""
        root = storage_root(node)
        root = self.shows.get(root, root)
        return {root: None} if root in self.stored or root.op != "call_function" else self.inlined[root]

    def _copied_by(self, scattered: fx.Node) -> dict[fx.Node, None]:
        """What ``scattered`` copies, to write onto the copy: in place, if its values and indices are not computed from it."""
        base, *others = scattered.all_input_nodes
        copied = self._read_by(base)
        return {} if any(r in copied for other in others for r in self._read_by(other)) else copied

    def _loops(self, node: fx.Node) -> tuple[int, int] | None:
        """How many elements a loop runs over, and how many of them each of its sums takes, if it sums columns (0: it does
        not); None for what is no loop."""
        if not self._is_loop(node):
            return None
        taken = 0
        writes = rule_of(node).writes
        if writes is not None and _scatters(node):
            values = node.args[writes[1]]
            node = values if isinstance(values, fx.Node) else node
        elif is_reduction(node) and node.all_input_nodes:
            source = node.all_input_nodes[0]
            if not is_reduced_by_row(node):
                taken = _elements(source) // max(_elements(node), 1)
            node = source
        return _elements(node), taken

    def _flat(self) -> set[fx.Node]:
        """What a CPU computes in one loop over all elements: all that it reads from memory are numbers, and tensors as large
        as it is, in the same order."""
        flat: set[fx.Node] = set()
        for node in self.nodes:
            val, row = node.meta.get("val"), rule_of(node)
            makes_all = is_pointwise(node) or row.fill is not None or row.realised == "buffer"
            if not self._is_loop(node) or not makes_all or not isinstance(val, torch.Tensor) or val.device.type != "cpu":
                continue
            if _is_in_order(val) and all(self._is_read_in_order(a, node, flat) for a in node.all_input_nodes):
                flat.add(node)
        return flat

    def _is_read_in_order(self, source: fx.Node, reader: fx.Node, flat: set[fx.Node]) -> bool:
        if _elements(source) <= 1:
            return True
        while is_view(source) and rule_of(source).moves in ("reshape", "copy") and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if is_view(source) or _elements(source) != _elements(reader):
            return False
        in_memory = source in self.stored or source.op != "call_function"
        return _is_in_order(value(source)) if in_memory else source in flat

    def _call(self, node: fx.Node) -> Timeline | None:
        """That of the graph that ``node`` calls."""
        if node.target is not invoke_subgraph or not isinstance(node.args[0], fx.Node):
            return None
        name = str(node.args[0].target)
        if name not in self.called:  # many layers call one function
            self.called[name] = timeline(getattr(self.gm, name))
        return self.called[name]

    def _fused(self, kernels: list[Kernel]) -> list[Kernel]:
        """``kernels`` with those made one that run as one, in the order in which Inductor has them then."""
        fusion = Fusion(kernels, self.bytes, self.believed, self.outputs)
        fused = [_joint(group) for group in fusion.run()]
        read = {r for kernel in fused for r in kernel.reads}
        for kernel in fused:
            if kernel.loops is not None:
                kernel.members = sorted(kernel.writes, key=self.position.__getitem__)
                written = [w for w in kernel.writes if w in read or w in self.outputs]
                kernel.unwritten = sum(self.bytes[w] for w in kernel.writes) - sum(self.bytes[w] for w in written)
                kernel.writes = written
                kernel.traffic = sum(self.bytes[n] for n in (*kernel.reads, *written))
            kernel.size = sum(self.bytes[w] for w in kernel.writes)
        return in_order(fused) if fusion.gate is None else fused


def _joint(group: Sequence[Kernel]) -> Kernel:
    first = group[0]
    writes = [w for kernel in group for w in kernel.writes]
    reads = dict.fromkeys(r for kernel in group for r in kernel.reads)
    zeroed = [z for kernel in group for z in kernel.zeroed]
    return replace(first, writes=writes, reads=[r for r in reads if r not in writes], zeroed=zeroed)


def _believed(tensor: fx.Node, reader: fx.Node | None) -> int:
    """Bytes that Inductor takes ``tensor`` for: it counts the reads of its last reader, so a scale that is spread over a group
    counts as often. Where that is a copy in another order of dimensions, it counts the indices that tell elements apart: of a
    scale not the last one, if that lies within the group, and of what is repeated for several queries all."""
    if not tensor_bytes(tensor):
        return 0
    own = most = size_hint(value(tensor).numel())
    todo = [tensor]
    while todo:
        current = todo.pop()
        for user in current.users:
            if is_view(user) or is_cast(user) or user.target is aten.clone.default:
                todo.append(user)
                if user.target in (aten.view.default, aten._unsafe_view.default, aten.clone.default):
                    most = max(most, size_hint(value(user).numel()))
            elif _spreads(user, current):
                most = max(most, _elements(user))
    if reader is not None and reader.target is aten.clone.default and value(reader).dim():
        last, count = size_hint(value(reader).shape[-1]), _elements(reader)
        if most > own and most // own % last == 0:
            most = own
        elif count // own < last:
            most = max(most, count)
    return most * value(tensor).element_size()


def _spreads(user: fx.Node, read: fx.Node) -> bool:
    """Whether each number of ``read`` meets several neighbours in ``user``, in loops that run over these and what lies behind
    as one: they find the number by a division, and tell all of their elements apart."""
    if not is_pointwise(user) or not value(read).dim() == value(user).dim() > 0 or size_hint(value(read).shape[-1]) != 1:
        return False
    width = size_hint(value(user).shape[-1])
    views = [value(v) for v in user.users if is_view(v) and isinstance(v.meta.get("val"), torch.Tensor)]
    return width > 1 and any(v.dim() and size_hint(v.shape[-1]) != width for v in views)


def _padded_bytes(node: fx.Node) -> int:
    """Bytes of what a loop writes. On a GPU Inductor pads long rows to whole lines of the cache."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.device.type != "cuda" or not inductor_config.comprehensive_padding:
        return tensor_bytes(node)
    size, stride = val.element_size(), 1
    sizes: tuple[Any, ...] = tuple(val.shape)
    if not tensor_bytes(node) or not all(isinstance(s, int) for s in sizes):
        return tensor_bytes(node)
    line, elements = inductor_config.padding_alignment_bytes // size, 1
    for i in sorted(range(val.dim()), key=lambda i: (val.stride(i), -i)):
        if stride > inductor_config.padding_stride_threshold:
            stride = -(-stride // line) * line
        elements += (sizes[i] - 1) * stride
        stride *= sizes[i]
    return elements * size


def _users(node: fx.Node) -> list[fx.Node]:
    """What reads ``node``, through views."""
    found: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if is_view(user):
                todo.append(user)
            else:
                found[user] = None
    return list(found)


def _is_loop(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_reduction(node.all_input_nodes[0])
    return is_pointwise(node) or is_reduction(node) or rule_of(node).realised in ("loop", "buffer") or _scatters(node)


def _scratch(node: fx.Node) -> int:
    """Of a matmul in fp8 on a CPU: its result, a float32 copy of the first factor, and three copies of the second, in order, in
    float32 and scaled (torch 2.13 to 2.15)."""
    if node.target is not aten._scaled_mm.default or value(node).device.type != "cpu":
        return 0
    left, right = (size_hint(value(a).numel()) for a in factors_of(node))
    return tensor_bytes(node) + 4 * left + 9 * right


def _scatters(node: fx.Node) -> bool:
    """Whether ``node`` is a loop over values that it writes at indices. What has no atomic sum, and all of them where runs must
    repeat, are operators of eager mode."""
    if rule_of(node).realised != "scatter" or torch.are_deterministic_algorithms_enabled():
        return False
    return not needs_fallback_due_to_atomic_add_limitations(value(node).dtype)


def _makes_one_on_cpu(node: fx.Node) -> bool:
    """Whether ``node`` makes one tensor, on a CPU."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.device.type == "cpu"


def _is_in_order(val: torch.Tensor) -> bool:
    """Whether ``val`` is contiguous; asked so that nothing is assumed of symbolic sizes."""
    below = 1
    for size, stride in zip(reversed(val.shape), reversed(val.stride()), strict=True):
        if size_hint(size) != 1 and size_hint(stride) != below:
            return False
        below *= size_hint(size)
    return True


def _elements(node: fx.Node) -> int:
    val = node.meta.get("val")
    return size_hint(val.numel()) if isinstance(val, torch.Tensor) else 0


def _is_heavy(node: fx.Node) -> bool:
    """Whether Inductor writes what ``node`` computes to memory rather than compute it twice: on a CPU only."""
    return rule_of(node).realised == "heavy" and value(node).device.type == "cpu"


def _product_in(node: fx.Node, users: Mapping[fx.Node, list[fx.Node]]) -> fx.Node | None:
    """The matmul that ``node`` adds to something, if Inductor makes one addmm of both."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    products = [a for a in node.args if isinstance(a, fx.Node) and a.target is aten.mm.default and users[a] == [node]]
    others = [a for a in node.args if isinstance(a, fx.Node) and a not in products]
    return products[0] if products and others else None

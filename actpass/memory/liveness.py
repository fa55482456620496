"""Live bytes while a partitioned graph runs, as Inductor will run it: what is fused, in which order, what is overwritten.

The model, after torch/_inductor (scheduler.py, memory.py, graph.py; torch 2.13 and 2.15):

- Matmuls, fused attention and whatever has no loop form are kernels of their own and read from memory. Pointwise operators
  and copies are loops, inlined into each loop that reads them; such a value is in memory only if it is an output, if what is
  no loop reads it (then from there on: loops before compute it for themselves), or if it is long. What a reduction yields is
  in memory. A sum at indices (the gradient of an embedding) is a loop over its values: what they are computed from stays while
  the sum is allocated. The zeros that it starts from are written by another, which can run at any time before.
- Some loops are one kernel (`actpass.memory.fusion`): its results are allocated together, and its inputs freed behind all of
  them. On a CPU so are all loops between two kernels that are none: one C++ function.
- Of several orders (the graph's, least memory first, depth first) the one with the least peak runs.
- A result takes over the memory of an input of the same size whose last and only reader it is. Memory that is free again
  stays allocated for a later result of its size, as long as what Inductor takes for the peak (which knows of no memory that is
  taken over) does not rise; under a budget memory does not stay (`allow_buffer_reuse`).
- A saved tensor and a tangent are freed behind their last reader; outputs stay.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from actpass.ir.joint_graph import is_view, rule_of, storage_root, tensor_bytes, value
from actpass.ir.op_queries import is_cast, is_pointwise, is_reduced_by_row, is_reduction
from actpass.memory.fusion import Fusion, is_on_cpu
from actpass.memory.kernel import Kernel
from actpass.torch_compat import (
    inductor_config,
    invoke_subgraph,
    is_tangent_input,
    needs_fallback_due_to_atomic_add_limitations,
    size_hint,
)

aten = torch.ops.aten

_READS_AGAIN, _READS, _LENGTH = 4, 8, 30
_LENGTH_WITH_CHOICES = 8
"""A loop that reads or computes more than this is written to memory: if it is read more than once, or in any case."""
_RESIDENT = ("primals_", "arg", "fwd_rng_state", "bwd_rng_state", "tangents")
"""Inputs whose names begin so are resident to Inductor."""


@dataclass(frozen=True, slots=True)
class Life:
    """The steps at which a tensor is in memory: from ``start`` until before ``end``; ``end`` None: it stays."""

    node: str
    nbytes: int
    start: int
    end: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Live bytes while each kernel runs, in order. at: the kernel's first node. live: at the peak, (node, bytes), largest
    first. kept: bytes that stay when the graph is done. lives: of every tensor; memory that a later one gets belongs to the
    earlier one until then. At each step they add up to its level, less what a kernel needs beside its results."""

    levels: tuple[int, ...]
    at: tuple[str, ...]
    live: tuple[tuple[str, int], ...]
    kept: int
    lives: tuple[Life, ...]

    @property
    def peak(self) -> int:
        return max(self.levels, default=0)


class Buffer(Protocol):
    """A tensor in memory: a node of a graph, or a copy of one (`actpass.extrapolation.unroll`)."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def meta(self) -> dict[str, Any]: ...


def timeline(gm: fx.GraphModule, freed: Mapping[str, str] | None = None) -> Timeline:
    """The live bytes of ``gm``. freed: inputs that count and are freed behind their last reader (a backward's saved tensors
    and tangents), by name -> the memory that they show, of which several may show one; all other inputs are resident."""
    return read(gm, freed).timeline()


def read(gm: fx.GraphModule, freed: Mapping[str, str] | None = None) -> Program:
    """What `timeline` runs."""
    return _Reading(gm, freed or {}).program


class Program:
    """Kernels in the graph's order, and the memory that they read and write.

    bytes: of every buffer. believed: the inputs that Inductor counts when it chooses an order, a transposed weight among them,
    and how many bytes. freed: the inputs that count. outputs: what stays. inlined: what each element of a result is computed
    from in memory, at its own place.
    """

    def __init__(
        self,
        kernels: list[Kernel],
        nbytes: Mapping[Any, int],
        believed: Mapping[Any, int],
        freed: list[Any],
        outputs: set[Any],
        inlined: Mapping[Any, Mapping[Any, None]],
    ) -> None:
        self.kernels, self.bytes, self.believed, self.freed = kernels, nbytes, believed, freed
        self.outputs, self.inlined = outputs, inlined
        self.readers: dict[Any, list[Kernel]] = defaultdict(list)
        for kernel in kernels:
            for node in kernel.reads:
                self.readers[node].append(kernel)
        self.counted = {*freed, *believed, *(w for k in kernels for w in k.writes)}
        given = {n for n in freed if is_tangent_input(n.meta.get("desc"))}  # freed, but no donation: nothing is written there
        self.owned = {*freed, *(w for k in kernels for w in k.writes)} - outputs - given

    def timeline(self) -> Timeline:
        """Of the orders that Inductor considers, the one that it takes."""
        as_traced: tuple[list[Kernel], dict[Any, int]] = (self.kernels, {})
        orders = [as_traced, _least_memory_first(self), _depth_first(self)]
        return self.run(*min(orders, key=lambda order: max(self.believed_steps(*order), default=0)))

    def _taken(self, kernel: Kernel, dead: Sequence[Any]) -> dict[Any, Any]:
        """Result -> the input in whose memory it is written: of its size, dead behind ``kernel``, and read by nothing but the
        result and what the result is computed from: the first that it reads, and nothing if that never gets to memory. What one
        inner loop hands another has a row's memory of its own."""
        if kernel.loops is None:
            return {}
        written = set(kernel.writes)
        inner = {m for m in kernel.members if m not in written}
        mortal = (set[Any]() if kernel.nested else inner) | {n for n in dead if n not in written and n in self.owned}
        sources: dict[Any, set[Any]] = {}  # of a member: itself and all members that it is computed from
        for m in kernel.members:
            sources[m] = {m}.union(*(sources.get(r, ()) for r in self.inlined[m]))
        taken: dict[Any, Any] = {}
        for node in kernel.writes:
            fits = [r for r in self.inlined[node] if r in mortal and self.bytes[r] == self.bytes[node]]
            alone = [r for r in fits if all(m in sources[node] for m in kernel.members if r in self.inlined[m])]
            chosen = next(iter(alone), None)
            if chosen is not None and chosen not in inner:
                taken[node] = chosen
        return taken

    def _deaths(self, order: Sequence[Kernel]) -> list[list[Any]]:
        """What is dead behind each kernel of ``order``."""
        last = {n: i for i, kernel in enumerate(order) for n in (*kernel.writes, *kernel.reads)}
        deaths: list[list[Any]] = [[] for _ in order]
        for node, i in last.items():
            if node in self.counted and node not in self.outputs:
                deaths[i].append(node)
        return deaths

    def believed_steps(self, order: Sequence[Kernel], zeroed: Mapping[Any, int]) -> list[int]:
        """Live bytes while each kernel runs, as Inductor sees them. zeroed: the step at which a result is filled with zeros,
        where that is before the step of its kernel."""
        steps = self._steps(order, self.believed, {k: k.believed for k in order}, self._deaths(order))
        self._count_zeros(steps, order, zeroed)
        return steps

    def _count_zeros(self, steps: list[int], order: Sequence[Kernel], zeroed: Mapping[Any, int]) -> None:
        for i, kernel in enumerate(order):
            for node in kernel.zeroed:
                for j in range(zeroed.get(node, i), i):
                    steps[j] += self.bytes[node]

    def _steps(
        self, order: Sequence[Kernel], inputs: Mapping[Any, int], needs: Mapping[Kernel, int], deaths: list[list[Any]]
    ) -> list[int]:
        """Live bytes while each kernel runs, if nothing is taken over and what is dead is freed at once."""
        level, steps = sum(inputs.values()), list[int]()
        size = {**{w: self.bytes[w] for k in order for w in k.writes}, **inputs}
        for kernel, dead in zip(order, deaths, strict=True):
            steps.append(level + needs[kernel])
            level += kernel.size - sum(size.get(n, 0) for n in dead)
        return steps

    def run(self, order: Sequence[Kernel], zeroed: Mapping[Any, int]) -> Timeline:
        """The live bytes in that order. zeroed: see `believed_steps`."""
        deaths = self._deaths(order)
        ends = _called_until(order)
        freed: list[list[Any]] = [[] for _ in order]
        for dead, end in zip(deaths, ends, strict=True):
            freed[end] += dead
        steps = self.believed_steps(order, zeroed)
        levels = self._steps(order, {n: self.bytes[n] for n in self.freed}, {k: k.needs for k in order}, freed)
        self._count_zeros(levels, order, zeroed)
        limit = max(steps, default=0)
        free: dict[tuple[torch.dtype, int], list[tuple[int, Any]]] = defaultdict(list)
        passed: set[Any] = set()
        ends_at = {node: i + 1 for i, dead in enumerate(freed) for node in dead}
        for i, kernel in enumerate(order):
            taken = self._taken(kernel, deaths[i])
            passed |= set(taken.values())
            ends_at |= dict.fromkeys(taken.values(), i)
            for node in kernel.writes:
                size = self.bytes[node]
                if node in taken:
                    for j in range(i, ends[i] + 1):
                        levels[j] -= size
                    continue
                reuses = inductor_config.allow_buffer_reuse and node not in zeroed
                since = free[_key(node, self.bytes[node])] if reuses else []
                if since and (since[-1][0] + 1 == i or size + max(steps[since[-1][0] + 1 : i]) <= limit):
                    dead_since, dead = since.pop()
                    ends_at[dead] = i
                    for j in range(dead_since + 1, i):
                        steps[j] += size
                        levels[j] += size
            for node in freed[i]:
                if node not in passed and node.op == "call_function":
                    free[_key(node, self.bytes[node])].append((i, node))
        at = max(range(len(levels)), key=levels.__getitem__, default=0)
        live = self._live(order, freed, at, zeroed)
        return Timeline(
            levels=tuple(levels),
            at=tuple(k.node.name for k in order),
            live=live,
            kept=self._kept(order),
            lives=self._lives(order, zeroed, ends_at),
        )

    def _lives(self, order: Sequence[Kernel], zeroed: Mapping[Any, int], ends_at: Mapping[Any, int]) -> tuple[Life, ...]:
        starts = dict.fromkeys(self.freed, 0)
        starts |= {w: zeroed.get(w, i) if w in k.zeroed else i for i, k in enumerate(order) for w in k.writes}
        return tuple(Life(n.name, self.bytes[n], i, ends_at.get(n)) for n, i in starts.items() if self.bytes[n])

    def _live(
        self, order: Sequence[Kernel], deaths: list[list[Any]], at: int, zeroed: Mapping[Any, int]
    ) -> tuple[tuple[str, int], ...]:
        """(node, bytes) of what is in use while kernel ``at`` runs, the largest first."""
        gone = {n for dead in deaths[:at] for n in dead}
        filled = (z for z, step in zeroed.items() if step <= at)
        made = dict.fromkeys((*self.freed, *(w for k in order[: at + 1] for w in k.writes), *filled))
        live = [(n.name, self.bytes[n]) for n in made if n not in gone and self.bytes[n]]
        return tuple(sorted(live, key=lambda item: (-item[1], item[0])))

    def _kept(self, order: Sequence[Kernel]) -> int:
        made = [*self.freed, *(w for k in order for w in k.writes)]
        return sum(self.bytes[n] for n in made if n in self.outputs)


class _Reading:
    """Finds the kernels of one graph. The names are those of `Program`, which is made of them."""

    def __init__(self, gm: fx.GraphModule, freed: Mapping[str, str]) -> None:
        self.gm = gm
        self.peaks: dict[str, int] = {}
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
        self.users = {n: _users(n) for n in self.nodes if not is_view(n)}
        self.sums = {n: product for n in self.nodes if (product := _product_in(n, self.users)) is not None}
        self.stored, self.inlined = self._inline()
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
            yields_memory = is_reduction(node) or _scatters(node) or node.target is operator.getitem
            is_value = self._is_loop(node) and not yields_memory
            needed = node in self.outputs or any(self._reads_memory(u, node) for u in users)
            at_once = again or count > _READS or length > _LENGTH
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
        for node in sorted(self.stored, key=lambda n: (self.stored[n], self.position[n])):
            owner = node
            while owner.target is operator.getitem:
                owner = owner.all_input_nodes[0]
            if owner not in kernels:
                kernels[owner] = Kernel(owner, self.stored[owner], self._loops(owner), self._scratch(owner))
                kernels[owner].reads = [r for r in self.inlined[owner] if isinstance(r.meta.get("val"), torch.Tensor)]
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

    def _scratch(self, node: fx.Node) -> int:
        if node.target is not invoke_subgraph or not isinstance(node.args[0], fx.Node):
            return 0
        name = str(node.args[0].target)
        if name not in self.peaks:  # many layers call one function
            self.peaks[name] = timeline(getattr(self.gm, name)).peak
        return self.peaks[name]

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
            kernel.size = sum(self.bytes[w] for w in kernel.writes)
        return in_order(fused) if fusion.gate is None else fused


def _joint(group: Sequence[Kernel]) -> Kernel:
    first = group[0]
    writes = [w for kernel in group for w in kernel.writes]
    reads = dict.fromkeys(r for kernel in group for r in kernel.reads)
    zeroed = [z for kernel in group for z in kernel.zeroed]
    return replace(first, writes=writes, reads=[r for r in reads if r not in writes], zeroed=zeroed)


def _called_until(order: Sequence[Kernel]) -> list[int]:
    """For each kernel the last that the same call runs: on a CPU one C++ function is made of all loops between two kernels that
    are none, and what they read is freed behind it."""
    ends = list(range(len(order)))
    for i in reversed(ends[:-1]):
        if all(k.loops is not None and is_on_cpu(k) for k in order[i : i + 2]):
            ends[i] = ends[i + 1]
    return ends


def _key(buffer: Buffer, nbytes: int) -> tuple[torch.dtype, int]:
    """What a later result must share to get the memory of ``buffer``."""
    return buffer.meta["val"].dtype, nbytes


def _believed(tensor: fx.Node, reader: fx.Node | None) -> int:
    """Bytes that Inductor takes ``tensor`` for: it counts the reads of its last reader, so a scale that is spread over a group
    counts as often. Where that is a copy in another order of dimensions, it counts the indices that tell elements apart: of a
    scale not the last one, if that lies within the group, and of what is repeated for several queries all."""
    if not tensor_bytes(tensor):
        return 0
    own = most = size_hint(value(tensor).numel())
    todo = [tensor]
    while todo:
        for user in todo.pop().users:
            if is_view(user) or is_cast(user) or user.target is aten.clone.default:
                todo.append(user)
                if user.target in (aten.view.default, aten._unsafe_view.default, aten.clone.default):
                    most = max(most, size_hint(value(user).numel()))
    if reader is not None and reader.target is aten.clone.default and value(reader).dim():
        last, count = size_hint(value(reader).shape[-1]), _elements(reader)
        if most > own and most // own % last == 0:
            most = own
        elif count // own < last:
            most = max(most, count)
    return most * value(tensor).element_size()


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
    return is_pointwise(node) or is_reduction(node) or rule_of(node).realised == "loop" or _scatters(node)


def _scatters(node: fx.Node) -> bool:
    """Whether ``node`` is a loop over values that it writes at indices. What has no atomic sum, and all of them where runs must
    repeat, are operators of eager mode."""
    if rule_of(node).realised != "scatter" or torch.are_deterministic_algorithms_enabled():
        return False
    return not needs_fallback_due_to_atomic_add_limitations(value(node).dtype)


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


def _sources(kernels: Sequence[Kernel]) -> dict[Kernel, list[Kernel]]:
    """For each kernel those whose results it reads."""
    made: dict[Any, Kernel] = {w: k for k in kernels for w in k.writes}
    return {k: list(dict.fromkeys(made[r] for r in k.reads if r in made)) for k in kernels}


def in_order(kernels: list[Kernel]) -> list[Kernel]:
    """In the graph's order, each as early as what it reads allows. Raises `ValueError` if some read one another in a circle."""
    sources = _sources(kernels)
    done: dict[Kernel, None] = {}
    begun: set[Kernel] = set()
    for kernel in sorted(kernels, key=lambda k: k.position):
        todo = [kernel]
        while todo:
            missing = [s for s in sources[todo[-1]] if s not in done]
            if missing and todo[-1] in begun:
                raise ValueError(f"the kernel of {todo[-1].node.name} and others read one another in a circle")
            if missing:
                begun.add(todo[-1])
                todo.extend(sorted(missing, key=lambda k: -k.position))
            else:
                done[todo.pop()] = None
    return list(done)


def _least_memory_first(reading: Program) -> tuple[list[Kernel], dict[Any, int]]:
    """Of the kernels that can run, the one that raises the peak least, and then the one that leaves the fewest bytes. Returns
    the order, and the step at which each result that starts from zeros is filled with them."""
    kernels, zeros = reading.kernels, _zeros(reading)
    sources = _sources(kernels)
    targets: dict[Kernel, list[Kernel]] = defaultdict(list)
    for kernel, needed in sources.items():
        for s in (*needed, *(zeros[z] for z in kernel.zeroed)):
            targets[s].append(kernel)
    missing = {k: len(s) + len(k.zeroed) for k, s in sources.items()} | dict.fromkeys(zeros.values(), 0)
    left = {n: len(reading.readers[n]) for n in reading.counted}
    mortal = reading.counted - reading.outputs
    frees = {
        k: sum(reading.bytes[r] for r in k.reads if r in mortal and left[r] == 1)
        + sum(reading.bytes[w] for w in k.writes if w in mortal and not left[w])
        for k in kernels
    } | dict.fromkeys(zeros.values(), 0)
    filled = {k: sum(reading.bytes[z] for z in k.zeroed) for k in missing}  # bytes that are there before it runs
    level = sum(reading.believed.values())
    peak = max(level, sum(reading.bytes[n] for n in reading.outputs if n in reading.counted))
    ready = {k: None for k, count in missing.items() if not count}
    order: list[Kernel] = []

    def cost(kernel: Kernel) -> tuple[int, int, int]:
        believed = kernel.believed - filled[kernel]
        return believed if believed > peak - level else 0, kernel.size - filled[kernel] - frees[kernel], kernel.position

    while ready:
        chosen = min(ready, key=cost)
        del ready[chosen]
        order.append(chosen)
        peak = max(peak, level + chosen.believed - filled[chosen])
        level += chosen.size - filled[chosen] - frees[chosen]
        for target in targets[chosen]:
            missing[target] -= 1
            if not missing[target]:
                ready[target] = None
        for read in chosen.reads:
            if read in left:
                left[read] -= 1
                if left[read] == 1 and read in mortal:
                    for reader in reading.readers[read]:
                        frees[reader] += reading.bytes[read]
    return _without_zeros(order, zeros)


def _zeros(reading: Program) -> dict[Any, Kernel]:
    """The loops that fill results with zeros, which need nothing."""
    return {z: Kernel(z, k.position, None, size=reading.bytes[z]) for k in reading.kernels for z in k.zeroed}


def _without_zeros(order: Sequence[Kernel], zeros: Mapping[Any, Kernel]) -> tuple[list[Kernel], dict[Any, int]]:
    """``order`` without the loops ``zeros``, and the step of the rest at which each of them runs."""
    rest: list[Kernel] = []
    steps: dict[Any, int] = {}
    for kernel in order:
        if zeros.get(kernel.node) is kernel:
            steps[kernel.node] = len(rest)
        else:
            rest.append(kernel)
    return rest, steps


def _depth_first(reading: Program) -> tuple[list[Kernel], dict[Any, int]]:
    """What each kernel needs right before it, the lightest first. Returns what `_least_memory_first` does."""
    kernels, zeros = reading.kernels, _zeros(reading)
    sources = {k: [*found, *(zeros[z] for z in k.zeroed)] for k, found in _sources(kernels).items()}
    sources |= {z: [] for z in zeros.values()}
    weight = {k: k.size + sum(reading.bytes[r] for r in k.reads if r in reading.counted) for k in sources}

    def key(kernel: Kernel) -> tuple[int, int]:
        return weight[kernel], kernel.position

    done: dict[Kernel, None] = {}
    for kernel in sorted(sources, key=key):
        todo = [kernel]
        while todo:
            missing = [s for s in sources[todo[-1]] if s not in done]
            if missing:
                todo.extend(sorted(missing, key=key, reverse=True))
            else:
                done[todo.pop()] = None
    return _without_zeros(list(done), zeros)

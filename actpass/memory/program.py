"""Kernels in the order in which Inductor will run them, and the bytes that are live while each does (see
`actpass.memory.liveness`)."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from actpass.memory.fusion import is_on_cpu
from actpass.memory.kernel import Kernel
from actpass.torch_compat import inductor_config, is_tangent_input


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
    earlier one until then. At each step they add up to its level, less what a kernel needs beside its results. traffic: bytes
    that loops read and write; what library operators move is not counted. kernels: how many are launched."""

    levels: tuple[int, ...]
    at: tuple[str, ...]
    live: tuple[tuple[str, int], ...]
    kept: int
    lives: tuple[Life, ...]
    traffic: int
    kernels: int

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
        orders = [as_traced, _least_memory_first(self), _breadth_first(self), _depth_first(self)]
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
                reuses = inductor_config.allow_buffer_reuse and node not in zeroed and not kernel.allocates
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
            traffic=sum(k.traffic for k in order),
            kernels=sum(k.kernels for k in order),
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


def _sources_with_zeros(reading: Program) -> tuple[dict[Kernel, list[Kernel]], dict[Any, Kernel]]:
    """For each kernel, and each loop that fills a result with zeros, those that it needs; and these loops by what they fill."""
    zeros = _zeros(reading)
    sources = {k: [*found, *(zeros[z] for z in k.zeroed)] for k, found in _sources(reading.kernels).items()}
    return sources | {z: [] for z in zeros.values()}, zeros


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


def _breadth_first(reading: Program) -> tuple[list[Kernel], dict[Any, int]]:
    """Of the kernels that can run, the one whose sources ran the earliest, compared in the order in which they did. Returns
    what `_least_memory_first` does."""
    sources, zeros = _sources_with_zeros(reading)
    targets: dict[Kernel, list[Kernel]] = defaultdict(list)
    for kernel, needed in sources.items():
        for source in needed:
            targets[source].append(kernel)
    missing = {k: len(needed) for k, needed in sources.items()}
    places = {k: i for i, k in enumerate(sources)}  # tells apart what stands at one position
    ready: list[tuple[list[int], int, int, Kernel]] = [([], k.position, places[k], k) for k in sources if not missing[k]]
    heapq.heapify(ready)
    done: dict[Kernel, int] = {}
    while ready:
        kernel = heapq.heappop(ready)[-1]
        done[kernel] = len(done)
        for target in targets[kernel]:
            missing[target] -= 1
            if not missing[target]:
                ran = sorted(done[s] for s in sources[target])
                heapq.heappush(ready, (ran, target.position, places[target], target))
    return _without_zeros(list(done), zeros)


def _depth_first(reading: Program) -> tuple[list[Kernel], dict[Any, int]]:
    """What each kernel needs right before it, the lightest first. Returns what `_least_memory_first` does."""
    sources, zeros = _sources_with_zeros(reading)
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

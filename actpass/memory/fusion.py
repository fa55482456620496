"""Which loops Inductor makes one kernel of, after its scheduler (torch/_inductor/scheduler.py, codegen/cpp.py, memory.py; torch
2.13 and 2.15).

Loops over as many elements that read one buffer, or one another, are one kernel, unless something must run between them. Sums
over columns are fused with their like, and on a CPU any reduction with a loop over what it yields that reads it: the sums of a
parameter's gradient over all layers are one kernel with what adds them up, and all that they sum stays until it runs. On a CPU
a loop behind a reduction that it needs ("outer loop") is fused only when nothing else can be, and a loop that goes over all
elements as one is not fused with what goes over rows, but for a single loop beside loops without sums.

The gate (torch 2.15) refuses a fusion that would lift the peak above what it was before any, in the graph's order, by more than
is allowed. A fusion that is refused stays possible, so that on a CPU one refusal keeps all outer loops apart.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from actpass.ir.op_queries import is_reduction
from actpass.memory.kernel import Kernel
from actpass.torch_compat import fusion_gate_limit, inductor_config, size_hint

_NEAR = 64
"""Loops farther apart than this in the graph are fused only if one reads the other."""

Pair = tuple[int, int]


class Fusion:
    """Groups of kernels that run as one, each named by the first of its members. kernels: in the graph's order, none fused.
    nbytes: of every buffer. believed: the inputs that Inductor frees, and what it takes them for. outputs: what stays."""

    def __init__(
        self, kernels: Sequence[Kernel], nbytes: Mapping[Any, int], believed: Mapping[Any, int], outputs: set[Any]
    ) -> None:
        self.kernels = kernels
        source = {w: i for i, k in enumerate(kernels) for w in k.writes}
        self.group = list(range(len(kernels)))  # of each kernel: the first member of its group
        self.groups = list(self.group)  # all that is kept by group below holds for these alone
        self.bits = [1 << i for i in self.group]  # the members of a group
        self.direct = [0] * len(kernels)  # the kernels that read what a group leaves
        self.behind = [0] * len(kernels)  # the kernels that need it, directly or not
        self.ahead = [0] * len(kernels)  # those that it needs
        for i, kernel in enumerate(kernels):
            for read in kernel.reads:
                if read in source:
                    self.direct[source[read]] |= 1 << i
                    self.ahead[i] |= self.ahead[source[read]] | 1 << source[read]
        for i in reversed(self.group):
            self.behind[i] = self.direct[i]
            for j in _members(self.direct[i]):
                self.behind[i] |= self.behind[j]
        self.ends = list(itertools.accumulate(1 if k.writes == [k.node] else 1 + len(k.writes) for k in kernels))
        self.span = [(end, end) for end in self.ends]
        self.reduces = [k.loops is not None and is_reduction(k.node) for k in kernels]
        self.flat = [k.flat for k in kernels]
        self.shapes = [{_shape(k)} for k in kernels]
        self.nested = [False] * len(kernels)  # whether a group has an outer loop around several
        self.shared, self.yielding = self._pairs(nbytes)
        self.enough = inductor_config.score_fusion_memory_threshold
        limit = fusion_gate_limit()
        self.gate = None if limit is None else Gate(self, nbytes, believed, outputs, limit)

    def run(self) -> list[list[Kernel]]:
        """The kernels that run as one, in the graph's order. The first of those in one outer loop is marked `nested`."""
        pairs = sorted(self.shared, key=self._score)
        while True:
            pairs = [(i, j) for i, j in pairs if self.group[i] != self.group[j]]
            merged, refused = self._sweep(pairs, outer=False)
            if not merged and (refused or not self._sweep(pairs, outer=True)[0]):
                break
        groups = self.groups if self.gate is None else [g for g in self.gate.order if g is not None]
        for g in groups:
            self.kernels[g].nested = self.nested[g]
        return [[self.kernels[k] for k in _members(self.bits[g])] for g in groups]

    def _pairs(self, nbytes: Mapping[Any, int]) -> tuple[Counter[Pair], set[Pair]]:
        """Pairs of loops that may run as one -> bytes of the buffers that both touch; and of those the reductions with a loop
        over what they yield."""
        touching: dict[Any, list[int]] = defaultdict(list)
        for i, kernel in enumerate(self.kernels):
            if kernel.loops is not None:
                for node in (*kernel.writes, *kernel.reads):
                    touching[node].append(i)
        shared: Counter[Pair] = Counter()
        yielding: set[Pair] = set()
        for node, users in touching.items():
            for i, j in itertools.combinations(users, 2):
                if self.kernels[i].loops == self.kernels[j].loops:
                    shared[i, j] += nbytes[node]
                elif self._is_reduction_with_reader(i, j):
                    shared[i, j] += nbytes[node]
                    yielding.add((i, j))
        return shared, yielding

    def _is_reduction_with_reader(self, i: int, j: int) -> bool:
        then = self.kernels[j].loops
        if not self.reduces[i] or self.reduces[j] or then is None or not self.direct[i] >> j & 1:
            return False
        yielded = _yielded(self.kernels[i])
        return yielded > 1 and then == (yielded, 0) and is_on_cpu(self.kernels[i])

    def _score(self, pair: Pair) -> tuple[bool, int, int, Pair]:
        i, j = pair
        return self.reduces[i] != self.reduces[j], -self.shared[pair], self.ends[j] - self.ends[i], pair

    def _sweep(self, pairs: Sequence[Pair], *, outer: bool) -> tuple[bool, bool]:
        """Whether a fusion was made, and whether one was refused."""
        merged = refused = False
        for pair in pairs:
            i, j = sorted(self.group[k] for k in pair)
            if i == j or self._is_outer(i, j, pair) != outer or not self._can_fuse(i, j, pair):
                continue
            if self.gate is not None and not self.gate.allows(i, j):
                refused = True
                continue
            self._merge(i, j, outer)
            if self.gate is not None:
                self.gate.fuse()
            merged = True
        return merged, refused

    def _is_outer(self, i: int, j: int, pair: Pair) -> bool:
        """Whether two groups would be run in one outer loop, each with an inner one."""
        if not is_on_cpu(self.kernels[i]):
            return False
        if self.nested[i] or self.nested[j] or pair in self.yielding:
            return True
        first, then = (i, j) if not self.behind[j] & self.bits[i] else (j, i)
        return self.reduces[first] and bool(self.behind[first] & self.bits[then])

    def _can_fuse(self, i: int, j: int, pair: Pair) -> bool:
        (low, high), (start, end) = self.span[i], self.span[j]
        near = max(high - start, end - low) <= _NEAR
        reads = self.direct[i] & self.bits[j] or self.direct[j] & self.bits[i]
        worthwhile = near and self.shared[pair] >= self.enough
        alike = pair in self.yielding or self._in_one_order(i, j)  # what a sum yields is read once a row, outside its loop
        return alike and bool(reads or worthwhile) and not self._between(i, j) and not self._between(j, i)

    def _in_one_order(self, i: int, j: int) -> bool:
        """Whether the loops of two groups go, or can be made to go, over their elements in one way. On a CPU some are flat: one
        loop over all elements, others one over rows and one inside. A flat one becomes the other kind only if it is a single
        kernel still, neither group sums rows, and all results have one shape."""
        if self.flat[i] == self.flat[j]:
            return True
        alone = i if self.flat[i] else j
        single = self.bits[alone] & (self.bits[alone] - 1) == 0
        return single and not (self.reduces[i] or self.reduces[j]) and len(self.shapes[i] | self.shapes[j]) == 1

    def _between(self, i: int, j: int) -> bool:
        """Whether some kernel outside both groups needs ``i`` and is needed by ``j``."""
        return bool(self.behind[i] & self.ahead[j] & ~(self.bits[i] | self.bits[j]))

    def _merge(self, i: int, j: int, outer: bool) -> None:
        members = self.bits[i] | self.bits[j]
        direct = (self.direct[i] | self.direct[j]) & ~members
        behind = (self.behind[i] | self.behind[j]) & ~members
        ahead = (self.ahead[i] | self.ahead[j]) & ~members
        span = min(self.span[i][0], self.span[j][0]), max(self.span[i][1], self.span[j][1])
        reduces, nested = self.reduces[i] or self.reduces[j], self.nested[i] or self.nested[j] or outer
        self.flat[i] = self.flat[i] and self.flat[j]
        self.shapes[i] |= self.shapes[j]
        self.bits[i], self.direct[i], self.behind[i], self.ahead[i] = members, direct, behind, ahead
        self.span[i], self.reduces[i], self.nested[i] = span, reduces, nested
        for k in _members(self.bits[j]):
            self.group[k] = i
        self.groups.remove(j)
        for k in self.groups:
            if self.behind[k] & members:
                self.behind[k] |= behind | members
            elif self.ahead[k] & members:
                self.ahead[k] |= ahead | members


class Gate:
    """Live bytes at each step of ``fusion``'s groups as Inductor counts them, kept up with each fusion.

    order: the group that runs at each step, and None where one went into another. step: of each group. before: live bytes
    before each step. limit: of the peak. made: bytes that a group leaves; unread: of those, what nothing reads. read: what a
    group reads, also what it leaves itself. last: the step that reads it last."""

    def __init__(
        self,
        fusion: Fusion,
        nbytes: Mapping[Any, int],
        believed: Mapping[Any, int],
        outputs: set[Any],
        limit: Callable[[int], int],
    ) -> None:
        self.fusion, self.outputs = fusion, outputs
        made = {w: nbytes[w] for k in fusion.kernels for w in k.writes}
        self.bytes = {**made, **believed}
        self.read: list[list[Any]] = [[r for r in k.reads if r in self.bytes] for k in fusion.kernels]
        self.last = {node: i for i, read in enumerate(self.read) for node in read}
        self.made = [sum(made[w] for w in k.writes) for k in fusion.kernels]
        stays = {*self.last, *outputs}
        self.unread = [sum(made[w] for w in k.writes if w not in stays) for k in fusion.kernels]
        groups = list(range(len(fusion.kernels)))
        self.order: list[int | None] = [*groups]
        self.step = dict(enumerate(groups))
        peak, self.before, _ = self._levels([(g,) for g in groups], 0, len(groups) - 1, sum(believed.values()))
        self.limit = limit(peak)

    def allows(self, i: int, j: int) -> bool:
        """Whether the peak stays within the limit if ``i`` and ``j`` run as one, which is then to be fused as ``i``: first of
        all that runs from the earlier of both to the later, or behind what they need of that."""
        start, end = sorted((self.step[i], self.step[j]))
        rest = [g for g in self.order[start : end + 1] if g is not None and g not in (i, j)]
        region = self._placed(i, j, rest)
        runs = [(i, j) if g == i else (g,) for g in region]
        peak, before, last = self._levels(runs, start, end, self.before[start])
        self.pending = i, j, start, end, region, before, last
        return peak <= self.limit

    def fuse(self) -> None:
        """What `allows` was asked for last."""
        i, j, start, end, region, before, last = self.pending
        self.order[start : end + 1] = [*region, *[None] * (end + 1 - start - len(region))]
        self.before[start : end + 2] = before
        self.last |= last
        self.step |= {g: start + k for k, g in enumerate(region)}
        self.made[i] += self.made[j]
        self.unread[i] += self.unread[j]
        self.read[i] = list(dict.fromkeys((*self.read[i], *self.read[j])))

    def _levels(
        self, runs: Sequence[tuple[int, ...]], start: int, end: int, level: int
    ) -> tuple[int, list[int], dict[Any, int]]:
        """The peak of steps ``start`` to ``end`` if the groups of each of ``runs`` run as one, in this order; the live bytes
        before each of these steps and behind the last; and the last step of what none reads later."""
        last = {r: step for step, run in enumerate(runs, start) for g in run for r in self.read[g] if self.last[r] <= end}
        gone = [sum(self.unread[g] for g in run) for run in runs]
        for node, step in last.items():
            if node not in self.outputs:
                gone[step - start] += self.bytes[node]
        peak, before = level, list[int]()
        for run, freed in zip(runs, gone, strict=True):
            before.append(level)
            level += sum(self.made[g] for g in run)
            peak = max(peak, level)
            level -= freed
        return peak, before + [level] * (end + 2 - start - len(before)), last

    def _placed(self, i: int, j: int, rest: Sequence[int]) -> list[int]:
        """``i``, into which ``j`` goes, and then the others, each behind what it needs of them."""
        bits, direct = self.fusion.bits, self.fusion.direct
        joint, readers = bits[i] | bits[j], direct[i] | direct[j]
        needed = [g for g in sorted(rest) if direct[g] & joint]
        if not needed:
            return [i, *rest]
        done: dict[int, None] = {}
        late = {i}
        waiting: dict[int, list[int]] = defaultdict(list)
        todo = [*reversed(rest), i]
        while todo:
            g = todo.pop()
            if g == i:
                missing = next((n for n in needed if n not in done), None)
            else:
                missing = min((n for n in late if (readers if n == i else direct[n]) & bits[g]), default=None)
            if missing is not None:
                late.add(g)
                waiting[missing].append(g)
            else:
                late.discard(g)
                done[g] = None
                todo.extend(reversed(waiting.pop(g, [])))
        return list(done)


def _members(bits: int) -> list[int]:
    found: list[int] = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found


def _yielded(reduction: Kernel) -> int:
    """Elements of each of its results."""
    first = _first_result(reduction)
    return 0 if first is None else size_hint(first.numel())


def _shape(kernel: Kernel) -> tuple[Any, ...]:
    first = _first_result(kernel)
    return () if first is None else tuple(map(size_hint, first.shape))


def is_on_cpu(kernel: Kernel) -> bool:
    first = _first_result(kernel)
    return first is not None and first.device.type == "cpu"


def _first_result(kernel: Kernel) -> torch.Tensor | None:
    """Of several, as of `var_mean`, the first."""
    val: Any = kernel.node.meta.get("val")
    if isinstance(val, tuple | list) and val:
        val = cast(Sequence[Any], val)[0]
    return val if isinstance(val, torch.Tensor) else None

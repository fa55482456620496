"""Random kernels: `Program` against a plain allocator that holds each block by itself, and against all possible orders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.memory as inductor_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from actpass.memory.kernel import Kernel
from actpass.memory.program import Program, _breadth_first, _depth_first, _least_memory_first, in_order
from actpass.torch_compat import inductor_config

SIZES = (4, 8, 8, 16, 64)


@dataclass(eq=False)
class Buffer:
    """A tensor in memory. val: on a device that is not the CPU, unless the kernels are loops in one C++ function."""

    name: str
    op: str
    meta: dict[str, Any] = field(default_factory=dict)


@st.composite
def programs(draw: st.DrawFn, most: int = 8) -> Program:
    """Kernels that read inputs and results before them. Some are loops, and some results are filled with zeros before."""
    device = "cpu" if draw(st.booleans()) else "meta"
    val = torch.empty(0, device=device)
    inputs = [Buffer(f"in{i}", "placeholder", {"val": val}) for i in range(draw(st.integers(1, 3)))]
    nbytes: dict[Buffer, int] = {n: draw(st.sampled_from(SIZES)) for n in inputs}
    known, kernels, inlined = list(inputs), [], {}
    for i in range(draw(st.integers(1, most))):
        writes = [Buffer(f"k{i}_{j}", "call_function", {"val": val}) for j in range(draw(st.integers(1, 2)))]
        reads = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
        for write in writes:
            nbytes[write] = draw(st.sampled_from(SIZES))
            inlined[write] = dict.fromkeys(draw(st.lists(st.sampled_from(reads), unique=True)) if reads else ())
        is_loop = draw(st.booleans())
        zeroed = [w for w in writes[:1] if is_loop and draw(st.integers(0, 4)) == 0]
        inlined |= {w: {} for w in zeroed}  # no element of it is computed from one at its place
        scratch = 0 if is_loop else draw(st.sampled_from((0, 0, 100)))
        kernel = Kernel(writes[0], i, (1, 0) if is_loop else None, scratch, writes, reads, list(writes), zeroed=zeroed)
        kernel.size = sum(nbytes[w] for w in writes)
        kernel.unwritten = draw(st.sampled_from((0, 0, 4)))
        kernel.allocates = not is_loop and draw(st.booleans())
        kernels.append(kernel)
        known += writes
    made = [n for n in known if n.op == "call_function"]
    outputs = {*draw(st.lists(st.sampled_from(made), min_size=1, unique=True))}
    freed = draw(st.lists(st.sampled_from(inputs), unique=True))
    believed = {n: nbytes[n] for n in inputs if draw(st.booleans())}
    return Program(kernels, nbytes, believed, freed, outputs, inlined)


class Blocks:
    """Every block of memory with the steps, from the first to the last, at which it is held."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int, int]] = []

    def hold(self, nbytes: int, first: int, last: int) -> None:
        self.held.append((nbytes, first, last))

    def level(self, step: int) -> int:
        return sum(nbytes for nbytes, first, last in self.held if first <= step <= last)


def allocated(program: Program, order: Sequence[Kernel], zeroed: Mapping[Buffer, int], reuse: bool) -> list[int]:
    """What is live while each kernel of ``order`` runs, one block after the other."""
    end, size = len(order) - 1, program.bytes
    call = [last_of_call(order, i) for i in range(len(order))]
    touched: dict[Buffer, int] = {n: i for i, k in enumerate(order) for n in (*k.writes, *k.reads)}
    dies = {n: end + 1 if n in program.outputs else touched.get(n, end + 1) for n in size}
    freed = {n: call[step] if step <= end else end for n, step in dies.items()}
    taken = {w: r for i, k in enumerate(order) if k.loops is not None for w, r in in_place(program, k, i, dies)}
    passed_on = set(taken.values())
    ours, inductors = Blocks(), Blocks()
    for n in program.freed:
        ours.hold(size[n], 0, freed[n])
    for n, nbytes in program.believed.items():
        inductors.hold(nbytes, 0, min(dies[n], end))
    for i, k in enumerate(order):
        inductors.hold(k.unwritten, i, i)
        ours.hold(max(k.scratch - k.size, 0), i, i)
        for w in k.writes:
            inductors.hold(size[w], zeroed.get(w, i) if w in k.zeroed else i, min(dies[w], end))
    limit = max(map(inductors.level, range(len(order))))
    free: dict[int, list[int]] = {}
    for i, k in enumerate(order):
        for w in k.writes:
            if w in taken:  # the block of what it overwrites is its own from the next call on
                ours.hold(size[w], call[i] + 1, freed[w])
                continue
            ours.hold(size[w], zeroed.get(w, i) if w in k.zeroed else i, freed[w])
            waiting = free.get(size[w], [])
            if not reuse or w in zeroed or k.allocates or not waiting:
                continue
            between = range(waiting[-1] + 1, i)
            if all(size[w] + inductors.level(j) <= limit for j in between):
                waiting.pop()
                for blocks in (ours, inductors):
                    blocks.hold(size[w], between.start, between.stop - 1)
        for n in dict.fromkeys((*program.freed, *program.believed, *(w for o in order[: i + 1] for w in o.writes))):
            if freed[n] == i and dies[n] <= end and n not in passed_on and n.op == "call_function":
                free.setdefault(size[n], []).append(i)
    return [ours.level(i) for i in range(len(order))]


def last_of_call(order: Sequence[Kernel], i: int) -> int:
    """On a CPU all loops that follow each other are one C++ function, which gives back what it read when it is done."""
    one_call = order[i].node.meta["val"].device.type == "cpu"
    while one_call and order[i].loops is not None and i + 1 < len(order) and order[i + 1].loops is not None:
        i += 1
    return i


def in_place(program: Program, kernel: Kernel, step: int, dies: Mapping[Buffer, int]) -> Iterator[tuple[Buffer, Buffer]]:
    """(result, what it overwrites): of its size, dead behind the kernel, and read by no other result of it."""
    mine = {*program.freed, *(w for k in program.kernels for w in k.writes)}
    for w in kernel.writes:
        for r in program.inlined[w]:
            others = [o for o in kernel.writes if o is not w and r in program.inlined[o]]
            if dies[r] == step and r in mine and program.bytes[r] == program.bytes[w] and not others:
                yield w, r
                break


def orders(program: Program) -> Iterator[list[Kernel]]:
    """All in which each kernel runs behind those whose results it reads."""
    maker = {w: k for k in program.kernels for w in k.writes}
    for order in itertools.permutations(program.kernels):
        place = {k: i for i, k in enumerate(order)}
        if all(place[maker[r]] < place[k] for k in order for r in k.reads if r in maker):
            yield list(order)


@pytest.mark.parametrize("reuse", [False, True])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(program=programs())
def test_live_bytes_are_those_of_an_allocator_that_holds_each_block(program: Program, reuse: bool):
    candidates = [(program.kernels, {}), _least_memory_first(program), _breadth_first(program), _depth_first(program)]
    with inductor_config.patch(allow_buffer_reuse=reuse):
        for order, zeroed in candidates:
            assert list(program.run(order, zeroed).levels) == allocated(program, order, zeroed, reuse)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(program=programs())
def test_the_peak_holds_the_outputs_and_what_is_kept_is_they(program: Program):
    found = program.timeline()
    outputs = sum(program.bytes[n] for n in program.outputs)
    assert found.kept == outputs
    assert found.peak >= outputs
    assert found.peak >= max(k.needs - sum(program.bytes[w] for w in k.writes) for k in program.kernels)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(program=programs())
def test_names_change_nothing(program: Program):
    before = program.timeline()
    for i, buffer in enumerate(reversed(list(program.bytes))):
        buffer.name = f"renamed{i:03}"
    after = program.timeline()
    assert after.levels == before.levels
    assert sorted(nbytes for _, nbytes in after.live) == sorted(nbytes for _, nbytes in before.live)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(program=programs(most=5))
def test_the_orders_are_orders_and_the_one_taken_is_the_best_of_them(program: Program):
    possible = list(orders(program))
    least = min(max(program.believed_steps(order, {})) for order in possible)  # with no zeros before their time
    found = [(program.kernels, {}), _least_memory_first(program), _breadth_first(program), _depth_first(program)]
    assert in_order(list(reversed(program.kernels))) in possible
    assert all(order in possible for order, _ in found)
    believed = [max(program.believed_steps(*order)) for order in found]
    assert min(believed) >= least
    assert program.timeline() == program.run(*found[believed.index(min(believed))])


@dataclass(eq=False)
class Scheduled:
    """A kernel as Inductor's scheduler hands it to its orders."""

    kernel: Kernel
    mpi_node: Any = None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(program=programs())
def test_breadth_first_is_inductors_own(program: Program):
    """Without results that are zeroed before: the loops that do it have no place among the kernels here."""
    for kernel in program.kernels:
        kernel.zeroed = []
    maker = {w: k for k in program.kernels for w in k.writes}
    nodes = {k: Scheduled(k) for k in program.kernels}
    for i, (kernel, node) in enumerate(nodes.items()):
        before = [nodes[k] for k in dict.fromkeys(maker[r] for r in kernel.reads if r in maker)]
        behind = [n for k, n in nodes.items() if any(maker.get(r) is kernel for r in k.reads)]
        node.mpi_node = SimpleNamespace(index=i, pred_nodes=before, succ_nodes=behind)
    wanted = [node.kernel for node in inductor_memory.topological_sort_bfs(list(nodes.values()))]
    assert _breadth_first(program) == (wanted, {})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(program=programs(most=5))
def test_whatever_the_order_the_same_bytes_stay(program: Program):
    found = {program.run(order, {}).kept for order in orders(program)}
    assert found == {sum(program.bytes[n] for n in program.outputs)}

"""What compiling takes, as counts: seconds depend on the machine. And that what is found by less work is the same."""

from __future__ import annotations

import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import actpass
from actpass.analysis import linearity as uses
from actpass.analysis.linearity import Uses
from actpass.analysis.partitioned import PartitionConstraints
from actpass.backend.stack import in_one_piece
from actpass.diagnostics.explain import explain_model
from actpass.memory import fusion, liveness
from actpass.options import options_for
from actpass.passes import partition
from actpass.planner import region as region_of_plan
from actpass.planner.free_cut import no_recompute_partition

from . import models
from .models import Block, Made
from .tracing import trace

aten = torch.ops.aten


class Stack(nn.Module):
    """Blocks on a residual stream in float32, the loss a mean of squares. autocast: what they add to it is bfloat16. frozen:
    how many do not learn."""

    def __init__(self, blocks: list[nn.Module], *, autocast: bool = False, frozen: int = 0) -> None:
        super().__init__()
        self.blocks, self.autocast = nn.ModuleList(blocks), autocast
        self.scale = nn.Parameter(torch.ones(32))
        for block in self.blocks[:frozen]:
            block.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            x = x * self.scale
            for block in self.blocks:
                x = block(x)
            return x.float().square().mean()


class Gated(nn.Module):
    """A residual branch that ends in a product of two tensors which the backward reads anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.gate(x)) * self.up(x)


STACKS: dict[str, Callable[[], Stack]] = {
    "float32": lambda: Stack([Block() for _ in range(2)]),
    "autocast": lambda: Stack([Block() for _ in range(3)], autocast=True),
    "frozen": lambda: Stack([Block() for _ in range(2)], frozen=2),
    "gated": lambda: Stack([Gated() for _ in range(4)]),
}


def _made(name: str) -> Made:
    return STACKS[name](), {"x": torch.randn(2, 16, 32)}


def _count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """One element for each call of ``owner.name`` from now on."""
    calls: list[None] = []
    function = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("float32", "exact"), ("float32", "int4"), ("autocast", "auto")])
def test_upstream_cuts_twice_without_a_budget(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    """For what Inductor saves, which the report tells, and for the plan."""
    model, inputs = _made(name)
    cuts = _count(monkeypatch, partition, "min_cut_rematerialization_partition")
    read = _count(monkeypatch, region_of_plan, "find_saved")
    options = {**options_for(method), "min_tensor_bytes": 0}
    assert actpass.explain(model, **inputs, options=options, advise=False).active
    assert (len(cuts), len(read)) == (2, 2)


@pytest.mark.parametrize(("name", "is_free"), [("float32", True), ("frozen", True), ("gated", False)])
def test_the_residual_stream_is_asked_for_where_both_cuts_say_that_it_costs_nothing(name: str, is_free: bool) -> None:
    model, inputs = _made(name)
    (compiled,) = explain_model(model, (), inputs, {"policy": "exact"}).regions
    assert compiled.decided is not None
    region, choice = compiled.decided.region, compiled.decided.choice
    sums = frozenset(n.name for n in region.recomputation.residual_sums)
    assert len(sums) >= 2
    kept, plain = (
        region.cut(PartitionConstraints(recompute_materialized=True, must_save=keep)) for keep in (sums, frozenset[str]())
    )
    assert choice.constraints.must_save == (sums if kept.saved_bytes <= plain.saved_bytes else frozenset())
    assert choice.cut.saved_bytes == min(kept.saved_bytes, plain.saved_bytes)
    assert bool(choice.constraints.must_save) == is_free


@pytest.mark.slow
def test_in_mixed_precision_the_residual_stream_is_asked_for_unless_bytes_are_limited() -> None:
    """Its addends take half of the bytes, and whatever reads it would read them all."""
    model, inputs = _made("autocast")
    (compiled,) = explain_model(model, (), inputs, {"policy": "exact"}).regions
    assert compiled.decided is not None
    region, choice = compiled.decided.region, compiled.decided.choice
    sums = frozenset(n.name for n in region.recomputation.residual_sums)
    assert choice.constraints.must_save == sums
    assert sums.isdisjoint(n.name for n in choice.cut.backward.graph.nodes if n.op == "call_function")
    limited = no_recompute_partition(replace(region, config=replace(region.config, memory_budget=0.9)))
    assert not limited.constraints.must_save
    assert limited.cut.saved_bytes < choice.cut.saved_bytes


def test_the_uses_of_all_saved_tensors_are_read_in_one_sweep_of_each_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is looked at once, and once more for each tensor that it is the first to read; not again for every tensor."""
    model, inputs = models.transformer()
    looks = _count(monkeypatch, uses, "_degree")
    (compiled,) = explain_model(model, (), inputs, {"policy": "exact"}).regions
    graphs = [c.backward.graph for c in (compiled.traced.default, compiled.cut)]
    nodes = sum(len(g.nodes) for g in graphs)
    reads = sum(len(uses.consumers(n)) for g in graphs for n in g.find_nodes(op="placeholder"))
    assert len(looks) <= nodes + reads


@pytest.mark.parametrize("seed", range(20))
def test_uses_found_together_are_those_found_one_by_one(seed: int) -> None:
    """On random graphs; one by one as the definition has it: the degree of every node in one tensor, all others fixed."""
    graph, inputs = _random_graph(random.Random(seed))
    together = Uses(graph)
    for tensor in inputs:
        found, linear = together.of(tensor, ())
        readers = [user for user in tensor.users if user.op != "output"]
        assert [use.kind for use in found] == [_kind(graph, user, _degree(user, {tensor: 1})) for user in readers]
        assert linear == (_kind(graph, tensor, 1) == "linear" and all(use.kind == "linear" for use in found))


def _random_graph(draw: random.Random) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(4)]
    nodes = list(inputs)
    for _ in range(10):
        target = draw.choice([aten.add.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.neg.default, aten.exp.default])
        count = 2 if target in (aten.add.Tensor, aten.mul.Tensor) else 1
        nodes.append(graph.call_function(target, tuple(draw.choice(nodes) for _ in range(count))))
    graph.output(tuple(n for n in nodes if not n.users))
    return graph, inputs


def _degree(node: fx.Node, degrees: dict[fx.Node, float]) -> float:
    of = [degrees.get(a, 0) for a in node.args if isinstance(a, fx.Node)]
    if node.target is aten.exp.default:
        return float("inf") if of[0] else 0
    return sum(of) if node.target is aten.mul.Tensor else max(of)


def _kind(graph: fx.Graph, start: fx.Node, degree: float) -> str:
    degrees: dict[fx.Node, float] = {start: degree}
    for node in graph.nodes:
        if node.op == "call_function" and node not in degrees:
            degrees[node] = _degree(node, degrees)
    return "linear" if max(degrees.values()) <= 1 else "nonlinear"


@pytest.mark.slow
def test_a_called_function_is_read_once_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers call one encoder: what it takes is looked up, not found again at each call."""
    model, inputs = models.transformer(layers=3)
    read = _count(monkeypatch, liveness, "timeline")
    (compiled,) = explain_model(model, (), inputs, {"codec": "int4", "min_tensor_bytes": 0}).regions
    graphs = [compiled.forward, compiled.backward]
    functions = sum(len(list(g.children())) for g in graphs)
    calls = sum(n.op == "get_attr" for g in graphs for n in g.graph.nodes)
    assert calls > functions
    assert len(read) <= functions


def test_calls_at_any_depth_of_the_stack_cost_no_page_faults():
    """CPython 3.11 and newer, without a piece of the stack for itself: 1000 at one depth in some 130."""

    def nothing(*_: int) -> None: ...

    def often() -> None:
        for _ in range(1000):
            nothing(1, 2, 3, 4)

    def at(depth: int, function: Callable[[], None]) -> None:
        if depth:
            at(depth - 1, function)
        else:
            function()

    def faults(depth: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        at(depth, lambda: in_one_piece(often))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert max(faults(depth) for depth in range(300)) < 500


class Unrolled(nn.Module):
    """A recurrence whose steps are all in the graph, as RWKV's are on a CPU."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.decay, self.steps = nn.Parameter(torch.zeros(16)), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v, decay = self.key(x), self.value(x), -self.decay.exp()
        above, below, most = (torch.zeros(2, 16) for _ in range(3))
        found = []
        for t in range(self.steps):
            top = torch.maximum(most, k[:, t])
            a, b = (most - top).exp(), (k[:, t] - top).exp()
            found.append((a * above + b * v[:, t]) / (a * below + b))
            top = torch.maximum(most + decay, k[:, t])
            a, b = (most + decay - top).exp(), (k[:, t] - top).exp()
            above, below, most = a * above + b * v[:, t], a * below + b, top
        return self.out(torch.stack(found, 1)).square().mean()


def _lines_of(function: Callable[[], Any]) -> tuple[int, int]:
    """How many lines of this package ``function`` runs: of what says which loops are fused, and others. Upstream's cuts are
    not ours."""
    package, count = str(Path(actpass.__file__).parent), Counter[bool]()

    def line(frame: Any, event: str, _: Any) -> Any:
        count[frame.f_code.co_filename == fusion.__file__] += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(package) else None)
    try:
        function()
    finally:
        sys.settrace(before)
    return count[True], count[False]


@pytest.mark.slow
def test_twice_as_many_steps_of_a_recurrence_are_twice_the_work() -> None:
    """But for pairs of loops near one another, which are a square, as Inductor's are, and of which each that fuses tells all
    others: 4.6 times on torch 2.13, which has no gate that would keep levels beside it, 3 on 2.15. No readers of what lies
    between a pair are looked at for each, which would be 8."""
    joints = [trace(Unrolled(steps), {"x": torch.randn(2, steps, 16)}) for steps in (5, 10)]
    few, many = (_lines_of(lambda joint=joint: joint.compiled(policy="auto", min_tensor_bytes=0)) for joint in joints)
    assert many[1] <= 2.5 * few[1], (few, many)
    assert many[0] <= 5 * few[0], (few, many)

"""The budget of peak bytes of a region, and what sizes that change are taken for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from actpass.ir.graph_inputs import GraphInputs
from actpass.memory.resident import resident
from actpass.options import Config
from actpass.planner.peak_budget import Headroom, PeakBudget
from actpass.reporting.record import Record
from actpass.torch_compat import is_part_of_a_step, size_hint, sizes_as_planned, symbol_of


def peak_budget(config: Config, inputs: Sequence[Any], others: Iterable[torch.Tensor] = ()) -> PeakBudget | None:
    """The budget of a region that runs with ``inputs``, if it is one of peak bytes. others: of regions that ran before it
    in the step, and what is frozen around it."""
    asked = config.memory_budget
    return PeakBudget(asked, resident(inputs, others, config.optimizer_state_bytes)) if isinstance(asked, int) else None


def headrooms(gm: fx.GraphModule, example_inputs: Sequence[Any], *, again: bool) -> tuple[Headroom, ...]:
    """What to take sizes that change for. What was traced; but where the code was compiled before, and a size has grown, the
    next power of two first, so that sizes that go on growing take few graphs, and what lies half-way if that can't be met."""
    symbols = [s for s in map(symbol_of, (e for e in example_inputs if isinstance(e, torch.SymInt))) if s is not None]
    if not symbols:
        return ()
    traced = [n for _, n, _ in symbols]
    grown = [min(most, 1 << (n - 1).bit_length()) for _, n, most in symbols] if again else traced
    tensors = [
        node.meta["example_value"]
        for node, e in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        if isinstance(e, torch.Tensor) and not isinstance(e, torch.nn.Parameter)
    ]
    found: list[Headroom] = []
    for sizes in (grown, [(a + b) // 2 for a, b in zip(grown, traced, strict=True)], traced):
        planned = tuple((name, n) for (name, _, _), n in zip(symbols, sizes, strict=True))
        with sizes_as_planned(planned):
            nbytes = sum(size_hint(t.numel()) * t.element_size() for t in tensors)
        found.append(Headroom(planned, nbytes - sum(size_hint(t.numel()) * t.element_size() for t in tensors)))
    return tuple(dict.fromkeys(found))


def as_planned(peak: PeakBudget, record: Record, example_inputs: Sequence[Any]) -> PeakBudget:
    """The budget of what was compiled. Guards on sizes: for more than was planned for there is another plan."""
    sizes = dict(record.sizes)
    for e in example_inputs:
        symbol = symbol_of(e) if isinstance(e, torch.SymInt) else None
        if isinstance(e, torch.SymInt):
            bool(e <= (size_hint(e) if symbol is None else sizes.get(symbol[0], symbol[1])))
    return next((peak.within(h) for h in peak.headrooms if h.sizes == record.sizes), peak)


def is_part(gm: fx.GraphModule, inputs: GraphInputs, peak: PeakBudget, seen: bool | None) -> bool:
    """Whether the region is one of several of a step: behind or before a graph break, as a step has shown it (``seen``), beside
    trained parameters that it does not take, or, while the optimizer that would show those is unknown, with a computed
    input."""
    if is_part_of_a_step(gm):
        return True
    return seen if seen is not None else peak.resident.elsewhere or (not peak.resident.known and any(inputs.computed))

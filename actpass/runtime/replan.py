"""One plan over all regions of a step: when the first complete step has shown them, those whose plan changes are compiled
again."""

from __future__ import annotations

import math
import types
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from actpass.errors import BudgetError
from actpass.memory.footprint import MARGIN, step_peak
from actpass.plan.multi_region import OperatingPoint, allocate_budget
from actpass.planner.peak_budget import PeakBudget
from actpass.reporting import Record
from actpass.runtime.progress import log


class Part(Protocol):
    """What is asked of a region (`actpass.runtime.regions.Region`)."""

    record: Record
    parameters: weakref.WeakValueDictionary[int, torch.Tensor]
    code: types.CodeType | None
    shapes: str
    peak: PeakBudget | None

    def compile_again(self) -> None: ...


_Part = tuple[types.CodeType | None, str, int]
"""What a region is known by: its code, the shapes of its inputs, and the budget in bytes."""
_Calls = list[tuple[Part, int | None]]

_calls: deque[tuple[weakref.ref[Part], int | None]] = deque(maxlen=4096)
"""The regions of the step that is running, in the order of their forwards, each with the parameter that it ran with: one code
may serve several modules. Bounded: a loop without a torch optimizer may never say that a step is done."""
_last: list[tuple[weakref.ref[Part], int | None]] = []
"""Those of the last step."""
_planned: set[tuple[Any, ...]] = set()
"""Sequences of parts for which there is a plan, with what was resident."""
_capacities: dict[_Part, tuple[int, tuple[OperatingPoint, ...]]] = {}
"""What the plan gave a part, and what it could choose from."""
_parts: set[types.CodeType | None] = set()
"""Codes that were seen to be one of several in a step."""
_alone: set[tuple[types.CodeType | None, int | None]] = set()
"""Those that were seen to be all of a step, with the parameter that they ran with."""


def clear() -> None:
    for kept in (_calls, _last, _planned, _capacities, _parts, _alone):
        kept.clear()


def note(region: Part, parameter: int | None) -> None:
    """A call of ``region`` with the parameter of that id (None: it has none)."""
    _calls.append((weakref.ref(region), parameter))


def running() -> list[Part]:
    """The regions that have run in this step."""
    return list(dict.fromkeys(r for r, _ in _living(_calls)))


def together(regions: Collection[Part]) -> set[Part]:
    """``regions``, and those that ran with one of them in this step or the last."""
    found = set(regions)
    for calls in (_calls, _last):
        step = {r for r, _ in _living(calls)}
        if not step.isdisjoint(regions):
            found |= step
    return found


def is_part(code: types.CodeType | None, parameter: int | None) -> bool | None:
    """Whether the region that is compiled from ``code``, and runs with the parameter of that id, is one of several of a step;
    None where no step has shown it."""
    return True if code in _parts else False if (code, parameter) in _alone else None


def capacity_of(code: types.CodeType | None, shapes: str, nbytes: int) -> int | None:
    """What the plan over all parts gave the one that is compiled from ``code`` for inputs of ``shapes`` under a budget."""
    given = _capacities.get((code, shapes, nbytes))
    return given[0] if given is not None else None


def check_first(record: Record, peak: PeakBudget) -> None:
    """A part is compiled behind regions that were planned before anyone knew of it, as the whole of a step. Raises
    `BudgetError` if they have left it too little."""
    before = [r for r in running() if r.peak is not None and not r.peak.part and r.record.footprint is not None]
    if not before or record.footprint is None:
        return
    held = sum(r.record.footprint.held for r in before if r.record.footprint is not None)
    needed = peak.resident.total + math.ceil((held + step_peak([record.footprint])) * (1 + MARGIN))
    if needed > peak.nbytes:
        for r in before:
            _compile_as_part(r)
        _calls.clear()  # this step ends here
        raise BudgetError(
            f"memory_budget={peak.nbytes} bytes of peak has no room for another compiled part of this step, which needs "
            f"{needed} bytes with what is there: {len(before)} before it were planned as if they were all. From now on they "
            "are not: train again, or call actpass.set_optimizer(optimizer) before the first step, whose parameters show what "
            "belongs to it."
        )


def complete() -> None:
    """A step is about to be made by an optimizer of one of its regions. If its parts are new, or what is resident is, plan over
    them, and forget the compiled code of those that change.

    Raises `BudgetError` if the budget has no room for them together.
    """
    _last[:] = _calls
    _calls.clear()
    plan_again()


def plan_again() -> None:
    """As `complete`, of the last step."""
    noted = [(r, parameter) for r, parameter in _living(_last) if r.peak is not None]
    whole = list(dict.fromkeys(r for r, _ in noted if r.peak is not None and not r.peak.part))
    if not whole:
        _spread(noted)
    if len(whole) < len({id(r) for r, _ in noted}):  # there are parts, whose inputs they compute
        for r in whole:
            _compile_as_part(r)
    else:
        _alone.update((r.code, parameter) for r, parameter in noted)


def _compile_as_part(region: Part) -> None:
    _parts.add(region.code)
    region.compile_again()


def _spread(noted: _Calls) -> None:
    """One plan over ``noted``, all of which are parts."""
    calls = [((r.code, r.shapes, r.peak.nbytes), parameter) for r, parameter in noted if r.peak is not None]
    keys: list[_Part] = [part for part, _ in _once(calls)]
    regions = {part: r for (part, _), (r, _) in zip(calls, noted, strict=True)}
    ladders = {k: r.record.levels or _capacities.get(k, (0, ()))[1] for k, r in regions.items()}
    peaks = [r.peak for r in regions.values() if r.peak is not None]
    resident = max((p.resident.total for p in peaks), default=0)
    if not keys or (resident, *keys) in _planned or not all(ladders.values()):
        return
    nbytes = min(p.nbytes for p in peaks)
    chosen, needed = allocate_budget(keys, ladders, nbytes - resident)
    footprints = [regions[k].record.footprint for k in keys]
    gradients = sum(f.gradients for f in footprints if f is not None)
    needed = max(needed, gradients + max(p.resident.scratch for p in peaks))  # while the optimizer steps
    if resident + needed > nbytes:
        largest = max(peaks, key=lambda p: p.resident.total).resident
        raise BudgetError(
            f"memory_budget={nbytes} bytes of peak can't be met by the {len(keys)} regions of this step together. The least "
            f"that can is {resident + needed} bytes: {largest}, and {needed} above them. Use memory_budget={resident + needed} "
            "or more, or a smaller batch.",
            resident + needed,
        )
    _planned.add((resident, *keys))
    changed = 0
    for key, level in chosen.items():
        region = regions[key]
        _capacities[key] = level.capacity, tuple(ladders[key])
        if level.footprint != region.record.footprint:
            region.compile_again()
            changed += 1
    log.info("one plan over the %d regions of a step: %d of them will be compiled again", len(keys), changed)


def _living(calls: Sequence[tuple[weakref.ref[Part], int | None]] | deque[tuple[weakref.ref[Part], int | None]]) -> _Calls:
    return [(r, parameter) for r, parameter in ((ref(), parameter) for ref, parameter in calls) if r is not None]


def _once(keys: list[Any]) -> list[Any]:
    """One micro-step of several: the shortest sequence of different calls of which ``keys`` is a repetition. Calls that are all
    the same may be one module that is called again and again, and stay as they are."""
    for length in range(2, len(keys) // 2 + 1):
        unit = keys[:length]
        if len(set(unit)) > 1 and len(keys) % length == 0 and keys == unit * (len(keys) // length):
            return unit
    return keys

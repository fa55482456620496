"""One plan over all regions of a step: when the first complete step has shown them, those whose plan changes are compiled
again."""

from __future__ import annotations

import types
import weakref
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_post_hook

from actpass._torch import reset_code
from actpass.budget import PeakBudget
from actpass.errors import BudgetError
from actpass.plan.spread import Level, spread
from actpass.progress import log
from actpass.report import Record


class Part(Protocol):
    """What is asked of a region (`actpass.runtime.regions.Region`)."""

    record: Record
    code: types.CodeType | None
    shapes: str
    peak: PeakBudget | None


_Part = tuple[types.CodeType | None, str, int]
"""What a region is known by: its code, the shapes of its inputs, and the budget in bytes."""

_calls: list[tuple[weakref.ref[Part], int | None]] = []
"""The parts of the step that is running, in the order of their forwards, each with the parameter that it ran with: one code may
serve several modules."""
_planned: set[tuple[Any, ...]] = set()
"""Sequences of parts for which there is a plan."""
_capacities: dict[_Part, tuple[int, tuple[Level, ...]]] = {}
"""What the plan gave a part, and what it could choose from."""
_hook: Any = None


def start() -> None:
    """Let every torch optimizer's step end a step (once a process)."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(lambda *_: complete())


def clear() -> None:
    _calls.clear()
    _planned.clear()
    _capacities.clear()


def note(region: Part, parameter: int | None) -> None:
    """A call of ``region`` with the parameter of that id (None: it has none)."""
    _calls.append((weakref.ref(region), parameter))


def capacity_of(code: types.CodeType | None, shapes: str, nbytes: int) -> int | None:
    """What the plan over all parts gave the one that is compiled from ``code`` for inputs of ``shapes`` under a budget."""
    given = _capacities.get((code, shapes, nbytes))
    return given[0] if given is not None else None


def complete() -> None:
    """A step is done. If its parts are new, plan over them, and forget the compiled code of those that change.

    Raises `BudgetError` if the budget has no room for them together.
    """
    noted = [(r, parameter) for r, parameter in ((ref(), parameter) for ref, parameter in _calls) if r is not None]
    _calls.clear()
    calls = [((r.code, r.shapes, r.peak.nbytes), parameter) for r, parameter in noted if r.peak is not None]
    keys: list[_Part] = [part for part, _ in _once(calls)]
    regions = {part: r for (part, _), (r, _) in zip(calls, noted, strict=True)}
    ladders = {k: r.record.levels or _capacities.get(k, (0, ()))[1] for k, r in regions.items()}
    if not keys or tuple(keys) in _planned or not all(ladders.values()):
        return
    _planned.add(tuple(keys))
    peaks = [r.peak for r in regions.values() if r.peak is not None]
    nbytes, resident = min(p.nbytes for p in peaks), max(p.resident.total for p in peaks)
    chosen, needed = spread(keys, ladders, nbytes - resident)
    footprints = [regions[k].record.footprint for k in keys]
    gradients = sum(f.gradients for f in footprints if f is not None)
    needed = max(needed, gradients + max(p.resident.scratch for p in peaks))  # while the optimizer steps
    if resident + needed > nbytes:
        raise BudgetError(
            f"memory_budget={nbytes} bytes of peak can't be met by the {len(keys)} regions of this step together. The least "
            f"that can is {resident + needed} bytes, {resident} of them parameters, inputs and optimizer state: use "
            f"memory_budget={resident + needed} or more, or a smaller batch.",
            resident + needed,
        )
    changed = 0
    for key, level in chosen.items():
        region = regions[key]
        _capacities[key] = level.capacity, tuple(ladders[key])
        if level.footprint != region.record.footprint and region.code is not None:
            reset_code(region.code)
            changed += 1
    log.info("one plan over the %d regions of a step: %d of them will be compiled again", len(keys), changed)


def _once(keys: list[Any]) -> list[Any]:
    """One micro-step of several: the shortest sequence of different calls of which ``keys`` is a repetition. Calls that are all
    the same may be one module that is called again and again, and stay as they are."""
    for length in range(2, len(keys) // 2 + 1):
        unit = keys[:length]
        if len(set(unit)) > 1 and len(keys) % length == 0 and keys == unit * (len(keys) // length):
            return unit
    return keys

"""A budget of peak bytes of a step: what it leaves beside what is resident, and the error where nothing meets it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actpass.errors import BudgetError
from actpass.memory.footprint import MARGIN, Footprint, step_peak
from actpass.memory.resident import Resident
from actpass.torch_compat import Sizes


@dataclass(frozen=True, slots=True)
class Headroom:
    """What sizes that change from call to call are taken for when a region is planned, and bytes that its inputs take more than
    those that were traced."""

    sizes: Sizes
    more: int


class Limit(Protocol):
    """A budget of peak bytes, of one device or of each rank."""

    @property
    def nbytes(self) -> int: ...
    def needs(self, cut: Any) -> int: ...
    def floor(self, cut: Any) -> int: ...
    def error(self, cut: Any, options: str) -> BudgetError: ...


@dataclass(frozen=True, slots=True)
class PeakBudget:
    """nbytes: of the peak of a step, with what is resident counted in. part: whether the region is one of several of a model
    with graph breaks: it is compiled at its least peak first, and when a step has shown all regions, at the ``capacity`` of
    saved bytes that one plan over all gave it. headrooms: which to plan for, the first that can be met."""

    nbytes: int
    resident: Resident
    part: bool = False
    capacity: int | None = None
    headrooms: tuple[Headroom, ...] = ()

    def within(self, headroom: Headroom) -> PeakBudget:
        """What is left beside inputs of that size."""
        return replace(self, resident=self.resident.with_more(headroom.more), headrooms=())

    def needs(self, cut: Any) -> int:
        """Bytes to allow for what will be compiled as ``cut``."""
        return self.needs_of(cut.footprint)

    def needs_of(self, footprint: Footprint) -> int:
        return max(self.resident.total + math.ceil(step_peak([footprint]) * (1 + MARGIN)), self._floor_of(footprint))

    def floor(self, cut: Any) -> int:
        """Bytes that no choice changes: while the optimizer steps, beside all gradients."""
        return self._floor_of(cut.footprint)

    def _floor_of(self, footprint: Footprint) -> int:
        return self.resident.total + footprint.gradients + self.resident.scratch

    def error_of_step(self, footprint: Footprint) -> BudgetError | None:
        """For when no plan leaves enough for the optimizer's step."""
        needed, step = self._floor_of(footprint), footprint.gradients + self.resident.scratch
        if needed <= self.nbytes:
            return None
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak can't be met beside this optimizer: while it steps it takes {needed} "
            f"bytes, {self.resident}, and {step} of gradients and what a step takes for a moment. Use memory_budget={needed} "
            "or more, or an optimizer with less state.",
            needed,
        )

    def error(self, cut: Any, options: str) -> BudgetError:
        """For when even ``cut`` needs too much."""
        needed = self.needs(cut)
        step = cut.footprint.gradients + self.resident.scratch
        largest = ", ".join(f"{name} ({nbytes})" for name, nbytes in cut.largest_at_peak[:3])
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak can't be met. The least that {options} reaches here is "
            f"{needed} bytes: {self.resident}, and above them the larger of {step} while the optimizer steps and "
            f"{cut.peak_bytes} predicted before (and a margin), the largest of which are {largest}. Use "
            f"memory_budget={needed} or more, or a smaller batch.",
            needed,
        )

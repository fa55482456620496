"""What a plan of a deep model comes to, on one device and on each rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property

from actpass.errors import BudgetError
from actpass.extrapolation.extrapolate import FoldedPlan
from actpass.extrapolation.sharded_budget import ShardedBudget
from actpass.planner.peak_budget import PeakBudget
from actpass.planner.region import PartitionPlan

UNLIMITED = sys.maxsize


@dataclass(frozen=True)
class Outcome:
    """A plan for one device, or for each rank: within ``limit``, or, where ``failed`` says that none is, the nearest."""

    where: str
    plan: FoldedPlan
    limit: PeakBudget | ShardedBudget
    choice: PartitionPlan
    failed: BudgetError | None

    @property
    def needs(self) -> int:
        """Bytes, with the margin of the prediction."""
        return self.limit.needs(self.plan.cut)

    @cached_property
    def parts(self) -> dict[str, int]:
        """What the peak of a step is made of, in bytes."""
        limit = self.limit
        return limit.parts(self.plan.cut) if isinstance(limit, ShardedBudget) else self._of_one_device(limit)

    def _of_one_device(self, limit: PeakBudget) -> dict[str, int]:
        cut, resident = self.plan.cut, limit.resident
        gradients, saved, running = cut.at_peak
        return {
            "parameters and inputs": resident.inputs,
            "optimizer state": resident.optimizer_state,
            "while forward and backward run: gradients that are there": gradients,
            "  what is saved": saved,
            "  what runs": running,
            "while the optimizer steps: gradients": cut.footprint.gradients,
            "  its scratch": resident.scratch,
            "in all": resident.total + max(cut.peak_bytes, cut.footprint.gradients + resident.scratch),
        }

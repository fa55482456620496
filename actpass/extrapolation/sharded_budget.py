"""A budget of the peak of each rank under FSDP2."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actpass.errors import BudgetError
from actpass.extrapolation.folded_graph import FoldedCut
from actpass.extrapolation.fsdp import Optimizer, RankPeak, Sharded
from actpass.memory.footprint import MARGIN


@dataclass(frozen=True)
class ShardedBudget:
    """A budget of the peak bytes of each rank under FSDP2. inputs: bytes of a batch and of buffers, which every rank has."""

    nbytes: int
    sharded: Sharded
    optimizer: Optimizer
    inputs: int = 0

    @property
    def resident(self) -> int:
        """Bytes that are there all the time: sharded parameters, optimizer state, inputs."""
        parameters = self.sharded.parameters
        return self.inputs + parameters + self.optimizer.state_bytes(parameters, self.sharded.count)

    def peak(self, cut: FoldedCut) -> RankPeak:
        """Of a forward and its backward, above what is resident."""
        forward, backward = cut.moments
        peaks = self.sharded.forward_peak(forward), self.sharded.backward_peak(backward)
        return max(peaks, key=lambda peak: peak.total)

    def parts(self, cut: FoldedCut) -> dict[str, int]:
        """What the peak of a step is made of, in bytes."""
        sharded, peak = self.sharded.parameters, self.peak(cut)
        return {
            "sharded parameters": sharded,
            "inputs": self.inputs,
            "optimizer state": self.resident - sharded - self.inputs,
            "while forward and backward run: parameters that are whole": peak.parameters,
            "  gradients, sharded or whole": peak.gradients,
            "  the reduce-scatter's buffer": peak.buffer,
            "  what is saved and what runs": peak.activations,
            "while the optimizer steps: sharded gradients": sharded,
            "  its scratch": self.step - sharded,
            "in all": self.resident + max(peak.total, self.step),
        }

    @property
    def step(self) -> int:
        """Bytes above what is resident while the optimizer steps."""
        return self.sharded.parameters + self.optimizer.scratch_bytes(self.sharded.parameters, self.sharded.largest)

    def needs(self, cut: FoldedCut) -> int:
        return max(self.resident + math.ceil(self.peak(cut).total * (1 + MARGIN)), self.floor(cut))

    def floor(self, cut: FoldedCut) -> int:
        """Bytes that no choice changes."""
        return self.resident + self.step

    def error(self, cut: FoldedCut, options: str) -> BudgetError:
        needed, peak = self.needs(cut), self.peak(cut)
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak on each of {self.sharded.ranks} ranks can't be met. The least that "
            f"{options} reaches here is {needed} bytes: {self.resident} of sharded parameters, optimizer state and "
            f"inputs, and the larger of {self.step} while the optimizer steps and {peak.total} predicted (and a margin) while "
            f"the backward runs: {peak.parameters} of whole parameters, {peak.gradients} of gradients, {peak.buffer} of "
            f"buffers and {peak.activations} of activations. Use memory_budget={needed} or more, more ranks, or a smaller "
            "batch.",
            needed,
        )

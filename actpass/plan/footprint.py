"""What one region of a training step takes in memory, and what the step takes that is made of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.04
"""What a predicted peak may fall short by: 2 % at most was seen (tests/test_liveness.py, tools/results/budgets-*.md)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one call of a region. forward, backward: the predicted peak while each runs, above what was there before the
    forward; the backward's contains what is kept and what is returned. kept: what crosses from forward to backward.
    returned: what the caller gets. gradients: what the backward leaves behind."""

    forward: int
    backward: int
    kept: int
    returned: int
    gradients: int


def step_peak(calls: Sequence[Footprint]) -> int:
    """The peak of a step that runs the forwards of ``calls`` in order and then their backwards in reverse order.

    What a region returns is taken to live until its own backward is done: the next region's backward reads it, or the
    caller's frame holds it.
    """
    peak = held = 0
    for call in calls:
        peak = max(peak, held + call.forward)
        held += call.kept + call.returned
    left = 0
    for call in reversed(calls):
        held -= call.kept + call.returned
        peak = max(peak, held + call.backward + left)
        left += call.gradients
    return peak

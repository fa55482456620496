"""What one region of a training step takes in memory, and what the step takes that is made of several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MARGIN = 0.04
"""What a predicted peak may fall short by: 2 % at most was seen (tests/test_liveness.py, tools/results/budgets-*.md)."""


class Call(Protocol):
    """One call of a region, in bytes. held: what stays when its forward is done, until its backward is. gradients: what its
    backward leaves behind. passed: gradients that it hands to the regions before it; tangents: those that it is given, which
    are contained in what it takes while it runs."""

    @property
    def held(self) -> int: ...
    @property
    def gradients(self) -> int: ...
    @property
    def passed(self) -> int: ...
    @property
    def tangents(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one call of a region. forward, backward: the predicted peak while each runs, above what was there before the
    forward; the backward's contains what is kept, what is returned, and the tangents. kept: what crosses from forward to
    backward. returned: what the caller gets. gradients, passed, tangents: see `Call`."""

    forward: int
    backward: int
    kept: int
    returned: int
    gradients: int
    passed: int
    tangents: int

    @property
    def held(self) -> int:
        return self.kept + self.returned


def levels_below(calls: Sequence[Call]) -> tuple[list[int], list[int]]:
    """What is in memory below the forward, and below the backward, of each of ``calls``, whose forwards run in order and then
    their backwards in reverse order.

    What a region returns is taken to live until its own backward is done: the next region's backward reads it, or the
    caller's frame holds it. A region's tangents are what the region behind passed to it, as far as that goes.
    """
    forwards = list(itertools.accumulate((c.held for c in calls[:-1]), initial=0))[: len(calls)]
    backwards: list[int] = []
    left = passed = 0
    for held, call in zip(reversed(forwards), reversed(calls), strict=True):
        left -= min(call.tangents, passed)
        backwards.append(held + left)
        left, passed = left + call.gradients + call.passed, call.passed
    return forwards, backwards[::-1]


def step_peak(calls: Sequence[Footprint]) -> int:
    """The peak of a step that runs the forwards of ``calls`` in order and then their backwards in reverse order."""
    levels = zip(calls, *levels_below(calls), strict=True)
    return max((max(forward + c.forward, backward + c.backward) for c, forward, backward in levels), default=0)

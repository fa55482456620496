"""One budget of peak bytes over the regions of a step: which level of its own ladder each of them takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from actpass.memory.footprint import MARGIN, Footprint, step_peak
from actpass.plan.knapsack import Option, least_bytes, solve

_CAPACITIES = 32


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A plan of one region. capacity: of saved bytes, from which the region finds it again. cost: see
    `actpass.plan.storage_options`. footprint: what it takes."""

    capacity: int
    cost: int
    footprint: Footprint


def needs(calls: Sequence[OperatingPoint]) -> int:
    """Bytes to allow above what is resident for a step of ``calls``: the predicted peak and its margin."""
    return int(step_peak([c.footprint for c in calls]) * (1 + MARGIN)) + 1


K = TypeVar("K", bound=Hashable)


def allocate_budget(
    calls: Sequence[K], ladders: Mapping[K, Sequence[OperatingPoint]], limit: int
) -> tuple[dict[K, OperatingPoint], int]:
    """The level of each region, and what the step then `needs`; more than ``limit`` if nothing is within it.

    calls: the regions of one step in the order of their forwards, a region once for each time it runs. A step's peak is what
    its regions keep, which adds up, and what one of them takes while it runs: for each bound on the latter and each capacity
    for the former the cheapest choice is looked at, and of those within ``limit`` the cheapest is taken. They are the same
    whatever the limit, so a smaller one never ends in a higher peak.
    """
    found: list[tuple[bool, int, int, dict[K, OperatingPoint]]] = []
    for bound in sorted({_running(level) for r in calls for level in ladders[r]}):
        allowed = {r: [level for level in ladders[r] if _running(level) <= bound] for r in calls}
        if all(allowed.values()):
            for chosen in _choices(calls, allowed):
                needed, cost = needs([chosen[r] for r in calls]), sum(chosen[r].cost for r in calls)
                fits = needed <= limit
                found.append((not fits, cost if fits else needed, needed, chosen))
    _, _, needed, chosen = min(found, key=lambda item: item[:3])
    return chosen, needed


def _running(level: OperatingPoint) -> int:
    """What a region takes while it runs."""
    return max(level.footprint.forward, level.footprint.backward)


def _choices(calls: Sequence[K], ladders: Mapping[K, Sequence[OperatingPoint]]) -> Iterator[dict[K, OperatingPoint]]:
    """The cheapest choice within each of some capacities of kept bytes."""
    counts = Counter(calls)
    menus = [[Option(level.footprint.kept * n, level.cost * n) for level in ladders[r]] for r, n in counts.items()]
    least, most = least_bytes(menus), sum(max(o.nbytes for o in menu) for menu in menus)
    for capacity in sorted({least + (most - least) * i // _CAPACITIES for i in range(_CAPACITIES + 1)}):
        solution = solve(menus, capacity)
        assert solution is not None
        yield {r: ladders[r][k] for r, k in zip(counts, solution.chosen, strict=True)}

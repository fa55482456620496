"""Where to cut the joint graph, what to run again and in which form to store the rest: what a memory budget decides.

A budget is met from the free cut, which runs no matmul again. Each tensor that crosses it gets a menu
(`actpass.plan.storage_options`), and the cheapest choice within a capacity of bytes is made at once for all
(`actpass.plan.knapsack`). What is to run again is told to upstream's partitioner, which cuts anew; what crosses then is chosen
a second time, for re-running changes what it is. A budget of peak bytes is a search for the largest capacity whose predicted
peak (`PartitionedGraph.peak_bytes`) is within it. Capacities are the same whatever the budget: where all are looked at, a
smaller one never ends in a higher peak.

With ``rank="budget"`` anywhere the ranks meet the budget and nothing else does: nothing is run again, everything is stored
as without a budget, and what is left of the capacity is shared out to the projections (`actpass.plan.rank_allocation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.analysis.saved_tensors import EARLY_GRADIENT
from actpass.codecs import QUANTIZERS
from actpass.errors import BudgetError
from actpass.plan import CodecSet
from actpass.plan.multi_region import Capacity, OperatingPoint, needs
from actpass.plan.policies import wanted_again
from actpass.planner.capacity_search import RANGE, CapacitySearch, Found
from actpass.planner.free_cut import no_recompute_partition
from actpass.planner.peak_budget import Limit, PeakBudget
from actpass.planner.rank_search import RankSearch
from actpass.planner.region import PartitionPlan, Region, sizes_in
from actpass.planner.storage_search import Search

_STEP = 0.92
"""From one capacity to the next, when a peak is searched for."""
_STEP_OF_LADDER = 0.75


def choose_cut(region: Region, cut_of: Callable[[PartitionPlan], PartitionedGraph], peak: PeakBudget | None) -> PartitionPlan:
    """The cut and the forms that the configuration asks for.

    peak: the budget, if it is one of peak bytes. cut_of: a choice as it will be compiled. Raises `BudgetError` where nothing
    meets the budget.
    """
    budget = region.config.memory_budget
    if budget == 1.0:
        return PartitionPlan(PartitionConstraints(recompute_materialized=False), region.default, {})
    free = no_recompute_partition(region)
    if budget is None:
        return _with_recomputation(region, free)
    if not region.config.ranks_from_budget:
        return _within(region, Search(region, free), cut_of, peak)
    search = RankSearch(region, free, cut_of)
    choice = _within(region, search, search.cut_of, peak)
    notes = [n for n in (search.note(choice), choice.note) if n is not None]
    return replace(choice, note="; ".join(notes) or None)


def _with_recomputation(region: Region, free: PartitionPlan) -> PartitionPlan:
    """``free``, or the cut that runs again what the policies want to be."""
    request_for = region.config.tensor_options_of_any
    tensors = region.tensors(free.cut) if region.config.recomputes else []
    recompute = wanted_again(tensors, request_for, sizes_in(free.cut), CodecSet.of(QUANTIZERS))
    if not recompute:
        return free
    names = frozenset(name for t in recompute for name in t.recompute or t.of_factors)
    constraints = PartitionConstraints(
        free.constraints.recompute_materialized, names, free.constraints.must_save - {t.base for t in recompute}
    )
    reasons = {t.base: reason for t, reason in recompute.items() if reason}
    return PartitionPlan(constraints, region.cut(constraints), None, reasons=reasons)


def _within(
    region: Region, search: CapacitySearch, cut_of: Callable[[PartitionPlan], PartitionedGraph], peak: PeakBudget | None
) -> PartitionPlan:
    """The best choice within the budget of the region."""
    budget = region.config.memory_budget
    if peak is not None and peak.capacity is not None:
        return search.at(peak.capacity.nbytes, recompute=peak.capacity.recompute).choice
    if peak is not None and peak.part:
        return _least_of_ladder(search, cut_of)
    if peak is not None:
        return within_peak(search, cut_of, peak)
    assert isinstance(budget, float)
    capacity = int(budget * region.default.saved_bytes)
    found = search.at(capacity)
    if found.stored <= capacity:
        return found.choice
    early = sum(t.nbytes for t in search.tensors if t.obstacle == EARLY_GRADIENT)
    smallest = min(found, search.at(search.least), key=lambda f: f.stored)
    if smallest.stored <= capacity + early:  # as little on top as can be: a larger budget never saves less
        note = f"the gradients that are formed early with the loss, {early} bytes, come on top of memory_budget={budget}"
        return replace(smallest.choice, note=note)
    if region.default.saved_bytes <= region.config.min_tensor_bytes:  # a loss behind a graph break: nothing to win there
        return smallest.choice
    least = smallest.stored - early
    fraction = math.ceil(100 * least / max(region.default.saved_bytes, 1)) / 100
    raise BudgetError(
        f"memory_budget={budget} asks to save {capacity} of the {region.default.saved_bytes} bytes that Inductor's default "
        f"saves for backward. The least that {region.config.tensor_options.described} reaches here is {least} bytes: use "
        f"memory_budget={fraction:.2f} or more.{search.reason_not_quantizable}",
        fraction,
    )


def alternatives(region: Region, count: int) -> list[tuple[int, PartitionPlan]]:
    """(capacity, choice) for ``count`` capacities of saved bytes, from the most that is of use down to the least, or a 64th."""
    search = Search(region, no_recompute_partition(region))
    most, least = search.most, max(search.least, search.most // RANGE)
    ratio = (least / most) ** (1 / (count - 1)) if most else 1.0
    capacities = [max(search.least, round(most * ratio**i)) for i in range(count)]
    return [(capacity, search.at(capacity).choice) for capacity in capacities]


def _least_of_ladder(search: CapacitySearch, cut_of: Callable[[PartitionPlan], PartitionedGraph]) -> PartitionPlan:
    """The choice with the least peak, and all of the ladder."""
    levels: list[tuple[OperatingPoint, PartitionPlan]] = []
    ladder = [*map(Capacity, search.capacities(_STEP_OF_LADDER))]
    if search.unlimited is not None:
        ladder.append(Capacity(search.unlimited, recompute=False))
    for capacity in ladder:
        found = search.at(capacity.nbytes, recompute=capacity.recompute)
        footprint = cut_of(found.choice).footprint
        levels.append((OperatingPoint(capacity, found.cost, footprint), found.choice))
    _, choice = min(levels, key=lambda item: (needs([item[0]]), item[0].cost))
    return replace(choice, levels=tuple(level for level, _ in levels))


def within_peak(search: CapacitySearch, cut_of: Callable[[PartitionPlan], Any], budget: Limit) -> PartitionPlan:
    """The choice of the largest capacity whose predicted peak is within ``budget``. Raises its error if there is none.

    A smaller capacity may have a higher peak: what is run again is in memory beside what it is needed for. So capacities are
    looked at from the largest down; of many tensors only each ``stride``-th, and those just above the first that fits. What is
    stored without a budget, with nothing run again, is taken where it fits and costs less, or nothing else fits.
    """
    looked = _Looked(search, cut_of, budget)
    capacities = [*map(Capacity, search.capacities(_STEP))]
    last = len(capacities) - 1
    first = next((i for i in (*range(0, last, search.stride), last) if looked.fits(capacities[i])), None)
    found: list[Found] = []
    if first is not None:
        first = next(i for i in range(max(0, first - search.stride + 1), first + 1) if looked.fits(capacities[i]))
        found.append(looked.at(capacities[first]))
    if first != 0 and search.unlimited is not None:
        plain = Capacity(search.unlimited, recompute=False)
        found += [looked.at(plain)] if looked.fits(plain) else []
    best = min(found, key=lambda f: f.cost, default=looked.least)
    if found and budget.needs(looked.cut_of(best)) <= budget.nbytes:
        return replace(best.choice, limited=first != 0)
    raise budget.error(looked.cut_of(best), search.region.config.tensor_options.described)


class _Looked:
    """Choices that were looked at, as they will be compiled: several capacities may give one."""

    def __init__(self, search: CapacitySearch, cut_of: Callable[[PartitionPlan], Any], budget: Limit) -> None:
        self._search, self._cut_of, self._budget = search, cut_of, budget
        self._found: dict[Capacity, Found] = {}
        self._cuts: dict[Hashable, Any] = {}

    def at(self, capacity: Capacity) -> Found:
        if capacity not in self._found:
            self._found[capacity] = self._search.at(capacity.nbytes, recompute=capacity.recompute)
        return self._found[capacity]

    def cut_of(self, found: Found) -> Any:
        if found.choice.key not in self._cuts:
            self._cuts[found.choice.key] = self._cut_of(found.choice)
        return self._cuts[found.choice.key]

    def fits(self, capacity: Capacity) -> bool:
        cut = self.cut_of(self.at(capacity))
        return self._budget.needs(cut) <= max(self._budget.nbytes, self._budget.floor(cut))

    @property
    def least(self) -> Found:
        """The one that needs the fewest bytes."""
        return min(self._found.values(), key=lambda found: self._budget.needs(self.cut_of(found)))

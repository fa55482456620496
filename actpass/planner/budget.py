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
from actpass.plan.multi_region import OperatingPoint, needs
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
        return search.at(peak.capacity).choice
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
    for capacity in search.capacities(_STEP_OF_LADDER):
        found = search.at(capacity)
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
    capacities = search.capacities(_STEP)
    known: dict[int, Found] = {}
    cuts: dict[Hashable, Any] = {}  # several capacities may give one choice

    def cut(found: Found) -> Any:
        if found.choice.key not in cuts:
            cuts[found.choice.key] = cut_of(found.choice)
        return cuts[found.choice.key]

    def fits(found: Found) -> bool:
        return budget.needs(cut(found)) <= max(budget.nbytes, budget.floor(cut(found)))

    def is_enough(i: int) -> bool:
        known[i] = known[i] if i in known else search.at(capacities[i])
        return fits(known[i])

    last = len(capacities) - 1
    first = next((i for i in (*range(0, last, search.stride), last) if is_enough(i)), None)
    if first is not None:
        first = next(i for i in range(max(0, first - search.stride + 1), first + 1) if is_enough(i))
    looked = [*known.values()] if first is None else [known[first]]
    plain = search.unlimited if first != 0 else None
    looked += [plain] if plain is not None else []
    fitting = [found for found in looked if fits(found)]
    best = min(fitting, key=lambda f: f.cost) if fitting else min(looked, key=lambda f: budget.needs(cut(f)))
    if budget.needs(cut(best)) <= budget.nbytes:
        return replace(best.choice, limited=first != 0)
    raise budget.error(cut(best), search.region.config.tensor_options.described)

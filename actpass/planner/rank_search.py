"""Which ranks the projections take within a capacity of saved bytes, where nothing else may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from actpass.analysis.partitioned import PartitionedGraph
from actpass.plan import SavedTensor, noise, rank_sites
from actpass.plan.rank_allocation import RankSite, bytes_at, choose_ranks, least_bytes
from actpass.plan.storage_options import NOISE_PER_STEP, SHARE_IN_A_CONTRACTION, UNIT
from actpass.planner.capacity_search import RANGE, TRIES, Found
from actpass.planner.region import PartitionPlan, Region


class RankSearch:
    """Choices of ranks within capacities of saved bytes (a `CapacitySearch`). cut_of: a choice as it will be compiled."""

    stride = 8  # each look rewrites and cuts anew
    unlimited = None  # nothing is run again at any capacity

    def __init__(self, region: Region, free: PartitionPlan, cut_of: Callable[[PartitionPlan], PartitionedGraph]) -> None:
        self.region, self.free, self._cut_of = region, free, cut_of
        self.candidates = region.candidates(free.cut)
        self.residual_energies = dict(region.config.residual_energies)
        self.sites = rank_sites(self.candidates, region.config.tensor_options_of_any, residual_energies=self.residual_energies)
        self._cuts: dict[tuple[int, ...], PartitionedGraph] = {}

    def cut_of(self, choice: PartitionPlan) -> PartitionedGraph:
        """As given, once for the same ranks."""
        ranks = tuple((choice.ranks or {}).values())
        if ranks not in self._cuts:
            self._cuts[ranks] = self._cut_of(choice)
        return self._cuts[ranks]

    @property
    def tensors(self) -> list[SavedTensor]:
        return self.region.saved(self.region.joint, self.free.cut)

    @property
    def _listed(self) -> list[RankSite]:
        return list(self.sites.values())

    @cached_property
    def _smallest(self) -> Found:
        return self._found([s.least for s in self._listed])

    @property
    def least(self) -> int:
        return self._smallest.stored

    def capacities(self, step: float) -> list[int]:
        """As those of `actpass.planner.storage_search.Search`, of what is left for the projections."""
        most, least = bytes_at(self._listed, [s.most for s in self._listed]), least_bytes(self._listed)
        found = [most]
        while found[-1] * step > max(least, most / RANGE):
            found.append(int(found[-1] * step))
        return [self.least - least + room for room in (*found, least)]

    def at(self, capacity: int) -> Found:
        """The choice with the least error within ``capacity``, or the smallest ranks. What is stored besides does not depend
        on the ranks, but for a basis that crosses or a payload too small to be coded: what it comes to is looked at."""
        best = self._smallest
        room = least_bytes(self._listed) + capacity - best.stored
        tried: set[int] = set()
        while room not in tried and len(tried) < TRIES:
            tried.add(room)
            ranks = choose_ranks(self._listed, room)
            if ranks is None:
                break
            found = self._found(ranks)
            if found.stored <= capacity and found.cost <= best.cost:
                best = found
            room = bytes_at(self._listed, ranks) + capacity - found.stored
        return best

    def _found(self, ranks: Sequence[int]) -> Found:
        choice = replace(self.free, ranks=dict(zip(self.sites, ranks, strict=True)))
        error = UNIT * NOISE_PER_STEP * SHARE_IN_A_CONTRACTION * self._noise(choice)
        return Found(choice, self.cut_of(choice).saved_bytes, round(error))

    def _noise(self, choice: PartitionPlan) -> float:
        request_for, ranks = self.region.config.tensor_options_of_any, choice.ranks or {}
        return noise(self.candidates, request_for, self.sites, ranks, residual_energies=self.residual_energies)

    @property
    def reason_not_quantizable(self) -> str:
        """What no rank makes smaller, the largest first; the end of an error."""
        roots = {c.base for c in self.candidates if c.key in self.sites}
        storages = self.region.storages(self.region.joint, self.free)
        others = sorted((-s.stored_bytes, s.node) for s in storages if s.base not in roots)
        listed = ", ".join(f"{name} ({-nbytes})" for nbytes, name in others[:3])
        return (
            f" Only {len(roots)} of the tensors that are stored serve weight gradients alone, and no rank makes another "
            f"smaller; the largest of these are {listed or 'none'}. With rank='budget' nothing is run again: without it "
            "memory_budget does that."
        )

    def note(self, choice: PartitionPlan) -> str | None:
        """What the ranks come to; None without any."""
        if not self.sites or choice.ranks is None:
            return None
        taken = bytes_at(self._listed, list(choice.ranks.values()))
        whole = bytes_at(self._listed, [s.most for s in self._listed])
        return (
            f"ranks from the budget for {len(self.sites)} tensors: {taken} bytes in place of {whole}, the sum of ranks "
            f"{sum(choice.ranks.values())} of {sum(s.most for s in self._listed)}; expected squared relative error of all "
            f"weight gradients, by their elements, {self._noise(choice):.3g}"
        )

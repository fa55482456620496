"""Which tensors to run again and how to store the others within a capacity of saved bytes."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from actpass.analysis.partitioned import PartitionConstraints
from actpass.codecs import QUANTIZERS
from actpass.plan import CodecSet, SavedTensor, choose_storage
from actpass.plan.knapsack import Option, least_bytes, solve
from actpass.plan.plan import RECOMPUTE, SAVE
from actpass.plan.request import RequestFor
from actpass.plan.storage_options import Costs, StorageOptions, bytes_in, storage_options
from actpass.plan.store import StoredBytes
from actpass.planner.capacity_search import RANGE, TRIES, Found, Searched
from actpass.planner.region import PartitionPlan

R = TypeVar("R", bound=Searched)


class _Crossing:
    """What crosses one cut, and the menus of it."""

    def __init__(
        self,
        constraints: PartitionConstraints,
        cut: Any,
        tensors: list[SavedTensor],
        request_for: RequestFor,
        sizes: StoredBytes,
        costs: Costs,
    ) -> None:
        self.constraints, self.cut, self.tensors = constraints, cut, tensors
        self.sizes, self._request_for, self.costs = sizes, request_for, costs
        self._menus: dict[tuple[str | None, bool], list[StorageOptions]] = {}
        self._bytes: dict[str, int] = {}

    @property
    def widths(self) -> tuple[str, ...]:
        """The codecs that are offered, the finest first."""
        return self.costs.codecs.offered

    def storage_options(self, coarsest_codec: str | None, *, recompute: bool) -> list[StorageOptions]:
        key = coarsest_codec, recompute
        if key not in self._menus:
            self._menus[key] = storage_options(
                self.tensors, self._request_for, self.sizes, self.costs, recompute=recompute, coarsest_codec=coarsest_codec
            )
        return self._menus[key]

    def bytes_in(self, width: str) -> int:
        if width not in self._bytes:
            self._bytes[width] = bytes_in(width, self.tensors, self._request_for, self.sizes, self.costs.codecs)
        return self._bytes[width]


class Search(Generic[R]):
    """Choices of what to run again and of forms within capacities of saved bytes (a `CapacitySearch`)."""

    reason_not_quantizable = ""

    def __init__(self, region: R, free: PartitionPlan) -> None:
        self.region, self.free = region, free
        self._base = self._crossing(free.constraints, free.cut)
        self._cuts = {frozenset[str](): self._base}

    def _crossing(self, constraints: PartitionConstraints, cut: Any) -> _Crossing:
        tensors = self.region.tensors(cut)
        sizes, costs = self.region.sizes(cut), self.region.costs(cut, tensors)
        return _Crossing(constraints, cut, tensors, self.region.config.tensor_options_of_any, sizes, costs)

    @property
    def tensors(self) -> list[SavedTensor]:
        """What crosses the free cut."""
        return self._base.tensors

    @property
    def stride(self) -> int:
        """All capacities are looked at where few layers are cut, each fourth where many are: it takes a cut or two each."""
        return min(4, 1 + len(self.tensors) // 64)

    @property
    def _options(self) -> list[tuple[Option, ...]]:
        return [m.options for m in self._base.storage_options(None, recompute=True)]

    @property
    def least(self) -> int:
        return least_bytes(self._options)

    @property
    def most(self) -> int:
        return sum(max(o.nbytes for o in options) for options in self._options)

    def capacities(self, step: float) -> list[int]:
        """From the most bytes down, each ``step`` times the one before, and the least at the end."""
        found = [self.most]
        while found[-1] * step > max(self.least, self.most / RANGE):
            found.append(int(found[-1] * step))
        return [*found, self.least]

    @property
    def unlimited(self) -> Found:
        """What is chosen without a budget, with nothing run again: that is in memory beside what it is needed for, and fewer
        bits may have the lower peak."""
        crossing, costs = self._base, self._base.costs
        storages = choose_storage(
            crossing.tensors, self.region.config.tensor_options_of_any, crossing.sizes, CodecSet.of(QUANTIZERS)
        )
        codecs = {s.node: None if s.codec == SAVE else s.codec for s in storages}
        stored = sum(s.stored_bytes for s in storages)
        cost = sum(costs.of_form(t, s.codec, s.stored_bytes) for t, s in zip(crossing.tensors, storages, strict=True))
        return Found(PartitionPlan(crossing.constraints, crossing.cut, codecs), stored, cost)

    def at(self, capacity: int) -> Found:
        """The cheapest choice within ``capacity``, or the smallest that was found.

        Where everything fits in one width, nothing takes a coarser one, if that can be met with queries and keys in forms that
        are safe: an error is weighed against time, and one tensor in 8 bits where 16 do for all is a worse gradient.
        """
        widths = self._base.widths
        widest = next((i for i, w in enumerate(widths) if self._base.bytes_in(w) <= capacity), len(widths) - 1)
        found: list[Found] = []
        for coarsest_codec in widths[widest:]:
            found.append(self._at(capacity, coarsest_codec))
            if found[-1].stored <= capacity:
                return found[-1]
        return min(found, key=lambda f: f.stored)

    def _at(self, capacity: int, coarsest_codec: str) -> Found:
        found: list[Found] = []
        target = capacity
        for _ in range(TRIES):
            found.append(self._settle(self._rerun(target, coarsest_codec), capacity, coarsest_codec))
            if found[-1].stored <= capacity:
                return found[-1]
            if target <= self.least:
                break
            target = max(self.least, target - (found[-1].stored - capacity))
        found.append(self._settle([], capacity, coarsest_codec))
        return min(found, key=lambda f: f.stored)

    def _rerun(self, capacity: int, coarsest_codec: str) -> list[tuple[StorageOptions, int]]:
        listed = self._base.storage_options(coarsest_codec, recompute=True)
        return [(m, k) for m, k in zip(listed, _solve(listed, capacity), strict=True) if m.recompute[k]]

    def _settle(self, rerun: list[tuple[StorageOptions, int]], capacity: int, coarsest_codec: str) -> Found:
        """Cut with what is run again, and choose the forms of what then crosses."""
        names = frozenset(name for menu, k in rerun for name in menu.recompute[k])
        if names not in self._cuts:
            gone = {
                t.base for menu, k in rerun for t, form in zip(menu.members, menu.forms[k], strict=True) if form == RECOMPUTE
            }
            constraints = PartitionConstraints(
                self.free.constraints.recompute_materialized, names, self.free.constraints.must_save - gone
            )
            self._cuts[names] = self._crossing(constraints, self.region.cut(constraints))
        crossing = self._cuts[names]
        listed = crossing.storage_options(coarsest_codec, recompute=False)
        taken = [(m, k) for m, k in zip(listed, _solve(listed, capacity), strict=True)]
        codecs = {t.node: form for menu, k in taken for t, form in zip(menu.members, menu.forms[k], strict=True)}
        chosen = {node: None if form == SAVE else form for node, form in codecs.items()}
        recompute = sum(menu.options[k].cost for menu, k in rerun)
        stored, cost = (sum(getattr(menu.options[k], name) for menu, k in taken) for name in ("nbytes", "cost"))
        return Found(PartitionPlan(crossing.constraints, crossing.cut, chosen), stored, cost + recompute)


def _solve(listed: list[StorageOptions], capacity: int) -> tuple[int, ...]:
    """The option of each menu: the cheapest within ``capacity``, or the smallest."""
    options = [m.options for m in listed]
    solution = solve(options, max(capacity, least_bytes(options)))
    assert solution is not None
    return solution.chosen

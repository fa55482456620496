"""Where to cut the joint graph, what to run again and in which form to store the rest: what a memory budget decides.

A budget is met from the free cut, which runs no matmul again. Each tensor that crosses it gets a menu (`actpass.plan.menu`),
and the cheapest choice within a capacity of bytes is made at once for all (`actpass.plan.knapsack`). What is to run again is
told to upstream's partitioner, which cuts anew; what crosses then is chosen a second time, for re-running changes what it is.
A budget of peak bytes is a search for the largest capacity whose predicted peak (`Cut.peak_bytes`) is within it: capacities
are the same whatever the budget, so that a smaller one never ends in a higher peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from actpass.config import Config
from actpass.errors import BudgetError
from actpass.graph import Finding, Joint
from actpass.graph.joint import value
from actpass.graph.recompute import Recomputation
from actpass.partition import Cut, Setting, cut
from actpass.plan import SavedTensor, Storage, choose_storage
from actpass.plan.knapsack import least_bytes, solve
from actpass.plan.menu import AGAIN, Costs, Menu, menus
from actpass.plan.policy import StoredBytes
from actpass.plan.spread import Level, needs
from actpass.plan.types import KEEP
from actpass.runtime.resident import Resident
from actpass.saved import EARLY_GRADIENT, find_saved
from actpass.swap import layout_of

_STEP = 0.92
"""From one capacity to the next, when a peak is searched for."""
_STEP_OF_LADDER = 0.75
_RANGE = 64
_TRIES = 4

_MARGIN = 0.04
_MARGIN_AGAIN = 0.16
"""What a prediction may fall short by, without and with anything run again: then Inductor fuses what belongs to different
layers, in ways that the prediction does not see, by up to 14 % on small models."""


@dataclass(frozen=True, slots=True)
class PeakBudget:
    """nbytes: of the peak of a step, with what is resident counted in. part: whether the region is one of several of a model
    with graph breaks: it is compiled at its least peak first, and when a step has shown all regions, at the ``capacity`` of
    saved bytes that one plan over all gave it."""

    nbytes: int
    resident: Resident
    part: bool = False
    capacity: int | None = None

    def needs(self, choice: Choice, cut: Any) -> int:
        """Bytes to allow for ``choice``, which is ``cut`` when it is carried out."""
        return max(self.resident.total + math.ceil(cut.peak_bytes * (1 + margin(choice))), self.floor(cut))

    def floor(self, cut: Any) -> int:
        """Bytes that no choice changes: while the optimizer steps, beside all gradients."""
        return self.resident.total + cut.footprint.gradients + self.resident.scratch

    def error(self, choice: Choice, cut: Any, method: str) -> BudgetError:
        """For when even ``choice`` needs too much."""
        needed = self.needs(choice, cut)
        step = cut.footprint.gradients + self.resident.scratch
        largest = ", ".join(f"{name} ({nbytes})" for name, nbytes in cut.largest_at_peak[:3])
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak can't be met. The least that method={method!r} reaches here is "
            f"{needed} bytes: {self.resident}, and above them the larger of {step} while the optimizer steps and "
            f"{cut.peak_bytes} predicted before (and a margin), the largest of which are {largest}. Use "
            f"memory_budget={needed} or more, or a smaller batch.",
            needed,
        )


def margin(choice: Choice) -> float:
    return _MARGIN_AGAIN if choice.setting.again else _MARGIN


@dataclass(frozen=True)
class Choice:
    """setting, cut: where the joint graph is cut. codecs: by node, the form of what ``auto`` decides; None: its own rule. note:
    what the user should know of it. levels: what else a part of a step could be, for one plan over all parts."""

    setting: Setting
    cut: Cut
    codecs: Mapping[str, str | None] | None
    note: str | None = None
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Region:
    """One joint graph on its way. default: Inductor's own cut of it (before the loss went to pieces, if it did). chunked:
    whether it did."""

    joint: Joint
    joint_inputs: Sequence[object]
    kwargs: Mapping[str, Any]
    config: Config
    finding: Finding
    default: Cut
    chunked: bool

    def cut(self, setting: Setting) -> Cut:
        return cut(self.joint, self.joint_inputs, self.kwargs, setting)

    def tensors(self, cut: Cut) -> list[SavedTensor]:
        """What crosses ``cut``, and what it takes to run it again."""
        return self.saved(self.joint, cut, self.recomputation)

    def sizes(self, cut: Cut) -> StoredBytes:
        return sizes_in(cut)

    @property
    def step_flops(self) -> int:
        return self.recomputation.step_flops

    @cached_property
    def recomputation(self) -> Recomputation:
        return Recomputation(self.joint)

    @cached_property
    def _weights(self) -> dict[str, tuple[str, ...]]:
        return {c.node: c.parameters for c in self.finding.contractions}

    def saved(self, joint: Joint, cut: Cut, recomputation: Recomputation | None = None) -> list[SavedTensor]:
        """What crosses ``cut`` of ``joint``: of this one, or of what was rewritten of it."""
        return find_saved(cut, joint, self._weights, self.config.smallest, recomputation)

    def storages(self, joint: Joint, choice: Choice) -> tuple[Storage, ...]:
        """In which form everything that crosses is stored."""
        tensors = self.saved(joint, choice.cut)
        return choose_storage(tensors, self.config.treatment_of_any, sizes_in(choice.cut), choice.codecs)


def sizes_in(cut: Cut) -> StoredBytes:
    """Bytes of a tensor that crosses ``cut`` in a codec and a group size."""
    nodes = {n.name: n for n in cut.forward.graph.nodes}

    def stored_bytes(tensor: SavedTensor, codec: str, group: int | None) -> int | None:
        layout = layout_of(value(nodes[tensor.node]), codec, group)
        return layout.nbytes if layout is not None else None

    return stored_bytes


def choose_cut(region: Region, cut_of: Callable[[Choice], Cut], peak: PeakBudget | None) -> Choice:
    """The cut and the forms that the configuration asks for.

    peak: the budget, if it is one of peak bytes. cut_of: a choice as it will be compiled. Raises `BudgetError` where nothing
    meets the budget.
    """
    budget = region.config.memory_budget
    if budget == 1.0:
        return Choice(Setting(rebuild=False), region.default, {})
    free = free_choice(region)
    if budget is None:
        return free
    search = Search(region, free)
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
    early = sum(t.nbytes for m in search.menus for t in m.members if t.obstacle == EARLY_GRADIENT)
    found = search.at(capacity + early)
    if found.stored <= capacity + early:
        note = f"the gradients that are formed early with the loss, {early} bytes, come on top of memory_budget={budget}"
        return replace(found.choice, note=note)
    smallest = search.at(search.least)
    if region.default.saved_bytes <= region.config.smallest:  # a loss behind a graph break: nothing to win there
        return smallest.choice
    least = min(found.stored, smallest.stored) - early
    fraction = math.ceil(100 * least / max(region.default.saved_bytes, 1)) / 100
    raise BudgetError(
        f"memory_budget={budget} asks to save {capacity} of the {region.default.saved_bytes} bytes that Inductor's default "
        f"saves for backward. The least that method={region.config.treatment.method!r} reaches here is {least} bytes: use "
        f"memory_budget={fraction:.2f} or more.",
        fraction,
    )


def free_choice(region: Region) -> Choice:
    """The cut that runs no matmul again and has the fewest bytes, as they will be stored.

    The residual stream is asked for as such where that costs nothing: upstream would as soon save every addend of it, which
    the backward then adds up, layer by layer, and holds.
    """
    plain = Setting(rebuild=True)
    setting, found = plain, region.cut(plain)
    sums = frozenset(n.name for n in region.recomputation.residual_sums)
    if sums:
        kept = Setting(rebuild=True, keep=sums)
        other = region.cut(kept)
        if other.saved_bytes <= found.saved_bytes:
            setting, found = kept, other
    free = Choice(setting, found, None)
    default = Choice(Setting(rebuild=False), region.default, None)
    if not region.chunked and _stored(region, free) > _stored(region, default):
        return default
    return free


def _stored(region: Region, choice: Choice) -> int:
    return sum(s.stored_bytes for s in region.storages(region.joint, choice))


@dataclass(frozen=True, slots=True)
class _Found:
    """choice, the bytes that it stores, and what it costs."""

    choice: Choice
    stored: int
    cost: int


class Searched(Protocol):
    """What a search asks of a region, be it one that was traced or one that is reckoned (`actpass.folded`)."""

    @property
    def config(self) -> Config: ...
    @property
    def step_flops(self) -> int: ...
    def cut(self, setting: Setting) -> Any: ...
    def tensors(self, cut: Any) -> list[SavedTensor]: ...
    def sizes(self, cut: Any) -> StoredBytes: ...


class Search:
    """Choices within capacities of saved bytes."""

    def __init__(self, region: Searched, free: Choice) -> None:
        self.region, self.free = region, free
        self.menus = self._menus(free.cut, again=True)
        self.cuts: dict[frozenset[str], tuple[Setting, Cut, list[Menu]]] = {}

    def _menus(self, cut: Cut, *, again: bool) -> list[Menu]:
        tensors = self.region.tensors(cut)
        costs = Costs(self.region.step_flops, sum(t.elements for t in tensors))
        return menus(tensors, self.region.config.treatment_of_any, self.region.sizes(cut), costs, again=again)

    @property
    def least(self) -> int:
        return least_bytes([m.options for m in self.menus])

    @property
    def most(self) -> int:
        return sum(max(o.nbytes for o in m.options) for m in self.menus)

    def capacities(self, step: float) -> list[int]:
        """From the most bytes down, each ``step`` times the one before, and the least at the end."""
        found = [self.most]
        while found[-1] * step > max(self.least, self.most / _RANGE):
            found.append(int(found[-1] * step))
        return [*found, self.least]

    def at(self, capacity: int) -> _Found:
        """The cheapest choice within ``capacity``, or the smallest that was found."""
        smallest: _Found | None = None
        target = capacity
        for _ in range(_TRIES):
            found = self._settle(self._rerun(target), capacity)
            if smallest is None or found.stored < smallest.stored:
                smallest = found
            if found.stored <= capacity or target <= self.least:
                break
            target = max(self.least, target - (found.stored - capacity))
        assert smallest is not None
        return smallest

    def _rerun(self, capacity: int) -> list[tuple[Menu, int]]:
        return [(m, k) for m, k in zip(self.menus, _solve(self.menus, capacity), strict=True) if m.again[k]]

    def _settle(self, rerun: list[tuple[Menu, int]], capacity: int) -> _Found:
        """Cut with what is run again, and choose the forms of what then crosses."""
        names = frozenset(name for menu, k in rerun for name in menu.again[k])
        if names not in self.cuts:
            gone = {t.root for menu, k in rerun for t, form in zip(menu.members, menu.forms[k], strict=True) if form == AGAIN}
            setting = Setting(self.free.setting.rebuild, names, self.free.setting.keep - gone)
            where = self.region.cut(setting) if names else self.free.cut
            self.cuts[names] = setting, where, self._menus(where, again=False)
        setting, where, listed = self.cuts[names]
        taken = [(m, k) for m, k in zip(listed, _solve(listed, capacity), strict=True)]
        codecs = {t.node: form for menu, k in taken for t, form in zip(menu.members, menu.forms[k], strict=True)}
        chosen = {node: None if form == KEEP else form for node, form in codecs.items()}
        again = sum(menu.options[k].cost for menu, k in rerun)
        stored, cost = (sum(getattr(menu.options[k], name) for menu, k in taken) for name in ("nbytes", "cost"))
        return _Found(Choice(setting, where, chosen), stored, cost + again)


def _solve(listed: list[Menu], capacity: int) -> tuple[int, ...]:
    """The option of each menu: the cheapest within ``capacity``, or the smallest."""
    options = [m.options for m in listed]
    solution = solve(options, max(capacity, least_bytes(options)))
    assert solution is not None
    return solution.chosen


def _least_of_ladder(search: Search, cut_of: Callable[[Choice], Cut]) -> Choice:
    """The choice with the least peak, and all of the ladder."""
    levels: list[tuple[Level, Choice]] = []
    for capacity in search.capacities(_STEP_OF_LADDER):
        found = search.at(capacity)
        footprint = cut_of(found.choice).footprint
        levels.append((Level(capacity, found.cost, margin(found.choice), footprint), found.choice))
    _, choice = min(levels, key=lambda item: (needs([item[0]]), item[0].cost))
    return replace(choice, levels=tuple(level for level, _ in levels))


class Limit(Protocol):
    """A budget of peak bytes, of one device or of each rank."""

    @property
    def nbytes(self) -> int: ...
    def needs(self, choice: Choice, cut: Any) -> int: ...
    def floor(self, cut: Any) -> int: ...
    def error(self, choice: Choice, cut: Any, method: str) -> BudgetError: ...


def within_peak(search: Search, cut_of: Callable[[Choice], Any], budget: Limit, stride: int = 1) -> Choice:
    """The choice of the largest capacity whose predicted peak is within ``budget``. Raises its error if there is none. stride: of
    the capacities, every so many are tried if the least bytes do not meet the budget."""
    capacities = search.capacities(_STEP)
    known: dict[int, tuple[Choice, Any]] = {}

    def fits(i: int) -> bool:
        if i not in known:
            choice = search.at(capacities[i]).choice
            known[i] = choice, cut_of(choice)
        return budget.needs(*known[i]) <= max(budget.nbytes, budget.floor(known[i][1]))

    low, high = 0, len(capacities) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    if not fits(low):  # the least bytes need not have the least peak
        low = next((i for i in range(0, len(capacities), stride) if fits(i)), -1)
    if low >= 0 and budget.needs(*known[low]) <= budget.nbytes:
        return known[low][0]
    least = known[low] if low >= 0 else min(known.values(), key=lambda item: budget.needs(*item))
    raise budget.error(*least, search.region.config.treatment.method)

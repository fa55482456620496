"""Where to cut the joint graph, what to run again and in which form to store the rest: what a memory budget decides.

A budget is met from the free cut, which runs no matmul again. Each tensor that crosses it gets a menu
(`actpass.plan.storage_options`), and the cheapest choice within a capacity of bytes is made at once for all
(`actpass.plan.knapsack`). What is to run again is told to upstream's partitioner, which cuts anew; what crosses then is chosen
a second time, for re-running changes what it is. A budget of peak bytes is a search for the largest capacity whose predicted
peak (`Cut.peak_bytes`) is within it: capacities are the same whatever the budget, so that a smaller one never ends in a higher
peak.

With ``rank="budget"`` anywhere the ranks meet the budget and nothing else does: nothing is run again, everything is stored
as without a budget, and what is left of the capacity is shared out to the projections (`actpass.plan.rank_allocation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from actpass.analysis.partitioned import PartitionConstraints, PartitionedGraph
from actpass.analysis.projection_sites import find_projection_sites
from actpass.analysis.rematerialization import Recomputation
from actpass.analysis.saved_tensors import EARLY_GRADIENT, find_saved
from actpass.analysis.weight_gradients import WeightGradientMatmuls
from actpass.codecs import QUANTIZERS
from actpass.errors import BudgetError
from actpass.ir.joint_graph import Joint, module_path, tensor_bytes, value
from actpass.memory.footprint import MARGIN, Footprint, step_peak
from actpass.memory.resident import Resident
from actpass.options import Config
from actpass.passes.partition import cut
from actpass.passes.quantize_saved import layout_of
from actpass.plan import Candidate, CodecSet, SavedTensor, Storage, choose_storage, noise, rank_sites
from actpass.plan.knapsack import Option, least_bytes, solve
from actpass.plan.multi_region import OperatingPoint, needs
from actpass.plan.plan import RECOMPUTE, SAVE
from actpass.plan.policies import wanted_again
from actpass.plan.policy import RequestFor
from actpass.plan.rank_allocation import RankSite, bytes_at, choose_ranks
from actpass.plan.rank_allocation import least_bytes as least_bytes_of_ranks
from actpass.plan.sensitivity import Sensitivity
from actpass.plan.storage_options import (
    NOISE_PER_STEP,
    SHARE_IN_A_CONTRACTION,
    UNIT,
    Costs,
    StorageOptions,
    bytes_in,
    storage_options,
)
from actpass.plan.store import StoredBytes
from actpass.torch_compat import Sizes, size_hint

_STEP = 0.92
"""From one capacity to the next, when a peak is searched for."""
_STEP_OF_LADDER = 0.75
_RANGE = 64
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Headroom:
    """What sizes that change from call to call are taken for when a region is planned, and bytes that its inputs take more than
    those that were traced."""

    sizes: Sizes
    more: int


@dataclass(frozen=True, slots=True)
class PeakBudget:
    """nbytes: of the peak of a step, with what is resident counted in. part: whether the region is one of several of a model
    with graph breaks: it is compiled at its least peak first, and when a step has shown all regions, at the ``capacity`` of
    saved bytes that one plan over all gave it. headrooms: which to plan for, the first that can be met."""

    nbytes: int
    resident: Resident
    part: bool = False
    capacity: int | None = None
    headrooms: tuple[Headroom, ...] = ()

    def within(self, headroom: Headroom) -> PeakBudget:
        """What is left beside inputs of that size."""
        return replace(self, resident=self.resident.with_more(headroom.more), headrooms=())

    def needs(self, cut: Any) -> int:
        """Bytes to allow for what will be compiled as ``cut``."""
        return self.needs_of(cut.footprint)

    def needs_of(self, footprint: Footprint) -> int:
        return max(self.resident.total + math.ceil(step_peak([footprint]) * (1 + MARGIN)), self._floor_of(footprint))

    def floor(self, cut: Any) -> int:
        """Bytes that no choice changes: while the optimizer steps, beside all gradients."""
        return self._floor_of(cut.footprint)

    def _floor_of(self, footprint: Footprint) -> int:
        return self.resident.total + footprint.gradients + self.resident.scratch

    def error_of_step(self, footprint: Footprint) -> BudgetError | None:
        """For when no plan leaves enough for the optimizer's step."""
        needed, step = self._floor_of(footprint), footprint.gradients + self.resident.scratch
        if needed <= self.nbytes:
            return None
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak can't be met beside this optimizer: while it steps it takes {needed} "
            f"bytes, {self.resident}, and {step} of gradients and what a step takes for a moment. Use memory_budget={needed} "
            "or more, or an optimizer with less state.",
            needed,
        )

    def error(self, cut: Any, options: str) -> BudgetError:
        """For when even ``cut`` needs too much."""
        needed = self.needs(cut)
        step = cut.footprint.gradients + self.resident.scratch
        largest = ", ".join(f"{name} ({nbytes})" for name, nbytes in cut.largest_at_peak[:3])
        return BudgetError(
            f"memory_budget={self.nbytes} bytes of peak can't be met. The least that {options} reaches here is "
            f"{needed} bytes: {self.resident}, and above them the larger of {step} while the optimizer steps and "
            f"{cut.peak_bytes} predicted before (and a margin), the largest of which are {largest}. Use "
            f"memory_budget={needed} or more, or a smaller batch.",
            needed,
        )


@dataclass(frozen=True)
class PartitionPlan:
    """setting, cut: where the joint graph is cut. codecs: by node, the form of what ``auto`` decides; None: its own rule. note:
    what the user should know of it. levels: what else a part of a step could be, for one plan over all parts. ranks: of the
    projections that take theirs from the budget, by `Candidate.key`; None: there is no limit. limited: whether a larger budget
    of peak bytes may give another."""

    constraints: PartitionConstraints
    cut: PartitionedGraph
    codecs: Mapping[str, str | None] | None
    note: str | None = None
    levels: tuple[OperatingPoint, ...] = ()
    ranks: Mapping[str, int] | None = None
    limited: bool = False

    @property
    def key(self) -> Hashable:
        """Equal for choices that are carried out alike."""
        codecs, ranks = (None if m is None else tuple(sorted(m.items(), key=str)) for m in (self.codecs, self.ranks))
        return self.constraints, codecs, ranks


@dataclass(frozen=True)
class Region:
    """One joint graph on its way. default: Inductor's own cut of it (before the loss went to pieces, if it did).
    chunk_rows: of a piece of the loss; 0: it is formed whole."""

    joint: Joint
    joint_inputs: Sequence[object]
    kwargs: Mapping[str, Any]
    config: Config
    finding: WeightGradientMatmuls
    default: PartitionedGraph
    chunk_rows: int
    _saved: dict[tuple[int, bool], tuple[PartitionedGraph, list[SavedTensor]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def cut(self, constraints: PartitionConstraints) -> PartitionedGraph:
        return cut(self.joint, self.joint_inputs, self.kwargs, constraints)

    def tensors(self, cut: PartitionedGraph) -> list[SavedTensor]:
        """What crosses ``cut``, and what it takes to run it again."""
        return self.saved(self.joint, cut, self.recomputation)

    def sizes(self, cut: PartitionedGraph) -> StoredBytes:
        return sizes_in(cut)

    @cached_property
    def recomputation(self) -> Recomputation:
        return Recomputation(self.joint)

    @cached_property
    def step_flops(self) -> int:
        """FLOPs of the matmuls and fused attentions of one step without recomputation, those of the loss's pieces with them."""
        graphs = (self.default.forward.graph, self.default.backward.graph)
        return sum(self.recomputation.flops(list(g.nodes)) for g in graphs)

    @cached_property
    def _weights(self) -> dict[str, tuple[str, ...]]:
        return {c.node: c.parameters for c in self.finding.contractions}

    def saved(self, joint: Joint, cut: PartitionedGraph, recomputation: Recomputation | None = None) -> list[SavedTensor]:
        """What crosses ``cut`` of ``joint``: of this one (each cut is read once), or of what was rewritten of it."""
        key = id(cut), recomputation is not None
        if joint is self.joint and key in self._saved:
            return self._saved[key][1]
        found = find_saved(cut, joint, self._weights, self.config.min_tensor_bytes, recomputation)
        if joint is self.joint:
            self._saved[key] = cut, found  # the cut as well: an id without its owner may come again
        return found

    def costs(self, cut: PartitionedGraph, tensors: Sequence[SavedTensor]) -> Costs:
        """What forms of ``tensors``, which cross ``cut``, are weighed by."""
        return Costs(self.step_flops, sum(t.elements for t in tensors), CodecSet(QUANTIZERS), self._measured(cut, tensors))

    def _measured(self, cut: PartitionedGraph, tensors: Sequence[SavedTensor]) -> dict[str, Sensitivity]:
        """By node, what a calibration says of ``tensors``. Only how they compare: all together weigh their share of all
        elements, against which `NOISE_PER_STEP` was set."""
        sensitivities, nodes = self.config.sensitivities, {n.name: n for n in cut.forward.graph.nodes}
        if sensitivities is None:
            return {}
        rows = {t.node: sensitivities.find(module_path(nodes[t.node]), t.node) for t in tensors}
        known = {node: row for node, row in rows.items() if row is not None}
        elements = sum(t.elements for t in tensors if t.node in known) / max(sum(t.elements for t in tensors), 1)
        scale = elements / (sum(row.factor for row in known.values()) or 1.0)
        return {node: replace(row, factor=row.factor * scale) for node, row in known.items()}

    def candidates(self, cut: PartitionedGraph) -> list[Candidate]:
        """What a projection could do to the weight gradients, where ``cut`` says what is stored."""
        return find_projection_sites(self.joint, self.finding, cut, lambda c: self.config.tensor_options_of_any(c.parameters))

    def storages(self, joint: Joint, choice: PartitionPlan) -> tuple[Storage, ...]:
        """In which form everything that crosses is stored."""
        tensors = self.saved(joint, choice.cut)
        return choose_storage(
            tensors, self.config.tensor_options_of_any, sizes_in(choice.cut), CodecSet(QUANTIZERS), choice.codecs
        )


def sizes_in(cut: PartitionedGraph) -> StoredBytes:
    """Bytes of a tensor that crosses ``cut`` in a codec and a group size."""
    nodes = {n.name: n for n in cut.forward.graph.nodes}

    def stored_bytes(tensor: SavedTensor, codec: str, group: int | None) -> int | None:
        layout = layout_of(value(nodes[tensor.node]), codec, group)
        return layout.nbytes if layout is not None else None

    return stored_bytes


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
        return _within(Search(region, free), cut_of, peak)
    search = _Ranks(region, free, cut_of)
    choice = _within(search, search.cut_of, peak)
    notes = [n for n in (search.note(choice), choice.note) if n is not None]
    return replace(choice, note="; ".join(notes) or None)


def _with_recomputation(region: Region, free: PartitionPlan) -> PartitionPlan:
    """``free``, or the cut that runs again what the policies want to be."""
    request_for = region.config.tensor_options_of_any
    tensors = region.tensors(free.cut) if region.config.recomputes else []
    recompute = wanted_again(tensors, request_for, sizes_in(free.cut), CodecSet(QUANTIZERS))
    if not recompute:
        return free
    names = frozenset(name for t in recompute for name in t.recompute or t.of_factors)
    constraints = PartitionConstraints(
        free.constraints.recompute_materialized, names, free.constraints.must_save - {t.base for t in recompute}
    )
    return PartitionPlan(constraints, region.cut(constraints), None)


def _within(
    search: Search[Region] | _Ranks, cut_of: Callable[[PartitionPlan], PartitionedGraph], peak: PeakBudget | None
) -> PartitionPlan:
    """The best choice within the budget of the search's region."""
    region = search.region
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


def no_recompute_partition(region: Region) -> PartitionPlan:
    """The cut that runs no matmul again and has the fewest bytes, as they will be stored.

    The residual stream is asked for as such where that costs nothing: upstream would as soon save every addend of it, which
    the backward then adds up, layer by layer, and holds. Of attention that is not fused the weights are asked for where they
    take less: upstream would as soon save the scores, which it exponentiates again, and which have no low-bit form.
    """
    free = _free_cut(region)
    weights = _attention_weights(region)
    if weights:
        constraints = PartitionConstraints(recompute_materialized=True, must_save=free.constraints.must_save | weights)
        free = min(free, PartitionPlan(constraints, region.cut(constraints), None), key=lambda choice: _stored(region, choice))
    default = PartitionPlan(PartitionConstraints(recompute_materialized=False), region.default, None)
    if not region.chunk_rows and _stored(region, free) > _stored(region, default):
        return default
    return free


def _free_cut(region: Region) -> PartitionPlan:
    """The residual stream is asked for where that takes no more bytes. Mostly the graph says so, or the cut without asking;
    if not, both are cut."""
    sums = region.recomputation.residual_sums
    more = {n.name: region.recomputation.extra_bytes(n) for n in sums}
    plain, kept = (
        PartitionConstraints(recompute_materialized=True),
        PartitionConstraints(recompute_materialized=True, must_save=frozenset(more)),
    )
    if not any(n != 0 for n in more.values()):
        return PartitionPlan(kept, region.cut(kept), None)
    found = region.cut(plain)
    recompute = [more[n.name] for n in found.backward.graph.nodes if n.op == "call_function" and n.name in more]
    if not recompute:  # each that is needed is stored as it is
        return PartitionPlan(kept, found, None)
    first = max(map(tensor_bytes, sums))  # what the others are rebuilt from
    if None not in recompute and sum(n or 0 for n in recompute) > first:
        return PartitionPlan(plain, found, None)
    choices = PartitionPlan(kept, region.cut(kept), None), PartitionPlan(plain, found, None)
    return min(choices, key=lambda choice: choice.cut.saved_bytes)


def _attention_weights(region: Region) -> frozenset[str]:
    """What Inductor's default saves of a softmax over attention's scores."""
    nodes = {n.name: n for n in region.joint.gm.graph.nodes}
    saved = [nodes[name] for name in {s.base: None for s in region.default.saved} if name in nodes]
    found: set[str] = set()
    for node in saved:
        scores = region.recomputation.scores_behind(node)
        if scores in (None, node) or not region.recomputation.softmax_of(scores):
            continue
        if size_hint(value(node).numel()) >= size_hint(value(scores).numel()):  # and no statistic
            found.add(node.name)
    return frozenset(found)


def alternatives(region: Region, count: int) -> list[tuple[int, PartitionPlan]]:
    """(capacity, choice) for ``count`` capacities of saved bytes, from the most that is of use down to the least, or a 64th."""
    search = Search(region, no_recompute_partition(region))
    most, least = search.most, max(search.least, search.most // _RANGE)
    ratio = (least / most) ** (1 / (count - 1)) if most else 1.0
    capacities = [max(search.least, round(most * ratio**i)) for i in range(count)]
    return [(capacity, search.at(capacity).choice) for capacity in capacities]


def _stored(region: Region, choice: PartitionPlan) -> int:
    return sum(s.stored_bytes for s in region.storages(region.joint, choice))


@dataclass(frozen=True, slots=True)
class _Found:
    """choice, the bytes that it stores, and what it costs."""

    choice: PartitionPlan
    stored: int
    cost: int


class Searched(Protocol):
    """What a search asks of a region, be it one that was traced or one that is reckoned
    (`actpass.extrapolation.extrapolate`)."""

    @property
    def config(self) -> Config: ...
    def cut(self, constraints: PartitionConstraints) -> Any: ...
    def tensors(self, cut: Any) -> list[SavedTensor]: ...
    def sizes(self, cut: Any) -> StoredBytes: ...
    def costs(self, cut: Any, tensors: Sequence[SavedTensor]) -> Costs: ...


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
        self._wish_for, self._sizes, self._costs = request_for, sizes, costs
        self._menus: dict[tuple[str | None, bool], list[StorageOptions]] = {}
        self._bytes: dict[str, int] = {}

    @property
    def widths(self) -> tuple[str, ...]:
        """The codecs that are offered, the finest first."""
        return self._costs.codecs.offered

    def storage_options(self, coarsest_codec: str | None, *, recompute: bool) -> list[StorageOptions]:
        key = coarsest_codec, recompute
        if key not in self._menus:
            self._menus[key] = storage_options(
                self.tensors, self._wish_for, self._sizes, self._costs, recompute=recompute, coarsest_codec=coarsest_codec
            )
        return self._menus[key]

    def bytes_in(self, width: str) -> int:
        if width not in self._bytes:
            self._bytes[width] = bytes_in(width, self.tensors, self._wish_for, self._sizes, self._costs.codecs)
        return self._bytes[width]


class Search(Generic[R]):
    """Choices within capacities of saved bytes. stride: each how manieth capacity is looked at where a search by halves finds
    none that fits."""

    reason_not_quantizable = ""
    stride = 4

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
        while found[-1] * step > max(self.least, self.most / _RANGE):
            found.append(int(found[-1] * step))
        return [*found, self.least]

    def at(self, capacity: int) -> _Found:
        """The cheapest choice within ``capacity``, or the smallest that was found.

        Where everything fits in one width, nothing takes a coarser one, if that can be met with queries and keys in forms that
        are safe: an error is weighed against time, and one tensor in 8 bits where 16 do for all is a worse gradient.
        """
        widths = self._base.widths
        widest = next((i for i, w in enumerate(widths) if self._base.bytes_in(w) <= capacity), len(widths) - 1)
        found: list[_Found] = []
        for coarsest_codec in widths[widest:]:
            found.append(self._at(capacity, coarsest_codec))
            if found[-1].stored <= capacity:
                return found[-1]
        return min(found, key=lambda f: f.stored)

    def _at(self, capacity: int, coarsest_codec: str) -> _Found:
        found: list[_Found] = []
        target = capacity
        for _ in range(_TRIES):
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

    def _settle(self, rerun: list[tuple[StorageOptions, int]], capacity: int, coarsest_codec: str) -> _Found:
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
        return _Found(PartitionPlan(crossing.constraints, crossing.cut, chosen), stored, cost + recompute)


class _Ranks:
    """Choices of ranks within capacities of saved bytes. cut_of: a choice as it will be compiled."""

    stride = 8  # each look rewrites and cuts anew

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
    def _smallest(self) -> _Found:
        return self._found([s.least for s in self._listed])

    @property
    def least(self) -> int:
        return self._smallest.stored

    def capacities(self, step: float) -> list[int]:
        """As those of `Search`, of what is left for the projections."""
        most, least = bytes_at(self._listed, [s.most for s in self._listed]), least_bytes_of_ranks(self._listed)
        found = [most]
        while found[-1] * step > max(least, most / _RANGE):
            found.append(int(found[-1] * step))
        return [self.least - least + room for room in (*found, least)]

    def at(self, capacity: int) -> _Found:
        """The choice with the least error within ``capacity``, or the smallest ranks. What is stored besides does not depend
        on the ranks, but for a basis that crosses or a payload too small to be coded: what it comes to is looked at."""
        best = self._smallest
        room = least_bytes_of_ranks(self._listed) + capacity - best.stored
        tried: set[int] = set()
        while room not in tried and len(tried) < _TRIES:
            tried.add(room)
            ranks = choose_ranks(self._listed, room)
            if ranks is None:
                break
            found = self._found(ranks)
            if found.stored <= capacity and found.cost <= best.cost:
                best = found
            room = bytes_at(self._listed, ranks) + capacity - found.stored
        return best

    def _found(self, ranks: Sequence[int]) -> _Found:
        choice = replace(self.free, ranks=dict(zip(self.sites, ranks, strict=True)))
        error = UNIT * NOISE_PER_STEP * SHARE_IN_A_CONTRACTION * self._noise(choice)
        return _Found(choice, self.cut_of(choice).saved_bytes, round(error))

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


def _solve(listed: list[StorageOptions], capacity: int) -> tuple[int, ...]:
    """The option of each menu: the cheapest within ``capacity``, or the smallest."""
    options = [m.options for m in listed]
    solution = solve(options, max(capacity, least_bytes(options)))
    assert solution is not None
    return solution.chosen


def _least_of_ladder(search: Search[Any] | _Ranks, cut_of: Callable[[PartitionPlan], PartitionedGraph]) -> PartitionPlan:
    """The choice with the least peak, and all of the ladder."""
    levels: list[tuple[OperatingPoint, PartitionPlan]] = []
    for capacity in search.capacities(_STEP_OF_LADDER):
        found = search.at(capacity)
        footprint = cut_of(found.choice).footprint
        levels.append((OperatingPoint(capacity, found.cost, footprint), found.choice))
    _, choice = min(levels, key=lambda item: (needs([item[0]]), item[0].cost))
    return replace(choice, levels=tuple(level for level, _ in levels))


class Limit(Protocol):
    """A budget of peak bytes, of one device or of each rank."""

    @property
    def nbytes(self) -> int: ...
    def needs(self, cut: Any) -> int: ...
    def floor(self, cut: Any) -> int: ...
    def error(self, cut: Any, options: str) -> BudgetError: ...


def within_peak(search: Search[Any] | _Ranks, cut_of: Callable[[PartitionPlan], Any], budget: Limit) -> PartitionPlan:
    """The choice of the largest capacity whose predicted peak is within ``budget``. Raises its error if there is none."""
    capacities = search.capacities(_STEP)
    known: dict[int, tuple[PartitionPlan, Any]] = {}
    cuts: dict[Hashable, Any] = {}  # several capacities may give one choice

    def fits(i: int) -> bool:
        if i not in known:
            choice = search.at(capacities[i]).choice
            if choice.key not in cuts:
                cuts[choice.key] = cut_of(choice)
            known[i] = choice, cuts[choice.key]
        return budget.needs(known[i][1]) <= max(budget.nbytes, budget.floor(known[i][1]))

    low, high = 0, len(capacities) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    if not fits(low):  # the least bytes need not have the least peak
        low = next((i for i in range(0, len(capacities), search.stride) if fits(i)), -1)
    if low >= 0 and budget.needs(known[low][1]) <= budget.nbytes:
        return replace(known[low][0], limited=low > 0)
    least = known[low] if low >= 0 else min(known.values(), key=lambda item: budget.needs(item[1]))
    raise budget.error(least[1], search.region.config.tensor_options.described)

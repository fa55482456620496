"""Who decides: a search within the budget. See `actpass.planner.apply_plan` for a plan that is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from actpass.analysis.projection_sites import find_owners
from actpass.errors import LogitsReturned
from actpass.ir.joint_graph import value
from actpass.options import Config
from actpass.passes.base import PlanSource, RegionState
from actpass.plan import Decision, SavedTensor, Storage, choose, choose_decoded
from actpass.planner.budget import choose_cut
from actpass.planner.peak_budget import PeakBudget
from actpass.planner.region import PartitionPlan, Region


class RegionPlan(PlanSource, Protocol):
    """Who decides for one ``region``, after its ``choice`` of where to cut."""

    @property
    def region(self) -> Region: ...

    @property
    def choice(self) -> PartitionPlan: ...


CarryOut = Callable[[RegionPlan], RegionState]


class Planner(Protocol):
    """Makes the plan of a region. is_given: it reads it."""

    @property
    def is_given(self) -> bool: ...

    def loss_rows(self, config: Config) -> int | bool:
        """Rows of a piece of the loss; True: as many as suit; 0: it stays whole."""
        ...

    def check_loss(self, state: RegionState) -> None:
        """Raises where the loss of ``state`` must not be as it is."""
        ...

    def plan(self, region: Region, carry_out: CarryOut, peak: PeakBudget | None) -> tuple[PartitionPlan, RegionState]:
        """What is chosen, and what it became. peak: the budget, if it is one of peak bytes."""
        ...


@dataclass(frozen=True)
class Searching:
    """A plan within the budget of the options."""

    is_given: bool = False

    def loss_rows(self, config: Config) -> int | bool:
        return config.memory_budget != 1.0 and config.chunked_loss

    def check_loss(self, state: RegionState) -> None:
        if state.joint.inputs.deferred and state.chunked is None:
            raise LogitsReturned(state.why_whole or "they do not weigh")

    def plan(self, region: Region, carry_out: CarryOut, peak: PeakBudget | None) -> tuple[PartitionPlan, RegionState]:
        choice = choose_cut(region, lambda choice: carry_out(SearchedPlan(region, choice)).partitioned, peak)
        return choice, carry_out(SearchedPlan(region, choice))


@dataclass(frozen=True)
class SearchedPlan:
    """What the options and a ``choice`` say of ``region``."""

    region: Region
    choice: PartitionPlan
    is_given: bool = False

    def decide_gradients(self) -> tuple[Decision, ...]:
        config = self.region.config
        skip_unprofitable = config.skip_unprofitable and not config.keeps_low_rank_gradients
        candidates = self.region.candidates(self.choice.cut)
        request_for, ranks = config.tensor_options_of_any, self.choice.ranks
        return choose(candidates, request_for, skip_unprofitable=skip_unprofitable, ranks=ranks).decisions

    def is_factored(self, parameter: str) -> bool:
        return True

    def decide_decoded(self, state: RegionState) -> tuple[tuple[Decision, ...], Mapping[str, SavedTensor]]:
        config = self.region.config
        if not config.projects_activations:
            return (), {}
        tensors, owners = decodable(self.region, state)
        only = config.skip_unprofitable
        return choose_decoded(tensors.values(), owners, config.tensor_options_of_any, skip_unprofitable=only), tensors

    def decide_storages(self, state: RegionState) -> tuple[tuple[Storage, ...], tuple[str, ...]]:
        return self.region.storages(state.joint, replace(self.choice, cut=state.partitioned)), ()


def decodable(region: Region, state: RegionState) -> tuple[dict[str, SavedTensor], dict[str, str]]:
    """What crosses the cut of ``state``, but projections that are stored for a weight gradient, by node, and the parameters
    that subspaces of it belong to."""
    known = {n.name for n in region.joint.gm.graph.nodes}
    tensors = {t.node: t for t in region.saved(state.joint, state.partitioned) if {t.node, t.base} <= known}
    paths = {path: value(node).dim() for node, path in region.joint.parameter_path.items()}
    return tensors, find_owners(region.joint, region.finding, state.partitioned, list(tensors.values()), paths)
